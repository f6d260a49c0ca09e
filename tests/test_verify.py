"""An artifact is verified where it is: files whole, answers as they were, and nothing passes that did not run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import enter
from conftest import TinyCNN
from graphs import normal, residual
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_artifact import small_artifact

from deploykit import export, exporters
from deploykit.core.artifact import Arrays, Runner
from deploykit.core.errors import MissingExtra
from deploykit.core.golden import (
    BYTES,
    HUB,
    ORIGINAL,
    SAMPLES,
    VALUES,
    Golden,
    load_golden,
    some_samples,
    some_values,
)
from deploykit.verify import verify

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained-looking CNN for x86, float and int8, made once."""
    folder = tmp_path_factory.mktemp("verify") / "out"
    torch.manual_seed(0)
    export(TinyCNN().eval(), "x86", normal(0, 40, 3, 16, 16), out=folder, benchmark=False)
    return folder


Answer = Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]


def answering(monkeypatch: pytest.MonkeyPatch, change: Answer, exporter: str = "onnx") -> None:
    """As if the runtime here computed something else."""
    module = exporters.load(exporter)
    load = module.load

    def other(path: Path, threads: int = 1) -> Runner:
        run = load(path, threads)

        def changed(arrays: Arrays) -> dict[str, NDArray[Any]]:
            return change(run(arrays))

        return changed

    monkeypatch.setattr(module, "load", other)


def noisy(share: float) -> Answer:
    """Noise of this share of the signal's standard deviation."""

    def change(outputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        random = np.random.default_rng(0)
        return {n: a + (share * a.std() * random.standard_normal(a.shape)).astype(a.dtype) for n, a in outputs.items()}

    return change


# ------------------------------------------------------------------ answers


@pytest.mark.parametrize("target", ["x86", "mobile-arm", "jetson", "fpga-int8"])
def test_where_it_was_made_an_artifact_gives_the_very_same_numbers(tmp_path: Path, target: str) -> None:
    if target == "mobile-arm":
        pytest.importorskip("ai_edge_litert", reason="needs the extra tflite")
    if target == "fpga-int8" and shutil.which("cc") is None:
        pytest.skip("C files are run by compiling them, and there is no cc here")
    (tmp_path / "net.onnx").write_bytes(residual().bytes)
    export(tmp_path / "net.onnx", target, normal(9, 20, 3, 8, 8), out=tmp_path / "out", benchmark=False)
    found = verify(tmp_path / "out")
    assert found.problems == () and found.differing == () and found.ran
    assert {c.precision for c in found.checks} == {f.precision for f in found.manifest.files}
    assert all(c.passed and c.detail.startswith("the very same numbers") for c in found.checks)


def test_what_is_kept_is_what_pytorch_answers(artifact: Path) -> None:
    torch.manual_seed(0)
    net = TinyCNN().eval()
    golden = load_golden(artifact)
    assert golden is not None and set(golden.answers) == {ORIGINAL, HUB, "fp32", "int8"}
    with torch.no_grad():
        expected = net(torch.from_numpy(golden.inputs["x"])).numpy()
    np.testing.assert_allclose(golden.answers[ORIGINAL]["output"], expected, atol=1e-5)


def test_rounding_passes_and_a_wrong_kernel_does_not(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        answering(patch, noisy(1e-4))
        assert verify(artifact).differing == ()
    answering(monkeypatch, noisy(0.5))
    found = verify(artifact)
    assert len(found.differing) == 3  # fp32 against the original, int8 against the hub and the original
    said = enter(f"verify {artifact}")
    assert said.code == 3
    assert "answers otherwise here than at the export" in said.err
    assert "int8: answers against the hub (dB)" in said.err
    assert [c["passed"] for c in json.loads(enter(f"verify {artifact} --json").out)["here"]] == [False] * 3


def test_an_output_that_is_not_a_number_fails(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, lambda outputs: {n: a * np.nan for n, a in outputs.items()})
    assert len(verify(artifact).differing) == 3


def test_an_artifact_with_much_noise_of_its_own_is_measured_by_that(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cost of compression was judged at the export; here it must only not have grown."""
    golden = load_golden(artifact)
    assert golden is not None
    poor = {"output": golden.answers[ORIGINAL]["output"] + 10 * normal(3, 8, 10)}
    copy = tmp_path / "poor"
    copy.mkdir()
    for path in artifact.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    Golden(golden.inputs, {**golden.answers, "int8": poor}).save(copy)
    data = (copy / "golden.npz").read_bytes()
    manifest = json.loads((copy / "manifest.json").read_text())
    for stored in manifest["stored"]:
        if stored["path"] == "golden.npz":
            stored |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    answering(monkeypatch, lambda _: poor)
    assert [c.passed for c in verify(copy).checks if c.precision == "int8"] == [True, True]


# ------------------------------------------------------------------ what did not run never passes


def test_without_the_runtime_nothing_is_said_to_pass(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise MissingExtra("running .onnx files", "onnx")

    monkeypatch.setattr(exporters.load("onnx"), "runtime", missing)
    found = verify(artifact)
    assert [c.passed for c in found.checks] == [None, None] and not found.ran
    said = enter(f"verify {artifact}")
    assert said.code == 2
    assert "the files are whole, but none could be run here: running .onnx files needs the extra 'onnx'" in said.err
    assert all(line.startswith("not run here") for line in said.out.splitlines()[:2])


def test_an_artifact_without_kept_answers_is_opened_but_does_not_pass(tmp_path: Path) -> None:
    small_artifact(tmp_path / "a")
    found = verify(tmp_path / "a")
    assert [c.passed for c in found.checks] == [None, None]
    assert "golden.npz holds no answers" in found.checks[0].detail


def test_files_that_were_altered_are_named_and_not_run(tmp_path: Path) -> None:
    small_artifact(tmp_path / "a")
    (tmp_path / "a" / "model.int8.onnx").unlink()
    found = verify(tmp_path / "a")
    assert found.problems == ("model.int8.onnx is missing",)
    assert found.checks == ()
    assert enter(f"verify {tmp_path / 'a'}").code == 2


def test_neither_torch_nor_the_data_is_needed(artifact: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from deploykit.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", code, "verify", str(artifact)], cwd=tmp_path, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("ok")


# ------------------------------------------------------------------ what is kept


def test_equal_answers_give_equal_bytes_and_come_back(tmp_path: Path) -> None:
    golden = Golden(
        {"x/0": normal(0, 2, 3)}, {ORIGINAL: {"a:b/c": normal(1, 2, 4)}, "int8": {"a:b/c": normal(2, 2, 4)}}
    )
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        golden.save(tmp_path / name)
        written.append((tmp_path / name / "golden.npz").read_bytes())
    assert written[0] == written[1]
    found = load_golden(tmp_path / "one")
    assert found is not None
    np.testing.assert_array_equal(found.inputs["x/0"], golden.inputs["x/0"])
    np.testing.assert_array_equal(found.answers["int8"]["a:b/c"], golden.answers["int8"]["a:b/c"])


@given(st.integers(1, 20), st.integers(1, 1_500_000))
def test_large_inputs_are_few(samples: int, values: int) -> None:
    kept = len(some_samples({"x": np.broadcast_to(np.float32(0), (samples, values))})["x"])
    assert 1 <= kept <= min(samples, SAMPLES)
    assert kept == 1 or kept * values * 4 <= BYTES


@given(st.lists(st.integers(1, 40), min_size=0, max_size=3), st.integers(1, 3))
def test_small_outputs_are_kept_whole_and_large_ones_in_part(shape: list[int], samples: int) -> None:
    array = np.arange(samples * int(np.prod(shape)), dtype=np.float64).reshape(samples, *shape)
    found = some_values({"y": array})["y"]
    each = array.reshape(samples, -1)
    assert found.shape == (samples, min(VALUES, each.shape[1]))
    assert (np.diff(found, axis=1) > 0).all()
    assert found[0, 0] == each[0, 0] and found[-1, -1] == each[-1, -1]
