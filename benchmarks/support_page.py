"""``docs/support.md`` from the cells that `benchmarks.support` measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from benchmarks.rows import RESULTS

Cell = Mapping[str, Any]


def load() -> Mapping[str, Any]:
    """``results/support.json``."""
    found: Mapping[str, Any] = json.loads((RESULTS / "support.json").read_text(encoding="utf-8"))
    return found


def page(found: Mapping[str, Any]) -> str:
    """The whole page."""
    cells = {(c["family"], c["exporter"]): c for c in found["cells"]}
    names = list(found["targets"])
    families = [f for f in found["titles"] if any((f, name) in cells for name in names)]
    lines = [
        HEAD,
        "",
        f"| family | {' | '.join(f'[{n}](exporters/{n}.md)' for n in names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for family in families:
        row = " | ".join(short(cells.get((family, name))) for name in names)
        lines.append(f"| [{family}](#{family}): {found['titles'][family]} | {row} |")
    count = [sum(cells.get((f, n), {}).get("state") == "ok" for f in families) for n in names]
    lines.append(f"| **of {len(families)}** | {' | '.join(f'**{n}**' for n in count)} |")
    lines += ["", *made(found), "", READ]
    for family in families:
        lines += ["", f"## {family}", "", f"{found['titles'][family][0].upper()}{found['titles'][family][1:]}.", ""]
        lines += [line(name, cells[family, name]) for name in names if (family, name) in cells]
    return "\n".join(lines) + "\n"


HEAD = """# What is supported

<!-- Written by `make docs` from benchmarks/results/support.json; nothing here is typed by hand. -->

One small network of each family with random weights (`tests/families.py`) goes through every exporter as a user would
send it: lowered, calibrated on 96 random samples, written, run in the runtime of the file and checked: every integer
operator with forced inputs, the file against the hub, the hub against the original. A cell is *n int8* where all checks
held: so many operators of the int8 file compute in integers, the others in float, each with its reason below. *Refused*
means that no file is written, and why. There is no third kind: a file that runs and disagrees is a bug, and a test
fails on it."""

READ = """Below, *int8* lists what the int8 file computes from integers to integers, *float* what it does not, and *dB*
is the signal to noise of the worst int8 output against the original. In TensorRT's bundles the products are listed, the
rest is TensorRT's choice. ONNX Runtime goes through float and back to the same integers where it has no integer kernel
(transposed convolution, PReLU, ELU and hard-swish among them). Weights are random here: this says what is computed in
which numbers, not how well your network will do."""


def made(found: Mapping[str, Any]) -> list[str]:
    """How the cells came about."""
    runtimes = "; ".join(f"{n} on `{found['targets'][n]}` in {r}" for n, r in found["runtimes"].items())
    versions = ", ".join(f"{n} {v}" for n, v in found["versions"].items() if n in ("torch", "onnx", "python"))
    return [f"Measured by `python -m benchmarks.support`: {runtimes}; {versions}."]


def short(cell: Cell | None) -> str:
    """A cell of the table."""
    if cell is None:
        return "not run"
    if cell["state"] != "ok":
        return str(cell["state"])
    floats = sum(n for island in cell["islands"] for n in island["operators"].values())
    return f"{sum(cell['integer'].values())} int8" + (f", {floats} float" if floats else "")


def line(name: str, cell: Cell) -> str:
    """All that is known about a cell."""
    if cell["state"] != "ok":
        return f"- **{name}**: {cell['state']}. {'; '.join(cell['reasons'])}."
    parts = [f"int8: {counted(cell['integer'])}"]
    parts += [f"float: {counted(island['operators'])}: {island['why']}" for island in cell["islands"]]
    parts.append(f"{cell['sqnr_db']} dB")
    if cell["oracle"]:
        parts.append(cell["oracle"])
    return f"- **{name}**: {'; '.join(parts)}."


def counted(operators: Mapping[str, int]) -> str:
    """``Conv 6, Gemm 1``."""
    return ", ".join(f"{n} {c}" for n, c in operators.items())
