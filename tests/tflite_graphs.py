"""Small ONNX graphs and their hubs, for the tests of the tflite exporter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from deploykit import targets
from deploykit.core.data import DataSet
from deploykit.core.target import QuantSpec
from deploykit.exporters import to_tflite
from deploykit.hub.graph import FloatGraph, Hub
from deploykit.hub.quantize import quantize
from deploykit.hub.running import session
from deploykit.pipeline import calibrate

Node = tuple[str, Sequence[str], Sequence[str], Mapping[str, Any]]
"""Operator, input names, output names, attributes."""


def graph(
    nodes: Sequence[Node],
    inputs: Mapping[str, Sequence[int]],
    constants: Mapping[str, NDArray[Any]] | None = None,
    outputs: Sequence[str] = ("y",),
) -> FloatGraph:
    """A float graph; ``inputs`` maps names to shapes without the batch, which stays free."""
    made = helper.make_model(
        helper.make_graph(
            [
                helper.make_node(kind, list(reads), list(writes), name=f"{writes[0]}_node", **attributes)
                for kind, reads, writes, attributes in nodes
            ],
            "test",
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", *shape]) for n, shape in inputs.items()],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
            [numpy_helper.from_array(np.array(array, order="C"), n) for n, array in (constants or {}).items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    model = ir.from_proto(onnx.shape_inference.infer_shapes(made, strict_mode=True, data_prop=True))
    return FloatGraph(model)


def quantized(float_graph: FloatGraph, data: Mapping[str, NDArray[Any]], spec: QuantSpec | None = None) -> Hub:
    """The hub of a graph calibrated (min-max) on arrays ``[n, ...]`` by input name."""
    return quantize(float_graph, calibrate(float_graph, DataSet.of(data)), spec or QuantSpec())


def reference(model: bytes, data: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """What ONNX Runtime computes, every Q and DQ on its own."""
    run = session(model, optimize=False)
    return dict(zip([o.name for o in run.get_outputs()], run.run(None, dict(data)), strict=True))


def written(hub: Hub, folder: Path, precision: Any) -> Any:
    """Exports one precision; gives the `File` and its runner."""
    (file,) = to_tflite.export({precision: hub}, targets.load("mobile-arm"), folder)
    return file, to_tflite.load(folder / file.path)


def kinds(path: Path) -> list[str]:
    """The builtin operators of a file, in order, read back with the schema's own reader."""
    from ai_edge_litert import schema_py_generated as schema

    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    return [names[model.operatorCodes[op.opcodeIndex].builtinCode] for op in model.subgraphs[0].operators]


def versions(path: Path) -> dict[str, int]:
    """Builtin operator -> the version the file asks for."""
    from ai_edge_litert import schema_py_generated as schema

    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    return {names[code.builtinCode]: code.version for code in model.operatorCodes}


def steps(hub: Hub, output: str = "y") -> float:
    """The scale of a quantized graph's output: one least significant bit."""
    assert hub.quantized is not None
    (value,) = (v for v in hub.quantized.graph.outputs if v.name == output)
    producer = value.producer()
    assert producer is not None and producer.op_type == "DequantizeLinear"
    scale = producer.inputs[1]
    assert scale is not None and scale.const_value is not None
    return float(scale.const_value.numpy())
