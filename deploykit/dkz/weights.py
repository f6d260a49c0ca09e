"""Files that are packed, the weights within them, and what becomes of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.coding.contexts import Layer, Model
from deploykit.coding.nibbles import unpacked
from deploykit.coding.symbols import Symbols


@dataclass(frozen=True)
class Indices:
    """What an extent stands for whose elements are indices of a codebook beside it."""

    book: str
    """Name of the codebook, an extent too if it is large enough."""
    values: NDArray[np.float32]
    """Of it, ``[k]``."""
    codes: NDArray[np.uint8]
    """One for each weight, out of their bytes."""


@dataclass(frozen=True)
class Shape:
    """How weights lie: ``[rows, outer, kernel, inner]``. Outer and inner together are columns."""

    rows: int
    outer: int
    kernel: int = 1

    def together(self, weights: NDArray[Any]) -> NDArray[Any]:
        """``[n]`` -> ``[rows, columns * kernel]``: those of a kernel are next to each other."""
        return weights.reshape(self.rows, self.outer, self.kernel, -1).swapaxes(2, 3).reshape(self.rows, -1)

    def apart(self, weights: NDArray[Any]) -> NDArray[Any]:
        """As they lie again."""
        return weights.reshape(self.rows, self.outer, -1, self.kernel).swapaxes(2, 3).reshape(-1)


@dataclass(frozen=True)
class Extent:
    """Weights within a file."""

    start: int
    """Byte."""
    count: int
    bits: int
    """Of one, 4, 8, 16 or 32. Of those with 4 there are two in a byte, and an even number."""
    name: str = ""
    """In its file; for people alone, a container does not have it."""
    indices: Indices | None = None
    """What it stands for; a container does not have that either."""
    shape: Shape | None = None
    """None: nothing is known of it."""

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return self.count * self.bits // 8

    def values(self, elements: NDArray[Any]) -> NDArray[Any]:
        """What some different elements are as numbers ``[n]``; unsigned integers with as many bits are taken for what
        weights of that size usually are."""
        if self.indices is not None:
            found: NDArray[Any] = self.indices.values[elements]
            return found
        kind = {4: "i1", 8: "i1", 16: "<f2", 32: "<f4"}[self.bits]
        own = elements.astype(f"<u{np.dtype(kind).itemsize}").view(kind)
        return (own ^ 8) - 8 if self.bits == 4 else own


@dataclass(frozen=True)
class File:
    """A file to be packed."""

    name: str
    data: bytes
    extents: Sequence[Extent]
    """In order; they do not overlap."""

    def stored(self, extent: Extent) -> bytes:
        """Some weights, as they are."""
        return self.data[extent.start : extent.start + extent.bytes]

    def elements(self, extent: Extent) -> NDArray[Any]:
        """The bits of each of them, as unsigned integers ``[count]``."""
        data = np.frombuffer(self.stored(extent), f"<u{max(1, extent.bits // 8)}")
        return unpacked(data) if extent.bits == 4 else data


@dataclass(frozen=True)
class Around:
    """How weights are coded with contexts."""

    model: Model
    layer: Layer


@dataclass(frozen=True)
class Chosen:
    """What became of some weights."""

    extent: Extent
    alone: int
    """Bytes of them as LZMA2 alone."""
    coder: str = ""
    """Empty: they are left in the skeleton, as LZMA2."""
    symbols: Symbols | None = None
    """What the coder codes."""
    words: float = 0.0
    """Bits that it needs for the streams, about."""
    around: Around | None = None
    """With contexts."""

    @cached_property
    def side(self) -> int:
        """Bytes of codebook, tables and levels."""
        if self.symbols is None:
            return 0
        levels = len(self.around.layer.levels) if self.around is not None else 0
        return self.symbols.book.nbytes + levels + sum(2 + len(np.bincount(own)) for own in self.symbols.streams)

    @property
    def bits(self) -> float:
        """All of them, about."""
        return 8.0 * self.alone if self.symbols is None else self.words + 8.0 * self.side
