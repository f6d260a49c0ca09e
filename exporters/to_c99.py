"""The c99 exporter: an integer-only network as C for microcontrollers and high-level synthesis.

The hub is lowered to an integer program (`c99.lower`), the program is run by numpy (`c99.execute`, the oracle) and
spelled in C (`c99.spell`) beside kernels without heap, floating point or library calls. There is no float file: what
has no integer form is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from deploykit.core.artifact import Check, File, Runner, Runtime
from deploykit.core.errors import DeploykitError
from deploykit.core.precision import Precision
from deploykit.core.target import Target
from deploykit.exporters import refuse_uncarried
from deploykit.exporters.c99.budget import Footprint, require_fit
from deploykit.exporters.c99.coded import with_coded_weights
from deploykit.exporters.c99.compiled import PARTS, Compiled, compiler, compiler_version, open_runner
from deploykit.exporters.c99.emit import DECODER, SOURCE, emit, notes, stored
from deploykit.exporters.c99.golden import golden
from deploykit.exporters.c99.lower import Lowered, lower
from deploykit.exporters.c99.memory import Plan, plan
from deploykit.exporters.c99.options import options
from deploykit.exporters.c99.program import Program
from deploykit.exporters.c99.rounding import MAX_MISMATCH
from deploykit.hub.graph import Hub

CARRIES: tuple[Precision, ...] = ("int8",)
FLOATS = "integer C has no floating point"
WIDTH = "its kernels read weights and activations of 8 bits"
WHY_NOT: Mapping[Precision, str] = {
    "fp32": FLOATS,
    "fp16": FLOATS,
    "bf16": FLOATS,
    "int8-fp16": FLOATS,
    "fp8": FLOATS,
    "int16x8": WIDTH,
    "w4a8": WIDTH,
    "w3a8": WIDTH,
    "w2a8": WIDTH,
    "w4a4": WIDTH,
    "w8": FLOATS,
    "dynamic": FLOATS,
    "w4": FLOATS,
}


def export(hubs: Mapping[Precision, Hub], target: Target, out_dir: Path) -> tuple[File, ...]:
    """Writes ``model.c`` and everything around it; see `c99.emit`.

    Raises:
        DeploykitError: a precision other than int8, no calibration, wrong options, operators without an integer form
            (all are named), or a budget of the target that is exceeded (the layer that needs most is named).
    """
    refuse_uncarried(target, hubs, CARRIES, WHY_NOT)
    (hub,) = hubs.values()
    lowered = _lowered(hub, target)
    arena, size = _fitted(lowered.program, target)
    emit(lowered.program, arena, golden(lowered.program, hub.samples), size, options(target), out_dir)
    takes, gives = (tuple(map(stored, side)) for side in (lowered.program.inputs, lowered.program.outputs))
    said, parts = notes(size, arena, options(target)), (*PARTS, *([DECODER] if lowered.program.coded else []))
    file = File(SOURCE, "int8", lowered.operators, (), said, parts, bytes=size.flash, inputs=takes, outputs=gives)
    return (file,)


def rehearse(hubs: Mapping[Precision, Hub], target: Target, final: bool) -> None:
    """What `export` refuses, without computing golden outputs and spelling C; budgets only if the size is ``final``."""
    refuse_uncarried(target, hubs, CARRIES, WHY_NOT)
    (hub,) = hubs.values()
    lowered = _lowered(hub, target)
    if final:
        _fitted(lowered.program, target)


def unlimited(target: Target) -> Target:
    """The target with as much flash and RAM as it takes."""
    budgets = ("flash_bytes", "ram_bytes")
    return replace(target, options={name: v for name, v in target.options.items() if name not in budgets})


def load(path: Path, threads: int = 1) -> Runner:
    """Compiles the folder of a ``model.c`` for this machine and runs it, sample by sample, on one thread.

    Raises:
        DeploykitError: the folder is not complete, there is no C compiler, or it refuses the code.
    """
    return open_runner(path)


def runtime() -> Runtime:
    """The C compiler of this machine.

    Raises:
        DeploykitError: there is none.
    """
    return Runtime(compiler_version(compiler()), "needs the board; the C was checked on this machine")


def max_mismatch(target: Target, hub: Hub) -> float:
    """What the target's rounding costs; see `MAX_MISMATCH`."""
    return MAX_MISMATCH[options(target).rounding]


def checks(hub: Hub, target: Target, folder: Path, file: File) -> tuple[Check, ...]:
    """What only this exporter can compare: the compiled C against the numpy oracle, bit for bit."""
    program = _lowered(hub, target).program
    vectors = golden(program, hub.samples)
    found = Compiled(folder / file.path).run(vectors.inputs)
    wrong = sum(int(np.count_nonzero(found[name] != array)) for name, array in vectors.outputs.items())
    count = sum(array.size for array in vectors.outputs.values())
    samples = len(next(iter(vectors.inputs.values())))
    detail = f"{count} values of {samples} golden samples"
    return (Check("C equals the integer oracle (differing values)", "int8", float(wrong), 0.0, wrong == 0, detail),)


def _fitted(program: Program, target: Target) -> tuple[Plan, Footprint]:
    """Where everything lies and what it takes, if the target has that much."""
    settings, arena = options(target), plan(program)
    return arena, require_fit(program, arena, settings, target.name)


def _lowered(hub: Hub, target: Target) -> Lowered:
    if hub.quantized is None:
        raise DeploykitError(f"target {target.name}: int8 needs calibration data; give --calib")
    reasons: Mapping[str, str] = {d.layer: d.why for d in hub.decisions if d.why}
    settings = options(target)
    found = lower(hub.quantized, settings.rounding, reasons)
    return replace(found, program=with_coded_weights(found.program)) if settings.weights == "coded" else found
