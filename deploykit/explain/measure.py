"""What is measured with sample data at hand: contributions to the error, parts of the samples, and alternatives.

Alternatives are not estimated. The hub is made again as each of them would make it, and answers the same samples.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from deploykit import check, passes, pipeline
from deploykit.calibration.growth import drawn
from deploykit.calibration.thresholds import METHODS, NEED_HISTOGRAM
from deploykit.core.errors import DeploykitError
from deploykit.core.progress import say, track
from deploykit.core.ranges import Ranges
from deploykit.core.recipe import Pass, Step
from deploykit.explain.explanation import Alternative, Measured, Operator, Part, Quality
from deploykit.explain.remake import Remade
from deploykit.exporters import to_onnx
from deploykit.hub.analysis.contributions import Contribution, contributions
from deploykit.hub.graph import Hub
from deploykit.hub.running import session
from deploykit.pipeline.prepared import HELD_OUT_LABEL
from deploykit.planning import CORRECTIONS

CONTRIBUTING = 32
"""Calibration samples that contributions are measured on."""
KEPT, MOST = (1, 3), 0.35
"""So many of the layers whose weights cost most are tried in float, but no larger share of them."""
CORRECTION = {
    "bias_correct": "bias correction", "weight_correct": "weight correction", "gptq": "integers chosen by GPTQ",
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What came out."""

    measured: Measured
    operators: tuple[Operator, ...]
    """With their shares."""
    ranges: Ranges
    """With histograms."""


def measure(made: Remade, operators: Sequence[Operator], samples: int, integers_only: bool) -> Found:
    """Everything.

    Args:
        made: what the integers are made from.
        operators: of the file.
        samples: so many of the evaluation data are answered, at most.
        integers_only: the target computes nothing in float, so no layer can be kept there.
    """
    started = time.process_time()
    hub = made.hub()
    judge = _Judge(made, samples)
    now = judge(hub)
    say(f"answers of the hub: {now.sqnr_db:.1f} dB above its error, on {len(judge.data)} samples")
    shares = contributions(hub, made.calibration.spread(CONTRIBUTING))
    total = max(sum(c.noise for c in shares), 1e-300)
    told = tuple(_with_shares(o, shares, total) for o in operators)
    known = {o.layer for o in operators}
    entering = 100 * sum(c.noise for c in shares if c.layer not in known) / total
    ranges = made.ranges
    if not ranges.has_histograms:
        ranges = pipeline.calibrate(made.graph, made.calibration, "mse")
    parts = tuple(_parts(made, judge))
    wanted = list(_alternatives(made, hub, ranges, told, integers_only))
    tried = [_tried(hub, now, judge, *each) for each in track(wanted, "alternatives")]
    tried.sort(key=lambda a: -a.gain_db)
    measured = Measured(
        judge.label, len(judge.data), now, _decibels(total), entering, tuple(tried), parts,
        round(time.process_time() - started, 1),
    )  # fmt: skip
    return Found(measured, told, ranges)


def _with_shares(operator: Operator, shares: Sequence[Contribution], total: float) -> Operator:
    own = {
        part: 100 * sum(c.noise for c in shares if c.layer == operator.layer and c.part == part) / total
        for part in {c.part for c in shares if c.layer == operator.layer}
    }
    return replace(operator, weights=own.get("weights"), values=own.get("values"))


class _Judge:
    """Answers of a hub against those of the float network."""

    def __init__(self, made: Remade, samples: int) -> None:
        """Asks the float network."""
        self.data = made.prepared.judged.spread(samples)
        self.label = made.prepared.judged.origin
        if made.prepared.held_out:
            self.label = HELD_OUT_LABEL
        elif made.prepared.evaluation is None:
            self.label = f"{self.label}, seen in calibration"
        self._floats = check.answer(to_onnx.runner(session(made.graph.bytes)), self.data, "float answers")

    def __call__(self, hub: Hub) -> Quality:
        """How close a hub is."""
        run = to_onnx.runner(session(hub.bytes, optimize=False))
        found = check.score(check.answer(run, self.data, "answers"), self._floats, "int8", self.label)
        return Quality(min(found.sqnr_db.values()), found.agreement, found.metric)


def _parts(made: Remade, judge: _Judge) -> Iterator[Part]:
    """Ranges and corrections from a growing part of the samples."""
    order = drawn(len(made.calibration))
    for size in track(made.ranges.parts, "growing parts of the samples"):
        part = made.calibration.pick(order[:size])
        ranges = pipeline.calibrate(made.graph, part, made.thresholds)
        try:
            hub = made.hub(ranges=ranges, data=part)
        except DeploykitError:  # a step needs more samples than that
            continue
        yield Part(size, judge(hub))


def _alternatives(
    made: Remade, hub: Hub, ranges: Ranges, operators: Sequence[Operator], integers_only: bool
) -> Iterator[tuple[str, str, Any]]:
    """(what, option, how to make it): one thing changed at a time."""
    for method in METHODS:
        if method != made.thresholds:
            known = ranges if method in NEED_HISTOGRAM else made.ranges
            yield (
                f"thresholds by {method}",
                f"--thresholds {method}",
                lambda m=method, r=known: made.hub(ranges=r, thresholds=m),
            )
    mine = {passes_name(step): step for step in made.steps}
    others = [step for name, step in mine.items() if name not in CORRECTIONS]
    for name in CORRECTION:
        if name not in mine and not _missing(name, made):
            steps = (*others, passes.build(Step(name)))
            yield CORRECTION[name], f'[[step]] name = "{name}"', lambda s=steps: made.hub(steps=s)
    if "fit_ranges" in passes.names() and "fit_ranges" not in mine:
        steps = (passes.build(Step("fit_ranges")), *made.steps)
        yield "ranges fitted to the answers", '[[step]] name = "fit_ranges"', lambda s=steps: made.hub(steps=s)
    if made.target.quant.weight_granularity == "tensor":
        spec = replace(made.target.quant, weight_granularity="channel")
        yield "a weight scale per channel", '[quant] weight_granularity = "channel"', lambda: made.hub(spec=spec)
    products = [o for o in operators if o.weights is not None]
    worst = sorted(products, key=lambda o: -(o.weights or 0.0))
    for count in KEPT if not integers_only else ():
        names = [o.layer for o in worst[:count]]
        if count <= MOST * len(products):
            option = " ".join(f"--keep-float {name}" for name in names)
            yield f"{' and '.join(names)} in float", option, lambda n=tuple(names): made.hub(also_float=n)


def passes_name(step: Pass) -> str:
    """The name under which a recipe asks for a pass."""
    return next(name for name in passes.names() if passes.load(name) is type(step))


def _missing(name: str, made: Remade) -> bool:
    return any(need not in made.prepared.have for need in passes.load(name).needs)


def _tried(hub: Hub, now: Quality, judge: _Judge, what: str, option: str, make: Any) -> Alternative:
    started = time.process_time()
    other = make()
    seconds = time.process_time() - started
    found = judge(other)
    pairs = [(found.metric, now.metric), (found.agreement, now.agreement)]
    points = next((a - b for a, b in pairs if a is not None and b is not None), None)
    growth = _stored(other) - _stored(hub)
    return Alternative(what, option, found, found.sqnr_db - now.sqnr_db, points, growth, round(seconds, 1))


def _stored(hub: Hub) -> int:
    """Bytes of a hub's constants."""
    assert hub.quantized is not None
    return int(sum(v.const_value.nbytes for v in hub.quantized.graph.initializers.values() if v.const_value))


def _decibels(noise: float) -> float:
    return float(np.clip(-10.0 * np.log10(max(noise, 1e-20)), -200.0, 200.0))
