"""Where the elements of an ONNX tensor lie in the tensor that stores them.

LiteRT keeps images channels-last, ONNX channels-first, and the two meet in reshapes. A `View` says how an ONNX tensor
is read out of the stored one, so reshaping and transposing cost nothing: they change the view. Only an operator that
needs the elements in another order makes them move, and in a convolutional network none does.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, Generic

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import TypeVar

    from deploykit.exporters.tflite.writer import Tensor

    T = TypeVar("T", default=Tensor)
else:
    from typing import TypeVar

    T = TypeVar("T")

Order = tuple[int, ...]
"""For each stored axis the ONNX axis it holds."""

NHWC: Order = (0, 2, 3, 1)


@dataclass(frozen=True)
class View(Generic[T]):
    """An ONNX tensor as it is stored, in a tensor of the file or of the program (``T``) that the exporter writes.

    ``factors`` are the sizes > 1 that ``shape`` splits into, in ONNX order; ``order[k]`` is the factor at stored
    position k. An image [1, 8, 4, 6] stored as [1, 4, 6, 8] has factors (8, 4, 6) and order (1, 2, 0); flattened to
    [1, 192] it keeps both.
    """

    tensor: T
    shape: tuple[int, ...]
    factors: tuple[int, ...]
    order: tuple[int, ...]

    def on(self, tensor: T) -> View[T]:
        """The same arrangement of another tensor of the same stored shape."""
        return replace(self, tensor=tensor)


def stored(tensor: T, shape: tuple[int, ...], order: Order) -> View[T]:
    """The view of an ONNX tensor of ``shape`` whose axes are stored in ``order``."""
    position = {axis: i for i, axis in enumerate(a for a in range(len(shape)) if shape[a] != 1)}
    return View(tensor, shape, tuple(d for d in shape if d != 1), tuple(position[a] for a in order if shape[a] != 1))


def identity(rank: int) -> Order:
    """ONNX's own order."""
    return tuple(range(rank))


def permuted(shape: tuple[int, ...], order: Order) -> tuple[int, ...]:
    """The stored shape of an ONNX shape."""
    return tuple(shape[a] for a in order)


def reshape(view: View[T], shape: tuple[int, ...]) -> View[T] | None:
    """The view after an ONNX Reshape; None where the new shape cuts through a factor, e.g. (2, 3) -> (3, 2).

    Factors of the old and the new shape are cut at all boundaries of both, counted in elements.
    """
    old = np.cumprod((1, *view.factors)).tolist()
    cuts = sorted({*old, *np.cumprod([1, *(d for d in shape if d != 1)]).tolist()})
    if any(b % a for a, b in itertools.pairwise(cuts)):
        return None
    pieces = [[cuts.index(c) for c in cuts[:-1] if a <= c < b] for a, b in itertools.pairwise(old)]
    factors = tuple(b // a for a, b in itertools.pairwise(cuts))
    return View(view.tensor, shape, factors, tuple(piece for factor in view.order for piece in pieces[factor]))


def transpose(view: View[T], axes: tuple[int, ...]) -> View[T]:
    """The view after an ONNX Transpose."""
    groups = _groups(view)
    sequence = [factor for axis in axes for factor in groups[axis]]
    return View(
        view.tensor,
        tuple(view.shape[a] for a in axes),
        tuple(view.factors[f] for f in sequence),
        tuple(sequence.index(f) for f in view.order),
    )


def natural(view: View[Any]) -> Order | None:
    """An order of the ONNX axes in which nothing has to move, or None (e.g. a flattened image)."""
    rank = len(view.shape)
    candidates = [NHWC, identity(rank)] if rank == 4 else [identity(rank)]
    groups = _groups(view)
    starts = {group[0]: axis for axis, group in enumerate(groups) if group}
    ones = [axis for axis, group in enumerate(groups) if not group]
    candidates.append((*ones, *(starts[f] for f in view.order if f in starts)))
    return next((order for order in candidates if arrangement(view, order) == view.order), None)


def arrangement(view: View[Any], order: Order) -> tuple[int, ...]:
    """The sequence of factors that an order of the ONNX axes asks for."""
    groups = _groups(view)
    return tuple(factor for axis in order for factor in groups[axis])


def movement(view: View[Any], order: Order) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The smallest transposition that brings a view into an order: shape to take the stored tensor as, and axes."""
    wanted = arrangement(view, order)
    position = {factor: i for i, factor in enumerate(view.order)}
    runs: list[list[int]] = []
    for factor in wanted:
        if runs and position[factor] == position[runs[-1][-1]] + 1:
            runs[-1].append(factor)
        else:
            runs.append([factor])
    before = sorted(runs, key=lambda run: position[run[0]])
    return tuple(prod(view.factors[f] for f in run) for run in before), tuple(before.index(run) for run in runs)


def element_order(view: View[Any]) -> NDArray[np.int64] | None:
    """For each stored element its position in the flattened ONNX tensor; None where both are the same."""
    if view.order == identity(len(view.order)):
        return None
    return np.arange(prod(view.factors)).reshape(view.factors).transpose(view.order).ravel()


def _groups(view: View[Any]) -> list[tuple[int, ...]]:
    """For each ONNX axis the factors it consists of."""
    groups, start = [], 0
    for size in view.shape:
        end, product = start, 1
        while product < size:
            product *= view.factors[end]
            end += 1
        groups.append(tuple(range(start, end)))
        start = end
    return groups
