"""Spatial separation: a kernel of height times width as a column of rank j channels, then a row.

Jaderberg et al. 2014, "Speeding up Convolutional Neural Networks with Low Rank Expansions", scheme 2; the best such
factors are a singular value decomposition (Tai et al. 2016, "Convolutional Neural Networks with Low-Rank
Regularization", theorem 1):

    W[f, c, y, x]  ≈  Σ_r H[f, r, x] V[r, c, y].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deploykit.low_rank.factored import Place, Ranks, Shape, shape_of

RUNS_AT: tuple[Place, ...] = ("mid", "out")
KERNEL: int | None = None
LOOKS = 32
"""Ranks that are tried per layer, at most."""


def full(shape: Shape) -> Ranks:
    """(j,) with which nothing is lost."""
    height, width = shape.kernel
    return (min(shape.c * height, shape.f * width),)


def choices(shape: Shape, multiple: int) -> Iterator[Ranks]:
    """Ranks in even steps, multiples of ``multiple``."""
    (most,) = full(shape)
    step = multiple * -(-most // (multiple * LOOKS))
    yield from ((j,) for j in range(step, most + 1, step))


def weights(shape: Shape, ranks: Ranks) -> tuple[int, ...]:
    """Of the factors."""
    (j,), (height, width) = ranks, shape.kernel
    return j * shape.c * height, j * shape.f * width


def split(w: Tensor, g: int, ranks: Ranks) -> tuple[Tensor, ...]:
    """V ``[j, c, height, 1]`` and H ``[f, j, 1, width]``, the singular values shared evenly between them."""
    (j,), (f, c, height, width) = ranks, w.shape
    u, s, v = _separated(w)
    root = s[:j].sqrt()
    column = (u[:, :j] * root).T.reshape(j, c, height, 1)
    return column, (root[:, None] * v[:j]).reshape(j, f, 1, width).transpose(0, 1)


def _separated(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values of the weight as ``[c * height, f * width]``."""
    f, c, height, width = w.shape
    u, s, v = torch.linalg.svd(w.permute(1, 2, 0, 3).reshape(c * height, f * width), full_matrices=False)
    return u, s, v


def approximations(w: Tensor, g: int, choices: Sequence[Ranks]) -> Iterator[Tensor]:
    """What each of the choices makes of a weight."""
    f, c, height, width = w.shape
    u, s, v = _separated(w)
    for (j,) in choices:
        yield ((u[:, :j] * s[:j]) @ v[:j]).reshape(c, height, f, width).permute(2, 0, 1, 3)


def merge(factors: Sequence[Tensor], g: int, ranks: Ranks) -> Tensor:
    """The weight that the factors make, ``[f, c, height, width]``."""
    return torch.einsum("rcy,frx->fcyx", factors[0][:, :, :, 0], factors[1][:, :, 0])


def modules(layer: Any, ranks: Ranks) -> list[nn.Module]:
    """The column; the row, with the bias."""
    (j,), shape = ranks, shape_of(layer)
    return [along(layer, 0, shape.c, j), along(layer, 1, j, shape.f, bias=True)]


def along(layer: Any, axis: int, inputs: int, outputs: int, groups: int = 1, bias: bool = False) -> nn.Module:
    """A convolution with one dimension of a layer's kernel; the other has a single tap.

    Args:
        layer: a Conv2d.
        axis: 0 (height) or 1 (width).
        inputs: channels.
        outputs: channels.
        groups: of channels.
        bias: whether it has one, if the layer has.
    """

    def only(values: tuple[int, int], other: int) -> tuple[int, int]:
        return (values[0], other) if axis == 0 else (other, values[1])

    pad = layer.padding if isinstance(layer.padding, str) else only(layer.padding, 0)
    made = nn.Conv2d(
        inputs, outputs, only(layer.kernel_size, 1), only(layer.stride, 1), pad, only(layer.dilation, 1), groups,
        bias and layer.bias is not None, layer.padding_mode, dtype=layer.weight.dtype, device=layer.weight.device,
    )  # fmt: skip
    return made.requires_grad_(layer.weight.requires_grad)
