"""Two manifests side by side: what counts as a step back, and what cannot be compared and does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import enter
from hypothesis import given
from hypothesis import strategies as st

from deploykit.core.artifact import Check, File, Island, Measurement, TensorSpec
from deploykit.core.device import Facts
from deploykit.core.machine import Machine
from deploykit.core.manifest import Manifest, Score, Source, Stored
from deploykit.core.request import Request, Settings
from deploykit.diff import Limits, compare

HERE = "this machine: AMD EPYC, onnxruntime 1.31.1"


def timed(ms: float, where: str = HERE, threads: int = 1) -> Measurement:
    return Measurement("int8", 1, threads, 50, ms, ms, ms, 1000 / ms, None, 400, where)


def scored(accuracy: float | None, agreement: float | None = 98.0) -> Score:
    return Score("int8", 100, "eval", accuracy, agreement, None, {"y": 30.0})


def float_operators(*layers: str) -> File:
    islands = tuple(Island("Conv", layer, "no rule") for layer in layers)
    return File("model.int8.onnx", "int8", {"Conv": 10 - len(layers)}, islands)


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "target": "x86",
        "exporter": "onnx",
        "model": "net.py:build",
        "request": Request("net.py:build", "x86", read={"net.py": "aaaa"}),
        "steps": (),
        "graph": "1111",
        "inputs": (TensorSpec("x", ("batch", 3, 8, 8), "float32"),),
        "outputs": (TensorSpec("y", ("batch", 4), "float32"),),
        "files": (File("model.fp32.onnx", "fp32"), float_operators()),
        "stored": (Stored("model.fp32.onnx", 1000, "f"), Stored("model.int8.onnx", 400, "i")),
        "data": {"eval": Source("test.npz", 100, "dddd")},
        "scores": (scored(90.0),),
        "measurements": (timed(1.0),),
        "versions": {"torch": "2.12"},
        "machine": Machine("AMD EPYC", ("avx2",), 2),
    }
    return Manifest(**(fields | changes))


def regressions(limits: Limits | None = None, **changes: Any) -> tuple[str, ...]:
    return compare(manifest(), manifest(**changes), limits).regressions


def sized(int8: int) -> tuple[Stored, ...]:
    return Stored("model.fp32.onnx", 1000, "f"), Stored("model.int8.onnx", int8, "j")


# ------------------------------------------------------------------ regressions


def test_an_artifact_is_no_step_back_from_itself() -> None:
    found = compare(manifest(), manifest())
    assert found.regressions == () and found.facts == {} and found.not_compared == ()


@given(st.floats(-5, 5), st.floats(0, 3))
def test_accuracy_may_fall_by_as_much_as_allowed(drop: float, allowed: float) -> None:
    found = regressions(Limits(max_drop=allowed), scores=(scored(90.0 - drop),))
    assert (found != ()) == (90.0 - (90.0 - drop) > allowed)


def test_without_labels_agreement_counts() -> None:
    old, new = manifest(scores=(scored(None, 98.0),)), manifest(scores=(scored(None, 96.0),))
    assert compare(old, new).regressions == ("int8: 2.00 points of agreement lost (allowed: 0.5)",)


def test_size_and_latency_may_grow_by_as_much_as_allowed() -> None:
    assert regressions(stored=sized(404)) == ()
    assert regressions(stored=sized(420)) == ("int8: 5.0 % larger (allowed: 1 %)",)
    assert regressions(Limits(max_growth=10), stored=sized(420)) == ()
    assert regressions(measurements=(timed(1.1),)) == ()
    assert regressions(measurements=(timed(1.5),)) == ("int8: 50 % slower (allowed: 20 %)",)
    assert (
        regressions(measurements=(timed(1.5, HERE.replace("1.31", "1.32")),)) != ()
    )  # an update is what one looks for


def test_operators_that_fell_back_to_float_are_named() -> None:
    found = compare(manifest(files=(float_operators("a", "b"),)), manifest(files=(float_operators("b", "c", "d"),)))
    (change,) = [f for f in found.files if f.precision == "int8"]
    assert change.became_float == ("Conv c: no rule", "Conv d: no rule")
    assert change.became_integer == ("Conv a",)
    assert change.counts == {"Conv": (8, 7)}
    assert "int8: 2 operators fell back to float (allowed: 0)" in found.regressions
    assert regressions(Limits(max_float=1), files=(File("model.fp32.onnx", "fp32"), float_operators("a"))) == ()


def test_a_precision_that_is_gone_is_a_step_back_whatever_else() -> None:
    found = regressions(files=(File("model.fp32.onnx", "fp32"),), stored=sized(0)[:1], scores=(), measurements=())
    assert found == ("int8: there is no such file any more",)


def test_other_inputs_are_a_step_back() -> None:
    (sentence,) = regressions(inputs=(TensorSpec("image", ("batch", 8, 8, 3), "uint8"),))
    assert "the inputs are others: x float32" in sentence and "image uint8" in sentence


def test_a_check_that_fails_now_is_a_step_back_and_one_that_failed_before_is_not() -> None:
    failing = Check("lost accuracy (points)", "int8", 3.0, 2.0, False)
    assert regressions(checks=(failing,)) == ("int8: lost accuracy (points) fails: 3.00, bound 2.00",)
    old, new = manifest(checks=(failing,)), manifest(checks=(replace(failing, value=3.1),))
    assert compare(old, new).regressions == ()


# ------------------------------------------------------------------ what cannot be compared


def test_scores_on_other_data_are_not_compared() -> None:
    found = compare(manifest(), manifest(scores=(scored(50.0),), data={"eval": Source("other.npz", 10, "eeee")}))
    assert found.regressions == ()
    assert any("other data (test.npz, 100 samples; other.npz, 10 samples)" in s for s in found.not_compared)


def test_scores_without_a_hash_of_their_data_are_compared_only_under_one_name() -> None:
    other = replace(scored(50.0), data="other.npz", samples=10)
    found = compare(manifest(), manifest(scores=(other,), data={}))
    assert found.regressions == ()
    assert any("other data (eval, 100 samples; other.npz, 10 samples)" in s for s in found.not_compared)
    assert compare(manifest(), manifest(scores=(scored(50.0),), data={})).regressions != ()
    moved = replace(scored(50.0), data="moved/eval")  # the same content
    assert compare(manifest(), manifest(scores=(moved,))).regressions != ()


def test_a_runtime_with_commas_of_its_own_is_no_other_place() -> None:
    old, new = (f"openvino 2026.4.{i} on the CPU, INFERENCE_PRECISION_HINT=f32" for i in (0, 1))
    here = "this machine: AMD EPYC, "
    found = compare(manifest(measurements=(timed(1.0, here + old),)), manifest(measurements=(timed(1.5, here + new),)))
    assert found.regressions == ("int8: 50 % slower (allowed: 20 %)",) and found.not_compared == ()
    board = Facts("ssh://pi", "pi", "aarch64", "Linux", "Raspberry Pi 5")
    before, now = (
        manifest(device=board, measurements=(timed(ms, f"{board.text}, {runtime}"),))
        for ms, runtime in ((1.0, old), (1.5, new))
    )
    assert compare(before, now).regressions == found.regressions
    assert "different places" in compare(manifest(), now).not_compared[0]


@pytest.mark.parametrize(
    ("measurement", "why"),
    [
        (timed(9.0, "this machine: Xeon, onnxruntime 1.31.1"), "different places"),
        (timed(9.0, threads=4), "1 threads; batch 1 and 4|batch 1 and 1 threads; 1 and 4"),
    ],
)
def test_times_of_another_machine_are_not_compared(measurement: Measurement, why: str) -> None:
    found = compare(manifest(), manifest(measurements=(measurement,)))
    assert found.regressions == ()
    (sentence,) = found.not_compared
    assert any(part in sentence for part in why.split("|"))


def test_what_was_not_measured_is_no_step_back() -> None:
    assert regressions(scores=(), measurements=()) == ()


# ------------------------------------------------------------------ what went in


def test_settings_files_data_versions_and_machine_that_changed_are_named() -> None:
    request = Request("net.py:build", "x86", read={"net.py": "bbbb"}, settings=Settings(seed=3, thresholds="mse"))
    new = manifest(
        request=request, graph="2222", versions={"torch": "2.13", "onnx": "1.23"}, machine=Machine("AMD EPYC", (), 1)
    )
    assert compare(manifest(), new).facts == {
        "settings.seed": ("0", "3"),
        "settings.thresholds": ("minmax", "mse"),
        "float graph": ("1111", "2222"),
        "file net.py": ("aaaa", "bbbb"),
        "version of torch": ("2.12", "2.13"),
        "version of onnx": ("–", "1.23"),
        "machine.features": ("avx2", "none"),
        "machine.threads": ("2", "1"),
    }


# ------------------------------------------------------------------ the command


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, written in (("old", manifest()), ("new", manifest(stored=sized(420), scores=(scored(89.0),)))):
        (tmp_path / name).mkdir()
        written.save(tmp_path / name)
    return tmp_path


def test_the_command_ends_with_3_and_says_why(desk: Path) -> None:
    said = enter("diff old/manifest.json new/manifest.json")
    assert said.code == 3
    assert "new/manifest.json is a step back from old/manifest.json" in said.err
    assert "int8: 5.0 % larger" in said.err and "int8: 1.00 points of accuracy lost" in said.err
    assert "90.00 -> 89.00" in said.out and "400 B -> 420 B" in said.out
    assert enter("diff old/manifest.json new/manifest.json --max-growth 10 --max-drop 1").code == 0
    assert enter("diff new/manifest.json old/manifest.json").code == 0


def test_the_command_prints_json(desk: Path) -> None:
    said = enter("diff old/manifest.json new/manifest.json --json")
    assert said.code == 3
    found = json.loads(said.out)
    assert len(found["regressions"]) == 2
    (int8,) = [f for f in found["files"] if f["precision"] == "int8"]
    assert (int8["bytes"]["old"], int8["bytes"]["new"]) == (400, 420)


def test_the_command_refuses_what_is_no_artifact(desk: Path) -> None:
    assert enter("diff old/manifest.json nowhere").code == 2
    Path("other.json").write_text('{"name": "other"}')
    assert "other.json is not a manifest that deploykit wrote" in enter("diff old/manifest.json other.json").err


def test_a_folder_whose_files_are_not_those_of_its_manifest_is_refused(desk: Path) -> None:
    said = enter("diff old/manifest.json new")
    assert said.code == 2 and "model.int8.onnx is missing" in said.err


def test_a_manifest_of_an_older_deploykit_says_so(desk: Path) -> None:
    old = json.loads(Path("old/manifest.json").read_text()) | {
        "format": "deploykit-artifact-1",
        "recipe": "",
        "seed": 0,
    }
    del old["request"]
    Path("old/manifest.json").write_text(json.dumps(old))
    said = enter("diff old/manifest.json new/manifest.json")
    assert said.code == 2
    assert "has format 'deploykit-artifact-1'; this deploykit reads 'deploykit-artifact-2': export it again" in said.err
