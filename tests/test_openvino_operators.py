"""Every kind of operator on random shapes: the float file against ONNX Runtime's float32, the int8 file against the hub
with every Q and DQ on its own, fed with the same inputs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from operator_cases import CASES, samples
from tflite_graphs import graph, quantized, reference, steps

from deploykit import targets
from deploykit.core.target import QuantSpec
from deploykit.exporters import to_openvino
from deploykit.hub.graph import Hub

if find_spec("openvino") is None:  # a plain import would start OpenVINO's usage statistics
    pytest.skip("the extra 'openvino' is not installed", allow_module_level=True)

many = settings(
    max_examples=3, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip


def written(hub: Hub, folder: Path, precision: Any) -> Any:
    (file,) = to_openvino.export(hub, targets.load("x86-openvino"), folder, [precision])
    return to_openvino.load(folder / file.path)


@pytest.mark.parametrize("name", CASES)
@many
@given(data=st.data())
def test_the_float_file_computes_what_onnx_runtime_computes(name: str, data: Any, tmp_path: Path) -> None:
    nodes, inputs, constants = CASES[name](data.draw)
    made = graph(nodes, inputs, constants)
    fed = samples(data.draw, inputs)
    expected = reference(made.bytes, fed)["y"]
    found = written(Hub(made, QuantSpec()), tmp_path, "fp32")(fed)["y"]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize("name", CASES)
@many
@given(data=st.data())
def test_the_int8_file_is_at_most_one_step_off_the_hub(name: str, data: Any, tmp_path: Path) -> None:
    nodes, inputs, constants = CASES[name](data.draw)
    fed = samples(data.draw, inputs)
    hub = quantized(graph(nodes, inputs, constants), fed)
    expected = reference(hub.bytes, fed)["y"]
    assume(expected.any())  # a result that is always zero has no scale to speak of
    found = written(hub, tmp_path, "int8")(fed)["y"]
    assert found.shape == expected.shape
    assert float(np.abs(found - expected).max()) <= 1.01 * steps(hub)
