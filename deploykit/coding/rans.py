"""Asymmetric numeral systems (Duda 2013, "Asymmetric numeral systems: entropy coding combining speed of Huffman coding
with compression rate of arithmetic coding"), the range variant, in lanes.

With frequencies f_s that sum to M = 2¹², c_s the sum of those before s, and a state x,

    encode:  x  ←  M ⌊x / f_s⌋ + c_s + x mod f_s
    decode:  s  with  c_s ≤ x mod M < c_{s+1},     x  ←  f_s ⌊x / M⌋ + x mod M - c_s.

States stay within [2¹⁶, 2³²): words move between them and the sequence. A symbol costs log₂ M / f_s bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.coding.lanes import WORD, lanes, room
from deploykit.core.errors import DeploykitError

PRECISION = 12
M = 1 << PRECISION
LOWEST = 1 << WORD
NONE = np.zeros(0, np.uint16)
OCTAVES = np.asarray([round(2 ** (i / 4)) for i in range(65)], np.int64)
"""2^(i/4), rounded: what a table's numbers mean."""


def table(counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Quarter octaves of what occurs, so that a table takes a byte for a symbol and few different ones.

    Args:
        counts: by symbol ``[n]``; at most M symbols occur.
    """
    share = np.maximum(1.0, counts * (1 << 16) / max(1, int(counts.sum())))
    return np.where(counts > 0, 1 + np.round(4 * np.log2(share)), 0).astype(np.uint8)


def frequencies(table: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Frequencies that sum to M, in integers alone: any decoder finds the same.

    Raises:
        DeploykitError: the table has no symbol, more than M, or a number out of range.
    """
    if not 0 < np.count_nonzero(table) <= M or int(table.max()) > len(OCTAVES):
        raise DeploykitError("a table of frequencies has numbers out of range")
    grid = np.where(table > 0, OCTAVES[table.astype(np.int64) - 1], 0)
    found = np.where(table > 0, np.maximum(1, grid * M // int(grid.sum())), 0)
    return summing(found[None]).reshape(-1)


def summing(f: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of frequencies that sum to M: what is missing or too much is the most frequent symbol's, who gives half of
    what it has at most, again and again ``[n, symbols]``."""
    found, rows = f.copy(), np.arange(len(f))
    while len(rows):
        missing = M - found[rows].sum(1)
        rows, missing = rows[missing != 0], missing[missing != 0]
        most = found[rows].argmax(1)
        found[rows, most] += np.maximum(missing, -(found[rows, most] // 2))
    return found


def size(counts: NDArray[np.int64]) -> float:
    """Bits of a stream with these counts, without its table."""
    occurs = counts > 0
    if not occurs.any():
        return 0.0
    return float((counts[occurs] * (PRECISION - np.log2(frequencies(table(counts))[occurs]))).sum())


def encode(streams: Sequence[NDArray[Any]], tables: Sequence[NDArray[np.uint8]]) -> bytes:
    """The final states of all lanes, little-endian uint32, and the words, uint16.

    Args:
        streams: symbols, ``[n]`` each.
        tables: of `table`, for each.
    """
    deal = lanes([len(s) for s in streams])
    pairs = [(s, frequencies(own)) for s, own in zip(streams, tables, strict=True) if len(s)]
    f = np.concatenate([f[s] for s, f in pairs] or [NONE])
    c = np.concatenate([(np.cumsum(f) - f)[s] for s, f in pairs] or [NONE])
    return written(f, c, [at.copy() for at in deal.steps()], len(deal.stream))


def written(f: NDArray[Any], c: NDArray[Any], steps: Sequence[slice | NDArray[np.int64]], lanes: int) -> bytes:
    """States and words of some symbols.

    Args:
        f: frequency of each ``[n]``.
        c: sum of those before it ``[n]``.
        steps: the symbols that the first lanes decode at once.
        lanes: how many there are.
    """
    x = np.full(lanes, LOWEST, np.uint64)
    words: list[NDArray[np.uint16]] = []
    for at in reversed(steps):  # last in, first out
        fs, cs = f[at].astype(np.uint64), c[at].astype(np.uint64)
        own = x[: len(fs)]
        full = own >= fs << np.uint64(2 * WORD - PRECISION)
        words.append(own[full].astype(np.uint16)[::-1])
        own = np.where(full, own >> np.uint64(WORD), own)
        x[: len(fs)] = (own // fs << np.uint64(PRECISION)) + cs + own % fs
    return x.astype("<u4").tobytes() + np.concatenate([*words, NONE])[::-1].astype("<u2").tobytes()


class Reader:
    """The lanes of a decoder.

    Raises:
        DeploykitError: the data are too short or too long, or do not come from an encoder.
    """

    def __init__(self, data: bytes | memoryview, lanes: int) -> None:
        """All of them are where their encoder ended."""
        if len(data) < 4 * lanes or len(data) % 2:
            raise DeploykitError("a coded stream is cut off")
        self.lanes, self._at = lanes, 0
        self._x = np.frombuffer(data, "<u4", lanes).astype(np.uint32)
        self._words = np.frombuffer(data, "<u2", offset=4 * lanes)

    def slots(self, n: int) -> NDArray[np.uint32]:
        """x mod M of the first n lanes: it says which symbol comes."""
        return self._x[:n] & np.uint32(M - 1)

    def advance(self, f: NDArray[Any], above: NDArray[Any]) -> None:
        """Past a symbol of the first lanes, with its frequency and how far x mod M is above those before it."""
        n = len(f)
        x = self._x[:n]
        x >>= PRECISION
        x *= f
        x += above
        (empty,) = (x < LOWEST).nonzero()
        end = self._at + len(empty)
        if end > len(self._words):
            raise DeploykitError("a coded stream is cut off")
        x[empty] = x[empty] << WORD | self._words[self._at : end]
        self._at = end

    def end(self) -> None:
        """Everything was read, and all lanes are where their encoder began."""
        if self._at != len(self._words) or not bool((self._x == LOWEST).all()):
            raise DeploykitError("a coded stream does not end where its encoder began")


def decode(data: bytes | memoryview, tables: Sequence[NDArray[np.uint8]], counts: Sequence[int]) -> list[NDArray[Any]]:
    """The streams, of bytes where those can tell all symbols apart, else of 16 bits.

    Args:
        data: of `encode`.
        tables: of `table`, for each.
        counts: of the symbols of each.

    Raises:
        DeploykitError: the data are too short or too long, do not come from an encoder, or a table is none.
    """
    deal = lanes(counts)
    reader = Reader(data, len(deal.stream))
    found = room(tables, counts)
    symbol, own, above = (np.zeros(len(tables) * M, kind) for kind in (found.dtype, np.uint16, np.uint16))
    for i, (quarters, count) in enumerate(zip(tables, counts, strict=True)):
        if count:
            f = frequencies(quarters)
            s = np.repeat(np.arange(len(f)), f)
            places = slice(i * M, (i + 1) * M)
            symbol[places], own[places], above[places] = s, f[s], np.arange(M) - (np.cumsum(f) - f)[s]
    table = (deal.stream * M).astype(np.uint32)
    for at in deal.steps():
        slot = reader.slots(len(at))
        slot += table[: len(at)]
        found[at] = symbol[slot]
        reader.advance(own[slot], above[slot])
    reader.end()
    return np.split(found, np.cumsum(counts)[:-1])
