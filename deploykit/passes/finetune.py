"""Fine-tuning: a pruned model is trained on, with the model as it came in for a teacher.

The loss is the Kullback-Leibler divergence from the original's answers (Hinton et al. 2015), so no labels are needed;
``loss`` in the recipe's ``[train]`` table replaces it. Zeros stay zero. Held-out samples decide which state is kept.
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
    from collections.abc import Callable

    from torch import Tensor, nn


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
        trained = copy.deepcopy(model)
        train(trained, context, "finetune", self.steps, self.learning_rate, self.temperature)
        return trained


def train(
    model: nn.Module,
    context: Context,
    who: str,
    steps: int,
    learning_rate: float,
    temperature: float = 1.0,
    keep: Callable[[], None] | None = None,
    penalty: Callable[[], Tensor] | None = None,
) -> None:
    """Trains in place, by the recipe's loss or by what the original answers.

    Args:
        model: what is trained.
        context: training data, trainer, original, loss.
        who: the step's name.
        steps: optimizer steps.
        learning_rate: the highest.
        temperature: of the distillation.
        keep: called after every optimizer step: sees to it that what has to hold still holds.
        penalty: what is added to the loss.
    """
    from deploykit.losses import distill_kl
    from deploykit.passes.qat import split

    data, holdout = split(context.need("train", who), context.data.get("holdout"))
    if context.trainer is None:
        raise DeploykitError(f"{who} needs a trainer")
    loss = context.loss or distill_kl(temperature)
    whole = loss if penalty is None else lambda outputs, batch: loss(outputs, batch) + penalty()
    context.trainer.fit(
        model, data, whole, teacher=context.original, holdout=holdout, steps=steps,
        learning_rate=learning_rate, on_step=(lambda _step, _loss: keep()) if keep is not None else None,
    )  # fmt: skip
