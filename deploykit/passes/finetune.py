"""Fine-tuning: a pruned model is trained on, with the model as it came in for a teacher.

The loss is the Kullback-Leibler divergence from the original's answers (Hinton et al. 2015), so no labels are needed;
``loss`` in the recipe's ``[train]`` table replaces it. Zeros stay zero. Held-out samples decide which state is kept.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deploykit.core.context import Context
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Finetune:
    """Trains the model for a number of optimizer steps."""

    steps: int = 150
    learning_rate: float = 1e-3
    temperature: float = 1.0
    """Of the distillation; 1 compares plain probabilities."""

    stage: ClassVar[Stage] = "model"
    needs: ClassVar[tuple[Need, ...]] = ("train", "teacher")
    pays_if: ClassVar[tuple[Profit, ...]] = ("structured", "unstructured", "2:4", "low_rank", "codebook", "small_file")

    def __post_init__(self) -> None:
        """Refuses settings that cannot train."""
        if self.steps < 1 or not (self.learning_rate > 0 and self.temperature > 0):
            raise ValueError("steps, learning_rate and temperature must be above 0")

    def __call__(self, model: nn.Module, context: Context) -> nn.Module:
        """A trained copy of the model.

        Raises:
            DeploykitError: the loss becomes NaN and there is no good state to go back to.
        """
        from deploykit.retraining import train

        trained = copy.deepcopy(model)
        train(trained, context, "finetune", self.steps, self.learning_rate, self.temperature)
        return trained
