"""The operator table: how each ONNX operator may be quantized. (What it means in torch: `torch_operators`.)

Nobody else in the hub knows operators by name; exporters have translation tables of their own.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir

from deploykit.hub.graph import attribute, constant

Role = Literal["linear", "arithmetic", "moves", "activation", "float"]
"""
linear      a product with constant weights: weights and bias are quantized too, sums are int32
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
    "Add": "arithmetic",
    "Sub": "arithmetic",
    "Mul": "arithmetic",
    "AveragePool": "arithmetic",
    "GlobalAveragePool": "arithmetic",
    "ReduceMean": "arithmetic",
    "Concat": "arithmetic",
    "HardSwish": "arithmetic",
    "HardSigmoid": "arithmetic",
    "Sigmoid": "arithmetic",
    "Softmax": "arithmetic",
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

FIXED_OUTPUT = {"Softmax": (0.0, 1.0), "Sigmoid": (0.0, 1.0), "HardSigmoid": (0.0, 1.0)}
"""Operators whose output range is known without data. Integer kernels want it at exactly 2^-bits per step."""

FUSES_ACTIVATION = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul"})
"""Operators that integer kernels run together with a Relu or Clip that follows."""


def role(node: ir.Node) -> Role:
    """The node's role; ``float`` for operators that are not in the table and for linear ones without weights."""
    found = ROLES.get(node.op_type, "float") if node.domain in ("", "ai.onnx") else "float"
    if found == "linear" and constant(node.inputs[1]) is None:
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
    return f"{node.op_type} has no quantization rule"


def data_inputs(node: ir.Node) -> list[int]:
    """Positions of the inputs that carry values (not shapes, axes, limits or weights)."""
    if node.op_type in ("Add", "Sub", "Mul", "Concat"):
        return list(range(len(node.inputs)))
    return [0]


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


def channel_axis(operator: str, rank: int) -> int:
    """The axis of a linear operator's output (of that rank) along which its bias runs."""
    return 1 if operator in ("Conv", "ConvTranspose") else rank - 1


def is_float(value: ir.Value | None) -> bool:
    """Whether a value holds float32 numbers (unknown counts as float)."""
    return value is not None and value.dtype in (None, ir.DataType.FLOAT)


def fused_activation(node: ir.Node) -> ir.Node | None:
    """The Relu or Clip that runs together with ``node``: the only reader of its only output."""
    if node.op_type not in FUSES_ACTIVATION:
        return None
    readers = [user for user, _ in node.outputs[0].uses()]
    if len(readers) != 1 or node.outputs[0].is_graph_output() or readers[0].op_type not in ("Relu", "Clip"):
        return None
    return readers[0] if has_constant_limits(readers[0]) else None


def has_constant_limits(node: ir.Node) -> bool:
    """True for Relu, and for Clip with constant limits."""
    return all(limit is None or constant(limit) is not None for limit in node.inputs[1:])


def _pads_with_zero(node: ir.Node) -> bool:
    fill = node.inputs[2] if len(node.inputs) > 2 else None
    value = np.zeros(1) if fill is None else constant(fill)
    return attribute(node, "mode", "constant") == "constant" and value is not None and not np.any(value)
