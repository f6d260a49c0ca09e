"""What TensorRT makes of a Q/DQ graph, read from the ONNX alone: rules Q1 to Q14, Q21, Q23 and Q26.

Severity: ``E`` the parser or builder rejects the file or crashes; ``S`` it is taken, but runs in float or computes
something else, the dangerous class; ``I`` for information. The verdicts were taken from NVIDIA's own parser and builder
(TensorRT-RTX 1.7.1), see docs/exporters/tensorrt.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir

from deploykit.exporters.tensorrt.device.build import Version, dotted
from deploykit.exporters.tensorrt.parsers import FIRST_READ, SCATTER_REDUCTION, UINT8_INPUTS
from deploykit.hub.graph import attribute, constant
from deploykit.hub.operators import PRODUCTS

Severity = Literal["E", "S", "I"]
FUSES_WITH_LINEAR = ("BatchNormalization", "Relu", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "HardSwish", "HardSigmoid")
"""What TensorRT's builder runs in one kernel with the linear operator before it."""
UNKNOWN_TO_TENSORRT = (
    "QLinearConv", "QLinearMatMul", "QLinearAdd", "QLinearConcat", "QLinearGlobalAveragePool", "QGemm",
    "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear",
)  # fmt: skip
Int8, Uint8 = ir.DataType.INT8, ir.DataType.UINT8
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, *HALVES)


@dataclass(frozen=True)
class Finding:
    """One rule that a node breaks."""

    rule: str
    severity: Severity
    node: str
    sentence: str

    def __str__(self) -> str:
        """As it stands in a report."""
        return f"{self.rule} at '{self.node}': {self.sentence}"


def lint(proto: onnx.ModelProto, trt: tuple[Version, Version] | None = None) -> tuple[Finding, ...]:
    """Everything TensorRT would reject, run in float or compute differently, in graph order.

    Args:
        proto: the file.
        trt: oldest and newest release that shall read it; None asks for no release in particular.
    """
    model = read(proto)
    found = list(_q21_inputs(model.graph, trt[0], trt[1])) if trt is not None else []
    for node in model.graph:
        found += [Finding(r, severity, name(node), said) for r, severity, broken in RULES for said in broken(node)]
        if trt is not None:
            found += _q21(node, *trt)
    return tuple(found)


def _q21(node: ir.Node, oldest: Version, newest: Version) -> Iterator[Finding]:
    yield from _read_since(name(node), node.op_type, FIRST_READ.get(node.op_type, oldest), oldest, newest)
    if node.op_type == "ScatterElements" and attribute(node, "reduction", "none") != "none":
        yield from _read_since(name(node), "ScatterElements with a reduction", SCATTER_REDUCTION, oldest, newest)


def _q21_inputs(graph: ir.Graph, oldest: Version, newest: Version) -> Iterator[Finding]:
    for value in graph.inputs:
        if value.dtype == Uint8:
            yield from _read_since(value.name or "", "uint8 inputs", UINT8_INPUTS, oldest, newest)


def _read_since(where: str, what: str, first: Version, oldest: Version, newest: Version) -> Iterator[Finding]:
    if newest < first:
        yield Finding("Q21", "E", where, f"TensorRT {dotted(newest)} has no {what}")
    elif oldest < first:
        yield Finding(
            "Q21", "I", where, f"TensorRT has {what} since {dotted(first)}; older ones will not build this file"
        )


def read(proto: onnx.ModelProto) -> ir.Model:
    """The graph with the types of its tensors inferred, as far as it is consistent."""
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))


def name(node: ir.Node) -> str:
    """A node's name, or its output's where it has none."""
    return node.name or node.outputs[0].name or node.op_type


def runs_in_8_bits(node: ir.Node) -> bool:
    """Whether TensorRT runs this linear operator in int8 or fp8: both inputs quantized the way its kernels want."""
    inputs_quantized = _dequantize(node.inputs[0]) is not None and _dequantize(node.inputs[1]) is not None
    broken = [rule(node) for rule in (_q9_linear, _q10, _q12)]
    return inputs_quantized and not any(True for found in broken for _ in found)


# What the rules ask of the graph


def _producer(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    return value.dtype if value is not None else None


def _quantize(value: ir.Value | None) -> ir.Node | None:
    node = _producer(value)
    return node if node is not None and node.op_type == "QuantizeLinear" else None


def _dequantize(value: ir.Value | None) -> ir.Node | None:
    node = _producer(value)
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _is_pair_member(node: ir.Node) -> bool:
    return node.op_type in ("QuantizeLinear", "DequantizeLinear")


def _zero(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def _stored(node: ir.Node) -> ir.DataType | None:
    """The type a Q writes or a DQ reads."""
    value = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    zero = _zero(node)
    return zero.dtype if zero is not None and zero.dtype is not None else value.dtype if value is not None else None


def _scales(node: ir.Node) -> np.ndarray | None:
    return constant(node.inputs[1])


def _weight(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear before a linear operator's constant weight, stored as integers or quantized in the graph."""
    dq = _dequantize(node.inputs[1])
    if dq is None:
        return None
    q = _quantize(dq.inputs[0])
    return dq if constant(dq.inputs[0] if q is None else q.inputs[0]) is not None else None


def _behind_pair(value: ir.Value | None) -> ir.Node | None:
    """What produced the float value that a Q/DQ pair quantizes."""
    dq = _dequantize(value)
    q = _quantize(dq.inputs[0]) if dq is not None else None
    return _producer(q.inputs[0]) if q is not None else None


# The rules: what is wrong, one sentence per finding


def _q1(node: ir.Node) -> Iterator[str]:
    zero = constant(_zero(node)) if _is_pair_member(node) else None
    if zero is not None and zero.any():
        yield "its zero point is not 0; TensorRT quantizes symmetrically only"


def _q2(node: ir.Node) -> Iterator[str]:
    zero = _zero(node)
    if _is_pair_member(node) and zero is not None and zero.dtype == Uint8:
        yield "it stores uint8, which TensorRT takes for int8: values above 127 are cut"


def _q3(node: ir.Node) -> Iterator[str]:
    if node.op_type == "QuantizeLinear" and _zero(node) is None and "output_dtype" not in node.attributes:
        yield "it has no zero point, which means uint8 in ONNX and int8 in TensorRT"


def _q4(node: ir.Node) -> Iterator[str]:
    if _is_pair_member(node) and _stored(node) in (ir.DataType.INT16, ir.DataType.UINT16):
        yield f"it stores {str(_stored(node)).lower()}; TensorRT has no 16-bit integers"


def _q5(node: ir.Node) -> Iterator[str]:
    scales = _scales(node) if _is_pair_member(node) else None
    if scales is not None and not (np.isfinite(scales) & (scales > 0)).all():
        yield "a scale is not a positive number"


def _q6(node: ir.Node) -> Iterator[str]:
    if _is_pair_member(node) and _scales(node) is None:
        yield "its scale is computed; TensorRT's builder crashes on scales that are not constants"


def _q7_int32(node: ir.Node) -> Iterator[str]:
    if node.op_type == "DequantizeLinear" and _stored(node) == ir.DataType.INT32:
        yield "it dequantizes int32; biases must be float for TensorRT"


def _q7_int8(node: ir.Node) -> Iterator[str]:
    if node.op_type in PRODUCTS and len(node.inputs) > 2:
        bias = _dequantize(node.inputs[2])
        if bias is not None and _stored(bias) != ir.DataType.INT32:
            yield "its bias is quantized, which loses precision and gains nothing"


def _q8(node: ir.Node) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type):
        return
    parameters = onnx.defs.get_schema(node.op_type).inputs
    types: dict[str, set[str]] = {}
    for i, value in enumerate(node.inputs):
        parameter = parameters[min(i, len(parameters) - 1)]
        dq = _dequantize(value)
        dtype = _dtype(dq.inputs[1] if dq is not None else value)  # TensorRT gives a DQ's output the type of its scale
        if dtype in FLOATS and parameter.is_homogeneous:
            types.setdefault(parameter.type_str, set()).add(str(dtype).lower())
    for mixed in types.values():
        if len(mixed) > 1:
            yield f"its inputs mix {' and '.join(sorted(mixed))}"


def _q9(node: ir.Node) -> Iterator[str]:
    scales = _scales(node) if node.op_type == "QuantizeLinear" else None
    if scales is not None and scales.size > 1 and constant(node.inputs[0]) is None:
        yield "it quantizes an activation per channel; TensorRT runs what follows in float"


def _q9_linear(node: ir.Node) -> Iterator[str]:
    q = _dequantize(node.inputs[0])
    pair = _quantize(q.inputs[0]) if q is not None else None
    if pair is not None:
        yield from _q9(pair)


def _q10(node: ir.Node) -> Iterator[str]:
    weight = _weight(node) if node.op_type in PRODUCTS else None
    scales = _scales(weight) if weight is not None else None
    if weight is None or scales is None or scales.size == 1 or attribute(weight, "block_size", 0):
        return
    shape = weight.outputs[0].shape
    rank = len(shape) if shape is not None else 4
    axis = attribute(weight, "axis", 1) % rank
    wanted = {"Conv": 0, "ConvTranspose": 1, "MatMul": rank - 1, "Gemm": 0 if attribute(node, "transB", 0) else 1}
    if axis != wanted[node.op_type]:
        yield (
            f"its weight has scales along axis {axis}; TensorRT has integer kernels for {node.op_type} "
            f"with axis {wanted[node.op_type]}, the output channels"
        )


def _q11(node: ir.Node) -> Iterator[str]:
    if node.op_type not in PRODUCTS:
        return
    data, weight = (_dequantize(value) is not None for value in node.inputs[:2])
    if weight and not data:
        yield "its weight is quantized but not its input; TensorRT runs it in float"
    if data and not weight:
        yield "its input is quantized but not its weight; TensorRT runs it in float"


def _q12(node: ir.Node) -> Iterator[str]:
    if node.op_type == "ConvTranspose" and _dequantize(node.inputs[0]) and _dequantize(node.inputs[1]):
        yield "TensorRT runs transposed convolutions in float, quantized or not"


def _q13(node: ir.Node) -> Iterator[str]:
    if node.op_type in UNKNOWN_TO_TENSORRT:
        yield f"TensorRT has no {node.op_type}; integer graphs are written with Q/DQ pairs"


def _q14(node: ir.Node) -> Iterator[str]:
    fusing = "the output of a linear operator is quantized, which keeps TensorRT from fusing"
    if node.op_type in FUSES_WITH_LINEAR:
        before = _behind_pair(node.inputs[0])
        if before is not None and before.op_type in (*PRODUCTS, "BatchNormalization"):
            yield f"{fusing} it with {before.op_type} '{name(before)}': move the pair behind it"
    if node.op_type == "Add":
        quantized = [before for value in node.inputs if (before := _behind_pair(value)) is not None]
        direct = [p for value in node.inputs if (p := _producer(value)) is not None]
        linear = [before for before in quantized if before.op_type in (*PRODUCTS, "BatchNormalization")]
        if linear and not any(p.op_type in (*PRODUCTS, "BatchNormalization") for p in direct):
            yield f"{fusing} it with {linear[0].op_type} '{name(linear[0])}': quantize only the skip branch"
    if node.op_type in PRODUCTS:
        for dq in _dequantized_outputs(node):
            yield f"its output is quantized by '{name(dq)}' though it is an output of the model"


def _dequantized_outputs(node: ir.Node) -> Iterator[ir.Node]:
    for q, _ in node.outputs[0].uses():
        if q.op_type == "QuantizeLinear":
            for dq, _ in q.outputs[0].uses():
                if dq.op_type == "DequantizeLinear" and dq.outputs[0].is_graph_output():
                    yield dq


def _q23(node: ir.Node) -> Iterator[str]:
    opset = node.graph.opset_imports.get("", 0) if node.graph is not None else 0
    scale = node.inputs[1] if _is_pair_member(node) else None
    if scale is not None and scale.dtype in HALVES and opset < 19:
        yield f"its scale is {str(scale.dtype).lower()}, which ONNX has since operator set 19 (this file: {opset})"


def _q26(node: ir.Node) -> Iterator[str]:
    if node.op_type in ("MaxPool", "AveragePool", "LpPool") and any(d != 1 for d in attribute(node, "dilations", [])):
        yield "TensorRT's pools have no dilations"
    if node.op_type == "MaxPool" and len(node.outputs) > 1:
        yield "TensorRT's MaxPool gives no indices"
    if attribute(node, "coordinate_transformation_mode") == "tf_crop_and_resize":
        yield "TensorRT has no coordinate_transformation_mode 'tf_crop_and_resize'"
    if node.op_type == "ScatterND" and attribute(node, "reduction", "none") != "none":
        yield "TensorRT's ScatterND has no reductions"


Rule = Callable[[ir.Node], Iterator[str]]
RULES: tuple[tuple[str, Severity, Rule], ...] = (
    ("Q1", "E", _q1),
    ("Q2", "S", _q2),
    ("Q3", "S", _q3),
    ("Q4", "E", _q4),
    ("Q5", "E", _q5),
    ("Q6", "E", _q6),
    ("Q7", "E", _q7_int32),
    ("Q7", "S", _q7_int8),
    ("Q8", "E", _q8),
    ("Q9", "S", _q9),
    ("Q10", "S", _q10),
    ("Q11", "S", _q11),
    ("Q12", "S", _q12),
    ("Q13", "E", _q13),
    ("Q14", "S", _q14),
    ("Q23", "E", _q23),
    ("Q26", "E", _q26),
)
