"""``deploykit exits``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploykit.options import (
    Calib,
    Eval,
    Json,
    Model,
    Out,
    Overwrite,
    PreprocessFile,
    Seed,
    Thresholds,
    declared_preprocess,
    given,
    known_name,
    threshold_methods,
)

if TYPE_CHECKING:
    from deploykit.chain.chain import Chain

MAX_DROP = 0.5
"""Points of accuracy that may be lost where nothing else is asked for."""


def exits(
    model: Model,
    target: Annotated[str, typer.Option("--target", help="Device name, or a .toml of your own")] = "x86",
    calib: Calib = None,
    evaluation: Eval = None,
    preprocess: PreprocessFile = None,
    max_drop: Annotated[
        float | None, typer.Option(help=f"Points of accuracy that leaving early may cost; default {MAX_DROP}")
    ] = None,
    max_ms: Annotated[float | None, typer.Option(help="Mean milliseconds on this machine, instead")] = None,
    threshold: Annotated[
        list[float] | None, typer.Option(help="Of an exit, first to last, instead (repeat it for every exit)")
    ] = None,
    ensemble: Annotated[bool, typer.Option("--ensemble", help="Every exit answers the mean of all up to it")] = False,
    precision: Annotated[
        list[str] | None, typer.Option("--precision", help="Write only this (may be repeated)")
    ] = None,
    thresholds: Thresholds = "minmax",
    threads: Annotated[int, typer.Option(min=1, help="Threads for evaluation and timing")] = 1,
    out: Out = Path("chain"),
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a network with early exits as a chain of files that samples leave as soon as an exit is sure."""
    from deploykit import asked, targets
    from deploykit.chain.chain import load_chain
    from deploykit.chain.write import Wanted, write_chain
    from deploykit.core.errors import GateFailed
    from deploykit.core.precision import PRECISIONS
    from deploykit.core.request import Request, Settings

    settings = Settings(
        thresholds=known_name("threshold method", thresholds, threshold_methods()),
        precisions=tuple(known_name("precision", p, PRECISIONS) for p in precision or ()),  # type: ignore[misc]
        seed=seed, overwrite=overwrite, threads=threads,
    )  # fmt: skip
    look = declared_preprocess(preprocess, None, None, None, None, None)
    data = given(calibration=calib, eval=evaluation)
    request = Request(model, target, None, data, look, settings=settings)
    nothing = max_drop is None and max_ms is None and not threshold
    wanted = Wanted(MAX_DROP if nothing else max_drop, max_ms, tuple(threshold or ()), ensemble)
    prepared = asked.prepare(request)
    try:
        chain = write_chain(prepared, targets.load(target), out, settings, wanted, request)
    except GateFailed:  # the files are there all the same
        show(out, load_chain(out), as_json)
        raise
    show(out, chain, as_json)


def show(folder: Path, chain: Chain, as_json: bool) -> None:
    """Prints what was written."""
    if as_json:
        print((folder / "chain.json").read_text(encoding="utf-8"), end="")
        return
    whole = sum(s.macs for s in chain.segments)
    what = "accuracy" if chain.labels else "answers as the last exit's"
    print(f"{folder}: {len(chain.segments)} segments for {chain.target}")
    for precision, v in chain.variants.items():
        left = ", ".join(f"{100 * share:.1f}" for share in v.shares)
        at = ", ".join(f"{t:.4g}" for t in v.thresholds)
        print(f"{precision}: {what} {v.accuracy:.2f} %, {v.last_accuracy:.2f} % if nobody left; {v.scored_on} samples")
        print(f"  leave by exit 1 to {len(v.shares)}: {left} %; thresholds {at}")
        time = "" if v.mean_ms is None else f"; on this machine {v.mean_ms:.3f} ms of {sum(v.ms):.3f}"
        print(f"  multiply-accumulates {100 * v.macs / whole:.1f} % of all segments'{time}")
        others = [f"{p.accuracy:.2f} % for {_cost(p.ms, p.macs / whole)}" for p in v.frontier]
        print(f"  with other thresholds (chain.json has them): {', '.join(others)}")


def _cost(ms: float | None, share: float) -> str:
    return f"{ms:.3f} ms" if ms is not None else f"{100 * share:.0f} % of the multiply-accumulates"
