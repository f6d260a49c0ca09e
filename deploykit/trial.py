"""A trial: an artifact's files on a device, timed and scored there, and kept in its manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from deploykit import check, exporters, targets
from deploykit.bench import Benchmark, measure_there
from deploykit.bench.compare import short
from deploykit.bench.there import lacks, refuse_lacking, send_all
from deploykit.bench.timing import RUNS
from deploykit.core.artifact import Check, Measurement
from deploykit.core.data import DataSet
from deploykit.core.device import Facts
from deploykit.core.errors import DeploykitError, GateFailed, MissingExtra
from deploykit.core.figures import number
from deploykit.core.files import write_in_place
from deploykit.core.manifest import NAME, Manifest, Score, load_manifest
from deploykit.core.progress import say
from deploykit.core.request import Gate, Settings
from deploykit.core.target import Target
from deploykit.devices import Device, connect, parse, read_facts
from deploykit.devices.answers import answers, room
from deploykit.devices.kinds import kind
from deploykit.sources import check_labels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deploykit.check import Answers, Metric

SAME_HERE = "answers there as here (%)"
SAME_HERE_DB = "answers there against here (dB)"


@dataclass(frozen=True)
class Exam:
    """What the files shall answer on the device, and what the answers are compared with."""

    data: DataSet
    label: str
    """For the manifest, e.g. ``"eval.npz"``."""
    metric: Metric | None = None
    reference: Answers | None = None
    """The original model's answers, where they are at hand."""


@dataclass(frozen=True)
class Trial:
    """What a device said about itself and about the files; scores and checks per artifact."""

    facts: Facts
    benchmark: Benchmark | None
    scores: tuple[tuple[Score, ...], ...]
    checks: tuple[tuple[Check, ...], ...]

    def lines(self, folders: Sequence[Path]) -> list[str]:
        """Scores and checks for the terminal."""
        found = []
        for folder, scores, checks in zip(folders, self.scores, self.checks, strict=False):
            name = short(folder, folders)
            values = {s.precision: s for s in scores}
            for c in checks:
                score = values.get(c.precision)
                metric = f"{number(score.metric)} %, " if score is not None and score.metric is not None else ""
                state = f"{c.name}: not run, {c.detail}" if c.value is None else f"{c.name} {number(c.value)}"
                found.append(f"{name} {c.precision}: {metric}{state}")
        return found

    def refuse_failed(self, folders: Sequence[Path]) -> None:
        """Raises GateFailed if a file answers otherwise than here."""
        failed = [
            f"{folder}: {c.name} {c.value:.4g}, bound {c.bound:.4g} ({c.precision}; {c.detail})"
            for folder, checks in zip(folders, self.checks, strict=False)
            for c in checks
            if c.passed is False and c.value is not None and c.bound is not None
        ]
        if failed:
            raise GateFailed("the files compute something else on the device:\n  " + "\n  ".join(failed))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        timed: dict[str, Any] = {} if self.benchmark is None else self.benchmark.to_dict()
        return {
            **timed,
            "device": msgspec.to_builtins(self.facts),
            "scores": [msgspec.to_builtins(found) for found in self.scores],
            "checks": [msgspec.to_builtins(found) for found in self.checks],
        }


def preflight(address: str, chosen: Sequence[Target]) -> None:
    """Asks the device what it is, before any long work.

    Raises:
        DeploykitError: it cannot be reached, or lacks something that a target's files need there (all are named).
    """
    troubles = _troubles(address, chosen)
    if troubles:
        raise DeploykitError(f"{parse(address).text} cannot run this:\n  " + "\n  ".join(troubles.values()))


def runnable(address: str, names: Sequence[str]) -> list[str]:
    """The targets whose files a device can run; why it cannot run the others is said.

    Raises:
        DeploykitError: the device cannot be reached, or can run none of them.
    """
    troubles = _troubles(address, [targets.load(name) for name in names])
    if len(troubles) == len(names):
        raise DeploykitError(f"{parse(address).text} can run none of this:\n  " + "\n  ".join(troubles.values()))
    for trouble in troubles.values():
        say(f"left out: {trouble}")
    return [name for name in names if name not in troubles]


def _troubles(address: str, chosen: Sequence[Target]) -> dict[str, str]:
    """Why targets' files cannot be run on a device, by target."""
    with connect(parse(address)) as device:
        facts = read_facts(device)
    found = {t.name: lacks(facts, t.exporter, t.name) for t in chosen}
    exporters = {t.name: t.exporter for t in chosen}
    return {name: f"{name} ({exporters[name]}): {why}" for name, why in found.items() if why}


def refuse(address: str, folders: Sequence[Path]) -> None:
    """`preflight` for finished artifacts."""
    with connect(parse(address)) as device:
        refuse_lacking(read_facts(device), folders)


def try_out(
    address: str,
    folders: Sequence[Path],
    samples: Mapping[str, NDArray[Any]] | None = None,
    exams: Sequence[Exam] = (),
    gate: Gate | None = None,
    *,
    time: bool = True,
    threads: int = 1,
    runs: int = RUNS,
    minutes: float = 0.0,
) -> Trial:
    """Runs artifacts on a device.

    Args:
        address: of the device.
        folders: artifacts; their files are timed in turns.
        samples: arrays ``[n, ...]`` by input name to time with; random numbers without.
        exams: one per folder, or none: the files are then only timed.
        gate: bounds on how far answers there may be from those here.
        time: whether to time at all.
        threads: of the runtimes there.
        runs: rounds at least.
        minutes: goes on that long without a pause and records the drift.

    Raises:
        DeploykitError: the device cannot be reached, lacks something, or a file fails there.
        Lost: the connection ended; run again to go on.
    """
    with connect(parse(address)) as device:
        facts = read_facts(device)
        refuse_lacking(facts, folders)
        if exams:  # a disk too small for the samples is refused before the files are timed
            send_all(device, facts, folders, max(room(exam.data) for exam in exams))
        benchmark = None
        if time:
            benchmark = measure_there(
                device, facts, folders, samples, threads=threads, runs=runs, minutes=minutes
            )  # fmt: skip
        judged = [
            _sit(device, facts, folder, exam, gate or Gate(), threads)
            for folder, exam in zip(folders, exams, strict=bool(exams))
        ]
    return Trial(facts, benchmark, tuple(s for s, _ in judged), tuple(c for _, c in judged))


def _sit(
    device: Device, facts: Facts, folder: Path, exam: Exam, gate: Gate, threads: int
) -> tuple[tuple[Score, ...], tuple[Check, ...]]:
    """One artifact's files answer the exam's samples, there and here."""
    artifact = exporters.open_artifact(folder)
    why = kind(artifact.exporter).mute(facts, artifact.exporter)
    if why:
        return (), tuple(Check(SAME_HERE, f.precision, None, None, None, why) for f in artifact.files)
    (work,) = send_all(device, facts, [folder])
    there = answers(device, facts, work, exam.data, threads)
    scores, checks = [], []
    for file in artifact.files:
        found = check.Answers(there[file.precision], exam.data.labels)
        classes = check.class_scores(found.outputs)
        if classes is not None and exam.data.labels is not None and exam.metric is None:
            check_labels(exam.data, classes.shape[1])
        label = f"{exam.label}, answered on {facts.name}"
        score = check.score(found, exam.reference or found, file.precision, label, exam.metric)
        scores.append(score if exam.reference is not None else replace(score, agreement=None, sqnr_db={}))
        try:
            here = check.answer(artifact.runner(file.precision, threads), exam.data, "the same here")
        except MissingExtra as error:
            checks.append(Check(SAME_HERE, file.precision, None, None, None, str(error)))
            continue
        checks += _same(found, here, file.precision, artifact.exporter, facts, gate)
    return tuple(scores), tuple(checks)


def _same(there: Answers, here: Answers, precision: str, exporter: str, facts: Facts, gate: Gate) -> list[Check]:
    """The device's kernels may round ties elsewhere; they may not compute another network."""
    # TensorRT multiplies fp32 in TF32 where there is TF32, whose mantissa is that of fp16
    computed = "fp16" if exporter == "tensorrt" and precision == "fp32" else precision
    least_db = check.ENOUGH_DB.get(computed, check.ENOUGH_INT8_DB)
    detail = f"{len(next(iter(there.outputs.values())))} samples on {facts.name}"
    return [
        replace(found, name=SAME_HERE, detail=detail)
        if "%" in found.name
        else replace(found, name=SAME_HERE_DB, detail=f"{found.detail}; {detail}")
        for found in check.check_file_against_hub(there, here, precision, gate, least_db)
    ]


def finish(
    address: str,
    folders: Sequence[Path],
    samples: Mapping[str, NDArray[Any]],
    exam: Exam | None,
    settings: Settings,
    gate: Gate,
) -> list[Manifest]:
    """Tries finished artifacts of one export on a device, and records that in their manifests.

    Raises:
        DeploykitError: that went wrong; the message says that the artifacts are there, and how to go on.
    """
    exams = [] if exam is None else [exam for _ in folders]
    try:
        found = try_out(address, folders, samples, exams, gate, time=settings.benchmark, threads=settings.threads)
    except DeploykitError as error:
        first, *others = (str(folder) for folder in folders)
        against = "".join(f" --against {other}" for other in others)
        raise DeploykitError(
            f"{error}.\nThe files are written and checked on this machine. To go on there: "
            f"deploykit benchmark {first}{against} --device '{address}' --record"
        ) from None
    return [record(folder, found, i) for i, folder in enumerate(folders)]


def record(folder: Path, trial: Trial, position: int = 0) -> Manifest:
    """Puts what a device found into an artifact's manifest: its measurements replace those taken elsewhere, its scores
    come before those taken here, its checks behind them.

    Args:
        folder: the artifact.
        trial: what was found.
        position: of the artifact in the trial.

    Raises:
        DeploykitError: not an artifact, or it cannot be written.
    """
    manifest = load_manifest(folder)
    scores = trial.scores[position] if trial.scores else ()
    checks = trial.checks[position] if trial.checks else ()
    labels = {s.data for s in scores}
    measurements: tuple[Measurement, ...] = manifest.measurements
    advice = manifest.advice
    if trial.benchmark is not None:
        group = trial.benchmark.groups[position]
        drifts = tuple(d for d in trial.benchmark.drifts if any(d.timing is t for t in group))
        measurements, advice = tuple(t.measurement for t in group), Benchmark(group, drifts, trial.facts).advice
    manifest = replace(
        manifest,
        device=trial.facts,
        measurements=measurements,
        advice=advice,
        scores=(*scores, *(s for s in manifest.scores if s.data not in labels)),
        checks=(*(c for c in manifest.checks if not (checks and c.name in (SAME_HERE, SAME_HERE_DB))), *checks),
    )
    write_in_place(folder / NAME, manifest.to_json())
    return manifest
