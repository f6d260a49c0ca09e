"""The front of a container: what it says is within, read and believed only where its numbers fit each other."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from deploykit.coding import huffman, rans
from deploykit.coding.symbols import MOST
from deploykit.core.errors import DeploykitError

MAGIC, VERSION = b"DKZ", 1
HEAD = struct.Struct("<3sBII")
LIMIT = 1 << 32
"""Bytes that a container may unpack to, unless the caller allows more."""
FRONT = 1 << 26
"""Bytes of a front, at most."""
CODERS: dict[str, Any] = {"rans": rans, "huffman": huffman}


class Weights(NamedTuple):
    """An extent, as a front tells of it."""

    start: int
    values: int
    size: int
    gap_bits: int
    entries: int
    """Symbols of a stream."""
    book: int
    """Values of the codebook; 0: there is none."""

    @property
    def streams(self) -> int:
        """How many there are."""
        return self.size if not self.book else 2 if self.gap_bits else 1

    @property
    def making(self) -> int:
        """Bytes that it takes at most to make it of its symbols: copies, and places of sparse values in 64 bits."""
        return (2 if self.book else 3) * self.values * self.size + (24 * self.entries if self.gap_bits else 0)


class Told(NamedTuple):
    """A file, as a front tells of it."""

    name: str
    size: int
    crc: int
    extents: tuple[Weights, ...]


class Block(NamedTuple):
    """A block, as a front tells of it."""

    coder: Literal["rans", "huffman"]
    weights: int
    side: int
    """Bytes of the side."""
    squeezed: int
    """And of its section."""
    words: int


class Front(NamedTuple):
    """What a front tells."""

    files: tuple[Told, ...]
    skeleton: int
    squeezed: int
    blocks: tuple[Block, ...]


def front_of(data: bytes | memoryview, limit: int = LIMIT) -> Front:
    """What a container's front tells; see `deploykit.dkz.reading.unpack`."""
    return opened(memoryview(data), limit)[0]


def opened(data: memoryview, limit: int) -> tuple[Front, Iterator[memoryview]]:
    """The front, and the sections behind it."""
    if len(data) < HEAD.size:
        raise DeploykitError("this is no .dkz: it is too short")
    magic, version, length, crc = HEAD.unpack_from(data)
    if magic != MAGIC:
        raise DeploykitError("this is no .dkz: it does not begin with DKZ")
    if version != VERSION:
        raise DeploykitError(f"this .dkz has version {version}; this deploykit reads version {VERSION}")
    body = data[HEAD.size :]
    if length > len(body) or zlib.crc32(body) != crc:
        raise DeploykitError("this .dkz is damaged or cut off: it does not fit its checksum")
    front = _read(_inflated(body[:length]))
    _assert_sound(front, limit)
    sizes = [front.squeezed, *(size for block in front.blocks for size in (block.squeezed, block.words))]
    ends = list(itertools.accumulate(sizes, initial=length))
    if ends[-1] != len(body):
        raise DeploykitError("this .dkz is damaged: its sections do not add up to its size")
    return front, (body[start:end] for start, end in itertools.pairwise(ends))


def _read(front: bytes) -> Front:
    """The front's JSON.

    Raises:
        DeploykitError: it is not as it should be.
    """
    try:
        files, skeleton, blocks = msgspec.json.decode(front, type=tuple[list[Told], tuple[int, int], list[Block]])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DeploykitError(f"this .dkz is damaged: {error}") from None
    return Front(tuple(files), *skeleton, tuple(blocks))


def _inflated(front: memoryview) -> bytes:
    reader = zlib.decompressobj(-15)
    try:
        found = reader.decompress(front, FRONT)
    except zlib.error as error:
        raise DeploykitError(f"this .dkz is damaged: {error}") from None
    if not reader.eof or reader.unused_data:
        raise DeploykitError("this .dkz is damaged: its front does not end")
    return found


def _assert_sound(front: Front, limit: int) -> None:
    """Raises unless a front's numbers fit each other, before anything is made room for.

    Raises:
        DeploykitError: says that they do not, or that too much would come out.
    """
    extents = [e for file in front.files for e in file.extents]
    numbers = [front.skeleton, front.squeezed, *(n for e in extents for n in e), *(file.size for file in front.files)]
    numbers += [n for block in front.blocks for n in block[1:]]
    total = sum(file.size for file in front.files)
    sound = min(numbers) >= 0
    sound &= sum(block.weights for block in front.blocks) == len(extents)
    sound &= total == front.skeleton + sum(e.values * e.size for e in extents)
    sound &= min(parts(front.files), default=0) >= 0
    for e in extents:
        sound &= e.size in (1, 2, 4) and e.gap_bits <= 16 and e.book <= min(MOST, 256**e.size)
        sound &= e.entries <= e.values if e.gap_bits and e.book else e.entries == e.values
    sound = sound and all(
        block.side <= sum(e.book * e.size + e.streams * (2 + MOST) for e in own) for block, own in grouped(front)
    )
    if not sound:
        raise DeploykitError("this .dkz is damaged: the numbers of its front do not fit each other")
    if total > limit:
        raise DeploykitError(f"this .dkz unpacks to {total:,} bytes, more than the limit of {limit:,}")


def grouped(front: Front) -> Iterator[tuple[Block, list[Weights]]]:
    """Blocks with their weights."""
    extents = iter([e for file in front.files for e in file.extents])
    for block in front.blocks:
        yield block, list(itertools.islice(extents, block.weights))


def parts(files: Sequence[Told]) -> list[int]:
    """Bytes before, between and after the weights of every file."""
    found = []
    for file in files:
        ends = [0, *(e.start + e.values * e.size for e in file.extents)]
        starts = [*(e.start for e in file.extents), file.size]
        found += [start - end for end, start in zip(ends, starts, strict=True)]
    return found
