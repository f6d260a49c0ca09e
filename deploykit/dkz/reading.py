"""Containers unpacked: block by block, piece by piece, so that memory does not grow with the file."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from deploykit.coding import contexts
from deploykit.coding.contexts import Layer, Model
from deploykit.coding.lanes import LENGTH
from deploykit.coding.nibbles import packed
from deploykit.coding.symbols import MOST, Symbols, pieces
from deploykit.core.errors import DeploykitError
from deploykit.dkz.front import (
    CODERS,
    CONTEXTS,
    LIMIT,
    Block,
    Front,
    Surroundings,
    Told,
    Weights,
    by_model,
    grouped,
    opened,
    parts,
)  # fmt: skip
from deploykit.dkz.lzma2 import PIECE, spread, window
from deploykit.dkz.weights import Shape

HELD = 1 << 19
"""Bytes that decoding takes whatever is decoded."""
TABLE = {"rans": 6 * MOST, "huffman": 3 * MOST}
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

    One block is decoded at a time, so the largest decides: its symbols, and with contexts what is known of them.
    Weights are made of symbols in pieces. The skeleton takes what LZMA2 looks back to, and a few pieces.
    """
    own = [e for file in front.files for e in file.extents]
    told = 1024 * (len(front.files) + len(own) + len(front.blocks)) + sum(map(_told, front.models))
    skeleton = window(front.skeleton) + 4 * min(front.skeleton, PIECE)
    needed = max((_needed(front.models, *pair) for pair in grouped(front)), default=0)
    return HELD + told + skeleton + needed


def _told(model: Surroundings) -> int:
    """Bytes of a model, as the front has it and as it is used."""
    return 2048 + 64 * len(model.spread) * (2 * len(model.distances) + 8)


def _needed(models: Sequence[Surroundings], block: Block, own: Sequence[Weights]) -> int:
    """Bytes that a block takes at most."""
    side = window(block.side) + 3 * block.side
    making = max(e.making for e in own)
    if block.coder == CONTEXTS:
        groups = [(models[own[g[0]].model], [own[i] for i in g]) for g in by_model([e.model for e in own])]
        decoding = max((_looking(*group) for group in groups), default=0) + 16 * block.lanes
        return side + 4 * sum(e.values for e in own) + max(decoding, making)
    streams = sum(e.streams for e in own)
    total = sum(e.streams * e.entries for e in own)
    lanes = total // LENGTH + streams
    # tables, the states of lanes and what a step makes of them
    decoding = TABLE[block.coder] * streams + 256 * lanes
    return side + max(e.width for e in own) * total + max(decoding, making)


def _looking(model: Surroundings, own: Sequence[Weights]) -> int:
    """Bytes that it takes at most to decode weights by their surroundings."""
    sizes = [(e.rows, e.values // e.rows) for e in own]
    n = sum(rows * -(-columns // model.passes) for rows, columns in sizes)  # of a pass, at most
    kinds = min(contexts.CLASSES * len(own), n)
    piece = min(n, contexts.PIECE) * (24 * len(model.distances) + 160)
    tables = 64 * max(e.book for e in own) * (kinds + len(own))
    kept = 4 * sum(e.values for e in own) + 8 * max(map(abs, model.distances), default=0)
    sums = sum(32 * (rows + columns) for rows, columns in sizes)
    return kept + sums + 32 * contexts.GROUPS * contexts.CLASSES * len(own) + 96 * n + piece + tables


def _weights(front: Front, sections: Iterator[memoryview]) -> Iterator[Iterator[bytes]]:
    """The bytes of each of all weights, in order; nothing of a block is left when the next one is decoded."""
    models = [own.model() for own in front.models]
    for block, own in grouped(front):
        yield from _decoded(block, own, models, next(sections), next(sections))


def _decoded(
    block: Block, own: Sequence[Weights], models: Sequence[Model], section: memoryview, words: memoryview
) -> Iterator[Iterator[bytes]]:
    """The bytes of each of a block's weights, in order."""
    side = b"".join(spread(section, [block.side]))
    books, at = [], 0
    for e in own:
        if len(side) < at + e.book * e.element:
            raise DeploykitError("this .dkz is damaged: a codebook is cut off")
        books.append(np.frombuffer(side, f"<u{e.element}", e.book, at))
        at += e.book * e.element
    if block.coder == CONTEXTS:
        streams = iter(_around(own, models, memoryview(side)[at:], words, block.lanes))
    else:
        counts = [e.entries for e in own for _ in range(e.streams)]
        streams = iter(CODERS[block.coder].decode(words, list(_tables(side[at:], len(counts))), counts))
    for e, book in zip(own, books, strict=True):
        found = Symbols(book, tuple(itertools.islice(streams, e.streams)), e.gap_bits)
        yield ((packed(made) if e.bits == 4 else made).tobytes() for made in pieces(found, e.values))


def _around(
    own: Sequence[Weights], models: Sequence[Model], data: memoryview, words: memoryview, lanes: int
) -> list[NDArray[np.uint16]]:
    """The codes of weights that are decoded by their surroundings."""
    layers, at = list[Layer](), 0
    for e in own:
        (table,) = _tables(data[at:], 1)
        at += 2 + len(table) + e.book
        if len(data) < at or len(table) != e.book:
            raise DeploykitError("this .dkz is damaged: a table is cut off")
        layers.append(Layer(e.rows, e.values // e.rows, table, np.frombuffer(data, np.int8, e.book, at - e.book)))
    groups = by_model([e.model for e in own])
    found = contexts.decode(words, [(models[own[g[0]].model], [layers[i] for i in g]) for g in groups], lanes)
    codes = dict(zip(itertools.chain(*groups), itertools.chain(*found), strict=True))
    return [Shape(e.rows, e.outer, models[e.model].kernel).apart(codes[i]) for i, e in enumerate(own)]


def _tables(data: bytes | memoryview, count: int) -> Iterator[NDArray[np.uint8]]:
    """So many tables, each after its length."""
    at = 0
    for _ in range(count):
        length = int.from_bytes(data[at : at + 2], "little")
        if len(data) < at + 2 + length or length > MOST:
            raise DeploykitError("this .dkz is damaged: a table is cut off")
        yield np.frombuffer(data, np.uint8, length, at + 2)
        at += 2 + length


def _pieces(file: Told, skeleton: Iterator[bytes], weights: Iterator[Iterator[bytes]]) -> Iterator[bytes]:
    """A file's bytes: skeleton and weights by turns."""
    for number, left in enumerate(parts([file])):
        if number:
            yield from next(weights)
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
