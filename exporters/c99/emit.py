"""Writes a program's folder: the C of the network, the kernels, golden vectors, self-test, build files."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from deploykit.core import artifact
from deploykit.core.figures import file_size
from deploykit.exporters.c99.budget import Footprint
from deploykit.exporters.c99.coded import DECODER_STACK_BYTES
from deploykit.exporters.c99.golden import Golden, spell_golden
from deploykit.exporters.c99.memory import Plan
from deploykit.exporters.c99.options import Options
from deploykit.exporters.c99.program import Port, Program
from deploykit.exporters.c99.spell import port_names, spell_header, spell_source

SOURCE = "model.c"
DECODER = "dk_decode.h"
ABOUT = "model.json"
GUIDE = "FIRMWARE.md"
FORMAT = "deploykit-c99-1"
COPIED = ("dk_kernels.c", "dk_kernels.h", "selftest.c", "CMakeLists.txt")
"""Files of ``device/`` that go into every folder as they are."""


def emit(program: Program, plan: Plan, vectors: Golden, size: Footprint, settings: Options, folder: Path) -> None:
    """Writes everything into an existing folder; equal programs give equal bytes."""
    device = resources.files("deploykit.exporters.c99") / "device"

    def read(name: str) -> str:
        return (device / name).read_text(encoding="utf-8")

    guide = "SYNTHESIS.md" if settings.synthesis else "FIRMWARE.md"
    written = {name: read(name) for name in (*COPIED, *([DECODER] if program.coded else []))}
    written["Makefile"] = read("Makefile").replace("@CROSS@", settings.cross)
    written["dk_rescale.h"] = read(f"dk_rescale_{program.rounding}.h")
    written[GUIDE] = _guide(read(guide), program, plan, size, settings)
    written[SOURCE] = spell_source(program, plan)
    written["model.h"] = spell_header(program, plan)
    written["golden.h"] = spell_golden(program, plan, vectors)
    written[ABOUT] = json.dumps(_about(program, plan, size), indent=1) + "\n"
    for name, text in written.items():
        (folder / name).write_bytes(text.encode())


def flash_note(size: Footprint) -> str:
    """What it takes of flash, in a sentence; logic has constants alone."""
    if not size.code:
        return f"Constants: {file_size(size.constants)}."
    return (
        f"Flash: {file_size(size.flash)} ({file_size(size.constants)} of constants, about {file_size(size.code)} of "
        "code as compiled for a Cortex-M4)."
    )


def ram_note(size: Footprint, plan: Plan) -> str:
    """What it takes of RAM, in a sentence."""
    stack = f", and about {size.stack} bytes of stack" if size.stack else ""
    return (
        f"RAM: {file_size(size.arena)} of arena, inputs and outputs included ({file_size(plan.lower_bound)} is the "
        f"least any plan could take){stack}."
    )


def notes(size: Footprint, plan: Plan, settings: Options) -> tuple[str, ...]:
    """What it takes, in sentences; the last is about RAM."""
    return flash_note(size), *([coded_note(size)] if settings.weights == "coded" else []), ram_note(size, plan)


def coded_note(size: Footprint) -> str:
    """What coded weights take, stored and decoded, in a sentence."""
    if not size.largest:
        return "No weights are coded: with the decoder they would not be smaller."
    stack = f", beside {DECODER_STACK_BYTES} bytes of stack" if size.stack else ""
    return (
        f"Coded weights: {file_size(size.coded)} stored, {file_size(size.decoded)} decoded. Each layer decodes its own "
        f"into the arena, {file_size(size.largest)} at most{stack}."
    )


def _guide(text: str, program: Program, plan: Plan, size: Footprint, settings: Options) -> str:
    first = port_names(program.inputs)[0], port_names(program.outputs)[0]
    fill = "integer = round(real / @INPUT@_SCALE) + @INPUT@_ZERO, within -128 .. 127"
    if program.inputs[0].unsigned:
        fill = "the camera's bytes as they are, (int8_t)byte"
    return (
        text.replace("@CROSS@", settings.cross)
        .replace("@FILL@", fill)
        .replace("@INPUT@", f"MODEL_INPUT_{first[0]}")
        .replace("@OUTPUT@", f"MODEL_OUTPUT_{first[1]}")
        .replace("@FLASH@", " ".join(notes(size, plan, settings)[:-1]))
        .replace("@RAM@", ram_note(size, plan))
        .replace("@ARENA@", f"{plan.bytes:,}")
    )


def stored(port: Port) -> artifact.Port:
    """How the caller's buffer holds an input or output. Pixels are bytes as they are: no rule says what they mean."""
    shape = tuple(port.shape[axis] for axis in port.order)
    if port.unsigned:
        return artifact.Port(port.name, shape, "uint8")
    return artifact.Port(port.name, shape, "int8", port.tensor.quant.scale, port.tensor.quant.zero_point)


def _about(program: Program, plan: Plan, size: Footprint) -> dict[str, Any]:
    def port(p: Port) -> dict[str, Any]:
        held = stored(p)
        return {
            "name": p.name, "offset": plan.offsets[p.tensor], "shape": list(p.shape), "order": list(p.order),
            "batched": p.batched, "dtype": held.dtype, "scale": held.scale, "zero_point": held.zero_point,
        }  # fmt: skip

    return {
        "format": FORMAT,
        "rounding": program.rounding,
        "arena_bytes": plan.bytes,
        "arena_lower_bound": plan.lower_bound,
        "constant_bytes": size.constants,
        "coded_bytes": size.coded,
        "decoded_bytes": size.decoded,
        "largest_decoded_bytes": size.largest,
        "code_bytes": size.code,
        "stack_bytes": size.stack,
        "inputs": [port(p) for p in program.inputs],
        "outputs": [port(p) for p in program.outputs],
    }
