"""The front of a container: what it says is within, read and believed only where its numbers fit each other."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np

from deploykit.coding import huffman, rans
from deploykit.coding.contexts import Model, fewest
from deploykit.coding.lanes import NARROW
from deploykit.coding.symbols import MOST, PIECE
from deploykit.core.errors import DeploykitError

MAGIC, VERSION = b"DKZ", 2
HEAD = struct.Struct("<3sBII")
LIMIT = 1 << 32
"""Bytes that a container may unpack to, unless the caller allows more."""
FRONT = 1 << 24
"""Bytes of a front, at most."""
CODERS: dict[str, Any] = {"rans": rans, "huffman": huffman}
"""Of streams."""
CONTEXTS = "contexts"
"""The coder that looks at what is around a weight."""
LARGEST = 512
"""Values of a codebook that it takes."""
MOST_GAP = 12
"""Bits of a gap, for it is a symbol."""
MOST_PASSES, MOST_DISTANCES, MOST_FAR = 64, 16, 1 << 16
"""Of a model: passes, distances, and how far these are."""
MOST_STREAMS, MOST_VALUES = 512, 1 << 22
"""Of a block: streams, and values unless one weight alone has more."""


class Weights(NamedTuple):
    """An extent, as a front tells of it."""

    start: int
    values: int
    bits: int
    gap_bits: int
    entries: int
    """Symbols of a stream."""
    book: int
    """Values of the codebook; 0: there is none."""
    model: int = -1
    """Number of the model of its surroundings; -1: it is coded without."""
    rows: int = 1
    outer: int = 1

    @property
    def bytes(self) -> int:
        """Of all values."""
        return self.values * self.bits // 8

    @property
    def element(self) -> int:
        """Bytes of a value while it is decoded."""
        return max(1, self.bits // 8)

    @property
    def streams(self) -> int:
        """How many there are."""
        return self.element if not self.book else 2 if self.gap_bits else 1

    @property
    def width(self) -> int:
        """Bytes of a symbol while it is decoded."""
        return 1 if max(self.book, 1 << self.gap_bits) <= NARROW else 2

    @property
    def making(self) -> int:
        """Bytes that it takes at most to make a piece of it: copies, and places of sparse values in 64 bits."""
        return 4 * self.element * min(self.values, PIECE) + (32 * min(self.entries, PIECE) if self.gap_bits else 0)


class Told(NamedTuple):
    """A file, as a front tells of it."""

    name: str
    size: int
    crc: int
    extents: tuple[Weights, ...]


class Block(NamedTuple):
    """A block, as a front tells of it."""

    coder: Literal["rans", "huffman", "contexts"]
    weights: int
    side: int
    """Bytes of the side."""
    squeezed: int
    """And of its section."""
    words: int
    lanes: int = 0
    """Of the coder with contexts."""


Coefficient = Annotated[int, msgspec.Meta(ge=-128, le=127)]
Coefficients = Annotated[list[Coefficient], msgspec.Meta(max_length=MOST_DISTANCES + 4)]


class Surroundings(NamedTuple):
    """A model, as a front tells of it; see `deploykit.coding.contexts.Model`."""

    kernel: int
    passes: int
    distances: Annotated[list[int], msgspec.Meta(max_length=MOST_DISTANCES)]
    mean: Annotated[list[Coefficients], msgspec.Meta(max_length=MOST_PASSES)]
    spread: Annotated[list[Coefficients], msgspec.Meta(max_length=MOST_PASSES)]

    def model(self) -> Model:
        """It."""
        mean = np.asarray(self.mean, np.int8).reshape(len(self.mean), len(self.distances))
        return Model(self.kernel, self.passes, tuple(self.distances), mean, np.asarray(self.spread, np.int8))


class Front(NamedTuple):
    """What a front tells."""

    files: tuple[Told, ...]
    skeleton: int
    squeezed: int
    blocks: tuple[Block, ...]
    models: tuple[Surroundings, ...]


FRONT_TYPE = tuple[list[Told], tuple[int, int], list[Block], list[Surroundings]]


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
        files, skeleton, blocks, models = msgspec.json.decode(front, type=FRONT_TYPE)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DeploykitError(f"this .dkz is damaged: {error}") from None
    bytes_, squeezed = skeleton
    return Front(tuple(files), bytes_, squeezed, tuple(blocks), tuple(models))


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
    numbers = [front.skeleton, front.squeezed, *(n for e in extents for n in (*e[:6], *e[7:]))]
    numbers += [file.size for file in front.files] + [n for block in front.blocks for n in block[1:]]
    total = sum(file.size for file in front.files)
    sound = min(numbers) >= 0
    sound &= sum(block.weights for block in front.blocks) == len(extents)
    sound &= total == front.skeleton + sum(e.bytes for e in extents)
    sound &= min(parts(front.files), default=0) >= 0
    sound = sound and all(map(_is_model, front.models)) and all(_is_weight(e, front.models) for e in extents)
    sound &= {e.model for e in extents} - {-1} == set(range(len(front.models)))
    sound = sound and all(_is_block(*pair) for pair in grouped(front))
    if not sound:
        raise DeploykitError("this .dkz is damaged: the numbers of its front do not fit each other")
    if total > limit:
        raise DeploykitError(f"this .dkz unpacks to {total:,} bytes, more than the limit of {limit:,}")


def _is_block(block: Block, own: Sequence[Weights]) -> bool:
    """Whether the numbers fit each other, and are so small that a block takes little memory beside its values."""
    values, contexts = sum(e.values for e in own), block.coder == CONTEXTS
    sound = len(own) > 0 and block.side <= sum(e.book * e.element + e.streams * (2 + MOST) + LARGEST for e in own)
    sound &= sum(e.streams for e in own) <= MOST_STREAMS
    sound &= values <= MOST_VALUES or (len(own) == 1 and not contexts)
    sound &= all((e.model >= 0) == contexts for e in own)
    if not contexts:
        return sound and not block.lanes
    return sound and 4 * block.lanes <= block.words and fewest(values) <= block.lanes


def _is_weight(e: Weights, models: Sequence[Surroundings]) -> bool:
    """Whether the numbers fit each other."""
    sound = e.bits in (4, 8, 16, 32) and e.gap_bits <= MOST_GAP and e.book <= min(MOST, 1 << e.bits)
    sound &= e.entries <= e.values and e.book > 0 if e.gap_bits else e.entries == e.values
    if e.bits == 4:
        sound &= e.values % 2 == 0 and e.book > 0
    if e.model != -1:
        sound = sound and 0 <= e.model < len(models) and not e.gap_bits and 0 < e.book <= LARGEST and e.values > 0
        inner = e.rows * e.outer * models[e.model].kernel if sound else 0
        sound = sound and inner > 0 and e.values % inner == 0 and models[e.model].passes <= e.values
    return sound


def _is_model(own: Surroundings) -> bool:
    """Whether the numbers fit each other."""
    sets, n = len(own.mean), len(own.distances)
    sound = 1 <= own.passes <= MOST_PASSES and own.kernel in (1, own.passes)
    sound &= sets in (1, own.passes) and len(own.spread) == sets
    sound &= all(abs(d) <= MOST_FAR for d in own.distances)
    return sound and all(len(row) == n for row in own.mean) and all(len(row) == n + 4 for row in own.spread)


def by_model(models: Sequence[int]) -> list[list[int]]:
    """Of a block's weights, which have the same model; models in the order of their numbers."""
    found = dict[int, list[int]]()
    for i, number in enumerate(models):
        found.setdefault(number, []).append(i)
    return [found[number] for number in sorted(found)]


def grouped(front: Front) -> Iterator[tuple[Block, list[Weights]]]:
    """Blocks with their weights."""
    extents = iter([e for file in front.files for e in file.extents])
    for block in front.blocks:
        yield block, list(itertools.islice(extents, block.weights))


def parts(files: Sequence[Told]) -> list[int]:
    """Bytes before, between and after the weights of every file."""
    found = []
    for file in files:
        ends = [0, *(e.start + e.bytes for e in file.extents)]
        starts = [*(e.start for e in file.extents), file.size]
        found += [start - end for end, start in zip(ends, starts, strict=True)]
    return found
