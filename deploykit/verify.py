"""``deploykit verify``: an artifact's files are whole, and answer again as they did, each in its own runtime.

An artifact keeps a few inputs with what the original model, the hub and every file answered to them (`Golden`), so
this needs neither torch nor the data. Equal files in an equal runtime give equal numbers; on another processor kernels
sum in another order, so answers are compared by signal to noise. A file passes where the noise is below what an export
allows, or not above twice its amplitude at the export: what the compression cost was judged then, with all the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from deploykit import exporters
from deploykit.check import ENOUGH_DB, ENOUGH_INT8_DB, class_scores, sqnr_db
from deploykit.core.artifact import Check, File
from deploykit.core.errors import DeploykitError, GateFailed
from deploykit.core.golden import NAME, ORIGINAL, Golden, hub_of, load_golden, some_values
from deploykit.core.manifest import Manifest, changed_files, load_manifest
from deploykit.core.precision import is_quantized

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deploykit.exporters import Exporter

SLACK_DB = 6.0
"""Twice the amplitude of the noise."""


@dataclass(frozen=True)
class Verification:
    """What was found."""

    folder: Path
    manifest: Manifest
    problems: tuple[str, ...]
    """What is wrong with the files themselves, one sentence each; nothing was run then."""
    checks: tuple[Check, ...]
    """Of the files as they answer here; ``passed`` None: not run here, and ``detail`` says why."""

    @property
    def ran(self) -> bool:
        """Whether any file could be tried."""
        return any(check.passed is not None for check in self.checks)

    @property
    def differing(self) -> tuple[str, ...]:
        """The answers that are not those of the export, one phrase each."""
        return tuple(
            f"{c.precision}: {c.name} {c.value:.4g}, bound {c.bound:.4g} ({c.detail})"
            for c in self.checks
            if c.passed is False
        )

    def refuse_failed(self) -> None:
        """Raises if anything is wrong, or if nothing could be tried.

        Raises:
            DeploykitError: files that are missing or altered, or not one that could be run here.
            GateFailed: answers that are not those of the export, or a check that failed there.
        """
        if self.problems:
            found = "\n  ".join([f"{self.folder} is not as it was written:", *self.problems])
            raise DeploykitError(f"{found}\nExport it again, or copy it whole.")
        if self.differing:
            raise GateFailed(
                "\n  ".join([f"{self.folder} answers otherwise here than at the export:", *self.differing])
            )
        if not self.manifest.passed:
            raise GateFailed(f"{self.folder}: a check failed when it was exported")
        if not self.ran:
            raise DeploykitError(
                f"{self.folder}: the files are whole, but none could be run here: {self.checks[0].detail}"
            )

    def lines(self) -> Iterator[str]:
        """For people: every check, those made here first; of damaged files there are none to speak of."""
        if self.problems:
            return
        for where, checks in (("here", self.checks), ("export", self.manifest.checks)):
            for check in checks:
                state = {True: "ok", False: "FAILED", None: "not run here"}[check.passed]
                value = "-" if check.value is None else f"{check.value:.6g}"
                detail = f" ({check.detail})" if where == "here" else ""
                yield f"{state:12}  {where:6}  {check.precision:9}  {check.name}: {value}{detail}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "folder": str(self.folder),
            "problems": list(self.problems),
            "ran": self.ran,
            "here": msgspec.to_builtins(self.checks),
            "export": msgspec.to_builtins(self.manifest.checks),
        }


def verify(folder: Path, threads: int = 1) -> Verification:
    """Compares an artifact with what was written, and runs its files again.

    Raises:
        DeploykitError: the folder is not an artifact.
    """
    manifest = load_manifest(folder)
    exporter = exporters.load(manifest.exporter)
    problems = changed_files(folder, manifest)
    if problems:
        return Verification(folder, manifest, tuple(problems), ())
    try:
        runtime = exporter.runtime()
    except DeploykitError as error:
        missing = tuple(_not_run(file, str(error)) for file in manifest.files)
        return Verification(folder, manifest, (), missing)
    golden = load_golden(folder)
    checks: list[Check] = []
    for file in manifest.files:
        try:
            checks += _again(exporter, folder, file, golden, runtime.name, threads)
        except DeploykitError as error:
            problems.append(str(error))
    return Verification(folder, manifest, tuple(problems), tuple(checks))


def _again(
    exporter: Exporter, folder: Path, file: File, golden: Golden | None, runtime: str, threads: int
) -> list[Check]:
    """One file's answers, beside those it gave at the export."""
    run = exporter.load(folder / file.path, threads)
    if golden is None or file.precision not in golden.answers:
        return [_not_run(file, f"{NAME} holds no answers of this file to compare with")]
    now, then = some_values(run(golden.inputs)), golden.answers[file.precision]
    if all(np.array_equal(now[name], array) for name, array in then.items()):
        how = "the very same numbers"
    else:
        how = f"{_worst_db(then, now):.1f} dB from the export"
    detail = f"{how}; {_classes(now, then)}{runtime}"
    checks = []
    whose = [(ORIGINAL, "answers against the original model (dB)")]
    if is_quantized(file.precision):
        whose.insert(0, (hub_of(file.precision), "answers against the hub (dB)"))
    for who, name in whose:
        if who not in golden.answers:
            continue
        value, before = (_worst_db(golden.answers[who], answers) for answers in (now, then))
        bound = min(before - SLACK_DB, ENOUGH_DB.get(file.precision, ENOUGH_INT8_DB))
        checks.append(Check(name, file.precision, value, bound, value >= bound, detail))
    return checks


def _not_run(file: File, why: str) -> Check:
    return Check("answers", file.precision, None, None, None, why)


def _worst_db(reference: Mapping[str, NDArray[Any]], answers: Mapping[str, NDArray[Any]]) -> float:
    """Signal to noise of the output with the most of it; one that is not a number is worst of all."""
    found = [sqnr_db(array, answers[name]) for name, array in reference.items()]
    return -200.0 if any(np.isnan(found)) else min(found)


def _classes(now: Mapping[str, NDArray[Any]], then: Mapping[str, NDArray[Any]]) -> str:
    ours, theirs = class_scores(now), class_scores(then)
    if ours is None or theirs is None:
        return ""
    return f"{int((ours.argmax(1) == theirs.argmax(1)).sum())} of {len(ours)} samples in the same class; "
