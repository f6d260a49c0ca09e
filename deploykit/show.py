"""What the commands print: tables and notes of an export, a target as a card, a pass on one line."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from deploykit.core.precision import is_integer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.table import Table

    from deploykit.calibration.growth import Convergence
    from deploykit.core.artifact import File, Island
    from deploykit.core.ranges import Ranges
    from deploykit.core.target import Target
    from deploykit.explain.explanation import Explanation
    from deploykit.pipeline.steps import Compressed
    from deploykit.report.findings import Shown

ROWS = 12
"""Of a long table."""
ISLANDS = 5
"""Layers in float that are named; the report has all."""


def pass_line(name: str) -> str:
    """A pass with its options and their defaults, and its stage."""
    from deploykit import passes

    options = ", ".join(f"{k}={v}" if v is not None else k for k, v in passes.options(name).items())
    return f"{name}({options})  [{passes.load(name).stage}]"


def card(target: Target, base: Target | None) -> str:
    """A target in full; facts that it has from its base say so."""
    quant = target.quant
    sign = "signed" if quant.activation_signed else "unsigned"
    kind = "symmetric" if quant.activation_symmetric else "asymmetric"
    scales = quant.scale.replace("_", " ")
    where = {"everywhere": "everywhere", "linear_inputs": "at the inputs of products and the skip branch of adds"}
    integers = {
        "activations": f"{quant.activation_bits} bit {sign} {kind}, {scales} scales, {where[quant.placement]}",
        "weights": f"{quant.weight_bits} bit signed symmetric per {quant.weight_granularity}, bias {quant.bias}",
    }
    rows = {
        "files": f"{', '.join(target.precisions)} (exporter {target.exporter}, ONNX opset up to {target.opset})",
        **({"on request": ", ".join(target.on_request)} if target.on_request else {}),
        "profits": ", ".join(target.profits),
        "recipe": f"{target.recipe or 'none'} by default",
        "channels": f"best in multiples of {target.channel_multiple}",
        **(integers if any(map(is_integer, target.precisions)) else {}),
        "timed here": target.measured_here or "no: only on the device",
    }
    for name, fact in target.facts.items():
        value = {True: "yes", False: "no"}[fact.value] if isinstance(fact.value, bool) else fact.value
        marks = [fact.source] if fact.verified else [fact.source, "not verified"]
        if base is not None and base.facts.get(name) == fact:
            marks.append(f"as {base.name}")
        rows[name] = f"{value} {fact.unit}".rstrip() + f"  ({', '.join(marks)})"
    width = max(map(len, rows))
    return "\n".join([f"{target.name}: {target.title}", *(f"  {name:{width}}  {row}" for name, row in rows.items())])


def show_exported(finished: list[tuple[Path, Any]], as_json: bool) -> None:
    """Print what exports gave: the table, the notes, and the layers that stay in float."""
    from deploykit.check import narrow
    from deploykit.report import result_table, summary_json

    if as_json:
        print(json.dumps(summary_json(finished), indent=1))
        return
    print_table(result_table(finished))
    lines: dict[str, list[str]] = {}  # what several folders have to say is said once
    for folder, manifest in finished:
        said = [found.summary for found in manifest.findings if found.summary]
        notes = *said, *manifest.notes, *manifest.advice, *narrow(manifest.checks, manifest.request.gate)
        for line in dict.fromkeys((*notes, *_islands(manifest.files))):
            lines.setdefault(line, []).append(folder.name)
    for line, names in lines.items():
        print(f"{', '.join(names)}: {line}")


def _islands(files: Sequence[File]) -> list[str]:
    """The first layers that stay in float, each with the precisions of the files in which it does."""
    found: dict[Island, list[str]] = {}
    for file in files:
        for island in file.islands:
            found.setdefault(island, []).append(file.precision)
    return [f"{i.operator} {i.layer} stays in float in {', '.join(p)}: {i.why}" for i, p in found.items()][:ISLANDS]


def show_compressed(out: Path, done: Compressed, as_json: bool) -> None:
    """Print which steps a compression went through, what they made smaller, and what matters at once of their
    findings."""
    if as_json:
        import msgspec

        print(json.dumps({"out": str(out), **msgspec.to_builtins(done)}, indent=1))
        return
    print(f"{out}: {', '.join(done.steps)}")
    was, now = done.before, done.after
    print(f"{out}: {was.params:,} -> {now.params:,} parameters, {was.macs:,} -> {now.macs:,} multiply-accumulates")
    for found in done.findings:
        if found.summary:
            print(f"{out}: {found.summary}")


def print_ranges(out: Path, found: Ranges, settled: Convergence | None, as_json: bool) -> None:
    """Print what a calibration found: how much, whether it was enough, and what is to be said about the samples."""
    enough = "" if settled is None else settled.sentence()
    if as_json:
        values = {"out": str(out), "tensors": len(found.tensors), "samples": found.samples, "notes": list(found.notes)}
        if settled is not None:
            values["convergence"] = {"said": enough, "enough": settled.enough, "parts": list(settled.parts),
                                     "largest": list(settled.largest), "median": list(settled.median)}  # fmt: skip
        print(json.dumps(values, indent=1))
        return
    print(f"{out}: {len(found.tensors)} tensors on {found.samples} samples")
    for line in [*([enough] if enough else []), *found.notes]:
        print(line)


def print_benchmark(result: Any, values: dict[str, Any], as_json: bool) -> None:
    """Print a benchmark as its table and advice, or its values as JSON."""
    if as_json:
        print(json.dumps(values, indent=1))
        return
    print_table(result.table())
    for line in result.advice:
        print(line)


def print_explanation(found: Explanation, page: Path | None, as_json: bool) -> None:
    """Print an explanation: its tables, cut to `ROWS` rows, and what they do not say; where its page lies."""
    if as_json:
        print(json.dumps(found.to_dict() | ({} if page is None else {"page": str(page)}), indent=1))
        return
    from deploykit.explain import told
    from deploykit.report import findings

    print(f"{found.folder}: {told.summary(found)}")
    for shown in findings.shown((*told.findings(found, ROWS), *([told.ranges(found, ROWS)] if found.spans else []))):
        print(f"\n{shown.title}")
        print_table(_plain_table(shown))
    for line in told.lines(found):
        print(line)
    if page is not None:
        print(page)


def _plain_table(shown: Shown) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, number in zip(shown.columns, shown.numeric, strict=True):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in shown.rows:
        table.add_row(*map(Text, row))  # brackets are no markup
    return table


def print_table(table: Any) -> None:
    """Print a rich table on stdout, as wide as the terminal, 140 columns elsewhere."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(width=None if sys.stdout.isatty() else 140)
    if Measurement.get(console, console.options.update(max_width=1000), table).maximum > console.width:
        table.padding, table.show_edge = 0, False  # air goes before letters do
    console.print(table)
