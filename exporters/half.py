"""Bakes float16 into a graph: weights, scales and everything between the operators; inputs and outputs stay float32.

Under strong typing (TensorRT 10 as an option, 11 always) the file's types are the kernels' types: what is left in
float32 runs in float32.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from deploykit.core.errors import DeploykitError
from deploykit.hub.graph import add_initializer, constant

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
LARGEST = float(np.finfo(np.float16).max)
SMALLEST_NORMAL = float(np.finfo(np.float16).tiny)
"""2^-14. Below it float16 loses one bit of precision per halving; QuantSpec.weight_scale_floor keeps weights above."""


def bake_half(model: ir.Model) -> tuple[str, ...]:
    """Turns float32 into float16 in place, between a Cast behind each input and one before each output.

    Constants an operator takes in float32 only (the scales of Resize) stay. Finite constants beyond ±65504 become
    ±65504, as attention masks need.

    Returns:
        What the user should know, one sentence each.

    Raises:
        DeploykitError: names every operator that computes in float32 and has no float16 form.
    """
    graph, opset = model.graph, model.opset_imports[""]
    pinned = _float32_only(graph, opset)
    notes = [*_bake_initializers(graph, pinned), *_subnormal_scales(graph)]
    for node in graph:
        _bake_attributes(node)
        for value in node.outputs:
            if value.dtype == FLOAT:
                value.type = ir.TensorType(HALF)  # the graph that this one was cloned from has the same type object
    for value in graph.inputs:
        if value.dtype == FLOAT:
            _cast_input(graph, value)
    for index, value in enumerate(list(graph.outputs)):
        if value.dtype in (FLOAT, HALF):
            _cast_output(graph, index)
    return tuple(notes)


def _float32_only(graph: ir.Graph, opset: int) -> set[tuple[ir.Node, int]]:
    """The (node, input) pairs that keep a float32 constant; refuses nodes that compute in float32 only."""
    pinned, refused = set(), []
    for node in graph:
        schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=opset)
        for i, value in enumerate(node.inputs):
            if value is None or value.dtype != FLOAT or _takes_half(schema.inputs, i):
                continue
            if constant(value) is None:
                refused.append(f"{node.op_type} (layer '{node.name}')")
            pinned.add((node, i))
        if any(v.dtype == FLOAT and not _takes_half(schema.outputs, i) for i, v in enumerate(node.outputs)):
            refused.append(f"{node.op_type} (layer '{node.name}')")
    if refused:
        raise DeploykitError(
            f"these operators have no float16 form in ONNX operator set {opset}: {'; '.join(dict.fromkeys(refused))}. "
            "Export without fp16 and int8-fp16: give --precision fp32 --precision int8."
        )
    return pinned


def _takes_half(parameters: list[onnx.defs.OpSchema.FormalParameter], index: int) -> bool:
    return "tensor(float16)" in parameters[min(index, len(parameters) - 1)].types


def _bake_initializers(graph: ir.Graph, pinned: set[tuple[ir.Node, int]]) -> list[str]:
    notes = []
    for value in [v for v in graph.initializers.values() if v.dtype == FLOAT]:
        array = constant(value)
        assert array is not None
        half = np.clip(array, -LARGEST, LARGEST, where=np.isfinite(array), out=array.copy()).astype(np.float16)
        cut = int((np.isfinite(array) & (np.abs(array) > LARGEST)).sum())
        if cut:
            notes.append(f"{cut} values of '{value.name}' are beyond what float16 holds and became ±{LARGEST:.0f}")
        baked = add_initializer(graph, f"{value.name}_half", half)
        for node, position in list(value.uses()):
            if (node, position) not in pinned:
                node.replace_input_with(position, baked)
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = baked
        if not list(value.uses()):
            name = value.name or ""
            del graph.initializers[name]
    return notes


def _subnormal_scales(graph: ir.Graph) -> list[str]:
    small = [
        node.name
        for node in graph
        if node.op_type == "QuantizeLinear"
        and (scale := constant(node.inputs[1])) is not None
        and (scale < SMALLEST_NORMAL).any()
    ]
    if not small:
        return []
    return [f"the scales of {', '.join(map(str, small))} are below 2^-14, where float16 loses precision"]


def _bake_attributes(node: ir.Node) -> None:
    """Cast and its like name a type; Constant and ConstantOfShape hold a tensor."""
    for name in ("to", "dtype"):
        if name in node.attributes and node.attributes[name].value == int(FLOAT):
            node.attributes[name] = ir.AttrInt64(name, int(HALF))
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == FLOAT:
            half = attribute.as_tensor().numpy().astype(np.float16)
            node.attributes[name] = ir.AttrTensor(name, ir.tensor(half))


def _cast_input(graph: ir.Graph, value: ir.Value) -> None:
    readers = list(value.uses())
    cast = _cast(value, HALF, f"{value.name}_half")
    for node, position in readers:
        node.replace_input_with(position, cast.outputs[0])
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = cast.outputs[0]
    if len(graph):
        graph.insert_before(graph[0], [cast])
    else:
        graph.append(cast)


def _cast_output(graph: ir.Graph, index: int) -> None:
    value = graph.outputs[index]
    name = value.name
    value.name = f"{name}_half"
    cast = _cast(value, FLOAT, name or "")
    graph.append(cast)
    graph.outputs[index] = cast.outputs[0]


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(dtype))], name=f"{name}_cast")
    result = node.outputs[0]
    result.name, result.dtype, result.shape = name, dtype, value.shape
    return node
