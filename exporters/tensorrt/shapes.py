"""Binds the batch dimension, so that TensorRT builds for the shapes that will run."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from deploykit.core.errors import DeploykitError


def bind_batch(model: ir.Model, batch: int | None) -> ir.Model:
    """The model with a fixed first dimension, every shape inferred anew.

    A fixed batch lets TensorRT fold shape arithmetic, needs no optimization profile, and is what DLA requires.

    Args:
        model: inputs ``[batch, ...]``, the first dimension symbolic or already fixed; not changed.
        batch: what to fix it to; None leaves it free.

    Raises:
        DeploykitError: another dimension is free.
    """
    free = [
        f"{value.name} {value.shape}"
        for value in model.graph.inputs
        if value.shape is not None and any(not isinstance(d, int) for d in list(value.shape)[1:])
    ]
    if free:
        raise DeploykitError(
            "TensorRT files are written with one free dimension, the batch, which comes first; "
            f"these inputs have others: {', '.join(free)}. Export the model with example inputs of fixed size."
        )
    proto = ir.to_proto(model)
    if batch is not None:
        for info in [*proto.graph.input, *proto.graph.output]:
            dims = info.type.tensor_type.shape.dim
            if dims and not dims[0].HasField("dim_value"):
                dims[0].dim_value = batch
    # Shapes of the hub's tensors name the free batch: inferred anew, they say what this file will run.
    del proto.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    return ir.serde.deserialize_model(inferred)
