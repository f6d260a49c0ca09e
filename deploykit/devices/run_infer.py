"""Artifacts that carry an ``infer.py`` (onnx, tflite, openvino, ...): that script opens the files there, ours feeds it.

So what is timed on the device is the very code that the artifact's users copy from.
"""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.device import Facts
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import Manifest
from deploykit.devices.device import Device
from deploykit.devices.work import SAMPLES, Asked, Found, Timed, Window, Work, keep, put, timed
from deploykit.devices.work import send as send_files

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deploykit.devices.kinds import Arrays, Task

SCRIPT = "deploykit_run.py"
OLDEST = (3, 7)
RUNTIMES = {
    "onnx": ("onnxruntime", "onnxruntime-gpu"),
    "tflite": ("ai-edge-litert", "tflite-runtime"),
    "openvino": ("openvino",),
}
"""Packages that can run an exporter's files, the usual one first."""
MARK = "deploykit-result "


def lacks(facts: Facts, exporter: str) -> str:
    """Python, numpy and a runtime."""
    needs = RUNTIMES.get(exporter, ())
    install = f"pip install numpy {needs[0] if needs else ''}".strip()
    if not facts.python_version:
        return f"no python3 that works there: install Python 3.7 or newer, then {install}"
    if _version(facts) < OLDEST:
        return f"{facts.python} there is {facts.python_version}, too old: --device ADDRESS?python=PATH (3.7 or newer)"
    missing = [] if "numpy" in facts.packages else ["numpy"]
    if needs and not any(name in facts.packages for name in needs):
        missing.append(" or ".join(needs[:2] if exporter == "tflite" else needs[:1]))
    if not missing:
        return ""
    return (
        f"{facts.python} there has no {' and no '.join(missing)}: run `{install}` there, or name the interpreter that "
        "has it: --device ADDRESS?python=PATH"
    )


def mute(facts: Facts, exporter: str) -> str:
    """What can be timed can answer."""
    return lacks(facts, exporter)


def send(device: Device, facts: Facts, folder: Path, manifest: Manifest, room: int = 0) -> Work:
    """The files, their weights beside them, `infer.py` and our script."""
    if "infer.py" not in {s.path for s in manifest.stored}:
        raise DeploykitError(f"{folder} has no infer.py that could run its files on a device")
    script = (resources.files("deploykit.devices.there") / "run.py").read_bytes()
    names = ["infer.py", *(name for f in manifest.files for name in (f.path, *f.parts))]
    return send_files(device, facts, folder, manifest, names, {SCRIPT: script}, room)


def measure(
    device: Device, facts: Facts, works: Sequence[Work], asked: Asked, feeds: Sequence[Mapping[str, NDArray[Any]]]
) -> Found:
    """One process there times all files of all artifacts in turns."""
    files = []
    for work, arrays in zip(works, feeds, strict=True):
        inputs = keep(device, work, packed(arrays), "inputs.npz")
        files += [{"folder": work.remote, "path": f.path, "inputs": inputs} for f in work.manifest.files]
    job = {
        "do": "time", "files": files, "threads": asked.threads, "runs": asked.runs, "seconds": asked.seconds,
        "minutes": asked.minutes,
    }  # fmt: skip
    result = _run(device, facts, works[0], job)
    rows = iter(result["files"])
    found: list[tuple[Timed, ...]] = []
    for work in works:
        name = runtime(facts, work.manifest)
        each = [(f, next(rows)) for f in work.manifest.files]
        found.append(tuple(timed(work, f, facts, name, asked, r["ms"], r["cpu_ms"], r["peak_mb"]) for f, r in each))
    windows = tuple(Window(**{**w, "p50_ms": tuple(w["p50_ms"])}) for w in result["windows"])
    return Found(tuple(found), windows)


def computed_by(device: Device, facts: Facts, work: Work) -> str:
    """The interpreter and its packages."""
    return f"Python {facts.python_version}, {sorted(facts.packages.items())}"


def answer(device: Device, facts: Facts, tasks: Sequence[Task], arrays: Arrays, key: str, threads: int) -> None:
    """Copies the samples there, runs them through every file, removes them."""
    work = tasks[0].work
    inputs = work.path(f"{key}.{SAMPLES}.npz")
    put(device, packed(arrays), inputs)
    files = [{"folder": t.work.remote, "path": t.file.path, "outputs": t.outputs} for t in tasks]
    _run(device, facts, work, {"do": "answer", "files": files, "inputs": inputs, "threads": threads}, inputs)


def read(path: Path, work: Work) -> dict[str, NDArray[Any]]:
    """Outputs by name."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def runtime(facts: Facts, manifest: Manifest) -> str:
    """What runs the files there, with its version."""
    names = RUNTIMES.get(manifest.exporter, ())
    found = [f"{name} {facts.packages[name]}" for name in names if name in facts.packages]
    return found[0] if found else f"Python {facts.python_version}"


def packed(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The bytes of an .npz."""
    out = io.BytesIO()
    plain: dict[str, Any] = {name: np.asarray(a) for name, a in arrays.items()}
    np.savez(out, **plain)
    return out.getvalue()


def _run(device: Device, facts: Facts, work: Work, job: dict[str, Any], remove: str = "") -> Any:
    words = " ".join(map(shlex.quote, [facts.python, SCRIPT, json.dumps(job)]))
    then = f"; code=$?; rm -f {shlex.quote(remove)}; exit $code" if remove else ""
    ran = device.run(f"cd {shlex.quote(work.remote)} && {words}{then}")
    results = [line for line in ran.out.splitlines() if line.startswith(MARK)]
    if ran.code or not results:
        said = ran.err.strip().splitlines()
        raise DeploykitError(
            f"{facts.address}: running the files of {work.local} there failed: "
            f"{said[-1] if said else f'exit code {ran.code}'}"
        )
    return json.loads(results[-1].removeprefix(MARK))


def _version(facts: Facts) -> tuple[int, ...]:
    return tuple(int(part) for part in facts.python_version.split(".")[:2])
