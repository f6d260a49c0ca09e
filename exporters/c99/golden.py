"""Golden vectors: inputs as integers with the oracle's outputs, for ``selftest.c`` and for the check at export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.exporters.c99.execute import execute
from deploykit.exporters.c99.memory import Plan
from deploykit.exporters.c99.names import comment
from deploykit.exporters.c99.program import Port, Program, Quant, Tensor
from deploykit.exporters.c99.spell import declaration

if TYPE_CHECKING:
    from numpy.typing import NDArray

SAMPLES = 8
BYTES = 2**16
"""Inputs take no more together; one sample is always kept."""


@dataclass(frozen=True)
class Golden:
    """Integers by port name, ``[n, elements]`` as stored."""

    inputs: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[np.int8]]


def golden(program: Program, samples: Mapping[str, NDArray[Any]]) -> Golden:
    """The first real samples through the oracle; seeded random integers where there are none."""
    size = sum(port.tensor.size for port in program.inputs)
    count = max(1, min(SAMPLES, BYTES // size))
    known = all(port.name in samples for port in program.inputs)
    batched = [port for port in program.inputs if port.batched]
    if known and batched:
        count = min(count, *(len(samples[port.name]) for port in batched))
    random = np.random.default_rng(0)
    inputs = {}
    for port in program.inputs:
        if known:
            given = np.asarray(samples[port.name])
            given = given[:count] if port.batched else np.repeat(given[None], count, axis=0)[:, 0]
            inputs[port.name] = to_integers(port, given)
        else:
            inputs[port.name] = random.integers(-128, 128, (count, port.tensor.size)).astype(np.int8)
    return Golden(inputs, execute(program, inputs))


def described(port: Mapping[str, Any]) -> Port:
    """A port as ``model.json`` describes it."""
    shape, order, unsigned = tuple(port["shape"]), tuple(port["order"]), port["dtype"] == "uint8"
    quant = Quant(1.0, 0) if unsigned else Quant(port["scale"], port["zero_point"])
    tensor = Tensor(port["name"], tuple(shape[a] for a in order), quant)
    return Port(port["name"], tensor, shape, order, port["batched"], unsigned)


def to_integers(port: Port, samples: NDArray[Any]) -> NDArray[Any]:
    """Real samples (or pixels) ``[n, ...]`` in ONNX's layout as the program takes them: ``[n, elements]``."""
    sample_shape = tuple(port.shape[1:]) if port.batched else port.shape
    batch = samples.reshape(len(samples), *(port.shape if not port.batched else (1, *sample_shape)))
    stored = batch.transpose(0, *(a + 1 for a in port.order)).reshape(len(samples), -1)
    if stored.dtype.kind in "ui":
        return stored.astype(np.int8)  # bytes as they are
    integers: NDArray[Any] = np.clip(port.tensor.quant.integer(stored), -128, 127).astype(np.int8)
    return integers


def to_reals(port: Port, stored: NDArray[np.int8]) -> NDArray[np.float32]:
    """Stored integers ``[n, elements]`` as real numbers in ONNX's layout ``[n, ...]``."""
    quant = port.tensor.quant
    real = (stored.astype(np.int32) - quant.zero_point).astype(np.float32) * np.float32(quant.scale)
    arranged = real.reshape(len(real), *(port.shape[a] for a in port.order))
    restored = arranged.transpose(0, *(int(a) + 1 for a in np.argsort(port.order)))
    return restored.reshape(len(real), *(port.shape[1:] if port.batched else port.shape))


def spell_golden(program: Program, plan: Plan, vectors: Golden) -> str:
    """``golden.h``."""
    count = len(next(iter(vectors.inputs.values())))
    lines = [
        "/* Written by deploykit: inputs, and what model_run has to make of them, bit for bit. */",
        "#ifndef GOLDEN_H",
        "#define GOLDEN_H",
        "",
        "#include <stdint.h>",
        "",
        f"#define GOLDEN_COUNT {count}",
        "",
        "typedef struct {",
        "    const char *name;",
        "    int32_t offset, count;",
        "    const int8_t *data; /* [GOLDEN_COUNT][count] */",
        "} golden_t;",
        "",
    ]
    for side, ports, arrays in (
        ("input", program.inputs, vectors.inputs),
        ("output", program.outputs, vectors.outputs),
    ):
        entries = []
        for i, port in enumerate(ports):
            name = f"golden_{side}_{i}"
            lines.append(declaration(name, arrays[port.name].view(np.int8)))
            entries.append(f'    {{"{comment(port.name)}", {plan.offsets[port.tensor]}, {port.tensor.size}, {name}}},')
        lines += [
            f"#define GOLDEN_{side.upper()}S {len(ports)}",
            f"static const golden_t golden_{side}s[GOLDEN_{side.upper()}S] = {{",
            *entries,
            "};",
            "",
        ]
    return "\n".join([*lines, "#endif", ""])
