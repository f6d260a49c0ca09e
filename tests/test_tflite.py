from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyCNN
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tflite_graphs import Node, graph, kinds, quantized, reference, versions, written

pytest.importorskip("ai_edge_litert", reason="the extra 'tflite' is not installed")

from deploykit import targets
from deploykit.core.errors import DeploykitError, MissingExtra
from deploykit.core.target import QuantSpec
from deploykit.exporters import to_tflite
from deploykit.exporters.tflite.runner import ungreeted
from deploykit.hub.graph import FloatGraph, Hub, constant
from deploykit.hub.lower import lower

INDEX = np.int64


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def float_hub(
    nodes: list[Node], inputs: Mapping[str, tuple[int, ...]], outputs: tuple[str, ...] = ("y",), **constants: Any
) -> Hub:
    return Hub(graph(nodes, inputs, constants, outputs), QuantSpec())


def complaint(hub: Hub, folder: Path) -> str:
    with pytest.raises(DeploykitError) as caught:
        written(hub, folder, "int8" if hub.quantized is not None else "fp32")
    assert list(folder.iterdir()) == []
    return str(caught.value)


@pytest.fixture(scope="module")
def cnn_hub() -> Hub:
    """x [n,3,16,16]: a strided convolution, a residual block, a mean, a dense layer -> output [n,10]."""
    nodes: list[Node] = [
        ("Conv", ["x", "w1", "b1"], ["c1"], {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ("Relu", ["c1"], ["r1"], {}),
        ("Conv", ["r1", "w2"], ["c2"], {"pads": [1, 1, 1, 1]}),
        ("Add", ["c2", "r1"], ["s"], {}),
        ("Relu", ["s"], ["r2"], {}),
        ("ReduceMean", ["r2", "axes"], ["m"], {"keepdims": 0}),
        ("Gemm", ["m", "w3"], ["output"], {"transB": 1}),
    ]
    constants = {
        "w1": normal(1, 8, 3, 3, 3), "b1": normal(2, 8), "w2": normal(3, 8, 8, 3, 3), "w3": normal(4, 10, 8),
        "axes": np.array([2, 3]),
    }  # fmt: skip
    return quantized(graph(nodes, {"x": (3, 16, 16)}, constants, ("output",)), {"x": normal(0, 16, 3, 16, 16)})


def test_a_network_is_written_in_three_precisions_that_agree_with_the_model(tiny_cnn: TinyCNN, tmp_path: Path) -> None:
    data = {"x": normal(0, 16, 3, 16, 16)}
    hub = quantized(lower(tiny_cnn, {"x": data["x"][:2]}), data)
    x = normal(1, 5, 3, 16, 16)
    expected = tiny_cnn(torch.from_numpy(x)).detach().numpy()
    tolerance = {"fp32": 1e-5, "fp16": 1e-2, "int8": 0.1}
    files = to_tflite.export(dict.fromkeys(("fp32", "fp16", "int8"), hub), targets.load("mobile-arm"), tmp_path)
    assert [f.path for f in files] == ["model.fp32.tflite", "model.fp16.tflite", "model.int8.tflite"]
    for file in files:
        found = to_tflite.load(tmp_path / file.path)({"x": x})["output"]
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= tolerance[file.precision] * np.abs(expected).max()


def test_every_operator_of_a_convolutional_network_is_int8_and_none_transposes(cnn_hub: Hub, tmp_path: Path) -> None:
    from ai_edge_litert import schema_py_generated as schema

    file, _ = written(cnn_hub, tmp_path, "int8")
    assert file.quantized == {"Add": 1, "Conv": 2, "Gemm": 1, "ReduceMean": 1}
    assert file.islands == ()
    assert "TRANSPOSE" not in kinds(tmp_path / file.path)
    (net,) = schema.ModelT.InitFromPackedBuf((tmp_path / file.path).read_bytes()).subgraphs
    values = [net.tensors[i] for op in net.operators for i in op.outputs]
    assert {t.type for t in values} == {schema.TensorType.INT8}
    assert all(t.quantization is not None and len(t.quantization.scale) == 1 for t in values)


def test_the_scales_are_the_hubs_with_zero_points_moved_by_128(cnn_hub: Hub, tmp_path: Path) -> None:
    from ai_edge_litert import schema_py_generated as schema

    file, _ = written(cnn_hub, tmp_path, "int8")
    (net,) = schema.ModelT.InitFromPackedBuf((tmp_path / file.path).read_bytes()).subgraphs
    stored = {
        (float(t.quantization.scale[0]), int(t.quantization.zeroPoint[0]))
        for t in net.tensors
        if t.quantization is not None and t.type == schema.TensorType.INT8 and t.buffer == 0
    }
    assert cnn_hub.quantized is not None
    hubs = set()
    for node in cnn_hub.quantized.graph:
        if node.op_type == "QuantizeLinear":
            scale, zero = constant(node.inputs[1]), constant(node.inputs[2])
            assert scale is not None and zero is not None
            hubs.add((float(scale), int(zero) - 128))
    assert stored == hubs


def test_images_are_channels_last_in_the_file_and_channels_first_for_the_caller(tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    hub = float_hub(
        [("Conv", ["picture", "w"], ["heat"], {})], {"picture": (3, 6, 5)}, ("heat",), w=normal(0, 4, 3, 1, 1)
    )
    file, run = written(hub, tmp_path, "fp32")
    interpreter = Interpreter(str(tmp_path / file.path))
    assert interpreter.get_signature_list() == {"serving_default": {"inputs": ["picture"], "outputs": ["heat"]}}
    assert interpreter.get_input_details()[0]["shape"].tolist() == [1, 6, 5, 3]
    assert interpreter.get_output_details()[0]["name"] == "heat"
    assert run({"picture": normal(1, 2, 3, 6, 5)})["heat"].shape == (2, 4, 6, 5)


def test_the_inputs_and_outputs_of_a_file_are_told_as_the_runtime_sees_them(cnn_hub: Hub, tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    for precision in ("fp32", "int8"):
        file, _ = written(cnn_hub, tmp_path, precision)
        interpreter = Interpreter(str(tmp_path / file.path))
        seen = interpreter.get_input_details(), interpreter.get_output_details()
        for ports, details in zip((file.inputs, file.outputs), seen, strict=True):
            told = [(p.shape, p.dtype, (p.scale or 0.0, p.zero_point or 0)) for p in ports]
            assert told == [(tuple(d["shape"].tolist()), d["dtype"].__name__, d["quantization"]) for d in details]


def test_what_litert_announces_is_left_out_and_what_else_it_says_is_not(capfd: pytest.CaptureFixture[str]) -> None:
    greeting = b"INFO: Created TensorFlow Lite XNNPACK delegate for CPU.\n"
    ungreeted(lambda: os.write(2, greeting + b"ERROR: no such kernel\n"))
    assert capfd.readouterr().err == "ERROR: no such kernel\n"
    with pytest.raises(ZeroDivisionError):
        ungreeted(lambda: os.write(2, greeting + b"WARNING: odd\n") // 0)
    assert capfd.readouterr().err == "WARNING: odd\n"


def test_a_batch_is_run_sample_by_sample(cnn_hub: Hub, tmp_path: Path) -> None:
    _, run = written(cnn_hub, tmp_path, "int8")
    x = normal(3, 4, 3, 16, 16)
    singles = [run({"x": x[i : i + 1]})["output"] for i in range(4)]
    np.testing.assert_array_equal(run({"x": x})["output"], np.concatenate(singles))


def test_several_inputs_and_outputs_keep_their_names(tmp_path: Path) -> None:
    nodes: list[Node] = [("Add", ["a", "b"], ["sum"], {}), ("Mul", ["a", "c"], ["product"], {})]
    hub = float_hub(nodes, {"a": (4,), "b": (4,), "c": (4,)}, ("sum", "product"))
    _, run = written(hub, tmp_path, "fp32")
    fed = {name: normal(i, 3, 4) for i, name in enumerate("abc")}
    found = run(fed)
    np.testing.assert_allclose(found["sum"], fed["a"] + fed["b"])
    np.testing.assert_allclose(found["product"], fed["a"] * fed["c"])


def test_inputs_that_are_not_images_stay_as_they_are(tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    hub = float_hub([("MatMul", ["x", "w"], ["y"], {})], {"x": (7, 3)}, w=normal(0, 3, 5))
    file, run = written(hub, tmp_path, "fp32")
    assert Interpreter(str(tmp_path / file.path)).get_input_details()[0]["shape"].tolist() == [1, 7, 3]
    x = normal(1, 2, 7, 3)
    np.testing.assert_allclose(run({"x": x})["y"], x @ normal(0, 3, 5), rtol=1e-5, atol=1e-6)


def test_one_tensor_can_be_output_twice_and_an_input_can_be_an_output(tmp_path: Path) -> None:
    nodes: list[Node] = [("Identity", ["x"], ["same"], {}), ("Relu", ["x"], ["r"], {}), ("Identity", ["r"], ["s"], {})]
    _, run = written(float_hub(nodes, {"x": (3,)}, ("same", "r", "s")), tmp_path, "fp32")
    x = normal(0, 2, 3)
    found = run({"x": x})
    np.testing.assert_array_equal(found["same"], x)
    np.testing.assert_array_equal(found["r"], found["s"])


def test_flattening_an_image_permutes_the_dense_weights_instead_of_the_image(tmp_path: Path) -> None:
    nodes: list[Node] = [
        ("Flatten", ["x"], ["f"], {}),
        ("Relu", ["f"], ["r"], {}),
        ("Gemm", ["r", "w"], ["y"], {"transB": 1}),
    ]
    hub = float_hub(nodes, {"x": (3, 4, 5)}, w=normal(0, 2, 60))
    file, run = written(hub, tmp_path, "fp32")
    assert kinds(tmp_path / file.path) == ["RELU", "RESHAPE", "FULLY_CONNECTED"]
    x = normal(1, 2, 3, 4, 5)
    np.testing.assert_allclose(
        run({"x": x})["y"], np.maximum(x.reshape(2, -1), 0) @ normal(0, 2, 60).T, rtol=1e-4, atol=1e-5
    )


def test_float16_files_store_half_the_bytes_and_widen_on_loading(tmp_path: Path) -> None:
    weights = normal(0, 64, 64, 3, 3)
    hub = float_hub([("Conv", ["x", "w"], ["y"], {})], {"x": (64, 4, 4)}, w=weights)
    whole, _ = written(hub, tmp_path, "fp32")
    half, run = written(hub, tmp_path, "fp16")
    sizes = [(tmp_path / f.path).stat().st_size for f in (whole, half)]
    assert sizes[1] < 0.52 * sizes[0]
    assert versions(tmp_path / half.path)["DEQUANTIZE"] == 3
    rounded = float_hub(
        [("Conv", ["x", "w"], ["y"], {})], {"x": (64, 4, 4)}, w=weights.astype(np.float16).astype(np.float32)
    )  # fmt: skip
    x = normal(1, 1, 64, 4, 4)
    np.testing.assert_allclose(run({"x": x})["y"], reference(rounded.graph.bytes, {"x": x})["y"], rtol=1e-4, atol=1e-4)


def test_weights_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    hub = float_hub([("Conv", ["x", "w"], ["y"], {})], {"x": (1, 4, 4)}, w=np.full((1, 1, 1, 1), 1e5, np.float32))
    with pytest.raises(DeploykitError, match="65504"):
        written(hub, tmp_path, "fp16")


def test_an_operator_without_an_integer_kernel_becomes_an_island_with_its_reason(tmp_path: Path) -> None:
    nodes: list[Node] = [
        ("Conv", ["x", "w"], ["c"], {}),
        ("Div", ["c", "k"], ["d"], {}),
        ("Conv", ["d", "v"], ["y"], {}),
    ]
    weights = {"w": normal(0, 4, 3, 1, 1), "k": np.float32([2]), "v": normal(1, 2, 4, 1, 1)}
    data = {"x": normal(2, 8, 3, 5, 5)}
    hub = quantized(graph(nodes, {"x": (3, 5, 5)}, weights), data)
    file, run = written(hub, tmp_path, "int8")
    assert [(i.operator, i.layer, i.why) for i in file.islands] == [("Div", "d_node", "LiteRT has no int8 division")]
    assert kinds(tmp_path / file.path) == ["CONV_2D", "DEQUANTIZE", "DIV", "QUANTIZE", "CONV_2D"]
    assert file.quantized == {"Conv": 2}
    np.testing.assert_allclose(run(data)["y"], reference(hub.bytes, data)["y"], atol=0.05)


def test_a_layer_that_the_hub_keeps_in_float_is_written_in_float_with_the_hubs_reason(tmp_path: Path) -> None:
    from deploykit.hub.quantize import quantize

    nodes: list[Node] = [("Conv", ["x", "w"], ["c"], {}), ("Relu", ["c"], ["r"], {}), ("Conv", ["r", "v"], ["y"], {})]
    made = graph(nodes, {"x": (3, 5, 5)}, {"w": normal(0, 4, 3, 1, 1), "v": normal(1, 2, 4, 1, 1)})
    data = {"x": normal(2, 8, 3, 5, 5)}
    ranges = quantized(made, data).ranges
    assert ranges is not None
    hub = quantize(made, ranges, QuantSpec(), keep_float=["y_node"])
    file, run = written(hub, tmp_path, "int8")
    assert [(i.layer, i.why) for i in file.islands] == [("y_node", "kept in float on request")]
    np.testing.assert_allclose(run(data)["y"], reference(hub.bytes, data)["y"], atol=1e-4)


@pytest.mark.parametrize("kind", ["Conv", "Add"])
def test_a_layer_that_calibration_saw_almost_at_zero_becomes_an_island_not_a_broken_file(
    kind: str, tmp_path: Path
) -> None:
    """Its scale is minute. XNNPACK would refuse the whole file (Conv) or compute nonsense (Add)."""
    last: list[Node] = [("Relu", ["c"], ["r"], {}), ("Add", ["r", "x"], ["y"], {})]
    nodes: list[Node] = [
        ("Conv", ["x", "w", "b"], ["c"], {}) if kind == "Conv" else ("Add", ["x", "b"], ["c"], {}),
        *last,
    ]
    data = {"x": normal(2, 8, 3, 5, 5)}
    w = normal(0, 3, 3, 1, 1)
    before = np.einsum("oi,nihw->nohw", w[:, :, 0, 0], data["x"]) if kind == "Conv" else data["x"]
    shift = -before.max(axis=(0, 2, 3)) + np.float32(1e-4)  # the largest value comes out at 0.0001
    weights = {"w": w, "b": shift if kind == "Conv" else shift.reshape(3, 1, 1)}
    hub = quantized(graph(nodes, {"x": (3, 5, 5)}, weights), data)
    file, run = written(hub, tmp_path, "int8")
    assert [(i.operator, "steps that small" in i.why) for i in file.islands] == [(kind, True)]
    np.testing.assert_allclose(run(data)["y"], reference(hub.bytes, data)["y"], atol=0.03)


def test_everything_that_cannot_be_written_is_listed_at_once(tmp_path: Path) -> None:
    nodes: list[Node] = [
        ("Einsum", ["x"], ["e"], {"equation": "bchw->bchw"}),
        ("Conv", ["e", "w"], ["c"], {"pads": [1, 1, 1, 1]}),
        ("AveragePool", ["c"], ["p"], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}),
        ("Erf", ["p"], ["y"], {}),
    ]
    message = complaint(float_hub(nodes, {"x": (3, 8, 8)}, w=normal(0, 4, 3, 3, 3)), tmp_path)
    assert "e_node (Einsum): there is no rule for it" in message
    assert "p_node (AveragePool): it leaves uneven padding out of the mean; use count_include_pad=True" in message
    assert "y_node (Erf)" in message
    assert "Conv" not in message


@pytest.mark.parametrize(
    ("node", "constants", "reason"),
    [
        (("Conv", ["x", "w"], ["y"], {"auto_pad": "SAME_LOWER"}), {"w": (4, 4, 3, 3)}, "auto_pad"),
        (("ConvTranspose", ["x", "w"], ["y"], {"group": 2}), {"w": (4, 2, 3, 3)}, "no grouped transposed"),
        (("ConvTranspose", ["x", "w"], ["y"], {"dilations": [2, 2]}), {"w": (4, 2, 3, 3)}, "no dilated transposed"),
        (("MaxPool", ["x"], ["y"], {"kernel_shape": [2, 2], "dilations": [2, 2]}), {}, "no dilated max pool"),
        (("HardSigmoid", ["x"], ["y"], {"alpha": 0.3}), {}, "alpha 0.3"),
        (("MatMul", ["x", "w"], ["y"], {}), {"w": (4, 6, 6)}, "a matrix of constant weights"),
        (("Softmax", ["x"], ["y"], {"axis": 0}), {}, "works across the batch"),
        (("Concat", ["x", "x"], ["y"], {"axis": 0}), {}, "works across the batch"),
        (("Resize", ["x", "", "s"], ["y"], {"mode": "cubic"}), {"s": np.float32([1, 1, 2, 2])}, "no 'cubic' resizing"),
        (("Resize", ["x", "", "s"], ["y"], {"mode": "linear"}), {"s": np.float32([1, 1, 1.7, 1.7])}, "other places"),
        (("Pad", ["x", "p"], ["y"], {"mode": "edge"}), {"p": INDEX([0, 0, 1, 1, 0, 0, 1, 1])}, "mode 'edge'"),
        (("Pad", ["x", "p"], ["y"], {}), {"p": INDEX([0, 0, -1, 0, 0, 0, 0, 0])}, "negative padding"),
        (("Slice", ["x", "s", "e", "a", "t"], ["y"], {}),
         {"s": INDEX([-1]), "e": INDEX([-9]), "a": INDEX([2]), "t": INDEX([-1])}, "counts backwards"),
    ],
)  # fmt: skip
def test_what_litert_would_compute_differently_is_refused(
    node: Node, constants: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    arrays = {n: normal(0, *c) if isinstance(c, tuple) else c for n, c in constants.items()}
    assert reason in complaint(float_hub([node], {"x": (4, 6, 6)}, **arrays), tmp_path)


def embedding(rows: int = 10) -> FloatGraph:
    """ids [batch, 5] -> rows of a table [rows, 4]."""
    import onnx
    import onnx_ir as ir

    proto = helper.make_model(
        helper.make_graph(
            [helper.make_node("Gather", ["table", "ids"], ["y"], name="embedding")], "test",
            [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", 5])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(normal(0, rows, 4), "table")],
        ),
        opset_imports=[helper.make_opsetid("", 20)], ir_version=10,
    )  # fmt: skip
    return FloatGraph(ir.from_proto(onnx.shape_inference.infer_shapes(proto)))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_tokens_read_rows_of_a_table(precision: str, tmp_path: Path) -> None:
    made, ids = embedding(), np.random.default_rng(0).integers(0, 10, (8, 5))
    _, run = written(quantized(made, {"ids": ids}), tmp_path, precision)
    expected = normal(0, 10, 4)[ids]
    error = {"fp32": 0.0, "fp16": 1e-3 * np.abs(expected).max(), "int8": np.abs(expected).max() / 254}[precision]
    assert np.abs(run({"ids": ids})["y"] - expected).max() <= error * 1.001


def test_a_table_is_stored_in_int8(tmp_path: Path) -> None:
    hub = quantized(embedding(1000), {"ids": np.zeros((8, 5), np.int64)})
    file, _ = written(hub, tmp_path, "int8")
    assert file.quantized == {"Gather": 1}
    assert (tmp_path / file.path).stat().st_size < 1000 * 4 + 2000


def test_precisions_and_options_nobody_knows_are_refused(cnn_hub: Hub, tmp_path: Path) -> None:
    target = targets.load("raspberry-pi-5")
    with pytest.raises(DeploykitError, match="int8-fp16"):
        to_tflite.export({"int8-fp16": cnn_hub}, target, tmp_path)
    with pytest.raises(DeploykitError, match="speed"):
        to_tflite.export({"fp32": cnn_hub}, replace(target, options={"speed": 1}), tmp_path)
    with pytest.raises(DeploykitError, match="int8 needs calibration"):
        to_tflite.export({"int8": replace(cnn_hub, quantized=None)}, target, tmp_path)


def test_the_same_hub_gives_the_same_bytes_in_another_process(cnn_hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "hub.onnx").write_bytes(cnn_hub.bytes)
    program = (
        "import sys, hashlib, onnx_ir as ir\n"
        "from deploykit.exporters.tflite.translate import translate\n"
        "print(hashlib.sha256(translate(ir.load(sys.argv[1])).data).hexdigest())"
    )
    found = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])}
        result = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "hub.onnx")],
            env=environment, cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found.add(result.stdout)
    assert len(found) == 1


def test_stored_data_is_aligned_and_equal_zero_points_are_stored_once(tmp_path: Path) -> None:
    from ai_edge_litert import schema_py_generated as schema

    nodes: list[Node] = [("Conv", ["x", "w"], ["c"], {}), ("Conv", ["c", "v"], ["y"], {})]
    made = graph(nodes, {"x": (64, 2, 2)}, {"w": normal(0, 64, 64, 1, 1), "v": normal(1, 64, 64, 1, 1)})
    file, _ = written(quantized(made, {"x": normal(2, 4, 64, 2, 2)}), tmp_path, "int8")
    data = (tmp_path / file.path).read_bytes()
    model = schema.Model.GetRootAs(data, 0)
    for i in range(1, model.BuffersLength()):
        table = model.Buffers(i)._tab
        assert table.Vector(table.Offset(4)) % 16 == 0
    assert data.count(bytes(64 * 8)) == 1  # 64 int64 zeros: two weights and two biases have them


def test_the_runner_needs_nothing_but_the_file(cnn_hub: Hub, tmp_path: Path) -> None:
    file, run = written(cnn_hub, tmp_path, "int8")
    lone = tmp_path / "elsewhere.tflite"
    lone.write_bytes((tmp_path / file.path).read_bytes())
    x = normal(5, 2, 3, 16, 16)
    np.testing.assert_array_equal(to_tflite.load(lone, 2)({"x": x})["output"], run({"x": x})["output"])


@pytest.mark.parametrize("keep", [0, 6, 100, 1000, -40, -1])
def test_a_truncated_file_is_refused(cnn_hub: Hub, tmp_path: Path, keep: int) -> None:
    file, _ = written(cnn_hub, tmp_path, "int8")
    path = tmp_path / file.path
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DeploykitError, match=r"damaged|not a \.tflite|refuses"):
        to_tflite.load(path)


def test_a_tflite_file_from_elsewhere_is_refused(tmp_path: Path) -> None:
    from deploykit.exporters.tflite.writer import Writer

    writer = Writer()
    x = writer.tensor("x", (1, 2), "float32")
    path = tmp_path / "foreign.tflite"
    path.write_bytes(writer.finish([x], [writer.write("RELU", [x], "y", (1, 2))], {}))
    with pytest.raises(DeploykitError, match="was not written by deploykit"):
        to_tflite.load(path)


def test_an_operator_version_that_the_runtime_does_not_know_is_an_error_not_a_crash(
    cnn_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deploykit.exporters.tflite import writer

    monkeypatch.setattr(writer, "operator_version", lambda *_: 99)
    with pytest.raises(DeploykitError, match="the LiteRT runtime refuses this file"):
        written(cnn_hub, tmp_path, "int8")


def test_without_litert_the_error_names_the_extra(
    cnn_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = written(cnn_hub, tmp_path, "int8")
    for module in [m for m in sys.modules if m.startswith(("ai_edge_litert", "deploykit.exporters.tflite."))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    with pytest.raises(MissingExtra, match="deploykit\\[tflite\\]"):
        to_tflite.export({"int8": cnn_hub}, targets.load("mobile-arm"), tmp_path)
    with pytest.raises(MissingExtra, match="deploykit\\[tflite\\]"):
        to_tflite.load(tmp_path / file.path)


def test_the_phone_the_boards_and_the_microcontrollers_share_a_hub() -> None:
    quants = [targets.load(name).quant for name in ("mobile-arm", "raspberry-pi-5", "cortex-m4")]
    assert quants[0] == quants[1] == quants[2]
    assert replace(targets.load("x86").quant, float_outputs=()) == quants[0]


def test_the_runtime_is_named_with_its_version() -> None:
    assert to_tflite.runtime().name.startswith("ai-edge-litert ")
