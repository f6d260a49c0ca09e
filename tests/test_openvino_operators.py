"""Every kind of operator on random shapes: the float file against ONNX Runtime's float32, the int8 file against the hub
with every Q and DQ on its own, fed with the same inputs."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from operator_cases import CASES, samples
from tflite_graphs import graph, quantized, reference, steps

if find_spec("openvino") is None:  # importing it here would start its usage statistics
    pytest.skip("the extra 'openvino' is not installed", allow_module_level=True)

from deploykit import targets
from deploykit.exporters import to_openvino
from deploykit.hub.graph import Hub, constant

LSB = 1.01
"""Least significant bits that an integer result may be off."""


def on_grid(hub: Hub, fed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The inputs as the hub's integers hold them: how a runtime rounds ties of its input is not the question."""
    assert hub.quantized is not None
    found = dict(fed)
    for node in hub.quantized.graph:
        name = node.inputs[0].name if node.op_type == "QuantizeLinear" and node.inputs[0] is not None else None
        if name in fed:
            scale, zero = constant(node.inputs[1]), constant(node.inputs[2])
            assert scale is not None and zero is not None
            integers = np.clip(np.rint(fed[name] / scale) + zero, 0, 255) - zero
            found[name] = (integers * scale).astype(np.float32)
    return found


def compare(name: str, data: Any, folder: Path) -> None:
    nodes, inputs, constants = CASES[name](data.draw)
    fed = samples(data.draw, inputs)
    hub = quantized(graph(nodes, inputs, constants), fed)
    adds_to_one = name == "Pad" and inputs["x"][0] == 1 and any(constants["p"].reshape(2, 4)[:, 1])
    assume(not adds_to_one)  # refused: the runtime computes it wrong
    fp32, int8 = to_openvino.export(dict.fromkeys(("fp32", "int8"), hub), targets.load("x86-openvino"), folder)
    expected = reference(hub.graph.bytes, fed)["y"]
    found = to_openvino.load(folder / fp32.path)(fed)["y"]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * max(1.0, float(np.abs(expected).max())))
    fed = on_grid(hub, fed)
    expected = reference(hub.bytes, fed)["y"]
    assume(expected.any())  # a result that is always zero has no scale to speak of
    found = to_openvino.load(folder / int8.path)(fed)["y"]
    assert float(np.abs(found - expected).max()) <= LSB * steps(hub)


def times(examples: int) -> settings:
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
    )  # fmt: skip


INTEGER = [name for name in CASES if name != "Div"]


@pytest.mark.parametrize("name", INTEGER)
@times(2)
@given(data=st.data())
def test_both_files_compute_what_the_hub_computes(name: str, data: Any, tmp_path: Path) -> None:
    compare(name, data, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", INTEGER)
@times(25)
@given(data=st.data())
def test_both_files_compute_what_the_hub_computes_on_many_shapes(name: str, data: Any, tmp_path: Path) -> None:
    compare(name, data, tmp_path)
