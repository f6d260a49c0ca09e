"""Weights that share few values, stored in an ONNX file as a codebook and an index for each.

A float32 weight becomes ``Gather(codebook, Cast(indices))``: a byte for each of its elements, or half of one. Both
operators read constants alone, so ONNX Runtime computes them when it loads the file (it folds constants) and then finds
the very graph of the plain file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from deploykit.exporters.int4 import raise_opset
from deploykit.hub.graph import IR_VERSION, LARGE, OPSET, take_name
from deploykit.hub.sharing.codebooks import codebook

MOST = 256
"""Values that an index of 8 bits tells apart."""
FEW = 16
"""And one of 4 bits."""


def store_codebooks(model: onnx.ModelProto, opset: int) -> tuple[str, ...]:
    """Stores float32 initializers with few values as codebook and indices, where that takes less. Changes the model.

    The nodes that take their place give the same values bit for bit, under their names.

    Args:
        model: a float graph; its operator set rises to 21 if indices of 4 bits are stored.
        opset: what the target reads: below 21 there are no 4-bit types, and all indices are bytes.

    Returns:
        What the user should know: nothing, if nothing was stored so.
    """
    graph = model.graph
    fed = {value.name for value in graph.input}  # what the caller may replace is no constant
    taken: set[str | None] = {*fed, *(t.name for t in graph.initializer)}
    taken |= {name for node in graph.node for name in (node.name, *node.output)}
    kept, nodes, before, after = list[Any](), list[Any](), 0, 0
    for tensor in graph.initializer:
        tensors, widening = _stored(tensor, opset, taken) if tensor.name not in fed else ([], [])
        size = sum(made.ByteSize() for made in (*tensors, *widening))
        if 0 < size < tensor.ByteSize():
            kept, nodes = kept + tensors, nodes + widening
            before, after = before + tensor.ByteSize(), after + size
        else:
            kept.append(tensor)
    if not nodes:
        return ()
    count = len(kept) - len(graph.initializer)  # one initializer became two
    if any(tensor.data_type == onnx.TensorProto.UINT4 for tensor in kept):
        raise_opset(model, OPSET, IR_VERSION)
    nodes += graph.node
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)
    return (
        f"{count} weights with at most {MOST} values each are stored as codebooks and indices, {after:,} of {before:,} "
        "bytes; ONNX Runtime widens them to float when it loads the file: smaller on disk, neither faster nor smaller "
        "in memory",
    )


def _stored(tensor: onnx.TensorProto, opset: int, taken: set[str | None]) -> tuple[list[Any], list[Any]]:
    """The initializers that a weight may be stored as, and the nodes that widen them; none, if it has no codebook."""
    if tensor.data_type != onnx.TensorProto.FLOAT or int(np.prod(tensor.dims)) <= LARGE:
        return [], []
    found = codebook(onnx.numpy_helper.to_array(tensor), MOST)
    if found is None:
        return [], []
    values, indices = found.book, found.codes.astype(np.uint8)
    kind = ir.DataType.UINT4 if len(values) <= FEW and opset >= OPSET else ir.DataType.UINT8
    book, codes, index = (take_name(f"{tensor.name}_{what}", taken) for what in ("codebook", "indices", "index"))
    widened = take_name(f"{tensor.name}_values", taken)
    return [
        ir.to_proto(ir.tensor(values, name=book)),
        ir.to_proto(ir.tensor(indices.astype(kind.numpy()), name=codes)),
    ], [
        onnx.helper.make_node("Cast", [codes], [index], name=index, to=onnx.TensorProto.INT32),
        onnx.helper.make_node("Gather", [book, index], [tensor.name], name=widened),
    ]
