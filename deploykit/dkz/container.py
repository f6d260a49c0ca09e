"""The container: files whose weights are cut out and coded, and the rest of them as a skeleton beside.

    DKZ | version | length of the front | checksum | front | skeleton | block | block ..

The front says in JSON what there is; skeleton and sides of blocks are LZMA2. A block has some weights one after the
other: a side with their codebooks and tables, and the words of all their streams. Blocks are decoded one by one.
``docs/formats/dkz.md`` has every detail.
"""

from __future__ import annotations

import itertools
import json
import lzma
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from deploykit.core.errors import DeploykitError, unknown
from deploykit.dkz import huffman, rans
from deploykit.dkz.symbols import MOST, Symbols, symbols, values

MAGIC, VERSION = b"DKZ", 1
HEAD = struct.Struct("<3sBII")
BLOCK = 1 << 22
"""Weights of a block, unless one alone has more."""
LIMIT = 1 << 32
"""Bytes that a container may unpack to, unless the caller allows more."""
FRONT = 1 << 26
"""Bytes of a front, at most."""
SETTINGS = ((3, 0, 2), (0, 0, 0), (4, 0, 0), (0, 2, 2))
"""Of LZMA: bits of context from the byte before, of the place of a literal, of the place of a match."""
TRIED = 1 << 18
"""Bytes up to which all settings are tried."""
CODERS: dict[str, Any] = {"rans": rans, "huffman": huffman}


@dataclass(frozen=True)
class Extent:
    """Weights within a file."""

    start: int
    """Byte."""
    count: int
    size: int
    """Bytes of one, 1, 2 or 4."""


@dataclass(frozen=True)
class File:
    """A file to be packed."""

    name: str
    data: bytes
    extents: Sequence[Extent]
    """In order; they do not overlap."""


Coded = Sequence[tuple[Extent, Symbols]]
"""Weights of a file that are not left in the skeleton."""


def pack(files: Sequence[File], coder: str | None = None) -> bytes:
    """The container of some files, the same bytes for the same files.

    Args:
        files: in order.
        coder: of the streams; None: whichever makes the smaller container.

    Raises:
        DeploykitError: no such coder.
    """
    if coder is not None and coder not in CODERS:
        raise unknown("coder", coder, CODERS)
    alone = [[8 * len(_lzma(_values(file, e).tobytes())) for e in file.extents] for file in files]
    tries = [
        _packed(files, [_coded(file, bits, name) for file, bits in zip(files, alone, strict=True)], name)
        for name in ([coder] if coder else CODERS)
    ]
    return min(*tries, _packed(files, [()] * len(files), ""), key=len)  # weights may be as good as random


def _coded(file: File, alone: Sequence[int], coder: str) -> Coded:
    """The weights for which a coder needs less than the bits that LZMA2 needs ``alone``."""
    found = [(e, symbols(_values(file, e), CODERS[coder])) for e in file.extents]
    return [(e, s) for (e, s), bits in zip(found, alone, strict=True) if s.bits(CODERS[coder]) < bits]


def _packed(files: Sequence[File], coded: Sequence[Coded], coder: str) -> bytes:
    """The container that has some of the weights coded."""
    about, skeleton, weights = [], b"", list[tuple[Extent, Symbols]]()
    for file, own in zip(files, coded, strict=True):
        extents = [[e.start, e.count, e.size, s.gap_bits, len(s.streams[-1]), len(s.book)] for e, s in own]
        about.append([file.name, len(file.data), zlib.crc32(file.data), extents])
        skeleton += b"".join(_between(file, own))
        weights += own
    sections, blocks = [_squeezed(skeleton)], []
    for block in _blocks(weights):
        side, words = _sections(block, coder)
        sections += [_squeezed(side), words]
        blocks.append([coder, len(block), len(side), len(sections[-2]), len(words)])
    told = [about, [len(skeleton), len(sections[0])], blocks]
    front = _deflated(json.dumps(told, separators=(",", ":")).encode())
    body = front + b"".join(sections)
    return HEAD.pack(MAGIC, VERSION, len(front), zlib.crc32(body)) + body


def _deflated(data: bytes) -> bytes:
    writer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return writer.compress(data) + writer.flush()


def _values(file: File, extent: Extent) -> NDArray[Any]:
    """The bits of some weights."""
    return np.frombuffer(file.data, f"<u{extent.size}", extent.count, extent.start)


def _between(file: File, own: Coded) -> Iterator[bytes]:
    """What a file has around its weights."""
    at = 0
    for extent, _ in own:
        yield file.data[at : extent.start]
        at = extent.start + extent.count * extent.size
    yield file.data[at:]


def _blocks(weights: Coded) -> Iterator[Coded]:
    """Weights one after the other until there are enough."""
    block: list[tuple[Extent, Symbols]] = []
    for pair in weights:
        if block and sum(e.count for e, _ in block) + pair[0].count > BLOCK:
            yield block
            block = []
        block.append(pair)
    if block:
        yield block


def _sections(block: Coded, coder: str) -> tuple[bytes, bytes]:
    """Side and words: codebooks and tables, then the streams."""
    module = CODERS[coder]
    streams = [stream for _, s in block for stream in s.streams]
    tables = [module.table(np.bincount(stream)) for stream in streams]
    side = b"".join(s.book.astype(f"<u{e.size}").tobytes() for e, s in block)
    side += b"".join(len(table).to_bytes(2, "little") + table.tobytes() for table in tables)
    return side, module.encode(streams, tables)


def _squeezed(data: bytes) -> bytes:
    """As LZMA2, by the best of some settings: weights are no text, and a decoder need not know which it was."""
    return min(
        (_lzma(data, lc=lc, lp=lp, pb=pb) for lc, lp, pb in SETTINGS[: None if len(data) < TRIED else 1]), key=len
    )


def _lzma(data: bytes, **settings: int) -> bytes:
    return lzma.compress(data, lzma.FORMAT_RAW, filters=[own | settings for own in _filters(len(data))])


def _filters(size: int) -> list[dict[str, int]]:
    window = 1 << min(26, max(12, size.bit_length()))
    return [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}]


# ------------------------------------------------------------------ reading


def unpack(data: bytes, limit: int = LIMIT) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Names of the files and their bytes piece by piece; each file is to be read before the next is asked for.

    Args:
        data: a container.
        limit: bytes that may come out altogether.

    Raises:
        DeploykitError: it is none, is damaged, of another version, or larger than the limit.
    """
    front, sections = _opened(memoryview(data), limit)
    skeleton = memoryview(_spread(next(sections), front.skeleton))
    weights, at = _weights(front, sections), 0
    for file in front.files:
        rest = file.size - sum(e.values * e.size for e in file.extents)
        yield file.name, _checked(file, _pieces(file, skeleton[at : at + rest], weights))
        at += rest


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


def _opened(data: memoryview, limit: int) -> tuple[Front, Iterator[memoryview]]:
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
    for file in front.files:
        ends = [0, *(e.start + e.values * e.size for e in file.extents)]
        starts = [*(e.start for e in file.extents), file.size]
        sound &= all(end <= start for end, start in zip(ends, starts, strict=True))
    for e in extents:
        sound &= e.size in (1, 2, 4) and e.gap_bits <= 16 and e.book <= min(MOST, 256**e.size)
        sound &= e.entries <= e.values if e.gap_bits and e.book else e.entries == e.values
    if not sound:
        raise DeploykitError("this .dkz is damaged: the numbers of its front do not fit each other")
    if total > limit:
        raise DeploykitError(f"this .dkz unpacks to {total:,} bytes, more than the limit of {limit:,}")


def _spread(section: memoryview, size: int) -> bytes:
    """An LZMA2 section of so many bytes."""
    reader = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_filters(size))
    try:
        found = reader.decompress(section, size)
        found += reader.decompress(b"", 1) if len(found) == size and not reader.eof else b""
    except (lzma.LZMAError, EOFError) as error:
        raise DeploykitError(f"this .dkz is damaged: {error}") from None
    if len(found) != size or not reader.eof or reader.unused_data:
        raise DeploykitError("this .dkz is damaged: a section has another size than its front says")
    return found


def _weights(front: Front, sections: Iterator[memoryview]) -> Iterator[bytes]:
    """The bytes of all weights, in order; one block at a time."""
    extents = iter([e for file in front.files for e in file.extents])
    for block in front.blocks:
        own = list(itertools.islice(extents, block.weights))
        side, words = _spread(next(sections), block.side), next(sections)
        books, at = [], 0
        for e in own:
            if len(side) < at + e.book * e.size:
                raise DeploykitError("this .dkz is damaged: a codebook is cut off")
            books.append(np.frombuffer(side, f"<u{e.size}", e.book, at))
            at += e.book * e.size
        counts = [e.entries for e in own for _ in range(e.streams)]
        streams = iter(CODERS[block.coder].decode(words, list(_tables(side[at:], len(counts))), counts))
        for e, book in zip(own, books, strict=True):
            found = Symbols(book, tuple(itertools.islice(streams, e.streams)), e.gap_bits)
            yield values(found, e.values).tobytes()


def _tables(data: bytes, count: int) -> Iterator[NDArray[np.uint8]]:
    """So many tables, each after its length."""
    at = 0
    for _ in range(count):
        length = int.from_bytes(data[at : at + 2], "little")
        if len(data) < at + 2 + length or length > MOST:
            raise DeploykitError("this .dkz is damaged: a table is cut off")
        yield np.frombuffer(data, np.uint8, length, at + 2)
        at += 2 + length


def _pieces(file: Told, skeleton: memoryview, weights: Iterator[bytes]) -> Iterator[bytes]:
    """A file's bytes: skeleton and weights by turns."""
    at, done = 0, 0
    for e in file.extents:
        yield bytes(skeleton[done : done + e.start - at])
        yield next(weights)
        done, at = done + e.start - at, e.start + e.values * e.size
    yield bytes(skeleton[done:])


def _checked(file: Told, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The pieces, and at their end whether they are what was packed."""
    crc = 0
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
        yield piece
    if crc != file.crc:
        raise DeploykitError(f"this .dkz is damaged: {file.name} does not fit its checksum")
