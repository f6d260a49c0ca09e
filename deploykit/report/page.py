"""`report.html`: one self-contained page that a colleague understands without the person who made the artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from deploykit.core.artifact import Island, Measurement
from deploykit.core.errors import MissingExtra
from deploykit.core.figures import MISSING, file_size, milliseconds, number, quotient
from deploykit.core.files import write_in_place
from deploykit.core.manifest import Manifest, Score, load_intact
from deploykit.report.charts import charts
from deploykit.report.rows import ORIGINAL, Row, rows
from deploykit.report.usage import usage
from deploykit.report.words import preprocessing, shape, title

NAME = "report.html"
LAYERS = 8
"""Layers named per reason."""


def write_report(folder: Path) -> Path:
    """Writes ``report.html`` into an artifact's folder and returns its path. Equal manifests give equal bytes.

    Raises:
        DeploykitError: not an artifact, or one whose files were truncated or altered.
        MissingExtra: jinja2 is not installed.
    """
    manifest = load_intact(folder)
    path = folder / NAME
    write_in_place(path, render(manifest))
    return path


def render(manifest: Manifest) -> str:
    """The page."""
    try:
        import jinja2
    except ImportError:
        raise MissingExtra("writing report.html", "report") from None

    source = (resources.files("deploykit.report") / "templates" / "report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.globals |= {
        "number": number,
        "ms": milliseconds,
        "size": file_size,
        "quotient": quotient,
        "shape": shape,
        "missing": MISSING,
        "title": title,
    }
    found = rows(manifest)
    return environment.from_string(source).render(
        m=manifest,
        rows=found,
        verdict=verdict(manifest),
        summary=summary(found),
        charts=charts(found),
        notes=tuple(dict.fromkeys([*manifest.notes, *(note for f in manifest.files for note in f.notes)])),
        usage=usage(manifest),
        preprocessing=preprocessing(manifest.preprocess) if manifest.preprocess else (),
        islands={f.path: grouped(f.islands) for f in manifest.files if f.islands},
        places=places(manifest.measurements),
    )


@dataclass(frozen=True)
class Verdict:
    """The checks in a few words: ``passed``, ``failed`` or ``open``."""

    state: str
    text: str


def verdict(manifest: Manifest) -> Verdict:
    """What all checks together say. Checks that could not run are never counted as passed."""
    failed = sum(c.passed is False for c in manifest.checks)
    passed = sum(c.passed is True for c in manifest.checks)
    missing = len(manifest.checks) - failed - passed
    rest = f", {missing} could not run here" if missing else ""
    if failed:
        return Verdict("failed", f"{failed} of {len(manifest.checks)} checks failed{rest}")
    if passed:
        return Verdict("passed", f"{passed} check{'s' if passed > 1 else ''} passed{rest}")
    return Verdict("open", "nothing was checked")


def summary(found: Sequence[Row]) -> tuple[str, ...]:
    """What the most compressed file is, beside the baseline, in sentences. Only what was measured is said."""
    files = [r for r in found if r.file is not None]
    if not files:
        return ()
    base, last = files[0], files[-1]
    sentences = []
    if last is not base and last.size is not None:
        sentences.append(
            f"The {last.precision} file has {file_size(last.bytes)}, {quotient(last.size)} the {base.precision} file."
        )
    a, b = last.measurement, base.measurement
    if a is not None and a.p50_ms is not None:
        beside = ""
        if b is not None and b.p50_ms and last is not base:
            beside = f" instead of {milliseconds(b.p50_ms)} ms ({quotient(a.p50_ms / b.p50_ms)})"
        machine = a.where.partition(":")[0]
        sentences.append(f"One call takes {milliseconds(a.p50_ms)} ms{beside} on {machine}.")
    elif a is not None:
        sentences.append(f"Its speed was {a.where}.")
    sentences += _accuracy(found[0].score if found[0].precision == ORIGINAL else None, last.score)
    return tuple(sentences)


def _accuracy(original: Score | None, score: Score | None) -> list[str]:
    if score is None:
        return ["Its accuracy was not measured."]
    where = f"on {score.samples:,} samples ({score.data})"
    said = []
    if score.metric is not None:
        beside = f", the original model {number(original.metric)} %" if original and original.metric is not None else ""
        said.append(f"It scores {number(score.metric)} %{beside}, {where}.")
    if score.agreement is not None:
        of = "them" if said else f"{score.samples:,} samples ({score.data})"
        said.append(f"It gives the original model's answer for {number(score.agreement)} % of {of}.")
    if not said and score.sqnr_db:
        name, worst = min(score.sqnr_db.items(), key=lambda item: item[1])
        said.append(f"Its outputs stand at least {number(worst, 1)} dB above the error ({name}), {where}.")
    return said


def how(m: Measurement) -> str:
    """Where and how a time was taken."""
    return f"{m.where}, batch {m.batch}, {m.threads} thread{'s' if m.threads != 1 else ''}, {m.runs} runs"


def places(measurements: Sequence[Measurement]) -> tuple[str, ...]:
    """Every distinct place and way of measuring."""
    return tuple(dict.fromkeys(how(m) if m.runs else m.where for m in measurements))


@dataclass(frozen=True)
class Group:
    """Float operators with one reason."""

    operator: str
    why: str
    count: int
    layers: str


def grouped(islands: Sequence[Island]) -> tuple[Group, ...]:
    """Float operators by kind and reason, the most frequent first."""
    layers: dict[tuple[str, str], list[str]] = {}
    for island in islands:
        layers.setdefault((island.operator, island.why), []).append(island.layer)
    found = []
    for (operator, why), names in sorted(layers.items(), key=lambda item: -len(item[1])):
        more = f" and {len(names) - LAYERS} more" if len(names) > LAYERS else ""
        found.append(Group(operator, why, len(names), ", ".join(names[:LAYERS]) + more))
    return tuple(found)
