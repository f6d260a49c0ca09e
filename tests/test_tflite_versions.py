"""Operator versions against the published rules (tflite/converter/tools/versioning/op_version.cc)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tflite_graphs import Node, graph, kinds, quantized, versions, written

pytest.importorskip("ai_edge_litert", reason="the extra 'tflite' is not installed")

from deploykit.core.precision import spec_of
from deploykit.core.target import QuantSpec
from deploykit.hub.graph import Hub


def normal(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


LINEAR = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
FLOOR = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
AXES = np.array([2, 3])
DOUBLE = np.float32([1, 1, 2, 2])

CASES: dict[str, tuple[Node, dict[str, Any], int, int]] = {
    "CONV_2D": (("Conv", ["x", "w"], ["y"], {}), {"w": normal(8, 4, 1, 1)}, 1, 3),
    "CONV_2D grouped": (("Conv", ["x", "w"], ["y"], {"group": 2}), {"w": normal(8, 2, 1, 1)}, 6, 6),
    "DEPTHWISE_CONV_2D": (("Conv", ["x", "w"], ["y"], {"group": 4}), {"w": normal(4, 1, 1, 1)}, 1, 3),
    "DEPTHWISE_CONV_2D dilated": (
        ("Conv", ["x", "w"], ["y"], {"group": 4, "dilations": [2, 2]}), {"w": normal(4, 1, 2, 2)}, 2, 3,
    ),
    "TRANSPOSE_CONV": (("ConvTranspose", ["x", "w"], ["y"], {}), {"w": normal(4, 2, 2, 2)}, 3, 3),
    "FULLY_CONNECTED keeping axes": (("MatMul", ["x", "w"], ["y"], {}), {"w": normal(6, 3)}, 5, 10),
    "ADD": (("Add", ["x", "x"], ["y"], {}), {}, 1, 2),
    "MEAN": (("ReduceMean", ["x", "a"], ["y"], {}), {"a": AXES}, 1, 2),
    "MAX_POOL_2D": (("MaxPool", ["x"], ["y"], {"kernel_shape": [2, 2]}), {}, 1, 2),
    "LOGISTIC": (("Sigmoid", ["x"], ["y"], {}), {}, 1, 2),
    "HARD_SWISH": (("HardSwish", ["x"], ["y"], {}), {}, 1, 1),
    "RESIZE_BILINEAR": (("Resize", ["x", "", "s"], ["y"], LINEAR), {"s": DOUBLE}, 3, 3),
    "RESIZE_NEAREST_NEIGHBOR": (("Resize", ["x", "", "s"], ["y"], FLOOR), {"s": DOUBLE}, 1, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_version_is_the_lowest_that_has_what_the_operator_uses(name: str, tmp_path: Path) -> None:
    node, constants, in_float, in_int8 = CASES[name]
    made = graph([node], {"x": (4, 6, 6)}, constants)
    kind = name.split()[0]
    file, _ = written(Hub(made, QuantSpec()), tmp_path, "fp32")
    assert versions(tmp_path / file.path)[kind] == in_float
    file, _ = written(quantized(made, {"x": normal(8, 4, 6, 6)}), tmp_path, "int8")
    assert versions(tmp_path / file.path)[kind] == in_int8


def dense(granularity: str, tmp_path: Path) -> dict[str, int]:
    made = graph([("Gemm", ["x", "w"], ["y"], {})], {"x": (6,)}, {"w": normal(6, 3)})
    spec = QuantSpec(weight_granularity=granularity)  # type: ignore[arg-type]
    file, _ = written(quantized(made, {"x": normal(8, 6)}, spec), tmp_path, "int8")
    return versions(tmp_path / file.path)


def test_runtimes_from_before_per_channel_dense_weights_refuse_them(tmp_path: Path) -> None:
    assert dense("channel", tmp_path)["FULLY_CONNECTED"] == 10


def test_dense_weights_with_one_scale_run_everywhere(tmp_path: Path) -> None:
    assert dense("tensor", tmp_path)["FULLY_CONNECTED"] == 4


def test_a_product_that_scales_up_needs_a_version_of_its_own(tmp_path: Path) -> None:
    made = graph([("Mul", ["x", "z"], ["y"], {})], {"x": (4,), "z": (4,)})
    alike = {"x": np.full((2, 4), 0.5, np.float32), "z": np.full((2, 4), 0.5, np.float32)}
    file, _ = written(quantized(made, alike), tmp_path, "int8")
    assert versions(tmp_path / file.path)["MUL"] == 2
    # wide ranges whose product is small: s_x * s_z / s_y > 1
    wide = {"x": np.float32([[200, 0, 0, 0], [1, 1, 1, 1]]), "z": np.float32([[0, 200, 0, 0], [1, 1, 1, 1]])}
    file, _ = written(quantized(made, wide), tmp_path, "int8")
    assert versions(tmp_path / file.path)["MUL"] == 3


def test_transposing_more_than_four_axes_needs_a_newer_version(tmp_path: Path) -> None:
    nodes: list[Node] = [("DepthToSpace", ["x"], ["y"], {"blocksize": 2, "mode": "CRD"})]
    file, _ = written(Hub(graph(nodes, {"x": (8, 3, 5)}), QuantSpec()), tmp_path, "fp32")
    assert "TRANSPOSE" in kinds(tmp_path / file.path)
    assert versions(tmp_path / file.path)["TRANSPOSE"] == 4


NARROW = {"CONV_2D": 7, "CONV_2D grouped": 7, "DEPTHWISE_CONV_2D": 7, "FULLY_CONNECTED keeping axes": 10}
WIDE = {
    "CONV_2D": 4, "CONV_2D grouped": 6, "DEPTHWISE_CONV_2D": 5, "TRANSPOSE_CONV": 3, "FULLY_CONNECTED keeping axes": 10,
    "ADD": 3, "MEAN": 3, "MAX_POOL_2D": 3, "LOGISTIC": 3, "RESIZE_NEAREST_NEIGHBOR": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "expected"), [("w4a8", NARROW), ("w2a8", NARROW), ("int16x8", WIDE)], ids=["w4a8", "w2a8", "int16x8"]
)
def test_other_widths_need_newer_versions(precision: Any, expected: dict[str, int], tmp_path: Path) -> None:
    for name, version in expected.items():
        node, constants, *_ = CASES[name]
        made = quantized(
            graph([node], {"x": (4, 6, 6)}, constants), {"x": normal(8, 4, 6, 6)}, spec_of(QuantSpec(), precision)
        )
        file, _ = written(made, tmp_path, precision)
        assert versions(tmp_path / file.path)[name.split()[0]] == version, name
