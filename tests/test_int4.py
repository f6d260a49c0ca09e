"""Weights of 4 bits and fewer take 4 bits in the file, and the runtime's integer kernels still run."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import graph, images, measured, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto

from deploykit import exporters, targets
from deploykit.core.data import DataSet
from deploykit.core.precision import Precision, spec_of
from deploykit.core.target import QuantSpec
from deploykit.exporters import to_onnx, to_tflite
from deploykit.exporters.int4 import LEAST, store_int4
from deploykit.hub.bits import with_bits
from deploykit.hub.graph import FloatGraph, Hub
from deploykit.hub.quantize import quantize
from deploykit.hub.running import session

X86, MOBILE = targets.load("x86"), targets.load("mobile-arm")


def network(seed: int = 0, channels: int = 32) -> FloatGraph:
    """x [n,3,8,8] -> Conv -> Relu -> Conv -> Relu -> mean -> Gemm -> y [n,9]; enough weights for their bits to show."""
    c = channels
    return graph(
        """(float[batch,3,8,8] x) => (float[batch,9] y) {
            a = Conv<pads=[1,1,1,1]>(x, wa, ba)  r = Relu(a)
            b = Conv<pads=[1,1,1,1]>(r, wb, bb)  s = Relu(b)
            m = ReduceMean<keepdims=0>(s, axes)  y = Gemm<transB=1>(m, wc, bc)
        }""",
        wa=normal(seed, c, 3, 3, 3), ba=normal(seed + 1, c), wb=normal(seed + 2, c, c, 3, 3), bb=normal(seed + 3, c),
        wc=normal(seed + 4, 9, c), bc=normal(seed + 5, 9), axes=np.array([2, 3]),
    )  # fmt: skip


def hub(precision: Precision, made: FloatGraph | None = None, data: DataSet | None = None) -> Hub:
    made, data = made or network(), data or images()
    return quantize(made, measured(made, data), spec_of(QuantSpec(), precision))


def written(found: Hub, folder: Path, precision: Precision) -> onnx.ModelProto:
    (file,) = to_onnx.export({precision: found}, X86, folder)
    return onnx.load(folder / file.path)


def types(model: onnx.ModelProto) -> dict[str, int]:
    return {t.name: t.data_type for t in model.graph.initializer}


def optimized(path: Path, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.mark.parametrize("precision", ["w4a8", "w3a8", "w2a8", "w4a4"])
def test_narrow_weights_take_four_bits_in_an_onnx_file(precision: Precision, tmp_path: Path) -> None:
    found = hub(precision)
    model = written(found, tmp_path, precision)
    assert {t for t in types(model).values()} & {TensorProto.INT4}
    for name in ("wa", "wb", "wc"):
        (stored,) = [t for t in model.graph.initializer if t.name == f"{name}_q_int4"]
        assert stored.data_type == TensorProto.INT4
        count = int(np.prod(stored.dims))
        assert len(stored.raw_data) == -(-count // 2)
    assert model.opset_import[0].version == 21


def test_a_file_of_four_bit_weights_is_half_of_an_int8_file(tmp_path: Path) -> None:
    sizes = {p: len(written(hub(p), tmp_path, p).SerializeToString()) for p in ("int8", "w4a8")}  # type: ignore[arg-type]
    weights = 32 * 27 + 32 * 32 * 9 + 9 * 32
    assert sizes["int8"] - sizes["w4a8"] > 0.48 * weights


def test_the_runtime_computes_four_bit_weights_with_its_integer_kernels(tmp_path: Path) -> None:
    for precision in ("int8", "w4a8", "w4a4"):
        written(hub(precision), tmp_path, precision)  # type: ignore[arg-type]
    eight, four, both = (optimized(tmp_path / f"model.{p}.onnx", tmp_path) for p in ("int8", "w4a8", "w4a4"))
    assert four == eight and four["QLinearConv"] == 2
    assert not {"Conv", "FusedConv", "Gemm", "Cast"} & set(four)
    assert both["QLinearConv"] == 2 and both["Clip"] == 3  # r, s and m are kept within 4 bits
    assert not {"Conv", "FusedConv", "Gemm", "Cast"} & set(both)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.sampled_from(["Relu(a)", "Clip(a, low, high)"]), st.floats(-1, 0), st.floats(0.5, 6))
def test_an_activation_in_front_of_four_bits_becomes_the_limits_of_the_integers(
    seed: int, activation: str, low: float, high: float
) -> None:
    made = graph(
        f"""(float[batch,3,8,8] x) => (float[batch,4,8,8] y) {{
            a = Conv<pads=[1,1,1,1]>(x, wa)  b = {activation}  y = Conv(b, wb)
        }}""",
        wa=normal(seed, 16, 3, 3, 3), wb=normal(seed + 1, 4, 16, 1, 1),
        **({"low": np.float32(low), "high": np.float32(high)} if "Clip" in activation else {}),
    )  # fmt: skip
    found = hub("w4a4", made, images(seed=seed))
    with tempfile.TemporaryDirectory() as folder:
        model = written(found, Path(folder), "w4a4")
        runs = optimized(Path(folder) / "model.w4a4.onnx", Path(folder))
    kinds = [n.op_type for n in model.graph.node]
    assert "Relu" not in kinds and kinds.count("Clip") == 1  # the one behind the QuantizeLinear
    assert runs["QLinearConv"] == 2 and not {"Conv", "FusedConv"} & set(runs)
    assert not {t.name for t in model.graph.initializer} - {name for n in model.graph.node for name in n.input}
    x = {"x": 2 * normal(seed + 2, 4, 3, 8, 8)}
    expected = session(found.bytes, optimize=False).run(None, x)[0]
    np.testing.assert_array_equal(session(model.SerializeToString(), optimize=False).run(None, x)[0], expected)


def test_an_activation_that_somebody_else_reads_stays(tmp_path: Path) -> None:
    made = graph(
        """(float[batch,4,8,8] x) => (float[batch,4,8,8] y, float[batch,4,8,8] b) {
            a = Conv(x, w)  b = Relu(a)  y = Conv(b, w)
        }""",
        w=normal(0, 4, 4, 1, 1),
    )
    data = images(shape=(4, 8, 8))
    found = hub("w4a4", made, data)
    model = written(found, tmp_path, "w4a4")
    x = next(data.batches(16)).inputs
    for ours, theirs in zip(
        session(model.SerializeToString(), optimize=False).run(None, x),
        session(found.bytes, optimize=False).run(None, x), strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(ours, theirs)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_storing_weights_in_four_bits_changes_no_number(data: Any) -> None:
    draw = data.draw
    c, seed = draw(st.integers(1, 40)), draw(st.integers(0, 999))
    precision = draw(st.sampled_from(["w4a8", "w3a8", "w2a8", "w4a4"]))
    found = hub(precision, network(seed, c), images(seed=seed))
    model = onnx.load_model_from_string(found.bytes)
    before = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name in found.weights}
    count, values = store_int4(model, set(found.weights))
    onnx.checker.check_model(model)
    after = {t.name: onnx.numpy_helper.to_array(t).astype(np.int8) for t in model.graph.initializer}
    large = [name for name, array in before.items() if array.size >= LEAST]
    assert (count, values) == (len(large), sum(before[name].size for name in large))
    for name, array in before.items():
        np.testing.assert_array_equal(after[f"{name}_int4" if name in large else name], array)
    x = {"x": normal(seed + 1, 3, 3, 8, 8)}
    expected = session(found.bytes, optimize=False).run(None, x)[0]
    np.testing.assert_array_equal(session(model.SerializeToString(), optimize=False).run(None, x)[0], expected)


def test_a_file_of_mixed_bits_stores_each_weight_by_its_own(tmp_path: Path) -> None:
    mixed = with_bits(hub("int8"), {"b": 4, "y": 2})
    model = written(mixed, tmp_path, "int8")
    kinds = types(model)
    assert kinds["wa_q"] == TensorProto.INT8 and "wa_q_int4" not in kinds
    assert kinds["wb_q_int4"] == kinds["wc_q_int4"] == TensorProto.INT4
    (file,) = to_onnx.export({"int8": mixed}, X86, tmp_path)
    assert "2 of 2 weights of 4 bits and fewer are stored as INT4" in " ".join(file.notes)
    data = next(images().batches(16)).inputs
    expected = session(mixed.bytes, optimize=False).run(None, data)[0]
    np.testing.assert_allclose(
        to_onnx.load(tmp_path / file.path)(data)["y"], expected, atol=0.02 * np.abs(expected).max()
    )


def test_a_table_of_four_bit_rows_is_read_from_the_file(tmp_path: Path) -> None:
    made = graph(
        "(int64[batch,5] ids) => (float[batch,5,16] y) { y = Gather<axis=0>(table, ids) }", table=normal(0, 100, 16)
    )
    ids = DataSet.of({"ids": np.arange(40).reshape(8, 5)})
    found = hub("w4a8", made, ids)
    model = written(found, tmp_path, "w4a8")
    assert types(model)["table_q_int4"] == TensorProto.INT4
    x = next(ids.batches(8)).inputs
    expected = session(found.bytes, optimize=False).run(None, x)[0]
    np.testing.assert_array_equal(to_onnx.load(tmp_path / "model.w4a8.onnx")(x)["y"], expected)


# --------------------------------------------------------------------------------------------------------------- LiteRT


def constants(path: Path) -> dict[str, tuple[str, int, NDArray[Any]]]:
    """Type, number of values and bytes of every stored tensor."""
    from ai_edge_litert import schema_py_generated as schema

    names = {v: k for k, v in vars(schema.TensorType).items() if isinstance(v, int)}
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    return {
        t.name.decode(): (names[t.type], int(np.prod(t.shape)), model.buffers[t.buffer].data)
        for t in model.subgraphs[0].tensors
        if t.buffer and model.buffers[t.buffer].data is not None
    }


def unpacked(data: NDArray[np.uint8], count: int) -> NDArray[np.int8]:
    """The first integer of a byte is its lower half; two's complement."""
    halves = np.stack([data & 0xF, data >> 4], 1).reshape(-1)[:count].astype(np.int8)
    return np.where(halves > 7, halves - 16, halves).astype(np.int8)


@pytest.mark.parametrize("precision", ["w4a8", "w3a8", "w2a8"])
def test_narrow_weights_take_four_bits_in_a_tflite_file(precision: Precision, tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert", reason="the extra 'tflite' is not installed")
    found = hub(precision, network(channels=15))  # an odd number of values
    (file,) = to_tflite.export({precision: found}, MOBILE, tmp_path)
    assert file.notes and "weights are stored in 4 bits" in file.notes[0]
    assert found.quantized is not None
    stored = constants(tmp_path / file.path)
    for name, order in (("wa_q", (0, 2, 3, 1)), ("wb_q", (0, 2, 3, 1)), ("wc_q", (0, 1))):
        kind, count, data = stored[f"{name}_dq"]
        array = found.quantized.graph.initializers[name].const_value.numpy()  # type: ignore[union-attr]
        assert (kind, len(data)) == ("INT4", -(-array.size // 2))
        np.testing.assert_array_equal(unpacked(data, count), array.transpose(order).reshape(-1))


def test_a_tflite_file_of_mixed_bits_stores_each_weight_by_its_own(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert", reason="the extra 'tflite' is not installed")
    mixed = with_bits(hub("int8"), {"b": 4})
    (file,) = to_tflite.export({"int8": mixed}, MOBILE, tmp_path)
    stored = constants(tmp_path / file.path)
    assert [stored[f"{name}_q_dq"][0] for name in ("wa", "wb", "wc")] == ["INT8", "INT4", "INT8"]
    data = next(images().batches(16)).inputs
    expected = session(mixed.bytes, optimize=False).run(None, data)[0]
    found = to_tflite.load(tmp_path / file.path)(data)["y"]
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert exporters.max_mismatch(to_tflite, MOBILE, mixed) == 10.0  # type: ignore[arg-type]
    assert exporters.max_mismatch(to_tflite, MOBILE, hub("int8")) == 0.0  # type: ignore[arg-type]
