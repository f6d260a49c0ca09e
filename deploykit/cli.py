"""The command line. Imports neither torch nor onnx until a command needs them, so that ``--help`` answers at once.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 2 bad request or input, 3 a check failed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from deploykit.core.errors import DeploykitError, unknown
from deploykit.core.target import PRECISIONS

if TYPE_CHECKING:
    from deploykit.core.context import Role
    from deploykit.core.recipe import Recipe
    from deploykit.pipeline import Prepared

app = typer.Typer(
    name="deploykit",
    help="Turns a PyTorch model and sample data into checked, timed files for the device you name.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[
    str,
    typer.Argument(help="pkg.module:factory, file.py:factory, a .pt2, an .onnx, or a folder that `compress` wrote"),
]
Calib = Annotated[
    str | None,
    typer.Option("--calib", help="Sample data: a folder of images, .npy, .npz, or file.py:loader", metavar="DATA"),
]
Train = Annotated[str | None, typer.Option("--train", help="Training data, for steps that train", metavar="DATA")]
Eval = Annotated[str | None, typer.Option("--eval", help="Data (with labels) to score the files on", metavar="DATA")]
Weights = Annotated[Path | None, typer.Option(help="Weights for a factory: .safetensors, or .pt read weights-only")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="Steps and training settings, TOML")]
PreprocessFile = Annotated[
    Path | None, typer.Option("--preprocess", help="TOML with resize, crop, scale, mean, std, layout, channels")
]
Resize = Annotated[int | None, typer.Option(help="Shorter side of images after resizing, pixels")]
Crop = Annotated[int | None, typer.Option(help="Side of the centre crop, pixels")]
Mean = Annotated[str | None, typer.Option(help="Per channel, after scaling to 0..1: 0.485,0.456,0.406")]
Std = Annotated[str | None, typer.Option(help="Per channel, after scaling to 0..1: 0.229,0.224,0.225")]
Scale = Annotated[float | None, typer.Option(help="Factor on 0..255 pixel values, default 1/255")]
InputShape = Annotated[
    list[str] | None, typer.Option("--input", help="Input without sample data: x=1x3x224x224 or x=1x128:int64")
]
Thresholds = Annotated[
    str, typer.Option(help="How ranges are chosen: minmax, moving_average, percentile, mse, entropy")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Output folder")]


@app.command()
def export(
    model: Model,
    target: Annotated[list[str], typer.Option("--target", help="Device name, or a .toml of your own; may be repeated")],
    calib: Calib = None,
    train: Train = None,
    evaluation: Eval = None,
    weights: Weights = None,
    recipe: RecipeFile = None,
    preprocess: PreprocessFile = None,
    resize: Resize = None,
    crop: Crop = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = None,
    input_shape: InputShape = None,
    metric: Annotated[str | None, typer.Option(help="file.py:fn(outputs, labels) -> percent, higher is better")] = None,
    ranges: Annotated[Path | None, typer.Option(help="Ranges that `calibrate` wrote")] = None,
    thresholds: Thresholds = "minmax",
    precision: Annotated[
        list[str] | None, typer.Option("--precision", help="Write only fp32, fp16, int8 or int8-fp16; may be repeated")
    ] = None,
    bias_correction: Annotated[bool, typer.Option(help="Correct biases after quantizing")] = True,
    keep_float: Annotated[list[str] | None, typer.Option(help="Layer that stays in float, by name")] = None,
    max_drop: Annotated[float, typer.Option(help="Gate: largest loss of accuracy, in points")] = 2.0,
    benchmark: Annotated[bool, typer.Option(help="Time the files on this machine")] = True,
    threads: Annotated[int, typer.Option(min=1, help="Threads for evaluation and timing")] = 1,
    out: Out = Path("out"),
    seed: Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="Run steps the target cannot profit from")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write checked files for one or more targets (several: one subfolder each)."""
    from deploykit import pipeline, targets
    from deploykit.check import Gate
    from deploykit.core.errors import GateFailed
    from deploykit.core.files import refuse_existing
    from deploykit.core.manifest import load_manifest
    from deploykit.core.ranges import load_ranges
    from deploykit.core.user_code import load_function

    chosen = [targets.load(name) for name in target]
    twice = next((t.name for i, t in enumerate(chosen) if t.name in {u.name for u in chosen[:i]}), None)
    if twice is not None:
        raise DeploykitError(f"--target {twice} is given twice; every target gets one folder, named after it")
    settings = pipeline.Settings(
        recipe=_recipe(recipe),
        thresholds=_known("threshold method", thresholds, _methods()),
        precisions=tuple(_known("precision", p, PRECISIONS) for p in precision or ()),  # type: ignore[misc]
        bias_correction=bias_correction,
        keep_float=tuple(keep_float or ()),
        seed=seed,
        force=force,
        overwrite=overwrite,
        benchmark=benchmark,
        threads=threads,
    )
    folders = [out] if len(chosen) == 1 else [out / t.name for t in chosen]
    for folder in folders:
        refuse_existing(folder, overwrite)
    look = _preprocess(preprocess, resize, crop, mean, std, scale)
    prepared = _prepare(
        model, weights, {"calibration": calib, "train": train, "eval": evaluation}, look, input_shape, seed
    )
    given = load_ranges(ranges) if ranges is not None else None
    measured = load_function(metric, "metric") if metric is not None else None
    try:
        pipeline.export(prepared, chosen, folders, settings, Gate(max_drop=max_drop), measured, given)
    except GateFailed:  # the files are there all the same
        _show([(f, load_manifest(f)) for f in folders], as_json)
        raise
    _show([(f, load_manifest(f)) for f in folders], as_json)


@app.command()
def calibrate(
    model: Model,
    calib: Annotated[str, typer.Option("--calib", help="Sample data", metavar="DATA")],
    weights: Weights = None,
    preprocess: PreprocessFile = None,
    resize: Resize = None,
    crop: Crop = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = None,
    thresholds: Thresholds = "minmax",
    out: Annotated[Path, typer.Option("-o", "--out", help="The JSON file to write")] = Path("ranges.json"),
    overwrite: Overwrite = False,
) -> None:
    """Measure the ranges of a model's tensors on sample data, once for all targets."""
    from deploykit import pipeline

    if out.exists() and not overwrite:
        raise DeploykitError(f"{out} already exists. Give another -o, or --overwrite to replace it.")
    look = _preprocess(preprocess, resize, crop, mean, std, scale)
    prepared = _prepare(model, weights, {"calibration": calib}, look, None, 0)
    graph = pipeline.float_graph(prepared.model, prepared.example)
    found = pipeline.calibrate(graph, prepared.data["calibration"], thresholds)
    found.save(out)
    print(f"{out}: {len(found.tensors)} tensors on {found.samples} samples")


@app.command()
def compress(
    model: Model,
    recipe: Annotated[Path, typer.Option("--recipe", help="Model-stage steps, TOML")],
    target: Annotated[str, typer.Option("--target", help="The device that the steps shall pay on")] = "x86",
    calib: Calib = None,
    train: Train = None,
    weights: Weights = None,
    preprocess: PreprocessFile = None,
    input_shape: InputShape = None,
    out: Out = Path("small"),
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Run the model-stage steps of a recipe; the folder it writes is a MODEL for the other commands."""
    from deploykit import pipeline, targets

    device = targets.load(target)
    look = _preprocess(preprocess, None, None, None, None, None)
    prepared = _prepare(model, weights, {"calibration": calib, "train": train}, look, input_shape, seed)
    settings = pipeline.Settings(recipe=_recipe(recipe), seed=seed, overwrite=overwrite)
    steps = pipeline.compress(prepared, settings, device, out)
    print(f"{out}: {', '.join(steps)}")


@app.command()
def benchmark(
    artifact: Annotated[Path, typer.Argument(help="A folder that `export` wrote")],
    against: Annotated[list[Path] | None, typer.Option(help="Another artifact, timed in the same run")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of every file, after warm-up")] = 100,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    as_json: Json = False,
) -> None:
    """Time the files of an artifact on this machine, all files interleaved in one run."""
    from deploykit import bench

    result = bench.measure([artifact, *(against or [])], runs=runs, batch=batch, threads=threads)
    print(json.dumps(result.to_dict(), indent=1) if as_json else "", end="\n" if as_json else "")
    if not as_json:
        _print_table(result.table())
        for line in result.advice:
            print(line)


@app.command()
def plan(
    model: Annotated[str | None, typer.Argument(help="MODEL; may be left out")] = None,
    target: Annotated[str, typer.Option("--target")] = "x86",
    recipe: RecipeFile = None,
    calib: Calib = None,
    train: Train = None,
    evaluation: Eval = None,
    as_json: Json = False,
) -> None:
    """Show which steps apply on a target, in which order, and why the others do not."""
    from deploykit import passes, planning, targets
    from deploykit.models import load_model

    chosen = targets.load(target)
    enters = "model" if model is None else load_model(model).enters
    have = [name for name, given in (("data", calib), ("train", train), ("labels", evaluation)) if given]
    if model is None and not have:
        have = ["data", "train", "labels"]
    if recipe is None:
        rows = [
            (_pass_line(name), planning.refusal(passes.load(name), chosen, have, enters)) for name in passes.names()
        ]
    else:
        rows = [(repr(p.step), p.refusal) for p in planning.plan(_recipe(recipe), chosen, have, enters=enters)]
    if as_json:
        print(json.dumps([{"step": s, "applies": not why, "why_not": why} for s, why in rows], indent=1))
        return
    print(f"{chosen.name}: {chosen.title}\nprofits from {', '.join(chosen.profits)}")
    for step, why in rows:
        print(f"  {'-' if why else '+'} {step}" + (f"  ({why})" if why else ""))


@app.command("targets")
def show_targets(
    name: Annotated[str | None, typer.Argument(help="One target, in full")] = None, as_json: Json = False
) -> None:
    """List the targets, or show one as a card."""
    import msgspec

    from deploykit import targets

    if as_json:
        found = [targets.load(n) for n in ([name] if name else targets.names())]
        print(json.dumps(msgspec.to_builtins(found), indent=1))
    elif name is None:
        width = max(len(n) for n in targets.names())
        for n in targets.names():
            target = targets.load(n)
            print(f"{n:{width}}  {target.title} [{target.exporter}: {', '.join(target.precisions)}]")
    else:
        print(_card(targets.load(name)))


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="A folder that `export` wrote")], as_json: Json = False
) -> None:
    """Check that an artifact's files are whole, open in their runtimes, and say what their checks said."""
    from deploykit.core.errors import GateFailed
    from deploykit.report import verify_artifact

    manifest, problems = verify_artifact(artifact)
    if as_json:
        import msgspec

        print(json.dumps({"problems": problems, "checks": msgspec.to_builtins(manifest.checks)}, indent=1))
    elif not problems:
        for check in manifest.checks:
            state = {True: "ok", False: "FAILED", None: "not run here"}[check.passed]
            print(f"{state:12}  {check.precision:9}  {check.name}: {check.value if check.value is not None else '-'}")
    if problems:
        raise DeploykitError(
            f"{artifact} is not as it was written:\n  " + "\n  ".join(problems) + "\nExport it again, or copy it whole."
        )
    if not manifest.passed:
        raise GateFailed(f"{artifact}: a check failed when it was exported")


@app.command()
def report(artifact: Annotated[Path, typer.Argument(help="A folder that `export` wrote")]) -> None:
    """Write report.html beside the files of an artifact."""
    from deploykit.report import write_report

    print(write_report(artifact))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what is installed, and what the missing extras would add."""
    from deploykit.doctor import findings

    found = findings()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for name, state in found.items():
        print(f"{name:18} {state}")


@app.command()
def demo(out: Out = Path("demo"), overwrite: Overwrite = False, as_json: Json = False) -> None:
    """Train a small network on scikit-learn's digits and export it for x86, mobile-arm and jetson."""
    from deploykit.demo import run

    _show(run(out, overwrite), as_json)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point: turns errors into a message and an exit code."""
    try:
        app(args=arguments, standalone_mode=True)
    except DeploykitError as error:
        print(f"deploykit: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(0)


def _recipe(path: Path | None) -> Recipe:
    from deploykit.core.recipe import Recipe, load_recipe

    return Recipe() if path is None else load_recipe(path)


def _prepare(
    model: str,
    weights: Path | None,
    sources: dict[Role, str | None],
    look: Any,
    input_shape: list[str] | None,
    seed: int,
) -> Prepared:
    from deploykit import pipeline
    from deploykit.models import input_specs, load_model
    from deploykit.sources import load_data

    loaded = load_model(model, weights)
    inputs = input_specs(loaded)
    data = {role: load_data(spec, inputs, look, role, seed) for role, spec in sources.items() if spec is not None}
    example = None if not input_shape else dict(_input(text) for text in input_shape)
    return pipeline.prepare(loaded, data, example)


def _preprocess(
    path: Path | None, resize: int | None, crop: int | None, mean: str | None, std: str | None, scale: float | None
) -> Any:
    """The declared preprocessing: a TOML file, flags over it, or nothing."""
    from deploykit.sources import load_preprocess

    flags: dict[str, Any] = {"resize": resize, "crop": crop, "scale": scale}
    flags |= {name: None if text is None else _numbers(name, text) for name, text in (("mean", mean), ("std", std))}
    flags = {k: v for k, v in flags.items() if v is not None}
    if path is None and not flags:
        return None
    return load_preprocess(path if path is not None else {}, flags)


def _input(text: str) -> tuple[str, Any]:
    """``x=1x3x224x224`` or ``ids=1x128:int64`` as a name and an example array."""
    import re

    import numpy as np

    found = re.fullmatch(r"(\w+)=([1-9]\d*(?:x[1-9]\d*)*)(?::(\w+))?", text)
    if found is None:
        raise DeploykitError(f"--input takes NAME=1x3x224x224 or NAME=1x128:int64, given '{text}'")
    name, shape, dtype = found[1], [int(d) for d in found[2].split("x")], found[3] or "float32"
    try:
        kind = np.dtype(dtype)
    except TypeError:
        raise unknown("dtype", dtype, ("float32", "int64", "int32", "bool")) from None
    random = np.random.default_rng(0)
    return name, (random.standard_normal(shape) if kind.kind == "f" else random.integers(0, 2, shape)).astype(kind)


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise DeploykitError(f"--{name} takes numbers separated by commas, given '{text}'") from None


def _known(kind: str, name: str, known: Any) -> str:
    if name not in known:
        raise unknown(kind, name, known)
    return name


def _methods() -> list[str]:
    from deploykit.calibration.thresholds import METHODS

    return list(METHODS)


def _pass_line(name: str) -> str:
    from deploykit import passes

    options = ", ".join(f"{k}={v}" if v is not None else k for k, v in passes.options(name).items())
    return f"{name}({options})  [{passes.load(name).stage}]"


def _card(target: Any) -> str:
    quant = target.quant
    sign = "s" if quant.activation_signed else "u"
    kind = "symmetric" if quant.activation_symmetric else "asymmetric"
    scales = quant.scale.replace("_", " ")
    lines = [
        f"{target.name}: {target.title}",
        f"  files        {', '.join(target.precisions)} (exporter {target.exporter}, ONNX opset up to {target.opset})",
        f"  profits      {', '.join(target.profits)}",
        f"  channels     best in multiples of {target.channel_multiple}",
        f"  activations  {sign}{quant.activation_bits} {kind}, {scales} scales, {quant.placement}",
        f"  weights      s{quant.weight_bits} per {quant.weight_granularity}, bias {quant.bias}",
        f"  timed here   {target.measured_here or 'no: only on the device'}",
    ]
    for name, fact in target.facts.items():
        mark = "" if fact.verified else ", not verified"
        lines.append(f"  {name:12} {fact.value} {fact.unit}".rstrip() + f"  ({fact.source}{mark})")
    return "\n".join(lines)


def _show(finished: list[tuple[Path, Any]], as_json: bool) -> None:
    from deploykit.report import result_table, summary_json

    if as_json:
        print(json.dumps(summary_json(finished), indent=1))
        return
    _print_table(result_table(finished))
    for folder, manifest in finished:
        for note in manifest.notes:
            print(f"{folder.name}: {note}")
        for island in [i for f in manifest.files for i in f.islands][:5]:
            print(f"{folder.name}: {island.operator} {island.layer} stays in float: {island.why}")


def _print_table(table: Any) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 140).print(table)
