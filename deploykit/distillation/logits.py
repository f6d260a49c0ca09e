"""Regression on logits: the student answers what the teacher answers, before any softmax.

Ba & Caruana 2014, "Do Deep Nets Really Need to be Deep?", section 2.2, equation 1. Differences between small logits
count as much as those between large ones, which a softmax would hide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deploykit.losses import TrainBatch, pairs

if TYPE_CHECKING:
    from torch import Tensor


def logits(outputs: Any, batch: TrainBatch) -> Tensor:
    """Half the squared distance of the logits, averaged over the samples.

    With logits g (student) and z (teacher) ``[n, classes, ...]``:

        L = 1/(2n) · sum over n of  ‖g - z‖²

    Several outputs are summed. No labels are needed.

    Raises:
        DeploykitError: there is no teacher, or its answers have another shape.
    """
    squares = [half_square(g, z) for g, z in pairs(outputs, batch)]
    return sum(squares[1:], squares[0])


def half_square(g: Tensor, z: Tensor) -> Tensor:
    """1/(2n) · ‖g - z‖² of tensors ``[n, ...]``."""
    return (g - z).square().sum() / (2 * len(g))
