"""The hub of an artifact, made again from its request and its ranges: the same integers, which can then be changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploykit import asked, passes, targets
from deploykit.core.context import Context, Role
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import Manifest
from deploykit.core.precision import Precision, spec_of
from deploykit.core.progress import status
from deploykit.core.ranges import Ranges
from deploykit.core.recipe import Pass, Step
from deploykit.core.target import QuantSpec, Target
from deploykit.hub.graph import FloatGraph, Hub
from deploykit.pipeline import Prepared, float_graph
from deploykit.pipeline.steps import step_context


@dataclass(frozen=True)
class Remade:
    """All that an artifact's integers are made from."""

    prepared: Prepared
    target: Target
    """With the numbers of the precision."""
    graph: FloatGraph
    ranges: Ranges
    thresholds: str
    keep_float: tuple[str, ...]
    steps: tuple[Pass, ...]
    """Of the hub."""
    context: Context

    @property
    def calibration(self) -> DataSet:
        """The samples that ranges and corrections come from."""
        return self.prepared.data["calibration"]

    def hub(
        self,
        *,
        ranges: Ranges | None = None,
        thresholds: str | None = None,
        also_float: Sequence[str] = (),
        steps: Sequence[Pass] | None = None,
        spec: QuantSpec | None = None,
        data: DataSet | None = None,
    ) -> Hub:
        """The hub; with arguments, another one.

        Args:
            ranges: statistics of the same graph.
            thresholds: how ranges are chosen.
            also_float: layers that stay in float beside those that do already.
            steps: instead of the hub's own.
            spec: other numbers.
            data: what steps may learn from, instead of the calibration data.
        """
        from deploykit.hub.quantize import quantize

        spec = spec or self.target.quant
        hub = quantize(
            self.graph, ranges or self.ranges, spec, thresholds or self.thresholds, (*self.keep_float, *also_float)
        )
        context = replace(self.context, target=replace(self.target, quant=spec))
        if data is not None:
            context = replace(context, data={**context.data, "calibration": data})
        for step in self.steps if steps is None else steps:
            hub = step(hub, context)
        return hub


def remake(manifest: Manifest, precision: Precision, folder: Path, ranges: Ranges, data: dict[Role, str]) -> Remade:
    """What the integers of one file were made from.

    Args:
        manifest: of the artifact.
        precision: of the file.
        folder: where the artifact lies, for messages.
        ranges: that the artifact keeps.
        data: sample data by role, instead of that of the request.

    Raises:
        DeploykitError: it was exported from Python objects or with steps that train; model or data are not here any
            more, or another model lies in their place.
    """
    request = manifest.request
    if any(phrase.startswith("model") or "the model" in phrase for phrase in request.objects):
        raise DeploykitError(
            f"{folder} cannot be measured: its model was a Python object, which no file holds. Export it from a MODEL "
            "argument (file.py:factory), or leave out --calib for what the artifact itself knows."
        )
    given: dict[Role, str] = {role: spec for role, spec in {**request.data, **data}.items() if role != "train"}
    settings = replace(request.settings, overwrite=True, benchmark=False)
    try:
        prepared = asked.prepare(replace(request, data=given))
    except DeploykitError as error:
        raise DeploykitError(
            f"{folder} cannot be measured here: {error}\n"
            "Paths are meant from the folder that the export was started in: run `deploykit explain` there."
        ) from None
    _refuse_other_samples(manifest, prepared, folder)
    own = spec_of(targets.load(request.target).quant, precision)
    target = replace(targets.load(request.target), quant=own)
    early, steps = _steps(manifest, precision)
    context = step_context(prepared, settings, target)
    with status("lowering to ONNX"):
        module = prepared.model.module
        for step in (s for s in early if s.stage == "model"):
            module = step(module, context)
        graph = float_graph(prepared.model, prepared.example, module)
        for step in (s for s in early if s.stage == "graph"):
            graph = step(graph, context)
    if graph.hash != manifest.graph:
        raise DeploykitError(
            f"{folder} was exported from another model than {request.model} is now (graph {manifest.graph}, now "
            f"{graph.hash}): its code or weights were changed since, or the export's data decides what its steps do"
        )
    return Remade(prepared, target, graph, ranges, settings.thresholds, settings.keep_float, steps, context)


def _refuse_other_samples(manifest: Manifest, prepared: Prepared, folder: Path) -> None:
    """What other samples would give is not what lies in the artifact."""
    was, now = manifest.data.get("calibration"), prepared.data.get("calibration")
    if was is not None and now is not None and now.hash != was.hash:
        raise DeploykitError(
            f"{folder} was calibrated on {was.samples} other samples ({was.origin}, hash {was.hash}) than the "
            f"{len(now)} of {now.origin} ({now.hash}). --calib wants those of the export."
        )


def _steps(manifest: Manifest, precision: Precision) -> tuple[tuple[Pass, ...], tuple[Pass, ...]]:
    """The steps in front of the hub, and those of one file's hub, as objects again.

    Raises:
        DeploykitError: one of them trains, or is not known to this version.
    """
    known: dict[str, Pass] = {}
    for name in passes.names():  # those that ran without being asked have no options
        if all(value is not None for value in passes.options(name).values()):
            known |= _by_line(passes.build(Step(name)))
    for step in manifest.request.settings.recipe.steps:
        known |= _by_line(passes.build(step))
    done = next(f.steps for f in manifest.files if f.precision == precision)
    found = []
    for line in (*manifest.steps, *done):
        if line not in known:
            raise DeploykitError(f"the step {line} is not known to this version of deploykit; export it again")
        found.append(known[line])
    early = tuple(step for step in found[: len(manifest.steps)] if step.stage != "hub")
    hub = tuple(found[len(manifest.steps) :])
    training = [step for step in (*early, *hub) if "train" in step.needs]
    if training:
        raise DeploykitError(
            f"measuring would train once more ({training[0]!r}), and for every alternative. Leave out --calib for what "
            "the artifact itself knows."
        )
    return early, hub


def _by_line(step: Any) -> dict[str, Pass]:
    return {repr(step): step}
