"""Dense-sparse-dense training: pruned, trained, given its weights back, trained again.

Han et al. 2017, "DSD: Dense-Sparse-Dense Training for Deep Neural Networks". The model comes in trained (dense). In
every layer the smallest weights are held at zero while the others train (sparse). Then all may move, those that were
zero from zero, at a tenth of the learning rate (dense). It ends as large as it was; what it gains is accuracy.
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
    from torch import Tensor, nn

AGAIN = 0.1
"""Of the learning rate, when all weights train again (section 3)."""


@dataclass(frozen=True)
class Dsd:
    """Trains with a share of the weights of every layer held at zero, then with all."""

    sparsity: float = 0.3
    """Share of every layer's weights that are held at zero: the one hyper-parameter. The paper uses 0.25 to 0.5."""
    steps: int = 150
    """Optimizer steps, of the sparse part and again of the dense one."""
    learning_rate: float = 1e-3

    stage: ClassVar[Stage] = "model"
    needs: ClassVar[tuple[Need, ...]] = ("train",)
    pays_if: ClassVar[tuple[Profit, ...]] = ("structured", "unstructured", "fp16", "int8", "small_file")

    def __post_init__(self) -> None:
        """Refuses settings that cannot train."""
        if not 0.0 < self.sparsity < 1.0 or self.steps < 1 or not self.learning_rate > 0:
            raise ValueError("sparsity must lie between 0 and 1, steps and learning_rate must be above 0")

    def __call__(self, model: nn.Module, context: Context) -> nn.Module:
        """A trained copy of the model, as dense as it was.

        Raises:
            DeploykitError: there is no weight of two or more dimensions.
        """
        from deploykit.retraining import train

        trained = copy.deepcopy(model)
        held = smallest(trained, self.sparsity)
        if not held:
            raise DeploykitError("dsd: the model has no weights of two or more dimensions")
        clear(held)
        train(trained, context, "dsd", self.steps, self.learning_rate, keep=lambda _step: clear(held))
        train(trained, context, "dsd", self.steps, AGAIN * self.learning_rate)
        return trained


def smallest(model: nn.Module, share: float) -> list[tuple[Tensor, Tensor]]:
    """Weights of two or more dimensions, those of recurrent layers among them, and which of their entries are smallest.

    Not masks as `deploykit.hub.structure` has them: those are for ever, and recurrent layers have no room for them.
    """
    import torch

    found: list[tuple[Tensor, Tensor]] = []
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.requires_grad:
            taken = torch.zeros(parameter.numel(), dtype=torch.bool)
            order = parameter.detach().abs().flatten().argsort(stable=True)
            taken[order[: round(share * parameter.numel())]] = True
            found.append((parameter, taken.reshape(parameter.shape)))
    return found


def clear(held: list[tuple[Tensor, Tensor]]) -> None:
    """Sets the held entries to zero."""
    for parameter, taken in held:
        parameter.data.masked_fill_(taken.to(parameter.device), 0.0)
