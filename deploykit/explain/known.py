"""What an artifact itself knows about the operators of one of its files."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from deploykit import targets
from deploykit.core.artifact import File
from deploykit.core.errors import DeploykitError, unknown
from deploykit.core.manifest import Layer, Manifest
from deploykit.core.precision import is_integer, is_quantized, needs_calibration
from deploykit.core.target import Target
from deploykit.explain.explanation import Operator, State
from deploykit.explain.timing import Times
from deploykit.hub.operators import PRODUCTS, ROLES
from deploykit.passes.mixed import BITS

LANES = 0.9
"""Of a vector unit: a product that fills less than this share of them is worth a word."""

COLOURS = 4
"""Input channels that a depthwise layer or a first one has in any case."""


def chosen_file(manifest: Manifest, precision: str | None, folder: str) -> File:
    """The integer file to explain: that of a precision, or the last.

    Raises:
        DeploykitError: there is none.
    """
    files = {f.precision: f for f in manifest.files if is_integer(f.precision)}
    if not files:
        small = next((f.precision for f in manifest.files if is_quantized(f.precision)), "")
        raise DeploykitError(
            f"{folder}: explain measures what integers cost, and no file holds any. "
            + (f"What stays in float in {small}, and why, is in report.html." if small else "--calib DATA adds one.")
        )
    if precision is not None and precision not in files:
        raise unknown("integer file of precision", precision, files)
    return files[precision] if precision is not None else list(files.values())[-1]


def operators(manifest: Manifest, file: File, times: Times | None) -> tuple[Operator, ...]:
    """Every operator that quantizing decided about, in the network's order."""
    measured = {o.layer: o for o in manifest.operators_of(file.precision)}
    layers = manifest.layers or tuple(Layer(o.layer, o.operator) for o in measured.values())
    floats = {island.layer: island.why for island in file.islands}
    weights_alone, bits = not needs_calibration(file.precision), _bits(manifest, file)
    target = targets.load(manifest.target) if manifest.target in targets.names() else None
    found = []
    for layer in layers:
        own = None if times is None else times.of(layer.name)
        state = _state(layer, floats, weights_alone)
        error = measured[layer.name].sqnr_db if state == "integer" and layer.name in measured else None
        slow = [*_lanes(layer, target), *([] if own is None else own.slow(state in ("float", "weights")))]
        if state == "float" and own is None and not weights_alone and _between_integers(layer, layers, floats):
            slow.append("computes in float between integers: what it reads and writes is converted")
        found.append(
            Operator(
                layer.name, layer.operator, state, floats.get(layer.name, ""), bits.get(layer.name), error,
                ms=None if own is None else own.ms, converting_ms=None if own is None else own.converting_ms,
                runs_in="" if own is None else own.runs_in, slow=tuple(slow),
            )
        )  # fmt: skip
    return tuple(found)


def _state(layer: Layer, floats: Mapping[str, str], weights_alone: bool) -> State:
    """Of one operator; the layers of a manifest are those that any of its files decided about."""
    if layer.name in floats:
        return "float"
    if weights_alone:
        return "weights" if ROLES.get(layer.operator) in ("linear", "lookup", "recurrent") else "float"
    return "moves" if ROLES.get(layer.operator) == "moves" else "integer"


def _bits(manifest: Manifest, file: File) -> dict[str, int]:
    """Bits of the weights layer by layer, where the step `mixed` chose them."""
    tables = [f for f in manifest.findings if f.title == BITS and f.step in file.steps]
    alike = [f.path for f in manifest.files if set(f.steps) & {table.step for table in tables}]
    if not tables:
        return {}
    table = tables[alike.index(file.path)] if len(tables) == len(alike) else tables[0]  # files of one hub share one
    return {str(row[0]): int(row[1]) for row in table.rows if row[1] is not None}


def _lanes(layer: Layer, target: Target | None) -> list[str]:
    """Whether a product leaves lanes of the vector unit empty."""
    multiple = 1 if target is None else target.channel_multiple
    if layer.operator not in PRODUCTS or layer.outputs is None or multiple <= 1:
        return []
    inputs = layer.inputs if layer.inputs is not None and layer.inputs > COLOURS else None
    channels = [count for count in (inputs, layer.outputs) if count is not None]
    used = prod(count / (-(-count // multiple) * multiple) for count in channels)
    if used >= LANES:
        return []
    counts = " × ".join(str(count) for count in channels)
    return [f"{counts} channels fill {100 * used:.0f} % of a unit that works on multiples of {multiple}"]


def _between_integers(layer: Layer, layers: tuple[Layer, ...], floats: Mapping[str, str]) -> bool:
    """Whether integers stand on both sides, in the network's order."""
    at = next(i for i, each in enumerate(layers) if each.name == layer.name)
    before, after = layers[at - 1] if at else None, layers[at + 1] if at + 1 < len(layers) else None
    return any(side is not None and side.name not in floats for side in (before, after))
