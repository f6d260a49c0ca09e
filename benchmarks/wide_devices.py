"""Devices: the demo over ssh in one command, and what is left when the cable is pulled in the middle of it.

    python -m benchmarks.wide_devices

The device is this machine, behind a real OpenSSH server on loopback with keys made on the spot; the plug is pulled by
killing the server and its connections.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.rows import Row, record
from deploykit.core.manifest import changed_files, load_manifest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import sshd

COMMAND = "python -m benchmarks.wide_devices"
WHAT = "scikit-learn digits: 360 test images answered on the device, which is this machine over ssh on loopback"
DEPLOYKIT = (sys.executable, "-m", "deploykit")


def deploykit(command: str, server: sshd.Server, folder: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs one command in a folder; returns it and its seconds."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "DEPLOYKIT_SSH": server.client, "PYTHONPATH": path}
    start = time.perf_counter()
    done = subprocess.run(
        [*DEPLOYKIT, *shlex.split(command)], cwd=folder, env=environment, capture_output=True, text=True
    )
    return done, time.perf_counter() - start


def whole(folder: Path) -> list[Row]:
    """The demo, from training to the report, in one command."""
    server = sshd.start(folder / "sshd")
    try:
        done, seconds = deploykit(f"demo -o demo --device '{address(server, folder)}'", server, folder)
        again, copying = deploykit(f"benchmark demo/x86 --runs 1 --device '{address(server, folder)}'", server, folder)
    finally:
        server.stop()
    shown, values = [], {"seconds": round(seconds, 1)}
    for artifact in sorted((folder / "demo").glob("*/manifest.json")):
        manifest = load_manifest(artifact.parent)
        page = (artifact.parent / "report.html").read_text(encoding="utf-8")
        name = manifest.device.name if manifest.device else "?"
        for m in manifest.measurements:
            score = next((s for s in manifest.scores if s.precision == m.precision and "answered on" in s.data), None)
            there = score is not None and score.metric is not None and m.p50_ms is not None and m.where.startswith(name)
            shown.append(there and name in page and f"{score.metric:.2f}" in page if score else False)
            if score is not None and score.metric is not None and m.p50_ms is not None:
                values[f"{manifest.target} {m.precision}: accuracy there"] = round(score.metric, 2)
                values[f"{manifest.target} {m.precision}: p50 ms there"] = round(m.p50_ms, 4)
    note = "" if done.returncode == 0 else done.stderr[-300:]
    share = 100.0 * sum(shown) / len(shown) if shown else None
    return [
        Row("demo over ssh, one command: files whose accuracy and latency on the device are in the report (%)", share,
            100.0, "higher", WHAT, COMMAND, values=values, note=note),
        Row("benchmark over ssh the second time: exit code", float(again.returncode), 0.0, "lower", WHAT, COMMAND,
            values={"seconds": round(copying, 1)}),
    ]  # fmt: skip


def pulled(folder: Path) -> list[Row]:
    """The same with the plug pulled after three answers, then the command that the message names."""
    server = sshd.start(folder / "sshd")
    there = folder / "there"
    stop = threading.Event()
    watching = threading.Thread(target=pull, args=(server, there, stop))
    watching.start()
    done, _ = deploykit(f"demo -o demo --device '{address(server, folder)}'", server, folder)
    stop.set()
    watching.join()
    server.stop()
    time.sleep(2)
    broken_here, broken_there = half_written_here(folder), half_written_there(there)
    first = {p: p.stat().st_mtime_ns for p in answered(there)}
    found = re.search(r"To go on there: deploykit (benchmark .* --record)", done.stderr)
    server = sshd.start(folder / "sshd", port=server.port)
    try:
        more, seconds = deploykit(found[1] if found else "", server, folder)
    finally:
        server.stop()
    twice = sum(p.stat().st_mtime_ns != stamp for p, stamp in first.items())
    recorded = [load_manifest(p.parent) for p in (folder / "demo").glob("*/manifest.json")]
    unscored = sum(not any("answered on" in s.data for s in m.scores) for m in recorded)
    on = "after the cut, the command that the message names"
    return [
        Row("server killed midway: half-written files, here and there",
            float(broken_here + broken_there) if first else None, 0.0, "lower", WHAT, COMMAND,
            values={"here": broken_here, "there": broken_there, "answers by then": len(first)},
            note=f"exit code {done.returncode}: {done.stderr.strip().splitlines()[-1][:200]}"),
        Row("server killed midway: exit code is 2 (1: yes)", float(done.returncode == 2), 1.0, "higher", WHAT, COMMAND),
        Row(f"{on}: artifacts without scores from the device",
            float(unscored) if recorded and more.returncode == 0 else None, 0.0, "lower",
            WHAT, COMMAND, values={"seconds": round(seconds, 1), "exit code": more.returncode},
            note="" if more.returncode == 0 else more.stderr[-300:]),
        Row("after the cut: answers computed twice", float(twice) if first else None, 0.0, "lower", WHAT, COMMAND,
            values={"answers kept": len(first), "answers in all": len(answered(there))}),
    ]  # fmt: skip


def address(server: sshd.Server, folder: Path) -> str:
    """Of the server; files are run there by the Python that runs this."""
    return server.address(folder / "there", python=sys.executable)


def pull(server: sshd.Server, there: Path, stop: threading.Event) -> None:
    """Kills the server as soon as three answers are there."""
    while not stop.is_set():
        if len(answered(there)) >= 3:
            server.kill()
            return
        time.sleep(0.002)


def answered(there: Path) -> list[Path]:
    """What files answered so far."""
    return sorted(p for p in there.rglob("answers/*") if p.suffix != ".part")


def half_written_here(folder: Path) -> int:
    """Files that are not what their manifest says, and temporary folders that were left."""
    wrong = sum(
        len(changed_files(p.parent, load_manifest(p.parent))) for p in (folder / "demo").glob("*/manifest.json")
    )
    return wrong + len(list(folder.rglob(".*deploykit-*")))


def half_written_there(there: Path) -> int:
    """Temporary files that were left, and files under their own name that cannot be read to the end."""
    wrong = len(list(there.rglob("*.part")))
    for path in [*there.rglob("*.npz"), *answered(there)]:
        try:
            with np.load(path) as archive:
                _ = [archive[name] for name in archive.files]
        except Exception:
            if path.read_bytes()[:2] == b"PK":  # what C answers is no archive
                wrong += 1
    return wrong


def main() -> None:
    if sshd.WHY_NOT:
        sys.exit(sshd.WHY_NOT)
    for part in (whole, pulled):
        with tempfile.TemporaryDirectory() as folder:
            record("wide", part(Path(folder)))


if __name__ == "__main__":
    main()
