"""What products cost: multiply-accumulates, from the graph, and milliseconds, from a file."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

from deploykit.core.errors import DeploykitError, unknown
from deploykit.core.tables import read_toml
from deploykit.hub.analysis.sizes import positions
from deploykit.hub.bits import Held
from deploykit.hub.graph import Hub
from deploykit.hub.mixed.assignment import Table
from deploykit.hub.plan import name_of


def macs(hub: Hub, held: Sequence[Held]) -> dict[str, int]:
    """Multiply-accumulates of one sample with each weight, by the first product that reads it.

    Raises:
        DeploykitError: shapes that are free do not tell how often a weight is multiplied.
    """
    nodes = {name_of(node): node for node in hub.graph.model.graph}
    found: dict[str, int] = {}
    for each in held:
        found[each.name] = 0
        for node in (nodes[layer.name] for layer in each.layers):
            counts = positions(node)
            known = [count for count in counts if count is not None]
            if len(known) < len(counts):
                raise DeploykitError(
                    f"multiply-accumulates of '{node.name}' depend on the shape of what it is given; use bytes"
                )
            found[each.name] += each.size * prod(known)
    return found


def read_times(path: Path, layers: Sequence[str], bits: Sequence[int]) -> Table:
    """Milliseconds by layer and bits, as somebody measured them on a device.

    .. code-block:: toml

        ["layer1.0.conv1"]
        4 = 0.21
        8 = 0.30

    Raises:
        DeploykitError: no such file; a layer that there is not; a layer or a number of bits without a time.
    """
    table = read_toml(path)
    for name in table:
        if name not in layers:
            raise DeploykitError(f"{path}: {unknown('layer', name, layers)}")
    found: dict[str, dict[int, float]] = {}
    for name in layers:
        row = table.get(name)
        times = {b: row.get(str(b)) if isinstance(row, dict) else None for b in bits}
        for b, ms in times.items():
            if not isinstance(ms, (int, float)) or not ms >= 0:
                raise DeploykitError(f"{path}: layer '{name}' has no milliseconds at {b} bits")
        found[name] = {b: float(ms) for b, ms in times.items() if ms is not None}
    return found
