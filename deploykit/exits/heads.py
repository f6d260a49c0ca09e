"""What stands at an exit: a bottleneck that brings a stage's features to the size of the deepest's, and a classifier.

Zhang et al. 2019, "Be Your Own Teacher", section 3 and figure 2. The features that the hint compares are those behind
the last average over positions, as in luanyunteng's code, the one of others that is most used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from deploykit.core.errors import DeploykitError

NARROWER = 4
"""The bottleneck has a quarter of the deepest's channels, as in He et al. 2015."""


class Exit(nn.Module):
    """A stage's maps ``[n, c, h, w]`` (or vectors ``[n, c]``) -> features ``[n, c_C]`` and logits ``[n, classes]``."""

    def __init__(self, stage: Sequence[int], deepest: Sequence[int], classes: int) -> None:
        """Random weights.

        Args:
            stage: ``(c, h, w)`` of the stage it stands behind, or ``(c,)``.
            deepest: ``(c_C, h_C, w_C)`` of the last stage, or ``(c_C,)``.
            classes: how many.

        Raises:
            DeploykitError: maps behind vectors.
        """
        super().__init__()
        if len(stage) < len(deepest):
            raise DeploykitError(f"an exit cannot bring vectors {list(stage)} to the size of maps {list(deepest)}")
        self.bottleneck = _of_maps(stage, deepest) if len(stage) == 3 else _of_vectors(stage[0], deepest[0])
        self.classifier = nn.Linear(deepest[0], classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits."""
        features = pooled(self.bottleneck(x))
        return features, self.classifier(features)


def pooled(x: Tensor) -> Tensor:
    """``[n, c, h, w]`` -> ``[n, c]``, the mean over positions; vectors stay."""
    return x.mean((2, 3)) if x.ndim == 4 else x


def _of_maps(stage: Sequence[int], deepest: Sequence[int]) -> nn.Module:
    """1x1 to few channels, a 3x3 that halves for every time the network still halves, 1x1 to the deepest's channels."""
    narrow = max(1, deepest[0] // NARROWER)
    halvings, height = 0, stage[1]
    while len(deepest) == 3 and height >= 2 * deepest[1]:
        halvings, height = halvings + 1, -(-height // 2)
    layers = _normed(stage[0], narrow, 1, 1)
    for stride in [2] * halvings or [1]:
        layers += _normed(narrow, narrow, 3, stride)
    return nn.Sequential(*layers, *_normed(narrow, deepest[0], 1, 1))


def _normed(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def _of_vectors(inputs: int, outputs: int) -> nn.Module:
    return cast(nn.Module, nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU()))
