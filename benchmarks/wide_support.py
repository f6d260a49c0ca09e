"""The acceptance lines about families of networks, read from the cells that `benchmarks.support` measured."""

from __future__ import annotations

from collections import Counter

from benchmarks.rows import Row, record
from benchmarks.support import TARGETS, saved

COMMAND = "python -m benchmarks.support && python -m benchmarks.wide_support"
DATA = "small networks with random weights, 96 random samples calibrate, 32 evaluate"


def main() -> None:
    """Writes the rows."""
    cells = saved()
    families = {c.family for c in cells}
    complete = len(cells) == len(families) * len(TARGETS)
    ok = Counter(c.exporter for c in cells if c.state == "ok")
    share = {name: float(ok[name]) for name in TARGETS}
    unexplained = [f"{c.family}/{c.exporter}" for c in cells if not c.explained]
    wrong = [f"{c.family}/{c.exporter}" for c in cells if c.state == "disagrees"]
    rows = [
        Row("Families: networks of the support table, each through five exporters",
            float(len(families)) if complete else None, 15, "higher", DATA, COMMAND),
        Row("Families: ok with the exporter that has fewest", min(share.values()), 8, "higher", DATA, COMMAND,
            values=share),
        Row("Families: cells without a reason", float(len(unexplained)), 0, "lower", DATA, COMMAND,
            note=", ".join(unexplained)),
        Row("Families: cells whose file runs and disagrees with the hub or the original", float(len(wrong)), 0, "lower",
            DATA, COMMAND, note=", ".join(wrong)),
    ]  # fmt: skip
    record("wide", rows)


if __name__ == "__main__":
    main()
