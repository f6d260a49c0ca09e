"""Several exports on one page: accuracy over bytes and over time, one table, what differs between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deploykit.core.figures import file_size, milliseconds, number
from deploykit.core.manifest import Manifest
from deploykit.core.precision import PRECISIONS
from deploykit.report import scatter
from deploykit.report.advice import Advice, advice
from deploykit.report.cards import Card
from deploykit.report.html import fill
from deploykit.report.made import Made
from deploykit.report.page import Verdict, how, places, verdict
from deploykit.report.rows import rows
from deploykit.report.words import title

FACTS: dict[str, Callable[[Manifest], str]] = {
    "model": lambda m: m.model,
    "float graph": lambda m: m.graph,
    "target": lambda m: m.target,
    "exporter": lambda m: m.exporter,
    "steps": lambda m: ", ".join(m.steps) or "none",
    "thresholds": lambda m: m.thresholds,
    "calibration": lambda m: _source(m, "calibration"),
    "evaluation": lambda m: _source(m, "eval") if "eval" in m.data else _source(m, "holdout"),
    "seed": lambda m: str(m.seed),
    "versions": lambda m: ", ".join(f"{name} {v}" for name, v in m.versions.items()),
}
"""What an export was made from, for what differs."""


def render(found: Sequence[Made]) -> str:
    """The page. Equal artifacts give equal bytes."""
    entries = scatter.entries(found)
    plots = (*scatter.over_bytes(entries), *scatter.over_time(entries))
    facts = {name: [fact(made.manifest) for made in found] for name, fact in FACTS.items()}
    models = list(dict.fromkeys(title(made.manifest.model) for made in found))
    places_found = places([m for made in found for m in made.manifest.measurements])
    return fill(
        "comparison.html.j2",
        found=found,
        heading=", ".join(models),
        subject=f"on {', '.join(dict.fromkeys(made.manifest.target for made in found))}",
        verdicts=verdicts(found),
        cards=cards(entries),
        plots=plots,
        split=split(entries),
        strangers=strangers(found),
        left_out=scatter.left_out(entries),
        labels=[made.label for made in found],
        precisions=[p for p in PRECISIONS if p in {e.row.precision for e in entries}],
        width=scatter.WIDTH,
        height=scatter.HEIGHT,
        left=scatter.LEFT,
        right=scatter.WIDTH - scatter.RIGHT,
        top_edge=scatter.TOP,
        floor=scatter.HEIGHT - scatter.BOTTOM,
        results=[(made, rows(made.manifest)) for made in found],
        places=places_found,
        how=how,
        advice=shared_advice(found),
        same=[(name, values[0]) for name, values in facts.items() if len(set(values)) == 1],
        differing=[(name, values) for name, values in facts.items() if len(set(values)) > 1],
        checks=[(made.label, c) for made in found for c in made.manifest.checks],
    )


def verdicts(found: Sequence[Made]) -> list[tuple[Verdict, list[str]]]:
    """What the checks say, exports with the same verdict together, what failed first."""
    said: dict[Verdict, list[str]] = {}
    for made in found:
        said.setdefault(verdict(made.manifest), []).append(made.label)
    return sorted(said.items(), key=lambda item: ("failed", "open", "passed").index(item[0].state))


def split(entries: Sequence[scatter.Entry]) -> str:
    """What the reader of the plots must not compare; empty where all of it may be."""
    machines = len({e.machine for e in entries if e.machine})
    sets = len({e.data for e in entries if e.data})
    said = []
    if machines > 1:
        said.append(f"Times come from {machines} machines or ways of measuring: one plot each, not to be compared.")
    if sets > 1:
        said.append(f"Accuracies come from {sets} data sets: one plot each, not to be compared.")
    return " ".join(said)


def strangers(found: Sequence[Made]) -> str:
    """That these are no exports of one model, by its origin or by what it answers; empty where they may be."""
    models = len({(made.manifest.model, made.manifest.outputs) for made in found})
    return f"These exports come from {models} models, so they differ in more than the target." if models > 1 else ""


def shared_advice(found: Sequence[Made]) -> list[tuple[Advice, list[str]]]:
    """What to know about the exports, said once with the names of all it holds for; what failed first."""
    said: dict[Advice, list[str]] = {}
    for made in found:
        for a in advice(made.manifest, made.ranges):
            said.setdefault(a, []).append(made.label)
    order = ("failed", "warning", "note")
    return sorted(said.items(), key=lambda item: order.index(item[0].weight))


def cards(entries: Sequence[scatter.Entry]) -> tuple[Card, ...]:
    """The smallest file, the most accurate one (where all were scored on the same samples), the fastest per machine."""
    made = []
    sized = [e for e in entries if e.row.bytes]
    if sized:
        least = min(sized, key=lambda e: e.row.bytes or 0)
        figure, _, unit = file_size(least.row.bytes).partition(" ")
        made.append(Card("Smallest", figure, unit, least.name, "", ()))
    scored = [e for e in entries if e.row.score is not None and e.row.score.metric is not None]
    if len({e.data for e in scored}) == 1:
        best = max(scored, key=lambda e: (_metric(e), -(e.row.bytes or 0)))
        made.append(Card("Most accurate", number(_metric(best)), "%", f"{best.name}, {best.data}", "", ()))
    machines = dict.fromkeys(e.machine for e in entries if e.machine)
    for machine in machines:
        first = min((e for e in entries if e.machine == machine), key=_time)
        star = ", which is not its device" if first.elsewhere else ""
        made.append(Card("Fastest", milliseconds(_time(first)), "ms", f"{first.name} on {machine}{star}", "", ()))
    if not machines:
        made.append(Card("Fastest", "", "", "no file was timed", "", ()))
    return tuple(made)


def _metric(entry: scatter.Entry) -> float:
    assert entry.row.score is not None and entry.row.score.metric is not None
    return entry.row.score.metric


def _time(entry: scatter.Entry) -> float:
    assert entry.row.measurement is not None and entry.row.measurement.p50_ms is not None
    return entry.row.measurement.p50_ms


def _source(manifest: Manifest, role: str) -> str:
    source = manifest.data.get(role)
    return "none" if source is None else f"{source.samples:,} samples of {source.origin} ({source.hash})"
