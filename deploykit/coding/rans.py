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

from deploykit.coding.lanes import WORD, lanes
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
    while (missing := M - int(found.sum())) != 0:  # the most frequent gives or takes, by half at most
        most = int(found.argmax())
        found[most] += max(missing, -(int(found[most]) // 2))
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
    f = np.concatenate([f[s] for s, f in pairs] or [NONE]).astype(np.uint64)
    c = np.concatenate([(np.cumsum(f) - f)[s] for s, f in pairs] or [NONE]).astype(np.uint64)
    x = np.full(len(deal.stream), LOWEST, np.uint64)
    words: list[NDArray[np.uint16]] = []
    for step in reversed(range(len(deal.active))):  # last in, first out
        at = deal.at(step)
        own, fs = x[: len(at)], f[at]
        full = own >= fs << np.uint64(2 * WORD - PRECISION)
        words.append(own[full].astype(np.uint16)[::-1])
        own = np.where(full, own >> np.uint64(WORD), own)
        x[: len(at)] = (own // fs << np.uint64(PRECISION)) + c[at] + own % fs
    return x.astype("<u4").tobytes() + np.concatenate([*words, NONE])[::-1].astype("<u2").tobytes()


def decode(
    data: bytes | memoryview, tables: Sequence[NDArray[np.uint8]], counts: Sequence[int]
) -> list[NDArray[np.uint16]]:
    """The streams.

    Args:
        data: of `encode`.
        tables: of `table`, for each.
        counts: of the symbols of each.

    Raises:
        DeploykitError: the data are too short or too long, do not come from an encoder, or a table is none.
    """
    deal = lanes(counts)
    n = len(deal.stream)
    if len(data) < 4 * n or len(data) % 2:
        raise DeploykitError("a coded stream is cut off")
    x = np.frombuffer(data, "<u4", n).astype(np.uint32)
    words = np.frombuffer(data, "<u2", offset=4 * n).astype(np.uint32)
    symbol, own, above = (np.zeros(len(tables) * M, kind) for kind in (np.uint16, np.uint32, np.uint32))
    for i, (quarters, count) in enumerate(zip(tables, counts, strict=True)):
        if count:
            f = frequencies(quarters)
            s = np.repeat(np.arange(len(f)), f)
            places = slice(i * M, (i + 1) * M)
            symbol[places], own[places], above[places] = s, f[s], np.arange(M) - (np.cumsum(f) - f)[s]
    table = (deal.stream * M).astype(np.uint32)
    found, at = np.empty(sum(counts), np.uint16), 0
    for step, active in enumerate(deal.active):
        here = x[:active]
        slot = (here & np.uint32(M - 1)) + table[:active]
        found[deal.at(step)] = symbol[slot]
        here = own[slot] * (here >> np.uint32(PRECISION)) + above[slot]
        empty = np.flatnonzero(here < LOWEST)
        if at + len(empty) > len(words):
            raise DeploykitError("a coded stream is cut off")
        here[empty] = here[empty] << np.uint32(WORD) | words[at : at + len(empty)]
        at += len(empty)
        x[:active] = here
    if at != len(words) or not bool((x == LOWEST).all()):
        raise DeploykitError("a coded stream does not end where its encoder began")
    return np.split(found, np.cumsum(counts)[:-1])
