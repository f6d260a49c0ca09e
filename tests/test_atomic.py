"""An export is there completely or not at all, whenever it is killed, and two exports are the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import contents, enter
from graphs import normal, residual

from deploykit import exporters
from deploykit.core.errors import DeploykitError

ROOT = Path(__file__).parents[1]
NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.head((x + torch.relu(self.depthwise(x))).mean((2, 3)))


def build():
    torch.manual_seed(0)
    return Net()
"""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("net.onnx").write_bytes(residual().bytes)
    Path("nets.py").write_text(NET)
    np.save("calib.npy", normal(9, 20, 3, 8, 8))
    Path("qat.toml").write_text('[[step]]\nname = "equalize"\n[[step]]\nname = "qat"\nsteps = 3\n')
    return tmp_path


def in_a_process(expression: str) -> Any:
    """The JSON value of an expression over `benchmarks.robust`, which forks and so wants a process without threads."""
    code = f"import json; from benchmarks.robust import *; warm_up(); print(json.dumps({expression}))"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "target", ["x86", *(pytest.param(t, marks=pytest.mark.slow) for t in ("mobile-arm", "jetson"))]
)
def test_a_killed_export_leaves_nothing_partial(desk: Path, target: str, overwrite: bool) -> None:
    """Killed -9 before every single change to a file, and at 8 moments spread over the run."""
    command = ["export", str(desk / "net.onnx"), "--calib", str(desk / "calib.npy"), "--target", target]
    call = f"kills({[*command, '--no-benchmark']}, Path({str(desk / 'killed')!r}), {overwrite}, delays=8)"
    at_once, after_next = in_a_process(f"(lambda k: [k.at_once, k.after_next])({call})")
    assert at_once.get("partial", 0) == after_next.get("partial", 0) == 0
    assert sum(at_once.values()) > 12
    if overwrite:
        assert at_once.keys() == {"old", "absent", "complete"}  # absent: between the two renames
        assert after_next.keys() == {"old", "complete"}
    else:
        assert at_once.keys() == {"absent", "complete"}


def test_ctrl_c_leaves_nothing_at_all(desk: Path) -> None:
    """The user interrupts while the files are being written and checked."""
    before = contents(desk)
    command = "export net.onnx --target x86 --calib calib.npy -o out"  # benchmarks for five seconds
    # a process started in the background ignores the signal, and so would its children
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    ran = subprocess.Popen(
        [sys.executable, "-c", f"{listening}; from deploykit.cli import main; main()", *command.split()],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: any(desk.glob(".out.deploykit-*/manifest.json")))
    ran.send_signal(signal.SIGINT)
    out, err = ran.communicate(timeout=20)
    assert ran.returncode != 0
    assert out == "" and "Traceback" not in err
    assert contents(desk) == before


def wait_until(true: Callable[[], bool]) -> None:
    for _ in range(600):
        if true():
            return
        time.sleep(0.05)
    raise TimeoutError


def test_an_export_that_fails_for_its_second_target_keeps_none(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise DeploykitError("no")

    monkeypatch.setattr(exporters.load("tensorrt"), "export", fails)
    before = contents(desk)
    assert enter("export net.onnx --target x86 --target jetson --calib calib.npy --no-benchmark -o out").code == 2
    assert contents(desk) == before


def test_a_bug_while_exporting_leaves_nothing_either(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(exporters.load("onnx"), "export", fails)
    before = contents(desk)
    with pytest.raises(ZeroDivisionError):
        enter("export net.onnx --target x86 --calib calib.npy --no-benchmark -o out")
    assert contents(desk) == before


@pytest.mark.parametrize("model", ["nets.py:build", pytest.param("net.onnx", marks=pytest.mark.slow)])
def test_two_processes_write_the_same_bytes(desk: Path, model: str) -> None:
    """Other working directory, other hash seed, 1 and 2 threads; in manifests only the timings may differ."""
    everywhere = [word for target in ("x86", "mobile-arm", "jetson") for word in ("--target", target)]
    command = ["export", str(desk / model), "--calib", str(desk / "calib.npy"), *everywhere, "--no-benchmark"]
    assert in_a_process(f"differing({command}, Path({str(desk / 'twice')!r}))") == []
    assert len(list(desk.glob("twice/out-1/*/manifest.json"))) == 3


@pytest.mark.slow
def test_two_processes_train_alike(desk: Path) -> None:
    """With the same number of threads: torch's sums depend on it."""
    data = str(desk / "calib.npy")
    command = ["export", f"{desk}/nets.py:build", "--calib", data, "--train", data, "--recipe", f"{desk}/qat.toml"]
    call = f"{[*command, '--target', 'x86', '--no-benchmark']}, Path({str(desk / 'twice')!r}), threads=(1, 1)"
    assert in_a_process(f"differing({call})") == []


def test_the_manifest_names_no_place_but_what_the_user_named(desk: Path) -> None:
    assert enter("export net.onnx --target jetson --calib calib.npy --no-benchmark -o out").code == 0
    for name, data in contents(desk / "out").items():
        assert str(desk).encode() not in data, name
