"""Batch normalisation's statistics anew: what a changed network really writes, from unlabelled data.

Pruning changes what layers write, and the running means and variances in a network speak of what they wrote before. The
plain average over all batches takes their place (Li et al. 2020, "EagleEye: Fast Sub-net Evaluation for Efficient
Neural Network Pruning", section 4.2, adaptive batch normalisation). No weight changes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deploykit.core.context import Context
from deploykit.core.errors import DeploykitError
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ReestimateBn:
    """Replaces running statistics by averages over the calibration data."""

    batch: int = 64
    """Samples whose statistics are taken together, at least 2."""

    stage: ClassVar[Stage] = "model"
    needs: ClassVar[tuple[Need, ...]] = ("data",)
    pays_if: ClassVar[tuple[Profit, ...]] = ("structured", "unstructured", "2:4", "small_file", "low_rank")

    def __post_init__(self) -> None:
        """Refuses batches without a variance."""
        if self.batch < 2:
            raise ValueError(f"batch must be at least 2, given {self.batch}")

    def foresee(self, context: Context) -> None:
        """Refuses a single sample, which has no variance."""
        data = context.need("calibration", "reestimate_bn")
        if len(data) < 2:
            raise DeploykitError(f"reestimate_bn needs at least 2 samples, {data.origin} has {len(data)}")

    def __call__(self, model: nn.Module, context: Context) -> nn.Module:
        """A copy of the model with other statistics, in the mode the model came in; norms that do not run keep theirs.

        Raises:
            DeploykitError: no calibration data, a single sample, or no layer that has statistics.
        """
        import torch
        from torch.nn.modules.batchnorm import _BatchNorm

        from deploykit.layerwise.watching import evaluating
        from deploykit.losses import as_tensors

        self.foresee(context)
        data = context.need("calibration", "reestimate_bn")
        anew = copy.deepcopy(model)
        norms = [layer for layer in anew.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
        if not norms:
            raise DeploykitError("reestimate_bn: the model has no batch normalisation with running statistics")
        momenta = [norm.momentum for norm in norms]
        before = [copy.deepcopy(norm.state_dict()) for norm in norms]
        with evaluating(anew), torch.no_grad():  # dropout stays off
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # cumulative average: batch k weighs 1/k
                norm.train()
            for batch in data.batches(self.batch):
                if len(next(iter(batch.inputs.values()))) == self.batch or len(data) < self.batch:
                    anew(**as_tensors(batch.inputs))
        for norm, momentum, state in zip(norms, momenta, before, strict=True):
            norm.momentum = momentum
            if not norm.num_batches_tracked:  # nothing ran through it, so there is nothing better to say
                norm.load_state_dict(state)
        return anew
