"""Whatever an exporter writes is packed and comes back bit by bit, every precision and every file beside it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import graph, images, measured, normal

from deploykit import exporters, targets
from deploykit.core.errors import MissingExtra
from deploykit.core.precision import Precision, is_quantized, spec_of
from deploykit.core.target import Target
from deploykit.dkz.extents import KNOWN, files_of
from deploykit.dkz.files import Packed, pack_file, unpack_file
from deploykit.hub.graph import FloatGraph, Hub
from deploykit.hub.quantize import quantize
from deploykit.hub.weight_only import quantize_weights

TARGETS = {
    "onnx": "x86",
    "tflite": "mobile-arm",
    "openvino": "x86-openvino",
    "tensorrt": "gpu-h200",
    "c99": "cortex-m4",
}


@cache
def network() -> FloatGraph:
    """x [n,3,8,8] -> Conv -> Relu -> Conv -> Relu -> mean -> Gemm -> y [n,10]; its last weight has few values."""
    few = np.where(np.abs(wide := normal(4, 10, 64)) > 1, np.round(2 * wide) / 2, 0).astype(np.float32)
    return graph(
        """(float[batch,3,8,8] x) => (float[batch,10] y) {
            a = Conv<pads=[1,1,1,1]>(x, wa, ba)  r = Relu(a)
            b = Conv<pads=[1,1,1,1]>(r, wb, bb)  s = Relu(b)
            m = ReduceMean<keepdims=0>(s, axes)  y = Gemm<transB=1>(m, wc, bc)
        }""",
        wa=normal(0, 16, 3, 3, 3), ba=normal(1, 16), wb=normal(2, 64, 16, 3, 3), bb=normal(3, 64), wc=few,
        bc=normal(5, 10), axes=np.array([2, 3]),
    )  # fmt: skip


def hub(target: Target, precision: Precision) -> Hub:
    if not is_quantized(precision):
        return Hub(network(), target.quant)
    spec = spec_of(target.quant, precision)
    if spec.placement == "weights":
        return quantize_weights(network(), spec)
    return quantize(network(), measured(network(), images()), spec)


def export(name: str, folder: Path) -> list[Path]:
    """Every file of an artifact with all precisions that the exporter writes."""
    exporter, target = exporters.load(name), targets.load(TARGETS[name])
    try:
        exporter.export({p: hub(target, p) for p in exporter.CARRIES}, target, folder)
    except MissingExtra as missing:
        pytest.skip(str(missing))
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_an_artifact_of_every_exporter_is_packed() -> None:
    assert sorted(TARGETS) == exporters.names()


@pytest.mark.parametrize("name", TARGETS)
def test_every_file_of_an_artifact_comes_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    written = export(name, tmp_path / "artifact")
    assert written
    for i, path in enumerate(written):
        packed = pack_file(path, tmp_path / f"{i}.dkz")
        unpack_file(packed.path, tmp_path / str(i))
        for file in packed.names:
            assert (tmp_path / str(i) / file).read_bytes() == (path.parent / file).read_bytes(), path
        assert sum(row.coded for row in packed.layers) == packed.stored == packed.path.stat().st_size
        assert sum(row.before for row in packed.layers) == packed.whole
        if path.suffix in KNOWN:
            assert_weights_are_found(path, packed)


@pytest.mark.parametrize("name", ["onnx", "openvino", "tflite"])
def test_kernels_lie_together_whatever_the_layout_of_the_runtime(name: str, tmp_path: Path) -> None:
    exporter, target = exporters.load(name), targets.load(TARGETS[name])
    try:
        exporter.export({"fp32": hub(target, "fp32")}, target, tmp_path)
    except MissingExtra as missing:
        pytest.skip(str(missing))
    (path,) = [path for path in tmp_path.rglob("*") if path.suffix in KNOWN]
    laid = [
        e.shape.together(e.values(file.elements(e)))
        for file in files_of(path)
        for e in file.extents
        if e.shape is not None and e.shape.kernel == 9
    ]
    for weight in (normal(0, 16, 3, 3, 3), normal(2, 64, 16, 3, 3)):
        assert any(np.array_equal(own, weight.reshape(len(weight), -1)) for own in laid)


def assert_weights_are_found(path: Path, packed: Packed) -> None:
    """By their names; half a byte of each at least."""
    names = {row.name for row in packed.layers[:-1]}
    assert "" not in names and names <= known_names(path)
    assert packed.whole - packed.layers[-1].before >= (16 * 3 * 9 + 64 * 16 * 9 + 10 * 64) / 2


def known_names(path: Path) -> set[str]:
    """What the runtime's own reader calls constants."""
    return {".onnx": _of_onnx, ".xml": _of_openvino, ".tflite": _of_tflite}[path.suffix](path)


def _of_onnx(path: Path) -> set[str]:
    import onnx_ir

    return set(onnx_ir.load(path).graph.initializers)


def _of_openvino(path: Path) -> set[str]:
    import openvino

    ops: Any = openvino.Core().read_model(path).get_ops()
    return {op.get_friendly_name() for op in ops if op.get_type_name() == "Constant"}


def _of_tflite(path: Path) -> set[str]:
    from ai_edge_litert.interpreter import Interpreter

    return {tensor["name"] for tensor in Interpreter(str(path)).get_tensor_details()}
