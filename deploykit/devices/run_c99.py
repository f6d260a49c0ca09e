"""Integer C: compiled on the device by its own compiler; the self-test first, then calls, timed or with samples.

A device with a shell is no microcontroller: times are those of this device's processor, the numbers are the same.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.device import Facts
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import Manifest
from deploykit.devices.device import Device
from deploykit.devices.work import SAMPLES, Asked, Found, Work, put, timed
from deploykit.devices.work import send as send_files
from deploykit.exporters.c99.golden import described, to_integers, to_reals

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deploykit.devices.kinds import Arrays, Task

HARNESS = "harness.c"
ABOUT = "model.json"
BURSTS = 10
"""Artifacts take turns in bursts of calls: a process per call would time the cache of a program that just started."""
BUILD = """
set -e
command -v cc > /dev/null 2>&1 && c=cc || c=gcc; command -v $c > /dev/null 2>&1 || c=clang
v=$($c --version | head -n 1); echo "$v"
by="$v for $(uname -m)"
[ -x harness ] && [ "$(cat harness.by 2> /dev/null)" = "$by" ] && exit 0
d=.build.$$.part; rm -rf $d; mkdir $d; trap 'rm -rf $d' EXIT
for f in model dk_kernels; do $c -std=c99 -O3 -ffreestanding -c -o $d/$f.o $f.c; done
for f in selftest harness; do $c -std=c99 -O2 -I. -o $d/$f $f.c $d/model.o $d/dk_kernels.o; done
$d/selftest
rm -f harness.by; mv $d/harness harness; echo "$by" > harness.by
"""


def lacks(facts: Facts, exporter: str) -> str:
    """A C compiler."""
    if {"cc", "gcc", "clang"} & set(facts.tools):
        return ""
    return "no C compiler there: install gcc or clang (e.g. apt install gcc)"


def mute(facts: Facts, exporter: str) -> str:
    """What can be compiled can answer."""
    return lacks(facts, exporter)


def send(device: Device, facts: Facts, folder: Path, manifest: Manifest, room: int = 0) -> Work:
    """The sources, the golden vectors, our harness."""
    harness = (resources.files("deploykit.devices.there") / HARNESS).read_bytes()
    names = [s.path for s in manifest.stored if Path(s.path).suffix in (".c", ".h")]
    return send_files(device, facts, folder, manifest, names, {HARNESS: harness}, room)


def measure(
    device: Device, facts: Facts, works: Sequence[Work], asked: Asked, feeds: Sequence[Mapping[str, NDArray[Any]]]
) -> Found:
    """Bursts of calls in turns. Integer kernels take as long for any input."""
    if asked.minutes:
        raise DeploykitError("--sustained is not there for integer C: it runs no longer than the harness is called")
    compilers = [_built(device, facts, work) for work in works]
    calls = -(-asked.runs // BURSTS)
    turns = [(i + burst) % len(works) for burst in range(BURSTS) for i in range(len(works))]
    bursts = [f"cd {shlex.quote(works[i].remote)}\necho = {i}\n./harness time {calls}" for i in turns]
    rows: list[list[list[float]]] = [[] for _ in works]
    current = 0
    for line in _checked(device, facts, "\n".join(["set -e", *bursts])).splitlines():
        if line.startswith("= "):
            current = int(line[2:])
        else:
            rows[current].append([float(part) / 1e6 for part in line.split()])
    found = []
    for work, compiler, mine in zip(works, compilers, rows, strict=True):
        if len(mine) != BURSTS * calls:
            raise DeploykitError(f"{facts.address}: {work.local} answered {len(mine)} of {BURSTS * calls} timed calls")
        elapsed, worked = zip(*mine, strict=True)
        runtime = f"compiled there by {compiler} -O3"
        (file,) = work.manifest.files
        found.append((timed(work, file, facts, runtime, asked, elapsed, worked),))
    return Found(tuple(found))


def computed_by(device: Device, facts: Facts, work: Work) -> str:
    """The compiler, which has compiled the harness by then."""
    return _built(device, facts, work)


def answer(device: Device, facts: Facts, tasks: Sequence[Task], arrays: Arrays, key: str, threads: int) -> None:
    """Copies the samples there as the network takes them, runs them, removes them."""
    (task,) = tasks
    work = task.work
    _built(device, facts, work)
    about = _about(work.local)
    count = len(next(iter(arrays.values())))
    stored = [to_integers(described(port), arrays[port["name"]]) for port in about["inputs"]]
    inputs = work.path(f"{key}.{SAMPLES}")
    put(device, np.concatenate([s.reshape(count, -1) for s in stored], axis=1).tobytes(), inputs)
    spots = [[f"{p['offset']}:{int(np.prod(p['shape']))}" for p in about[side]] for side in ("inputs", "outputs")]
    words = " ".join([str(count), *spots[0], "--", *spots[1]])
    _checked(
        device,
        facts,
        f"cd {shlex.quote(work.remote)}; o={shlex.quote(task.outputs)}; i={shlex.quote(inputs)}; p=$o.$$.part; "
        f'./harness answer {words} < "$i" > "$p" && mv "$p" "$o" && rm "$i" || {{ rm -f "$p" "$i"; exit 1; }}',
    )


def read(path: Path, work: Work) -> dict[str, NDArray[Any]]:
    """Outputs as real numbers, by name."""
    about = _about(work.local)
    sizes = [int(np.prod(port["shape"])) for port in about["outputs"]]
    stored = np.frombuffer(path.read_bytes(), np.int8).reshape(-1, sum(sizes))
    parts = np.split(stored, np.cumsum(sizes)[:-1], axis=1)
    return {port["name"]: to_reals(described(port), part) for port, part in zip(about["outputs"], parts, strict=True)}


@cache
def _about(folder: Path) -> Any:
    """``model.json``: where inputs and outputs lie and what their integers mean."""
    return json.loads((folder / ABOUT).read_text(encoding="utf-8"))


def _built(device: Device, facts: Facts, work: Work) -> str:
    """Compiles once per compiler, runs the self-test, returns what the compiler calls itself."""
    return _checked(device, facts, f"cd {shlex.quote(work.remote)}\n{BUILD}").splitlines()[0]


def _checked(device: Device, facts: Facts, script: str) -> str:
    ran = device.run(script)
    if ran.code:
        said = [line for line in ran.err.splitlines() if "error" in line] or (ran.err or ran.out).strip().splitlines()
        raise DeploykitError(f"{facts.address}: {said[-1] if said else f'ended with code {ran.code}'}")
    return ran.out
