"""Writes ``docs/results.md`` from ``results/*.json``: nothing in it is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS

DOCS = RESULTS.parent.parent / "docs" / "results.md"
TITLES = {
    "road": "The whole road",
    "quantize": "Quantization",
    "prune": "Pruning",
    "low_rank": "Low rank",
    "deep_compression": "Deep Compression",
    "distill": "Distillation",
}


def number(value: float | None) -> str:
    """Four significant digits; a dash for what was not measured."""
    return "not measured" if value is None else f"{value:.4g}"


def met(row: dict[str, Any]) -> bool:
    if row["value"] is None:
        return False
    return bool(row["value"] >= row["bar"] if row["better"] == "higher" else row["value"] <= row["bar"])


def section(path: Path) -> str:
    rows = json.loads(path.read_text())["rows"]
    lines = [f"## {TITLES.get(path.stem, path.stem)}", ""]
    lines += ["| claim | measured | bar | | neighbours | data |", "|---|---|---|---|---|---|"]
    for row in rows:
        sign = "≥" if row["better"] == "higher" else "≤"
        detail = "; ".join(f"{k} {number(v)}" for k, v in row["values"].items())
        value = f"**{number(row['value'])}**" + (f" ({detail})" if detail else "")
        note = f" {row['note']}" if row["note"] else ""
        lines.append(
            f"| {row['claim']} | {value} | {sign} {number(row['bar'])} | {'met' if met(row) else '**not met**'} "
            f"| {row['neighbour']} | {row['data']}{note} |"
        )
    lines += ["", "Measured by:", ""]
    for command in dict.fromkeys(r["command"] for r in rows):
        made = [r for r in rows if r["command"] == command]
        where = ", ".join(sorted({f"{r['machine']}, commit {r['commit']}, {r['date']}" for r in made}))
        lines.append(f"- `{command}` ({where})")
    return "\n".join(lines)


def main() -> None:
    found = sorted(RESULTS.glob("*.json"), key=lambda p: [*TITLES, p.stem].index(p.stem))
    text = (
        "# Results\n\nEvery line is an acceptance line of the project, measured by a script in `benchmarks/` and "
        "written here by `make docs`. A figure that is worse than its bar says so.\n\n"
    )
    DOCS.write_text(text + "\n\n".join(section(p) for p in found) + "\n", encoding="utf-8")
    print(DOCS)


if __name__ == "__main__":
    main()
