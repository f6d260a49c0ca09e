"""The command line. Imports neither torch nor onnx until a command needs them, so that ``--help`` answers at once.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 2 bad request or input, 3 a check failed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from deploykit.chain.commands import exits
from deploykit.core.errors import DeploykitError
from deploykit.core.precision import PRECISIONS
from deploykit.dkz.commands import pack, unpack
from deploykit.options import (
    Calib,
    Crop,
    Device,
    Eval,
    InputShape,
    Json,
    Mean,
    Model,
    Out,
    Overwrite,
    PreprocessFile,
    RecipeName,
    Resize,
    Scale,
    Seed,
    Std,
    Thresholds,
    Train,
    Weights,
    declared_preprocess,
    given,
    known_name,
    read_recipe,
    threshold_methods,
    typed,
)
from deploykit.show import (
    card,
    pass_line,
    print_benchmark,
    print_explanation,
    print_ranges,
    print_table,
    show_compressed,
    show_exported,
)

app = typer.Typer(
    name="deploykit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

INTERRUPTED = 130
"""What typer ends with after Ctrl-C: 128 and the number of the signal."""


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"deploykit {version('deploykit')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and end")
    ] = False,
) -> None:
    """Turns a PyTorch model and sample data into checked, timed files for the device you name."""


@app.command()
def export(
    model: Model,
    target: Annotated[list[str], typer.Option("--target", help="Device name, or a .toml of your own; may be repeated")],
    calib: Calib = None,
    train: Train = None,
    evaluation: Eval = None,
    weights: Weights = None,
    recipe: RecipeName = None,
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
        list[str] | None,
        typer.Option(
            "--precision", help=f"Write only this (may be repeated): {', '.join(PRECISIONS)}. See docs/precisions.md"
        ),
    ] = None,
    correction: Annotated[
        bool, typer.Option(help="Make good what rounding costs (weight_correct or gptq; bias_correct in fp8)")
    ] = True,
    keep_float: Annotated[
        list[str] | None, typer.Option(help="Layers that stay in float: a name, or a pattern such as head.*")
    ] = None,
    uint8_input: Annotated[
        bool, typer.Option("--uint8-input", help="Files take raw uint8 images [n, h, w, c] and normalise themselves")
    ] = False,
    pack: Annotated[
        bool, typer.Option("--pack", help="Put a .dkz of it beside every file, smaller without loss")
    ] = False,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Gate: largest loss of accuracy, in points, plus one standard error of the samples"),
    ] = None,
    benchmark: Annotated[bool, typer.Option(help="Time the files on this machine")] = True,
    threads: Annotated[int, typer.Option(min=1, help="Threads for evaluation and timing")] = 1,
    device: Device = None,
    out: Out = Path("out"),
    seed: Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="Run steps the target cannot profit from")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write checked files for one or more targets (several: one subfolder each)."""
    from deploykit import asked, targets
    from deploykit.core.errors import GateFailed
    from deploykit.core.manifest import load_manifest
    from deploykit.core.request import Gate, Request, Settings

    chosen = [targets.load(name) for name in target]
    twice = next((t.name for i, t in enumerate(chosen) if t.name in {u.name for u in chosen[:i]}), None)
    if twice is not None:
        raise DeploykitError(f"--target {twice} is given twice; every target gets one folder, named after it")
    settings = Settings(
        recipe=read_recipe(recipe, chosen),
        thresholds=known_name("threshold method", thresholds, threshold_methods()),
        precisions=tuple(known_name("precision", p, PRECISIONS) for p in precision or ()),  # type: ignore[misc]
        correction=correction,
        keep_float=tuple(keep_float or ()),
        seed=seed,
        force=force,
        overwrite=overwrite,
        benchmark=benchmark,
        threads=threads,
        uint8_input=uint8_input,
        pack=pack,
    )
    folders = [out] if len(chosen) == 1 else [out / t.name for t in chosen]
    request = Request(
        model=model,
        target="",
        weights=typed(weights),
        data=given(calibration=calib, train=train, eval=evaluation),
        preprocess=declared_preprocess(preprocess, resize, crop, mean, std, scale),
        inputs=tuple(input_shape or ()),
        metric=metric,
        ranges=typed(ranges),
        settings=settings,
        gate=Gate(max_drop=max_drop),
    )
    try:
        asked.export([replace(request, target=name) for name in target], folders, device)
    except GateFailed:  # the files are there all the same
        show_exported([(f, load_manifest(f)) for f in folders], as_json)
        raise
    show_exported([(f, load_manifest(f)) for f in folders], as_json)


@app.command()
def calibrate(
    model: Model,
    calib: Annotated[
        str, typer.Option("--calib", help="Sample data; or 'synthetic' or 'random', made up here", metavar="DATA")
    ],
    weights: Weights = None,
    preprocess: PreprocessFile = None,
    resize: Resize = None,
    crop: Crop = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = None,
    input_shape: InputShape = None,
    thresholds: Thresholds = "minmax",
    out: Annotated[Path, typer.Option("-o", "--out", help="The JSON file to write")] = Path("ranges.json"),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Measure the ranges of a model's tensors on sample data, once for all targets."""
    from deploykit import asked, pipeline
    from deploykit.calibration.growth import convergence
    from deploykit.core.request import Request

    if out.exists() and not overwrite:
        raise DeploykitError(f"{out} already exists. Give another -o, or --overwrite to replace it.")
    look = declared_preprocess(preprocess, resize, crop, mean, std, scale)
    shapes = tuple(input_shape or ())
    request = Request(model, "", typed(weights), {"calibration": calib}, look, shapes)
    prepared = asked.prepare(request, hold_out=False)
    graph = pipeline.float_graph(prepared.model, prepared.example)
    data, net = prepared.data["calibration"], prepared.model
    found = pipeline.calibrate(graph, data, thresholds, net.module, as_lowered=not net.compressed)
    found.save(out)
    print_ranges(out, found, convergence(found), as_json)


@app.command()
def compress(
    model: Model,
    recipe: RecipeName = None,
    target: Annotated[
        str | None, typer.Option("--target", help="A device that the steps have to pay on; without --recipe, its own")
    ] = None,
    calib: Calib = None,
    train: Train = None,
    weights: Weights = None,
    preprocess: PreprocessFile = None,
    input_shape: InputShape = None,
    out: Out = Path("small"),
    seed: Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="Run steps the target cannot profit from")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Run the model-stage steps of a recipe; the folder it writes is a MODEL for the other commands."""
    from deploykit import asked, pipeline, recipes, targets
    from deploykit.core.request import Request, Settings

    device = None if target is None else targets.load(target)
    look = declared_preprocess(preprocess, None, None, None, None, None)
    steps = read_recipe(recipe or recipes.DEFAULT, [] if device is None else [device])
    settings = Settings(recipe=steps, seed=seed, force=force, overwrite=overwrite)
    data = given(calibration=calib, train=train)
    shapes = tuple(input_shape or ())
    prepared = asked.prepare(Request(model, target or "", typed(weights), data, look, shapes, settings=settings))
    done = pipeline.compress(prepared, settings, device, out)
    show_compressed(out, done, as_json)


@app.command()
def benchmark(
    artifact: Annotated[list[Path], typer.Argument(help="Folders that `export` wrote; several are timed in turns")],
    against: Annotated[list[Path] | None, typer.Option(help="Another artifact, timed in the same run")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs at least; fast files go on for 5 s, up to 1000")] = 100,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    device: Device = None,
    sustained: Annotated[
        float, typer.Option(min=0, help="Go on that long without a pause, and show the drift", metavar="MINUTES")
    ] = 0.0,
    evaluation: Annotated[
        str | None, typer.Option("--eval", help="Data (with labels) to answer on the device", metavar="DATA")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="file.py:fn(outputs, labels) -> percent, higher is better")] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Keep it all in the manifest; answers the export's --eval, too")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time the files of an artifact on this machine or a device, all files interleaved in one run."""
    folders = [*artifact, *(against or [])]
    if device is None and not (sustained or evaluation or record):
        from deploykit import bench

        result = bench.measure(folders, runs=runs, batch=batch, threads=threads)
        print_benchmark(result, result.to_dict(), as_json)
        return
    from deploykit import asked

    if batch != 1:
        raise DeploykitError("--batch is for this machine only: on a device, files are run with single samples")
    trial = asked.try_out(
        folders, device or "local", evaluation=evaluation, metric=metric, record=record, runs=runs, threads=threads,
        minutes=sustained,
    )  # fmt: skip
    print_benchmark(trial.benchmark, trial.to_dict(), as_json)
    if not as_json:
        for line in trial.lines(folders):
            print(line)
    trial.refuse_failed(folders)


@app.command()
def plan(
    model: Annotated[str | None, typer.Argument(help="MODEL; may be left out")] = None,
    target: Annotated[str, typer.Option("--target")] = "x86",
    recipe: RecipeName = None,
    calib: Calib = None,
    train: Train = None,
    evaluation: Eval = None,
    pack: Annotated[bool, typer.Option("--pack", help="Files will be packed")] = False,
    as_json: Json = False,
) -> None:
    """Show which steps apply on a target, in which order, and why the others do not."""
    from deploykit import passes, planning, targets
    from deploykit.models import load_model

    chosen = planning.profiting(targets.load(target), pack)
    loaded = None if model is None else load_model(model)
    enters = "model" if loaded is None else loaded.enters
    named = planning.named_data(calib, train, evaluation)
    teacher = ["teacher"] if loaded is None or loaded.onnx is None else []
    nothing = model is None and not named  # then the question is what could be done
    have = [*teacher, *(("data", "train", "labels") if nothing else named)]
    if recipe is None:
        kinds = [(name, passes.load(name)) for name in planning.in_order(passes.names())]
        rows = [(pass_line(name), kind.needs, planning.refusal(kind, chosen, have, enters)) for name, kind in kinds]
    else:
        planned = planning.plan(read_recipe(recipe, [chosen]), chosen, have, enters=enters)
        rows = [(repr(p.step), p.step.needs, p.refusal) for p in planned]
    if as_json:
        found = [{"step": s, "applies": not why, "needs": list(needs), "why_not": why} for s, needs, why in rows]
        print(json.dumps(found, indent=1))
        return
    print(f"{chosen.name}: {chosen.title}\nprofits from {', '.join(chosen.profits)}")
    print(f"default recipe: {chosen.recipe or 'none'}")
    for step, needs, why in rows:
        open_needs = [n for n in needs if n not in (*teacher, *named)]
        note = why or (f"needs {planning.named(open_needs)}" if open_needs else "")
        print(f"  {'-' if why else '+'} {step}" + (f"  ({note})" if note else ""))


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
        known = [targets.load(n) for n in targets.names()]
        width = max(len(target.name) for target in known)
        for exporter in sorted({target.exporter for target in known}):
            print(exporter)
            for target in (t for t in known if t.exporter == exporter):
                print(f"  {target.name:{width}}  {target.title} [{', '.join(target.precisions)}]")
    else:
        print(card(targets.load(name), targets.base(name)))


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="A folder that `export` wrote")],
    threads: Annotated[int, typer.Option(min=1)] = 1,
    as_json: Json = False,
) -> None:
    """Run an artifact's files again: are they whole, and do they answer here as they did?"""
    from deploykit.verify import verify as found_in

    found = found_in(artifact, threads)
    for line in [json.dumps(found.to_dict(), indent=1)] if as_json else found.lines():
        print(line)
    found.refuse_failed()


@app.command()
def diff(
    old: Annotated[Path, typer.Argument(help="A folder that `export` wrote, or its manifest.json")],
    new: Annotated[Path, typer.Argument(help="The one that shall replace it")],
    max_drop: Annotated[float, typer.Option(help="Allowed loss of accuracy, in points")] = 0.5,
    max_growth: Annotated[float, typer.Option(help="Allowed growth of a file, in percent")] = 1.0,
    max_slower: Annotated[float, typer.Option(help="Allowed growth of p50, in percent")] = 20.0,
    max_float: Annotated[int, typer.Option(help="Allowed number of operators that fall back to float")] = 0,
    as_json: Json = False,
) -> None:
    """Compare two artifacts of a model; exit code 3 where the new one is worse than allowed."""
    from deploykit.core.manifest import open_manifest
    from deploykit.diff import Limits, compare

    found = compare(open_manifest(old), open_manifest(new), Limits(max_drop, max_growth, max_slower, max_float))
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        print_table(found.table())
        print("\n".join(found.lines()))
    found.refuse_failed(old, new)


@app.command()
def reproduce(
    source: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="A folder that `export` wrote, or its manifest.json")
    ],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Keep the second artifact in this folder")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Export again what a manifest tells of, and compare every file's bytes."""
    from deploykit.reproduce import reproduce as made_again

    found = made_again(source, out, overwrite)
    print(json.dumps(found.to_dict(), indent=1) if as_json else "\n".join(found.lines()))
    found.refuse_failed(source)


@app.command()
def report(
    artifacts: Annotated[list[Path], typer.Argument(help="Folders that `export` wrote; several are compared")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The HTML file to write")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it all as JSON; write the page only with -o")] = False,
) -> None:
    """Write report.html: of one artifact, or of several exports of a model side by side."""
    from deploykit.report import report_json, write_report

    if as_json:
        found = report_json(*artifacts)
        if out is not None:
            write_report(*artifacts, out=out)
        print(json.dumps(found, indent=1))
    else:
        print(write_report(*artifacts, out=out))


@app.command()
def explain(
    artifact: Annotated[Path, typer.Argument(help="A folder that `export` wrote")],
    precision: Annotated[
        str | None, typer.Option(help="The integer file to explain, e.g. int8; default: the last", metavar="PRECISION")
    ] = None,
    calib: Annotated[
        str | None, typer.Option("--calib", help="The export's sample data: measure what it can tell", metavar="DATA")
    ] = None,
    evaluation: Annotated[
        str | None, typer.Option("--eval", help="Data to compare answers on, instead of the export's", metavar="DATA")
    ] = None,
    samples: Annotated[int, typer.Option(min=8, help="Samples that answers are compared on, at most")] = 100,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The HTML file to write, too")] = None,
    as_json: Json = False,
) -> None:
    """Say why operators are float, integer or slow, which lose most, and what would be better."""
    from deploykit.explain import explain as explained
    from deploykit.explain.page import place, write_page

    page = None if out is None else place(out)  # what cannot be written is said before any long work
    found = explained(artifact, precision, calib, evaluation, samples)
    if page is not None:
        write_page(found, page)
    print_explanation(found, page, as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what is installed, what this processor can, and how to get what is missing."""
    from deploykit.doctor import diagnose

    found = diagnose()
    print(json.dumps(found.to_dict(), indent=1) if as_json else "\n".join(found.lines()))


@app.command()
def demo(out: Out = Path("demo"), device: Device = None, overwrite: Overwrite = False, as_json: Json = False) -> None:
    """Train a small network on scikit-learn's digits and export it for a target of every family."""
    from deploykit.demo import run

    show_exported(run(out, overwrite, device), as_json)


app.command()(pack)
app.command()(unpack)
app.command()(exits)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point: turns errors into a message and an exit code."""
    try:
        app(args=arguments, standalone_mode=True)
    except DeploykitError as error:
        print(f"deploykit: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("\ndeploykit: interrupted; nothing was left half-written", file=sys.stderr)
        raise
    sys.exit(0)
