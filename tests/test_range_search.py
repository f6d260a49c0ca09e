"""Activation ranges chosen by the network's outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import graph, images, measured, normal, residual, run
from numpy.typing import NDArray

from deploykit import targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.target import QuantSpec
from deploykit.hub.fitting.range_search import search_ranges
from deploykit.hub.graph import Hub
from deploykit.hub.layers import layers
from deploykit.hub.quantize import quantize
from deploykit.hub.slices import Slicer
from deploykit.passes.fit_ranges import FitRanges


def noise(hub: Hub, data: DataSet) -> float:
    return float(np.square(run(hub.bytes, data, optimize=False)[0] - run(hub.graph.bytes, data)[0]).sum())


def array(hub: Hub, name: str) -> NDArray[Any]:
    return Slicer(onnx.load_model_from_string(hub.bytes)).array(name)


def spiked(spike: float) -> DataSet:
    """Ordinary samples, each with one value far out."""
    x = next(images(32).batches(32)).inputs["x"].copy()
    x[:, 0, 0, 0] = spike
    return DataSet.of({"x": x})


def test_a_range_shrinks_where_what_is_cut_off_does_not_matter() -> None:
    weight = normal(0, 4, 3, 1, 1)
    made = graph(
        """(float[batch,3,8,8] x) => (float[batch,4] y) {
            c = Conv(x, w)
            r = Relu(c)
            k = Clip(r, zero, one)
            m = ReduceMean<keepdims=0>(k, axes)
            y = Gemm<transB=1>(m, v)
        }""",
        w=weight, v=normal(1, 4, 4), axes=np.array([2, 3]), zero=np.float32(0), one=np.float32(1),
    )  # fmt: skip
    data = images(32)
    hub = quantize(made, measured(made, data), replace(QuantSpec(), activation_bits=6))
    found = search_ranges(hub, data, "test")
    assert array(found, "r_scale") < 0.7 * array(hub, "r_scale")  # a Relu whose values above 1 nobody sees


def test_a_range_stays_where_what_would_be_cut_off_decides() -> None:
    made = graph(
        "(float[batch,3,8,8] x) => (float[batch,3,8,8] y) { c = Conv(x, w)\n r = Relu(c)\n y = Mul(r, r) }",
        w=np.eye(3, dtype=np.float32)[:, :, None, None],
    )
    data = spiked(50.0)
    hub = quantize(made, measured(made, data), QuantSpec())
    found = search_ranges(hub, data, "test")
    np.testing.assert_array_equal(array(found, "r_scale"), array(hub, "r_scale"))


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(activation_bits=4),
        QuantSpec(activation_bits=4, activation_signed=True, activation_symmetric=True),
        QuantSpec(activation_bits=5, scale="power_of_two", activation_signed=True, activation_symmetric=True),
    ],
)
def test_the_outputs_are_closer_on_data_never_seen(spec: QuantSpec) -> None:
    made, data, unseen = residual(), spiked(12.0), spiked(11.0)
    hub = quantize(made, measured(made, data), spec)
    found = search_ranges(hub, data, "test")
    assert noise(found, unseen) <= noise(hub, unseen) * (1.0 + 1e-6)
    if spec.scale == "float":
        assert noise(found, unseen) < 0.95 * noise(hub, unseen)


def test_biases_keep_their_values_in_the_new_steps() -> None:
    made, data = residual(), spiked(12.0)
    hub = quantize(made, measured(made, data), QuantSpec(activation_bits=4))
    found = search_ranges(hub, data, "test")
    before, after = (Slicer(onnx.load_model_from_string(h.bytes)) for h in (hub, found))
    changed = 0
    for old, new in zip(layers(before), layers(after), strict=True):
        steps = after.array(after.producer[new.x].input[1]) * after.array(new.weight_scale)
        np.testing.assert_array_equal(after.array(new.bias_scale), steps)
        values = [
            s.array(at.bias) * s.array(at.bias_scale).astype(np.float64) for s, at in ((before, old), (after, new))
        ]
        np.testing.assert_allclose(values[0], values[1], atol=float(steps.max()))
        changed += bool((steps != before.array(old.bias_scale)).any())
    assert changed > 0


def test_outputs_and_operators_with_a_range_of_their_own_keep_it() -> None:
    made = graph(
        """(float[batch,3,8,8] x) => (float[batch,4] y) {
            c = Conv(x, w)
            s = Sigmoid(c)
            m = ReduceMean<keepdims=0>(s, axes)
            y = Gemm<transB=1>(m, v)
        }""",
        w=normal(0, 4, 3, 1, 1), v=normal(1, 4, 4), axes=np.array([2, 3]),
    )  # fmt: skip
    data = spiked(20.0)
    hub = quantize(made, measured(made, data), QuantSpec(activation_bits=5))
    found = search_ranges(hub, data, "test")
    for name in ("s_scale", "y_scale"):
        np.testing.assert_array_equal(array(found, name), array(hub, name))


def test_branches_that_are_joined_keep_the_scale_they_share() -> None:
    made = graph(
        """(float[batch,3,8,8] x) => (float[batch,4] y) {
            a = Conv(x, w)
            b = Conv(x, v)
            j = Concat<axis=1>(a, b)
            m = ReduceMean<keepdims=0>(j, axes)
            y = Gemm<transB=1>(m, u)
        }""",
        w=normal(0, 2, 3, 1, 1), v=normal(1, 2, 3, 1, 1), u=normal(2, 4, 4), axes=np.array([2, 3]),
    )  # fmt: skip
    data = spiked(30.0)
    hub = quantize(made, measured(made, data), QuantSpec(activation_bits=4))
    joined = {
        name for name in ("a_scale", "j_scale") if name in Slicer(onnx.load_model_from_string(hub.bytes)).initializers
    }
    found = search_ranges(hub, data, "test")
    for name in joined:
        np.testing.assert_array_equal(array(found, name), array(hub, name))


def test_the_step_asks_for_calibration_data_and_runs_on_some_of_it() -> None:
    made, data = residual(), spiked(12.0)
    hub = quantize(made, measured(made, data), QuantSpec(activation_bits=4))
    few = FitRanges(samples=8)(hub, Context(targets.load("x86"), {"calibration": data}))
    assert few.bytes == search_ranges(hub, data.spread(8), "test").bytes
    with pytest.raises(ValueError, match="1 or more"):
        FitRanges(samples=0)
