"""Codes in contexts: what was decoded around a weight tells what it may be.

Kernels are smooth, and zeros lie where a whole row or column has little to say. A layer is decoded in passes, each of
which has one position of every kernel, or every 32nd weight of a matrix. Before a pass, the weights around each of its
places and the sums of its row and column tell the value to expect there, μ, and how far from zero it may be, σ: both
linear, with coefficients that belong to a whole kind of layer. Their classes have a table of frequencies each, which
begins as the layer's own and learns with every pass; nothing of it is stored. The idea is that of context modelling for
images (Weinberger, Seroussi & Sapiro 2000, "The LOCO-I lossless image compression algorithm"), in steps wide enough for
numpy. All of it is integers: any decoder finds the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.coding import rans

TURN = 3
"""How much later the passes of a matrix begin in each row than in the one before."""
FINE = 16
"""Parts of a level that magnitudes are counted in."""
SHARE = 32
"""What coefficients are parts of."""
DOUBT = 4
"""Weights of average magnitude that every row and column begins with."""
LEAST = FINE * SHARE // 8
"""σ, at least."""
MEANS, SPREADS = 8, 10
"""Classes of μ, in steps of 3/8 σ, and of σ, in steps of half an octave."""
CLASSES = MEANS * SPREADS
GROUPS = 16
"""Of values that are next to each other; within one, the layer's own frequencies hold."""
LEARNT = 256
"""Weight of what was seen once, beside 4096 of what is expected."""

LANE = 1024
"""Bytes of words for which an encoder takes one lane: each costs 3, and few of them are slow."""
LONGEST = 1 << 14
"""Symbols of a lane, at most: there are as many steps."""
PIECE = 1 << 13
"""Weights whose surroundings are looked at at once."""
NONE = np.zeros(0, np.int64)

Ints = NDArray[np.int64]
Index = NDArray[np.int32]
Short = NDArray[np.uint16]


@dataclass(frozen=True)
class Model:
    """How the surroundings of a weight tell of it."""

    kernel: int
    """Positions of a kernel; 1: a matrix."""
    passes: int
    """As many as positions, or for a matrix as few as one likes."""
    distances: tuple[int, ...]
    """Of the neighbours, within a row."""
    mean: NDArray[np.int8]
    """What each neighbour's level adds to μ, in 32nds, by pass or for all alike: ``[passes or 1, distances]``."""
    spread: NDArray[np.int8]
    """What adds to σ: neighbours' magnitudes, those of row, of column, of both, and the average:
    ``[passes or 1, distances + 4]``."""


@dataclass(frozen=True)
class Layer:
    """A layer's codes, as they lie: ``[rows, columns]``; those of a kernel are next to each other in a row."""

    rows: int
    columns: int
    table: NDArray[np.uint8]
    """Of `deploykit.coding.rans.table`, of all its codes ``[k]``."""
    levels: NDArray[np.int8]
    """What each code stands for, on a scale of their own ``[k]``."""


@dataclass(frozen=True)
class Places:
    """Of the weights of a pass ``[n]``."""

    layer: Index
    """Its number."""
    place: Index
    """Among all weights, one layer after the other."""
    row: Index
    """Among all rows."""
    column: Index
    """Among all columns."""

    def pieces(self) -> Iterator[Places]:
        """Few weights at once, so that what is known of each of them does not fill memory."""
        for start in range(0, len(self.place), PIECE):
            yield self._some(slice(start, start + PIECE))

    def every(self, step: int) -> Places:
        """One of so many."""
        return self._some(slice(None, None, step))

    def _some(self, own: slice) -> Places:
        return Places(self.layer[own], self.place[own], self.row[own], self.column[own])


@dataclass(frozen=True)
class Pass:
    """What is expected of the weights of a pass."""

    at: Places
    kind: Ints
    """Of layer and class, which occur ``[tables]``."""
    table: Index
    """Of each weight, the number of its kind ``[n]``."""
    frequencies: Ints
    """Of the kinds' symbols, which sum to 4096 ``[tables, symbols]``."""


class Seen:
    """What was decoded of some layers of one model, and what it tells of the next pass."""

    def __init__(self, model: Model, layers: Sequence[Layer]) -> None:
        """Nothing, yet."""
        self.model, self.layers = model, layers
        own = [rans.frequencies(layer.table) for layer in layers]
        self.frequencies = _stacked(own)
        self.levels = _stacked([layer.levels for layer in layers])
        middle = np.cumsum(self.frequencies, 1) - self.frequencies + self.frequencies // 2
        self.group = np.minimum(middle * GROUPS // rans.M, GROUPS - 1)
        self.of_group = np.stack(
            [np.bincount(g, f, GROUPS) for g, f in zip(self.group, self.frequencies, strict=True)]
        ).astype(np.int64)
        self.counts = np.zeros((len(layers) * CLASSES, GROUPS), np.int64)
        self.average = np.maximum(1, (self.frequencies * np.abs(self.levels)).sum(1) * FINE // rans.M)
        """Magnitude, by layer."""
        self.starts = np.cumsum([0, *(layer.rows * layer.columns for layer in layers)])
        self.row_starts = np.cumsum([0, *(layer.rows for layer in layers)])
        self.column_starts = np.cumsum([0, *(layer.columns // model.kernel for layer in layers)])
        self.edge = max((abs(d) for d in model.distances), default=0)
        self.value, self.magnitude = np.zeros((2, int(self.starts[-1]) + 2 * self.edge), np.int16)
        for start, average in zip(self.starts[:-1], self.average, strict=True):  # edges are like what is beside them
            self.magnitude[self.edge + start if start else 0 :] = average
        self.of_row, self.of_column = (np.zeros((2, n[-1]), np.int64) for n in (self.row_starts, self.column_starts))
        """Sums of magnitudes, and of how many."""

    def places(self, number: int) -> Places:
        """Where the weights of a pass are."""
        model, found = self.model, []
        turn = TURN if model.kernel == 1 else 0
        for i, layer in enumerate(self.layers):
            first = (number - turn * np.arange(layer.rows)) % model.passes
            column = first[:, None] + np.arange(0, layer.columns, model.passes)
            inside = column < layer.columns
            row, column = np.nonzero(inside)[0], column[inside]
            own = (
                np.full(len(row), i), self.starts[i] + row * layer.columns + column, self.row_starts[i] + row,
                self.column_starts[i] + column // model.kernel,
            )  # fmt: skip
            found.append([part.astype(np.int32) for part in own])
        return Places(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def around(self, at: Places) -> tuple[Ints, Ints]:
        """Levels of the neighbours, 0 where they are not known, ``[distances, n]``; and what may add to σ, the average
        where it is not known, ``[distances + 4, n]``."""
        places = [at.place + (self.edge + d) for d in self.model.distances]
        average = self.average[at.layer]
        row, column = (
            (total[index] + DOUBT * average) // (count[index] + DOUBT)
            for (total, count), index in ((self.of_row, at.row), (self.of_column, at.column))
        )
        levels = np.asarray([self.value[p] for p in places], np.int64).reshape(len(places), len(at.place))
        spread = [*(self.magnitude[p] for p in places), row, column, row * column // average, average]
        return levels, np.asarray(spread, np.int64)

    def classes(self, number: int, at: Places) -> Ints:
        """The class of every weight of a pass ``[n]``."""
        own = number % len(self.model.mean)  # one for each pass, or the first for all
        by_mean, by_spread = self.model.mean[own].astype(np.int64), self.model.spread[own].astype(np.int64)
        found = []
        for piece in at.pieces():
            levels, spread = self.around(piece)
            sigma = np.maximum(LEAST, by_spread @ spread)
            of_mean = np.clip(FINE * (by_mean @ levels) * MEANS // (3 * sigma) + MEANS // 2, 0, MEANS - 1)
            octaves = 8 * sigma * sigma // (SHARE * self.average[piece.layer]) ** 2
            found.append(of_mean * SPREADS + np.searchsorted(1 << np.arange(SPREADS - 1), octaves, "right"))
        return np.concatenate([NONE, *found])

    def ask(self, number: int) -> Pass:
        """What is expected of a pass."""
        at = self.places(number)
        key = at.layer * CLASSES + self.classes(number, at)
        occurs = np.bincount(key, minlength=len(self.counts)) > 0
        kind, table = np.flatnonzero(occurs), (np.cumsum(occurs, dtype=np.int32) - 1)[key]
        layer = kind // CLASSES
        group = self.group[layer]
        weight = LEARNT * self.counts[kind] + self.of_group[layer]
        own, within = (np.take_along_axis(of, group, 1) for of in (weight, self.of_group[layer]))
        f = self.frequencies[layer]
        found = f * own * rans.M // np.maximum(1, within * weight.sum(1, keepdims=True))
        return Pass(at, kind, table, rans.summing(np.where(f > 0, np.maximum(1, found), 0)))

    def learn(self, told: Pass, codes: Ints) -> None:
        """What the weights of a pass turned out to be ``[n]``."""
        at = told.at
        level = self.levels[at.layer, codes].astype(np.int16)
        size = FINE * np.abs(level)
        self.value[at.place + self.edge], self.magnitude[at.place + self.edge] = level, size
        for sums, index in ((self.of_row, at.row), (self.of_column, at.column)):
            sums[0] += np.bincount(index, size, sums.shape[1]).astype(np.int64)
            sums[1] += np.bincount(index, minlength=sums.shape[1])
        seen = np.bincount(told.kind[told.table] * GROUPS + self.group[at.layer, codes], minlength=self.counts.size)
        self.counts += seen.reshape(self.counts.shape)


def _stacked(rows: Sequence[NDArray[Any]]) -> Ints:
    """Of different lengths, zeros behind the shorter ones."""
    longest = max(len(row) for row in rows)
    return np.stack([np.pad(row.astype(np.int64), (0, longest - len(row))) for row in rows])


Group = tuple[Model, Sequence[Layer]]
"""Layers that are decoded together."""


def fewest(values: int) -> int:
    """Lanes that so many values have at least."""
    return max(1, -(-values // LONGEST))


def _passes(group: Group, codes: Sequence[NDArray[Any]]) -> Iterator[tuple[Places, Short, Short]]:
    """Of known codes, pass by pass: places, the frequency of each and the sum of those before it ``[n]``."""
    seen, every = Seen(*group), np.concatenate([own.reshape(-1) for own in codes]).astype(np.int64)
    for number in range(group[0].passes):
        told = seen.ask(number)
        own = every[told.at.place]
        f = told.frequencies[told.table, own]
        c = np.cumsum(told.frequencies, 1)[told.table, own] - f
        yield told.at, f.astype(np.uint16), c.astype(np.uint16)
        seen.learn(told, own)


def sizes(group: Group, codes: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """Bits of each layer, without tables and levels."""
    found = np.zeros(len(codes))
    for at, f, _ in _passes(group, codes):
        found += np.bincount(at.layer, rans.PRECISION - np.log2(f.astype(float)), len(codes))
    return found


def encode(groups: Sequence[Group], codes: Sequence[Sequence[NDArray[Any]]]) -> tuple[bytes, int]:
    """The words of a block, as `deploykit.coding.rans` has them, and how many lanes they are for.

    Args:
        groups: in order.
        codes: of the layers of each ``[rows, columns]``.
    """
    passes = [own[1:] for pair in zip(groups, codes, strict=True) for own in _passes(*pair)]
    bits = sum(float((rans.PRECISION - np.log2(f.astype(float))).sum()) for f, _ in passes)
    ends = np.cumsum([0, *(len(f) for f, _ in passes)])
    n = max(1 + int(bits) // (8 * LANE), fewest(int(ends[-1])))
    steps = [slice(at, min(at + n, end)) for start, end in itertools.pairwise(ends) for at in range(start, end, n)]
    f, c = (np.concatenate(own) for own in zip(*passes, strict=True))
    return rans.written(f, c, steps, n), n


def decode(data: bytes | memoryview, groups: Sequence[Group], lanes: int) -> list[list[NDArray[np.uint16]]]:
    """The codes of the layers of each group ``[rows, columns]``.

    Args:
        data: of `encode`.
        groups: in order.
        lanes: of `encode`.

    Raises:
        DeploykitError: the data are too short or too long, or do not come from an encoder.
    """
    reader = rans.Reader(data, lanes)
    found = [_decoded(reader, *group) for group in groups]
    reader.end()
    return found


def _decoded(reader: rans.Reader, model: Model, layers: Sequence[Layer]) -> list[NDArray[np.uint16]]:
    seen = Seen(model, layers)
    every = np.empty(seen.starts[-1], np.uint16)
    for number in range(model.passes):
        _decode_pass(reader, seen, number, every)
    return [
        every[start:end].reshape(layer.rows, layer.columns)
        for layer, (start, end) in zip(layers, itertools.pairwise(seen.starts), strict=True)
    ]


def _decode_pass(reader: rans.Reader, seen: Seen, number: int, every: NDArray[np.uint16]) -> None:
    """The codes of a pass, into all codes and what was seen."""
    told = seen.ask(number)
    tables, symbols = told.frequencies.shape
    f = told.frequencies.astype(np.uint32)
    c = np.cumsum(f, 1, dtype=np.uint32) - f + np.arange(tables, dtype=np.uint32)[:, None] * np.uint32(rans.M)
    f, c = f.reshape(-1), c.reshape(-1)  # one table behind the other: one search finds each symbol in its own
    first = told.table.astype(np.uint32) * np.uint32(rans.M)
    found = np.empty(len(first), np.int64)
    for start in range(0, len(first), reader.lanes):
        own = slice(start, start + reader.lanes)
        slot = reader.slots(len(first[own])) + first[own]
        found[own] = np.searchsorted(c, slot, "right") - 1
        reader.advance(f[found[own]], slot - c[found[own]])
    found -= told.table * np.int64(symbols)
    every[told.at.place] = found
    seen.learn(told, found)
