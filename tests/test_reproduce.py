"""A manifest is enough to make its artifact again, or to say what is in the way, or what is not the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import artifact, enter
from conftest import TinyMLP
from graphs import normal, residual
from safetensors.torch import save_file

from deploykit import bench, export, pipeline
from deploykit.asked import files_read
from deploykit.core.artifact import Check
from deploykit.core.device import Facts
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import Manifest, load_manifest
from deploykit.core.request import Request, Settings
from deploykit.core.user_code import source_files
from deploykit.reproduce import compared, reproduce

NETS = """
from torch import nn

from parts.layers import Head


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(4, 16)
        self.head = Head()

    def forward(self, x):
        return self.head(self.hidden(x).relu())


def build():
    return Net()
"""
LAYERS = """
from torch import nn


class Head(nn.Linear):
    def __init__(self):
        super().__init__(16, 3)
"""
COMMAND = (
    "export net.onnx --target x86 --calib calib.npy --eval test.npz --metric metrics.py:score --seed 3 "
    "--thresholds mse --keep-float b --max-drop 50 --no-benchmark"
)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A network as .onnx, data, and a metric."""
    monkeypatch.chdir(tmp_path)
    Path("net.onnx").write_bytes(residual().bytes)
    Path("metrics.py").write_text("def score(outputs, labels):\n    return float(abs(outputs['y']).mean())\n")
    np.save("calib.npy", normal(9, 20, 3, 8, 8))
    np.savez("test.npz", x=normal(8, 20, 3, 8, 8), y=np.arange(20) % 4)
    return tmp_path


@pytest.fixture
def exported(desk: Path) -> Manifest:
    said = enter(f"{COMMAND} -o out")
    assert said.code == 0, said.err
    return load_manifest(Path("out"))


@pytest.fixture
def factory(desk: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a factory that uses a package beside it, both of names of their own (modules stay imported), with
    weights and data."""
    monkeypatch.syspath_prepend(str(desk))
    package = f"parts_{abs(hash(desk))}"
    Path(f"{package}_nets.py").write_text(NETS.replace("parts", package))
    Path(package).mkdir()
    Path(package, "__init__.py").touch()
    Path(package, "layers.py").write_text(LAYERS)
    write_weights(0)
    np.save("table.npy", normal(1, 40, 4))
    return f"{package}_nets.py:build"


def write_weights(seed: int) -> None:
    torch.manual_seed(seed)
    save_file({k.replace("out.", "head."): v for k, v in TinyMLP().state_dict().items()}, "w.safetensors")


# ------------------------------------------------------------------ the manifest


def test_the_manifest_keeps_what_was_typed(desk: Path, exported: Manifest) -> None:
    request = exported.request
    assert (request.model, request.weights, request.target) == ("net.onnx", None, "x86")
    assert request.data == {"calibration": "calib.npy", "eval": "test.npz"}
    assert request.metric == "metrics.py:score"
    chosen = request.settings
    assert (chosen.seed, chosen.thresholds, chosen.keep_float) == (3, "mse", ("b",))
    assert request.gate.max_drop == 50
    assert set(request.read) == {"metrics.py", "net.onnx"}
    assert str(desk) not in Path("out/manifest.json").read_text()


def test_the_users_python_is_hashed_with_what_it_imports_from_beside_it(factory: str) -> None:
    nets = factory.removesuffix(":build")
    package = nets.removesuffix("_nets.py")
    found = files_read(Request(factory, "x86", "w.safetensors"))
    assert set(found) == {nets, f"{package}/layers.py", "w.safetensors"}
    Path(package, "layers.py").write_text(LAYERS + "# a remark\n")
    changed = files_read(Request(factory, "x86", "w.safetensors"))
    assert {name for name in found if found[name] != changed[name]} == {f"{package}/layers.py"}


def test_what_is_installed_is_known_by_its_version_and_not_hashed() -> None:
    assert source_files("deploykit.demo:build") == {}
    assert source_files("torch.nn:Linear") == {}
    assert source_files("json:dumps") == {}


def test_a_compressed_folder_is_hashed_with_the_factory_it_came_from(factory: str) -> None:
    Path("prune.toml").write_text('[[step]]\nname = "sparsify"\nsparsity = 0.5\n')
    assert enter(f"compress {factory} --recipe prune.toml --calib table.npy -o small").code == 0
    found = files_read(Request("small", "x86"))
    assert {"small/structure.json", "small/model.safetensors", factory.removesuffix(":build")} <= set(found)


def test_advice_about_times_is_no_note(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "int8 is slower than fp32 here (2.00 times): use model.fp32.onnx"
    monkeypatch.setattr(bench, "measure_artifact", lambda *_, **__: ((), (slow,)))
    said = enter(f"{COMMAND.replace(' --no-benchmark', '')} -o out")
    assert slow in said.out
    manifest = load_manifest(Path("out"))
    assert manifest.advice == (slow,) and slow not in manifest.notes


# ------------------------------------------------------------------ made again


def test_an_export_is_made_again_byte_by_byte_from_its_manifest_alone(desk: Path, exported: Manifest) -> None:
    shutil.copy("out/manifest.json", "told.json")
    first = artifact(Path("out"))
    shutil.rmtree("out")
    said = enter("reproduce told.json -o again")
    assert said.code == 0, said
    assert set(said.out.splitlines()) == {f"identical  {name}" for name in first}
    assert artifact(Path("again")) == first
    assert json.loads(enter("reproduce again --json").out)["identical"] is True


def test_nothing_is_left_behind_where_no_folder_was_asked_for(desk: Path, exported: Manifest) -> None:
    before = sorted(p for p in desk.rglob("*") if "__pycache__" not in p.parts)
    assert enter("reproduce out").code == 0
    assert sorted(p for p in desk.rglob("*") if "__pycache__" not in p.parts) == before
    assert enter("reproduce out -o out").code == 2


def test_other_weights_are_named_as_the_reason(factory: str) -> None:
    command = f"export {factory} --weights w.safetensors --target x86 --calib table.npy --no-benchmark"
    assert enter(f"{command} -o out").code == 0
    write_weights(5)
    said = enter("reproduce out")
    assert said.code == 3
    assert "note: w.safetensors was changed since" in said.err
    assert "DIFFERS    model.int8.onnx has other bytes" in said.out
    assert "changed    file w.safetensors: " in said.out and "changed    float graph: " in said.out


def test_other_samples_are_named_as_the_reason(desk: Path, exported: Manifest) -> None:
    np.save("calib.npy", 2 * normal(9, 20, 3, 8, 8))
    said = enter("reproduce out")
    assert said.code == 3
    assert "changed    calibration data, 20 samples: " in said.out
    assert "identical  model.fp32.onnx" in said.out


def test_what_changed_without_a_consequence_is_said_and_is_no_difference(desk: Path, exported: Manifest) -> None:
    Path("metrics.py").write_text(Path("metrics.py").read_text() + "# a remark\n")
    told = json.loads(Path("out/manifest.json").read_text())
    told["versions"]["torch"] = "2.0.0"
    Path("told.json").write_text(json.dumps(told))
    said = enter("reproduce told.json")
    assert said.code == 0
    assert "changed    file metrics.py: " in said.out and "changed    version of torch: 2.0.0 -> " in said.out


def test_differences_are_told_file_by_file(exported: Manifest) -> None:
    readme = exported.stored[0]
    assert readme.path == "README.md"
    stored = [replace(readme, bytes=readme.bytes + 1), *(s for s in exported.stored[1:] if s.path != "infer.py")]
    found = compared(exported, replace(exported, stored=tuple(stored), scores=()))
    assert found.differing == (
        f"README.md has {readme.bytes + 1} bytes, {readme.bytes} the first time",
        "infer.py was not written again",
        "manifest.json: scores",
    )


def test_what_a_device_answered_is_not_made_again_and_no_difference(exported: Manifest) -> None:
    there = replace(exported.scores[-1], data="answered on a board")
    check = Check("answers there as here (%)", "int8", 100.0, 96.0, True)
    tried = replace(
        exported, device=Facts("local", "a board", "aarch64"), scores=(there, *exported.scores),
        checks=(*exported.checks, check),
    )  # fmt: skip
    assert compared(tried, exported).identical
    assert not compared(exported, replace(exported, checks=exported.checks[1:])).identical


# ------------------------------------------------------------------ impossible


def test_an_export_from_python_objects_says_that_no_file_holds_them(tmp_path: Path, tiny_mlp: TinyMLP) -> None:
    export(tiny_mlp, "x86", normal(0, 20, 4), out=tmp_path / "out", benchmark=False)
    with pytest.raises(
        DeploykitError, match=r"Python objects, which no file holds: model \(TinyMLP\), calibration \(nd"
    ):
        reproduce(tmp_path / "out")
    assert enter("reproduce", tmp_path / "out").code == 2


def test_an_export_from_python_with_paths_can_be_made_again(desk: Path) -> None:
    export("net.onnx", "x86", "calib.npy", out="out", benchmark=False, seed=2)
    assert enter("reproduce out").code == 0


def test_from_another_folder_it_is_said_where_paths_are_meant_from(
    desk: Path, exported: Manifest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    said = enter("reproduce", desk / "out")
    assert said.code == 2
    assert "cannot be made again here: no file" in said.err
    assert "from the folder that the export was started in" in said.err


# ------------------------------------------------------------------ training


@pytest.mark.slow
def test_training_is_made_again_with_the_threads_it_had(factory: str) -> None:
    """The suite runs with one thread; two were used here."""
    pytest.importorskip("accelerate", reason="needs the extra train")
    Path("qat.toml").write_text('[[step]]\nname = "qat"\nsteps = 5\n')
    torch.set_num_threads(2)
    command = f"export {factory} --weights w.safetensors --target x86 --calib table.npy --train table.npy"
    assert enter(f"{command} --recipe qat.toml --no-benchmark -o out").code in (0, 3)
    assert load_manifest(Path("out")).machine.threads == 2  # type: ignore[union-attr]
    torch.set_num_threads(1)
    said = enter("reproduce out")
    assert said.code == 0, said
    assert "note: torch runs with 2 threads, as it did" in said.err
    assert torch.get_num_threads() == 1


@pytest.mark.slow
def test_the_demos_artifact_is_made_again_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="needs the extra demo")
    pytest.importorskip("accelerate", reason="needs the extra train")
    from deploykit import demo

    monkeypatch.setattr(demo, "TARGETS", ("x86",))
    monkeypatch.setattr(demo, "Settings", lambda **given: Settings(benchmark=False, **given))
    demo.run(tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    found = reproduce(tmp_path / "demo" / "x86" / "manifest.json")
    assert found.identical and found.changed == {}


# ------------------------------------------------------------------ refused before any long work


def test_a_metric_that_fails_and_a_step_without_a_teacher_cost_no_calibration(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calibrating(*_: object) -> None:
        raise AssertionError("calibrated")

    monkeypatch.setattr(pipeline.steps, "calibrate", calibrating)
    Path("metrics.py").write_text("def broken(outputs, labels):\n    return outputs['nowhere']\n")
    said = enter(f"{COMMAND.replace('metrics.py:score', 'metrics.py:broken')} -o out")
    assert said.code == 2 and "the metric raised KeyError" in said.err
    Path("qat.toml").write_text('[[step]]\nname = "qat"\nsteps = 5\n')
    said = enter("export net.onnx --target x86 --calib calib.npy --train calib.npy --recipe qat.toml -o out")
    assert said.code == 2 and "needs a model that PyTorch runs (an .onnx has no teacher)" in said.err
