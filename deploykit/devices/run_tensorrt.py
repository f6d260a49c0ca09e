"""TensorRT bundles: the bundle's own ``build.py`` builds, checks and times the engines on the device."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.artifact import File, Measurement
from deploykit.core.device import Facts
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import Manifest
from deploykit.core.progress import say
from deploykit.devices.device import Device, Lost
from deploykit.devices.work import SAMPLES, Asked, Found, Timed, Work, put, timed
from deploykit.devices.work import send as send_files

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deploykit.devices.kinds import Arrays, Task

SCRIPT = "engine.py"
VERSION = """
import subprocess, sys, build
banner = subprocess.run([sys.argv[1], "--help"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
print(build.dotted(build.tensorrt_version(banner.decode("utf-8", "replace"))))
"""
WARM_UP_MS = 500.0
"""build.py's; calls that started earlier do not count."""


def lacks(facts: Facts, exporter: str) -> str:
    """Python's standard library and trtexec."""
    if "trtexec" not in facts.tools:
        return (
            "no trtexec there (looked on PATH, in /usr/src/tensorrt/bin and /opt/tensorrt/bin): on Jetson run "
            "`sudo apt install tensorrt`, elsewhere install TensorRT"
        )
    return "" if facts.python_version else "no python3 that works there: install Python 3.6 or newer"


def mute(facts: Facts, exporter: str) -> str:
    """What can be built can answer."""
    return lacks(facts, exporter)


def send(device: Device, facts: Facts, folder: Path, manifest: Manifest, room: int = 0) -> Work:
    """The bundle, and our script that asks engines."""
    script = (resources.files("deploykit.devices.there") / SCRIPT).read_bytes()
    listed = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    names = ["bundle.json", "build.py", *listed["sha256"]]
    return send_files(device, facts, folder, manifest, names, {SCRIPT: script}, room)


def measure(
    device: Device, facts: Facts, works: Sequence[Work], asked: Asked, feeds: Sequence[Mapping[str, NDArray[Any]]]
) -> Found:
    """One bundle after the other, each engine by itself: build.py fills the whole GPU."""
    if asked.minutes:
        raise DeploykitError("--sustained is not there for TensorRT bundles: use trtexec --duration on the device")
    return Found(tuple(tuple(_timed(device, facts, w, asked, _build(device, facts, w, asked.runs))) for w in works))


def computed_by(device: Device, facts: Facts, work: Work) -> str:
    """TensorRT, whose engines are built by then or by the first answer."""
    return f"TensorRT {_version(device, facts, work)}"


def answer(device: Device, facts: Facts, tasks: Sequence[Task], arrays: Arrays, key: str, threads: int) -> None:
    """Copies the samples there, runs them through the engines, removes them."""
    work = tasks[0].work
    built = _built(device, facts, work) or _build(device, facts, work, Asked().runs)
    raw = {}
    for number, spec in enumerate(work.manifest.inputs):
        array = np.ascontiguousarray(arrays[spec.name], spec.dtype)
        raw[spec.name] = work.path(f"{key}.{SAMPLES}{number}")
        put(device, array.astype(array.dtype.newbyteorder("<")).tobytes(), raw[spec.name])
    try:
        for task in tasks:
            best = _best(built, task.file)
            if best is None:
                raise DeploykitError(
                    f"{facts.address}: no {task.file.precision} engine was built: {_why(built, task.file)}"
                )
            job = {
                "key": key, "samples": len(next(iter(arrays.values()))), "inputs": raw, "outputs": task.outputs,
                "trtexec": facts.tools["trtexec"], "engine": _engine(built, best),
            }  # fmt: skip
            _python(device, facts, work, SCRIPT, json.dumps(job))
    finally:
        with contextlib.suppress(Lost):
            device.run("rm -f " + " ".join(map(shlex.quote, raw.values())))


def read(path: Path, work: Work) -> dict[str, NDArray[Any]]:
    """Outputs by name, in their shapes."""
    found = json.loads(path.read_text(encoding="utf-8"))
    arrays = {}
    for spec in work.manifest.outputs:
        fixed = [d for d in spec.shape[1:] if isinstance(d, int)]
        shape = (-1, *fixed) if len(fixed) == len(spec.shape) - 1 else (len(found[spec.name]), -1)
        arrays[spec.name] = np.asarray(found[spec.name], spec.dtype).reshape(shape)
    return arrays


def _build(device: Device, facts: Facts, work: Work, runs: int) -> dict[str, Any]:
    say(f"building engines on {facts.name}; this takes minutes")
    _python(device, facts, work, "build.py", "--runs", str(runs), "--trtexec", facts.tools["trtexec"])
    built = _built(device, facts, work)
    assert built is not None
    say(f"the fastest engine is {work.path('model.engine')} on {facts.name}")
    return built


def _built(device: Device, facts: Facts, work: Work) -> dict[str, Any] | None:
    """``engine.json``, which build.py writes last; None: there is none by the TensorRT that is there now."""
    ran = device.run(f"cat {shlex.quote(work.path('engine.json'))}")
    found: dict[str, Any] | None = None if ran.code else json.loads(ran.out)
    return found if found and found["tensorrt"] == _version(device, facts, work) else None


def _version(device: Device, facts: Facts, work: Work) -> str:
    """Of the TensorRT that is there now, as build.py reads it."""
    return _python(device, facts, work, "-c", VERSION, facts.tools["trtexec"]).strip()


def _timed(device: Device, facts: Facts, work: Work, asked: Asked, built: dict[str, Any]) -> list[Timed]:
    found = []
    capability = _capability(device, work)
    for file in work.manifest.files:
        best = _best(built, file)
        if best is None:
            why = f"not built on {facts.name}: {_why(built, file)}"
            nothing = Measurement(file.precision, 1, 1, 0, None, None, None, None, None, file.size(work.local), why)
            found.append(Timed(nothing, np.empty(0)))
            continue
        times = _times(device, work.path(f"build/{best['variant']}.times.json"))
        runtime = f"TensorRT {built['tensorrt']}, engine {best['variant']}, GPU time"
        found.append(timed(work, file, facts, runtime, asked, times, capability=capability))
    return found


def _capability(device: Device, work: Work) -> str:
    """Compute capability of the GPU that was timed, as trtexec logs it; empty where it does not."""
    ran = device.run(f"cat {shlex.quote(work.path('build'))}/*.time.log")
    found = re.search(r"Compute Capability: ([\d.]+)", ran.out)
    return found[1] if found else ""


def _times(device: Device, path: str) -> list[float]:
    """GPU milliseconds of each run after the warm-up, in order."""
    with tempfile.TemporaryDirectory() as here:
        fetched = Path(here) / "times.json"
        device.get(path, fetched)
        trace = json.loads(fetched.read_text(encoding="utf-8"))
    return [t["computeMs"] for t in trace if t.get("startComputeMs", WARM_UP_MS) >= WARM_UP_MS]


def _of(built: dict[str, Any], file: File) -> list[dict[str, Any]]:
    """What became of the engines of a precision, weakly and strongly typed."""
    return [r for r in built["results"] if re.sub("-(weak|file)$", "", r["variant"]) == file.precision]


def _best(built: dict[str, Any], file: File) -> dict[str, Any] | None:
    good = [r for r in _of(built, file) if not r["trouble"] and r["median_ms"] is not None]
    return min(good, key=lambda r: float(r["median_ms"]), default=None)


def _engine(built: dict[str, Any], result: dict[str, Any]) -> str:
    """Where it lies: the one that build.py kept was moved."""
    return "model.engine" if result["variant"] == built["variant"] else f"build/{result['variant']}.engine"


def _why(built: dict[str, Any], file: File) -> str:
    return "; ".join(r["trouble"] for r in _of(built, file)) or "this TensorRT cannot build it"


def _python(device: Device, facts: Facts, work: Work, script: str, *arguments: str) -> str:
    words = " ".join(map(shlex.quote, [facts.python, script, *arguments]))
    ran = device.run(f"cd {shlex.quote(work.remote)} && exec {words}")
    if ran.code:
        said = ran.err.strip().splitlines() or ran.out.strip().splitlines()
        raise DeploykitError(f"{facts.address}: {said[-1] if said else f'{script} ended with code {ran.code}'}")
    return ran.out
