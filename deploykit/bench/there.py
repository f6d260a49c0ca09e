"""Times the files of one or more artifacts on a device, those of one kind in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit import exporters
from deploykit.bench.compare import Benchmark, Timing
from deploykit.bench.drift import Drift
from deploykit.bench.timing import RUNS, SECONDS, feed
from deploykit.core.device import Facts
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import load_intact
from deploykit.core.progress import status
from deploykit.devices import Device
from deploykit.devices.kinds import kind
from deploykit.devices.stand_in import fact, other_machine
from deploykit.devices.work import Asked, Work

if TYPE_CHECKING:
    from numpy.typing import NDArray


def measure_there(
    device: Device,
    facts: Facts,
    folders: Sequence[Path],
    samples: Mapping[str, NDArray[Any]] | None = None,
    *,
    threads: int = 1,
    runs: int = RUNS,
    seconds: float = SECONDS,
    minutes: float = 0.0,
    seed: int = 0,
) -> Benchmark:
    """As `bench.measure`, on a device, with single samples; ``minutes`` goes on that long and records the drift.

    Raises:
        DeploykitError: not an artifact; something is missing there (named, for every artifact); no space there.
        Lost: the connection ended.
    """
    refuse_lacking(facts, folders)
    works = send_all(device, facts, folders)
    asked = Asked(runs, seconds, threads, minutes)
    feeds = [feed(w.manifest.inputs, samples, 1, seed) for w in works]
    timings: dict[int, list[Timing]] = {}
    drifts: list[Drift] = []
    groups = {id(how): how for how in (kind(w.manifest.exporter) for w in works)}
    for how in groups.values():
        mine = [i for i, w in enumerate(works) if kind(w.manifest.exporter) is how]
        with status(f"timing on {facts.name}"):
            found = how.measure(device, facts, [works[i] for i in mine], asked, [feeds[i] for i in mine])
        for i, timed in zip(mine, found.timed, strict=True):
            artifact = exporters.open_artifact(folders[i])
            timings[i] = [
                Timing(artifact, file, t.measurement, t.milliseconds)
                for file, t in zip(artifact.files, timed, strict=True)
            ]
        measured = [t for i in mine for t in timings[i]]
        drifts += [Drift(t, tuple(found.windows), n) for n, t in enumerate(measured) if found.windows]
    return Benchmark(tuple(t for i in sorted(timings) for t in timings[i]), tuple(drifts), facts)


def send_all(device: Device, facts: Facts, folders: Sequence[Path], room: int = 0) -> list[Work]:
    """Copies what is not there yet, where that and ``room`` more bytes have space."""
    manifests = [load_intact(folder) for folder in folders]
    return [kind(m.exporter).send(device, facts, f, m, room) for f, m in zip(folders, manifests, strict=True)]


def refuse_lacking(facts: Facts, folders: Sequence[Path]) -> None:
    """Raises one DeploykitError that names, per artifact, what is missing on the device."""
    troubles = []
    for folder in folders:
        manifest = load_intact(folder)
        why = lacks(facts, manifest.exporter, manifest.target)
        troubles += [f"{folder} ({manifest.exporter}): {why}"] if why else []
    if troubles:
        raise DeploykitError(f"{facts.address} cannot run this:\n  " + "\n  ".join(troubles))


def lacks(facts: Facts, exporter: str, target: str) -> str:
    """Why a target's files cannot be run on a device, and what to do; empty: they can."""
    return kind(exporter).lacks(facts, exporter) or _wrong_machine(facts, exporter, target)


def _wrong_machine(facts: Facts, exporter: str, target: str) -> str:
    if exporter != "tensorrt" or not other_machine(facts, target):
        return ""
    return (
        f"an engine is built for the device that builds it; target '{target}' is {fact(target, 'architecture')}, this "
        f"device is {facts.machine}"
    )
