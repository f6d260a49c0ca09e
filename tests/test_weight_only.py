"""Weights alone as integers: by hand and against numpy, in the file's bytes, on the road, in little memory."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from conftest import TinyCNN
from graphs import graph, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto

from deploykit import export, exporters, targets
from deploykit.coding import nibbles
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import load_manifest
from deploykit.core.precision import FORMATS, Precision, nearest, needs_calibration, spec_of
from deploykit.core.recipe import Recipe, Step
from deploykit.core.request import Gate, Settings
from deploykit.core.target import QuantSpec
from deploykit.exporters import to_onnx
from deploykit.hub.graph import FloatGraph, Hub
from deploykit.hub.lower import read_onnx
from deploykit.hub.running import lean_session, session
from deploykit.hub.weight_only import quantize_weights, round_lines

X86 = targets.load("x86")
STORED: tuple[Precision, ...] = ("w8", "w4", "dynamic")


def hub(made: FloatGraph, precision: Precision, group: int = 32) -> Hub:
    return quantize_weights(made, spec_of(QuantSpec(weight_group=group), precision))


def product(inputs: int, outputs: int, seed: int = 0, gemm: bool = False) -> FloatGraph:
    """x [n, inputs] -> y [n, outputs]."""
    if gemm:
        text = f"(float[batch,{inputs}] x) => (float[batch,{outputs}] y) {{ y = Gemm<transB=1>(x, w, b) }}"
        return graph(text, w=normal(seed, outputs, inputs), b=normal(seed + 1, outputs))
    text = f"(float[batch,{inputs}] x) => (float[batch,{outputs}] y) {{ y = MatMul(x, w) }}"
    return graph(text, w=normal(seed, inputs, outputs))


def everything(seed: int = 0) -> FloatGraph:
    """A table, two products, one of which has its weight turned, and a convolution."""
    return graph(
        """(int64[batch,5] ids, float[batch,3,8,8] x) => (float[batch,5,48] y, float[batch,20] z) {
            e = Gather<axis=0>(table, ids)  m = MatMul(e, w)  a = Add(m, b)  y = MatMul(a, v)
            c = Conv(x, k)  f = Flatten<axis=1>(c)  z = Gemm<transB=1>(f, u, d)
        }""",
        table=normal(seed, 50, 64), w=normal(seed + 1, 64, 100), b=normal(seed + 2, 100), v=normal(seed + 3, 100, 48),
        k=normal(seed + 4, 12, 3, 3, 3), u=normal(seed + 5, 20, 432), d=normal(seed + 6, 20),
    )  # fmt: skip


def inputs(seed: int = 9) -> dict[str, NDArray[Any]]:
    return {"ids": np.arange(15).reshape(3, 5), "x": normal(seed, 3, 3, 8, 8)}


def answers(model: bytes, x: dict[str, NDArray[Any]], optimize: bool = False) -> list[NDArray[Any]]:
    found: list[NDArray[Any]] = session(model, optimize=optimize).run(None, x)
    return found


def stored(found: Hub) -> dict[str, onnx.TensorProto]:
    return {t.name: t for t in onnx.load_model_from_string(found.bytes).graph.initializer}


def db(signal: NDArray[Any], other: NDArray[Any]) -> float:
    return float(10 * np.log10(np.square(signal).sum() / np.square(signal - other).sum()))


def runs(path: Path) -> Counter[str]:
    """The operators that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(path.with_suffix(".optimized")).graph.node)


# ------------------------------------------------------------------------------------------------------------- rounding


def test_two_groups_of_one_line_worked_out_by_hand() -> None:
    line = np.float32([[7, -3, 0.4, 0.2, 0.7, -0.3, 0.04, 0.02]])
    integers, scales = round_lines(line, 4, 7, (1.0,))
    np.testing.assert_allclose(scales, [[1.0, 0.1]], rtol=1e-6)
    np.testing.assert_array_equal(integers, [[7, -3, 0, 0, 7, -3, 0, 0]])


def test_one_large_weight_is_cut_where_that_makes_the_others_finer() -> None:
    line = np.float32([[7.0] + [2.55, -2.55] * 30])  # 3 steps of 0.85, and 2.55 from the middle of two steps of 1
    integers, scales = round_lines(line, None, 7)
    assert scales[0, 0] < 0.9 and integers[0, 0] == 7
    plain, widest = round_lines(line, None, 7, (1.0,))
    assert widest[0, 0] == 1.0 and plain[0, 0] == 7
    assert np.square(integers * scales - line).sum() < np.square(plain * widest - line).sum()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.integers(1, 5), st.integers(1, 70), st.sampled_from([None, 16, 32]), st.integers(2, 8))
def test_searched_scales_lose_no_more_than_the_largest_magnitude_and_nothing_is_out_of_range(
    seed: int, lines: int, n: int, group: int | None, bits: int
) -> None:
    w, top = normal(seed, lines, n), 2 ** (bits - 1) - 1
    size = min(group or n, n)
    errors = []
    for shrunk in (None, (1.0,)):
        integers, scales = round_lines(w, group, top, *([shrunk] if shrunk else []))
        assert integers.shape == w.shape and scales.shape == (lines, -(-n // size))
        assert np.abs(integers).max() <= top and (scales > 0).all()
        back = integers * np.repeat(scales, size, axis=1)[:, :n]
        errors.append([np.square(back - w)[:, i : i + size].sum() for i in range(0, n, size)])
    assert (np.asarray(errors[0]) <= np.asarray(errors[1]) * (1 + 1e-5) + 1e-9).all()


def test_a_group_of_zeros_and_a_pruned_weight_stay_zero() -> None:
    w = normal(0, 3, 64)
    w[:, :32] = 0
    w[:, 40] = 0
    integers, scales = round_lines(w, 32, 7)
    assert not integers[:, :32].any() and not integers[:, 40].any() and np.isfinite(scales).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-8, 7), min_size=1, max_size=33))
def test_four_bits_are_packed_as_onnx_packs_them(values: list[int]) -> None:
    tensor = TensorProto(name="t", data_type=TensorProto.INT4, dims=[len(values)])
    tensor.raw_data = nibbles.packed(np.asarray(values, np.int8)).tobytes()
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(int), values)


# -------------------------------------------------------------------------------------------------------------- the hub


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 999), st.integers(4, 150), st.integers(2, 40), st.sampled_from([16, 32, 64]),
    st.sampled_from(STORED), st.booleans(),
)  # fmt: skip
def test_a_product_computes_with_the_integers_of_its_blocks(
    seed: int, k: int, n: int, group: int, precision: Precision, gemm: bool
) -> None:
    made = product(k, n, seed, gemm)
    found = hub(made, precision, group)
    model = onnx.load_model_from_string(found.bytes)
    onnx.checker.check_model(model, full_check=True)
    x = {"x": normal(seed + 2, 3, k)}
    expected = answers(made.bytes, x)[0]
    if k * n < 256:
        assert not found.weights and found.decisions[0].why == "it has fewer than 256 weights"
        np.testing.assert_array_equal(answers(found.bytes, x)[0], expected)
        return
    held = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    q, s = held["w_q"].astype(np.float32), held["w_q_scale"]
    assert q.shape == (k, n)  # the kernels' order, whatever it was
    in_groups = precision == "w4" and k > group  # the last group as short as it comes
    assert s.shape == ((-(-k // group), n) if in_groups else (n,))
    real = q * (np.repeat(s, group, axis=0)[:k] if in_groups else s)
    by_hand = x["x"] @ real + (held["b"] if gemm else 0)
    np.testing.assert_allclose(answers(found.bytes, x)[0], by_hand, rtol=1e-4, atol=1e-4)
    assert db(expected, by_hand) > (12 if precision == "w4" else 32)


@pytest.mark.parametrize("precision", STORED)
def test_each_kind_of_weight_is_stored_in_its_own_way(precision: Precision) -> None:
    found = hub(everything(), precision)
    tensors = stored(found)
    narrow = precision == "w4"
    kinds = {name: (tensors[name].data_type, tuple(tensors[name].dims)) for name in found.weights}
    few, many = (TensorProto.INT4 if narrow else TensorProto.INT8), TensorProto.INT8
    assert kinds == {
        "table_q": (few, (50, 2, 32) if narrow else (50, 1, 64)), "w_q": (few, (64, 100)), "v_q": (few, (100, 48)),
        "k_q": (many, (12, 3, 3, 3)), "u_q": (few, (432, 20)),
    }  # fmt: skip
    scales = {name: tuple(tensors[f"{name}_scale"].dims) for name in found.weights}
    assert scales["table_q"] == ((50, 2, 1) if narrow else (50, 1, 1)) and scales["k_q"] == (12,)
    assert scales["v_q"] == ((4, 48) if narrow else (48,))  # 100 = 3 * 32 + 4
    assert found.bits == ({"k_q": 8} if narrow else {})
    assert all(d.quantized for d in found.decisions) and len(found.decisions) == 5
    if narrow:
        assert len(tensors["w_q"].raw_data) == 64 * 100 // 2
    for expected, ours in zip(answers(everything().bytes, inputs()), answers(found.bytes, inputs()), strict=True):
        assert db(expected, ours) > (14 if narrow else 38)


def test_rows_of_a_table_that_groups_do_not_divide_are_one_group() -> None:
    made = graph(
        "(int64[batch,5] ids) => (float[batch,5,40] y) { y = Gather<axis=0>(table, ids) }", table=normal(0, 30, 40)
    )
    found = hub(made, "w4")
    tensors = stored(found)
    assert tuple(tensors["table_q"].dims) == (30, 1, 40) and tuple(tensors["table_q_scale"].dims) == (30, 1, 1)
    ids = np.asarray([[0, 29, 3, 3, 7]])
    q, s = (onnx.numpy_helper.to_array(tensors[n]).astype(np.float32) for n in ("table_q", "table_q_scale"))
    np.testing.assert_allclose(answers(found.bytes, {"ids": ids})[0], (q * s)[ids, 0], rtol=1e-6)


def test_a_weight_that_two_products_read_is_stored_once() -> None:
    made = graph(
        "(float[batch,32] x) => (float[batch,32] y) { a = MatMul(x, w)  r = Relu(a)  y = MatMul(r, w) }",
        w=normal(0, 32, 32),
    )
    found = hub(made, "w4")
    model = onnx.load_model_from_string(found.bytes)
    assert sum(t.data_type == TensorProto.INT4 for t in model.graph.initializer) == 1
    assert sum(n.op_type == "DequantizeLinear" for n in model.graph.node) == 2  # one for each kernel to fuse with


def test_layers_named_by_the_user_stay_in_float() -> None:
    found = quantize_weights(everything(), spec_of(QuantSpec(), "w4"), ["y", "c"])
    assert {d.layer for d in found.decisions if d.why == "kept in float on request"} == {"y", "c"}
    assert {"v", "k"} <= set(stored(found)) and set(found.weights) == {"table_q", "w_q", "u_q"}
    with pytest.raises(DeploykitError, match="no layer 'conv'"):
        quantize_weights(everything(), spec_of(QuantSpec(), "w4"), ["conv"])


def test_a_group_that_no_kernel_reads_is_refused() -> None:
    with pytest.raises(ValueError, match="weight_group must be one of 16, 32, 64, 128, 256"):
        QuantSpec(weight_group=48)


# ------------------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("precision", STORED)
def test_onnx_runtime_reads_the_integers_of_products_and_widens_those_of_convolutions_at_load(
    precision: Precision, tmp_path: Path
) -> None:
    found = hub(everything(), precision)
    (file,) = to_onnx.export({precision: found}, X86, tmp_path)
    onnx.checker.check_model(onnx.load(tmp_path / file.path), full_check=True)
    operators = runs(tmp_path / file.path)
    assert not {"DequantizeLinear", "MatMul", "Gemm", "MatMulInteger"} & set(operators)
    assert operators["Conv"] == 1
    products = operators["DynamicQuantizeMatMul"] + operators["MatMulIntegerToFloat"] + operators["MatMulNBits"]
    assert products == 3 and operators["MatMulNBits"] == (0 if precision == "dynamic" else 3)
    assert file.quantized == {"Conv": 1, "Gather": 1, "Gemm": 1, "MatMul": 2}
    assert any("widens 1 weights of convolutions" in note for note in file.notes)
    for ours, theirs in zip(
        to_onnx.load(tmp_path / file.path)(inputs()).values(), answers(found.bytes, inputs()), strict=True
    ):
        assert db(theirs, ours) > 30  # inputs of products are rounded to 8 bits on the way


def test_dynamic_rounding_by_the_range_of_the_call_worked_out_by_hand(tmp_path: Path) -> None:
    made = graph(
        "(float[batch,16] x) => (float[batch,16] y) { y = MatMul(x, w) }",
        w=(127 * np.eye(16)).astype(np.float32),
    )
    (file,) = to_onnx.export({"dynamic": hub(made, "dynamic")}, X86, tmp_path)
    x = np.linspace(-1, 1.55, 16, dtype=np.float32)[None]  # 255 steps of 0.01: -1 is 0, 0 is 100
    (y,) = to_onnx.load(tmp_path / file.path)({"x": x}).values()
    np.testing.assert_allclose(y / 127, np.rint(x / 0.01) * 0.01, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.integers(16, 100), st.integers(16, 60), st.sampled_from(STORED), st.booleans())
def test_a_file_answers_as_its_hub(seed: int, k: int, n: int, precision: Precision, gemm: bool) -> None:
    found = hub(product(k, n, seed, gemm), precision)
    x = {"x": normal(seed + 3, 5, k)}
    with tempfile.TemporaryDirectory() as folder:
        (file,) = to_onnx.export({precision: found}, X86, Path(folder))
        (ours,) = to_onnx.load(Path(folder) / file.path)(x).values()
    assert db(answers(found.bytes, x)[0], ours) > 30


def test_a_runtime_with_an_older_operator_set_gets_no_blocks(tmp_path: Path) -> None:
    old = replace(X86, opset=20)
    with pytest.raises(DeploykitError, match="reads operator sets up to 20; the w4 graph needs 21"):
        to_onnx.export({"w4": hub(everything(), "w4")}, old, tmp_path)
    to_onnx.export({"w8": hub(everything(), "w8")}, old, tmp_path)


@pytest.mark.parametrize("name", ["tflite", "openvino", "tensorrt", "c99"])
@pytest.mark.parametrize("precision", STORED)
def test_what_an_exporter_does_not_write_is_refused_with_the_nearest(
    name: str, precision: Precision, tmp_path: Path
) -> None:
    exporter = exporters.load(name)
    if precision in exporter.CARRIES:
        pytest.skip("it does")
    target = next(t for t in map(targets.load, targets.names()) if t.exporter == name)
    with pytest.raises(DeploykitError) as error:
        exporters.refuse_uncarried(target, [precision], exporter.CARRIES, exporter.WHY_NOT)
    assert f"does not write {precision} ({exporter.WHY_NOT[precision]})" in str(error.value)
    assert str(error.value).endswith(f"The nearest is --precision {nearest(precision, exporter.CARRIES)}.")


# -------------------------------------------------------------------------------------------------- LiteRT and OpenVINO


@pytest.mark.parametrize("precision", ["w8", "dynamic"])
def test_a_tflite_file_holds_the_integers_of_the_hub(precision: Precision, tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert", reason="the extra 'tflite' is not installed")
    from ai_edge_litert import schema_py_generated as schema

    from deploykit.exporters import to_tflite

    found = hub(everything(), precision)
    (file,) = to_tflite.export({precision: found}, targets.load("mobile-arm"), tmp_path)
    assert file.quantized == {"Conv": 1, "Gather": 1, "Gemm": 1, "MatMul": 2} and file.notes
    model = schema.ModelT.InitFromPackedBuf((tmp_path / file.path).read_bytes())
    main = model.subgraphs[0]
    bytes_of = {t.name.decode(): model.buffers[t.buffer].data for t in main.tensors if t.type == schema.TensorType.INT8}
    for name, order in (("w_q", (1, 0)), ("v_q", (1, 0)), ("k_q", (0, 2, 3, 1))):
        held = onnx.numpy_helper.to_array(stored(found)[name])
        np.testing.assert_array_equal(bytes_of[f"{name}_dq"].view(np.int8), held.transpose(order).reshape(-1))
    codes = [model.operatorCodes[o.opcodeIndex].builtinCode for o in main.operators]
    assert codes.count(schema.BuiltinOperator.DEQUANTIZE) == (0 if precision == "dynamic" else 4)
    x = {name: array[:1] for name, array in inputs().items()}
    run = to_tflite.load(tmp_path / file.path)
    for ours, theirs in zip(run(x).values(), answers(found.bytes, x), strict=True):
        assert db(theirs, ours) > (30 if precision == "dynamic" else 100)  # w8 computes in float


def test_a_depthwise_convolution_stays_in_float_in_a_dynamic_tflite_file(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert", reason="the extra 'tflite' is not installed")
    from deploykit.exporters import to_tflite

    made = graph(
        "(float[batch,32,8,8] x) => (float[batch,32,8,8] y) { y = Conv<pads=[1,1,1,1], group=32>(x, w) }",
        w=normal(0, 32, 1, 3, 3),
    )
    found, x = hub(made, "dynamic"), {"x": normal(1, 1, 32, 8, 8)}
    (file,) = to_tflite.export({"dynamic": found}, targets.load("mobile-arm"), tmp_path)
    (ours,) = to_tflite.load(tmp_path / file.path)(x).values()
    np.testing.assert_allclose(ours, answers(found.bytes, x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("precision", "kind"), [("w8", "i8"), ("w4", "i4")])
def test_openvino_holds_the_integers_of_the_hub(precision: Precision, kind: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")
    from deploykit.exporters import to_openvino

    found = hub(product(128, 48, gemm=True), precision)
    (file,) = to_openvino.export({precision: found}, targets.load("x86-openvino"), tmp_path)
    assert file.quantized == {"Gemm": 1}
    operators = openvino.Core().read_model(str(tmp_path / file.path)).get_ordered_ops()
    constants = [o for o in operators if o.get_type_name() == "Constant"]
    assert kind in {o.get_output_element_type(0).get_type_name() for o in constants}
    x = {"x": normal(3, 2, 128)}
    (ours,) = to_openvino.load(tmp_path / file.path)(x).values()
    assert db(answers(found.bytes, x)[0], ours) > 30


def test_openvino_refuses_groups_that_do_not_divide_the_inputs(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")
    from deploykit.exporters import to_openvino

    with pytest.raises(DeploykitError, match=r"32 does not divide the inputs of y \(100\)"):
        to_openvino.export({"w4": hub(product(100, 48), "w4")}, targets.load("x86-openvino"), tmp_path)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- the road


def test_the_road_without_any_data(tmp_path: Path) -> None:
    settings_ = Settings(precisions=("fp32", *STORED), benchmark=False)
    onnx.save(onnx.load_model_from_string(everything().bytes), tmp_path / "net.onnx")
    found = export(
        str(tmp_path / "net.onnx"), "x86", out=tmp_path / "out", precisions=settings_.precisions, benchmark=False,
        example=inputs(),
    )  # fmt: skip
    manifest = load_manifest(found.folder)
    assert manifest.passed and [f.precision for f in manifest.files] == ["fp32", *STORED]
    for precision in STORED:
        assert FORMATS[precision].kind in ("weights", "dynamic") and not needs_calibration(precision)
        names = {c.name: c for c in manifest.checks if c.precision == precision}
        assert names["integer products"].value == 4
        assert names["file against hub (dB)"].value is not None and names["file against hub (dB)"].passed
        assert names["signal to noise of the worst output (dB)"].passed
    assert not any(f.steps for f in manifest.files)


def test_steps_that_work_on_calibrated_integers_do_not_run_for_weights_alone(tmp_path: Path) -> None:
    torch_net, data = TinyCNN().eval(), normal(0, 20, 3, 16, 16)
    recipe = Recipe((Step("gptq"),))
    found = export(
        torch_net, "x86", data, out=tmp_path / "out", recipe=recipe, precisions=("int8", "w8"), benchmark=False,
        gate=Gate(min_agreement=1.0),
    )  # fmt: skip
    steps = {f.precision: f.steps for f in load_manifest(found.folder).files}
    assert steps["int8"] and not steps["w8"]
    with pytest.raises(DeploykitError, match="works on integers, and for 'x86' only w8 would be written"):
        export(torch_net, "x86", data, out=tmp_path / "b", recipe=recipe, precisions=("w8",), benchmark=False)


# ------------------------------------------------------------------------------------------------ weights beside a file


def beside(folder: Path, made: FloatGraph) -> Path:
    """Saved with its weights in another file."""
    path = folder / "net.onnx"
    onnx.save(
        onnx.load_model_from_string(made.bytes), path, save_as_external_data=True, location="net.bin", size_threshold=64
    )
    return path


def test_large_weights_beside_a_model_stay_there_and_are_read_when_needed(tmp_path: Path) -> None:
    made = everything()
    read = read_onnx(beside(tmp_path, made))
    assert read.hash == made.hash and read.bytes == made.bytes
    lazy = {n for n, v in read.model.graph.initializers.items() if isinstance(v.const_value, ir.LazyTensor)}
    assert lazy == {"table", "w", "v", "u"}  # those with more than 1024 values
    assert hub(read, "w4").bytes == hub(made, "w4").bytes
    found = lean_session(tmp_path / "net.onnx").run(None, inputs())
    for ours, theirs in zip(found, answers(made.bytes, inputs()), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("missing", "the file net.bin with the weights '.*' is missing"),
        ("short", "the file net.bin is too short for the weights '.*'"),
        ("outside", "lie outside its folder"),
    ],
)
def test_weights_that_are_not_all_there_are_refused_at_once(harm: str, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "net"
    folder.mkdir()
    path = beside(folder, everything())
    data = folder / "net.bin"
    if harm == "missing":
        data.unlink()
    elif harm == "short":
        data.write_bytes(data.read_bytes()[:-1000])
    else:
        data.rename(tmp_path / "net.bin")
        data.symlink_to(tmp_path / "net.bin")
    with pytest.raises(DeploykitError, match=f"is not a valid ONNX model: .*{said}"):
        read_onnx(path)


MEASURED = """
import re, sys
import deploykit, onnx, onnxruntime
from deploykit.core.target import QuantSpec
from deploykit.core.precision import spec_of
from deploykit.hub.lower import read_onnx
from deploykit.hub.weight_only import quantize_weights
from pathlib import Path
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
before = peak()
quantize_weights(read_onnx(Path(sys.argv[1])), spec_of(QuantSpec(), "w4"))
print(peak() - before)
"""


def test_quantizing_takes_the_memory_of_one_weight_beside_the_integers(tmp_path: Path) -> None:
    layers, width = 8, 2048  # 134 MB, 17 MB each
    text = "(float[batch,2048] x) => (float[batch,2048] h8) {" + "".join(
        f"h{i + 1} = MatMul({'x' if i == 0 else f'h{i}'}, w{i})" for i in range(layers)
    )
    made = graph(text + "}", **{f"w{i}": normal(i, width, width) for i in range(layers)})
    path = beside(tmp_path, made)
    found = subprocess.run([sys.executable, "-c", MEASURED, path], capture_output=True, text=True, check=True)
    assert 0.1 * 4 * layers * width * width < int(found.stdout) < 0.6 * 4 * layers * width * width
