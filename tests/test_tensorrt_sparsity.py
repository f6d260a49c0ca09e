"""2:4 zeros from the pass to the bundle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from deploykit import passes, pipeline, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.recipe import Step
from deploykit.exporters import to_tensorrt
from deploykit.exporters.tensorrt.sparsity import lost_zeros, sparse_layers
from deploykit.hub.graph import Hub
from deploykit.hub.lower import lower
from deploykit.hub.quantize import quantize


class Net(nn.Module):
    """Three channels come in, so the first layer cannot have the pattern."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 12, 3, padding=1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.stem(x)))
        return self.fc(torch.relu(self.conv(y)).mean((2, 3)))


ORIN = targets.load("jetson-orin-nano")


def hub(sparse: bool = True) -> Hub:
    data = DataSet.of({"x": np.random.default_rng(0).normal(size=(40, 3, 8, 8)).astype(np.float32)})
    example = next(data.batches(2)).inputs
    net: nn.Module = Net().eval()
    if sparse:
        net = passes.build(Step("semi_structured"))(net, Context(ORIN, {"calibration": data}, example))
    graph = lower(net, example)
    return quantize(graph, pipeline.calibrate(graph, data), ORIN.quant)


def test_every_file_of_a_pruned_network_says_which_layers_have_the_zeros(tmp_path: Path) -> None:
    files = to_tensorrt.export(dict.fromkeys(ORIN.precisions, hub()), ORIN, tmp_path)
    models = json.loads((tmp_path / "bundle.json").read_text())["models"]
    assert {len(about["sparse"]) for about in models.values()} == {2}  # not the stem
    assert all(any(note.startswith("2:4 zeros in ") for note in file.notes) for file in files)


def test_two_of_four_neighbouring_inputs_are_zero_in_the_integers_of_the_file(tmp_path: Path) -> None:
    to_tensorrt.export(dict.fromkeys(ORIN.precisions, hub()), ORIN, tmp_path)
    weights = [
        onnx.numpy_helper.to_array(t)
        for t in onnx.load(tmp_path / "model.int8.onnx").graph.initializer
        if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1 and t.dims[1] > 3
    ]
    assert len(weights) == 2
    for w in weights:
        neighbours = w.reshape(len(w), w.shape[1] // 4, 4, -1)
        assert ((neighbours != 0).sum(axis=2) <= 2).all()


def test_a_dense_network_has_none_and_says_nothing(tmp_path: Path) -> None:
    files = to_tensorrt.export(dict.fromkeys(ORIN.precisions, hub(sparse=False)), ORIN, tmp_path)
    models = json.loads((tmp_path / "bundle.json").read_text())["models"]
    assert all(about["sparse"] == [] for about in models.values())
    assert not any("2:4" in note for file in files for note in file.notes)


def test_zeros_that_are_not_in_the_file_are_an_error(tmp_path: Path) -> None:
    made = hub()
    assert made.quantized is not None
    assert lost_zeros(made.quantized.graph, made) == ()
    proto = ir.to_proto(made.quantized)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1:  # not zero points
            filled = np.maximum(onnx.numpy_helper.to_array(tensor), 1)
            tensor.CopyFrom(onnx.numpy_helper.from_array(filled, tensor.name))
    broken = replace(made, quantized=ir.from_proto(proto))
    with pytest.raises(DeploykitError, match=r"zeros of the pattern 2:4 were filled in \S+, \S+$"):
        to_tensorrt.export(dict.fromkeys(("fp32", "int8"), broken), ORIN, tmp_path)


@pytest.mark.parametrize(
    ("operator", "shape", "axis"),
    [("Conv", (6, 8, 3, 3), 1), ("MatMul", (8, 6), 0), ("Gemm", (8, 6), 0), ("Gemm<transB=1>", (6, 8), 1)],
)
def test_neighbours_are_taken_along_the_inputs_of_every_product(
    operator: str, shape: tuple[int, ...], axis: int
) -> None:
    def found(w: np.ndarray) -> tuple[str, ...]:
        x = "float[1,8,5,5]" if operator == "Conv" else "float[1,8]"
        model = onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["" : 20]> g ({x} x) => (float[] y) {{ y = {operator}(x, w) }}'
        )
        model.graph.node[0].name = "product"
        model.graph.initializer.append(onnx.numpy_helper.from_array(w.astype(np.float32), "w"))
        return sparse_layers(ir.from_proto(model).graph)

    w = np.ones(shape)
    assert found(w) == ()
    w[tuple(slice(1, None, 2) if i == axis else slice(None) for i in range(w.ndim))] = 0  # every second input
    assert found(w) == ("product",)
    w[(0,) * w.ndim] = w[tuple(int(i == axis) for i in range(w.ndim))] = 1  # three of the first four inputs live
    assert found(w) == ()
