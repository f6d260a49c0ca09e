"""Sizes of tensors that follow from those of others, by ONNX's own inference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploykit.hub.canonical import Dim, dims
from deploykit.hub.graph import LARGE

if TYPE_CHECKING:
    import onnx


def without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with its large constants as inputs: enough for checks and shapes, and it costs no memory."""
    import onnx

    light = onnx.ModelProto(ir_version=proto.ir_version)
    light.opset_import.extend(proto.opset_import)
    light.functions.extend(proto.functions)
    graph = light.graph
    graph.name = proto.graph.name
    graph.node.extend(proto.graph.node)
    graph.output.extend(proto.graph.output)
    graph.value_info.extend(proto.graph.value_info)
    large = [t for t in proto.graph.initializer if int(np.prod(t.dims)) > LARGE]
    heavy = {t.name for t in large}
    graph.input.extend(i for i in proto.graph.input if i.name not in heavy)
    graph.input.extend(onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in large)
    graph.initializer.extend(t for t in proto.graph.initializer if t.name not in heavy)
    return light


def complete_shapes(model: ir.Model) -> None:
    """Sizes that the exporter left open and that follow from the others."""
    import onnx

    open_ = {v.name: v for n in model.graph for v in n.outputs if v.shape is None or any(map(_is_open, dims(v)))}
    if not open_:
        return
    proto = without_weights(ir.to_proto(model))
    known = [info for info in proto.graph.value_info if info.name not in open_]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(known)
    inferred = onnx.shape_inference.infer_shapes(proto)
    for info in inferred.graph.value_info:
        if info.name in open_ and info.type.tensor_type.HasField("shape"):
            sizes = info.type.tensor_type.shape.dim
            open_[info.name].shape = ir.Shape(
                [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in sizes]
            )


def _is_open(size: Dim) -> bool:
    """Whether nothing is known of a size: no number, and no name but one that onnx made up."""
    return size is None or str(size).startswith("unk__")
