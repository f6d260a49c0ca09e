"""scikit-learn's digits, every fifth image kept for testing. deploykit calls these functions as loaders."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

Split = tuple[NDArray[np.float32], NDArray[np.int64]]


def training() -> Split:
    """1437 images ``[n, 1, 8, 8]`` in 0..1 and their labels ``[n]``."""
    return _split(test=False)


def test() -> Split:
    """The other 360."""
    return _split(test=True)


def calibration() -> NDArray[np.float32]:
    """200 training images, spread over the set. No labels are needed to measure ranges."""
    images, _ = training()
    return images[:: len(images) // 200][:200]


def _split(test: bool) -> Split:
    raw = load_digits()
    chosen = (np.arange(len(raw.target)) % 5 == 0) == test
    images = (raw.images[chosen, None] / 16.0).astype(np.float32)
    return images, raw.target[chosen].astype(np.int64)
