"""Weights as symbols: a codebook and a code for each, or for each that is not zero; or, where they are all different,
the bytes of each place by themselves.

Sparse, as Han et al. 2016 ("Deep Compression", section 2) stores them: the zeros between one weight and the next are
counted in b bits; where there are more, a filler, a zero that is written down, comes in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.core.errors import DeploykitError

MOST = 4096
"""Symbols of a stream, at most."""
PIECE = 1 << 16
"""Weights that are made of symbols at once."""
TABLE = 8.0
"""Bits of a symbol's entry in a table."""


@dataclass(frozen=True)
class Symbols:
    """A weight's codebook and streams."""

    book: NDArray[Any]
    """Values, by code; sparse: the first is zero; empty: there are no codes."""
    streams: tuple[NDArray[Any], ...]
    """Codes; sparse: gaps, then codes; without a codebook: the lowest bytes of all weights, the next ones .."""
    gap_bits: int = 0
    """b; 0: not sparse."""

    def bits(self, coder: Any) -> float:
        """What a coder needs, about, with tables and codebook.

        Args:
            coder: `deploykit.coding.rans` or `deploykit.coding.huffman`.
        """
        counts = [np.bincount(stream) for stream in self.streams]
        codes = sum(float(coder.size(own)) + TABLE * len(own) for own in counts)
        return codes + 8.0 * self.book.itemsize * len(self.book)


def symbols(values: NDArray[Any], coder: Any) -> Symbols:
    """Whatever the coder needs least for.

    Args:
        values: unsigned integers ``[n]``, the bits of the weights.
        coder: `deploykit.coding.rans` or `deploykit.coding.huffman`.
    """
    book, codes = np.unique(values, return_inverse=True)
    if len(book) > MOST:
        places = values.astype(f"<u{values.itemsize}").view(np.uint8).reshape(len(values), -1)
        return Symbols(book[:0], tuple(place.astype(np.uint16) for place in places.T))
    found = [Symbols(book, (codes.astype(np.uint16),))]
    if book[0] == 0:
        found += [sparse(codes, book, b) for b in range(2, 11)]
    return min(found, key=lambda own: own.bits(coder))


def sparse(codes: NDArray[np.int64], book: NDArray[Any], b: int) -> Symbols:
    """Gaps of b bits and codes, with fillers.

    Args:
        codes: of all weights ``[n]``; 0 is zero.
        book: values by code.
        b: bits of a gap.
    """
    at = np.flatnonzero(codes)
    gaps = np.diff(at, prepend=-1) - 1
    fillers = gaps >> b
    entries = np.cumsum(fillers + 1) - 1  # where the weights are among all entries
    count = int(entries[-1]) + 1 if len(entries) else 0
    steps, own = np.full(count, (1 << b) - 1, np.uint16), np.zeros(count, np.uint16)
    steps[entries], own[entries] = gaps & ((1 << b) - 1), codes[at]
    return Symbols(book, (steps, own), b)


def pieces(found: Symbols, count: int) -> Iterator[NDArray[Any]]:
    """The weights ``[count]`` again, so many at a time that they take little memory; or their bytes, the lowest first.

    Raises:
        DeploykitError: codes without a value, gaps beyond b bits or the end.
    """
    codes = found.streams[-1]
    if len(codes) and len(found.book) and int(codes.max()) >= len(found.book):
        raise DeploykitError("a code has no value in its codebook")
    if found.gap_bits:
        yield from _sparse_pieces(found, count)
        return
    if any(len(stream) != count for stream in found.streams):
        raise DeploykitError("codes and weights are not equally many")
    for start in range(0, count, PIECE):
        own = [stream[start : start + PIECE] for stream in found.streams]
        if len(found.book):
            yield found.book[own[0]]
        elif max(int(stream.max()) for stream in own) > 255:
            raise DeploykitError("bytes of weights are out of range")
        else:
            yield np.stack(own, 1).astype(np.uint8, copy=False).reshape(-1)


def _sparse_pieces(found: Symbols, count: int) -> Iterator[NDArray[Any]]:
    gaps, codes = found.streams
    if len(gaps) != len(codes) or (len(gaps) and int(gaps.max()) >> found.gap_bits):
        raise DeploykitError("a gap has more bits than its weights say")
    if found.book[:1].any():
        raise DeploykitError("code 0 is not zero")
    entry, last = 0, -1  # the next one, and where the one before it is
    for start in range(0, count, PIECE):
        made = np.zeros(min(PIECE, count - start), found.book.dtype)
        at = last + np.cumsum(gaps[entry : entry + PIECE].astype(np.int64) + 1)
        at = at[: np.searchsorted(at, start + len(made))]
        if len(at):
            made[at - start] = found.book[codes[entry : entry + len(at)]]
            entry, last = entry + len(at), int(at[-1])
        yield made
    if entry < len(codes):
        raise DeploykitError("gaps reach beyond the end of the weights")
