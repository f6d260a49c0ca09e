"""Writes a chain: the network in one file to look at, an artifact per segment, thresholds, and what runs them.

The whole goes down the road of every export, so its hub is corrected, checked and reported like any other. The
segments are cut out of that hub and written by the same exporter; nothing is calibrated or quantized a second time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit import exporters
from deploykit.bench.timing import in_turns
from deploykit.chain.chain import WHOLE, Chain, Point, Running, Segment, Variant, mean_ms
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError, GateFailed
from deploykit.core.files import folder_in_place, refuse_taken
from deploykit.core.manifest import Manifest
from deploykit.core.precision import Precision
from deploykit.core.ranges import Ranges
from deploykit.core.recipe import Recipe
from deploykit.core.request import Gate, Request, Settings
from deploykit.core.target import Target
from deploykit.exits import thresholds as rules
from deploykit.exits.confidence import probabilities
from deploykit.exits.thresholds import Outcome, cheapest, frontier, most_accurate, outcome
from deploykit.models import Model
from deploykit.pipeline.judge import HUB_SAMPLES
from deploykit.pipeline.prepared import Prepared
from deploykit.pipeline.road import Road
from deploykit.planning import precisions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deploykit.exits.network import WithExits
    from deploykit.exits.segments import Port
    from deploykit.hub.graph import FloatGraph, Hub

WRITTEN_FOR = ("onnx", "openvino", "tflite")
"""Exporters whose files can be run one after the other, by ``infer.py`` on the device and here for the thresholds."""
WHY_NOT: Mapping[str, str] = {
    "c99": "it writes one function for one network, and firmware would have to call several in turns",
    "tensorrt": "its engines are built on the device, and thresholds are chosen by what the files answer here",
}
RUNS, SECONDS = 30, 1.0
"""Rounds at least in which segments are timed, and how long that goes on."""
BATCH = 16
DOUBT = 2.0
"""Standard errors of the loss that must fit into what may be lost."""
SAME: Mapping[str, float] = {"fp32": 1e-4}
"""Largest difference of a probability between the chain and the file of the whole, where that is not `ALIKE`."""
ALIKE = 0.05
"""Runtimes may fuse in one file what they do not in the other, and then round a tie otherwise."""


@dataclass(frozen=True)
class Wanted:
    """When samples shall leave: exactly one of the three."""

    max_drop: float | None = None
    """Points of accuracy that may be lost; the cheapest thresholds that lose no more, two standard errors included."""
    max_ms: float | None = None
    """Mean latency on this machine; the most accurate thresholds that reach it."""
    thresholds: tuple[float, ...] = ()
    """These."""
    ensemble: bool = False


def write_chain(
    prepared: Prepared,
    target: Target,
    folder: Path,
    settings: Settings,
    wanted: Wanted,
    request: Request | None = None,
    gate: Gate | None = None,
) -> Chain:
    """Writes the chain of a network with exits into a folder.

    Thresholds are chosen on every second sample of the evaluation data (without any, on calibration samples that were
    held out), and all figures are of the others. Costs are multiply-accumulates, which are the same on every machine;
    for a wanted latency they are milliseconds measured here.

    Raises:
        DeploykitError: a model without exits, a target whose exporter cannot, no data to choose thresholds on, or
            stages that do not cut the network in two. Nothing is left behind.
        GateFailed: the chain was written, but a file failed its checks.
    """
    from deploykit.exits.network import WithExits, with_cuts
    from deploykit.exits.segments import ports, segment

    module, gate = prepared.model.module, gate or Gate()
    refuse_taken(folder, settings.overwrite)
    if not isinstance(module, WithExits):
        raise DeploykitError(
            f"{prepared.model.origin} has no exits: give a folder that `deploykit compress` wrote, with the step "
            "self_distill and keep_exits = true"
        )
    _refuse(prepared, target, module, wanted)
    request = request or Request(prepared.model.origin, target.name, objects=("the model and its data",))
    settings = replace(settings, recipe=Recipe(), benchmark=False)
    model = replace(prepared.model, module=with_cuts(module))
    with folder_in_place(folder, settings.overwrite) as work:
        road = Road(replace(prepared, model=model), settings, gate, None)
        road.lower([target], None)
        (work / WHOLE).mkdir()
        cannot = *request.objects, "it is a network with cuts, for a chain to be made of"
        whole = road.write(target, work / WHOLE, replace(request, settings=settings, objects=cannot))
        pieces = ports([i.name for i in whole.inputs], len(module.exits), module.places.output)
        hubs = {f.precision: road.hub(target, f.precision, f.steps) for f in whole.files}
        manifests = [whole]
        segments = []
        for k, port in enumerate(pieces, 1):
            cut = {precision: segment(hub, port) for precision, hub in hubs.items()}
            name = f"segment_{k}"
            (work / name).mkdir()
            data = _entering(road.graph, port, prepared)
            manifests.append(_write_segment(cut, road, data, target, settings, gate, work / name, k))
            segments.append(_described(cut, port, name))
        variants: dict[str, Variant] = {
            f.precision: _variant(f.precision, work, segments, whole, target, prepared, settings, wanted)
            for f in whole.files
        }
        labelled = _judged(prepared).labels is not None
        chain = Chain(
            target.name, target.exporter, prepared.model.origin, tuple(segments), variants, wanted.ensemble, labelled
        )
        chain.save(work)
        script = (resources.files("deploykit.chain") / "script.py").read_text(encoding="utf-8")
        (work / "infer.py").write_text(script, encoding="utf-8")
    _refuse_failed(folder, manifests, chain)
    return chain


def _refuse(prepared: Prepared, target: Target, module: WithExits, wanted: Wanted) -> None:
    """All that can be known before any long work."""
    if target.exporter not in WRITTEN_FOR:
        why = f" ({WHY_NOT[target.exporter]})" if target.exporter in WHY_NOT else ""
        raise DeploykitError(
            f"target '{target.name}': the {target.exporter} exporter writes no chains{why}; "
            f"{', '.join(WRITTEN_FOR)} do. `deploykit export` writes the network with all its exits in one file."
        )
    exporter = exporters.load(target.exporter)
    runtime = exporter.runtime()
    if prepared.evaluation is None:
        raise DeploykitError(
            "thresholds are chosen on samples: give --eval, or at least 10 samples in --calib, of which every fifth is "
            "held out"
        )
    if len(prepared.evaluation) < 2:
        raise DeploykitError("thresholds are chosen on one half of the samples and scored on the other: give more")
    asked = [wanted.max_drop is not None, wanted.max_ms is not None, bool(wanted.thresholds)]
    if sum(asked) != 1:
        raise DeploykitError("say when samples shall leave by one of --max-drop, --max-ms and --threshold")
    if wanted.max_drop is not None:
        rules.check_allowed(wanted.max_drop)
    if wanted.thresholds:
        rules.check(wanted.thresholds, len(module.exits) + 1)
    if wanted.max_ms is not None and not wanted.max_ms > 0:
        raise DeploykitError(f"--max-ms must be above 0, given {wanted.max_ms:g}")
    if wanted.max_ms is not None and (runtime.untimed or not target.measured_here):
        raise DeploykitError(
            f"times taken here say nothing about '{target.name}', so --max-ms cannot be met by choosing thresholds "
            "here; give --max-drop or --threshold"
        )
    calibrated = "calibration" in prepared.data
    exporters.refuse_uncarried(target, precisions(target, (), calibrated)[0], exporter.CARRIES, exporter.WHY_NOT)


def _judged(prepared: Prepared) -> DataSet:
    assert prepared.evaluation is not None
    return prepared.evaluation


def _entering(graph: FloatGraph, port: Port, prepared: Prepared) -> DataSet:
    """What enters a segment on evaluation samples, computed in float."""
    from deploykit.exporters import to_onnx
    from deploykit.hub.running import session

    data = _judged(prepared).spread(HUB_SAMPLES)
    if set(port.takes) == {v.name for v in graph.model.graph.inputs}:
        return data
    run = to_onnx.runner(session(graph.model))
    found = [run(batch.inputs) for batch in data.batches(BATCH)]
    arrays = {name: np.concatenate([f[name] for f in found]) for name in port.takes}
    return DataSet.of(arrays, data.labels, f"{port.takes[0]} of {data.origin}")


def _write_segment(
    hubs: Mapping[Precision, Hub],
    whole: Road,
    data: DataSet,
    target: Target,
    settings: Settings,
    gate: Gate,
    folder: Path,
    k: int,
) -> Manifest:
    """One artifact, by the road's own last part, which is given its hubs instead of making them."""
    first = next(iter(hubs.values()))
    example = next(data.batches(2)).inputs
    preprocess = whole.prepared.preprocess if k == 1 else None
    origin = f"{whole.prepared.model.origin}, segment {k}"
    prepared = Prepared(Model(origin), {"eval": data}, example, preprocess, held_out=False)
    settings = replace(settings, precisions=tuple(hubs), correction=False)
    road = Road.behind(prepared, settings, gate, target, hubs, _ranges_of(first.graph, whole.ranges))
    return road.write(target, folder, Request(origin, target.name, objects=("it was cut out of a network",)))


def _ranges_of(graph: FloatGraph, ranges: Ranges | None) -> Ranges | None:
    """Those of the tensors of a piece, which were measured on the whole."""
    if ranges is None:
        return None
    inside = graph.model.graph
    names = {v.name for v in inside.inputs} | {v.name for node in inside for v in node.outputs}
    return replace(
        ranges, graph=graph.hash, tensors={n: s for n, s in ranges.tensors.items() if n in names},
        means={n: m for n, m in ranges.means.items() if n in names},
    )  # fmt: skip


def _described(hubs: Mapping[Precision, Hub], port: Port, name: str) -> Segment:
    from deploykit.exits.segments import macs

    return Segment(name, port.answer, macs(next(iter(hubs.values())).graph))


def _variant(
    precision: Precision,
    folder: Path,
    segments: Sequence[Segment],
    whole: Manifest,
    target: Target,
    prepared: Prepared,
    settings: Settings,
    wanted: Wanted,
) -> Variant:
    """The chain in one precision, run on all evaluation samples: thresholds, and what they come to."""
    runners = tuple(exporters.open_artifact(folder / s.folder).runner(precision, settings.threads) for s in segments)
    names = tuple(s.answer for s in segments)
    running = Running(runners, names, (1.0,) * (len(segments) - 1))
    one = exporters.load(target.exporter).load(
        folder / WHOLE / next(f.path for f in whole.files if f.precision == precision), settings.threads
    )
    data, found, difference = _judged(prepared), [], 0.0
    for batch in data.batches(BATCH):
        logits = running.every_exit(batch.inputs)
        at_once = one(batch.inputs)
        theirs = np.stack([at_once[name] for name in names])
        difference = max(difference, float(np.abs(probabilities(logits) - probabilities(theirs)).max()))
        found.append(logits)
    p = probabilities(np.concatenate(found, axis=1), wanted.ensemble)
    if not np.isfinite(p).all():
        raise DeploykitError(f"{precision}: an exit's answer is not finite on an evaluation sample")
    answers, confidence = p.argmax(-1), p.max(-1)
    right = answers == (answers[-1] if data.labels is None else np.asarray(data.labels))
    ms = _times(runners, data, target)
    costs = np.cumsum(ms if wanted.max_ms is not None else [s.macs for s in segments], dtype=np.float64)
    choosing, scoring = ((confidence[:, part], right[:, part]) for part in (slice(0, None, 2), slice(1, None, 2)))
    chosen = _choose(*choosing, costs, wanted)
    macs = np.cumsum([s.macs for s in segments], dtype=np.float64)
    others = [outcome(*scoring, tuple(macs), each.thresholds) for each in frontier(*choosing, tuple(costs))]
    points = [Point(o.thresholds, o.accuracy, o.cost, mean_ms(ms, o.shares)) for o in others]
    scored = outcome(*scoring, tuple(macs), chosen.thresholds)
    exits = tuple(100.0 * float(each) for each in scoring[1].mean(axis=1))
    return Variant(
        chosen.thresholds, 0 if wanted.thresholds else choosing[1].shape[1], scoring[1].shape[1],
        scored.accuracy, exits[-1], exits, scored.shares, scored.cost, difference, ms, tuple(points),
    )  # fmt: skip


def _choose(confidence: NDArray[Any], right: NDArray[Any], costs: NDArray[Any], wanted: Wanted) -> Outcome:
    if wanted.thresholds:
        return outcome(confidence, right, tuple(costs), wanted.thresholds)
    if wanted.max_ms is not None:
        return most_accurate(confidence, right, tuple(costs), wanted.max_ms)
    assert wanted.max_drop is not None
    return cheapest(confidence, right, tuple(costs), wanted.max_drop, DOUBT)


def _times(runners: Sequence[Any], data: DataSet, target: Target) -> tuple[float, ...]:
    """Milliseconds of every segment with one sample; empty where times taken here mean nothing."""
    if exporters.load(target.exporter).runtime().untimed:
        return ()
    inputs: dict[str, Any] = next(data.batches(1)).inputs
    calls = []
    for run in runners:
        calls.append(partial(run, inputs))
        outputs = run(inputs)
        inputs = {name: x for name, x in outputs.items() if name.startswith("cut_")}
    return tuple(float(np.median(each)) for each in in_turns(calls, RUNS, SECONDS))


def _refuse_failed(folder: Path, manifests: Sequence[Manifest], chain: Chain) -> None:
    """Raises where a file failed a check, or the chain does not answer as the whole does."""
    failed = [
        f"{folder / name}: {c.name} {c.value:.4g}, bound {c.bound:.4g} ({c.precision}; {c.detail})"
        for name, manifest in zip((WHOLE, *(s.folder for s in chain.segments)), manifests, strict=True)
        for c in manifest.checks
        if c.passed is False and c.value is not None and c.bound is not None
    ]
    for precision, variant in chain.variants.items():
        bound = SAME.get(precision, ALIKE)
        if not variant.whole <= bound:
            text = f"a probability differs by {variant.whole:.2g} from that of the file in {WHOLE}, bound {bound:g}"
            failed.append(f"{folder}: {text} ({precision})")
    if failed:
        raise GateFailed("\n  ".join(["the chain was written but failed its checks:", *failed]))
