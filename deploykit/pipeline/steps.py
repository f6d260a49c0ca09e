"""The stretches of the road that can also be walked alone: lowering, calibrating, compressing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from deploykit import targets
from deploykit.core.context import Context, Cost
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError, MissingExtra, said_by, unknown
from deploykit.core.files import folder_in_place, refuse_taken
from deploykit.core.journal import Journal, beside
from deploykit.core.manifest import Finding
from deploykit.core.progress import say
from deploykit.core.ranges import Ranges
from deploykit.core.recipe import Follows, Foresees, KeepsExits, Pass
from deploykit.core.request import Settings
from deploykit.core.target import Profit, Target
from deploykit.pipeline.prepared import Prepared
from deploykit.planning import Planned, plan, unprofitable
from deploykit.report.write import NAME as REPORT
from deploykit.report.write import write_findings

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from deploykit.hub.graph import FloatGraph
    from deploykit.models import Model

ANY_TARGET = "x86"
"""What steps are told about the device where none is named."""
WIDER = 3.0
"""Answers to real samples are so much clearer than those to made-up ones: MobileNetV1's scores reach 31 on photographs,
19 on synthetic images and 10 on random ones. Scores that are cut off tie, and then the class is a matter of chance;
1.6 bits less of the outputs are hardly seen beside the error of all layers before."""
RUNS, SECONDS = 30, 1.0
"""Rounds at least in which files are timed that a step compares, and how long they go on."""
LOOKED_AT = 8
"""Samples that the first batch normalisation of a module is run on: their mean tells preparations apart."""


def float_graph(model: Model, example: Mapping[str, NDArray[Any]], module: nn.Module | None = None) -> FloatGraph:
    """The float graph of a model in any form; ``module`` stands in for the model's own after model-stage steps."""
    from deploykit.hub.lower import lower, lower_program, read_onnx

    if model.onnx is not None:
        return read_onnx(model.onnx)
    if model.program is not None:
        return lower_program(model.program)
    chosen = module if module is not None else model.module
    assert chosen is not None
    return lower(chosen, example)


def calibrate(
    graph: FloatGraph,
    data: DataSet,
    thresholds: str = "minmax",
    module: nn.Module | None = None,
    as_lowered: bool = True,
) -> Ranges:
    """Statistics of a float graph on calibration data, with histograms if the threshold method needs them.

    Args:
        module: what is known of its training data by batch normalisation is compared with the samples.
        as_lowered: the graph is what the module was lowered to; False: steps changed one of them since.
    """
    from deploykit.calibration.lint import Lint, classes_of
    from deploykit.calibration.observe import observe
    from deploykit.calibration.thresholds import METHODS, NEED_HISTOGRAM
    from deploykit.hub.analysis.norms import first_norm, norms, shifts
    from deploykit.hub.plan import observed
    from deploykit.hub.running import summarizing

    if thresholds not in METHODS:
        raise unknown("threshold method", thresholds, METHODS)
    names, channels = observed(graph)
    run = summarizing(graph.model, names, channels, values=thresholds in NEED_HISTOGRAM)
    if data.synthetic:
        return _widened(observe(run, graph.hash, data), graph)
    lint = Lint(data, classes_of(graph.model.graph.outputs))
    ranges = observe(run, graph.hash, data, lint.add)
    if module is None or not norms(module):
        return replace(ranges, notes=lint.findings())
    few = next(data.spread(LOOKED_AT).batches(LOOKED_AT)).inputs
    shifted = shifts(module, few, ranges.means) if as_lowered else {}
    return replace(ranges, notes=lint.findings(first_norm(module, few), shifted))


def _widened(ranges: Ranges, graph: FloatGraph) -> Ranges:
    """With room at the outputs for clearer answers than made-up samples get."""
    from deploykit.hub.operators import FIXED_OUTPUT

    written = {v.name: v.producer() for v in graph.model.graph.outputs}
    outputs = {name for name, node in written.items() if node is None or node.op_type not in FIXED_OUTPUT}
    tensors = {
        name: replace(stats, low=WIDER * stats.low, high=WIDER * stats.high) if name in outputs else stats
        for name, stats in ranges.tensors.items()
    }
    return replace(ranges, tensors=tensors)


@dataclass(frozen=True)
class Compressed:
    """What `compress` did."""

    steps: tuple[str, ...]
    findings: tuple[Finding, ...]
    before: Cost
    after: Cost


def compress(prepared: Prepared, settings: Settings, target: Target | None, folder: Path) -> Compressed:
    """Runs the model-stage steps of a recipe and writes a folder that `load_model` and ``export`` read.

    What the steps found out is ``report.html`` in it, where there is the extra `report`.

    Args:
        target: what the steps have to pay on; None: they run in any case.

    Raises:
        DeploykitError: the recipe has other stages' steps or one that the target has no profit from, or the model is
            no PyTorch module.
    """
    from deploykit.cost import cost
    from deploykit.models import save_compressed
    from deploykit.training.notes import weights_hash

    refuse_taken(folder, settings.overwrite)
    module = prepared.model.module
    if module is None:
        raise DeploykitError(f"{prepared.model.origin} holds no PyTorch module to compress")
    device = target or targets.load(ANY_TARGET)
    paying = device if target is not None else replace(device, profits=get_args(Profit))
    planned = plan(settings.recipe, paying, prepared.have, automatic=False, enters=prepared.model.enters)
    for p in planned:
        if p.step.stage != "model":
            raise DeploykitError(
                f"compress runs model-stage steps; {p.step!r} works on the {p.step.stage}. Use `deploykit export`."
            )
        if not p.left_out:
            insist(p, paying, settings.force)
    for p in planned:
        if p.left_out:
            say(f"{p.step!r} is left out: it {p.refusal}")
    steps = [p.step for p in planned if not p.left_out]
    refuse_behind_exits(steps)
    findings: list[Finding] = []
    context = step_context(prepared, settings, device, findings)
    for step in steps:
        if isinstance(step, Foresees):
            step.foresee(context)
    before = cost(module, prepared.example)
    with beside(folder) as journal:
        for step in steps:
            say(f"running {step!r}")
            module = step(module, remembering(context, journal.of(weights_hash(module)), step))
            if isinstance(step, Follows) and step.follows_another:
                context = replace(context, original=module)
    with folder_in_place(folder, settings.overwrite) as work:
        save_compressed(module, work, prepared.model.origin)
        after = cost(module, prepared.example)
        done = Compressed(tuple(map(repr, steps)), tuple(findings), before, after)
        if findings:
            try:
                write_findings(work / REPORT, prepared.model.origin, done.steps, findings)
            except MissingExtra as error:
                say(f"no {REPORT} was written: {error}")
    return done


def refuse_behind_exits(steps: Sequence[Pass]) -> None:
    """Raises for a step that trains behind one that leaves exits in the network: losses know a single answer.

    Args:
        steps: in the order in which they run.
    """
    for number, step in enumerate(steps):
        behind = [later for later in steps[number + 1 :] if "train" in later.needs]
        if isinstance(step, KeepsExits) and step.keep_exits and behind:
            raise DeploykitError(
                f"{behind[0]!r} cannot train a network with exits, which answers more than once: put it in front of "
                f"{step!r}, or leave out keep_exits"
            )


def refuse_untrainable(graph: FloatGraph, steps: Sequence[Pass]) -> None:
    """Raises for operators that torch cannot train, before any step trains something else.

    Args:
        graph: of the model as it came in.
        steps: that work on graphs.
    """
    from deploykit.hub.training import operators

    for step in steps:
        if "train" in step.needs:
            with said_by(repr(step)):
                operators.refuse_untrainable((node.op_type for node in graph.model.graph), "the network")


def insist(planned: Planned, target: Target, force: bool) -> None:
    """Raises for a step that will not run; one that only cannot pay may be forced."""
    why = planned.refusal
    cannot_pay = why == unprofitable(planned.step, target)
    if why and not (force and cannot_pay):
        forced = " --force runs it all the same." if cannot_pay else ""
        raise DeploykitError(f"step {planned.step!r} {why}.{forced}")


def step_context(
    prepared: Prepared, settings: Settings, target: Target, findings: list[Finding] | None = None
) -> Context:
    """All that a step may ask for; what it finds out is appended to ``findings``."""
    from deploykit.bench.timing import in_turns
    from deploykit.cost import cost
    from deploykit.losses import load_loss
    from deploykit.pipeline.draft import caller, file_bytes
    from deploykit.training.trainer import Trainer

    loss, example = settings.recipe.train.loss, prepared.example

    @lru_cache(maxsize=2)  # the network that others are compared with is written once
    def call(module: nn.Module) -> Callable[[], object]:
        return caller(module, example, settings, target)

    def times(modules: Sequence[nn.Module]) -> list[float]:
        return [float(np.median(each)) for each in in_turns([call(m) for m in modules], RUNS, SECONDS)]

    return Context(
        target=target,
        data=prepared.data,
        example=example,
        original=_teacher(prepared.model),
        trainer=Trainer(settings.recipe.train, settings.seed),
        loss=load_loss(loss) if loss else None,
        cost=lambda module: cost(module, example),
        file_bytes=lambda module: file_bytes(module, example, settings, target),
        times=times if target.measured_here else None,
        note=(findings if findings is not None else []).append,
        seed=settings.seed,
    )


def remembering(context: Context, journal: Journal, step: Pass) -> Context:
    """What one step may ask for, with what it found, and where its trainings were, before a run like this was cut.

    Args:
        context: of all steps.
        journal: of what the step works on.
        step: which tells with its options what it does.
    """
    from deploykit.training.trainer import Trainer

    own = journal.of(repr(step), context.seed, *(partial(getattr, data, "hash") for data in context.data.values()))
    trainer = context.trainer
    assert isinstance(trainer, Trainer)
    return replace(context, journal=own, trainer=replace(trainer, journal=own))


def _teacher(model: Model) -> nn.Module | None:
    """The model as it came in, if torch can run it."""
    if model.program is not None:
        return model.program.module()
    return model.module
