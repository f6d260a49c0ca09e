from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from tensorrt_graphs import hub, model, samples, small_net

from deploykit import exporters, targets
from deploykit.core.artifact import Island
from deploykit.core.errors import DeploykitError
from deploykit.core.target import Target
from deploykit.exporters import to_tensorrt
from deploykit.exporters.tensorrt.options import options
from deploykit.hub.graph import FloatGraph, Hub
from deploykit.hub.lower import from_proto

NAMES = ("jetson-orin-nano", "jetson", "gpu-t4", "rtx-4090")


@pytest.fixture(scope="module")
def calibrated() -> Hub:
    return hub(small_net(), targets.load("jetson").quant, {"x": samples()})


@pytest.fixture(scope="module")
def bundle(calibrated: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    target = targets.load("jetson")
    to_tensorrt.export(calibrated, target, folder, target.precisions)
    return folder


def original(calibrated: Hub, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What ONNX Runtime says about the float graph before anything was lowered or bound."""
    session = ort.InferenceSession(calibrated.graph.bytes, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def test_the_exporter_is_found_by_name_and_has_the_seam() -> None:
    exporter = exporters.load("tensorrt")
    assert callable(exporter.export)
    assert callable(exporter.load)
    assert "build.sh" in exporter.runtime().untimed


@pytest.mark.parametrize("name", NAMES)
def test_targets_ask_for_what_tensorrt_quantizes(name: str) -> None:
    target = targets.load(name)
    spec = target.quant
    assert (spec.activation_signed, spec.activation_symmetric, spec.bias) == (True, True, "float")
    assert spec.placement == "linear_inputs"
    assert np.float16(spec.weight_scale_floor) >= np.finfo(np.float16).tiny
    assert target.precisions == ("fp32", "fp16", "int8", "int8-fp16")
    assert not target.measured_here
    assert options(target).opset_weak == 17


def test_a_bundle_has_every_file_with_its_operator_set_and_checksum(bundle: Path) -> None:
    about = json.loads((bundle / "bundle.json").read_text())
    opsets = {p.name: onnx.load(p).opset_import[0].version for p in bundle.glob("*.onnx")}
    assert opsets == {"model.fp32.onnx": 17, "model.int8.onnx": 17, "model.fp16.onnx": 19, "model.int8-fp16.onnx": 19}
    for name, digest in about["sha256"].items():
        assert hashlib.sha256((bundle / name).read_bytes()).hexdigest() == digest
    on_disk = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    assert on_disk == {*about["sha256"], "bundle.json", "build.py", "build.sh", "BUILD.md"}
    assert (bundle / "build.sh").stat().st_mode & 0o111


def test_the_batch_is_bound_for_jetson_and_free_for_servers(bundle: Path, calibrated: Hub, tmp_path: Path) -> None:
    def batch(path: Path) -> Any:
        dim = onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0]
        return dim.dim_param or dim.dim_value

    assert batch(bundle / "model.int8.onnx") == 1
    target = targets.load("gpu-t4")
    to_tensorrt.export(calibrated, target, tmp_path, ["int8"])
    assert batch(tmp_path / "model.int8.onnx") == "batch"
    about = json.loads((tmp_path / "bundle.json").read_text())
    assert (about["dynamic"], about["batch"]) == (True, [1, 8, 32])


def test_golden_outputs_are_what_the_float_model_computes(bundle: Path, calibrated: Hub) -> None:
    about = json.loads((bundle / "bundle.json").read_text())
    assert len(about["golden"]) == 4
    for run in about["golden"]:
        x = np.fromfile(bundle / run["inputs"]["x"], "<f4").reshape(1, 3, 8, 8)
        y = np.fromfile(bundle / run["outputs"]["y"], "<f4").reshape(1, 10)
        np.testing.assert_allclose(y, original(calibrated, x), atol=1e-5)


def test_expected_errors_order_the_variants_and_tolerances_cover_them(bundle: Path) -> None:
    models = json.loads((bundle / "bundle.json").read_text())["models"]
    error = {p: m["expected_error"] for p, m in models.items()}
    assert error["fp32"] == 0.0
    assert 0.0 < error["fp16"] < 0.005 < error["int8"] < 0.2
    assert all(m["tolerance"] == pytest.approx(2 * m["expected_error"] + 0.01, abs=3e-6) for m in models.values())


def test_real_samples_become_the_golden_inputs(calibrated: Hub, tmp_path: Path) -> None:
    real = dataclasses.replace(calibrated, samples={"x": samples(3)})
    to_tensorrt.export(real, targets.load("jetson"), tmp_path, ["fp32"])
    about = json.loads((tmp_path / "bundle.json").read_text())
    assert about["golden_from"] == "samples of the calibration data"
    found = [np.fromfile(tmp_path / run["inputs"]["x"], "<f4").reshape(3, 8, 8) for run in about["golden"]]
    np.testing.assert_array_equal(np.stack(found), samples(3))


def test_samples_of_another_model_are_refused(calibrated: Hub, tmp_path: Path) -> None:
    wrong = dataclasses.replace(calibrated, samples={"x": samples(2, 3, 9, 9)})
    with pytest.raises(DeploykitError, match="do not fit the model's inputs x"):
        to_tensorrt.export(wrong, targets.load("jetson"), tmp_path, ["fp32"])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8-fp16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_bound_file_runs_any_batch(bundle: Path, calibrated: Hub, precision: str, threads: int) -> None:
    run = to_tensorrt.load(bundle / f"model.{precision}.onnx", threads)
    x = samples(5)
    together = run({"x": x})["y"]
    assert together.dtype == np.float32
    np.testing.assert_array_equal(together, np.concatenate([run({"x": x[i : i + 1]})["y"] for i in range(5)]))
    noise = np.square(together - original(calibrated, x)).sum() / np.square(together).sum()
    assert noise < {"fp32": 1e-10, "fp16": 1e-5}.get(precision, 1e-2)


def test_a_larger_bound_batch_is_filled_up_and_cut(calibrated: Hub, tmp_path: Path) -> None:
    target = targets.load("jetson")
    fours = dataclasses.replace(target, options={**target.options, "batch": (4, 4, 4)})
    to_tensorrt.export(calibrated, fours, tmp_path, ["fp32"])
    run = to_tensorrt.load(tmp_path / "model.fp32.onnx")
    np.testing.assert_allclose(run({"x": samples(6)})["y"], original(calibrated, samples(6)), atol=1e-5)


def test_half_files_keep_their_answer_in_onnx_runtime(bundle: Path) -> None:
    """ORT's own quantization passes make biases with the scale s_x * s_w in float16, which underflows."""
    whole = to_tensorrt.load(bundle / "model.int8.onnx")({"x": samples()})["y"]
    half = to_tensorrt.load(bundle / "model.int8-fp16.onnx")({"x": samples()})["y"]
    assert np.abs(whole - half).max() < 0.05 * np.abs(whole).max()


def test_integer_operators_are_counted_in_the_file(calibrated: Hub, tmp_path: Path) -> None:
    files = to_tensorrt.export(calibrated, targets.load("jetson"), tmp_path, ["fp32", "int8", "int8-fp16"])
    assert [dict(f.quantized) for f in files] == [{}, {"Conv": 2, "Gemm": 1}, {"Conv": 2, "Gemm": 1}]
    assert all(f.islands == () and f.notes == () for f in files)


def test_transposed_convolutions_are_islands_with_a_reason(tmp_path: Path) -> None:
    target = targets.load("jetson")
    found = hub(small_net("ConvTranspose"), target.quant, {"x": samples()})
    (file,) = to_tensorrt.export(found, target, tmp_path, ["int8"])
    assert dict(file.quantized) == {"Conv": 1, "Gemm": 1}
    (island,) = file.islands
    assert island.operator == "ConvTranspose"
    assert "float" in island.why
    forced = dataclasses.replace(target.quant, float_operators=())
    (file,) = to_tensorrt.export(hub(small_net("ConvTranspose"), forced, {"x": samples()}), target, tmp_path, ["int8"])
    assert [i.why for i in file.islands] == ["TensorRT runs transposed convolutions in float, quantized or not"]


def test_a_layer_kept_in_float_is_an_island_with_the_hubs_reason(tmp_path: Path) -> None:
    target = targets.load("jetson")
    proto = small_net()
    found = hub(proto, target.quant, {"x": samples()}, keep_float=("c2",))
    (file,) = to_tensorrt.export(found, target, tmp_path, ["int8"])
    assert file.islands == (Island("Conv", "c2", "kept in float on request"),)


def test_the_canonical_hub_is_refused_with_the_rules_it_breaks(tmp_path: Path) -> None:
    canonical = hub(small_net(), targets.load("x86").quant, {"x": samples()})
    with pytest.raises(DeploykitError, match=r"TensorRT would reject model\.int8\.onnx: Q1 at .*; Q7 at"):
        to_tensorrt.export(canonical, targets.load("jetson"), tmp_path, ["int8"])


def test_int8_without_calibration_is_refused(calibrated: Hub, tmp_path: Path) -> None:
    with pytest.raises(DeploykitError, match="needs calibration"):
        to_tensorrt.export(Hub(calibrated.graph, calibrated.spec), targets.load("jetson"), tmp_path, ["int8"])


def test_a_second_free_dimension_is_refused(tmp_path: Path) -> None:
    graph = from_proto(model("y = Relu(x)", "float[batch,length] x", "float[batch,length] y", 20), "test")
    with pytest.raises(DeploykitError, match=r"one free dimension.*x \[batch,\s*length\]"):
        to_tensorrt.export(Hub(graph, targets.load("jetson").quant), targets.load("jetson"), tmp_path, ["fp32"])


def test_a_model_exported_with_a_fixed_batch_keeps_it(tmp_path: Path) -> None:
    graph = FloatGraph(from_proto(model("y = Relu(x)", "float[1,4] x", "float[1,4] y", 20), "test").model)
    to_tensorrt.export(Hub(graph, targets.load("gpu-t4").quant), targets.load("gpu-t4"), tmp_path, ["fp32"])
    about = json.loads((tmp_path / "bundle.json").read_text())
    assert (about["dynamic"], about["batch"]) == (False, [1, 1, 1])


def test_integer_inputs_stay_integers(tmp_path: Path) -> None:
    proto = model(
        "y = Gather(table, i)", "int64[batch,3] i", "float[batch,3,4] y", 20, table=np.eye(4, dtype=np.float32)
    )
    target = targets.load("jetson")
    to_tensorrt.export(Hub(from_proto(proto, "test"), target.quant), target, tmp_path, ["fp32", "fp16"])
    ids = np.array([[0, 1, 3]])
    y = to_tensorrt.load(tmp_path / "model.fp16.onnx")({"i": ids})["y"]
    np.testing.assert_array_equal(y, np.eye(4)[ids])


def test_the_same_hub_gives_the_same_bytes(calibrated: Hub, bundle: Path, tmp_path: Path) -> None:
    target = targets.load("jetson")
    to_tensorrt.export(calibrated, target, tmp_path, target.precisions)
    for path in bundle.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / path.relative_to(bundle)).read_bytes(), path.name


def test_a_truncated_file_is_an_error_and_no_traceback(bundle: Path, tmp_path: Path) -> None:
    whole = (bundle / "model.int8.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    for path in (tmp_path / "cut.onnx", tmp_path / "absent.onnx"):
        with pytest.raises(DeploykitError, match=path.name):
            to_tensorrt.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": [1, 1, 1]}, "no key 'batches'. Did you mean 'batch'?"),
        ({"batch": [4, 2, 8]}, "batch must be three rising numbers"),
        ({"trt": ["8.2", "10.3"]}, "opset_weak must be between 17 and 13"),
        ({"trt": ["10.3", "8.5"]}, "from the oldest to the newest"),
        ({"trt": ["new", "10.3"]}, "'new' is not a version"),
        ({"opset_strong": 18}, "opset_strong must be between 19"),
        ({"opset_weak": "17"}, "opset_weak"),
    ],
)
def test_wrong_options_say_where_and_what(change: dict[str, Any], message: str) -> None:
    target = targets.load("jetson")
    with pytest.raises(DeploykitError, match=r"\[options\]") as error:
        options(dataclasses.replace(target, options={**target.options, **change}))
    assert message in str(error.value)


def test_the_operator_set_of_the_files_is_not_above_the_targets() -> None:
    target: Target = dataclasses.replace(targets.load("jetson"), opset=18)
    with pytest.raises(DeploykitError, match="operator set 19 is above its opset = 18"):
        options(target)
