"""What steps that train have in common: which loss, on which samples, judged on which."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.losses import distill_kl

if TYPE_CHECKING:
    from torch import Tensor, nn

KEPT_OUT = 10
"""Without held-out calibration data every tenth training sample is kept out, but no more than `MOST_KEPT_OUT`."""
MOST_KEPT_OUT = 500


def train(
    model: nn.Module,
    context: Context,
    who: str,
    steps: int,
    learning_rate: float,
    temperature: float = 1.0,
    keep: Callable[[int], None] | None = None,
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
        keep: called after every optimizer step with its number, from 0: sees to it that what has to hold still holds.
        penalty: what is added to the loss.
    """
    data, holdout = split(context.need("train", who), context.data.get("holdout"))
    if context.trainer is None:
        raise DeploykitError(f"{who} needs a trainer")
    loss = context.loss or distill_kl(temperature)
    whole = loss if penalty is None else lambda outputs, batch: loss(outputs, batch) + penalty()
    context.trainer.fit(
        model, data, whole, teacher=context.original, holdout=holdout, steps=steps,
        learning_rate=learning_rate, on_step=(lambda step, _loss: keep(step)) if keep is not None else None,
    )  # fmt: skip


def split(data: DataSet, holdout: DataSet | None) -> tuple[DataSet, DataSet | None]:
    """What is trained on, and what states are judged on.

    Held-out calibration samples, if the loss finds labels there as it does in the training data; else part of the
    training data, where there is enough.
    """
    if holdout is not None and (data.labels is None or holdout.labels is not None):
        return data, holdout
    kept = np.zeros(len(data), bool)
    kept[KEPT_OUT - 1 :: max(KEPT_OUT, -(-len(data) // MOST_KEPT_OUT))] = True
    if not kept.any():
        return data, None
    return data.pick(np.flatnonzero(~kept)), data.pick(np.flatnonzero(kept))
