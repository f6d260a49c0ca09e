"""Weights that stay coded in flash: what ``device/dk_decode.h`` turns into weights again, layer by layer.

Symbols and codes are those of the container .dkz (`deploykit.dkz`): zeros that are counted, or values alone, whichever
takes less, in canonical Huffman codes: decoding them takes comparisons and no tables in RAM. There is one lane for each
stream, since a microcontroller decodes symbol after symbol. Tables are laid out as the decoder reads them: it could not
sort code lengths without room for that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.coding import huffman
from deploykit.coding.symbols import symbols
from deploykit.exporters.c99.program import Product, Program

if TYPE_CHECKING:
    from numpy.typing import NDArray

DECODER_BYTES = 436
"""Code of ``dk_decode.h``, measured as the kernels in `budget` are."""
DECODER_STACK_BYTES = 112
"""Its streams, and what it calls."""
DECODE_BYTES = 24
"""Code of one call of it."""


def with_coded_weights(program: Program) -> Program:
    """The program with those weights coded that are smaller so; with none if together they do not pay the decoder."""
    products = [op for op in program.operations if isinstance(op, Product)]
    tried = {op: code(op.weights) for op in products}
    saved = {op: op.weights.nbytes - coded.nbytes - DECODE_BYTES for op, coded in tried.items()}
    smaller = {op: tried[op] for op, less in saved.items() if less > 0}
    pays = sum(saved[op] for op in smaller) > DECODER_BYTES
    return replace(program, coded=smaller) if pays else program


def code(weights: NDArray[np.int8]) -> NDArray[np.uint8]:
    """The bytes of some weights; ``dk_decode.h`` says what they mean.

    Args:
        weights: of any shape, at least one; what is stored first comes first.
    """
    found = symbols(np.ascontiguousarray(weights).view(np.uint8).reshape(-1), huffman)
    tables = [huffman.table(np.bincount(stream)) for stream in found.streams]
    gaps = _table(tables[0], np.arange(len(tables[0]), dtype="<u2")) if found.gap_bits else b"\0"
    words = huffman.encode(found.streams, tables, length=weights.size)
    front = len(found.streams[-1]).to_bytes(4, "little")
    return np.frombuffer(front + gaps + _table(tables[-1], found.book) + words, np.uint8)


def _table(lengths: NDArray[np.uint8], meanings: NDArray[Any]) -> bytes:
    """How many codes have each length, and what they mean in the order of their numbers."""
    used = np.flatnonzero(lengths)
    counts = np.bincount(lengths[used])[1:]
    order = used[np.argsort(lengths[used], kind="stable")]
    return bytes([len(counts)]) + counts.astype("<u2").tobytes() + meanings[order].tobytes()
