"""Destinations that are taken or cannot be written, and disks that fill up: said, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_desk import GOOD, lay_desk, refused
from commands import contents, enter


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_desk(tmp_path_factory.mktemp("desk"))


# ------------------------------------------------------------------ destinations


@pytest.mark.parametrize(
    ("out", "phrase"),
    [
        ("tidy", "tidy already exists. Give another -o, or --overwrite"),
        ("artifact", "artifact already exists"),
        ("calib.npy", "calib.npy already exists"),
        ("calib.npy --overwrite", "calib.npy is a file; the output is a folder"),
        (". --overwrite", "has files that deploykit did not write"),
        ("calib.npy/out", "cannot write"),
        ("/proc/nowhere/out", "cannot write /proc/nowhere/out"),
    ],
)
def test_a_taken_or_unwritable_destination_is_left_alone(here: Path, out: str, phrase: str) -> None:
    refused(f"export net.onnx {GOOD} --no-benchmark -o {out}", phrase)


def test_an_existing_destination_is_refused_before_anything_is_read(here: Path) -> None:
    refused("export nowhere.onnx --target x86 --calib nowhere.npy -o artifact", "artifact already exists")


def test_a_failed_overwrite_keeps_the_old_artifact_and_does_not_show_it_as_new(here: Path) -> None:
    refused("export odd.onnx --target mobile-arm --calib calib.npy --no-benchmark -o artifact --overwrite", "Sin")


def test_folders_made_for_a_failed_destination_go_again(here: Path) -> None:
    refused("export odd.onnx --target mobile-arm --calib calib.npy --no-benchmark -o deep/down/out", "Sin")


# ------------------------------------------------------------------ a full disk


@pytest.mark.parametrize("target", ["x86", "mobile-arm"])
def test_a_disk_that_fills_up_at_any_file_leaves_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """Every write of an export fails once; where no more fails, the export is whole."""
    before = contents(here)
    for allowed in range(100):
        with monkeypatch.context() as patch:
            fill_up_after(allowed, patch)
            said = enter(f"export net.onnx --calib calib.npy --no-benchmark --target {target} -o full")
        if said.code == 0:
            break
        assert said.code == 2
        assert re.search(r"cannot write \S*full: No space left on device", said.err)
        assert contents(here) == before
    shutil.rmtree("full")
    assert allowed > 4


def fill_up_after(writes: int, patch: pytest.MonkeyPatch) -> None:
    left = writes
    real = {"write_bytes": Path.write_bytes, "write_text": Path.write_text}

    def failing(name: str) -> Callable[..., int]:
        def write(path: Path, *args: Any, **kwargs: Any) -> int:
            nonlocal left
            if path.absolute().is_relative_to(Path.cwd()):  # temporary files elsewhere are on another disk
                left -= 1
            if left < 0:
                path.touch()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return real[name](path, *args, **kwargs)

        return write

    for name in real:
        patch.setattr(Path, name, failing(name))


def test_a_full_disk_is_said_by_the_other_commands_too(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (
        "calibrate net.onnx --calib calib.npy",
        "compress nets.py:build --calib calib.npy --recipe good.toml",
        "report artifact",
    ):
        with monkeypatch.context() as patch:
            fill_up_after(0, patch)
            refused(command, "cannot write", "No space left on device")


IN_A_SMALL_DISK = """
import pathlib, subprocess, sys
sys.path[:0] = sys.argv[3:]
from commands import enter
for kilobytes in (4, 8, 12, 20, 28):
    for target in ("x86", "mobile-arm", "jetson"):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", sys.argv[1]], check=True)
        said = enter(f"export {sys.argv[2]}/net.onnx --calib {sys.argv[2]}/calib.npy --no-benchmark -o",
                         f"{sys.argv[1]}/out", "--target", target)
        left = sorted(p.name for p in pathlib.Path(sys.argv[1]).iterdir())
        print(said.code, left, said.err.splitlines()[-1:])
        subprocess.run(["umount", sys.argv[1]], check=True)
"""


def test_a_really_full_disk_leaves_nothing(desk: Path, tmp_path: Path) -> None:
    own_mounts = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    disk = tmp_path / "disk"
    disk.mkdir()
    probe = [*own_mounts, "mount", "-t", "tmpfs", "none", str(disk)]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a small disk")
    ran = subprocess.run(
        [*own_mounts, sys.executable, "-c", IN_A_SMALL_DISK, str(disk), str(desk), *sys.path],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    outcomes = ran.stdout.splitlines()
    assert len(outcomes) == 15
    for outcome in outcomes:
        assert outcome.startswith("0 ['out']") or (outcome.startswith("2 []") and "No space left" in outcome), outcome
    assert sum(outcome.startswith("2") for outcome in outcomes) >= 6
