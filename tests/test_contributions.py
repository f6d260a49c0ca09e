"""What every weight and every tensor adds to the error of the answers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import images, measured, residual

from deploykit import passes, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.manifest import Layer
from deploykit.core.recipe import Step
from deploykit.core.target import QuantSpec
from deploykit.hub.analysis.contributions import contributions, owners, whole
from deploykit.hub.analysis.sizes import described
from deploykit.hub.quantize import quantize
from deploykit.hub.running import session


def noise(model: onnx.ModelProto, graph, data: DataSet) -> float:
    """d of a whole model against the float graph, on all samples at once."""
    batch = next(data.batches(len(data))).inputs
    z, other = (session(m).run(None, batch) for m in (graph.bytes, model.SerializeToString()))
    return sum(
        float(np.square(b - a, dtype=np.float64).sum() / np.square(a, dtype=np.float64).sum())
        for a, b in zip(z, other, strict=True)
    )


def test_a_tensors_contribution_is_that_of_a_float_network_with_one_pair_of_nodes_in_it() -> None:
    graph, data = residual(), images(6)
    hub = quantize(graph, measured(graph, data), QuantSpec())
    q = onnx.load_model_from_string(hub.bytes)
    constants = {t.name: t for t in q.graph.initializer}
    found = {c.tensor: c for c in contributions(hub, data) if c.part == "values"}
    assert set(found) == {"x", "r", "b", "t", "m", "y"}
    for tensor, contribution in found.items():
        model = onnx.load_model_from_string(graph.bytes)
        quantizer = next(
            n for n in q.graph.node if n.op_type == "QuantizeLinear" and n.input[0] in (tensor, f"{tensor}_float")
        )
        scale, zero = (constants[i] for i in quantizer.input[1:3])
        model.graph.initializer.extend([scale, zero])
        inner = f"{tensor}_exact"
        for node in model.graph.node:
            for names in (node.output, node.input) if tensor != "x" else (node.input,):
                for i, name in enumerate(names):
                    if name == tensor:
                        names[i] = inner if names is node.output else f"{tensor}_rounded"
        writer = next((i for i, n in enumerate(model.graph.node) if inner in n.output), -1)
        end = tensor if tensor == "y" else f"{tensor}_rounded"
        pair = [
            onnx.helper.make_node(
                "QuantizeLinear", [inner if tensor != "x" else "x", scale.name, zero.name], ["integers"]
            ),
            onnx.helper.make_node("DequantizeLinear", ["integers", scale.name, zero.name], [end]),
        ]
        for i, node in enumerate(pair):
            model.graph.node.insert(writer + 1 + i, node)
        assert contribution.noise == pytest.approx(noise(model, graph, data), rel=1e-3), tensor
        assert contribution.layer == {"x": "x", "r": "a", "b": "b", "t": "s", "m": "m", "y": "y"}[tensor]


def test_a_weights_contribution_is_that_of_a_float_network_with_this_weight_rounded_and_its_mean_kept() -> None:
    graph, data = residual(), images(6)
    hub = quantize(graph, measured(graph, data), QuantSpec(weight_bits=4))
    q = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load_model_from_string(hub.bytes).graph.initializer}
    batch = next(data.batches(len(data))).inputs
    for c in (c for c in contributions(hub, data) if c.part == "weights"):
        model = onnx.load_model_from_string(graph.bytes)
        weight = next(t for t in model.graph.initializer if t.name == c.tensor)
        integers, scale = q[f"{c.tensor}_q"], q[f"{c.tensor}_q_scale"]
        real = (integers * scale.reshape(-1, *[1] * (integers.ndim - 1))).astype(np.float32)
        weight.CopyFrom(onnx.numpy_helper.from_array(real, c.tensor))
        node = next(n for n in model.graph.node if n.name == c.layer)
        exposed = [onnx.load_model_from_string(m) for m in (graph.bytes, model.SerializeToString())]
        means = []
        for each in exposed:  # the mean of the layer's output, in front of what is behind it
            del each.graph.output[:]
            each.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], 1, None))
            y = session(each).run(None, batch)[0]
            means.append(y.mean(axis=tuple(i for i in range(y.ndim) if i != 1)))
        bias = next(t for t in model.graph.initializer if t.name == node.input[2])
        shifted = onnx.numpy_helper.to_array(bias) + means[0] - means[1]
        bias.CopyFrom(onnx.numpy_helper.from_array(shifted.astype(np.float32), bias.name))
        assert c.noise == pytest.approx(noise(model, graph, data), rel=2e-3), c.layer


def test_contributions_add_up_to_about_what_the_hub_loses() -> None:
    """Errors of different places are independent of each other on the average, not in every small network."""
    ratios = []
    for seed in range(8):
        graph, data = residual(seed), images(24, seed)
        hub = quantize(graph, measured(graph, data), QuantSpec())
        hub = passes.build(Step("bias_correct"))(hub, Context(targets.load("x86"), {"calibration": data}))
        ratios.append(sum(c.noise for c in contributions(hub, data)) / whole(hub, data))
    assert 0.75 < np.median(ratios) < 1.33
    assert min(ratios) > 0.3 and max(ratios) < 3


def test_what_runs_together_belongs_to_the_first_of_it() -> None:
    assert {t: owners(residual())[t] for t in ("a", "r", "b", "s", "t")} == {
        "a": "a", "r": "a", "b": "b", "s": "s", "t": "s"
    }  # fmt: skip


def test_sizes_are_those_of_the_weights() -> None:
    graph = residual()
    hub = quantize(graph, measured(graph, images()), QuantSpec())
    assert described(hub) == (
        Layer("a", "Conv", 3, 4, 108), Layer("b", "Conv", 4, 4, 144), Layer("s", "Add"), Layer("m", "ReduceMean"),
        Layer("y", "Gemm", 4, 4, 16),
    )  # fmt: skip
