"""`Target` and `QuantSpec`: what a device can do and how numbers are stored on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from deploykit.core.precision import Precision

Need = Literal["data", "labels", "train", "teacher"]
Profit = Literal[
    "structured", "2:4", "unstructured", "codebook", "low_rank", "fp16", "int8", "int4", "small_file"
]  # fmt: skip
GROUPS = (16, 32, 64, 128, 256)
"""Sizes of groups that kernels read."""
WIDTHS = (*range(2, 9), 16)
"""Bits of activations that there is a storage for."""
LARGEST_FLOAT8 = 448
"""Of E4M3: 1.75 * 2^8 (Micikevicius et al., FP8 formats for deep learning, 2022, table 1)."""


@dataclass(frozen=True)
class QuantSpec:
    """How numbers are stored and where quantization happens. Two targets with equal specs share one hub.

    Integers of fewer than 8 bits are stored in 8: ``weight_bits=7`` means -63..63 in int8. Only activations of 4 bits
    are stored in 4, so that what lies outside their range is cut at its ends.
    """

    grid: Literal["integer", "float8"] = "integer"
    """What numbers are rounded to once they are divided by their scale: integers, or E4M3, floating point of 8 bits (a
    sign, 4 bits of exponent, 3 of mantissa), which the precision fp8 asks for."""
    activation_bits: int = 8
    port_bits: int | None = None
    """Bits of the network's inputs and outputs; None: as many as activations have."""
    activation_signed: bool = False
    """False: unsigned storage (uint8). True: signed (int8)."""
    activation_symmetric: bool = False
    """True: zero point 0, so with signed storage the range is [-a, a]."""
    weight_bits: int = 8
    """Weights are signed and symmetric: -(2^(b-1)-1) .. 2^(b-1)-1."""
    weight_granularity: Literal["channel", "tensor"] = "channel"
    scale: Literal["float", "power_of_two"] = "float"
    bias: Literal["int32", "float"] = "int32"
    """int32 biases have the scale s_x * s_w and zero point 0."""
    placement: Literal["everywhere", "linear_inputs", "weights"] = "everywhere"
    """everywhere: every tensor an integer kernel reads or writes. linear_inputs: the inputs of convolutions and
    matrix products, and the skip branch of residual adds (what TensorRT fuses best). weights: nothing but weights."""
    weight_group: int = 32
    """How many weights along the input axis share a scale, where weights alone are quantized and have 4 bits."""
    shared_scale: tuple[str, ...] = ("AveragePool", "Concat", "Resize")
    """ONNX operators whose inputs and outputs must have one scale on this target, beyond those that only move data."""
    float_outputs: tuple[str, ...] = ()
    """ONNX operators whose integer kernels can write floats: what they compute for floats to read, or as an output of
    the network, is not rounded again."""
    float_operators: tuple[str, ...] = ()
    """ONNX operators that stay in float on this target although they have an integer form."""
    weight_scale_floor: float = 2.0**-24
    """No weight scale is smaller. 2^-14 keeps scales normal numbers in fp16."""

    def __post_init__(self) -> None:
        """Refuses widths this project has no storage for."""
        if not (2 <= self.weight_bits <= 8 and self.activation_bits in WIDTHS and self.ports.activation_bits in WIDTHS):
            raise ValueError("weight_bits must be between 2 and 8, activation_bits and port_bits between 2 and 8 or 16")
        if self.weight_group not in GROUPS:
            raise ValueError(f"weight_group must be one of {', '.join(map(str, GROUPS))}")

    @property
    def ports(self) -> QuantSpec:
        """The spec as it holds for the network's inputs and outputs."""
        return self if self.port_bits is None else replace(self, activation_bits=self.port_bits, port_bits=None)

    @property
    def activation_storage(self) -> str:
        """What activations are stored in, as ONNX calls it, e.g. ``"uint8"``."""
        if self.grid == "float8":
            return "float8e4m3fn"
        bits = self.activation_bits if self.activation_bits in (4, 16) else 8
        return f"{'int' if self.activation_signed else 'uint'}{bits}"

    @property
    def activation_range(self) -> tuple[int, int]:
        """Smallest and largest stored activation."""
        if self.grid == "float8":
            return -LARGEST_FLOAT8, LARGEST_FLOAT8
        if self.activation_symmetric and self.activation_signed:
            top = 2 ** (self.activation_bits - 1) - 1
            return -top, top
        if self.activation_signed:
            return -(2 ** (self.activation_bits - 1)), 2 ** (self.activation_bits - 1) - 1
        return 0, 2**self.activation_bits - 1

    @property
    def weight_max(self) -> int:
        """Largest stored weight magnitude."""
        return LARGEST_FLOAT8 if self.grid == "float8" else int(2 ** (self.weight_bits - 1) - 1)


@dataclass(frozen=True)
class Fact:
    """One figure about a device and where it comes from."""

    value: float | int | str | bool
    source: str
    verified: bool
    unit: str = ""


@dataclass(frozen=True)
class Target:
    """A hardware profile, read from ``targets/NAME.toml``.

    ``options`` belongs to the exporter alone, which validates it.
    """

    name: str
    title: str
    exporter: str
    precisions: tuple[Precision, ...]
    """What is written, the baseline first."""
    profits: tuple[Profit, ...]
    """What makes models smaller or faster on this device; passes compare it with their `pays_if`."""
    channel_multiple: int
    """Channel counts that are a multiple of this fill the vector or matrix unit."""
    opset: int
    """Highest ONNX operator set the device's runtime reads (the graph is never above it)."""
    on_request: tuple[Precision, ...] = ()
    """What is written too, where it is asked for."""
    quant: QuantSpec = field(default_factory=QuantSpec)
    pixels: Literal["folded", "float"] = "float"
    """How uint8 images enter where that is asked for. folded: scaling and normalising become part of the first
    convolutions, all integer; float: exact, in a float front, for runtimes whose kernels do not take pixels as such."""
    measured_here: str = ""
    """Why latencies taken on this machine stand for the device; empty when they do not."""
    recipe: str = ""
    """What the name ``default`` means here: a recipe that ships with the project, or a path; empty: there is none."""
    options: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Fact] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses a target for which nothing would be written."""
        if not self.precisions:
            raise ValueError("precisions must name at least one")
