"""Soft filter pruning: the weakest channels are set to zero again and again while the network trains.

He et al. 2018, "Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks". Every so many steps the
channels with the smallest norm become zero, layer by layer, and train on: one that is needed after all grows back.
Those that are weakest in the end are taken out.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from deploykit.core.context import Context
from deploykit.core.errors import DeploykitError, said_by
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from deploykit.pruning.groups import Channel


@dataclass(frozen=True)
class SoftPrune:
    """Trains with a share of the channels of every layer set to zero now and then, and takes that share out."""

    amount: float
    """Share of the channels of every group, 0 < amount < 1."""
    steps: int = 300
    """Optimizer steps."""
    every: int = 30
    """Steps between two times that channels become zero; the paper: an epoch."""
    learning_rate: float = 1e-3

    stage: ClassVar[Stage] = "model"
    needs: ClassVar[tuple[Need, ...]] = ("train",)
    pays_if: ClassVar[tuple[Profit, ...]] = ("structured",)

    def __post_init__(self) -> None:
        """Refuses settings that cannot train."""
        if not 0.0 < self.amount < 1.0:
            raise ValueError(f"amount must lie between 0 and 1, given {self.amount}")
        if self.steps < 1 or self.every < 1 or not self.learning_rate > 0:
            raise ValueError("steps, every and learning_rate must be above 0")

    def __call__(self, model: nn.Module, context: Context) -> nn.Module:
        """A narrower, trained copy of the model.

        Raises:
            DeploykitError: there are no channels that can be taken out, or none as the target's multiple is.
        """
        from deploykit.losses import as_tensors
        from deploykit.pruning.budget import chosen, ranked
        from deploykit.pruning.criteria import importance
        from deploykit.pruning.criteria.evidence import Evidence
        from deploykit.pruning.groups import together
        from deploykit.pruning.surgery import assert_equal, taken_out, without
        from deploykit.pruning.takable import sample, stuck, takable
        from deploykit.retraining import train

        trained = copy.deepcopy(model)
        inputs, multiple = as_tensors(context.example), context.target.channel_multiple
        groups = takable(trained, context, "soft_prune")
        if why := stuck(trained, groups, multiple, self.amount):
            raise DeploykitError(f"soft_prune: {why}")

        def weakest() -> list[Channel]:
            scores = importance(trained, groups, "l2", Evidence(sample(context)))
            return chosen(ranked(trained, groups, scores, multiple, self.amount), 1.0, "layer")

        def soften(step: int) -> None:
            if (step + 1) % self.every == 0:
                silence(trained, weakest())

        train(trained, context, "soft_prune", self.steps, self.learning_rate, keep=soften)
        removed = together(weakest())
        pruned = without(trained, removed)
        with said_by("soft_prune"):
            assert_equal(trained, pruned, removed, inputs)
        context.note(taken_out(repr(self), trained, pruned, "no channel taken out"))
        return pruned


def silence(model: nn.Module, channels: Sequence[Channel]) -> None:
    """Sets the weights and biases that write these channels to zero, in place."""
    from deploykit.hub.structure import set_parameter
    from deploykit.layerwise.channels import weight_axis
    from deploykit.pruning.groups import together

    for (name, side), numbers in together(channels).items():
        layer: Any = model.get_submodule(name)
        if side == "out":
            axis = weight_axis(layer, "out")
            within = sorted({c % layer.weight.shape[axis] for c in numbers})
            weight = layer.weight.detach().clone()
            weight.movedim(axis, 0)[within] = 0
            set_parameter(layer, "weight", weight)
            if getattr(layer, "bias", None) is not None:
                bias = layer.bias.detach().clone()
                bias[numbers] = 0
                set_parameter(layer, "bias", bias)
