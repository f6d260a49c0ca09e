"""The integer program: what is left of a network when every scale has become a constant.

A program is a list of operations on int8 tensors. Whatever an operation needs is in it: integer weights, biases,
multipliers, shifts, limits, the sizes of what it reads. Nothing refers to ONNX, C or a device, so whoever executes or
translates programs needs this file and `rounding`, and nothing else.

Conventions: one sample, no batch axis; images are ``[height, width, channels]``; a tensor is a run of elements, and
each operation says itself as which shape it reads it, so reshaping is no operation. ``low`` and ``high`` are the limits
a result is clamped to: int8's own, or those of the Relu or Clip that was fused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.exporters.c99.rounding import Rescale, Rounding

if TYPE_CHECKING:
    from numpy.typing import NDArray

Shape = tuple[int, ...]
Pair = tuple[int, int]


@dataclass(frozen=True)
class Quant:
    """real = scale * (integer - zero_point), for int8 integers."""

    scale: float
    zero_point: int

    def integer(self, real: NDArray[Any] | float) -> NDArray[np.int64]:
        """ONNX's QuantizeLinear, not saturated: nearest in float32, halves to even."""
        steps = np.asarray(real, np.float32) / np.float32(self.scale)
        found: NDArray[np.int64] = np.rint(steps).astype(np.int64) + self.zero_point
        return found


@dataclass(frozen=True, eq=False)
class Tensor:
    """A run of int8 elements; two tensors are the same only if they are the same object."""

    name: str
    shape: Shape
    """As it is written; only the number of elements counts."""
    quant: Quant
    data: NDArray[np.int8] | None = None
    """The elements of a constant."""

    @property
    def size(self) -> int:
        """Number of elements, which is its number of bytes."""
        return prod(self.shape)


@dataclass(frozen=True, eq=False)
class Conv:
    """y[i,j,o] = clamp(rescale(bias[o] + sum of (x[i*s+k*d-p, ..] - zero_x) * weights[o,k,..]) + zero_y).

    What lies outside the image counts as zero_x, so it adds nothing. Output channel o reads the input channels of its
    group. One-dimensional convolutions have height 1.
    """

    layer: str
    x: Tensor
    y: Tensor
    x_shape: Shape
    y_shape: Shape
    weights: NDArray[np.int8]
    """``[out, kernel height, kernel width, in / groups]``"""
    bias: NDArray[np.int32]
    """``[out]``"""
    rescale: Rescale
    strides: Pair
    dilations: Pair
    pads: Pair
    """Before the first row and column. What is missing behind the last follows from ``y_shape``."""
    groups: int
    low: int
    high: int

    @property
    def depthwise(self) -> bool:
        """Every output channel reads one input channel."""
        return self.weights.shape[3] == 1 and self.groups > 1


@dataclass(frozen=True, eq=False)
class ConvTranspose:
    """A `Conv` run backwards: y[i,j,o] sums over those k and x[(i+p-k*d)/s, ..] for which the division is exact."""

    layer: str
    x: Tensor
    y: Tensor
    x_shape: Shape
    y_shape: Shape
    weights: NDArray[np.int8]
    """``[out, kernel height, kernel width, in / groups]``"""
    bias: NDArray[np.int32]
    rescale: Rescale
    strides: Pair
    dilations: Pair
    pads: Pair
    groups: int
    low: int
    high: int


@dataclass(frozen=True, eq=False)
class Dense:
    """y[r,o] = clamp(rescale(bias[o] + sum over i of (x[r,i] - zero_x) * weights[o,i]) + zero_y)."""

    layer: str
    x: Tensor
    y: Tensor
    rows: int
    weights: NDArray[np.int8]
    """``[out, in]``"""
    bias: NDArray[np.int32]
    rescale: Rescale
    low: int
    high: int


@dataclass(frozen=True, eq=False)
class Add:
    """y = clamp(rescale_y(offset + rescale_a((a - zero_a) * 2^lift) +- rescale_b((b - zero_b) * 2^lift)) + zero_y).

    a and b are broadcast to ``y_shape``.
    """

    layer: str
    a: Tensor
    b: Tensor
    y: Tensor
    a_shape: Shape
    b_shape: Shape
    y_shape: Shape
    lift: int
    a_rescale: Rescale
    b_rescale: Rescale
    y_rescale: Rescale
    offset: int
    subtract: bool
    low: int
    high: int


@dataclass(frozen=True, eq=False)
class Multiply:
    """y = clamp(rescale(offset + (a - zero_a) * (b - zero_b)) + zero_y), broadcast as in `Add`."""

    layer: str
    a: Tensor
    b: Tensor
    y: Tensor
    a_shape: Shape
    b_shape: Shape
    y_shape: Shape
    rescale: Rescale
    offset: int
    low: int
    high: int


@dataclass(frozen=True, eq=False)
class MaxPool:
    """The largest element of each window; what lies outside the image never wins."""

    layer: str
    x: Tensor
    y: Tensor
    x_shape: Shape
    y_shape: Shape
    kernel: Pair
    strides: Pair
    dilations: Pair
    pads: Pair


@dataclass(frozen=True, eq=False)
class AveragePool:
    """The mean of each window, rounded as `rounding.divide` does; input and output have one scale."""

    layer: str
    x: Tensor
    y: Tensor
    x_shape: Shape
    y_shape: Shape
    kernel: Pair
    strides: Pair
    pads: tuple[int, int, int, int]
    """Top, left, bottom, right."""
    counts_padding: bool
    """Padding takes part in the mean, as zero_x; otherwise only what lies inside the image is counted."""


@dataclass(frozen=True, eq=False)
class Mean:
    """y[i,k] = saturate(rescale(offset + sum over j of (x[i,j,k] - zero_x)) + zero_y), x seen as [outer, n, inner]."""

    layer: str
    x: Tensor
    y: Tensor
    shape: tuple[int, int, int]
    rescale: Rescale
    offset: int


@dataclass(frozen=True, eq=False)
class Table:
    """y[i,c,k] = values[c, x[i,c,k] + 128], x seen as [outer, channels, inner].

    Any function of one number, or one per channel, exactly as the hub defines it in float.
    """

    layer: str
    x: Tensor
    y: Tensor
    values: NDArray[np.int8]
    """``[channels, 256]``; one row where all channels have the same function."""
    inner: int = 1


@dataclass(frozen=True, eq=False)
class Softmax:
    """y[i,j,k] = saturate((e[i,j,k] * one + half the sum) / the sum of e over j + zero_y), x seen as [outer, n, inner].

    e = exponentials[largest x of the group - x]; ``one`` is the number of steps between 0 and 1 in y.
    """

    layer: str
    x: Tensor
    y: Tensor
    shape: tuple[int, int, int]
    exponentials: NDArray[np.uint32]
    """``[256]``"""
    one: int


@dataclass(frozen=True, eq=False)
class Concat:
    """The parts one behind the other along the middle axis, each seen as [outer, its size / outer]."""

    layer: str
    parts: tuple[Tensor, ...]
    y: Tensor
    outer: int


@dataclass(frozen=True, eq=False)
class Pad:
    """x with borders of the value zero_x."""

    layer: str
    x: Tensor
    y: Tensor
    x_shape: Shape
    before: Shape
    y_shape: Shape


@dataclass(frozen=True, eq=False)
class Slice:
    """y[i,..] = x[begin + i * step, ..]"""

    layer: str
    x: Tensor
    y: Tensor
    x_shape: Shape
    begin: Shape
    step: Shape
    y_shape: Shape


@dataclass(frozen=True, eq=False)
class Transpose:
    """x, seen as ``x_shape``, with its axes in another order; with the axes in order, a copy."""

    layer: str
    x: Tensor
    y: Tensor
    x_shape: Shape
    axes: Shape


@dataclass(frozen=True, eq=False)
class Resize:
    """y[i,j] = x[rows[i], columns[j]]"""

    layer: str
    x: Tensor
    y: Tensor
    x_shape: Shape
    rows: tuple[int, ...]
    columns: tuple[int, ...]


Operation = (
    Conv | ConvTranspose | Dense | Add | Multiply | MaxPool | AveragePool | Mean | Table | Softmax | Concat | Pad
    | Slice | Transpose | Resize
)  # fmt: skip
Product = Conv | ConvTranspose | Dense
"""With constant weights."""


@dataclass(frozen=True)
class Port:
    """An input or output of the network."""

    name: str
    """As the model calls it."""
    tensor: Tensor
    shape: Shape
    """ONNX's shape, batch 1."""
    order: Shape
    """``order[k]`` is the ONNX axis that is stored at position k."""
    batched: bool
    """The first ONNX axis counts samples."""
    unsigned: bool = False
    """The caller's numbers are uint8; the first operation moves them to int8."""


@dataclass(frozen=True)
class Program:
    """A whole network for one sample."""

    operations: tuple[Operation, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    rounding: Rounding
    coded: Mapping[Product, NDArray[np.uint8]] = field(default_factory=dict)
    """Weights that are stored coded and decoded right before their operation; see `coded`."""


def reads(operation: Operation) -> tuple[Tensor, ...]:
    """The tensors an operation reads, constants included."""
    if isinstance(operation, Concat):
        return operation.parts
    if isinstance(operation, (Add, Multiply)):
        return operation.a, operation.b
    return (operation.x,)


def constants(program: Program, operation: Operation) -> Iterator[NDArray[Any]]:
    """What an operation holds in read-only memory."""
    for part in fields(operation):
        value = getattr(operation, part.name)
        if part.name == "weights" and isinstance(operation, Product) and operation in program.coded:
            yield program.coded[operation]
        elif isinstance(value, np.ndarray):
            yield value
        elif isinstance(value, Rescale):
            if value.multiplier is not None:
                yield value.multiplier
            yield value.shift
        elif isinstance(value, Tensor) and value.data is not None:
            yield value.data
    if isinstance(operation, Resize):
        yield np.asarray(operation.rows, np.uint16)
        yield np.asarray(operation.columns, np.uint16)
