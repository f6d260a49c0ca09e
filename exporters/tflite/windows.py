"""Arithmetic of sliding windows and of resizing: ONNX's paddings and coordinates against LiteRT's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Pads = list[tuple[int, int]]
"""Before and behind, per spatial axis."""


def same_padding(size: int, out: int, kernel: int, stride: int, dilation: int) -> tuple[int, int] | None:
    """What LiteRT's SAME adds before and behind one axis, or None where SAME gives another output size."""
    if out != -(-size // stride):
        return None
    total = max((out - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def used_padding(
    sizes: Sequence[int],
    outs: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    begins: Sequence[int],
) -> Pads:
    """Per axis the padding that the windows really touch: what is behind the last window is left out (or negative)."""
    axes = zip(sizes, outs, kernel, strides, dilations, begins, strict=True)
    return [(b, (o - 1) * s + (k - 1) * d + 1 - i - b) for i, o, k, s, d, b in axes]


def nearest_source(size: int, out: int, scale: float, coordinate: str, rounding: str) -> NDArray[np.int64]:
    """For each output index the input index that ONNX's nearest Resize reads (operator Resize, opset 19)."""
    x = source_coordinate(size, out, scale, coordinate)
    rounded = {
        "round_prefer_floor": np.ceil(x - 0.5),
        "round_prefer_ceil": np.floor(x + 0.5),
        "floor": np.floor(x),
        "ceil": np.ceil(x),
    }[rounding]
    return np.clip(rounded, 0, size - 1).astype(np.int64)


def source_coordinate(size: int, out: int, scale: float, coordinate: str) -> NDArray[np.float64]:
    """For each output index the input coordinate that ONNX's Resize interpolates at.

    Raises:
        KeyError: a coordinate transformation that is not known here.
    """
    x = np.arange(out, dtype=np.float64)
    half_pixel = (x + 0.5) / scale - 0.5
    return {
        "half_pixel": half_pixel,
        "pytorch_half_pixel": half_pixel if out > 1 else np.zeros(1),
        "align_corners": x * (size - 1) / max(out - 1, 1),
        "asymmetric": x / scale,
    }[coordinate]


def litert_coordinate(size: int, out: int, align_corners: bool, half_pixel: bool) -> NDArray[np.float64]:
    """For each output index the input coordinate that LiteRT's RESIZE_BILINEAR interpolates at."""
    scale = (size - 1) / (out - 1) if align_corners and out > 1 else size / out
    x = np.arange(out, dtype=np.float64)
    return np.maximum((x + 0.5) * scale - 0.5, 0) if half_pixel else x * scale


def litert_nearest(size: int, out: int, align_corners: bool, half_pixel: bool) -> NDArray[np.int64]:
    """For each output index the input index that LiteRT's RESIZE_NEAREST_NEIGHBOR reads (float32 arithmetic)."""
    scale = np.float32((size - 1) / (out - 1)) if align_corners and out > 1 else np.float32(size) / np.float32(out)
    x = (np.arange(out, dtype=np.float32) + np.float32(0.5 if half_pixel else 0)) * scale
    rounded = np.floor(x + np.float32(0.5)) if align_corners else np.floor(x)
    return np.clip(rounded, 0, size - 1).astype(np.int64)
