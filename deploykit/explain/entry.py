"""`explain`: from an artifact's folder to an `Explanation`."""

from __future__ import annotations

from pathlib import Path

from deploykit.calibration.growth import convergence
from deploykit.calibration.lint import START
from deploykit.core.context import Role
from deploykit.core.errors import DeploykitError
from deploykit.core.golden import load_golden
from deploykit.core.manifest import load_intact
from deploykit.core.precision import needs_calibration
from deploykit.core.ranges import load_ranges
from deploykit.explain.explanation import Explanation
from deploykit.explain.known import chosen_file, operators
from deploykit.explain.timing import times
from deploykit.report import spans
from deploykit.report.made import RANGES
from deploykit.report.usage import integers_only

SAMPLES = 100
"""Answered by every alternative, unless something else is asked for."""


def explain(
    folder: Path,
    precision: str | None = None,
    calibration: str | None = None,
    evaluation: str | None = None,
    samples: int = SAMPLES,
) -> Explanation:
    """Why the operators of one integer file are as they are, and what would be better.

    Args:
        folder: an artifact's.
        precision: of the file; None: the last integer one.
        calibration: DATA that the export was calibrated with; without it nothing is measured.
        evaluation: DATA to compare answers on, instead of that of the export.
        samples: so many of it, at most.

    Raises:
        DeploykitError: not a whole artifact, or one without integers; measuring was asked for and cannot be done.
    """
    manifest = load_intact(folder)
    file = chosen_file(manifest, precision, str(folder))
    if evaluation is not None and calibration is None:
        raise DeploykitError("--eval is for measuring, which needs the export's sample data: give --calib, too")
    golden = load_golden(folder)
    found = None if golden is None else times(manifest, file, folder, golden.inputs)
    told = operators(manifest, file, found)
    calibrated = needs_calibration(file.precision) and any(s.path == RANGES for s in manifest.stored)
    ranges = load_ranges(folder / RANGES) if calibrated else None  # they may be there for another file
    measured, seen = None, ranges
    if calibration is not None:
        if ranges is None:
            raise DeploykitError(f"{folder}: its {file.precision} file was not calibrated: there is nothing to measure")
        from deploykit.explain.measure import measure
        from deploykit.explain.remake import remake

        data: dict[Role, str] = {"calibration": calibration}
        if evaluation is not None:
            data["eval"] = evaluation
        made = remake(manifest, file.precision, folder, ranges, data)
        result = measure(made, told, samples, integers_only(manifest.exporter))
        measured, told, seen = result.measured, result.operators, result.ranges
    shown = () if seen is None else spans.spans(seen, manifest)
    return Explanation(
        str(folder),
        file.path,
        file.precision,
        manifest.target,
        told,
        shown,
        0 if seen is None else len(spans.computed(seen, manifest)),
        manifest.thresholds,
        None if ranges is None else convergence(ranges),
        tuple(note for note in manifest.notes if calibrated and note.startswith(START)),
        measured,
        "" if found is None else found.where,
    )
