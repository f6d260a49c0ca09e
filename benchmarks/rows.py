"""Rows of ``results/NAME.json``: one per acceptance line, written by the script that measured it."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One claim, its bar and what was measured."""

    claim: str
    value: float | None
    """The figure that is compared with the bar (worst of ``values`` where there are several)."""
    bar: float | None
    """None: reported as measured."""
    better: Literal["higher", "lower"]
    data: str
    command: str
    seeds: list[int] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    neighbour: str = ""
    """What others reach on the same line, measured in the same run where it says so."""
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether the bar is met; a row that was not measured is not met."""
        if self.value is None:
            return False
        if self.bar is None:
            return True
        return self.value >= self.bar if self.better == "higher" else self.value <= self.bar


def record(name: str, rows: Sequence[Row]) -> None:
    """Adds rows to ``results/NAME.json``, replacing those with the same claim, and prints them."""
    path = RESULTS / f"{name}.json"
    known = json.loads(path.read_text())["rows"] if path.is_file() else []
    fresh = {row.claim: asdict(row) | stamp() for row in rows}
    kept = [fresh.pop(old["claim"], old) for old in known]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"rows": [*kept, *fresh.values()]}, indent=1) + "\n")
    for row in rows:
        state = "NOT MET" if not row.met else "measured" if row.bar is None else "met"
        print(f"{state:8} {row.claim}: {row.value} (bar {row.bar}, {row.better} is better)", flush=True)


def main(about: str, name: str, parts: Sequence[Callable[[], Sequence[Row]]]) -> None:
    """The command line of a script: measures its parts, or those that are named, and records each in ``NAME.json``.

    Args:
        about: the script's docstring.
        name: of the file in ``results/``.
        parts: functions; their names are what is typed.
    """
    by_name = {part.__name__: part for part in parts}
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*by_name, []], help="default: all")
    for part in parser.parse_args().parts or by_name:
        record(name, by_name[part]())


def stamp() -> dict[str, str]:
    """When, where and on which commit."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return {"commit": git.stdout.strip(), "machine": machine(), "date": datetime.date.today().isoformat()}


def machine() -> str:
    """Processor and number of cores."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    import os

    return f"{cpu}, {os.cpu_count()} cores"
