"""A manifest is enough to make its artifact again, or to say what is in the way, or what is not the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import artifact, enter
from conftest import TinyMLP
from graphs import normal
from safetensors.torch import save_file

from deploykit import export, pipeline
from deploykit.asked import files_read
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


def score(outputs, labels):
    return 50.0
"""
LAYERS = """
from torch import nn


class Head(nn.Linear):
    def __init__(self):
        super().__init__(16, 3)
"""
COMMAND = (
    "export {nets}.py:build --weights w.safetensors --target x86 --calib calib.npy --eval test.npz --seed 3 "
    "--thresholds mse --keep-float head --max-drop 50 --no-benchmark"
)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A factory of a name of its own (modules stay imported), which uses a package beside it; weights and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    package = f"parts_{abs(hash(tmp_path))}"
    Path("nets.py").write_text(NETS.replace("parts", package))
    Path(package).mkdir()
    Path(package, "__init__.py").touch()
    Path(package, "layers.py").write_text(LAYERS)
    shutil.move("nets.py", f"{package}_nets.py")
    torch.manual_seed(0)
    net = TinyMLP()
    save_file({k.replace("out.", "head."): v for k, v in net.state_dict().items()}, "w.safetensors")
    np.save("calib.npy", normal(1, 40, 4))
    np.savez("test.npz", x=normal(2, 40, 4), y=np.arange(40) % 3)
    return tmp_path


def nets(desk: Path) -> str:
    return next(desk.glob("*_nets.py")).stem


@pytest.fixture
def exported(desk: Path) -> Manifest:
    said = enter(f"{COMMAND.format(nets=nets(desk))} -o out")
    assert said.code == 0, said.err
    return load_manifest(Path("out"))


# ------------------------------------------------------------------ the manifest


def test_the_manifest_keeps_what_was_typed(desk: Path, exported: Manifest) -> None:
    request = exported.request
    assert (request.model, request.weights, request.target) == (f"{nets(desk)}.py:build", "w.safetensors", "x86")
    assert request.data == {"calibration": "calib.npy", "eval": "test.npz"}
    chosen = request.settings
    assert (chosen.seed, chosen.thresholds, chosen.keep_float) == (3, "mse", ("head",))
    assert request.gate.max_drop == 50
    assert str(desk) not in Path("out/manifest.json").read_text()


def test_the_files_that_were_read_have_hashes_and_what_they_import_beside_them_too(
    desk: Path, exported: Manifest
) -> None:
    package = nets(desk).removesuffix("_nets")
    assert set(exported.request.read) == {f"{package}_nets.py", f"{package}/layers.py", "w.safetensors"}


def test_what_is_installed_is_known_by_its_version_and_not_hashed() -> None:
    assert source_files("deploykit.demo:build") == {}
    assert source_files("torch.nn:Linear") == {}
    assert source_files("json:dumps") == {}


def test_a_compressed_folder_is_hashed_with_the_factory_it_came_from(desk: Path) -> None:
    Path("prune.toml").write_text('[[step]]\nname = "prune"\nsparsity = 0.5\n')
    assert enter(f"compress {nets(desk)}.py:build --recipe prune.toml --calib calib.npy -o small").code == 0
    found = files_read(Request("small", "x86"))
    assert {"small/structure.json", "small/model.safetensors", f"{nets(desk)}.py"} <= set(found)


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


def test_other_weights_are_named_as_the_reason(desk: Path, exported: Manifest) -> None:
    torch.manual_seed(5)
    save_file({k.replace("out.", "head."): v for k, v in TinyMLP().state_dict().items()}, "w.safetensors")
    said = enter("reproduce out")
    assert said.code == 3
    assert "note: w.safetensors was changed since" in said.err
    assert "DIFFERS    model.int8.onnx has other bytes" in said.out
    assert "changed    file w.safetensors: " in said.out and "changed    float graph: " in said.out


def test_other_samples_are_named_as_the_reason(desk: Path, exported: Manifest) -> None:
    np.save("calib.npy", 2 * normal(1, 40, 4))
    said = enter("reproduce out")
    assert said.code == 3
    assert "changed    calibration data, 40 samples: " in said.out
    assert "identical  model.fp32.onnx" in said.out


def test_what_changed_without_a_consequence_is_said_and_is_no_difference(desk: Path, exported: Manifest) -> None:
    file = Path(f"{nets(desk)}.py")
    file.write_text(file.read_text() + "# a remark\n")
    told = json.loads(Path("out/manifest.json").read_text())
    told["versions"]["torch"] = "2.0.0"
    Path("told.json").write_text(json.dumps(told))
    said = enter("reproduce told.json")
    assert said.code == 0
    assert f"changed    file {file}: " in said.out and "changed    version of torch: 2.0.0 -> " in said.out


def test_differences_are_told_file_by_file(exported: Manifest) -> None:
    fewer = [s for s in exported.stored if s.path != "infer.py"]
    larger = [s if s.path != "README.md" else type(s)("README.md", s.bytes + 1, "0") for s in fewer]
    from dataclasses import replace

    found = compared(exported, replace(exported, stored=tuple(larger), scores=()))
    assert found.differing == (
        f"README.md has {exported.stored[0].bytes + 1} bytes, {exported.stored[0].bytes} the first time",
        "infer.py was not written again",
        "manifest.json: scores",
    )


# ------------------------------------------------------------------ impossible


def test_an_export_from_python_objects_says_that_no_file_holds_them(tmp_path: Path, tiny_mlp: TinyMLP) -> None:
    export(tiny_mlp, "x86", normal(0, 20, 4), out=tmp_path / "out", benchmark=False)
    with pytest.raises(
        DeploykitError, match=r"Python objects, which no file holds: model \(TinyMLP\), calibration \(nd"
    ):
        reproduce(tmp_path / "out")
    assert enter("reproduce", tmp_path / "out").code == 2


def test_an_export_from_python_with_paths_can_be_made_again(desk: Path) -> None:
    export(f"{nets(desk)}.py:build", "x86", "calib.npy", weights="w.safetensors", out="out", benchmark=False)
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
def test_training_is_made_again_with_the_threads_it_had(desk: Path) -> None:
    """The suite runs with one thread; two were used here."""
    pytest.importorskip("accelerate", reason="needs the extra train")
    Path("qat.toml").write_text('[[step]]\nname = "qat"\nsteps = 5\n')
    torch.set_num_threads(2)
    command = COMMAND.format(nets=nets(desk)).replace(" --keep-float head", "")
    assert enter(f"{command} --train calib.npy --recipe qat.toml -o out").code in (0, 3)
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

    monkeypatch.setattr(pipeline, "calibrate", calibrating)
    Path("metrics.py").write_text("def broken(outputs, labels):\n    return outputs['nowhere']\n")
    said = enter(f"{COMMAND.format(nets=nets(desk))} --metric metrics.py:broken -o out")
    assert said.code == 2 and "the metric raised KeyError" in said.err
    assert enter(f"export {nets(desk)}.py:build --target x86 --input x=1x4 --no-benchmark -o floats").code == 0
    Path("qat.toml").write_text('[[step]]\nname = "qat"\nsteps = 5\n')
    command = "export floats/model.fp32.onnx --target x86 --calib calib.npy --train calib.npy --recipe qat.toml -o out"
    said = enter(command)
    assert said.code == 2 and "needs a model that PyTorch runs (an .onnx has no teacher)" in said.err
