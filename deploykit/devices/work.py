"""`Work`: an artifact on a device, in a folder named after its content, so that nothing is copied twice."""

from __future__ import annotations

import hashlib
import shlex
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploykit.core.artifact import File, Measurement
from deploykit.core.device import Facts
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import Manifest
from deploykit.core.progress import track
from deploykit.devices.device import Device
from deploykit.devices.stand_in import stand_in

ROOM = 1.1
"""Files need a little more than their bytes on a disk."""
SAMPLES = "samples"
"""Samples that are removed once they are answered are named ``KEY.samples...``."""
SWEEP = f"find . '(' -name '*.part' -o -name '*.{SAMPLES}*' ')' -mtime +0 -prune -exec rm -rf {{}} + 2> /dev/null"
"""Removes what a run that was killed could not: nothing is written for a day. The process ids in the names do not tell,
some are of another machine."""


@dataclass(frozen=True)
class Work:
    """An artifact here and its copy there."""

    local: Path
    manifest: Manifest
    remote: str
    """Absolute path of its folder on the device."""

    def path(self, name: str) -> str:
        """Of a file there."""
        return f"{self.remote}/{name}"


@dataclass(frozen=True)
class Asked:
    """How to time."""

    runs: int = 50
    seconds: float = 5.0
    threads: int = 1
    minutes: float = 0.0
    """How long to go on without a pause, beyond that."""


@dataclass(frozen=True)
class Timed:
    """One file's measurement there, and the time of each call."""

    measurement: Measurement
    milliseconds: NDArray[np.float64]
    """[rounds]; empty where the tool there tells only a summary."""


@dataclass(frozen=True)
class Window:
    """A stretch of a sustained run: how fast the files were in it, and what the device said at its end."""

    seconds: float
    """Since the sustained run began."""
    p50_ms: tuple[float, ...]
    """One per file, in the order they were timed."""
    rounds: int
    clock_mhz: float | None
    celsius: float | None


@dataclass(frozen=True)
class Found:
    """What one run on a device measured."""

    timed: tuple[tuple[Timed, ...], ...]
    """Per artifact, per file."""
    windows: tuple[Window, ...] = ()


def timed(
    work: Work,
    file: File,
    facts: Facts,
    runtime: str,
    asked: Asked,
    ms: Iterable[float],
    cpu: Iterable[float] = (),
    peak_mb: float | None = None,
    capability: str = "",
) -> Timed:
    """A file's calls as a measurement."""
    times, cpu_times = np.asarray(list(ms), np.float64), list(cpu)
    p50, p90, p99 = (float(v) for v in np.percentile(times, [50, 90, 99]))
    measurement = Measurement(
        file.precision, 1, asked.threads, len(times), p50, p90, p99, 1000.0 * len(times) / float(times.sum()), peak_mb,
        file.size(work.local), where(work, facts, runtime, capability),
        float(np.median(cpu_times)) if cpu_times else None,
    )  # fmt: skip
    return Timed(measurement, times)


def where(work: Work, facts: Facts, runtime: str, capability: str = "") -> str:
    """The device and what ran the file there. One that is not the target's is marked as times of this machine are."""
    why = stand_in(facts, work.manifest.exporter, work.manifest.target, capability)
    mark = f" ({why}), not the device" if why else ""
    return f"{facts.name}{mark}{facts.text.removeprefix(facts.name)}, {runtime}"


def send(
    device: Device,
    facts: Facts,
    folder: Path,
    manifest: Manifest,
    names: Iterable[str],
    own: Mapping[str, bytes],
    room: int = 0,
) -> Work:
    """Copies what is not there yet.

    Args:
        device: where to.
        facts: of that device.
        folder: the artifact.
        manifest: its manifest.
        names: its files that the device needs.
        own: further files by name, e.g. our script.
        room: bytes that samples will take there beside them.

    Raises:
        DeploykitError: not enough space there, or it cannot be written.
        Lost: the connection ended.
    """
    wanted = {s.path: s for s in manifest.stored if s.path in set(names)}
    digest = hashlib.sha256()
    for path, stored in sorted(wanted.items()):
        digest.update(f"{path} {stored.sha256}\n".encode())
    for name, content in sorted(own.items()):
        digest.update(name.encode() + hashlib.sha256(content).digest())
    work = Work(folder, manifest, f"{facts.folder}/{manifest.target}-{digest.hexdigest()[:16]}")
    folders = sorted({work.remote, *(work.path(p).rpartition("/")[0] for p in [*wanted, *own])})
    sizes = {path: stored.bytes for path, stored in wanted.items()} | {name: len(c) for name, c in own.items()}
    there = _sizes(device, work)
    missing = [name for name, count in sizes.items() if there.get(name) != count]
    needed = (sum(sizes[name] for name in missing) + room) * ROOM / 1e6
    if facts.free_mb is not None and needed > facts.free_mb:
        raise DeploykitError(
            f"{facts.address} has {facts.free_mb:.1f} MB free in {facts.folder}; {folder} needs {needed:.1f} MB there"
            f"{f', {room / 1e6:.1f} of them for samples' if room else ''}. Free some, or name another folder: "
            "--device ADDRESS?dir=PATH"
        )
    if missing:
        _checked(device, f"mkdir -p {' '.join(map(shlex.quote, folders))}")
    for name in track(missing, f"copying to {facts.name}"):
        put(device, own[name] if name in own else folder / name, work.path(name))
    return work


def _sizes(device: Device, work: Work) -> dict[str, int]:
    """Removes old leftovers and says which files are there already."""
    folder = shlex.quote(work.remote)
    out = _checked(
        device, f"[ -d {folder} ] || exit 0\ncd {folder} || exit 1\n{SWEEP}\nfind . -type f -exec wc -c {{}} \\;"
    )
    rows = [line.split(None, 1) for line in out.splitlines()]
    return {row[1].removeprefix("./"): int(row[0]) for row in rows if len(row) == 2 and row[0].isdigit()}


def _checked(device: Device, script: str) -> str:
    ran = device.run(script)
    if ran.code:
        raise DeploykitError(f"{device.address.text}: {ran.err.strip()}")
    return ran.out


def keep(device: Device, work: Work, content: bytes, name: str) -> str:
    """Copies a small file into a work's folder, under a name with its hash, if it is not there; returns its path."""
    path = work.path(f"{hashlib.sha256(content).hexdigest()[:16]}.{name}")
    if device.run(f"test -f {shlex.quote(path)}").code:
        put(device, content, path)
    return path


def put(device: Device, source: Path | bytes, destination: str) -> None:
    """Copies a file, or bytes as one."""
    if isinstance(source, Path):
        device.put(source, destination)
        return
    with tempfile.NamedTemporaryFile() as file:
        file.write(source)
        file.flush()
        device.put(Path(file.name), destination)
