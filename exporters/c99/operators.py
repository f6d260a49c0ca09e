"""The translation table: how each ONNX operator becomes integer operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from deploykit.exporters.c99.computing import add, average_pool, max_pool, mean, multiply, softmax
from deploykit.exporters.c99.moving import (
    concat,
    depth_to_space,
    pad,
    reshape,
    resize,
    split,
    take,
    transpose,
    unchanged,
)
from deploykit.exporters.c99.operation import Operation
from deploykit.exporters.c99.products import convolution, dense, transposed_convolution
from deploykit.exporters.c99.program import Tensor
from deploykit.exporters.layout import View


@dataclass(frozen=True)
class Rule:
    """How one ONNX operator is lowered.

    ``operands``: how many leading inputs carry values (None: all); the others are shapes, axes, limits.
    ``scale``: the result has a scale of its own (that of the QuantizeLinear behind it) or its input's.
    ``fuses``: a Relu or Clip behind it becomes its limits.
    """

    write: Callable[[Operation], View[Tensor] | Sequence[View[Tensor]]]
    operands: int | None = 1
    scale: Literal["own", "input"] = "own"
    fuses: bool = False


TABLE: dict[str, Rule] = {
    # products with constant weights
    "Conv": Rule(convolution, operands=3, fuses=True),
    "ConvTranspose": Rule(transposed_convolution, operands=3, fuses=True),
    "Gemm": Rule(dense, operands=3, fuses=True),
    "MatMul": Rule(dense, operands=2, fuses=True),
    # arithmetic
    "Add": Rule(add(subtract=False), operands=2, fuses=True),
    "Sub": Rule(add(subtract=True), operands=2, fuses=True),
    "Mul": Rule(multiply, operands=2, fuses=True),
    "AveragePool": Rule(average_pool),
    "GlobalAveragePool": Rule(mean),
    "ReduceMean": Rule(mean),
    "Softmax": Rule(softmax),
    # selecting and moving elements
    "Concat": Rule(concat, operands=None),
    "MaxPool": Rule(max_pool, scale="input"),
    "Resize": Rule(resize, scale="input"),
    "Pad": Rule(pad, scale="input"),
    "Slice": Rule(take, scale="input"),
    "Split": Rule(split, scale="input"),
    # changes of shape: nothing moves until somebody needs it to
    "Reshape": Rule(reshape, scale="input"),
    "Flatten": Rule(reshape, scale="input"),
    "Squeeze": Rule(reshape, scale="input"),
    "Unsqueeze": Rule(reshape, scale="input"),
    "Transpose": Rule(transpose, scale="input"),
    "DepthToSpace": Rule(depth_to_space, scale="input"),
    "Identity": Rule(unchanged, scale="input"),
    "Expand": Rule(unchanged, scale="input"),
}
"""Functions of one number need no rule: `curves`."""
