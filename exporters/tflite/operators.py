"""The translation table: how each ONNX operator is written into a .tflite file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from deploykit.exporters.layout import View
from deploykit.exporters.tflite.composed import batch_normalization, layer_normalization, norm, power, product, rows
from deploykit.exporters.tflite.computing import (
    PROBABILITY,
    SYMMETRIC_UNIT,
    activation,
    binary,
    elu,
    fully_connected,
    gelu,
    hard_sigmoid,
    leaky_relu,
    mean,
    prelu,
    resize,
    softmax,
    unary,
)
from deploykit.exporters.tflite.moving import (
    cast,
    concat,
    depth_to_space,
    pad,
    reshape,
    split,
    take,
    transpose,
    unchanged,
)
from deploykit.exporters.tflite.operation import Operation
from deploykit.exporters.tflite.recurrent import gru, lstm
from deploykit.exporters.tflite.sliding import average_pool, convolution, max_pool, transposed_convolution
from deploykit.hub.graph import attribute


@dataclass(frozen=True)
class Rule:
    """How one ONNX operator is written.

    ``operands``: how many leading inputs carry values (None: all); the others are shapes, axes, limits.
    ``scale``: an integer result has a scale of its own (that of the QuantizeLinear behind it) or its input's.
    ``fuses``: a Relu or Clip behind it becomes part of it.
    ``joins``: how the steps of its operands make up the steps it sums in; LiteRT rescales by less than 256 from there.
    ``float_only``: why it is written in float even between integers.
    """

    write: Callable[[Operation], View | Sequence[View]]
    operands: int | None = 1
    scale: Literal["own", "input"] = "own"
    fuses: bool = False
    joins: Literal["product", "sum", ""] = ""
    float_only: str = ""


TABLE: dict[str, Rule] = {
    # products with constant weights
    "Conv": Rule(convolution, operands=3, fuses=True, joins="product"),
    "ConvTranspose": Rule(transposed_convolution, operands=3, fuses=True, joins="product"),
    "Gemm": Rule(fully_connected, operands=3, fuses=True, joins="product"),
    "MatMul": Rule(fully_connected, operands=2, fuses=True, joins="product"),
    # arithmetic
    "Add": Rule(binary("ADD"), operands=2, fuses=True, joins="sum"),
    "Sub": Rule(binary("SUB"), operands=2, fuses=True, joins="sum"),
    "Mul": Rule(binary("MUL"), operands=2, fuses=True, joins="product"),
    "Div": Rule(binary("DIV"), operands=2, fuses=True, float_only="LiteRT has no int8 division"),
    "ReduceMean": Rule(mean),
    "GlobalAveragePool": Rule(mean),
    "AveragePool": Rule(average_pool),
    # activations
    "Relu": Rule(activation),
    "Clip": Rule(activation),
    "HardSwish": Rule(unary("HARD_SWISH")),
    "HardSigmoid": Rule(hard_sigmoid, joins="sum"),
    "Sigmoid": Rule(unary("LOGISTIC", PROBABILITY)),
    "Tanh": Rule(unary("TANH", SYMMETRIC_UNIT)),
    "LeakyRelu": Rule(leaky_relu),
    "Softmax": Rule(softmax),
    "PRelu": Rule(prelu, operands=2, joins="product"),
    "Elu": Rule(elu),
    "Gelu": Rule(gelu),
    "Sqrt": Rule(unary("SQRT"), float_only="LiteRT has no int8 square root"),
    "Exp": Rule(unary("EXP"), float_only="the hub leaves exponentials in float"),
    "Pow": Rule(power, operands=2, float_only="LiteRT has no int8 power"),
    # several operators of LiteRT's, in float
    "LayerNormalization": Rule(layer_normalization, operands=3),
    "BatchNormalization": Rule(batch_normalization, operands=5),
    "ReduceL2": Rule(norm, float_only="LiteRT has no int8 norm"),
    "LSTM": Rule(lstm, operands=4),
    "GRU": Rule(gru, operands=4),
    # selecting and moving elements
    "Gather": Rule(rows, operands=2, scale="input"),
    "MaxPool": Rule(max_pool, scale="input"),
    "Resize": Rule(resize, scale="input"),
    "Pad": Rule(pad, scale="input"),
    "Slice": Rule(take, scale="input"),
    "Split": Rule(split, scale="input"),
    "Concat": Rule(concat, operands=None),
    # changes of shape: no operator at all, or a RESHAPE where somebody reads the result
    "Reshape": Rule(reshape, scale="input"),
    "Flatten": Rule(reshape, scale="input"),
    "Squeeze": Rule(reshape, scale="input"),
    "Unsqueeze": Rule(reshape, scale="input"),
    "Transpose": Rule(transpose, scale="input"),
    "DepthToSpace": Rule(depth_to_space, scale="input"),
    "Identity": Rule(unchanged, scale="input"),
    "Cast": Rule(cast, scale="input"),
    "Expand": Rule(unchanged, scale="input"),
}

NO_INT16 = {
    "Elu": "LiteRT has no 16-bit Elu",
    "Gelu": "LiteRT has no 16-bit Gelu",
    "HardSigmoid": "LiteRT's 16-bit sum does not rescale the constants in it",
    "HardSwish": "LiteRT has no 16-bit HardSwish",
    "PRelu": "LiteRT computes PRelu on 16 bits wrongly",
}
"""Operators that are written in float between 16-bit integers, and why."""


def no_int16(node: ir.Node) -> str:
    """Why LiteRT does not compute an operator on 16-bit integers; empty where it does."""
    if node.op_type == "Resize" and attribute(node, "mode", "nearest") != "nearest":
        return "LiteRT resizes 16-bit integers with weights of 10 bits, hundreds of steps off"
    return NO_INT16.get(node.op_type, "")


PRODUCT_OF_ACTIVATIONS = Rule(product, operands=2, float_only="a product of two activations stays in float")
"""MatMul without constant weights."""
