"""Where ONNX's Resize reads an image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

COORDINATES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
"""The coordinate transformations of ONNX's Resize that are known here."""


def nearest_positions(size: int, out: int, scale: float, coordinate: str, rounding: str) -> tuple[int, ...]:
    """For each output index the input index that ONNX's Resize reads in mode ``nearest``."""
    places = np.clip(ROUNDINGS[rounding](coordinates(size, out, scale, coordinate)), 0, size - 1)
    return tuple(places.astype(int).tolist())


ROUNDINGS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def coordinates(size: int, out: int, scale: float, transformation: str) -> NDArray[np.float64]:
    """For each output index the input coordinate that ONNX's Resize reads at (operator Resize, opset 19)."""
    x = np.arange(out, dtype=np.float64)
    if transformation == "align_corners":
        return x * (size - 1) / max(out - 1, 1)
    if transformation == "asymmetric":
        return x / scale
    if transformation == "pytorch_half_pixel" and out == 1:
        return np.zeros(1)
    return (x + 0.5) / scale - 0.5
