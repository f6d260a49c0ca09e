"""Hints: a layer of the student learns to tell what a layer of the teacher writes.

Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", section 2.2, equation 3. The student's layer may be thinner: a
regressor in between, trained with it and thrown away afterwards, has the teacher's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deploykit.core.errors import DeploykitError
from deploykit.distillation.logits import half_square
from deploykit.losses import TrainBatch, pairs

if TYPE_CHECKING:
    from torch import Tensor, nn


def hints(outputs: Any, batch: TrainBatch) -> Tensor:
    """Half the squared distance of features, averaged over samples and numbers, summed over layers.

        L = ½ mean of  (u_h - r(v_g))²

    Args:
        outputs: r(v_g) of every layer: what the student's writes, through its regressor, ``[n, ...]``.
        batch: ``batch.teacher`` is u_h of every layer, of the same shapes. The paper sums where this averages, so that
            the weight of the loss does not depend on the size of the maps.

    Raises:
        DeploykitError: the shapes differ.
    """
    squares = [half_square(r, u) / u[0].numel() for r, u in pairs(outputs, batch)]
    return sum(squares[1:], squares[0])


def regressor(student: Sequence[int], teacher: Sequence[int]) -> nn.Module:
    """The linear map between what two layers write.

    Args:
        student: shape of the student's features, ``[n, c, h, w]`` (or of any rank, with features last).
        teacher: of the teacher's, ``[n, c', h', w']``, h' <= h and w' <= w (or ``[n, ..., f']``).

    Returns:
        a convolution without padding whose kernel makes h' of h and w' of w, as in section 2.2: h - h' + 1 high; or a
        linear layer on the last axis.

    Raises:
        DeploykitError: maps of a kind or size that cannot be brought together.
    """
    from torch import nn

    if len(student) == len(teacher) == 4:
        kernel = (student[2] - teacher[2] + 1, student[3] - teacher[3] + 1)
        if min(kernel) >= 1:
            return nn.Conv2d(student[1], teacher[1], kernel)
    elif len(student) == len(teacher) >= 2 and list(student[:-1]) == list(teacher[:-1]):
        return nn.Linear(student[-1], teacher[-1])
    raise DeploykitError(
        f"a layer that writes {list(student[1:])} cannot follow one that writes {list(teacher[1:])}: maps must be as "
        "large as the teacher's or larger, and other features may differ in the last axis only"
    )
