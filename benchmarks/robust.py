"""The acceptance lines about robustness: kill -9 during an export, and the same bytes from two processes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.rows import Row, record
from deploykit.core.files import refuse_existing

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "python -m benchmarks.robust"
TARGETS = ("x86", "mobile-arm", "jetson")
DELAYS = 25

State = Literal["absent", "old", "complete", "partial"]
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree")
"""Python's audit events of operations that change files."""


def files(folder: Path) -> dict[str, bytes]:
    """Every file below an artifact, or several; of a manifest only what is no timing and no number of threads."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    for name in [n for n in found if n.endswith("manifest.json")]:
        manifest: dict[str, Any] = json.loads(found[name])
        manifest["request"]["settings"]["threads"] = manifest["machine"]["threads"] = None
        found[name] = json.dumps(manifest | {"seconds": {}, "measurements": [], "advice": []}).encode()
    return found


# ------------------------------------------------------------------ kill -9


@dataclass(frozen=True)
class Run:
    """One export in a process of its own."""

    seconds: float
    killed: bool


@dataclass(frozen=True)
class Killed:
    """What many killed exports left."""

    at_once: Counter[State]
    """At the destination, right after the kill."""
    after_next: Counter[State]
    """At the destination, after the next command had tidied up; ``partial`` also counts leftovers beside it."""

    @property
    def partial(self) -> int:
        """How many left something that is not whole."""
        return self.at_once["partial"] + self.after_next["partial"]


def export_and_kill(
    command: Sequence[str], destination: Path, before_change: int | None = None, after: float | None = None
) -> Run:
    """Runs ``deploykit COMMAND -o destination`` in a forked process and kills it -9 before its n-th change to a file
    beside the destination, or after some seconds, or not at all."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _export([*command, "-o", str(destination)], destination.parent, before_change)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return Run(time.monotonic() - started, os.WIFSIGNALED(status))


def _export(arguments: list[str], beside: Path, before_change: int | None) -> None:
    """Becomes the command line, silently; never returns."""
    from deploykit.cli import main

    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    changes = count()

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if event not in CHANGES or (event == "open" and not details[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if str(details[0]).startswith(str(beside)) and next(changes) == before_change:
            os.kill(os.getpid(), signal.SIGKILL)

    if before_change is not None:
        sys.addaudithook(hook)
    try:
        main(arguments)
    finally:
        os._exit(0)


def kills(command: Sequence[str], folder: Path, overwrite: bool, delays: int = 0) -> Killed:
    """Kills exports at many moments: before every single change to a file beside the destination, then evenly spread
    over the time that a whole export takes.

    Args:
        command: of the command line, without the destination.
        folder: to be made; it will hold the destination and nothing else.
        overwrite: whether an older artifact with other files is to be replaced.
        delays: how many of the spread kills.
    """
    folder.mkdir()
    destination, aside = folder / "out", folder.with_name(f"{folder.name}-old")
    export_and_kill([*command, "--precision", "fp32"], aside)
    whole = export_and_kill(command, destination)
    old, complete = files(aside) if overwrite else None, files(destination)
    result = Killed(Counter(), Counter())

    def look() -> State:
        if not destination.exists():
            return "absent"
        with contextlib.suppress(OSError, ValueError):  # half a manifest
            found = files(destination)
            return "complete" if found == complete else "old" if found == old else "partial"
        return "partial"

    def kill(**moment: Any) -> Run:
        shutil.rmtree(destination, ignore_errors=True)
        if overwrite:
            shutil.copytree(aside, destination)
        ran = export_and_kill([*command, *(["--overwrite"] if overwrite else [])], destination, **moment)
        if ran.killed:
            result.at_once[look()] += 1
            refuse_existing(destination, overwrite=True)
            result.after_next["partial" if {*folder.iterdir()} - {destination} else look()] += 1
        return ran

    for change in count():
        if not kill(before_change=change).killed:
            break
    for i in range(delays):
        kill(after=whole.seconds * (i + 0.5) / delays)
    return result


# ------------------------------------------------------------------ the same bytes


def differing(command: Sequence[str], folder: Path, threads: tuple[int, int] = (1, 2)) -> list[str]:
    """The files that differ between two exports in two processes with other working directories, hash seeds and
    numbers of threads; of the manifest, everything but the timings counts.

    Args:
        command: of the command line, without the destination; paths in it are absolute.
        folder: to be made.
    """
    found = []
    for turn, number in enumerate(map(str, threads), 1):
        here, destination = folder / f"from-{turn}", folder / f"out-{turn}"
        here.mkdir(parents=True)
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(turn), "OMP_NUM_THREADS": number
        }  # fmt: skip
        subprocess.run(
            [sys.executable, "-m", "deploykit", *command, "--threads", number, "-o", str(destination)],
            cwd=here, env=environment, check=True, capture_output=True,
        )  # fmt: skip
        found.append(files(destination))
    one, other = found
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


# ------------------------------------------------------------------ rows


def warm_up() -> None:
    """Imports what an export needs, so that forked processes spend their time exporting."""
    from deploykit import exporters, pipeline
    from deploykit.bench import timing
    from deploykit.passes import weight_correct

    assert pipeline and timing and weight_correct
    for name in exporters.names():
        exporters.load(name).runtime()


def kill_rows(folder: Path) -> list[Row]:
    """Kills exports of an .onnx file, new and over an older artifact."""
    images = _images(folder, (1, 8, 8))
    warm_up()
    export_and_kill(["export", "deploykit.demo:DigitsNet", "--calib", images, "--target", "x86"], folder / "net")
    partial, values = 0, {}
    for target in TARGETS:
        for overwrite in (False, True):
            command = ["export", f"{folder}/net/model.fp32.onnx", "--calib", images, "--target", target]
            name = f"{target}, {'over an old one' if overwrite else 'new'}"
            found = kills([*command, "--no-benchmark"], folder / name, overwrite, DELAYS)
            values[f"kills: {name}"] = float(found.at_once.total())
            partial += found.partial
    moments = f"killed before every single change to a file, and {DELAYS} times spread over the run"
    data = "the demo's network with random weights, 12 random images calibrate"
    claim = "Exports killed -9 that left something partial"
    return [Row(claim, float(partial), 0.0, "lower", data, f"{COMMAND} kill", [0], values, note=moments)]


def byte_rows(folder: Path) -> list[Row]:
    """Exports a PyTorch module twice per target."""
    images = _images(folder, (3, 64, 64))
    values = {}
    for target in TARGETS:
        command = ["export", f"{ROOT / 'benchmarks' / 'nets.py'}:resnet18", "--calib", images, "--target", target]
        values[target] = float(len(differing([*command, "--no-benchmark"], folder / target)))
    data = "ResNet-18 with random weights at 64 x 64, 12 random images calibrate"
    claim = "Files that differ between two processes (working directory, hash seed, 1 and 2 threads)"
    note = "every file of the artifact; manifest.json without its timings"
    return [Row(claim, sum(values.values()), 0.0, "lower", data, f"{COMMAND} bytes", [0], values, note=note)]


def _images(folder: Path, shape: tuple[int, int, int]) -> str:
    path = folder / "images.npy"
    np.save(path, np.random.default_rng(0).standard_normal((12, *shape)).astype(np.float32))
    return str(path)


PARTS = {"kill": kill_rows, "bytes": byte_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    for name in parser.parse_args().parts or list(PARTS):
        with tempfile.TemporaryDirectory() as folder:
            record("road", PARTS[name](Path(folder)))


if __name__ == "__main__":
    main()
