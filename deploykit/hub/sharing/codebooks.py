"""Codebooks of a float graph's weights: shared values are made here, and found again in whatever graph has them.

A weight whose values are few is a shared one. Nothing else is kept beside it, so that exporters, containers and later
steps need no record of how it came about. Zero, where it occurs, is code 0 and stays zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploykit.core.errors import DeploykitError
from deploykit.core.patterns import matching
from deploykit.hub.graph import FloatGraph, constant
from deploykit.hub.operators import weight_positions
from deploykit.hub.plan import name_of
from deploykit.hub.sharing.entropy import cheapest, constrained, level
from deploykit.hub.sharing.kmeans import Start, cluster, nearest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

LEAST = 64
"""Weights; fewer are left as they are: the codebook would be no smaller."""
MOST_BITS = 12
"""Of a code."""
LOOK = 16
"""Elements that are looked at first, for every value there may be."""


@dataclass(frozen=True)
class Weight:
    """A weight of the graph."""

    name: str
    """Of its initializer."""
    layer: str
    """Of the first node that reads it."""
    y: str
    """That node's first output."""
    values: Floats


@dataclass(frozen=True)
class Codebook:
    """A weight as its values and a code for each."""

    book: Floats
    """``[k]``, zero first where it occurs, then ascending."""
    codes: NDArray[np.int64]
    """Of the weight's shape."""

    @property
    def bits(self) -> int:
        """Of a code that is not coded any further."""
        return max(1, int(len(self.book) - 1).bit_length())

    @property
    def weight(self) -> Floats:
        """What was shared."""
        return self.book[self.codes]


def weights(graph: FloatGraph, skip: Iterable[str] = ()) -> list[Weight]:
    """Weights of products and recurrent layers, in order; one that several read counts once.

    Args:
        graph: not changed.
        skip: layers whose weights are left out, by name or pattern.

    Raises:
        DeploykitError: a pattern that matches nothing.
    """
    found: dict[str, Weight] = {}
    for node in graph.model.graph:
        positions = weight_positions(node) if node.op_type != "Gather" else ()  # tables are read row by row
        for value in (node.inputs[i] for i in positions):
            array = constant(value)
            if value is not None and array is not None and array.dtype == np.float32 and array.size >= LEAST:
                own = Weight(value.name or "", name_of(node), node.outputs[0].name or "", array)
                found.setdefault(own.name, own)
    left_out = matching("layer", skip, {own.layer for own in found.values()})
    return [own for own in found.values() if own.layer not in left_out]


def share(weight: Floats, bits: int, start: Start = "optimal", seed: int = 0) -> Codebook:
    """The 2^bits values that come nearest to a weight's, zero among them where it occurs.

    Args:
        weight: any shape; finite.
        bits: of a code, 1 to `MOST_BITS`.
        start: see `deploykit.hub.sharing.kmeans.cluster`.
        seed: of ``random``.

    Raises:
        DeploykitError: NaN or infinity among the values.
    """
    x, kept = _kept(weight)
    if not kept.any():
        return Codebook(np.zeros(1, np.float32), np.zeros(weight.shape, np.int64))
    zeros = 0 if kept.all() else 1
    c = cluster(x[kept], 2**bits - zeros, start, seed=seed)
    c = np.unique(c.astype(np.float32)).astype(np.float64)
    if zeros:
        c = c[c != 0]  # that one is there already
    if not len(c):
        c = np.asarray([np.abs(x[kept]).mean()])
    codes = np.zeros(weight.shape, np.int64)
    codes[kept] = nearest(x[kept], c) + zeros
    return Codebook(np.concatenate([np.zeros(zeros), c]).astype(np.float32), codes)


def share_at_level(weight: Floats, bits: float) -> Codebook:
    """The values whose codes take about so many bits once they are coded (`deploykit.hub.sharing.entropy`); small ones
    may become zero where others are.

    Args:
        weight: any shape; finite.
        bits: of a code, on average.

    Raises:
        DeploykitError: NaN or infinity among the values.
    """
    x, kept = _kept(weight)
    if not kept.any():
        return Codebook(np.zeros(1, np.float32), np.zeros(weight.shape, np.int64))
    h = np.ones(np.count_nonzero(kept))
    c, price = constrained(x[kept], h, level(x[kept], h, bits), int((~kept).sum()))
    shared = np.zeros(weight.shape, np.float32)
    shared[kept] = c[cheapest(x[kept], np.ones(1), c, price)]
    found = codebook(shared, weight.size)
    assert found is not None
    return found


def _kept(weight: Floats) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The values, and which are not zero."""
    if not np.isfinite(weight).all():
        raise DeploykitError("weights with NaN or infinity cannot be shared")
    x = weight.astype(np.float64)
    return x, x != 0


def codebook(weight: Floats, most: int = 2**MOST_BITS) -> Codebook | None:
    """The codebook of a weight that shares its values; None: there are more than ``most``.

    Values are told apart by their bits, so that ``weight`` of what is found is the weight bit by bit: -0.0 is another
    one than zero.

    Args:
        weight: of any shape.
        most: values.
    """
    bits = np.ascontiguousarray(weight).view(np.uint32)
    if len(np.unique(bits.reshape(-1)[: LOOK * most])) > most:  # which spares sorting an ordinary weight
        return None
    found, codes = np.unique(bits, return_inverse=True)
    if len(found) > most:
        return None
    book = found.view(np.float32)
    order = np.lexsort((book, found != 0))
    return Codebook(book[order], np.argsort(order)[codes].reshape(weight.shape))


def with_weights(graph: FloatGraph, arrays: Mapping[str, Floats]) -> FloatGraph:
    """The graph with other values in some initializers.

    Args:
        graph: not changed.
        arrays: by initializer, of the same shape.
    """
    model = graph.copy()
    for name, array in arrays.items():
        model.graph.initializers[name].const_value = ir.Tensor(np.ascontiguousarray(array), name=name)
    return FloatGraph(model, graph.masks, graph.notes)


def coded_bits(found: Codebook) -> float:
    """What a weight takes, about: the entropy of its codes, and the codebook.

    With independent codes that is also what gaps between weights that are not zero cost together with their codes.
    """
    counts = np.bincount(found.codes.reshape(-1))
    share_ = counts[counts > 0] / found.codes.size
    return float(-(share_ * np.log2(share_)).sum()) * found.codes.size + 32.0 * len(found.book)
