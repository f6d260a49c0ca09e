"""Weights of 4 bits and fewer, stored as INT4 in an ONNX file: two in a byte.

A DequantizeLinear may read INT4, but ONNX Runtime 1.31 has no kernel for a product that does, and computes it in float:
4 times as slow as int8 for a convolution. So a Cast to int8 stands between. The runtime computes it when it loads the
file (it folds constants), and then finds the very graph of an int8 file.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx
import onnx_ir as ir

from deploykit.hub.graph import IR_VERSION, OPSET, Hub

BITS = 4
LEAST = 256
"""Weights with fewer values stay in int8: what the Cast takes up is more than they would save."""


def narrow_weights(hub: Hub) -> set[str]:
    """The integer weight initializers of a hub that fit into INT4, by their own bits."""
    return {name for name in hub.weights if hub.spec_of(name).weight_bits <= BITS}


def store_int4(model: onnx.ModelProto, names: Collection[str]) -> tuple[int, int]:
    """Stores initializers as INT4, each behind a Cast to int8 that has its name. Changes the model.

    Args:
        model: Q/DQ graph of any operator set; those of the file rise to 21 if something was stored so.
        names: int8 initializers with values from -8 to 7.

    Returns:
        How many were stored so, and how many values they hold.
    """
    graph = model.graph
    chosen = [t for t in graph.initializer if t.name in names and t.data_type == onnx.TensorProto.INT8]
    chosen = [t for t in chosen if onnx.numpy_helper.to_array(t).size >= LEAST]
    casts, values = [], 0
    for tensor in chosen:
        name, array = tensor.name, onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(ir.to_proto(ir.tensor(array.astype(ir.DataType.INT4.numpy()), name=f"{name}_int4")))
        casts.append(
            onnx.helper.make_node("Cast", [tensor.name], [name], name=f"{name}_cast", to=onnx.TensorProto.INT8)
        )
        values += array.size
    if casts:
        nodes = list(graph.node)
        del graph.node[:]
        graph.node.extend([*casts, *nodes])
        raise_opset(model, OPSET, IR_VERSION)
    return len(casts), values


def raise_opset(model: onnx.ModelProto, opset: int, ir_version: int) -> None:
    """At least this operator set and file version."""
    for imported in model.opset_import:
        if imported.domain == "":
            imported.version = max(imported.version, opset)
    model.ir_version = max(model.ir_version, ir_version)
