"""What pruning, sharing and coding each save of every weight: tables 4 and 5 of Han et al. 2016 ("Deep Compression"),
of a container as it was packed.

A file that keeps weights as indices of a codebook has them smaller already; they count as the float32 weights that they
stand for, so that the table begins where the network began.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deploykit.dkz.container import Container
from deploykit.dkz.front import Front, front_of
from deploykit.dkz.weights import Chosen, File

if TYPE_CHECKING:
    from rich.table import Table

REST = "everything else"
GAPS = range(1, 17)
"""Bits of a gap that are tried."""
SIZES = ("before", "pruned", "shared", "coded")
COLUMNS = {
    "count": "values", "kept": "kept %", "before": "bytes", "pruned": "pruned", "index_bits": "gap bits",
    "code_bits": "code bits", "shared": "+ shared", "coded": "+ coded",
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A weight after every step, in bytes; the last one is what there is besides weights."""

    name: str
    file: str
    count: int
    """Of its values."""
    kept: float
    """Percent of them that are not zero."""
    before: int
    """As it was; of indices, as what they stand for."""
    pruned: int
    """What is not zero, and fillers, each behind a gap of as many bits as make it the least; or as it was."""
    index_bits: int
    """Of a gap, once values are shared if they are; 0: without gaps it is less."""
    code_bits: int
    """Of a code; 0: there is no codebook, or none that saves anything."""
    shared: int
    """A code for each of them instead, and the codebook."""
    coded: int
    """In the container: words, tables and codebook, as they are there."""
    coder: str
    """rans, huffman, contexts, or lzma: left in the skeleton."""
    streams: str
    """What was coded: sparse, dense or bytes, as ``docs/formats/dkz.md`` has it; empty for lzma."""


def stages(files: Sequence[File], made: Container) -> tuple[Stage, ...]:
    """A row for each weight, in order, and one for everything else; what is coded sums to the container's bytes.

    Args:
        files: what was packed.
        made: of `deploykit.dkz.container.packed`.
    """
    whole = sum(len(file.data) for file in files)
    places = [(file, extent) for file in files for extent in file.extents]
    coded = _coded(made, front_of(made.data, whole))
    of_book = {e.indices.book: e.indices.values.nbytes for _, e in places if e.indices is not None}
    beside = {e.name: bytes_ for (_, e), bytes_ in zip(places, coded, strict=True) if e.name in of_book}
    rows = []
    for (file, e), own, bytes_ in zip(places, made.weights, coded, strict=True):
        if e.name in beside:  # a codebook belongs to the weight that has its indices
            continue
        book = beside.get(e.indices.book, 0) if e.indices is not None else 0
        rows.append(_stage(file, own, bytes_ + book))
    small = sum(bytes_ for name, bytes_ in of_book.items() if name not in beside)
    rest = whole - small - sum(e.bytes for _, e in places)
    left = len(made.data) - sum(row.coded for row in rows)
    return (*rows, Stage(REST, "", 0, 0.0, rest, rest, 0, 0, rest, left, "", ""))


def _stage(file: File, own: Chosen, coded: int) -> Stage:
    e, s = own.extent, own.symbols
    weights, bits, k = _weights(file, own)
    at, book = np.flatnonzero(weights), -(-k * bits // 8)
    gaps = np.diff(at, prepend=-1) - 1
    before = len(weights) * bits // 8
    pruned, gap = _least(gaps, len(weights), bits)
    shared, code = pruned, 0
    if k:
        width = max(1, math.ceil(math.log2(k)))
        codes, b = _least(gaps, len(weights), width)
        if codes + book < pruned:
            shared, gap, code = codes + book, b, width
    streams = "" if s is None else "bytes" if not len(s.book) else "sparse" if s.gap_bits else "dense"
    return Stage(
        e.name, file.name, len(weights), 100 * len(at) / len(weights), before, pruned, gap, code, shared, coded,
        own.coder or "lzma", streams,
    )  # fmt: skip


def _weights(file: File, own: Chosen) -> tuple[NDArray[np.unsignedinteger[Any]], int, int]:
    """The bits of each weight, how many those are, and how many values all weights share; 0: there is no codebook.

    Indices count as the float32 weights that they stand for.
    """
    e, indices = own.extent, own.extent.indices
    if indices is not None:
        return indices.values.view(np.uint32)[indices.codes], 8 * indices.values.itemsize, len(indices.values)
    return file.elements(e), e.bits, 0 if own.symbols is None else len(own.symbols.book)


def _least(gaps: NDArray[np.int64], count: int, bits: int) -> tuple[int, int]:
    """Bytes of all values with so many bits each, or of those that are not zero behind gaps; and the bits of a gap.

    Args:
        gaps: how many zeros come before each value that is not zero.
        count: of all values.
        bits: of a value.
    """
    sparse = [((len(gaps) + int((gaps >> b).sum())) * (bits + b), b) for b in GAPS]
    least, b = min((count * bits, 0), *sparse)
    return -(-least // 8), b


def _coded(made: Container, front: Front) -> list[int]:
    """Bytes of each weight within a container.

    Those of a block share its side and its words by what they put in. One that is left in the skeleton takes what it
    takes as LZMA2 alone, or less where the whole skeleton does.
    """
    left = [own.alone for own in made.weights if own.symbols is None]
    skeleton = iter(_dealt(front.squeezed, [*left, max(0, front.squeezed - sum(left))]))
    coded = iter([own for own in made.weights if own.symbols is not None])
    blocks = list[int]()
    for block in front.blocks:
        own = list(itertools.islice(coded, block.weights))
        sides, words = _dealt(block.squeezed, [w.side for w in own]), _dealt(block.words, [w.words for w in own])
        blocks += [side + word for side, word in zip(sides, words, strict=True)]
    within = iter(blocks)
    return [next(skeleton if own.symbols is None else within) for own in made.weights]


def _dealt(total: int, shares: Sequence[float]) -> list[int]:
    """A number dealt out in whole parts, in proportion, so that they sum to it; nothing, where all shares are 0."""
    ends = np.cumsum([0.0, *shares])
    return [int(part) for part in np.diff(np.round(ends * (total / (ends[-1] or 1.0))))]


def table(rows: Sequence[Stage]) -> Table:
    """The rows for people, with their sums below."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    whole = max(1, sum(row.before for row in rows))
    found.add_column("weight", "all", overflow="fold")
    for field, head in COLUMNS.items():
        total = sum(getattr(row, field) for row in rows)
        share = f"\n{100 * total / whole:.1f} %" if field in SIZES else ""
        found.add_column(head, f"{total:,}{share}" if field in ("count", *SIZES) else "", justify="right")
    found.add_column("coder")
    for row in rows:
        figures = [getattr(row, field) for field in COLUMNS]
        told = [f"{n:.1f}" if isinstance(n, float) and row.count else f"{n:,}" if n else "" for n in figures]
        found.add_row(Text(row.name), *told, f"{row.coder} {row.streams}")  # brackets in a name are no markup
    return found
