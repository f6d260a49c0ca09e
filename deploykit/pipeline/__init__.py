"""The whole road: model and data in, steps, hub, files, checks, measurements, manifest. One direction, no way back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit import exporters, trial
from deploykit.core.artifact import Artifact
from deploykit.core.errors import DeploykitError, GateFailed
from deploykit.core.files import folder_in_place, refuse_taken
from deploykit.core.journal import beside
from deploykit.core.precision import integers, is_corrected
from deploykit.core.ranges import Ranges
from deploykit.core.request import Gate, Request, Settings
from deploykit.core.target import Target
from deploykit.pipeline.judge import Judge
from deploykit.pipeline.prepared import Prepared, prepare
from deploykit.pipeline.road import Road
from deploykit.pipeline.steps import calibrate, compress, float_graph, insist
from deploykit.planning import plan, precisions, profiting
from deploykit.report.advice import mend
from deploykit.training.trainer import require_accelerate
from deploykit.trial import Exam

if TYPE_CHECKING:
    from deploykit.check import Metric

__all__ = ["Gate", "Prepared", "Settings", "calibrate", "compress", "exam", "export", "float_graph", "prepare"]


def export(
    prepared: Prepared,
    chosen: Sequence[Target],
    folders: Sequence[Path],
    settings: Settings,
    gate: Gate,
    metric: Metric | None = None,
    ranges: Ranges | None = None,
    requests: Sequence[Request] = (),
    device: str | None = None,
) -> list[Artifact]:
    """Runs the road for every target and writes one artifact folder per target.

    One lowering and one calibration serve all targets; targets with equal QuantSpecs share one hub.

    Args:
        requests: what was typed, one per target, for the manifests; without, that it came as Python objects.
        device: address of a device on which the files are timed and answer the evaluation data.

    Raises:
        DeploykitError: bad request; nothing is left behind. Or the device failed: the artifacts are there, checked
            here, and the message says how to go on.
        GateFailed: an artifact was written but failed a check.
    """
    for folder in folders:
        refuse_taken(folder, settings.overwrite)
    chosen = [profiting(target, settings.pack) for target in chosen]
    have = prepared.have
    calibrated = "calibration" in prepared.data or ranges is not None
    for target in chosen:
        exporter = exporters.load(target.exporter)
        exporter.runtime()  # a missing extra is said before any long work
        written, _ = precisions(target, settings.precisions, calibrated)
        exporters.refuse_uncarried(target, written, exporter.CARRIES, exporter.WHY_NOT)
        for planned in plan(settings.recipe, target, have, settings.correction, prepared.model.enters):
            if planned.left_out:
                continue
            if not planned.automatic:
                insist(planned, target, settings.force)
                if planned.step.stage == "hub" and not any(map(is_corrected, written)):
                    raise DeploykitError(
                        f"step {planned.step!r} works on integers, and for '{target.name}' only {', '.join(written)} "
                        "would be written. Give --calib, ask for int8, or leave the step out."
                    )
            if "train" in planned.step.needs:
                require_accelerate()
    if device is not None:
        trial.preflight(device, chosen)
    if settings.uint8_input:
        prepared.as_pixels()  # data that cannot become pixels is refused before any long work
    if not requests:
        objects = ("the model and its data, prepared in Python",)
        requests = [Request(prepared.model.origin, t.name, objects=objects) for t in chosen]
    with ExitStack() as together:  # all the folders appear, or none
        journal = together.enter_context(beside(folders[0]))
        road = Road(prepared, settings, gate, metric, journal)
        road.lower(chosen, ranges)
        works = [together.enter_context(folder_in_place(folder, settings.overwrite)) for folder in folders]
        manifests = [road.write(t, work, asked) for t, work, asked in zip(chosen, works, requests, strict=True)]
    if device is not None:
        manifests = trial.finish(device, folders, road.fed.example, road.judge.exam(), settings, gate)
    artifacts = []
    failed: list[str] = []
    mends: dict[str, None] = {}
    for target, folder, manifest in zip(chosen, folders, manifests, strict=True):
        exporter = exporters.load(target.exporter)
        artifacts.append(
            Artifact(
                folder, target.name, target.exporter, manifest.files, manifest.inputs, manifest.outputs, exporter.load
            )
        )
        missed = [c for c in manifest.checks if c.passed is False and c.value is not None and c.bound is not None]
        failed += [f"{folder}: {c.name} {c.value:.4g}, bound {c.bound:.4g} ({c.precision}; {c.detail})" for c in missed]
        mends |= dict.fromkeys(text for c in missed if (text := mend(c, manifest)))
        for precision in integers(dict.fromkeys(c.precision for c in missed)):
            if losing := manifest.operators_of(precision)[:3]:
                worst = ", ".join(f"{o.layer} ({o.operator}, {o.sqnr_db:.1f} dB)" for o in losing)
                failed.append(f"{folder}: layers that lose most in {precision}: {worst}")
    if failed:
        listed = "\n  ".join(["the files were written but failed their checks:", *failed])
        raise GateFailed("\n".join([listed, *mends]))
    return artifacts


def exam(prepared: Prepared, settings: Settings, gate: Gate, metric: Metric | None = None) -> Exam | None:
    """The evaluation data of an export and what the original model answers; None: there is none."""
    fed = prepared.as_pixels() if settings.uint8_input else prepared
    return Judge(float_graph(prepared.model, prepared.example), prepared, fed, settings, gate, metric).exam()
