"""The container: files whose weights are cut out and coded, and the rest of them as a skeleton beside.

    DKZ | version | length of the front | checksum | front | skeleton | block | block ..

The front says in JSON what there is; skeleton and sides of blocks are LZMA2. A block has some weights one after the
other: a side with their codebooks and tables, and the words of all their streams. Blocks are decoded one by one.
``docs/formats/dkz.md`` has every detail.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.coding.symbols import Symbols, symbols
from deploykit.core.errors import unknown
from deploykit.dkz.front import CODERS, HEAD, MAGIC, VERSION
from deploykit.dkz.lzma2 import compressed, squeezed

BLOCK = 1 << 22
"""Weights of a block, unless one alone has more."""
STREAMS = 512
"""And its streams: a decoder keeps a table for each."""


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
class Extent:
    """Weights within a file."""

    start: int
    """Byte."""
    count: int
    size: int
    """Bytes of one, 1, 2 or 4."""
    name: str = ""
    """In its file; for people alone, a container does not have it."""
    indices: Indices | None = None
    """What it stands for; for people alone, as well."""


@dataclass(frozen=True)
class File:
    """A file to be packed."""

    name: str
    data: bytes
    extents: Sequence[Extent]
    """In order; they do not overlap."""


Coded = tuple[Extent, Symbols]
"""Weights that are not left in the skeleton."""


@dataclass(frozen=True)
class Chosen:
    """What became of some weights."""

    extent: Extent
    alone: int
    """Bytes of them as LZMA2 alone."""
    symbols: Symbols | None
    """What a coder codes; None: they are left in the skeleton, as LZMA2."""


@dataclass(frozen=True)
class Container:
    """A container, and how it was made."""

    data: bytes
    coder: str
    """Of all blocks; empty: there are none."""
    weights: tuple[Chosen, ...]
    """Of all files, in order."""


def pack(files: Sequence[File], coder: str | None = None) -> bytes:
    """The container of some files, the same bytes for the same files; see `packed`."""
    return packed(files, coder).data


def packed(files: Sequence[File], coder: str | None = None) -> Container:
    """The container of some files, and what was chosen for their weights.

    Args:
        files: in order.
        coder: of the streams; None: whichever makes the smaller container.

    Raises:
        DeploykitError: no such coder.
    """
    if coder is not None and coder not in CODERS:
        raise unknown("coder", coder, CODERS)
    left = [Chosen(e, len(compressed(_values(f, e).tobytes())), None) for f in files for e in f.extents]
    tries = [_packed(files, _coded(files, left, name), name) for name in ([coder] if coder else CODERS)]
    return min(*tries, _packed(files, left, ""), key=lambda made: len(made.data))  # weights may be as good as random


def _coded(files: Sequence[File], left: Sequence[Chosen], coder: str) -> list[Chosen]:
    """The weights, those as symbols for which a coder needs less than LZMA2 alone."""
    places = [(file, e) for file in files for e in file.extents]
    found = [symbols(_values(file, e), CODERS[coder]) for file, e in places]
    return [
        replace(own, symbols=s) if s.bits(CODERS[coder]) < 8 * own.alone else own
        for own, s in zip(left, found, strict=True)
    ]


def _packed(files: Sequence[File], weights: Sequence[Chosen], coder: str) -> Container:
    """The container that has some of the weights coded."""
    about, skeleton, coded = [], list[bytes](), list[Coded]()
    every = iter(weights)
    for file in files:
        chosen = list(itertools.islice(every, len(file.extents)))
        own = [(w.extent, w.symbols) for w in chosen if w.symbols is not None]
        extents = [[e.start, e.count, e.size, s.gap_bits, len(s.streams[-1]), len(s.book)] for e, s in own]
        about.append([file.name, len(file.data), zlib.crc32(file.data), extents])
        skeleton += _between(file, own)
        coded += own
    whole = b"".join(skeleton)
    sections, blocks = [squeezed(whole)], []
    for block in _blocks(coded):
        side, words = _sections(block, coder)
        sections += [squeezed(side), words]
        blocks.append([coder, len(block), len(side), len(sections[-2]), len(words)])
    told = [about, [len(whole), len(sections[0])], blocks]
    front = _deflated(json.dumps(told, separators=(",", ":")).encode())
    body = front + b"".join(sections)
    data = HEAD.pack(MAGIC, VERSION, len(front), zlib.crc32(body)) + body
    return Container(data, coder if blocks else "", tuple(weights))


def _deflated(data: bytes) -> bytes:
    writer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return writer.compress(data) + writer.flush()


def _values(file: File, extent: Extent) -> NDArray[Any]:
    """The bits of some weights."""
    return np.frombuffer(file.data, f"<u{extent.size}", extent.count, extent.start)


def _between(file: File, own: Sequence[Coded]) -> Iterator[bytes]:
    """What a file has around its weights."""
    at = 0
    for extent, _ in own:
        yield file.data[at : extent.start]
        at = extent.start + extent.count * extent.size
    yield file.data[at:]


def _blocks(weights: Sequence[Coded]) -> Iterator[list[Coded]]:
    """Weights one after the other until there are enough."""
    block: list[Coded] = []
    for pair in weights:
        more = [*block, pair]
        if block and (sum(e.count for e, _ in more) > BLOCK or sum(len(s.streams) for _, s in more) > STREAMS):
            yield block
            block = []
        block.append(pair)
    if block:
        yield block


def _sections(block: Sequence[Coded], coder: str) -> tuple[bytes, bytes]:
    """Side and words: codebooks and tables, then the streams."""
    module = CODERS[coder]
    streams = [stream for _, s in block for stream in s.streams]
    tables = [module.table(np.bincount(stream)) for stream in streams]
    side = b"".join(s.book.astype(f"<u{e.size}").tobytes() for e, s in block)
    side += b"".join(len(table).to_bytes(2, "little") + table.tobytes() for table in tables)
    return side, module.encode(streams, tables)
