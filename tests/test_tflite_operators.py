"""Every operator of the tflite translation table, on random shapes: the float file against ONNX Runtime's float32, the
integer files against their hub with every Q and DQ on its own, fed with the same inputs."""

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

from deploykit import targets
from deploykit.core.precision import spec_of
from deploykit.core.target import QuantSpec
from deploykit.exporters import to_tflite
from deploykit.exporters.tflite.operation import uncovered
from deploykit.exporters.tflite.operators import NO_INT16, TABLE
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


def test_limits_count_in_sixteen_bits_too() -> None:
    wide = Quant((2.0**-12,), 0, dtype="int16")  # -8 to 8
    assert uncovered((0.0, 6.0), wide) == (0.0, 6.0)
    assert uncovered((-8.0, 8.0), wide) is None


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


PRODUCTS = ("Conv", "Gemm", "MatMul")
INTEGER = [n for n in (*CASES, *MORE) if n not in ("Div", "Cast")]


@pytest.mark.parametrize("name", [n for n in INTEGER if n.startswith(PRODUCTS)])
@pytest.mark.parametrize("precision", ["w4a8", "w2a8"])
@many
@given(data=st.data())
def test_a_file_of_narrow_weights_is_at_most_one_step_off_the_hub(
    name: str, precision: Any, data: Any, tmp_path: Path
) -> None:
    nodes, inputs, constants = ALL[name](data.draw)
    fed = samples(data.draw, inputs)
    hub = quantized(graph(nodes, inputs, constants), fed, spec_of(QuantSpec(), precision))
    expected = reference(hub.bytes, fed)["y"]
    assume(expected.any())
    file, run = written(hub, tmp_path, precision)
    assert not file.islands
    several = 2 if name == "Gemm of a flattened image" else 1  # a convolution comes first
    assert float(np.abs(run(fed)["y"] - expected).max()) <= several * LSB * steps(hub)


@pytest.mark.parametrize("name", INTEGER)
@many
@given(data=st.data())
def test_the_16_bit_file_is_as_near_to_the_hub_as_its_kernels_are(name: str, data: Any, tmp_path: Path) -> None:
    nodes, inputs, constants = ALL[name](data.draw)
    fed = samples(data.draw, inputs)
    hub = quantized(graph(nodes, inputs, constants), fed, spec_of(QuantSpec(), "int16x8"))
    expected = reference(hub.bytes, fed)["y"]
    assume(expected.any())
    file, run = written(hub, tmp_path, "int16x8")
    in_float = name in NO_INT16 or name == "Resize bilinear"
    assert [island.operator for island in file.islands] == ([nodes[0][0]] if in_float else [])
    from_table = name in ("Softmax", "Sigmoid", "Tanh")
    several = 5 if name == "Gemm of a flattened image" else 1  # steps of the convolution in front, summed up
    allowed = to_tflite.max_lsb(targets.load("mobile-arm"), hub) if from_table else several * LSB
    assert float(np.abs(run(fed)["y"] - expected).max()) <= allowed * steps(hub)
