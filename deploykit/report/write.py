"""`report.html` and the same as plain values: of one artifact, or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from deploykit.core.errors import DeploykitError
from deploykit.core.files import write_in_place
from deploykit.core.manifest import Finding
from deploykit.report import comparison, findings, page, scatter, spans
from deploykit.report.advice import advice
from deploykit.report.html import GENERATOR, fill
from deploykit.report.layers import maps
from deploykit.report.made import Made, find
from deploykit.report.table import summary_json

NAME = "report.html"
MARK = f'<meta name="generator" content="{GENERATOR}">'.encode()
"""What a page of ours has in its head."""
HEAD = 1000
"""Bytes in which it stands."""


def write_report(*folders: Path, out: Path | None = None) -> Path:
    """Writes one page and returns its path: of the one artifact, or of several beside each other.

    Args:
        folders: artifacts, or folders with artifacts right below them.
        out: the file to write, or a folder for ``report.html``. Without it the page lies in the folder that was given,
            or, of several, in the working directory.

    Raises:
        DeploykitError: not artifacts, or some whose files were truncated or altered (nothing is written); the file
            exists and is no report; it cannot be written.
        MissingExtra: jinja2 is not installed.
    """
    found = find(folders)
    path = _place(folders, found, out)
    its_own = out is None and len(folders) == 1
    if not its_own and path.exists() and not is_report(path):
        raise DeploykitError(f"{path} exists and is not a report that deploykit wrote; give another -o")
    write_in_place(path, page.render(found[0]) if len(found) == 1 else comparison.render(found))
    return path


def write_findings(path: Path, model: str, steps: Sequence[str], found: Sequence[Finding]) -> None:
    """Writes a page of what model-stage steps found out, for a model that was compressed and not exported.

    Raises:
        MissingExtra: jinja2 is not installed.
    """
    write_in_place(path, fill("findings.html.j2", model=model, steps=steps, findings=findings.shown(found)))


def report_json(*folders: Path) -> dict[str, Any]:
    """All that the page shows, as plain values; None where nothing was measured.

    Raises:
        DeploykitError: as `write_report`.
    """
    found = find(folders)
    return {"artifacts": [_artifact(made) for made in found], "comparison": _comparison(found)}


def _place(folders: Sequence[Path], found: Sequence[Made], out: Path | None) -> Path:
    if out is not None:
        return out / NAME if out.is_dir() else out
    if len(found) == 1:
        return found[0].folder / NAME
    return folders[0] / NAME if len(folders) == 1 else Path(NAME)


def is_report(path: Path) -> bool:
    """Whether a file is a page that deploykit wrote."""
    try:
        with path.open("rb") as file:
            return MARK in file.read(HEAD)
    except OSError:  # a folder, or not readable
        return False


def _artifact(made: Made) -> dict[str, Any]:
    m = made.manifest
    (summary,) = summary_json([(made.folder, m)])
    return summary | {
        "label": made.label,
        "exporter": m.exporter,
        "steps": list(m.steps),
        "thresholds": m.thresholds,
        "seed": m.seed,
        "data": msgspec.to_builtins(m.data),
        "versions": dict(m.versions),
        "warnings": msgspec.to_builtins(advice(m, made.ranges)),
        "findings": msgspec.to_builtins(m.findings),
        "operators": msgspec.to_builtins(m.operators),
        "layers": [
            {"path": found.path, "layers": [_without(msgspec.to_builtins(c), "rank") for c in found.cells]}
            for found in maps(m)
        ],
        "islands": {f.path: msgspec.to_builtins(f.islands) for f in m.files if f.islands},
        "ranges": [] if made.ranges is None else _ranges(made),
    }


def _ranges(made: Made) -> list[dict[str, Any]]:
    assert made.ranges is not None
    return [
        {"name": s.name, "low": s.low, "high": s.high, "stretch": s.stretch}
        for s in spans.spans(made.ranges, made.manifest)
    ]


def _comparison(found: Sequence[Made]) -> dict[str, Any] | None:
    if len(found) == 1:
        return None
    entries = scatter.entries(found)
    return {
        "accuracy_over_bytes": [_plot(p) for p in scatter.over_bytes(entries)],
        "accuracy_over_time": [_plot(p) for p in scatter.over_time(entries)],
        "strangers": comparison.strangers(found),
        "left_out": msgspec.to_builtins(scatter.left_out(entries)),
    }


def _plot(plot: scatter.Plot) -> dict[str, Any]:
    points = [
        {
            "artifact": p.entry.made.label, "precision": p.entry.row.precision, "x": p.x, "y": p.y,
            "best": p.best, "on_the_device": not p.entry.elsewhere,
        }
        for p in plot.points
    ]  # fmt: skip
    return {"measured": plot.caption, "x": plot.x_name, "y": plot.y_name, "points": points, "best": list(plot.best)}


def _without(entry: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if k != key}
