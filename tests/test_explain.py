"""What an artifact itself knows of its operators, what is refused, and how it is told."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from commands import enter
from explain_desk import NET, exported, lay_desk, plain, refused, told
from small_artifact import small_artifact

from deploykit import targets
from deploykit.core.artifact import Island
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import Layer, load_manifest
from deploykit.explain import explain, timing
from deploykit.explain.explanation import Alternative, Quality
from deploykit.explain.known import operators
from deploykit.explain.page import render


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_desk(tmp_path_factory.mktemp("explain"))


# ------------------------------------------------------------------ from the artifact alone


def test_an_artifact_is_explained_without_its_model(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(plain(here), folder)
    monkeypatch.chdir(tmp_path)  # neither model nor data are here
    found = explain(folder)
    manifest = load_manifest(folder)
    assert [o.layer for o in found.operators] == [layer.name for layer in manifest.layers]
    own = {o.layer: o.sqnr_db for o in manifest.operators}
    assert {o.layer: o.sqnr_db for o in found.operators if o.sqnr_db is not None} == own
    assert [o.layer for o in found.worst] == sorted(own, key=lambda name: own[name])
    assert found.measured is None
    assert all(o.weights is None and o.values is None for o in found.operators)  # not measured is not 0
    assert found.convergence is not None and found.convergence.parts == (8, 16, 32, 40)


def test_times_are_the_runtimes_own_and_only_where_it_tells_them(here: Path) -> None:
    found = explain(plain(here))
    assert "onnxruntime" in found.timed_on
    assert all(o.ms is not None and o.ms > 0 for o in found.operators if o.operator == "Conv")
    phone = exported(here, "phone", "build --calib explained.py:calib --target mobile-arm")
    assert explain(phone).timed_on == ""
    assert all(o.ms is None for o in explain(phone).operators)


def test_a_profile_is_read_by_layer_and_conversions_stand_beside_the_operator_in_float() -> None:
    def event(name: str, op: str, kind: str, micros: int) -> dict:
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": micros,
                "args": {"op_name": op, "input_type_shape": [{kind: [1]}]}}  # fmt: skip

    events = [
        *[event("conv_token_3", "QLinearConv", "uint8", m) for m in (90, 90, 90, 10, 20, 30)],
        event("pad", "Pad", "float", 5), event("pad_q", "QuantizeLinear", "float", 7),
        event("x_dq", "DequantizeLinear", "uint8", 3), {"cat": "Session", "name": "run", "dur": 1},
    ]  # fmt: skip
    times = timing._read(events, {"pad_q": "pad", "x_dq": "pad"}, "here")
    assert times.of("conv").ms == pytest.approx(0.020)  # the median, without the first three
    assert times.of("conv").runs_in == "integer"
    pad = times.of("pad")
    assert (pad.ms, pad.converting_ms, pad.runs_in) == (0.005, pytest.approx(0.010), "float")
    assert pad.slow(is_float=False) == [
        "the runtime has no integer kernel for it and runs it in float",
        "29 % of the call converts what it reads or writes",
    ]
    assert pad.slow(is_float=True) == ["29 % of the call converts what it reads or writes"]
    assert times.of("elsewhere").ms is None


def test_float_operators_say_why_and_conversions_around_them_are_seen(tmp_path: Path) -> None:
    layers = tuple(Layer(name, op) for name, op in (("a", "Conv"), ("e", "Erf"), ("y", "Gemm"), ("z", "Abs")))
    manifest = small_artifact(tmp_path / "x", layers=layers)
    file = next(f for f in manifest.files if f.precision == "int8")
    islands = (Island("Erf", "e", "no integer form"), Island("Abs", "z", "no integer form"))
    found = {o.layer: o for o in operators(manifest, replace(file, islands=islands), None)}
    assert (found["e"].state, found["e"].why) == ("float", "no integer form")
    assert any("between integers" in reason for reason in found["e"].slow)
    assert found["a"].slow == ()


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (Layer("l", "Conv", 64, 64, 1), None),
        (Layer("l", "Conv", 3, 64, 1), None),  # colours are three
        (Layer("l", "Conv", 1, 64, 1), None),  # depthwise
        (Layer("l", "Gemm", 64, 10, 1), "64 × 10 channels fill 62 % of a unit that works on multiples of 16"),
        (Layer("l", "Conv", 20, 64, 1), "20 × 64 channels fill 62 % of a unit that works on multiples of 16"),
        (Layer("l", "Gemm"), None),
    ],
)
def test_channels_beside_the_multiple_of_the_target_are_counted(
    tmp_path: Path, layer: Layer, expected: str | None
) -> None:
    assert targets.load("x86").channel_multiple == 16
    manifest = small_artifact(tmp_path / "x", layers=(layer,))
    (found,) = operators(manifest, manifest.files[-1], None)
    assert found.slow == (() if expected is None else (expected,))


@pytest.fixture
def many(here: Path) -> Path:
    """One network in 8 bits, with weights alone as integers, and with activations of 16 bits."""
    wanted = "--precision int8 --precision w8 --precision int16x8"
    return exported(here, "many", f"build --calib explained.py:calib --target x86 {wanted}")


def test_where_weights_alone_are_integers_nothing_is_said_of_activations(many: Path) -> None:
    found = explain(many, "w8")
    file = onnx.load(many / "model.w8.onnx").graph
    read = {node.input[0] for node in file.node if node.op_type in ("DequantizeLinear", "Cast")}
    stored = {t.name for t in file.initializer if t.data_type == onnx.TensorProto.INT8}
    assert read and read <= stored  # the file has no integer activation
    kept = {i.layer for f in load_manifest(many).files if f.precision == "w8" for i in f.islands}
    products = {o.layer for o in found.operators if o.operator in ("Conv", "Gemm", "MatMul")}
    assert {o.layer for o in found.operators if o.state == "weights"} == products - kept
    assert {o.state for o in found.operators} <= {"weights", "float"}
    assert (found.spans, found.convergence, found.notes, found.worst) == ((), None, (), ())
    said = enter("explain many --precision w8")
    assert "with integer weights" in said.out and said.code == 0
    for phrase in ("ranges", "no integer kernel", "--calib", " integer,", "between integers"):
        assert phrase not in said.out
    assert explain(many, "int8").spans  # which has them
    refused("explain many --precision w8 --calib explained.py:calib", "w8 file was not calibrated")


def test_integers_that_the_runtime_computes_in_float_are_counted_as_such(many: Path) -> None:
    found = explain(many, "int16x8")
    back = [o.layer for o in found.operators if o.state == "integer" and o.runs_in == "float"]
    reason = "the runtime has no integer kernel for it and runs it in float"
    assert back and back == [o.layer for o in found.operators if reason in o.slow and o.state == "integer"]
    assert {"Conv", "Gemm"} & {o.operator for o in found.operators if o.layer in back}  # no 16-bit kernels there
    said = enter("explain many --precision int16x8").out.splitlines()[0]
    assert f"{found.count('integer')} integer ({len(back)} of them computed in float by the runtime)" in said


def test_bits_of_weights_are_told_layer_by_layer_as_the_file_stores_them(here: Path) -> None:
    pytest.importorskip("scipy")
    (here / "mixed.toml").write_text('[[step]]\nname = "mixed"\nbytes = 0.7\n')
    folder = exported(
        here, "fewer", "build --calib explained.py:calib --target x86 --recipe mixed.toml --precision int8"
    )
    found = explain(folder)
    stored = onnx.load(folder / "model.int8.onnx").graph.initializer
    few = sum(t.data_type == onnx.TensorProto.INT4 for t in stored)
    bits = {o.layer: o.bits for o in found.operators if o.bits is not None}
    assert set(bits.values()) == {4, 8} and list(bits.values()).count(4) == few
    assert set(bits) == {o.layer for o in found.operators if o.operator in ("Conv", "Gemm", "MatMul")}
    said = enter("explain fewer").out
    assert f"bits of the weights, all {len(bits)}" in said
    for layer, b in bits.items():
        assert re.search(rf"^ {re.escape(layer)} +\w+ +{b} $", said, re.MULTILINE)
    assert {
        o["layer"]: o["bits"] for o in json.loads(enter("explain fewer --json").out)["operators"] if o["bits"]
    } == bits
    assert all(o.bits is None for o in explain(plain(here)).operators)


# ------------------------------------------------------------------ refusals


def test_what_cannot_be_explained_says_why(here: Path) -> None:
    folder = plain(here).name
    refused("explain nowhere", "no folder nowhere")
    refused(f"explain {folder} --precision int9", "no integer file of precision 'int9'. Did you mean 'int8'")
    refused(f"explain {folder} --eval explained.py:test", "give --calib")
    refused(f"explain {folder} --calib explained.py:one_spike", "calibrated on .* other samples .* those of the export")
    exported(here, "floats", "build --target x86 --input x=1x3x8x8")
    refused("explain floats", "no file holds any.*--calib")
    exported(here, "eights", "build --target gpu-h100 --precision fp8 --calib explained.py:calib")
    refused("explain eights", "no file holds any.*stays in float in fp8.*report.html")


def test_measuring_needs_the_model_as_it_was(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(plain(here), tmp_path / "plain")
    monkeypatch.chdir(tmp_path)
    refused("explain plain --calib explained.py:calib", "Paths are meant from the folder")
    (tmp_path / "explained.py").write_text(NET.replace("manual_seed(0)", "manual_seed(1)"))
    refused("explain plain --calib explained.py:calib", "exported from another model")


def test_an_export_from_python_objects_is_explained_but_not_measured(here: Path) -> None:
    import torch
    from torch import nn

    import deploykit as dk

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    data = np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)
    if not (here / "object").exists():
        dk.export(net, "x86", data, out=here / "object", benchmark=False)
    assert enter("explain object").code == 0
    refused("explain object --calib explained.py:calib", "Python object")


def test_recipes_that_train_are_not_run_again(here: Path) -> None:
    (here / "train.toml").write_text('[[step]]\nname = "qat"\nsteps = 1\n')
    exported(
        here, "trained",
        "build --calib explained.py:calib --train explained.py:calib --target x86 --recipe train.toml",
    )  # fmt: skip
    refused("explain trained --calib explained.py:calib", "train once more")


def test_a_page_of_somebody_else_is_not_replaced(here: Path) -> None:
    (here / "mine.html").write_text("<html>mine</html>")
    refused(f"explain {plain(here).name} -o mine.html", "not a page that deploykit wrote")
    assert (here / "mine.html").read_text() == "<html>mine</html>"


# ------------------------------------------------------------------ how it is told


def test_the_terminal_shows_tables_and_what_to_do_next(here: Path) -> None:
    said = enter(f"explain {plain(here).name}")
    assert said.code == 0
    assert "worst operators by their own error" in said.out
    assert "ranges, " in said.out and "covered by minmax" in said.out
    assert "ranges by number of calibration samples" in said.out
    assert "add --calib DATA" in said.out


def test_measured_alternatives_come_first_in_the_terminal_with_what_to_type(here: Path) -> None:
    folder = exported(here, "spike", "build --calib explained.py:one_spike --eval explained.py:test --target x86")
    said = enter(f"explain {folder.name} --calib explained.py:one_spike --samples 32")
    assert said.code == 0, said.err
    assert said.out.index("what would be better") < said.out.index("worst operators by their share")
    assert "--thresholds percentile" in said.out
    assert "answers by number of calibration samples" in said.out


def test_json_has_everything_and_none_where_nothing_was_measured(here: Path) -> None:
    found = json.loads(enter(f"explain {plain(here).name} --json").out)
    assert found["precision"] == "int8" and found["measured"] is None
    assert {"layer", "state", "why", "sqnr_db", "weights", "values", "ms", "slow"} <= set(found["operators"][0])
    assert found["convergence"]["parts"] == [8, 16, 32, 40]


def test_the_page_needs_nothing_else_and_escapes_names(here: Path, tmp_path: Path) -> None:
    said = enter(f"explain {plain(here).name} -o {tmp_path / 'page.html'}")
    assert said.code == 0 and said.out.endswith("page.html\n")
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert page.count("<svg") >= 3  # pictures of ranges
    found = explain(plain(here))
    evil = replace(found, operators=(replace(found.operators[0], layer="<b>layer</b>"), *found.operators[1:]))
    assert "<b>layer</b>" not in render(evil) and "&lt;b&gt;layer&lt;/b&gt;" in render(evil)


def test_the_page_draws_what_was_measured() -> None:
    from deploykit.explain.explanation import Explanation, Operator

    alternative = Alternative("thresholds by mse", "--thresholds mse", Quality(31, 99, 80), 1.0, 0.5, 0, 2.0)
    e = Explanation(
        "out", "model.int8.onnx", "int8", "x86", (Operator("a", "Conv", "integer", sqnr_db=30.0, weights=60.0),),
        (), 0, "minmax", None, (), replace(told(20, 30, 30, 30), alternatives=(alternative,)),
    )  # fmt: skip
    page = render(e)
    assert "What would be better" in page and "--thresholds mse" in page
    assert "Answers by number of calibration samples" in page and 'class="front"' in page


def test_a_manifest_of_an_older_export_without_sizes_is_explained(tmp_path: Path) -> None:
    manifest = small_artifact(tmp_path / "x", layers=(Layer("a", "Conv"), Layer("y", "Gemm")))
    assert [o.layer for o in explain(tmp_path / "x").operators] == ["a", "y"]
    assert manifest.layers[0].outputs is None
    with pytest.raises(DeploykitError, match="not calibrated"):
        explain(tmp_path / "x", calibration="images")
