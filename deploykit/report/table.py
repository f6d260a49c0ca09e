"""Results in the terminal, and the same for programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from deploykit.core.figures import file_size, milliseconds, number, quotient
from deploykit.core.manifest import Manifest
from deploykit.report.rows import Row, place, rows

if TYPE_CHECKING:
    from rich.table import Table


def result_table(finished: Sequence[tuple[Path, Manifest]]) -> Table:
    """Target × precision: size, accuracy, agreement with the original, latency; under it where that was measured."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, caption_justify="left", caption_style="")
    for heading in ("target", "precision"):  # on a narrow terminal only headings of figures break
        table.add_column(heading, no_wrap=True)
    for heading in ("size", "", "accuracy %", "agreement %", "p50 ms", "p90 ms"):
        table.add_column(heading, justify="right", no_wrap="%" not in heading)
    table.add_column("where", no_wrap=True)
    places: dict[str, int] = {}
    for _, manifest in finished:
        found = rows(manifest)
        for row in found:
            table.add_row(*_cells(row, places), end_section=row is found[-1])
    table.caption = Text("\n".join(f"[{n}] {place}" for place, n in places.items()))
    return table


def _cells(row: Row, places: dict[str, int]) -> tuple[str, ...]:
    score, measured = row.score, row.measurement
    told = "not measured" if measured is None else place(measured.where)
    where = "" if row.file is None else f"[{places.setdefault(told, len(places) + 1)}]"
    return (
        row.target,
        row.precision,
        "" if row.file is None else file_size(row.bytes),
        "" if row.file is None else quotient(row.size),
        number(score.metric if score else None),
        "" if row.file is None else number(score.agreement if score else None),
        "" if row.file is None else milliseconds(measured.p50_ms if measured else None),
        "" if row.file is None else milliseconds(measured.p90_ms if measured else None),
        where,
    )


def summary_json(finished: Sequence[tuple[Path, Manifest]]) -> list[dict[str, Any]]:
    """The result table and the checks as plain values, one table per artifact; None where nothing was measured."""
    return [_summary(folder, manifest) for folder, manifest in finished]


def _summary(folder: Path, manifest: Manifest) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "target": manifest.target,
        "model": manifest.model,
        "passed": manifest.passed,
        "results": [
            {
                "precision": row.precision,
                "path": row.file.path if row.file else None,
                "bytes": row.bytes,
                "size_ratio": row.size,
                "accuracy": row.score.metric if row.score else None,
                "agreement": row.score.agreement if row.score else None,
                "measurement": msgspec.to_builtins(row.measurement),
            }
            for row in rows(manifest)
        ],
        "checks": msgspec.to_builtins(manifest.checks),
        "notes": list(manifest.notes),
        "advice": list(manifest.advice),
        "findings": msgspec.to_builtins(manifest.findings),
    }
