"""Lanes: streams of symbols dealt out to coders that work in step, so that numpy decodes one symbol of each at once.

Symbol i of a stream belongs to its lane i mod n. The lanes of all streams of a block read 16-bit words of one common
sequence; in every step those that need a word take the next ones, lane by lane. That order needs no table: a decoder
that has the same states asks in the same order (Giesen 2014, "Interleaved entropy coders"). Short streams would leave
numpy idle; in a block they are decoded together, each by its own table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORD = 16
"""Bits."""
LENGTH = 2048
"""Symbols of a lane, at most: what a lane costs (4 bytes) is then little."""
NARROW = 256
"""Symbols that a byte can tell apart."""


@dataclass(frozen=True)
class Lanes:
    """Of the streams of a block, the longest lanes first: those that still have symbols are always the first ones."""

    stream: NDArray[np.int64]
    """By lane, whose symbols it has."""
    start: NDArray[np.int64]
    """By lane, where its first symbol is among those of all streams one after the other."""
    stride: NDArray[np.int64]
    """By lane, how far its next one is."""
    active: NDArray[np.int64]
    """By step, how many lanes have a symbol."""

    def steps(self) -> Iterator[NDArray[np.int64]]:
        """Where the symbols of each step are, ``[active]``; good until the next is asked for."""
        at = self.start.copy()
        for n in self.active.tolist():
            yield at[:n]
            at[:n] += self.stride[:n]


def room(tables: Sequence[NDArray[np.uint8]], counts: Sequence[int]) -> NDArray[Any]:
    """For the symbols of streams, as wide as their tables need."""
    return np.empty(sum(counts), np.uint8 if max(map(len, tables), default=0) <= NARROW else np.uint16)


def lanes(counts: Sequence[int], length: int = LENGTH) -> Lanes:
    """The lanes of streams.

    Args:
        counts: of the symbols of each.
        length: symbols of a lane, at most; a container has `LENGTH`.
    """
    many = [-(-count // length) for count in counts]
    stream = np.repeat(np.arange(len(counts)), many)
    number = np.concatenate([np.arange(n) for n in many] or [np.arange(0)])
    stride = np.asarray(many, np.int64)[stream]
    ends = np.cumsum([0, *counts])
    steps = -(-(np.asarray(counts, np.int64)[stream] - number) // stride)
    order = np.argsort(-steps, kind="stable")
    active = len(steps) - np.searchsorted(np.sort(steps), np.arange(steps.max(initial=0)), "right")
    return Lanes(stream[order], (ends[stream] + number)[order], stride[order], active)
