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

import numpy as np
from numpy.typing import NDArray

from deploykit.coding import contexts
from deploykit.coding.contexts import Model
from deploykit.coding.symbols import symbols
from deploykit.core.errors import unknown
from deploykit.dkz.front import CODERS, CONTEXTS, HEAD, MAGIC, MOST_STREAMS, MOST_VALUES, VERSION, by_model
from deploykit.dkz.lzma2 import compressed, squeezed
from deploykit.dkz.surroundings import with_contexts
from deploykit.dkz.weights import Chosen, File

WORTH_SLOWNESS = 0.99
"""Of what a container takes otherwise: with contexts it has to take less than that, for it is decoded more slowly."""


@dataclass(frozen=True)
class Container:
    """A container, and how it was made."""

    data: bytes
    weights: tuple[Chosen, ...]
    """Of all files, in order."""

    @property
    def has_contexts(self) -> bool:
        """Whether some are coded with contexts."""
        return any(own.around is not None for own in self.weights)


def pack(files: Sequence[File], coder: str | None = None) -> bytes:
    """The container of some files, on one machine the same bytes for the same files; see `packed`."""
    return packed(files, coder).data


def packed(files: Sequence[File], coder: str | None = None) -> Container:
    """The container of some files, and what was chosen for their weights.

    Args:
        files: in order.
        coder: of the streams; None: whichever makes the smallest container.

    Raises:
        DeploykitError: no such coder.
    """
    if coder is not None and coder not in (*CODERS, CONTEXTS):
        raise unknown("coder", coder, (*CODERS, CONTEXTS))
    made = [_packed(files, own) for own in _ways(files, coder)]
    return min(made, key=lambda own: len(own.data) / (WORTH_SLOWNESS if own.has_contexts and coder is None else 1.0))


def _ways(files: Sequence[File], coder: str | None) -> Iterator[list[Chosen]]:
    """What could be chosen: LZMA2 for all, since weights may be as good as random, or coders where they are better."""
    left = [Chosen(e, len(compressed(file.stored(e)))) for file in files for e in file.extents]
    yield left
    for name in CODERS:
        coded = _coded(files, left, name)
        if coder in (None, name):
            yield coded
        if name == "rans" and coder in (None, CONTEXTS):
            yield with_contexts(files, coded)


def _coded(files: Sequence[File], left: Sequence[Chosen], coder: str) -> list[Chosen]:
    """The weights, those as symbols for which a coder needs less than LZMA2 alone."""
    module, found = CODERS[coder], []
    places = [(file, e) for file in files for e in file.extents]
    for own, (file, e) in zip(left, places, strict=True):
        s = symbols(file.elements(e), module)
        words = sum(float(module.size(np.bincount(stream))) for stream in s.streams)
        tried = replace(own, coder=coder, symbols=s, words=words)
        found.append(tried if tried.bits < own.bits else own)
    return found


def _packed(files: Sequence[File], weights: Sequence[Chosen]) -> Container:
    """The container of weights as they were chosen."""
    about, skeleton, coded = [], list[bytes](), list[Chosen]()
    models = list({id(w.around.model): w.around.model for w in weights if w.around is not None}.values())
    every = iter(weights)
    for file in files:
        own = [w for w in itertools.islice(every, len(file.extents)) if w.coder]
        about.append([file.name, len(file.data), zlib.crc32(file.data), [_told(w, models) for w in own]])
        skeleton += _between(file, own)
        coded += own
    whole = b"".join(skeleton)
    sections, blocks = [squeezed(whole)], []
    for block in _blocks(coded):
        side, words, lanes = _sections(block, models)
        sections += [squeezed(side), words]
        told = [block[0].coder, len(block), len(side), len(sections[-2]), len(words)]
        blocks.append([*told, lanes] if lanes else told)
    surroundings = [[m.kernel, m.passes, m.distances, m.mean.tolist(), m.spread.tolist()] for m in models]
    whole_front = [about, [len(whole), len(sections[0])], blocks, surroundings]
    front = _deflated(json.dumps(whole_front, separators=(",", ":")).encode())
    body = front + b"".join(sections)
    return Container(HEAD.pack(MAGIC, VERSION, len(front), zlib.crc32(body)) + body, tuple(weights))


def _told(own: Chosen, models: Sequence[Model]) -> list[int]:
    """What a front says of some weights."""
    e, s = own.extent, own.symbols
    assert s is not None
    found = [e.start, e.count, e.bits, s.gap_bits, len(s.streams[-1]), len(s.book)]
    if own.around is None:
        return found
    assert e.shape is not None
    return [*found, _number(models, own.around.model), e.shape.rows, e.shape.outer]


def _deflated(data: bytes) -> bytes:
    writer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return writer.compress(data) + writer.flush()


def _between(file: File, own: Sequence[Chosen]) -> Iterator[bytes]:
    """What a file has around its weights."""
    at = 0
    for w in own:
        yield file.data[at : w.extent.start]
        at = w.extent.start + w.extent.bytes
    yield file.data[at:]


def _blocks(weights: Sequence[Chosen]) -> Iterator[list[Chosen]]:
    """Weights of one coder one after the other until there are enough."""
    block: list[Chosen] = []
    for own in weights:
        more = [*block, own]
        streams = sum(len(w.symbols.streams) for w in more if w.symbols is not None)
        full = sum(w.extent.count for w in more) > MOST_VALUES or streams > MOST_STREAMS
        if block and (full or own.coder != block[0].coder):
            yield block
            block = []
        block.append(own)
    if block:
        yield block


def _sections(block: Sequence[Chosen], models: Sequence[Model]) -> tuple[bytes, bytes, int]:
    """Side, with codebooks and tables, and words of the streams; and their lanes, if a decoder has to be told."""
    coded = [w.symbols for w in block if w.symbols is not None]
    books = b"".join(s.book.astype(s.book.dtype.newbyteorder("<")).tobytes() for s in coded)
    around = [w.around for w in block if w.around is not None]
    if around:
        tables = b"".join(_table(own.layer.table) + own.layer.levels.tobytes() for own in around)
        members = by_model([_number(models, own.model) for own in around])
        groups = [(around[own[0]].model, [around[i].layer for i in own]) for own in members]
        return books + tables, *contexts.encode(groups, [[coded[i].streams[0] for i in own] for own in members])
    module = CODERS[block[0].coder]
    streams = [stream for s in coded for stream in s.streams]
    found = [module.table(np.bincount(stream)) for stream in streams]
    return books + b"".join(_table(table) for table in found), module.encode(streams, found), 0


def _table(own: NDArray[np.uint8]) -> bytes:
    return len(own).to_bytes(2, "little") + own.tobytes()


def _number(models: Sequence[Model], model: Model) -> int:
    return next(i for i, own in enumerate(models) if own is model)
