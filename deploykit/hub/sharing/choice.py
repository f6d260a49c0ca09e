"""How many bits the codes of every weight get, under a budget of bytes.

What the answers lose when one weight alone shares 2^b values is measured, the rest being exact; what it then takes is
the entropy of its codes, for they will be coded. Integer programming picks the bits
(`deploykit.hub.mixed.assignment`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.progress import track
from deploykit.hub.analysis.measures import squared
from deploykit.hub.analysis.tail import Tail
from deploykit.hub.graph import FloatGraph
from deploykit.hub.mixed.assignment import OverBudget, assign
from deploykit.hub.operators import PRODUCTS
from deploykit.hub.sharing.codebooks import Codebook, Weight, coded_bits

BITS = tuple(range(1, 9))
"""That codes may have."""
SAMPLES = 64
"""That losses are measured on."""


def choose(
    graph: FloatGraph,
    shared: Sequence[Weight],
    books: Callable[[Weight, int], Codebook],
    data: DataSet,
    budget: float,
) -> dict[str, int]:
    """Bits by initializer, for the least sum of losses.

    Args:
        graph: not changed.
        shared: its weights that share values, in order.
        books: the codebook of a weight with so many bits.
        data: samples.
        budget: share of the bytes that these weights take in fp32.

    Raises:
        DeploykitError: the budget cannot be met (says what can), or a weight is not that of a product.
        MissingExtra: there is no solver.
    """
    operators = {node.name: node.op_type for node in graph.model.graph}
    for own in shared:
        if operators[own.layer] not in PRODUCTS:
            raise DeploykitError(
                f"share: bits cannot be chosen for '{own.layer}' ({operators[own.layer]}): losses are measured of "
                "products alone. Leave it out with skip, or give bits."
            )
    whole = 32.0 * sum(own.values.size for own in shared)
    losses: dict[str, Mapping[int, float]] = {}
    costs: dict[str, Mapping[int, float]] = {}
    with contextlib.closing(Tail(graph, data.spread(SAMPLES))) as tail:
        for own in track(shared, "share: sensitivities"):
            found = {b: books(own, b) for b in BITS}
            costs[own.name] = {b: coded_bits(book) / whole for b, book in found.items()}
            losses[own.name] = {
                b: squared(tail.moved(own.layer, own.y, own.name, book.weight - own.values))
                for b, book in found.items()
            }
    try:
        return assign(losses, costs, budget)
    except OverBudget as error:
        raise DeploykitError(
            f"share: {budget:g} of the fp32 bytes cannot be met: the least possible is {error.least:.4g}, with "
            f"{BITS[0]} bit everywhere. Sparser weights take fewer bytes."
        ) from None
