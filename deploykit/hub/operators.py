"""The operator table: how each ONNX operator may be quantized (in torch: `deploykit.hub.training.operators`).

What is to be known of an operator by name stands here; what is rewritten goes by names of its own (`canonical`,
`pixels`), and exporters have translation tables.
"""

from __future__ import annotations

from math import prod
from typing import Literal

import numpy as np
import onnx_ir as ir

from deploykit.hub.graph import attribute, constant

Role = Literal["linear", "lookup", "recurrent", "arithmetic", "moves", "activation", "float"]
"""
linear      a product with constant weights: weights and bias are quantized too, sums are int32
lookup      reads rows of a constant table: the table is stored in int8, what is read becomes float
recurrent   computed in float; its weights are stored in int8
arithmetic  computes new values: inputs and outputs have scales of their own
moves       only selects or rearranges values: input and output have one scale
activation  Relu or Clip: fused into the operator before it where possible, arithmetic where not
float       not quantized
"""

ROLES: dict[str, Role] = {
    "Conv": "linear",
    "ConvTranspose": "linear",
    "Gemm": "linear",
    "MatMul": "linear",
    "Gather": "lookup",
    "LSTM": "recurrent",
    "GRU": "recurrent",
    "Add": "arithmetic",
    "Sub": "arithmetic",
    "Mul": "arithmetic",
    "AveragePool": "arithmetic",
    "GlobalAveragePool": "arithmetic",
    "ReduceMean": "arithmetic",
    "Concat": "arithmetic",
    "Elu": "arithmetic",
    "HardSwish": "arithmetic",
    "HardSigmoid": "arithmetic",
    "LeakyRelu": "arithmetic",
    "PRelu": "arithmetic",
    "Sigmoid": "arithmetic",
    "Softmax": "arithmetic",
    "Tanh": "arithmetic",
    "Resize": "arithmetic",
    "MaxPool": "moves",
    "Pad": "moves",
    "Slice": "moves",
    "Reshape": "moves",
    "Flatten": "moves",
    "Squeeze": "moves",
    "Unsqueeze": "moves",
    "Transpose": "moves",
    "DepthToSpace": "moves",
    "Split": "moves",
    "Expand": "moves",
    "Identity": "moves",
    "Relu": "activation",
    "Clip": "activation",
}

PRODUCTS = tuple(operator for operator, its_role in ROLES.items() if its_role == "linear")
"""Convolutions and matrix products: what a network spends its time on, so what has to be integer."""

WEIGHTS_AT = {"LSTM": (1, 2), "GRU": (1, 2), "Gather": (0,)}
"""Positions of an operator's weights; products have theirs at 1."""

FIXED_OUTPUT = {"Softmax": (0.0, 1.0), "Sigmoid": (0.0, 1.0), "HardSigmoid": (0.0, 1.0), "Tanh": (-1.0, 1.0)}
"""Operators whose output range is known without data. Integer kernels want it in exactly 2^bits steps, the largest of
which falls one step short of 1."""

FUSES_ACTIVATION = frozenset({*PRODUCTS, "Add", "Sub", "Mul"})
"""Operators that integer kernels run together with a Relu or Clip that follows."""

WHY_FLOAT = {
    "BatchNormalization": "its columns have units of their own, for which there is no common scale",
    "Gelu": "a normalisation or product in float stands beside it; integers on both sides cost accuracy and time",
    "LayerNormalization": "its mean and variance need more than 8 bits",
}
"""Reasons that are worth more than "there is no rule"."""

SMALL_FLOAT8_CHANNELS, MOST_FLOAT8_POSITIONS = 16, 32
"""Convolutions with so few channels on a side gain nothing in 8-bit floating point (pull request 1083 of NVIDIA's Model
Optimizer), and its kernels have so many positions at most (TensorRT 10.13 release notes, limitations)."""

CANNOT_BE_STORED = "tables and recurrent layers stay in float where only inputs of products are quantized"


def role(node: ir.Node) -> Role:
    """The node's role; ``float`` for operators that are not in the table and for linear ones without weights."""
    found = ROLES.get(node.op_type, "float") if node.domain in ("", "ai.onnx") else "float"
    if found == "linear" and constant(node.inputs[1]) is None:
        return "float"
    if found == "lookup" and not _reads_rows(node):
        return "float"
    if found == "recurrent" and any(constant(v) is None for v in node.inputs[1:3]):
        return "float"
    if node.op_type == "PRelu" and constant(node.inputs[1]) is None:
        return "float"
    if node.op_type == "Pad" and not _pads_with_zero(node):
        return "float"
    return found


def why_float(node: ir.Node) -> str:
    """Why an operator has no integer form here, for the report."""
    if ROLES.get(node.op_type) == "linear":
        return "a product of two activations stays in float"
    if node.op_type == "Pad":
        return "pads with something other than zero"
    if ROLES.get(node.op_type) in ("lookup", "recurrent", "arithmetic"):
        return "its weights are computed while the model runs"
    return WHY_FLOAT.get(node.op_type, f"{node.op_type} has no quantization rule")


def why_not_float8(node: ir.Node) -> str:
    """Why a product with constant weights stays as it is where the others compute in 8-bit floating point; empty where
    it does not."""
    weight = node.inputs[1].shape if node.inputs[1] is not None else None
    if node.op_type == "ConvTranspose":
        return "transposed convolutions have no fp8 kernels"
    if node.op_type != "Conv" or weight is None:
        return ""
    outputs, inputs, *kernel = weight.numpy()
    if attribute(node, "group", 1) > 1:
        return "grouped convolutions have no fp8 kernels"
    if prod(kernel) > MOST_FLOAT8_POSITIONS:
        return f"its kernel has {prod(kernel)} positions, fp8 kernels have at most {MOST_FLOAT8_POSITIONS}"
    if min(inputs, outputs) <= SMALL_FLOAT8_CHANNELS:
        return f"fp8 is slower than float16 with {SMALL_FLOAT8_CHANNELS} channels or fewer on a side"
    return ""


def data_inputs(node: ir.Node) -> list[int]:
    """Positions of the inputs that carry values (not shapes, axes, limits or weights)."""
    if node.op_type in ("Add", "Sub", "Mul", "Concat", "PRelu"):
        return list(range(len(node.inputs)))
    return [0]


def weight_positions(node: ir.Node) -> tuple[int, ...]:
    """Positions of the inputs that are weights; none where the operator has no weights."""
    return (1,) if node.op_type in PRODUCTS else WEIGHTS_AT.get(node.op_type, ())


def weight_axis(node: ir.Node) -> int:
    """The output-channel axis of a linear operator's weight."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    return len(weight.shape) - 1


def channel_axis(operator: str) -> int:
    """The axis of a linear operator's output along which its bias runs, counted from the front or (-1) the end."""
    return 1 if operator in ("Conv", "ConvTranspose") else -1


def is_nonnegative(value: ir.Value) -> bool:
    """Whether a value is known, without data, to be 0 or more everywhere."""
    node = value.producer()
    if node is None:
        return False
    if node.op_type == "Clip":
        low = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        return low is not None and bool(low.min() >= 0)
    if node.op_type in ("MaxPool", "AveragePool", "GlobalAveragePool", "Reshape", "Flatten", "Transpose", "Slice"):
        first = node.inputs[0]
        return first is not None and is_nonnegative(first)
    return node.op_type in ("Relu", "Sigmoid", "HardSigmoid", "Softmax")


def is_float(value: ir.Value | None) -> bool:
    """Whether a value holds float32 numbers (unknown counts as float)."""
    return value is not None and value.dtype in (None, ir.DataType.FLOAT)


def fused(node: ir.Node) -> list[ir.Node]:
    """What integer kernels run together with ``node``, in order: a MatMul's bias, then a Relu or Clip.

    Each is the only reader of the only output before it, and none of those is an output of the graph.
    """
    chain: list[ir.Node] = []
    if node.op_type == "MatMul" and role(node) == "linear":
        bias = _only_reader(node)
        if bias is not None and _adds_bias(bias, node):
            chain.append(bias)
    last = chain[-1] if chain else node
    activation = _only_reader(last) if last.op_type in FUSES_ACTIVATION else None
    if activation is not None and activation.op_type in ("Relu", "Clip") and has_constant_limits(activation):
        chain.append(activation)
    return chain


def bias_of(node: ir.Node) -> tuple[ir.Node, int]:
    """Where a linear operator's bias is read: its own third input, or the Add fused with a MatMul."""
    if node.op_type != "MatMul":
        return node, 2
    add = next((n for n in fused(node) if n.op_type == "Add"), None)
    if add is None:
        return node, 2
    return add, 1 if add.inputs[0] is node.outputs[0] else 0


def _only_reader(node: ir.Node) -> ir.Node | None:
    readers = [user for user, _ in node.outputs[0].uses()]
    return readers[0] if len(readers) == 1 and not node.outputs[0].is_graph_output() else None


def _adds_bias(add: ir.Node, product: ir.Node) -> bool:
    """Whether ``add`` adds one constant per column to a product of matrices."""
    if add.op_type != "Add":
        return False
    summand = next((v for v in add.inputs if v is not product.outputs[0]), None)
    held, weight = constant(summand), constant(product.inputs[1])
    if held is None or weight is None or held.ndim == 0:
        return False
    return bool(held.size == held.shape[-1] == weight.shape[-1])


def _reads_rows(node: ir.Node) -> bool:
    """Gather of rows of a constant float table (an embedding)."""
    table = constant(node.inputs[0])
    return table is not None and table.dtype == np.float32 and table.ndim == 2 and attribute(node, "axis", 0) == 0


def has_constant_limits(node: ir.Node) -> bool:
    """True for Relu, and for Clip with constant limits."""
    return all(limit is None or constant(limit) is not None for limit in node.inputs[1:])


def _pads_with_zero(node: ir.Node) -> bool:
    fill = node.inputs[2] if len(node.inputs) > 2 else None
    value = np.zeros(1) if fill is None else constant(fill)
    return attribute(node, "mode", "constant") == "constant" and value is not None and not np.any(value)
