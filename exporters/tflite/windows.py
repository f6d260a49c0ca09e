"""Arithmetic of sliding windows and of resizing: ONNX's paddings and coordinates against LiteRT's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deploykit.exporters.resizing import ROUNDINGS, coordinates

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
    """Per axis the padding that the windows really touch; what lies behind the last window is left out."""
    axes = zip(sizes, outs, kernel, strides, dilations, begins, strict=True)
    return [(b, max((o - 1) * s + (k - 1) * d + 1 - i - b, 0)) for i, o, k, s, d, b in axes]


def litert_mode(
    axes: Sequence[tuple[int, int, float]], coordinate: str, rounding: str | None
) -> tuple[bool, bool] | None:
    """LiteRT's (align_corners, half_pixel_centers) that read an image in the same places as ONNX's Resize does.

    Args:
        axes: (size, resized size, scale) of height and width.
        coordinate: one of `deploykit.exporters.resizing.COORDINATES`.
        rounding: ONNX's ``nearest_mode``; None for bilinear.

    Returns:
        The first mode that agrees everywhere, or None.
    """
    for align, half in ((False, False), (False, True), (True, False)):
        if rounding is None:
            pairs = [(coordinates(*axis, coordinate), _litert_coordinate(*axis[:2], align, half)) for axis in axes]
        else:
            pairs = [
                (ROUNDINGS[rounding](coordinates(*axis, coordinate)), _litert_nearest(*axis[:2], align, half))
                for axis in axes
            ]
        tops = [size - 1 for size, _, _ in axes]
        if all(
            np.allclose(np.clip(ours, 0, top), np.clip(theirs, 0, top), rtol=0, atol=1e-4)
            for (ours, theirs), top in zip(pairs, tops, strict=True)
        ):
            return align, half
    return None


def _litert_coordinate(size: int, out: int, align_corners: bool, half_pixel: bool) -> NDArray[np.float64]:
    """For each output index the input coordinate that RESIZE_BILINEAR reads at."""
    x = np.arange(out, dtype=np.float64)
    scale = _litert_scale(size, out, align_corners)
    return (x + 0.5) * scale - 0.5 if half_pixel else x * scale


def _litert_nearest(size: int, out: int, align_corners: bool, half_pixel: bool) -> NDArray[np.float64]:
    """For each output index the input index that RESIZE_NEAREST_NEIGHBOR reads; it computes in float32."""
    x = np.arange(out, dtype=np.float32) + np.float32(0.5 if half_pixel else 0)
    x *= np.float32(_litert_scale(size, out, align_corners))
    index: NDArray[np.float64] = np.floor(x + np.float32(0.5) if align_corners else x).astype(np.float64)
    return index


def _litert_scale(size: int, out: int, align_corners: bool) -> float:
    return (size - 1) / (out - 1) if align_corners and out > 1 else size / out
