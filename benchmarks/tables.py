"""Writes what the documentation shows of ``results/*.json``: nothing of it is typed by hand.

* ``docs/results.md``: every row;
* ``docs/support.md``: every cell of ``results/support.json``;
* ``<!-- results -->`` … ``<!-- /results -->`` in the README: the rows about two trained networks;
* ``<!-- steps -->`` … ``<!-- /steps -->`` there: a row for each kind of step that compresses;
* ``<!-- row: NAME/CLAIM -->`` … ``<!-- /row -->`` on any page: the values of one row, the claim cut short at will;
* ``docs/images/``: int8 beside fp32, accuracy over the budget of pruning, codebooks beside linear weights, accuracy
  over the bytes of files, over time with early exits.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import charts, support_page
from benchmarks.rows import RESULTS

ROOT = RESULTS.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TITLES = {
    "road": "The whole road",
    "wide": "The road made wide",
    "quantize": "Quantization",
    "mixed": "Mixed precision",
    "qat": "Quantization-aware training",
    "data_free": "Without data",
    "choices": "Default choices and passes",
    "prune": "Pruning",
    "low_rank": "Low rank",
    "deep_compression": "Deep Compression",
    "distill": "Distillation",
}
STEPS = {
    "[prune](docs/passes/prune.md)": ("prune", "ResNet-20, 50% of the MACs removed, no training, refitted"),
    "[sparsify](docs/passes/sparsify.md), [refit](docs/passes/refit.md)": (
        "prune", "ResNet-20, 80% of the weights zero"
    ),
    "[low_rank](docs/passes/low_rank.md)": (
        "low_rank", "ResNet-20, 50% of the parameters removed on data, no training: top-1"
    ),
    "[share](docs/passes/share.md), [pack](docs/formats/dkz.md)": (
        "deep_compression", "LeNet-5, pruned, shared and coded: times smaller"
    ),
    "the same, [without training](docs/passes/share.md#near-the-outputs)": (
        "deep_compression", "MobileNetV1 0.75: pruned, shared and coded, at most 1 point lost"
    ),
    "[distill](docs/passes/distill.md)": ("distill", "MNIST, student of 2 x 800 units: errors"),
}  # fmt: skip
"""By the steps, the row that shows what they are worth."""
OVER = "ResNet-20, accuracy over the MACs removed"
OVER_TIME = "early exits in ONNX Runtime, accuracy over time", "early exits in LiteRT, accuracy over time"
USEFUL = 50.0
"""Percent: files that answer worse would only flatten the curves of the others."""
Rows = Sequence[Mapping[str, Any]]


def number(value: float | None) -> str:
    """Four significant digits, whole numbers in full; a dash for what was not measured."""
    if value is None:
        return "not measured"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def met(row: Mapping[str, Any]) -> bool:
    """Whether the bar is met; without one nothing can be missed."""
    if row["value"] is None:
        return False
    if row["bar"] is None:
        return True
    return bool(row["value"] >= row["bar"] if row["better"] == "higher" else row["value"] <= row["bar"])


def results() -> dict[str, Rows]:
    """The rows of every file, by its name, in the order of `TITLES`."""
    found = sorted(RESULTS.glob("*.json"), key=lambda p: [*TITLES, p.stem].index(p.stem))
    return {path.stem: json.loads(path.read_text())["rows"] for path in found if path.stem != "support"}


def page(found: Mapping[str, Rows]) -> str:
    """``docs/results.md``."""
    head = (
        "# Results\n\nEvery line is a claim of the project with its bar, measured by a script in `benchmarks/` and "
        "written here by `make docs`. A figure that is worse than its bar says so.\n\n"
    )
    return head + "\n\n".join(section(name, rows) for name, rows in found.items()) + "\n"


def section(name: str, rows: Rows) -> str:
    """One file's rows and where they were measured."""
    lines = [f"## {TITLES.get(name, name)}", ""]
    lines += ["| claim | measured | bar | | neighbours | data |", "|---|---|---|---|---|---|"]
    for row in rows:
        bar, state = "none", "as measured"
        if row["bar"] is not None:
            bar = f"{'≥' if row['better'] == 'higher' else '≤'} {number(row['bar'])}"
            state = "met" if met(row) else "**not met**"
        value = f"**{number(row['value'])}**" + (f" ({details(row)})" if row["values"] else "")
        note = f"; {row['note']}" if row["note"] else ""
        lines.append(f"| {row['claim']} | {value} | {bar} | {state} | {row['neighbour']} | {row['data']}{note} |")
    return "\n".join([*lines, "", "Measured by:", "", *(f"- {line}" for line in origins(rows))])


def details(row: Mapping[str, Any]) -> str:
    """What the figure is the worst of."""
    return "; ".join(f"{k} {number(v)}" for k, v in row["values"].items())


def origins(rows: Rows) -> list[str]:
    """The commands that measured the rows, with machine, commit and date."""
    found = []
    for command in dict.fromkeys(row["command"] for row in rows):
        made = [row for row in rows if row["command"] == command]
        where = ", ".join(sorted({f"{r['machine']}, commit {r['commit']}, {r['date']}" for r in made}))
        found.append(f"`{command}` ({where})")
    return found


def refreshed(text: str, found: Mapping[str, Rows]) -> str:
    """A page with its blocks written again."""
    text = re.sub(
        r"(<!-- results -->\n).*?(<!-- /results -->)",
        lambda m: f"{m[1]}{headline(found['road'])}{m[2]}",
        text,
        flags=re.DOTALL,
    )
    text = re.sub(
        r"(<!-- steps -->\n).*?(<!-- /steps -->)", lambda m: f"{m[1]}{steps(found)}{m[2]}", text, flags=re.DOTALL
    )
    return re.sub(
        r"(<!-- row: (\w+)/([^>]*?) -->\n).*?(<!-- /row -->)",
        lambda m: f"{m[1]}{values(find(found[m[2]], m[3]))}{m[4]}",
        text,
        flags=re.DOTALL,
    )


def headline(rows: Rows) -> str:
    """The two trained networks file by file, for the README."""
    accuracy, agreement = find(rows, "ResNet-20: points lost")["values"], find(rows, "MobileNetV1: int8 agreement")
    top1 = find(rows, "MobileNetV1: int8 top-1")
    size, time = (find(rows, f"MobileNetV1: int8 {what}")["values"] for what in ("bytes", "time"))
    (fp32,) = re.findall(r"fp32 ([\d.]+)", top1["claim"])
    lines = [
        "| network | file | top-1 % | agrees with fp32 % | size / fp32 | time / fp32 |",
        "|---|---|---|---|---|---|",
        f"| MobileNetV1 0.75-224 | fp32 | {fp32} | | 1 | 1 |",
    ]
    for runtime, share in agreement["values"].items():
        cells = (top1["values"][runtime], share, size[runtime], time[runtime])
        lines.append(f"| | int8, {runtime} | {' | '.join(f'{c:.2f}' for c in cells)} |")
    for name, share, points in re.findall(r"(\w[^;:]*?) ([\d.]+) / ([\d.]+)", agreement["neighbour"]):
        lines.append(f"| | *int8 by {name}* | *{points}* | *{share}* | | |")
    lines.append(f"| ResNet-20, CIFAR-10 | fp32 | {accuracy['fp32 accuracy']:.2f} | | | |")
    for what, lost in accuracy.items():
        if what != "fp32 accuracy":
            file = re.sub(r"(.*?) (int8\S*)(.*)", r"\2, \1\3", what)
            lines.append(f"| | {file} | {accuracy['fp32 accuracy'] - lost:.2f} | | | |")
    chosen = [row for row in rows if row["claim"].startswith(("MobileNetV1:", "ResNet-20:"))]
    data = ". ".join(dict.fromkeys(row["data"] for row in chosen))
    notes = [
        f"{data}. This MobileNetV1 is published with 68.4 on ImageNet's validation images: read the differences.",
        "Time: one image, one thread, int8 and fp32 in the same run. In italics: neighbours' defaults on the same",
        f"images, run once. Measured by {'; '.join(origins(chosen))}.",
    ]
    return "\n".join([*lines, "", *notes, ""])


def steps(found: Mapping[str, Rows]) -> str:
    """What steps that compress are worth, for the README."""
    lines = ["| step | | measured | others |", "|---|---|---|---|"]
    for what, (name, claim) in STEPS.items():
        row = find(found[name], claim)
        lines.append(f"| {what} | {row['claim']} | {number(row['value'])} | {row['neighbour']} |")
    return "\n".join([*lines, ""])


def values(row: Mapping[str, Any]) -> str:
    """One row's values as a table of their own. Keys are ``LINE: COLUMN``; others have no place in it."""
    cells = {tuple(key.split(": ")): number(value) for key, value in row["values"].items() if ": " in key}
    columns = list(dict.fromkeys(column for _, column in cells))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for line in dict.fromkeys(line for line, _ in cells):
        lines.append(f"| {line} | {' | '.join(cells.get((line, column), '') for column in columns)} |")
    return "\n".join([*lines, "", f"{row['data']}. Measured by {origins([row])[0]}.", ""])


def smaller_and_faster(found: Mapping[str, Rows]) -> charts.Bars:
    """Bytes and time of MobileNetV1's int8 files, their own fp32 files being 1."""
    kinds = {"size": "MobileNetV1: int8 bytes", "time per image": "MobileNetV1: int8 time"}
    shares = {
        f"{runtime}, {what}": value
        for what, claim in kinds.items()
        for runtime, value in find(found["road"], claim)["values"].items()
    }
    return charts.Bars("MobileNetV1 0.75 at 224: int8 beside its own fp32 file", shares, "fp32 = 1")


def by_line(row: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """A row's values as points, line by line. Keys are ``LINE: PERCENT``."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for key, value in row["values"].items():
        name, at = key.split(": ")
        lines.setdefault(name, []).append((float(at.rstrip("%")), value))
    return lines


def sharing(rows: Rows) -> dict[str, str]:
    """What `benchmarks.sharing` measured, net by net."""
    made = {}
    for net in ("LeNet-5", "ResNet-20", "MobileNetV1 0.75"):
        slug = net.split()[0].lower()
        for row in rows:
            if row["claim"].startswith(f"{net}: codebooks"):
                made[f"codebooks-{slug}.svg"] = charts.lines(f"{net}: top-1 % over bits", by_line(row), "bits")
            if row["claim"].startswith(f"{net}: pruned, shared and coded"):
                useful = {name: [(x, y) for x, y in points if y >= USEFUL] for name, points in by_line(row).items()}
                curves = {name: points for name, points in useful.items() if points}
                most = max(x for points in curves.values() for x, _ in points)
                step = next(s for s in (50, 100, 250, 500, 1000) if most / s <= 8)
                ticks = [step * i for i in range(int(most // step) + 2)]
                made[f"bytes-{slug}.svg"] = charts.lines(f"{net}: top-1 % over kilobytes", curves, "kB", ticks)
    return made


def find(rows: Rows, claim: str) -> Mapping[str, Any]:
    """The only row whose claim begins like that."""
    (row,) = [row for row in rows if row["claim"].startswith(claim)]
    return row


def written(found: Mapping[str, Rows]) -> dict[Path, str]:
    """Every page and picture, as it should read."""
    images = ROOT / "docs" / "images"
    made = {ROOT / "docs" / "results.md": page(found), images / "int8.svg": charts.bars(smaller_and_faster(found))}
    if over := [row for row in found["prune"] if row["claim"].startswith(OVER)]:
        made[images / "prune.svg"] = charts.lines(
            "ResNet-20: top-1 % over the share of the multiply-accumulates removed", by_line(over[0])
        )
    made |= {images / name: text for name, text in sharing(found["deep_compression"]).items()}
    if early := [row for row in found["distill"] if row["claim"].startswith(OVER_TIME)]:
        curves = {name: points for row in early for name, points in by_line(row).items()}
        most = max(x for points in curves.values() for x, _ in points)
        made[images / "exits.svg"] = charts.lines(
            "ResNet-8 with exits: top-1 % over time, of the network without", curves, "%",
            range(0, 50 * math.ceil(most / 50) + 1, 50),
        )  # fmt: skip
    made[ROOT / "docs" / "support.md"] = support_page.page(support_page.load())
    return made | {path: refreshed(path.read_text(encoding="utf-8"), found) for path in PAGES if path not in made}


def main() -> None:
    """Writes all of it."""
    for path, text in written(results()).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(path)


if __name__ == "__main__":
    main()
