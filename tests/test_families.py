"""Networks of every family: what is decided about them, and a handful of the cells of docs/support.md.

All cells: test_support.py, which is slow.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, example

from benchmarks.support import cell
from deploykit.core.target import QuantSpec
from deploykit.hub.graph import FloatGraph, Hub
from deploykit.hub.lower import lower
from deploykit.hub.quantize import quantize
from deploykit.hub.running import session
from deploykit.hub.training.module import HubModule
from deploykit.models import Model
from deploykit.pipeline import calibrate
from deploykit.targets import load

FEW = ("residual", "bert_masked", "lstm", "tabular")
"""Families that between them have every role of the operator table."""


@cache
def lowered_graph(name: str) -> FloatGraph:
    made = example(name)
    return lower(made.module, next(made.data.batches(2)).inputs)


@cache
def hub_of(name: str, target: str = "x86") -> Hub:
    graph, data = lowered_graph(name), example(name).data
    return quantize(graph, calibrate(graph, data.take(slice(0, 16))), load(target).quant)


def test_there_are_fifteen_families_and_more() -> None:
    assert len(FAMILIES) >= 15


def test_a_family_is_the_same_whichever_were_made_before() -> None:
    first = example("gru")
    torch.manual_seed(3)
    example("lstm")
    second = example("gru")
    assert first.data.hash == second.data.hash
    for a, b in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", FEW)
def test_every_float_island_has_a_reason(name: str) -> None:
    for target in ("x86", "jetson"):
        assert all(d.quantized or d.why for d in hub_of(name, target).decisions)


@pytest.mark.parametrize("name", FEW)
def test_the_hub_means_the_same_in_torch(name: str) -> None:
    hub, batch = hub_of(name), next(example(name).data.batches(4)).inputs
    with torch.no_grad():
        found = HubModule(hub)(**{n: torch.from_numpy(a) for n, a in batch.items()})
    run = session(hub.bytes, optimize=False)
    for output, expected in zip(run.get_outputs(), run.run(None, batch), strict=True):
        error = np.square(found[output.name].numpy() - expected).sum() / np.square(expected).sum()
        assert error < 1e-5


def test_attention_is_computed_in_float_between_integer_products() -> None:
    hub = hub_of("bert_masked")
    assert hub.counts()["MatMul"] == 4  # qkv, out, two of the perceptron
    floats = Counter(d.operator for d in hub.decisions if not d.quantized)
    assert (floats["MatMul"], floats["Softmax"], floats["LayerNormalization"]) == (2, 1, 3)


def test_the_residual_stream_of_a_transformer_stays_in_float() -> None:
    assert not [d for d in hub_of("bert_masked").decisions if d.operator == "Add" and d.quantized]


def test_the_residual_stream_of_a_convolutional_network_is_integer() -> None:
    assert [d.quantized for d in hub_of("residual").decisions if d.operator == "Add"] == [True, True]


def test_the_bias_of_a_product_over_positions_is_an_int32_summand_without_rounding_between() -> None:
    hub = hub_of("bert_masked")
    integer = {d.layer for d in hub.decisions if d.quantized and d.operator == "MatMul"}
    assert hub.quantized is not None
    for node in (n for n in hub.quantized.graph if n.name in integer):
        ((reader, _),) = list(node.outputs[0].uses())
        assert reader.op_type == "Add"


def test_what_only_floats_read_is_not_rounded_where_kernels_can_write_floats() -> None:
    """LiteRT's integer products write integers; ONNX Runtime's need not."""
    written = {}
    for target in ("x86", "mobile-arm"):
        quantized = hub_of("bert_masked", target).quantized
        assert quantized is not None
        written[target] = [n for n in quantized.graph if n.op_type == "QuantizeLinear"]
    assert len(written["x86"]) == 5  # the inputs of products
    assert len(written["mobile-arm"]) >= 10  # and their results


def test_recurrent_weights_are_stored_in_int8_with_a_scale_per_gate_and_unit() -> None:
    hub = hub_of("lstm")
    assert hub.quantized is not None
    for node in (n for n in hub.quantized.graph if n.op_type == "LSTM"):
        for value in node.inputs[1:3]:
            dequantize = value.producer()
            assert dequantize is not None and dequantize.op_type == "DequantizeLinear"
            stored, scale = dequantize.inputs[:2]
            assert stored.const_value.dtype.name == "INT8"
            assert scale.shape[0] == 4 * 12
    assert "LSTM" not in hub.counts()


def test_tables_are_stored_in_int8_but_not_for_tensorrt() -> None:
    assert hub_of("bert_masked").counts()["Gather"] == 1
    assert "Gather" not in hub_of("bert_masked", "jetson").counts()


def test_shapes_and_zero_states_are_not_computed() -> None:
    for name in ("lstm", "bert_masked"):
        assert not {"Shape", "Expand", "ConstantOfShape"} & {n.op_type for n in lowered_graph(name).model.graph}


def test_a_norm_at_the_input_stays_in_float() -> None:
    (norm,) = [d for d in hub_of("tabular").decisions if d.operator == "BatchNormalization"]
    assert not norm.quantized and "units of their own" in norm.why


@pytest.mark.parametrize(
    "spec", [QuantSpec(scale="power_of_two"), QuantSpec(activation_signed=True), QuantSpec(weight_bits=7)]
)
def test_every_spec_takes_every_kind_of_operator(spec: QuantSpec) -> None:
    for name in ("lstm", "bert_masked"):
        graph, data = lowered_graph(name), example(name).data
        assert quantize(graph, calibrate(graph, data.take(slice(0, 2))), spec).counts()["Gemm"] == 1


@pytest.mark.parametrize(
    ("family", "exporter"),
    [("lstm", "onnx"), ("lstm", "tflite"), ("lstm", "c99"), ("bert_masked", "tflite"), ("tabular", "tensorrt")],
)
def test_a_cell_is_ok_or_refused_with_a_reason(family: str, exporter: str, tmp_path: Path) -> None:
    if exporter == "tflite":
        pytest.importorskip("ai_edge_litert", reason="the extra 'tflite' is not installed")
    path = tmp_path / "model.onnx"
    path.write_bytes(lowered_graph(family).bytes)
    found = cell(Model(origin=family, onnx=path), example(family), exporter)
    assert found.state == ("refused" if exporter == "c99" else "ok"), found
    assert found.explained, found
