"""Writes a program's folder: the C of the network, the kernels, golden vectors, self-test, build files."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from deploykit.core import artifact
from deploykit.core.figures import file_size
from deploykit.exporters.c99.budget import Footprint
from deploykit.exporters.c99.golden import Golden, spell_golden
from deploykit.exporters.c99.memory import Plan
from deploykit.exporters.c99.program import Port, Program
from deploykit.exporters.c99.spell import port_names, spell_header, spell_source

SOURCE = "model.c"
ABOUT = "model.json"
FORMAT = "deploykit-c99-1"
COPIED = ("dk_kernels.c", "dk_kernels.h", "selftest.c", "Makefile", "CMakeLists.txt")
"""Files of ``device/`` that go into every folder as they are."""


def emit(program: Program, plan: Plan, vectors: Golden, size: Footprint, folder: Path) -> None:
    """Writes everything into an existing folder; equal programs give equal bytes."""
    device = resources.files("deploykit.exporters.c99") / "device"
    written = {name: (device / name).read_text(encoding="utf-8") for name in COPIED}
    written["dk_rescale.h"] = (device / f"dk_rescale_{program.rounding}.h").read_text(encoding="utf-8")
    written["FIRMWARE.md"] = _firmware((device / "FIRMWARE.md").read_text(encoding="utf-8"), program, size)
    written[SOURCE] = spell_source(program, plan)
    written["model.h"] = spell_header(program, plan)
    written["golden.h"] = spell_golden(program, plan, vectors)
    written[ABOUT] = json.dumps(_about(program, plan, size), indent=1) + "\n"
    for name, text in written.items():
        (folder / name).write_bytes(text.encode())


def flash_note(size: Footprint) -> str:
    """What it takes of flash, in a sentence."""
    return (
        f"Flash: {file_size(size.flash)} ({file_size(size.constants)} of constants, about {file_size(size.code)} of "
        "code for a Cortex-M4)."
    )


def ram_note(size: Footprint, plan: Plan) -> str:
    """What it takes of RAM, in a sentence."""
    return (
        f"RAM: {file_size(size.arena)} of arena, inputs and outputs included ({file_size(plan.lower_bound)} is the "
        f"least any plan could take), and about {size.stack} bytes of stack."
    )


def _firmware(text: str, program: Program, size: Footprint) -> str:
    first = port_names(program.inputs)[0], port_names(program.outputs)[0]
    ram = f"RAM: {file_size(size.arena)} of arena, inputs and outputs included, and about {size.stack} bytes of stack."
    fill = "integer = round(real / @INPUT@_SCALE) + @INPUT@_ZERO, within -128 .. 127"
    if program.inputs[0].unsigned:
        fill = "the camera's bytes as they are, (int8_t)byte"
    return (
        text.replace("@FILL@", fill)
        .replace("@INPUT@", f"MODEL_INPUT_{first[0]}")
        .replace("@OUTPUT@", f"MODEL_OUTPUT_{first[1]}")
        .replace("@FLASH@", flash_note(size))
        .replace("@RAM@", ram)
    )


def stored(port: Port) -> artifact.Port:
    """How the caller's buffer holds an input or output."""
    quant, dtype = port.tensor.quant, "uint8" if port.unsigned else "int8"
    shape = tuple(port.shape[axis] for axis in port.order)
    return artifact.Port(port.name, shape, dtype, quant.scale, quant.zero_point + 128 * port.unsigned)


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
        "code_bytes": size.code,
        "stack_bytes": size.stack,
        "inputs": [port(p) for p in program.inputs],
        "outputs": [port(p) for p in program.outputs],
    }
