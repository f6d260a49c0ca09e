"""How sure an exit is, and what several exits say together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def probabilities(logits: NDArray[Any], ensemble: bool = False) -> NDArray[np.float64]:
    """What each exit answers.

    Args:
        logits: ``[exits, n, classes]``, first to last.
        ensemble: every exit answers the mean of its own probabilities and those of all exits in front of it.

    Returns:
        ``[exits, n, classes]`` float64; the largest of a sample's is the exit's confidence.
    """
    z = np.asarray(logits, np.float64)
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    p: NDArray[np.float64] = e / e.sum(axis=-1, keepdims=True)
    if not ensemble:
        return p
    so_far = np.arange(1, len(p) + 1, dtype=np.float64).reshape(-1, *[1] * (p.ndim - 1))
    together: NDArray[np.float64] = np.cumsum(p, axis=0) / so_far
    return together
