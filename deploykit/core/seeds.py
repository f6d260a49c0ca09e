"""Random numbers that are the same in every run and leave no trace outside."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds Python's, NumPy's and torch's generators for the block, then puts them back as they were."""
    import torch

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
