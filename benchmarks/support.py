"""Which families of networks each exporter can write: the cells of ``docs/support.md``, measured one by one.

A cell exports a small network with random weights (`tests.families`) as a user would, runs the files in their runtime,
and reads what the manifest says: which operators are integer, which stayed in float and why, whether every check held:
each operator with forced inputs, the file against the hub, the hub against the original.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from benchmarks.rows import RESULTS
from benchmarks.tensorrt_oracle import Unavailable, judge
from deploykit import exporters, pipeline, targets
from deploykit.check import Gate, check_lowering
from deploykit.core.artifact import Island
from deploykit.core.errors import DeploykitError, GateFailed
from deploykit.core.manifest import Manifest, load_manifest, versions
from deploykit.hub.lower import lower
from deploykit.models import Model
from tests.families import FAMILIES, Example, example

PATH = RESULTS / "support.json"
TARGETS = {
    "onnx": "x86",
    "openvino": "x86-openvino",
    "tflite": "mobile-arm",
    "tensorrt": "jetson",
    "c99": "cortex-m7",
}
"""Exporter -> the target that stands for it."""
CALIBRATION = slice(0, 96)
WORST_SQNR = 10.0
"""dB. Below it an int8 output is more noise than a network of random weights explains."""


@dataclass(frozen=True)
class Float:
    """Operators of a file that stayed in float, and why."""

    operators: dict[str, int]
    why: str


@dataclass(frozen=True)
class Cell:
    """One family through one exporter."""

    family: str
    exporter: str
    state: Literal["ok", "refused", "disagrees"]
    integer: dict[str, int] = field(default_factory=dict)
    """How many operators of each kind the int8 file computes in integers."""
    islands: list[Float] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    """Why it was refused, or what disagreed."""
    sqnr_db: float | None = None
    """Of the int8 file's worst output, against the original."""
    largest_lsb: float | None = None
    """Worst operator with forced inputs; None where no operator writes integers."""
    oracle: str = ""
    """What NVIDIA's own parser and builder said, where they could be asked."""

    @property
    def explained(self) -> bool:
        """Whether nothing is without a reason: a refusal, or what stayed in float."""
        if self.state == "refused":
            return bool(self.reasons) and all(self.reasons)
        return all(island.why for island in self.islands)

    def facts(self) -> dict[str, object]:
        """What must come out again on any machine: not the decibels."""
        made = asdict(self)
        for name in ("sqnr_db", "largest_lsb", "oracle"):
            del made[name]
        return made


def lowered(made: Example, folder: Path) -> Model:
    """The network as ONNX, lowered once for all exporters and compared with PyTorch."""
    batch = next(made.data.batches(2)).inputs
    graph = lower(made.module, batch)
    check = check_lowering(graph, made.module, batch)
    if not check.passed:
        raise AssertionError(f"{made.name}: the lowered graph is not the module: {check.value}")
    path = folder / f"{made.name}.onnx"
    path.write_bytes(graph.bytes)
    return Model(origin=made.name, onnx=path)


def cell(model: Model, made: Example, exporter: str, oracle: str = "") -> Cell:
    """Exports and judges.

    Args:
        model: the lowered network.
        made: its data.
        exporter: a key of `TARGETS`.
        oracle: the Python interpreter beside which NVIDIA's libraries lie; empty: they are not asked.
    """
    target = targets.load(TARGETS[exporter])
    data = {"calibration": made.data.take(CALIBRATION), "eval": made.data.take(slice(CALIBRATION.stop, None))}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "out"
        failed: list[str] = []
        try:
            prepared = pipeline.prepare(model, data, None)  # type: ignore[arg-type]
            pipeline.export(prepared, [target], [folder], pipeline.Settings(benchmark=False), Gate())
        except GateFailed:
            pass  # the manifest says which
        except DeploykitError as error:
            return Cell(made.name, exporter, "refused", reasons=refusals(str(error)))
        except Exception as error:  # a bug: it must show in the table, not end it
            where = traceback.extract_tb(error.__traceback__)[-1]
            failed = [f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"]
            return Cell(made.name, exporter, "disagrees", reasons=failed)
        manifest = load_manifest(folder)
        verdict = asked(folder, manifest, oracle) if exporter == "tensorrt" and oracle else ""
    return judged(made.name, exporter, manifest, verdict)


def judged(family: str, exporter: str, manifest: Manifest, oracle: str = "") -> Cell:
    """The cell that a manifest amounts to."""
    (file,) = [f for f in manifest.files if f.precision == "int8"]
    (score,) = [s for s in manifest.scores if s.precision == "int8"]
    worst = min(score.sqnr_db.values())
    wrong = [f"{c.name}: {c.value:.4g}, bound {c.bound:.4g} ({c.precision})" for c in manifest.checks
             if c.passed is False and c.value is not None and c.bound is not None]  # fmt: skip
    if worst < WORST_SQNR:
        wrong.append(f"an int8 output has {worst:.1f} dB against the original")
    if "rejected" in oracle:
        wrong.append(oracle)
    largest = max((o.lsb for o in manifest.operators), default=None)
    return Cell(
        family,
        exporter,
        "disagrees" if wrong else "ok",
        dict(file.quantized),
        grouped(file.islands),
        wrong,
        round(worst, 1),
        None if largest is None else round(largest, 2),
        oracle,
    )


def asked(folder: Path, manifest: Manifest, python: str) -> str:
    """What NVIDIA's parser and builder make of the bundle's files."""
    try:
        verdicts = judge([folder / f.path for f in manifest.files], python)
    except Unavailable:
        return ""
    rejected = [f"{Path(v['file']).name} rejected: {v['error']}" for v in verdicts if not v["accepted"]]
    if rejected:
        return "; ".join(rejected)
    (int8,) = [v for v in verdicts if v["file"].endswith("model.int8.onnx")]
    kernels = int8["int8_convolution_kernels"] + int8["int8_gemm_kernels"]
    return f"{int8['oracle']} builds every file; {kernels} int8 kernels"


def grouped(islands: Iterable[Island]) -> list[Float]:
    """Islands with the same reason together."""
    by_reason: dict[str, Counter[str]] = {}
    for island in islands:
        by_reason.setdefault(island.why, Counter())[island.operator] += 1
    return [Float(dict(sorted(found.items())), why) for why, found in sorted(by_reason.items())]


def refusals(message: str) -> list[str]:
    """The reasons in an exporter's message, those of many layers in one line: ``Gelu (2): there is no rule for it``."""
    lines = [line.strip() for line in message.splitlines() if line.startswith(" ")]
    if not lines:
        return [message.split(". ")[0].rstrip(".")]
    found: Counter[tuple[str, str]] = Counter()
    for line in lines:
        layer = re.fullmatch(r"\S+ \((\w+)\): (.*)", line)
        found[(layer[1], layer[2]) if layer else ("", line)] += 1
    return [f"{op} ({n}): {why}" if op and n > 1 else f"{op}: {why}" if op else why for (op, why), n in found.items()]


def cells(families: Sequence[str], names: Sequence[str], oracle: str = "") -> list[Cell]:
    """All of them, printed as they come."""
    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for family in families:
            made = example(family)
            model = lowered(made, Path(folder))
            for name in names:
                found.append(cell(model, made, name, oracle))
                one = found[-1]
                what = "; ".join(one.reasons) or f"{sum(one.integer.values())} int8, worst output {one.sqnr_db} dB"
                print(f"{one.state:10}{family:18}{name:10}{what}", flush=True)
    return found


def saved() -> list[Cell]:
    """The cells of the last full run."""
    rows = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
    return [Cell(**{**row, "islands": [Float(**island) for island in row["islands"]]}) for row in rows]


def save(found: Sequence[Cell]) -> None:
    """Replaces what was saved of the same cells."""
    known = {(c.family, c.exporter): c for c in (saved() if PATH.is_file() else [])}
    known |= {(c.family, c.exporter): c for c in found}
    order = [known[key] for family in FAMILIES for name in TARGETS if (key := (family, name)) in known]
    runtimes = {name: exporters.load(name).runtime().name for name in TARGETS}
    about = {"titles": {name: f.title for name, f in FAMILIES.items()}, "targets": TARGETS, "runtimes": runtimes}
    text = json.dumps({**about, "versions": versions(), "cells": [asdict(c) for c in order]}, indent=1)
    PATH.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Measures all cells, or those of the families and exporters named, and saves them."""
    parser = argparse.ArgumentParser(description="The cells of docs/support.md.")
    parser.add_argument("families", nargs="*", help=", ".join(FAMILIES))
    parser.add_argument("--exporter", action="append", choices=list(TARGETS))
    args = parser.parse_args()
    oracle = os.environ.get("DEPLOYKIT_ORACLE_PYTHON", "")
    save(cells(args.families or list(FAMILIES), args.exporter or list(TARGETS), oracle))


if __name__ == "__main__":
    main()
