"""Precisions: what the files of each are, and how they change the way a target stores numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from deploykit.core.target import QuantSpec

Precision = Literal[
    "fp32", "fp16", "bf16", "int16x8", "int8", "int8-fp16", "fp8", "w8", "dynamic", "w4", "w4a8", "w3a8", "w2a8",
    "w4a4",
]  # fmt: skip
Kind = Literal["float", "float8", "static", "weights", "dynamic"]
"""float    computed in floating point; nothing is calibrated
float8   floating point of 8 bits, whose scales are chosen once, from sample data
static   integers, whose scales are chosen once, from sample data
weights  weights are integers, what is computed with them is not; nothing is calibrated
dynamic  weights are integers, and what they are multiplied with becomes integer by the range of each call; nothing is
         calibrated
"""


@dataclass(frozen=True)
class Format:
    """One precision. A new one is a line in `FORMATS` and its name in `Precision`; which exporter carries it says the
    exporter."""

    title: str
    kind: Kind
    nearest: tuple[Precision, ...]
    """What comes nearest to it where it cannot be had, the nearest first."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """The fields of a target's `QuantSpec` that it changes; empty: the target's own numbers."""
    half: bool = False
    """What is not quantized is float16."""


STORED: Mapping[str, Any] = {"placement": "weights", "weight_granularity": "channel", "scale": "float"}
"""What holds where weights alone are integers: they become floats again before anything is computed with them."""
FLOAT8: Mapping[str, Any] = {
    "grid": "float8", "activation_bits": 8, "port_bits": None, "activation_signed": True, "activation_symmetric": True,
    "weight_bits": 8, "weight_granularity": "tensor", "scale": "float", "bias": "float", "placement": "linear_inputs",
}  # fmt: skip
"""What holds for floating point of 8 bits. A float is as fine for small numbers as for large ones, so channels of
different size may share a scale, which kernels of every release take."""

FORMATS: Mapping[Precision, Format] = {
    "fp32": Format("float32", "float", ()),
    "fp16": Format("float16", "float", ("fp32",)),
    "bf16": Format("bfloat16", "float", ("fp16", "fp32")),
    "int16x8": Format(
        "16-bit activations, 8-bit weights", "static", ("int8", "fp16", "fp32"),
        {"activation_bits": 16, "activation_signed": True, "activation_symmetric": True, "weight_bits": 8},
    ),
    "int8": Format("8-bit activations and weights", "static", ("fp16", "fp32")),
    "int8-fp16": Format(
        "8-bit activations and weights, the rest in float16", "static", ("int8", "fp16", "fp32"), half=True
    ),
    "fp8": Format(
        "8-bit floating point (E4M3) in convolutions and matrix products, the rest in float16", "float8",
        ("int8-fp16", "int8", "fp16", "fp32"), FLOAT8, half=True,
    ),
    "w8": Format(
        "8-bit weights, activations in float", "weights", ("dynamic", "fp16", "fp32", "int8"),
        {**STORED, "weight_bits": 8},
    ),
    "dynamic": Format(
        "8-bit weights, activations of products in 8 bits by the range of each call", "dynamic",
        ("w8", "int8", "fp16", "fp32"), {**STORED, "weight_bits": 8},
    ),
    "w4": Format(
        "4-bit weights of matrix products in groups, activations in float", "weights",
        ("w8", "dynamic", "fp16", "fp32", "int8"), {**STORED, "weight_bits": 4},
    ),
    "w4a8": Format("4-bit weights, 8-bit activations", "static", ("int8", "fp16", "fp32"), {"weight_bits": 4}),
    "w3a8": Format("3-bit weights, 8-bit activations", "static", ("w4a8", "int8", "fp16", "fp32"), {"weight_bits": 3}),
    "w2a8": Format(
        "ternary weights (-1, 0, 1), 8-bit activations", "static", ("w3a8", "w4a8", "int8", "fp16", "fp32"),
        {"weight_bits": 2},
    ),
    "w4a4": Format(
        "4-bit weights and activations; inputs and outputs of the network in 8 bits", "static",
        ("w4a8", "int8", "fp16", "fp32"), {"weight_bits": 4, "activation_bits": 4, "port_bits": 8},
    ),
}  # fmt: skip
"""Every precision, those that keep most first."""

PRECISIONS: tuple[Precision, ...] = tuple(FORMATS)


def is_quantized(precision: str) -> bool:
    """Whether files of that precision are written from a quantized hub."""
    return precision in FORMATS and FORMATS[precision].kind != "float"  # type: ignore[index]


def is_integer(precision: str) -> bool:
    """Whether files of that precision hold integers."""
    return is_quantized(precision) and FORMATS[cast(Precision, precision)].kind != "float8"


def needs_calibration(precision: Precision) -> bool:
    """Whether sample data has to be seen before a file of that precision can be written."""
    return FORMATS[precision].kind in ("static", "float8")


def is_corrected(precision: Precision) -> bool:
    """Whether the hub steps of the recipe run for files of that precision: they work on calibrated integers."""
    return FORMATS[precision].kind == "static"


def spec_of(spec: QuantSpec, precision: Precision) -> QuantSpec:
    """A target's numbers as that precision changes them. Precisions with equal specs share one hub."""
    return replace(spec, **FORMATS[precision].numbers)


def nearest(precision: Precision, there: Sequence[Precision]) -> Precision:
    """Of the precisions that can be had the one that comes nearest to another."""
    return next((p for p in FORMATS[precision].nearest if p in there), there[0])


def integers(precisions: Iterable[str]) -> tuple[Precision, ...]:
    """Those that hold integers, in their order."""
    return tuple(cast(Precision, p) for p in precisions if is_integer(p))
