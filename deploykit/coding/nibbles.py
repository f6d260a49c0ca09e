"""Two elements in a byte, the first in its low half, as ONNX, OpenVINO and TFLite all have them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def unpacked(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The halves of some bytes, ``[n]`` -> ``[2 n]``."""
    return np.stack([data & 15, data >> 4], -1).reshape(-1)


def packed(integers: NDArray[Any]) -> NDArray[np.uint8]:
    """Bytes of some integers of 8 bits, of which four count; a zero follows an odd number ``[(n + 1) / 2]``."""
    halves = integers.reshape(-1).view(np.uint8) & np.uint8(15)
    made: NDArray[np.uint8] = halves[::2].copy()
    made[: len(halves) // 2] |= halves[1::2] << np.uint8(4)
    return made
