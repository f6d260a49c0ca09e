"""How fine the values of every weight are: what each level loses, and what it takes.

What the answers lose when one weight alone is shared, at levels of up to 8 bits, is measured, the rest being
exact; what it then takes is the entropy of its codes, for they will be coded (`deploykit.hub.sharing.entropy`). Integer
programming picks among them (`deploykit.hub.mixed`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.core.data import DataSet
from deploykit.core.journal import NOTHING_KEPT, Journal
from deploykit.core.progress import track
from deploykit.hub.analysis.measures import squared
from deploykit.hub.analysis.tail import Tail
from deploykit.hub.graph import FloatGraph
from deploykit.hub.mixed.assignment import Table
from deploykit.hub.operators import PRODUCTS
from deploykit.hub.sharing.codebooks import Weight, codebook, coded_bits, share_at_level
from deploykit.hub.sharing.codes import at_level
from deploykit.hub.sharing.outputs import by_outputs, forms

PARTS = 4
"""Of a bit."""
LEVELS = tuple(range(2, 8 * PARTS + 1, 2))
"""Quarter bits that codes take, about: half by half, up to 8 bits .."""
FINE = (*range(1, 4 * PARTS), *range(4 * PARTS, 6 * PARTS, 2), *range(6 * PARTS, 8 * PARTS + 1, PARTS))
""".. or finer below 4 bits, where a step of one weight is a step of the whole."""
SAMPLES = 64
"""That losses are measured on."""
POSITIONS = 32
"""Fewer than weights are chosen by: these are only compared."""

Found = Mapping[str, NDArray[Any]]
"""Of one weight at every level: what the answers lose, and bits."""


def of_products(graph: FloatGraph, shared: Sequence[Weight]) -> list[Weight]:
    """The weights whose levels can be chosen: losses are measured of products alone."""
    operators = {node.name: node.op_type for node in graph.model.graph}
    return [own for own in shared if operators[own.layer] in PRODUCTS]


def levels(shared: Sequence[Weight]) -> tuple[int, ...]:
    """Levels to choose from: finer ones where one weight is most of all, which would leave much of a budget to others
    that hardly count. Where many share a budget they meet it with coarse levels, and finer ones follow noise."""
    sizes = [own.values.size for own in shared]
    return FINE if 2 * max(sizes) > sum(sizes) else LEVELS


def tables(
    graph: FloatGraph,
    shared: Sequence[Weight],
    data: DataSet,
    judged: DataSet,
    *,
    outputs: bool,
    seed: int = 0,
    journal: Journal = NOTHING_KEPT,
) -> tuple[Table, Table]:
    """Losses, and costs as shares of the bytes that these weights take in fp32, by initializer and level.

    Args:
        graph: not changed.
        shared: its weights that share values, in order, of products alone.
        data: samples that values are chosen by.
        judged: samples that losses are measured on.
        outputs: values are chosen for what layers compute, where they can be.
        seed: of the output positions that this is judged by.
        journal: what was measured, by weight.
    """
    judged, chances = judged.spread(SAMPLES), levels(shared)
    chosen = forms(graph, shared) if outputs else {}
    alone = [own for own in shared if own.name not in chosen]
    found = _alone(graph, alone, judged, chances, journal) if alone else {}
    if chosen:
        rest = [own for own in shared if own.name in chosen]
        found |= _by_outputs(graph, rest, data, judged, chances, seed, journal)
    whole = 32.0 * sum(own.values.size for own in shared)
    losses = {own.name: dict(zip(chances, found[own.name]["losses"].tolist(), strict=True)) for own in shared}
    costs = {own.name: dict(zip(chances, (found[own.name]["bits"] / whole).tolist(), strict=True)) for own in shared}
    return losses, costs


def _alone(
    graph: FloatGraph, shared: Sequence[Weight], judged: DataSet, chances: Sequence[int], journal: Journal
) -> dict[str, Found]:
    """Of values that are near to the weights."""
    with contextlib.closing(Tail(graph, judged)) as tail:

        def measured(own: Weight) -> Found:
            books = [share_at_level(own.values, level / PARTS) for level in chances]
            lost = [squared(tail.moved(own.layer, own.y, own.name, book.weight - own.values)) for book in books]
            return {"losses": np.asarray(lost), "bits": np.asarray([coded_bits(book) for book in books])}

        return {
            own.name: journal.once(f"levels of {own.name}", partial(measured, own))
            for own in track(shared, "share: sensitivities")
        }


def _by_outputs(
    graph: FloatGraph,
    shared: Sequence[Weight],
    data: DataSet,
    judged: DataSet,
    chances: Sequence[int],
    seed: int,
    journal: Journal,
) -> dict[str, Found]:
    """Of values that do what the weights do; the network goes on with the finest."""
    found: dict[str, Found] = {}
    form = forms(graph, shared)
    with contextlib.closing(Tail(graph, judged)) as tail:

        def pick(
            own: Weight, t: NDArray[np.float64], h: NDArray[np.float64], kept: NDArray[np.bool_]
        ) -> NDArray[np.float32]:
            def measured() -> Found:
                # codes as GPTQ chooses them are enough to compare levels by
                every = [at_level(t, h, kept, level / PARTS, turns=0).astype(np.float32) for level in chances]
                moved = [form[own.name].weight((x - t).astype(np.float32)) for x in every]
                lost = [squared(tail.moved(own.layer, own.y, own.name, error)) for error in moved]
                bits = [coded_bits(book) for x in every if (book := codebook(x, x.size)) is not None]
                return {"losses": np.asarray(lost), "bits": np.asarray(bits), "finest": every[-1]}

            found[own.name] = journal.once(f"levels of {own.name}", measured)
            return np.asarray(found[own.name]["finest"], np.float32)

        by_outputs(graph, graph, shared, data, pick, who="share: sensitivities", positions=POSITIONS, seed=seed)
    return found
