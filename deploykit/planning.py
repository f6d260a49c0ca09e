"""What will run: the steps that apply on a target, in which order, why the others do not, and what will be written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from deploykit import exporters, passes
from deploykit.core.context import Role
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.precision import Precision, integers, nearest, needs_calibration
from deploykit.core.recipe import STAGES, Pass, Recipe, Stage, Step
from deploykit.core.target import Need, Profit, QuantSpec, Target
from deploykit.passes.fit_ranges import FitRanges
from deploykit.passes.mixed import Mixed

NEEDS: Mapping[Need, str] = {
    "data": "--calib",
    "labels": "labels in the data",
    "train": "--train",
    "teacher": "a model that PyTorch runs (an .onnx has no teacher)",
}


CORRECTIONS = ("bias_correct", "weight_correct", "gptq", "adaround", "reconstruct")
"""Steps that correct what rounding costs; one of them runs without being asked."""

SETTLE = (Mixed, FitRanges)
"""Steps that decide what there is to correct: bits and ranges."""


@dataclass(frozen=True)
class Planned:
    """One step of a plan: a pass, and why it will not run, if so."""

    step: Pass
    refusal: str = ""
    automatic: bool = False
    optional: bool = False

    @property
    def left_out(self) -> bool:
        """Whether it does not run and nobody minds: it was not asked for, or only where it can run."""
        return bool(self.refusal) and (self.automatic or self.optional)


def profiting(target: Target, packed: bool) -> Target:
    """The target, with what makes files smaller among its profits if they are packed."""
    added: tuple[Profit, ...] = ("codebook", "small_file") if packed else ()
    return replace(target, profits=tuple(dict.fromkeys((*target.profits, *added))))


def plan(
    recipe: Recipe, target: Target, available: Sequence[str], automatic: bool = True, enters: Stage = "model"
) -> tuple[Planned, ...]:
    """Which steps apply on a target, in which order, and why the others do not.

    Args:
        recipe: every step is built, so a wrong name or option raises before anything runs.
        target: its ``profits`` decide.
        available: which of data, labels, train, teacher there is.
        automatic: whether `correction` is added in front of the hub steps (behind those that `SETTLE` what is to be
            corrected), unless the recipe has one.
        enters: where the model comes in: a PyTorch module at ``model``, a .pt2 or .onnx at ``graph``.

    Raises:
        DeploykitError: unknown pass or option; steps out of stage order.
    """
    steps = [passes.build(step) for step in recipe.steps]
    order = [STAGES.index(step.stage) for step in steps]
    for before, after in zip(range(len(order)), range(1, len(order)), strict=False):
        if order[after] < order[before]:
            raise DeploykitError(
                f"step '{recipe.steps[after].name}' works on the {steps[after].stage} and cannot come after "
                f"'{recipe.steps[before].name}', which works on the {steps[before].stage}. "
                f"Stages in order: {', '.join(STAGES)}."
            )
    planned = [
        Planned(built, refusal(built, target, available, enters), optional=step.optional)
        for built, step in zip(steps, recipe.steps, strict=True)
    ]
    named = {step.name for step in recipe.steps}
    if automatic and not named & set(CORRECTIONS) and integers((*target.precisions, *target.on_request)):
        fewest = min([target.quant.weight_bits, *(s.least_bits for s in steps if isinstance(s, Mixed))])
        wanted = correction(replace(target.quant, weight_bits=fewest))
        added = [passes.build(Step(name)) for name in wanted if name not in named]
        for step in added:
            passed = SETTLE if step.stage == "hub" else ()
            follows = (i for i, p in enumerate(planned) if p.step.stage == "hub" and not isinstance(p.step, passed))
            place = next(follows, len(planned))
            planned.insert(place, Planned(step, refusal(step, target, available), automatic=True))
    return tuple(planned)


def correction(spec: QuantSpec) -> tuple[str, ...]:
    """The steps that make good, without being asked, what rounding costs.

    With fewer than 7 bits integers have to be chosen. So they have with one scale for all channels, whose ranges are
    evened out before.
    """
    if spec.weight_granularity == "tensor":
        return "equalize", "gptq"
    return ("weight_correct",) if spec.weight_bits >= 7 else ("gptq",)


def refusal(step: Pass | type[Pass], target: Target, available: Sequence[str], enters: Stage = "model") -> str:
    """Why a step will not run on a target with what there is; empty if it will."""
    if STAGES.index(step.stage) < STAGES.index(enters):
        return f"works on the {step.stage}, and a .pt2 or .onnx enters at the {enters}; give file.py:factory"
    missing = [need for need in step.needs if need not in available]
    if missing:
        return f"needs {named(missing)}"
    return unprofitable(step, target)


def unprofitable(step: Pass | type[Pass], target: Target) -> str:
    """Why a step cannot pay on a target, on which it can be forced to run; empty if it pays."""
    if set(step.pays_if) & set(target.profits):
        return ""
    packed = ", with --pack also from small_file" if "small_file" in step.pays_if else ""
    return (
        f"cannot pay on target '{target.name}': it pays where {' or '.join(step.pays_if)} does, "
        f"and this target profits from {', '.join(target.profits)}{packed}"
    )


def named(needs: Sequence[Need]) -> str:
    """What has to be given so that a step's needs are met."""
    return ", ".join(NEEDS[need] for need in needs)


def in_order(names: Sequence[str]) -> list[str]:
    """Passes by stage, in the order in which stages run."""
    return sorted(names, key=lambda name: STAGES.index(passes.load(name).stage))


def available(data: Mapping[Role, DataSet], teacher: bool = True) -> list[Need]:
    """What there is of what passes may need; ``teacher``: whether PyTorch can run the model as it came in."""
    there: dict[Need, bool] = {
        "data": "calibration" in data,
        "labels": any(d.labels is not None for d in data.values()),
        "train": "train" in data,
        "teacher": teacher,
    }
    return [need for need, is_there in there.items() if is_there]


def named_data(calibration: object, train: object, evaluation: object) -> list[Need]:
    """What passes may need of data that was named and not read yet: any of it may have labels."""
    there: dict[Need, bool] = {
        "data": bool(calibration),
        "labels": any((calibration, train, evaluation)),
        "train": bool(train),
    }
    return [need for need, is_there in there.items() if is_there]


def precisions(
    target: Target, asked: Sequence[Precision], calibrated: bool
) -> tuple[tuple[Precision, ...], tuple[str, ...]]:
    """What will be written, and what the user should know about it.

    Args:
        target: its own precisions are written where nothing else is asked for.
        asked: empty, or what to write instead; it may also be among those that the target takes on request.
        calibrated: whether there are ranges, or data to measure them on.

    Raises:
        DeploykitError: the target does not take what was asked for; integer files were asked for (or the target takes
            nothing else) and there is no calibration.
    """
    for given in asked:
        if given not in (*target.precisions, *target.on_request):
            raise DeploykitError(_not_taken(given, target))
    wanted = tuple(dict.fromkeys(asked or target.precisions))
    without = tuple(p for p in wanted if not needs_calibration(p))
    if calibrated or without == wanted:
        return wanted, ()
    lacking = next(p for p in wanted if needs_calibration(p))
    if asked or not without:
        raise DeploykitError(f"target '{target.name}': {lacking} needs sample data; give --calib")
    return without, (f"no --calib: only float files were written; with sample data {lacking} files would be added",)


def _not_taken(asked: Precision, target: Target) -> str:
    """Why a target does not take a precision, as far as its facts or its exporter say, and the nearest one that it
    takes."""
    facts = (target.facts.get(name) for name in (asked, *asked.split("-")))
    why = next((fact.source for fact in facts if fact is not None and fact.value is False), "")
    why = why or exporters.load(target.exporter).WHY_NOT.get(asked, "")
    on_request = f"; on request {', '.join(target.on_request)}" if target.on_request else ""
    return (
        f"target '{target.name}' does not take {asked}{f' ({why})' if why else ''}; it takes "
        f"{', '.join(target.precisions)}{on_request}. "
        f"The nearest is --precision {nearest(asked, (*target.precisions, *target.on_request))}."
    )
