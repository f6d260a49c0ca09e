"""Activations of 4 bits in bytes, as runtimes compute on them.

The hub quantizes them to uint4 (or int4), which saturates by itself. ONNX Runtime reads that, but only where it runs
node by node: its optimizer makes integer kernels of the nodes that have no such type, and its arrays have none either.
So the integers are stored in 8 bits, and a Clip on them saturates: the same integers everywhere, and integer kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from deploykit.hub.graph import take_name
from deploykit.hub.operators import ROLES

WIDE = {TensorProto.UINT4: TensorProto.UINT8, TensorProto.INT4: TensorProto.INT8}
"""Type -> what it is stored in."""
ENDS = {TensorProto.UINT4: (0, 15), TensorProto.INT4: (-8, 7)}
"""Type -> what it holds."""


def widened(model: onnx.ModelProto, fused: bool = False) -> onnx.ModelProto:
    """The model with 8-bit storage in place of 4-bit; itself where it has none. It computes the same integers.

    Args:
        model: not changed.
        fused: the limits of a Relu or Clip in front of a QuantizeLinear become those of the integers, and the value
            between is gone. Rounding is monotonic, so nothing changes. A runtime leaves out what 8 bits keep by
            themselves, but does not know that these integers have 4, and computes the product in front in float.
    """
    narrow = {t.name: t.data_type for t in model.graph.initializer if t.data_type in WIDE}
    if not narrow:
        return model
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    for tensor in graph.initializer:
        if tensor.name in narrow:
            array = arrays[tensor.name].astype(_dtype(narrow[tensor.name]))
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.tensor_type
        kind.elem_type = WIDE.get(kind.elem_type, kind.elem_type)
    _saturate(graph, narrow, _fused_limits(graph, narrow, arrays) if fused else {})
    return made


def _fused_limits(
    graph: onnx.GraphProto, narrow: Mapping[str, int], arrays: Mapping[str, Any]
) -> dict[str, tuple[int, int]]:
    """Takes out every Relu, and Clip with constant limits, that a narrow QuantizeLinear alone reads; returns the limits
    of the integers by that QuantizeLinear's output."""
    found: dict[str, tuple[int, int]] = {}
    writer = {output: node for node in graph.node for output in node.output}
    readers = Counter(name for node in graph.node for name in node.input) + Counter(o.name for o in graph.output)
    for node in list(graph.node):
        if node.op_type != "QuantizeLinear" or node.input[2] not in narrow:
            continue
        before = writer.get(node.input[0])
        if before is None or before.op_type not in ("Relu", "Clip") or readers[node.input[0]] > 1:
            continue
        if any(name and name not in arrays for name in before.input[1:]):
            continue
        scale, zero = arrays[node.input[1]], int(arrays[node.input[2]])
        low, high = (np.rint(np.float32(limit) / scale) + zero for limit in _limits_of(before, arrays))
        lowest, highest = ENDS[narrow[node.input[2]]]
        found[node.output[0]] = int(np.clip(low, lowest, highest)), int(np.clip(high, lowest, highest))
        node.input[0] = before.input[0]
        graph.node.remove(before)
        readers.subtract(before.input)
    for tensor in [t for t in graph.initializer if readers[t.name] <= 0]:
        graph.initializer.remove(tensor)
    return found


def _limits_of(node: onnx.NodeProto, arrays: Mapping[str, Any]) -> tuple[float, float]:
    """What a Relu or a Clip lets through."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    low, high = ([*node.input[1:], "", ""])[:2]
    return float(arrays[low]) if low else -np.inf, float(arrays[high]) if high else np.inf


def _saturate(graph: onnx.GraphProto, narrow: Mapping[str, int], limits: Mapping[str, tuple[int, int]]) -> None:
    """Puts a Clip behind every QuantizeLinear whose zero point was narrow.

    Args:
        graph: changed in place.
        narrow: zero point -> its type.
        limits: output of a QuantizeLinear -> its own limits; the others' are those of the type.
    """
    taken: set[str | None] = {name for node in graph.node for name in (node.name, *node.input, *node.output)}
    held: dict[tuple[int, tuple[int, int]], list[str]] = {}
    nodes: list[onnx.NodeProto] = []
    writer: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        nodes.append(node)
        writer.update(dict.fromkeys(node.output, node))
        if node.op_type != "QuantizeLinear" or node.input[2] not in narrow or _is_moved(node, writer):
            continue
        kind, name = narrow[node.input[2]], node.output[0]
        ends = limits.get(name, ENDS[kind])
        if (kind, ends) not in held:
            held[kind, ends] = _constants(graph, kind, ends, taken)
        node.output[0] = take_name(f"{name}_wide", taken)
        nodes.append(onnx.helper.make_node("Clip", [node.output[0], *held[kind, ends]], [name], name=f"{name}_clip"))
    del graph.node[:]
    graph.node.extend(nodes)


def _is_moved(quantizer: onnx.NodeProto, writer: dict[str, onnx.NodeProto]) -> bool:
    """Whether it quantizes values that were dequantized with the same scale and only moved since."""
    moving = writer.get(quantizer.input[0])
    if moving is None or ROLES.get(moving.op_type) != "moves":
        return False
    before = writer.get(moving.input[0])
    return before is not None and before.op_type == "DequantizeLinear" and before.input[1:] == quantizer.input[1:]


def _constants(graph: onnx.GraphProto, kind: int, ends: tuple[int, int], taken: set[str | None]) -> list[str]:
    """Names of two numbers of a type's storage."""
    names = [take_name("lowest_4", taken), take_name("highest_4", taken)]
    for name, end in zip(names, ends, strict=True):
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(end, _dtype(kind)), name))
    return names


def _dtype(kind: int) -> np.dtype[Any]:
    dtype: np.dtype[Any] = onnx.helper.tensor_dtype_to_np_dtype(WIDE[kind])
    return dtype
