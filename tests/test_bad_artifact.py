"""Truncated and foreign artifacts are refused by name, and what a runtime says about a file comes through."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from bad_desk import lay_desk, refused
from commands import contents, enter
from graphs import normal, residual

from deploykit import targets
from deploykit.core.target import QuantSpec
from deploykit.exporters import to_tflite
from deploykit.exporters.tflite import runner
from deploykit.hub.graph import Hub


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_desk(tmp_path_factory.mktemp("desk"))


# ------------------------------------------------------------------ truncated and foreign artifacts


def truncate(folder: Path) -> None:
    file = folder / "model.int8.onnx"
    file.write_bytes(file.read_bytes()[:300])


def alter(folder: Path) -> None:
    file = folder / "model.int8.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(bytes(data))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def truncate_and_say_so(folder: Path) -> None:
    """As if the file had been truncated before the manifest was written."""
    truncate(folder)
    data = (folder / "model.int8.onnx").read_bytes()

    def stored(manifest: dict[str, Any]) -> None:
        for entry in manifest["stored"]:
            if entry["path"] == "model.int8.onnx":
                entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    edit_manifest(folder, stored)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "file truncated": (truncate, "model.int8.onnx has 300 bytes, 2"),
    "file altered": (alter, "model.int8.onnx was changed after the export"),
    "file missing": (lambda f: (f / "model.int8.onnx").unlink(), "model.int8.onnx is missing"),
    "manifest missing": (lambda f: (f / "manifest.json").unlink(), "no manifest.json: it is not an artifact"),
    "manifest truncated": (
        lambda f: (f / "manifest.json").write_bytes((f / "manifest.json").read_bytes()[:500]),
        "manifest.json is not a manifest that deploykit wrote",
    ),
    "manifest of something else": (
        lambda f: (f / "manifest.json").write_text('{"name": "web application", "icons": []}'),
        "manifest.json is not a manifest that deploykit wrote",
    ),
    "manifest of another version": (
        lambda f: edit_manifest(f, lambda m: m.update(format="deploykit-artifact-9")),
        "has format 'deploykit-artifact-9'; this deploykit reads",
    ),
    "exporter unknown": (
        lambda f: edit_manifest(f, lambda m: m.update(exporter="onxx")),
        "no exporter 'onxx'. Did you mean 'onnx'?",
    ),
}


@pytest.mark.parametrize("command", ["benchmark", "verify", "report"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_artifact_is_refused(here: Path, tmp_path: Path, damage: str, command: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree("artifact", broken)
    spoil, phrase = DAMAGES[damage]
    spoil(broken)
    before = contents(tmp_path)
    refused(f"{command} {broken}", "broken" if "exporter" not in damage else "onxx", phrase)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", ["benchmark", "verify"])
def test_a_file_that_its_runtime_cannot_open_is_named(here: Path, tmp_path: Path, command: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree("artifact", broken)
    truncate_and_say_so(broken)
    refused(f"{command} {broken}", "ONNX Runtime cannot open", "model.int8.onnx")


def test_verify_as_json_names_the_problems_too(here: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree("artifact", broken)
    truncate(broken)
    said = enter(f"verify {broken} --json")
    assert said.code == 2
    assert "300 bytes" in json.loads(said.out)["problems"][0]


# ------------------------------------------------------------------ what a runtime says on file descriptor 2


GREETS = b"INFO: Created TensorFlow Lite XNNPACK delegate for CPU.\n"


@pytest.fixture
def unmet(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A process that has not been greeted yet."""
    monkeypatch.setattr(runner, "_greeted", threading.Event())
    return runner._greeted


def test_a_runtimes_error_comes_through_without_its_greeting_also_where_it_raises(
    unmet: threading.Event, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        os.write(2, GREETS + b"ERROR: tensor 3 is no tensor\n")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        runner.ungreeted(fail)
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "ERROR: tensor 3 is no tensor\nafterwards\n"
    assert unmet.is_set()


def test_once_greeted_files_are_opened_without_touching_the_descriptor(
    unmet: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = to_tflite.export({"fp32": Hub(residual(), QuantSpec())}, targets.load("mobile-arm"), tmp_path)
    unmet.set()
    monkeypatch.setattr(runner, "ungreeted", None)
    assert to_tflite.load(tmp_path / file.path)({"x": normal(0, 1, 3, 8, 8)})["y"].shape == (1, 4)


def test_threads_that_open_files_at_once_do_not_lose_each_others_errors(
    unmet: threading.Event, capfd: pytest.CaptureFixture[str]
) -> None:
    before = os.fstat(2)

    def speak(i: int) -> None:
        runner.ungreeted(lambda: os.write(2, f"ERROR: {i}\n".encode()))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(speak, range(50)))
    assert sorted(capfd.readouterr().err.split()[1::2], key=int) == [str(i) for i in range(50)]
    assert os.path.samestat(os.fstat(2), before)


def test_a_process_without_stderr_opens_files_too(unmet: threading.Event) -> None:
    kept, called = os.dup(2), []
    os.close(2)
    try:
        runner.ungreeted(lambda: called.append(True))
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    assert called == [True]
