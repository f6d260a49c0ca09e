"""Every operator of the tflite translation table, on random shapes: the float file against ONNX Runtime's float32, the
int8 file against the hub with every Q and DQ on its own, fed with the same inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_cases import IN_FLOAT, MORE
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from operator_cases import CASES, samples
from tflite_graphs import graph, kinds, quantized, reference, steps, written

pytest.importorskip("ai_edge_litert", reason="the extra 'tflite' is not installed")

from deploykit.core.target import QuantSpec
from deploykit.exporters.tflite.operation import uncovered
from deploykit.exporters.tflite.operators import TABLE
from deploykit.exporters.tflite.writer import Quant
from deploykit.hub.graph import Hub

ALL = {**CASES, **MORE, **IN_FLOAT}

LSB = 1.01
"""Least significant bits that an integer result may be off."""


def test_every_operator_of_the_table_has_a_case() -> None:
    assert {name.split()[0] for name in ALL} == set(TABLE)


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ((0.0, np.inf), None),  # the zero point is the smallest int8: saturation is the Relu
        ((0.0, 12.75), None),  # 255 steps of 0.05
        ((0.0, 12.69), (-np.inf, 12.69)),  # rounds to 254 steps, one below the end
        ((0.5, 20.0), (0.5, np.inf)),
        ((-1.0, 1.0), (-np.inf, 1.0)),
    ],
)
def test_limits_are_left_out_only_where_int8_saturates_at_them(
    limits: tuple[float, float], left: tuple[float, float] | None
) -> None:
    assert uncovered(limits, Quant((float(np.float32(0.05)),), -128)) == left
    assert uncovered(limits, None) == limits


many = settings(
    max_examples=5, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip


@pytest.mark.parametrize("name", ALL)
@many
@given(data=st.data())
def test_the_float_file_computes_what_onnx_runtime_computes(name: str, data: Any, tmp_path: Path) -> None:
    nodes, inputs, constants = ALL[name](data.draw)
    made = graph(nodes, inputs, constants)
    fed = samples(data.draw, inputs)
    _, run = written(Hub(made, QuantSpec()), tmp_path, "fp32")
    expected = reference(made.bytes, fed)["y"]
    found = run(fed)["y"]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize("name", [n for n in (*CASES, *MORE) if n not in ("Div", "Cast")])
@many
@given(data=st.data())
def test_the_int8_file_is_at_most_one_step_off_the_hub(name: str, data: Any, tmp_path: Path) -> None:
    nodes, inputs, constants = ALL[name](data.draw)
    fed = samples(data.draw, inputs)
    hub = quantized(graph(nodes, inputs, constants), fed)
    expected = reference(hub.bytes, fed)["y"]
    assume(expected.any())  # a result that is always zero has no scale to speak of
    file, run = written(hub, tmp_path, "int8")
    assert not file.islands
    assert not {"DEQUANTIZE", "DIV"} & set(kinds(tmp_path / file.path))
    found = run(fed)["y"]
    assert found.shape == expected.shape
    assert float(np.abs(found - expected).max()) <= LSB * steps(hub)
