from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from tensorrt_graphs import hub, model, samples, small_net

from deploykit import exporters, targets
from deploykit.core.artifact import Island, Port
from deploykit.core.errors import DeploykitError
from deploykit.core.tables import read_toml
from deploykit.core.target import Target
from deploykit.exporters import to_tensorrt
from deploykit.exporters.tensorrt.options import options
from deploykit.hub.graph import FloatGraph, Hub
from deploykit.hub.lower import from_proto

TARGETS = [t for t in map(targets.load, targets.names()) if t.exporter == "tensorrt"]
INT8 = [t.name for t in TARGETS if "int8" in t.precisions]
OLD = {"jetson-nano": 13, "jetson-tx2": 13, "jetson-xavier-nx": 17, "jetson-agx-xavier": 17}
"""Boards whose software ends before TensorRT 10, and the operator set of their files."""


@pytest.fixture(scope="module")
def calibrated() -> Hub:
    return hub(small_net(), targets.load("jetson").quant, {"x": samples()})


@pytest.fixture(scope="module")
def bundle(calibrated: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    target = targets.load("jetson")
    to_tensorrt.export(dict.fromkeys(target.precisions, calibrated), target, folder)
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


@pytest.mark.parametrize("name", INT8)
def test_targets_ask_for_what_tensorrt_quantizes(name: str) -> None:
    target = targets.load(name)
    spec = target.quant
    assert (spec.activation_signed, spec.activation_symmetric, spec.bias) == (True, True, "float")
    assert spec.placement == "linear_inputs"
    assert np.float16(spec.weight_scale_floor) >= np.finfo(np.float16).tiny
    assert target.precisions == ("fp32", "fp16", "int8", "int8-fp16")[: 3 if name in OLD else 4]
    assert options(target).opset_weak == 17


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_every_profile_says_what_its_tensorrt_reads(target: Target) -> None:
    found = options(target)
    assert not target.measured_here
    assert found.opset_weak == OLD.get(target.name, 17)
    assert found.opset_strong == (None if target.name in OLD else 19)
    facts = {n: f.value for n, f in target.facts.items()}
    capability = tuple(map(int, str(facts["compute_capability"]).split(".")))
    # what the hardware has begins with a compute capability: DP4A with 6.1 (not in 6.2), 2:4 with 8.0, fp8 with 8.9
    assert ("int8" in target.precisions) == (capability == (6, 1) or capability >= (7, 0))
    assert ("int8" in target.profits) == ("int8" in target.precisions)
    assert ("2:4" in target.profits) == (capability >= (8, 0)) == bool(facts.get("sparse_2_4", False))
    assert facts.get("int8", True) == ("int8" in target.precisions)
    assert facts.get("fp8", capability >= (8, 9)) == (capability >= (8, 9)) == ("fp8" in target.on_request)
    for end, key in ((found.oldest, "tensorrt_oldest"), (found.newest, "tensorrt_newest")):
        if key in facts:
            assert tuple(map(int, str(facts[key]).split(".")))[:2] == end[:2], key


def row(target: Target) -> str:
    """A target's line in docs/targets/jetson-and-gpus.md."""
    found = options(target)
    releases = found.trt[0] if found.oldest == found.newest else " to ".join(found.trt)
    sets = ", ".join(str(n) for n in (found.opset_weak, found.opset_strong) if n is not None)
    batch = str(found.bound or f"{found.batch[0]} to {found.batch[2]}")
    title = target.title.removeprefix("NVIDIA ")
    capability = target.facts["compute_capability"].value
    zeros = "yes" if "2:4" in target.profits else "no"
    files = "; on request ".join(", ".join(some) for some in (target.precisions, target.on_request) if some)
    cells = (f"`{target.name}`", title, capability, releases, files, sets, batch, zeros)
    return f"| {' | '.join(map(str, cells))} |"


def test_the_page_of_the_family_is_the_table_of_its_profiles() -> None:
    page = Path(__file__).parents[1] / "docs" / "targets" / "jetson-and-gpus.md"
    shown = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert shown == [row(target) for target in TARGETS]


def test_no_profile_has_a_figure_of_another_device() -> None:
    for path in Path(str(targets._folder())).glob("*.toml"):
        own = read_toml(path)
        base = own.get("extends")
        if base is None or "facts" not in own or targets.load(base).exporter != "tensorrt":
            continue
        for name, fact in targets.load(base).facts.items():
            same_gpu = path.stem == "gpu-h200" and name in ("int8_tops", "fp16_tflops")
            assert not fact.unit or name in own["facts"] or same_gpu, f"{path.name} inherits {name} from {base}"


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
    to_tensorrt.export({"int8": calibrated}, target, tmp_path)
    assert batch(tmp_path / "model.int8.onnx") == "batch"
    about = json.loads((tmp_path / "bundle.json").read_text())
    assert (about["dynamic"], about["batch"]) == (True, [1, 8, 32])


def test_golden_outputs_are_what_the_float_model_computes(bundle: Path, calibrated: Hub) -> None:
    about = json.loads((bundle / "bundle.json").read_text())
    assert len(about["golden"]) == 8
    for run in about["golden"]:
        x = np.fromfile(bundle / run["inputs"]["x"], "<f4").reshape(1, 3, 8, 8)
        y = np.fromfile(bundle / run["outputs"]["y"], "<f4").reshape(1, 10)
        np.testing.assert_allclose(y, original(calibrated, x), atol=1e-5)


def test_an_engine_may_have_twice_the_noise_of_its_file_and_never_has_to_reach_more_than_30_db(
    bundle: Path,
) -> None:
    models = json.loads((bundle / "bundle.json").read_text())["models"]
    expected = {p: m["expected_db"]["y"] for p, m in models.items()}
    assert expected["fp32"] == 200.0
    assert 15.0 < expected["int8"] < 33.0 < expected["fp16"] < 100.0
    least = {p: m["least_db"]["y"] for p, m in models.items()}
    assert least["fp32"] == least["fp16"] == 30.0
    assert least["int8"] == pytest.approx(expected["int8"] - 3.0, abs=1e-3)


def test_the_files_bind_the_batch_of_the_target_and_say_so(calibrated: Hub, tmp_path: Path) -> None:
    for name, first in (("jetson", 1), ("gpu-t4", "1..32")):
        (tmp_path / name).mkdir()
        (file,) = to_tensorrt.export({"int8": calibrated}, targets.load(name), tmp_path / name)
        assert file.inputs == (Port("x", (first, 3, 8, 8), "float32"),)
        assert file.outputs == (Port("y", (first, 10), "float32"),)


def test_real_samples_become_the_golden_inputs(calibrated: Hub, tmp_path: Path) -> None:
    real = dataclasses.replace(calibrated, samples={"x": samples(3)})
    to_tensorrt.export({"fp32": real}, targets.load("jetson"), tmp_path)
    about = json.loads((tmp_path / "bundle.json").read_text())
    assert about["golden_from"] == "samples of the calibration data"
    found = [np.fromfile(tmp_path / run["inputs"]["x"], "<f4").reshape(3, 8, 8) for run in about["golden"]]
    np.testing.assert_array_equal(np.stack(found), samples(3))


def test_samples_of_another_model_are_refused(calibrated: Hub, tmp_path: Path) -> None:
    wrong = dataclasses.replace(calibrated, samples={"x": samples(2, 3, 9, 9)})
    with pytest.raises(DeploykitError, match="do not fit the model's inputs x"):
        to_tensorrt.export({"fp32": wrong}, targets.load("jetson"), tmp_path)


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
    to_tensorrt.export({"fp32": calibrated}, fours, tmp_path)
    run = to_tensorrt.load(tmp_path / "model.fp32.onnx")
    np.testing.assert_allclose(run({"x": samples(6)})["y"], original(calibrated, samples(6)), atol=1e-5)


def test_half_files_keep_their_answer_in_onnx_runtime(bundle: Path) -> None:
    """ORT's own quantization passes make biases with the scale s_x * s_w in float16, which underflows."""
    whole = to_tensorrt.load(bundle / "model.int8.onnx")({"x": samples()})["y"]
    half = to_tensorrt.load(bundle / "model.int8-fp16.onnx")({"x": samples()})["y"]
    assert np.abs(whole - half).max() < 0.05 * np.abs(whole).max()


def test_integer_operators_are_counted_in_the_file(calibrated: Hub, tmp_path: Path) -> None:
    files = to_tensorrt.export(
        dict.fromkeys(("fp32", "int8", "int8-fp16"), calibrated), targets.load("jetson"), tmp_path
    )
    assert [dict(f.quantized) for f in files] == [{}, {"Conv": 2, "Gemm": 1}, {"Conv": 2, "Gemm": 1}]
    assert all(f.islands == () and f.notes == () for f in files)


def test_transposed_convolutions_are_islands_with_a_reason(tmp_path: Path) -> None:
    target = targets.load("jetson")
    found = hub(small_net("ConvTranspose"), target.quant, {"x": samples()})
    (file,) = to_tensorrt.export({"int8": found}, target, tmp_path)
    assert dict(file.quantized) == {"Conv": 1, "Gemm": 1}
    (island,) = file.islands
    assert island.operator == "ConvTranspose"
    assert "float" in island.why
    forced = dataclasses.replace(target.quant, float_operators=())
    (file,) = to_tensorrt.export({"int8": hub(small_net("ConvTranspose"), forced, {"x": samples()})}, target, tmp_path)
    assert [i.why for i in file.islands] == ["TensorRT runs transposed convolutions in float, quantized or not"]


def test_a_layer_kept_in_float_is_an_island_with_the_hubs_reason(tmp_path: Path) -> None:
    target = targets.load("jetson")
    proto = small_net()
    found = hub(proto, target.quant, {"x": samples()}, keep_float=("c2",))
    (file,) = to_tensorrt.export({"int8": found}, target, tmp_path)
    assert file.islands == (Island("Conv", "c2", "kept in float on request"),)


def test_the_canonical_hub_is_refused_with_the_rules_it_breaks(tmp_path: Path) -> None:
    canonical = hub(small_net(), targets.load("x86").quant, {"x": samples()})
    with pytest.raises(DeploykitError, match=r"TensorRT would reject model\.int8\.onnx: Q1 at .*; Q7 at"):
        to_tensorrt.export({"int8": canonical}, targets.load("jetson"), tmp_path)


def test_int8_without_calibration_is_refused(calibrated: Hub, tmp_path: Path) -> None:
    with pytest.raises(DeploykitError, match="needs calibration"):
        to_tensorrt.export({"int8": Hub(calibrated.graph, calibrated.spec)}, targets.load("jetson"), tmp_path)


def test_a_second_free_dimension_is_refused(tmp_path: Path) -> None:
    graph = from_proto(model("y = Relu(x)", "float[batch,length] x", "float[batch,length] y", 20), "test")
    with pytest.raises(DeploykitError, match=r"one free dimension.*x \[batch,\s*length\]"):
        to_tensorrt.export({"fp32": Hub(graph, targets.load("jetson").quant)}, targets.load("jetson"), tmp_path)


def test_a_model_exported_with_a_fixed_batch_keeps_it(tmp_path: Path) -> None:
    graph = FloatGraph(from_proto(model("y = Relu(x)", "float[1,4] x", "float[1,4] y", 20), "test").model)
    to_tensorrt.export({"fp32": Hub(graph, targets.load("gpu-t4").quant)}, targets.load("gpu-t4"), tmp_path)
    about = json.loads((tmp_path / "bundle.json").read_text())
    assert (about["dynamic"], about["batch"]) == (False, [1, 1, 1])


def test_integer_inputs_stay_integers(tmp_path: Path) -> None:
    proto = model(
        "y = Gather(table, i)", "int64[batch,3] i", "float[batch,3,4] y", 20, table=np.eye(4, dtype=np.float32)
    )
    target = targets.load("jetson")
    to_tensorrt.export(dict.fromkeys(("fp32", "fp16"), Hub(from_proto(proto, "test"), target.quant)), target, tmp_path)
    ids = np.array([[0, 1, 3]])
    y = to_tensorrt.load(tmp_path / "model.fp16.onnx")({"i": ids})["y"]
    np.testing.assert_array_equal(y, np.eye(4)[ids])


def test_a_jetson_nano_gets_operator_set_13_and_no_integers(calibrated: Hub, tmp_path: Path) -> None:
    target = targets.load("jetson-nano")
    fp32, fp16 = to_tensorrt.export(dict.fromkeys(target.precisions, calibrated), target, tmp_path)
    about = json.loads((tmp_path / "bundle.json").read_text())
    assert about["sparsity"] is False
    for file in (fp32, fp16):
        proto = onnx.load(tmp_path / file.path)
        assert (proto.opset_import[0].version, proto.ir_version) == (13, 7)
        assert about["models"][file.precision]["typing"] == "weak"
        y = to_tensorrt.load(tmp_path / file.path)({"x": samples(3)})["y"]
        np.testing.assert_allclose(y, original(calibrated, samples(3)), atol=1e-5 if file is fp32 else 2e-2)
    assert fp16.notes == ("TensorRT 8.2 reads no float16 weights: build.py builds fp16 from the fp32 file",)
    with pytest.raises(DeploykitError, match="builds fp16 from the fp32 file: give --precision fp32 too"):
        to_tensorrt.export({"fp16": calibrated}, target, tmp_path)


def test_a_xavier_gets_int8_in_operator_set_17_and_a_float16_file_it_can_read(calibrated: Hub, tmp_path: Path) -> None:
    target = targets.load("jetson-xavier-nx")
    files = to_tensorrt.export(dict.fromkeys(target.precisions, calibrated), target, tmp_path)
    assert [onnx.load(tmp_path / f.path).opset_import[0].version for f in files] == [17, 17, 17]
    assert [dict(f.quantized) for f in files] == [{}, {}, {"Conv": 2, "Gemm": 1}]
    assert all(f.notes == () for f in files)


@pytest.mark.parametrize("name", ["jetson-nano", "jetson-xavier-nx", "jetson", "gpu-h100"])
def test_the_guide_lists_the_files_and_variants_of_its_own_bundle(calibrated: Hub, tmp_path: Path, name: str) -> None:
    target = targets.load(name)
    files = to_tensorrt.export(dict.fromkeys(target.precisions, calibrated), target, tmp_path)
    guide = (tmp_path / "BUILD.md").read_text()
    assert set(re.findall(r"model\.[\w-]+\.onnx", guide)) == {f.path for f in files} and "@" not in guide
    (asked,) = re.findall(r"--only ([\w-]+)", guide)
    assert asked in {"jetson-nano": ["fp16-weak"], "jetson-xavier-nx": ["int8-weak"]}.get(name, ["int8-fp16"])
    assert ("nothing: TensorRT 8.2 cannot read it" in guide) == (name == "jetson-nano")


def test_a_xavier_with_old_software_is_a_profile_of_three_lines(calibrated: Hub, tmp_path: Path) -> None:
    profile = tmp_path / "old-xavier.toml"
    profile.write_text('extends = "jetson-xavier-nx"\nopset = 13\n[options]\ntrt = ["8.2", "8.2"]\nopset_weak = 13\n')
    target = targets.load(str(profile))
    fp32, int8 = to_tensorrt.export(dict.fromkeys(("fp32", "int8"), calibrated), target, tmp_path)
    assert onnx.load(tmp_path / int8.path).opset_import[0].version == 13
    assert dict(int8.quantized) == {"Conv": 2, "Gemm": 1}
    y, z = (to_tensorrt.load(tmp_path / f.path)({"x": samples()})["y"] for f in (fp32, int8))
    assert np.square(y - z).sum() < 1e-2 * np.square(y).sum()


def normed(target: Target) -> Hub:
    body = "n = LayerNormalization(x, s) h = HardSwish(n) y = Trilu<upper=0>(h)"
    proto = model(body, "float[batch,4,8] x", "float[batch,4,8] y", 20, s=np.ones(8, np.float32))
    return Hub(from_proto(proto, "test"), target.quant)


def test_what_an_old_parser_lacks_is_written_out_and_kept_for_a_new_one(tmp_path: Path) -> None:
    for name, has in (("jetson", {"fp32": False, "fp16": True}), ("jetson-thor", {"fp32": True, "fp16": True})):
        target = targets.load(name)
        for file in to_tensorrt.export(dict.fromkeys(("fp32", "fp16"), normed(target)), target, tmp_path):
            operators = {n.op_type for n in onnx.load(tmp_path / file.path).graph.node}
            assert ("LayerNormalization" in operators) == has[file.precision], (name, file.precision)
            assert "HardSwish" in operators


def test_what_no_parser_of_the_device_reads_is_refused_with_operator_layer_and_release(tmp_path: Path) -> None:
    target = targets.load("jetson-nano")
    with pytest.raises(DeploykitError, match=r"operator set 13: Trilu \(layer 'y'\) is defined since 14"):
        to_tensorrt.export({"fp32": normed(target)}, target, tmp_path)
    proto = model("i = IsInf(x) y = Cast<to=1>(i)", "float[batch,4] x", "float[batch,4] y", 20)
    xavier, orin = targets.load("jetson-xavier-nx"), targets.load("jetson")
    with pytest.raises(DeploykitError, match=r"model\.fp32\.onnx: Q21 at 'i': TensorRT 8\.5 has no IsInf"):
        to_tensorrt.export({"fp32": Hub(from_proto(proto, "test"), xavier.quant)}, xavier, tmp_path)
    (file,) = to_tensorrt.export({"fp32": Hub(from_proto(proto, "test"), orin.quant)}, orin, tmp_path)
    assert file.notes == ("Q21 at 'i': TensorRT has IsInf since 8.6; older ones will not build this file",)


def test_pixels_as_they_are_need_a_parser_that_reads_them(tmp_path: Path) -> None:
    proto = model("c = Cast<to=1>(x) y = Relu(c)", "uint8[batch,4] x", "float[batch,4] y", 20)
    nano, xavier = targets.load("jetson-nano"), targets.load("jetson-xavier-nx")
    to_tensorrt.export({"fp32": Hub(from_proto(proto, "test"), xavier.quant)}, xavier, tmp_path)
    with pytest.raises(DeploykitError, match=r"Q21 at 'x': TensorRT 8\.2 has no uint8 inputs"):
        to_tensorrt.export({"fp32": Hub(from_proto(proto, "test"), nano.quant)}, nano, tmp_path)


def test_the_same_hub_gives_the_same_bytes(calibrated: Hub, bundle: Path, tmp_path: Path) -> None:
    target = targets.load("jetson")
    to_tensorrt.export(dict.fromkeys(target.precisions, calibrated), target, tmp_path)
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
        ({"trt": ["8.2", "10.3"]}, "opset_weak must be between 13 and 13, what TensorRT 8.2 reads"),
        ({"trt": ["8.5", "8.6"]}, "opset_strong belongs to targets with TensorRT 10 or later"),
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


def test_strong_typing_cannot_be_left_out_or_asked_of_an_old_tensorrt() -> None:
    jetson, xavier = targets.load("jetson"), targets.load("jetson-xavier-nx")
    without = {k: v for k, v in jetson.options.items() if k != "opset_strong"}
    with pytest.raises(DeploykitError, match="opset_strong belongs to targets with TensorRT 10"):
        options(dataclasses.replace(jetson, options=without))
    with pytest.raises(DeploykitError, match="int8-fp16 files need strong typing, which begins with TensorRT 10"):
        options(dataclasses.replace(xavier, precisions=("fp32", "int8-fp16")))


def test_the_operator_set_of_the_files_is_not_above_the_targets() -> None:
    target: Target = dataclasses.replace(targets.load("jetson"), opset=18)
    with pytest.raises(DeploykitError, match="operator set 19 is above its opset = 18"):
        options(target)
