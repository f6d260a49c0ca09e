"""Containers unpacked: block by block, piece by piece, so that memory does not grow with the file."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from deploykit.coding.lanes import LENGTH
from deploykit.coding.symbols import MOST, Symbols, values
from deploykit.core.errors import DeploykitError
from deploykit.dkz.front import CODERS, LIMIT, Block, Front, Told, Weights, grouped, opened, parts
from deploykit.dkz.lzma2 import PIECE, spread, window

HELD = 1 << 19
"""Bytes that decoding takes whatever is decoded."""
TABLE = MOST * 10
"""Bytes of what a decoder looks a stream's symbols up in."""


def unpack(data: bytes | memoryview, limit: int = LIMIT) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Names of the files and their bytes piece by piece; each file is to be read before the next is asked for.

    Args:
        data: a container.
        limit: bytes that may come out altogether.

    Raises:
        DeploykitError: it is none, is damaged, of another version, or larger than the limit.
    """
    front, sections = opened(memoryview(data), limit)
    skeleton, weights = spread(next(sections), parts(front.files)), _weights(front, sections)
    for file in front.files:
        yield file.name, _checked(file, _pieces(file, skeleton, weights))
    for _ in skeleton:  # its end is checked as well
        pass


def peak(front: Front) -> int:
    """Bytes that `unpack` takes at most while it decodes, without the container itself.

    One block is decoded at a time, so the largest decides: its symbols and words, and the arrays that make one weight
    of them. The skeleton takes what LZMA2 looks back to, and a few pieces.
    """
    own = [e for file in front.files for e in file.extents]
    told = 1024 * (len(front.files) + len(own) + len(front.blocks))
    skeleton = window(front.skeleton) + 4 * min(front.skeleton, PIECE)
    handed = max((e.values * e.size for e in own), default=0)  # a piece that the caller may still hold
    return HELD + told + skeleton + handed + max((_needed(*pair) for pair in grouped(front)), default=0)


def _needed(block: Block, own: Sequence[Weights]) -> int:
    """Bytes that a block takes at most."""
    streams = sum(e.streams for e in own)
    total = sum(e.streams * e.entries for e in own)
    lanes = total // LENGTH + streams
    # a mark for each lane and step, words in 32 bits, tables, the states of lanes and what a step makes of them
    decoding = LENGTH * lanes + 2 * block.words + TABLE * streams + 256 * lanes
    making = max((e.making for e in own), default=0)
    side = window(block.side) + 3 * block.side
    return side + np.dtype(np.uint16).itemsize * total + max(decoding, making)


def _weights(front: Front, sections: Iterator[memoryview]) -> Iterator[bytes]:
    """The bytes of all weights, in order; nothing of a block is left when the next one is decoded."""
    for block, own in grouped(front):
        yield from _decoded(block, own, next(sections), next(sections))


def _decoded(block: Block, own: Sequence[Weights], section: memoryview, words: memoryview) -> Iterator[bytes]:
    """The bytes of a block's weights, in order."""
    side = b"".join(spread(section, [block.side]))
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


def _pieces(file: Told, skeleton: Iterator[bytes], weights: Iterator[bytes]) -> Iterator[bytes]:
    """A file's bytes: skeleton and weights by turns."""
    for number, left in enumerate(parts([file])):
        if number:
            yield next(weights)
        while left:
            piece = next(skeleton)
            left -= len(piece)
            yield piece


def _checked(file: Told, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The pieces, and at their end whether they are what was packed."""
    crc = 0
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
        yield piece
    if crc != file.crc:
        raise DeploykitError(f"this .dkz is damaged: {file.name} does not fit its checksum")
