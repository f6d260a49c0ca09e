"""Two elements in a byte, the first in its low half, as ONNX, OpenVINO and TFLite all have them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def unpacked(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The halves of some bytes, ``[n]`` -> ``[2 n]``."""
    return np.stack([data & 15, data >> 4], -1).reshape(-1)


def packed(halves: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bytes of some halves, ``[2 n]`` -> ``[n]``."""
    return halves[::2] | halves[1::2] * np.uint8(16)
