"""`Road`: one run from the model to its files. What was computed once is shared by all targets."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit import exporters, passes
from deploykit.core.artifact import Check
from deploykit.core.context import Context
from deploykit.core.errors import DeploykitError
from deploykit.core.journal import NOTHING_KEPT, Journal
from deploykit.core.machine import this_machine
from deploykit.core.manifest import Finding, Manifest, Source, stored_files, versions
from deploykit.core.precision import (
    FORMATS,
    Precision,
    is_corrected,
    is_quantized,
    needs_calibration,
    spec_of,
)
from deploykit.core.progress import say, status
from deploykit.core.ranges import Ranges
from deploykit.core.recipe import Follows, Foresees, Pass, Rehearses, Stage, Step
from deploykit.core.request import Gate, Request, Settings
from deploykit.core.target import QuantSpec, Target
from deploykit.pipeline import steps
from deploykit.pipeline.draft import stand_in
from deploykit.pipeline.judge import HUB_SAMPLES, NOT_EVALUATED, Judge
from deploykit.pipeline.prepared import Prepared
from deploykit.pipeline.steps import remembering, step_context
from deploykit.planning import Planned, plan, precisions, refusal

if TYPE_CHECKING:
    from deploykit.check import Metric
    from deploykit.hub.graph import FloatGraph, Hub
    from deploykit.hub.pixels import Fed

GOLDEN = 8
"""Real samples that exporters may use, e.g. as golden inputs to be compared on the device."""


Key = tuple[QuantSpec, bool, tuple[str, ...]]
"""What makes a hub: the numbers of a precision, whether they are quantized, and the hub steps that ran. Those read
``hub.spec``, never a target."""


def _key(target: Target, precision: Precision, steps: tuple[str, ...]) -> Key:
    return spec_of(target.quant, precision), is_quantized(precision), steps


class Road:
    """One run: what has been computed so far, so that targets share it."""

    def __init__(
        self,
        prepared: Prepared,
        settings: Settings,
        gate: Gate,
        metric: Metric | None,
        journal: Journal = NOTHING_KEPT,
    ) -> None:
        """Nothing is computed yet."""
        self.prepared, self.settings, self.gate, self.metric = prepared, settings, gate, metric
        self.journal = journal
        self.fed = prepared.as_pixels() if settings.uint8_input else prepared
        """What the files are fed with; the original model takes what is in ``prepared``."""
        self.seconds: dict[str, float] = {}
        self.hubs: dict[Key, Hub] = {}
        self.notes: list[str] = []
        if prepared.model.compressed:
            self.notes.append(f"'original' is {prepared.model.origin} as compress wrote it; its loss comes on top")
        self.early_steps: list[str] = []
        self.findings: list[Finding] = []
        """Of these steps; hubs have their own."""
        self.graph: FloatGraph
        self.reference: FloatGraph
        self.ranges: Ranges | None = None
        self.lowering_check: tuple[Check, ...] = ()
        self.judge: Judge

    @classmethod
    def behind(
        cls,
        prepared: Prepared,
        settings: Settings,
        gate: Gate,
        target: Target,
        hubs: Mapping[Precision, Hub],
        ranges: Ranges | None,
    ) -> Road:
        """A road of which only the last part is left, `write`: its hubs were made elsewhere."""
        road = cls(prepared, settings, gate, None)
        road.graph = road.reference = next(iter(hubs.values())).graph
        road.ranges = ranges
        road.hubs = {_key(target, precision, ()): hub for precision, hub in hubs.items()}
        road.judge = Judge(road.reference, prepared, prepared, settings, gate, None)
        return road

    def hub(self, target: Target, precision: Precision, steps: tuple[str, ...]) -> Hub:
        """The hub that a file was written from, which names the steps it went through."""
        return self.hubs[_key(target, precision, steps)]

    def lower(self, chosen: Sequence[Target], given: Ranges | None) -> None:
        """Model-stage steps, lowering, graph-stage steps, calibration (where somebody will need it)."""
        from deploykit.hub.plan import plan as plan_integers
        from deploykit.hub.running import is_large

        target = chosen[0]
        context = step_context(self.prepared, self.settings, target, self.findings)
        model_steps = self._early(chosen, "model")
        graph_steps = self._early(chosen, "graph")
        hub_steps = self._late(chosen)
        every = [*model_steps, *graph_steps, *(step for _, _, step in hub_steps)]
        steps.refuse_behind_exits(every)
        for step in every:
            if isinstance(step, Foresees):
                step.foresee(context)
        model = self.prepared.model
        module = model.module
        with self._phase("lower"), status("lowering to ONNX"):
            self.reference = steps.float_graph(model, self.prepared.example)
        with self._phase("rehearse"):
            self._rehearse(chosen, final=not model_steps)
            steps.refuse_untrainable(self.reference, [*graph_steps, *(step for _, _, step in hub_steps)])
        self._compare()
        if self.metric is not None or is_large(self.reference.model):
            self.judge.original()  # a metric that fails is refused before any long work
            self.judge.few()  # while nothing else is in memory
        with self._phase("compress"):
            for step in model_steps:
                module = self._run(step, module, context)
                if isinstance(step, Follows) and step.follows_another:
                    self._begin_again(module, step)
                    context = step_context(self.prepared, self.settings, target, self.findings)
        model = self.prepared.model
        with self._phase("lower"), status("lowering to ONNX"):
            same = module is model.module
            self.graph = self.reference if same else steps.float_graph(model, self.prepared.example, module)
        self.notes += self.graph.notes
        with self._phase("graph steps"):
            for step in graph_steps:
                self.graph = self._run(step, self.graph, context)
        if given is not None and given.graph != self.graph.hash:
            raise DeploykitError(
                f"--ranges were measured on another graph ({given.graph}; this model lowers to {self.graph.hash}). "
                "Leave --ranges out to calibrate again."
            )
        for each in chosen:
            plan_integers(self.graph.model.graph, each.quant, self.settings.keep_float)  # refuses names of no layer
        for each, precision, step in hub_steps:
            if isinstance(step, Rehearses):
                with status("looking at the hub before the calibration"):
                    step.rehearse(self._stand_in(self.graph, each, precision))
        self.ranges = given
        if given is not None and self.prepared.held_out:
            self.notes.append("the samples scored on may be among those that --ranges were measured on")
        wanted = [p for t in chosen for p in self._asked(t)]
        if given is not None and "calibration" not in self.prepared.data and self.settings.correction:
            self.notes.append(
                "--ranges without --calib: what rounding costs was not corrected, which needs the samples"
            )
        if given is None and "calibration" in self.prepared.data and any(map(needs_calibration, wanted)):
            with self._phase("calibrate"):
                self.ranges = steps.calibrate(
                    self.graph, self.prepared.data["calibration"], self.settings.thresholds, model.module,
                    as_lowered=self.graph is self.reference and not model.compressed,
                )  # fmt: skip
        if self.ranges is not None:
            self.notes += [*self.prepared.made_up, *self.ranges.notes]

    def _begin_again(self, module: Any, step: Pass) -> None:
        """From here on steps and files are compared with what a step made that followed another model."""
        self.prepared = replace(self.prepared, model=replace(self.prepared.model, module=module))
        self.reference = steps.float_graph(self.prepared.model, self.prepared.example)
        self._compare()
        self.notes.append(f"'original' is the model as {step!r} made it, which followed another one")

    def _compare(self) -> None:
        """Everything that follows is compared with the reference, which has to answer as the model does."""
        from deploykit.check import check_lowering

        model = self.prepared.model
        original = model.onnx or (model.program.module() if model.program is not None else model.module)
        assert original is not None
        self.lowering_check = (check_lowering(self.reference, original, self.prepared.example),)
        self.judge = Judge(self.reference, self.prepared, self.fed, self.settings, self.gate, self.metric)
        self.judge.check_labels()

    def _asked(self, target: Target) -> tuple[Precision, ...]:
        """What would be written for a target if there is data enough."""
        return self.settings.precisions or target.precisions

    def _early(self, chosen: Sequence[Target], stage: Stage) -> list[Pass]:
        """The steps of a stage in front of the hub. All targets and precisions share what they make, so what one of
        them gets without being asked (equalizing, which changes no answer) all get."""
        settings, calibrated = self.settings, "calibration" in self.prepared.data
        found: dict[str, Pass] = {}
        for target in chosen:
            for numbers, corrected in dict.fromkeys(
                (spec_of(target.quant, p), is_corrected(p)) for p in self._asked(target)
            ):
                each = replace(target, quant=numbers)
                automatic = settings.correction and calibrated and corrected
                planned = plan(settings.recipe, each, self.prepared.have, automatic, self.prepared.model.enters)
                found |= {repr(p.step): p.step for p in planned if p.step.stage == stage and not p.left_out}
        return list(found.values())

    def _late(self, chosen: Sequence[Target]) -> list[tuple[Target, Precision, Pass]]:
        """The hub steps of all files that would be written, as `_hub` runs them."""
        return [
            (target, precision, p.step)
            for target in chosen
            for precision in self._asked(target)
            if needs_calibration(precision)
            for p in self._hub_steps(replace(target, quant=spec_of(target.quant, precision)), precision)
        ]

    def _rehearse(self, chosen: Sequence[Target], final: bool) -> None:
        """Exports the original model and throws the files away: operators, operator sets, options and budgets that an
        exporter cannot serve are refused before anything is trained or calibrated.

        Float files show it for integers with the target's own numbers, where it takes floats. ``final``: no step will
        make the model smaller.
        """
        problems: dict[str, None] = {}  # of all the targets, so that one look is enough
        for target in chosen:
            asked = self._asked(target)
            floats = [p for p in asked if not is_quantized(p)] or [p for p in target.precisions if p == "fp32"]
            tried = [*floats, *(p for p in asked if is_quantized(p) and (FORMATS[p].numbers or not floats))]
            try:
                hubs = {p: self._take_pixels(self._stand_in(self.reference, target, p), target).hub for p in tried}
                exporters.rehearse(exporters.load(target.exporter), hubs, target, final)
            except DeploykitError as error:
                problems[str(error)] = None
        hubs = {}
        gc.collect()  # graphs are cycles; large ones may not wait
        if problems:
            raise DeploykitError("\n".join(problems))

    def _stand_in(self, graph: FloatGraph, target: Target, precision: Precision) -> Hub:
        """A network; in integers, by the ranges of two samples: what is refused hardly depends on scales."""
        data = self.prepared.data.get("calibration") or self.prepared.judged
        return stand_in(graph, data, target, precision, self.settings.keep_float)

    def write(self, target: Target, folder: Path, request: Request) -> Manifest:
        """Everything for one target, into an empty folder."""
        from deploykit import bench
        from deploykit.check import shrink_notes
        from deploykit.dkz.artifact import pack_artifact
        from deploykit.hub.analysis.sizes import described
        from deploykit.hub.graph import specs
        from deploykit.report import write_usage

        exporter = exporters.load(target.exporter)
        chosen, notes = precisions(target, self.settings.precisions, self.ranges is not None)
        hubs, hub_steps, why, border = self._fed_hubs(target, chosen)
        first = next(iter(hubs.values()))
        with self._phase(f"write {target.name}"):
            files = tuple(
                replace(file, steps=hub_steps[file.precision]) for file in exporter.export(hubs, target, folder)
            )
        packed: tuple[Finding, ...] = ()
        if self.settings.pack:
            with self._phase(f"pack {target.name}"):
                packed = pack_artifact(folder, files)
        with self._phase(f"check {target.name}"):
            scores, checks, operators = self.judge.evaluate(hubs, target, folder, files, self.reference is self.graph)
            self.judge.golden(hubs, target, folder, files).save(folder)
        manifest = Manifest(
            target=target.name,
            exporter=target.exporter,
            model=self.prepared.model.origin,
            request=replace(request, settings=replace(self.settings, overwrite=False), gate=self.gate),
            steps=(*self.early_steps, *dict.fromkeys(step for done in hub_steps.values() for step in done)),
            graph=self.graph.hash,
            inputs=specs(list(first.graph.model.graph.inputs)),
            outputs=specs(list(first.graph.model.graph.outputs)),
            files=files,
            stored=(),
            data={role: Source(d.origin, len(d), d.hash) for role, d in self.prepared.data.items()},
            preprocess=self.fed.preprocess,
            checks=(*self.lowering_check, *border, *checks),
            scores=tuple(scores),
            operators=tuple(operators),
            layers=tuple(dict.fromkeys(layer for hub in hubs.values() for layer in described(hub))),
            findings=(
                *self.findings,
                *dict.fromkeys(found for hub in hubs.values() for found in hub.findings),
                *packed,
            ),
            classes=next((d.classes for d in self.prepared.data.values() if d.classes), ()),
            notes=(
                *self.notes,
                *self.judge.notes,
                *notes,
                *why,
                *self.judge.held_out(),
                *self._unlike_asked(target),
                *([] if scores else [NOT_EVALUATED]),
                *shrink_notes(folder, files),
            ),
            versions=versions(),
            machine=this_machine(),
        )
        if self.ranges is not None and any(map(needs_calibration, chosen)):
            (folder / "ranges.json").write_text(self.ranges.to_json(), encoding="utf-8")
        write_usage(folder, manifest)
        manifest = replace(manifest, stored=stored_files(folder))
        manifest.save(folder)
        if self.settings.benchmark:
            with self._phase(f"benchmark {target.name}"):
                measurements, advice = bench.measure_artifact(folder, self.fed.example, threads=self.settings.threads)
            manifest = replace(manifest, measurements=measurements, advice=advice)
        manifest = replace(manifest, seconds={k: round(v, 3) for k, v in self.seconds.items()})
        manifest.save(folder)
        return manifest

    def _unlike_asked(self, target: Target) -> list[str]:
        """The steps that ran although the target cannot profit from them, and the optional ones that did not run."""
        planned = plan(self.settings.recipe, target, self.prepared.have, False, self.prepared.model.enters)
        return [
            f"{p.step!r} was left out: it {p.refusal}" if p.optional else f"--force ran {p.step!r}: it {p.refusal}"
            for p in planned
            if p.refusal
        ]

    def _fed_hubs(
        self, target: Target, chosen: Sequence[Precision]
    ) -> tuple[dict[Precision, Hub], dict[Precision, tuple[str, ...]], tuple[str, ...], tuple[Check, ...]]:
        """The hub of every precision as its file is written from it, the hub steps it went through, what the user
        should know, and what folding pixels cost."""
        source = self.fed.data.get("calibration")
        samples = next(source.batches(GOLDEN)).inputs if source is not None else {}
        hubs: dict[Precision, Hub] = {}
        done: dict[Precision, tuple[str, ...]] = {}
        fed: dict[int, Hub] = {}  # by the hub before: precisions that share one go on sharing it
        notes: dict[str, None] = {}
        border: tuple[Check, ...] = ()
        for precision in chosen:
            hub, done[precision] = self._hub(target, precision)
            if id(hub) not in fed:
                taken = self._take_pixels(hub, target)
                fed[id(hub)] = replace(taken.hub, samples=samples)
                own = f"{precision}: " if FORMATS[precision].numbers else ""
                notes |= dict.fromkeys(f"{own}{text}" for text in taken.notes)
                if taken.folded and not border:  # the same in every precision
                    border = (self._border(taken, precision),)
            hubs[precision] = fed[id(hub)]
        return hubs, done, tuple(notes), border

    def _hub(self, target: Target, precision: Precision) -> tuple[Hub, tuple[str, ...]]:
        """The hub of a precision after its hub steps, and these; made once for all files that want the same."""
        from deploykit.hub.graph import Hub
        from deploykit.hub.quantize import quantize
        from deploykit.hub.weight_only import quantize_weights

        asked = target
        target = replace(target, quant=spec_of(target.quant, precision))
        chosen = self._hub_steps(target, precision)
        done = tuple(repr(p.step) for p in chosen)  # targets of one spec may profit from different steps
        key = _key(asked, precision, done)
        if key in self.hubs:
            return self.hubs[key], done
        if not is_quantized(precision):
            self.hubs[key] = Hub(self.graph, target.quant)
            return self.hubs[key], done
        if not needs_calibration(precision):
            with self._phase(f"quantize {target.name}"):
                self.hubs[key] = quantize_weights(self.graph, target.quant, self.settings.keep_float)
            return self.hubs[key], done
        assert self.ranges is not None
        with self._phase(f"quantize {target.name}"):
            hub = quantize(self.graph, self.ranges, target.quant, self.settings.thresholds, self.settings.keep_float)
        context = step_context(self.prepared, self.settings, target)
        for p in chosen:
            if not p.automatic:
                say(f"running {p.step!r} for {target.name} {precision}")
            journal = self.journal.of(hub.bytes, self.graph.hash, self.ranges.data)
            with self._phase(f"{type(p.step).__name__} {target.name}"):
                hub = p.step(hub, remembering(context, journal, p.step))
        self.hubs[key] = hub
        return hub, done

    def _hub_steps(self, target: Target, precision: Precision) -> list[Planned]:
        """The steps that the hub of a precision goes through; all but bias correction choose integers."""
        if is_corrected(precision):
            planned = plan(self.settings.recipe, target, self.prepared.have, self.settings.correction)
        elif needs_calibration(precision) and self.settings.correction:
            step = passes.build(Step("bias_correct"))
            planned = (Planned(step, refusal(step, target, self.prepared.have), automatic=True),)
        else:
            planned = ()
        return [p for p in planned if p.step.stage == "hub" and not p.left_out]

    def _take_pixels(self, hub: Hub, target: Target) -> Fed:
        """The hub as the files are written from it."""
        from deploykit.hub.pixels import Fed, take_pixels

        if not self.settings.uint8_input:
            return Fed(hub)
        assert self.prepared.preprocess is not None
        return take_pixels(hub, self.prepared.preprocess, self._images, fold=target.pixels == "folded")

    def _border(self, fed: Fed, precision: Precision) -> Check:
        """What folding the preprocessing of pixels costs."""
        from deploykit.check import check_border
        from deploykit.hub.pixels import folded_floats

        data = self.fed.evaluation or self.fed.data["calibration"]
        assert self.prepared.preprocess is not None
        folded = folded_floats(self.graph, self.prepared.preprocess, self._images, fed.folded)
        return check_border(fed.hub.graph, folded, data.spread(HUB_SAMPLES), precision)

    @property
    def _images(self) -> list[str]:
        """The inputs that take pixels."""
        return [name for name, array in self.fed.example.items() if array.dtype == np.uint8 and array.ndim == 4]

    def _run(self, step: Pass, subject: Any, context: Context) -> Any:
        from deploykit.training.notes import weights_hash

        say(f"running {step!r}")
        journal = self.journal.of(weights_hash(subject) if step.stage == "model" else subject.hash)
        result = step(subject, remembering(context, journal, step))
        self.early_steps.append(repr(step))
        return result

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started
