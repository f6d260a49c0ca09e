"""Operator by operator, in the network's order: what is quantized, what is in float and why, what quantizing costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from deploykit.core.artifact import File, Island
from deploykit.core.figures import number
from deploykit.core.golden import hub_of
from deploykit.core.manifest import Layer, Manifest
from deploykit.core.precision import FORMATS
from deploykit.hub.operators import ROLES
from deploykit.report.axes import Axis, from_zero

NAMED = 8
"""Layers named per reason."""
WIDTH, STEPS = 860.0, (5.0, 30.0)
"""Pixels for all columns, and of one column at least and at most."""
CHARACTER = 6.6
"""Pixels a character needs."""


@dataclass(frozen=True)
class Cell:
    """One operator of one file."""

    layer: str
    operator: str
    integer: bool
    moves: bool
    """Whether it only selects or rearranges values."""
    why: str
    """Why it stayed in float."""
    error: float | None
    """Percent of the signal (root mean square) that quantizing this operator alone adds as noise; None: not measured,
    or it only moves values."""
    sqnr_db: float | None
    rank: int | None
    """1 is the worst."""


@dataclass(frozen=True)
class Block:
    """Neighbouring operators whose names begin alike."""

    name: str
    """Empty where there is no room for it."""
    first: int
    count: int


@dataclass(frozen=True)
class Map:
    """One file's operators."""

    path: str
    integer: str
    """What is not float is called: the precision."""
    half: bool
    """Whether what is float is computed in 16 bits."""
    cells: tuple[Cell, ...]
    blocks: tuple[Block, ...]
    errors: Axis | None
    """None: nothing was measured operator by operator."""
    step: float
    """Pixels per operator."""

    @property
    def integers(self) -> int:
        """How many operators compute in integers."""
        return sum(c.integer and not c.moves for c in self.cells)

    @property
    def moved(self) -> int:
        """How many only move integers."""
        return sum(c.integer and c.moves for c in self.cells)

    @property
    def floats(self) -> int:
        """How many stayed in float."""
        return len(self.cells) - self.integers - self.moved

    @property
    def worst(self) -> tuple[Cell, ...]:
        """The measured operators, the worst first."""
        return tuple(sorted((c for c in self.cells if c.rank is not None), key=lambda c: c.rank or 0))


def noise(sqnr_db: float) -> float:
    """Noise in percent of the signal, root mean square: 20 dB are 10 %, 40 dB are 1 %."""
    return float(100.0 * 10.0 ** (-sqnr_db / 20.0))


def maps(manifest: Manifest) -> tuple[Map, ...]:
    """One map per integer file; files with the same integers and the same operators in float share one. Empty: nothing
    is integer."""
    found: dict[tuple[str, tuple[Island, ...]], Map] = {}
    for file in manifest.files:
        key = hub_of(file.precision), file.islands
        if file.quantized and key not in found:
            made = _map(manifest, file)
            if made is not None:
                found[key] = made
    return tuple(found.values())


def _map(manifest: Manifest, file: File) -> Map | None:
    measured = manifest.operators_of(file.precision)
    layers = manifest.layers or tuple(Layer(o.layer, o.operator) for o in measured)
    if not layers:
        return None
    # errors may be of a file of the same hub; what this one keeps in float, and what only moves values, has none
    computing = (o for o in measured if ROLES.get(o.operator) != "moves")
    errors = {o.layer: (i, o.sqnr_db) for i, o in enumerate(computing, 1)}
    floats = {island.layer: island.why for island in file.islands}
    cells = []
    for layer in layers:
        rank, sqnr = errors.get(layer.name, (None, None)) if layer.name not in floats else (None, None)
        error = None if sqnr is None else noise(sqnr)
        why = floats.get(layer.name, "")
        moves = ROLES.get(layer.operator) == "moves"
        cells.append(Cell(layer.name, layer.operator, layer.name not in floats, moves, why, error, sqnr, rank))
    step = min(max(WIDTH / len(cells), STEPS[0]), STEPS[1])
    top = max((c.error for c in cells if c.error is not None), default=None)
    blocks = _blocks([layer.name for layer in layers], step) if manifest.layers else ()
    axis = None if top is None else from_zero(top, 3)
    kind = FORMATS[file.precision]
    return Map(
        file.path, file.precision if kind.numbers else "int8", kind.half, tuple(cells), blocks, axis, step
    )  # fmt: skip


def _blocks(names: Sequence[str], step: float) -> tuple[Block, ...]:
    """By the first part of the names (``body`` of ``body.3.conv``), or by two or three where most begin alike.

    Where there is no room for ``blocks.10`` behind ``blocks.9``, it is called ``10``.
    """
    for depth in (1, 2, 3):
        runs = [(name, len(list(run))) for name, run in groupby(".".join(n.split(".")[:depth]) for n in names)]
        if 2 * max(count for _, count in runs) <= len(names):
            break
    blocks: list[Block] = []
    first, parent = 0, ""
    for name, count in runs:
        above, _, last = name.rpartition(".")
        texts = [name, last] if above and above == parent else [name]
        blocks.append(Block(next((t for t in texts if CHARACTER * len(t) <= count * step - 6), ""), first, count))
        first, parent = first + count, above
    return tuple(blocks)


@dataclass(frozen=True)
class Group:
    """Float operators with one reason."""

    operator: str
    why: str
    count: int
    layers: str


def grouped(islands: Sequence[Island]) -> tuple[Group, ...]:
    """Float operators by kind and reason, the most frequent first."""
    layers: dict[tuple[str, str], list[str]] = {}
    for island in islands:
        layers.setdefault((island.operator, island.why), []).append(island.layer)
    found = []
    for (operator, why), names in sorted(layers.items(), key=lambda item: -len(item[1])):
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        found.append(Group(operator, why, len(names), ", ".join(names[:NAMED]) + more))
    return tuple(found)


def percent(value: float) -> str:
    """Two significant digits."""
    return number(value, 0 if value >= 10 else 1 if value >= 1 else 2 if value >= 0.1 else 3)
