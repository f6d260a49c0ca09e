"""What the reader should know, each with what to do about it (its mend)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from deploykit import targets
from deploykit.core.artifact import Check
from deploykit.core.manifest import Manifest
from deploykit.core.precision import is_integer, is_quantized
from deploykit.core.ranges import Ranges
from deploykit.report.rows import reason, rows
from deploykit.report.scatter import NOT_THE_DEVICE
from deploykit.report.spans import computed, stretch
from deploykit.report.usage import integers_only

Weight = Literal["failed", "warning", "note"]

FEW_SCORED, FEW_CALIBRATED = 200, 32
POOR_DB = 20.0
"""Below this a layer's noise is a tenth of its signal."""
STRETCHED = 3.0
"""A range this many times the average sample's is set by a few samples."""
SATURATED = 5.0
"""Percent of the samples whose two best classes may be equal."""

LOSSY = "Try --thresholds mse, more calibration samples or the step qat{worst}."
THERE = "Where Linux or Android runs there: deploykit benchmark FOLDER --device ssh://user@host (or adb://SERIAL)."
OUT_OF_REACH = "Time it there yourself: deploykit reaches devices with Linux or Android."
IN_FLOATS = (
    "Nothing in this file is quantized: ask the steps of the recipe, where there are some, for less; or take another "
    "precision, or another version of the runtime."
)
IN_FLOAT8 = (
    "There is no more to correct in 8-bit floating point: take --precision int8-fp16, or keep layers in float16 "
    "(--keep-float NAME)."
)

CHECKS = {
    "lost accuracy": LOSSY,
    "agrees with the original": LOSSY,
    "signal to noise": LOSSY,
    "operators:": "The runtime computes this operator differently: {keep_it}take another version of the runtime.",
    "file agrees with the hub": "The runtime computes something else than was quantized: look at the operators below.",
    "file against hub": "The runtime computes something else than was quantized: look at the operators below.",
    "float graph against": "Lowering changed the model: look for branches on values, or for random numbers.",
    "pixels folded": "Export without --uint8-input and normalise the images yourself.",
    "answers there": "The runtime there computes something else: take another version of it, or another file.",
    "C equals": "Do not use this file: it is a fault of the exporter; the issue tracker wants to know.",
    "integer": "Nothing became integer: the reasons stand under the operators left in float.",
}  # fmt: skip
"""Start of a check's name -> what to do when it failed."""

NOTES = {
    "were not evaluated": "",
    "exported with batch 1 only": "Nothing to do where one sample at a time is enough. For more, let forward take any "
    "batch: reshape(x.shape[0], -1) instead of numbers.",
    "calibration data:": "Mend the samples and export again: ranges and corrections rest on them.",
    "calibrated without real data": "Where some real samples may be used, give them instead: --calib DATA.",
    "rounding costs was not corrected": "Give --calib together with --ranges, or leave --ranges out.",
    "only float files were written": "Give --calib DATA: some hundred typical samples.",
    "--force ran": "Take the step out of the recipe, or name a target that profits from it.",
    "x the size of the fp32 file": "Look at the operators left in float below; in a very small network the graph "
    "itself outweighs the weights.",
    "beyond what float16 holds": "Take the fp32 or the int8 file, or train with weight decay until values are smaller.",
    "is slower than": "",
    "was busy (p90 is up to": "",
}
"""Part of a note -> what to do about it; empty: the note says it itself, behind its colon. Notes without an entry are
only good to know."""


@dataclass(frozen=True)
class Advice:
    """One thing to know."""

    weight: Weight
    what: str
    mend: str
    """What to do; empty: nothing."""


def advice(manifest: Manifest, ranges: Ranges | None) -> tuple[Advice, ...]:
    """All there is to say about an artifact, what failed first. Nothing is said twice."""
    found = [*_failed(manifest), *_data(manifest), *_numbers(manifest, ranges), *_times(manifest), *_notes(manifest)]
    order = ("failed", "warning", "note")
    return tuple(sorted(dict.fromkeys(found), key=lambda a: order.index(a.weight)))


def _failed(manifest: Manifest) -> Iterator[Advice]:
    for check in manifest.checks:
        if check.passed is False:
            yield Advice("failed", outcome(check), mend(check, manifest))


def mend(check: Check, manifest: Manifest) -> str:
    """What to do about a check of an artifact that failed; empty: nothing is known."""
    found = next((m for start, m in CHECKS.items() if check.name.startswith(start)), "")
    if found is LOSSY and not is_integer(check.precision):
        return IN_FLOAT8 if is_quantized(check.precision) else IN_FLOATS
    keep_it = "" if integers_only(manifest.exporter) else "keep it in float (--keep-float NAME), or "
    return found.format(worst=_keep_worst(manifest, check.precision), keep_it=keep_it)


def outcome(check: Check) -> str:
    """A check in one sentence."""
    figures = [] if check.value is None else [f"{check.value:.4g}"]
    figures += [] if check.bound is None else [f"bound {check.bound:.4g}"]
    detail = f" ({check.detail})" if check.detail else ""
    return f"{check.precision}: {check.name} {', '.join(figures)}{detail}"


def _keep_worst(manifest: Manifest, precision: str) -> str:
    if integers_only(manifest.exporter):
        return ""
    names = [o.layer for o in manifest.operators_of(precision)[:2]]
    if not names:
        return "; or keep a layer in float (--keep-float NAME)"
    return "; or keep the worst layers in float: " + " ".join(f"--keep-float {name}" for name in names)


def _data(manifest: Manifest) -> Iterator[Advice]:
    score = next(iter(manifest.scores), None)
    if score is not None and "holdout" in manifest.data and "eval" not in manifest.data:
        mend = "Give --eval DATA that calibration has not seen."
        yield Advice("warning", f"Scored on {score.samples:,} samples held out of the calibration data.", mend)
    if score is not None and 0 < score.samples < FEW_SCORED:
        one = 100 / score.samples
        what = f"Scored on {score.samples} samples only: one answer more or less is {one:.1f} points."
        yield Advice("warning", what, f"Give --eval at least {FEW_SCORED} samples.")
    calibration = manifest.data.get("calibration")
    if calibration is not None and calibration.samples < FEW_CALIBRATED:
        what = f"Ranges come from {calibration.samples} samples only."
        yield Advice("warning", what, "Give --calib some hundred typical samples.")


def _numbers(manifest: Manifest, ranges: Ranges | None) -> Iterator[Advice]:
    keep = "If accuracy is short, keep it in float: --keep-float {name}."
    last = "Keep the last layer in float (--keep-float NAME)."
    if integers_only(manifest.exporter):
        keep = last = f"If accuracy is short: {LOSSY.format(worst='')}"
    looked_at = list(dict.fromkeys(o.precision for o in manifest.operators))
    for precision in looked_at:
        where = f" in {precision}" if len(looked_at) > 1 else ""
        for worst in [o for o in manifest.operators_of(precision) if o.sqnr_db < POOR_DB][:3]:
            noise = 100 * 10 ** (-worst.sqnr_db / 20)
            what = f"{worst.layer} ({worst.operator}) has noise of {noise:.0f} % of its signal{where}."
            yield Advice("warning", what, keep.format(name=worst.layer))
    for score in manifest.scores:
        if is_integer(score.precision) and score.saturated is not None and score.saturated > SATURATED:
            what = f"{score.precision}: for {score.saturated:.0f} % of the samples the two best classes are equal."
            yield Advice("warning", what, last)
    if ranges is not None and manifest.thresholds == "minmax":
        wide = [name for name, s in computed(ranges, manifest).items() if stretch(s) >= STRETCHED]
        if wide:
            more = f" and {len(wide) - 2} more" if len(wide) > 2 else ""
            what = f"A few samples set the range of {', '.join(wide[:2])}{more}."
            yield Advice("warning", what, "Try --thresholds mse or percentile, which cut what is rare.")


def _times(manifest: Manifest) -> Iterator[Advice]:
    untimed: dict[str, list[str]] = {}
    elsewhere: dict[str, list[str]] = {}
    for row in rows(manifest):
        if row.measurement is not None and row.measurement.p50_ms is None:
            untimed.setdefault(row.measurement.where, []).append(row.precision)
        elif row.measurement is not None and NOT_THE_DEVICE in row.measurement.where:
            place = row.measurement.where.partition(":")[0]
            elsewhere.setdefault(place, []).append(row.precision)
    there = THERE if _has_linux(manifest.target) else OUT_OF_REACH
    for where, names in untimed.items():
        yield Advice("warning", f"{_listed(names)} not timed: {reason(where)}.", there)
    for place, names in elsewhere.items():
        what = f"{_listed(names)} timed on {place.removesuffix(NOT_THE_DEVICE)}, not on {manifest.target}."
        yield Advice("warning", what, there)


def _has_linux(target: str) -> bool:
    """Whether deploykit may reach the device; a target that does not say, or is not known here, may have it."""
    fact = targets.load(target).facts.get("linux") if target in targets.names() else None
    return fact is None or bool(fact.value)


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'was' if len(names) == 1 else 'were'}"


def _notes(manifest: Manifest) -> Iterator[Advice]:
    for note in [*manifest.advice, *manifest.notes, *(note for file in manifest.files for note in file.notes)]:
        mend = next((m for part, m in NOTES.items() if part in note), None)
        if mend is None:
            yield Advice("note", _sentence(note), "")
        elif mend:
            yield Advice("warning", _sentence(note), mend)
        else:
            what, _, rest = note.partition(": ")
            yield Advice("warning", _sentence(what), _sentence(rest))


def _sentence(note: str) -> str:
    """With a capital, unless it begins with a name, and with a full stop."""
    first = note.partition(" ")[0]
    start = note[:1].upper() if first.isalpha() else note[:1]
    return f"{start}{note[1:]}{'' if note.endswith(('.', '?')) else '.'}"
