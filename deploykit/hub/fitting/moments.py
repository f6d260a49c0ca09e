"""What the quantized network feeds a layer and what the float network computes there, as second moments.

Means, H = E[x xᵀ], C = E[y xᵀ] and E[y²], centred, are all that the weights of a linear layer can be chosen by. They
are averages over output positions drawn at random, the same number from every batch of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.calibration.observe import channel_mean
from deploykit.hub.fitting.activations import Activations
from deploykit.hub.fitting.float_outputs import FloatOutputs
from deploykit.hub.layers import Layer, MatrixForm

if TYPE_CHECKING:
    from numpy.typing import NDArray

COLUMNS = 1024
"""How many positions are multiplied out at once."""


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer ``y = W x``, about means or about zero: float64, g groups side by side."""

    h: NDArray[np.float64]
    """H = E[x xᵀ], [g, k, k]."""
    c: NDArray[np.float64]
    """C = E[y xᵀ], [g, o, k]."""
    yy: NDArray[np.float64]
    """E[y²], [g, o]."""
    power: NDArray[np.float64]
    """Largest E[x²] of any input before means were taken off, [g]: H is known up to a share of it."""

    def outputs(self, rows: NDArray[np.int64]) -> Moments:
        """Those of some outputs of every group."""
        return replace(self, c=self.c[:, rows], yy=self.yy[:, rows])

    def error(self, w: NDArray[np.float64]) -> NDArray[np.float64]:
        """E[(y - W x)²] per output ``[g, o]``, for W ``[g, o, k]``."""
        return np.asarray(self.yy - 2 * (w * self.c).sum(2) + ((w @ self.h) * w).sum(2))


class _Sums:
    """Raw sums; products in float32, their sums in float64."""

    def __init__(self) -> None:
        self._n = 0
        self._sums: tuple[NDArray[np.float64], ...] = ()
        self._waiting: list[tuple[NDArray[Any], NDArray[Any]]] = []

    def add(self, x: NDArray[Any], y: NDArray[Any]) -> None:
        """x [g, k, n], y [g, o, n]."""
        self._waiting.append((x, y))
        if sum(x.shape[2] for x, _ in self._waiting) >= COLUMNS:
            self._multiply()

    def _multiply(self) -> None:
        if not self._waiting:
            return
        x, y = (np.concatenate(part, axis=2) for part in zip(*self._waiting, strict=True))
        self._waiting = []
        self._n += x.shape[2]
        transposed = x.swapaxes(1, 2)
        products = tuple(
            np.asarray(p, np.float64) for p in (x.sum(2), y.sum(2), x @ transposed, y @ transposed, (y * y).sum(2))
        )
        self._sums = _added(self._sums, products) if self._sums else products

    def moments(self, other: _Sums | None = None, *, centred: bool) -> Moments:
        """Of these, and of another's together with them: about their means, or as they were added."""
        self._multiply()
        n, sums = self._n, self._sums
        if other is not None:
            other._multiply()
            n, sums = n + other._n, _added(sums, other._sums)
        x, y, xx, yx, yy = (s / n for s in sums)
        x, y = (x, y) if centred else (np.zeros_like(x), np.zeros_like(y))
        return Moments(
            xx - x[:, :, None] * x[:, None, :], yx - y[:, :, None] * x[:, None, :], np.maximum(yy - y * y, 0.0),
            np.diagonal(xx, axis1=1, axis2=2).max(1),
        )  # fmt: skip


def _added(
    some: Sequence[NDArray[np.float64]], others: Sequence[NDArray[np.float64]]
) -> tuple[NDArray[np.float64], ...]:
    return tuple(a + b for a, b in zip(some, others, strict=True))


def moments(
    layer: Layer, form: MatrixForm, inputs: Activations, outputs: FloatOutputs, *, centred: bool = True
) -> tuple[Moments, tuple[Moments, ...]]:
    """Of all samples; of every other batch and of the rest, if there is more than one.

    About the means, if a bias takes these; about zero, if the weights have to (``centred`` False).
    """
    scale, zero = inputs.parameters(layer.x)
    halves = _Sums(), _Sums()
    # about the means of all positions: what is then taken off the second moments is small, and they lose no digits
    mean_x = channel_mean(inputs.mean(layer.x), 1 if form.operator == "Conv" else -1)
    middle = form.per_input((mean_x / np.float32(scale) + np.float32(zero)).astype(np.float32))
    centre = outputs.mean(layer.y).reshape(form.group, -1, 1).astype(np.float32)
    if not centred:
        middle, centre = np.full_like(middle, zero), np.zeros_like(centre)
    for i, (integers, y) in enumerate(zip(inputs.batches(layer.x), outputs.samples(layer.y), strict=True)):
        x = form.inputs(integers, outputs.shape(layer.y), outputs.positions(layer.y, i), zero)
        real = np.subtract(x, middle, dtype=np.float32)
        real *= np.float32(scale)
        halves[i % 2].add(real, y - centre)
    if i == 0:
        return halves[0].moments(centred=centred), ()
    whole = halves[0].moments(halves[1], centred=centred)
    return whole, (halves[0].moments(centred=centred), halves[1].moments(centred=centred))
