"""The whole road: model and data in, steps, hub, files, checks, measurements, manifest. One direction, no way back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit import exporters, passes
from deploykit.core.artifact import Artifact, Check, File
from deploykit.core.context import Context, Role
from deploykit.core.data import DataSet, Preprocess
from deploykit.core.errors import DeploykitError, GateFailed, unknown
from deploykit.core.files import folder_in_place, refuse_existing
from deploykit.core.manifest import Manifest, OperatorError, Score, Source, stored_files, versions
from deploykit.core.progress import say, status
from deploykit.core.ranges import Ranges
from deploykit.core.recipe import Pass, Recipe, dump_recipe
from deploykit.core.target import Precision, QuantSpec, Target
from deploykit.planning import available, plan, precisions
from deploykit.trainer import require_accelerate

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from deploykit.check import Answers, Gate, Metric
    from deploykit.hub.graph import FloatGraph, Hub
    from deploykit.models import Model

HELD_OUT = 5
"""Without evaluation data every fifth calibration sample is held out: spread, because folders are sorted by class."""
HELD_OUT_LABEL = "every fifth calibration sample, held out"
NOT_EVALUATED = f"the files were not evaluated: give --eval, or at least {HELD_OUT} samples in --calib"
GOLDEN = 8
"""Real samples that exporters may use, e.g. as golden inputs to be compared on the device."""
WORST = 20
"""How many operators are named in the manifest."""
HUB_SAMPLES = 200
"""The hub runs without an optimizer, so files are compared with it on at most this many samples."""


@dataclass(frozen=True)
class Settings:
    """What an export may be told; see the options of ``deploykit export``."""

    recipe: Recipe = field(default_factory=Recipe)
    thresholds: str = "minmax"
    precisions: tuple[Precision, ...] = ()
    """Empty: those of the target."""
    bias_correction: bool = True
    keep_float: tuple[str, ...] = ()
    """Layers that stay in float, by name."""
    seed: int = 0
    force: bool = False
    """Run steps the target cannot profit from."""
    overwrite: bool = False
    benchmark: bool = True
    threads: int = 1


@dataclass(frozen=True)
class Prepared:
    """What one run shares between its targets."""

    model: Model
    data: Mapping[Role, DataSet]
    example: Mapping[str, NDArray[Any]]
    preprocess: Preprocess | None
    held_out: bool
    """Whether the evaluation data was taken from the calibration data."""

    @property
    def evaluation(self) -> DataSet | None:
        """What the files are scored on."""
        return self.data.get("eval") or self.data.get("holdout")


def prepare(model: Model, data: Mapping[Role, DataSet], example: Mapping[str, NDArray[Any]] | None) -> Prepared:
    """Splits off evaluation data where none was given, and takes an example batch.

    Raises:
        DeploykitError: there is neither calibration data nor an example input.
    """
    held_out = False
    given = dict(data)
    if "calibration" in given and "eval" not in given:
        calibration = given["calibration"]
        positions = np.arange(len(calibration))
        last = positions % HELD_OUT == HELD_OUT - 1
        if last.any():
            given["holdout"] = calibration.pick(positions[last])
            given["calibration"] = calibration.pick(positions[~last])
            held_out = True
    source = given.get("calibration") or given.get("eval") or given.get("train")
    if source is not None:
        example = next(source.batches(2)).inputs
    elif example is None:
        example = _example(model)
    else:
        _check_example(example, model)
    if len(next(iter(example.values()))) == 1:
        example = {name: np.concatenate([a, a]) for name, a in example.items()}
    preprocess = None if source is None else source.preprocess
    return Prepared(model, given, example, preprocess, held_out)


def _check_example(example: Mapping[str, NDArray[Any]], model: Model) -> None:
    """Refuses example inputs that a .pt2 or .onnx does not have; a module's forward is asked when it is lowered."""
    if model.module is not None:
        return
    from deploykit.models import input_specs

    names = [spec.name for spec in input_specs(model)]
    for name in [*example, *names]:
        if name not in names:
            raise unknown("input", name, names)
        if name not in example:
            raise DeploykitError(f"{model.origin} takes {', '.join(names)}; there is no example for {name}")


def _example(model: Model) -> dict[str, NDArray[Any]]:
    """Random inputs of the shapes a .pt2 or .onnx declares, for a model without sample data."""
    from deploykit.models import input_specs

    random = np.random.default_rng(0)
    found = {}
    for spec in input_specs(model):
        if not spec.dtype:
            raise DeploykitError(
                f"what does '{spec.name}' look like? Give sample data (--calib) or the shape, "
                f"e.g. --input {spec.name}=1x3x224x224"
            )
        if any(isinstance(d, str) for d in spec.shape[1:]):
            raise DeploykitError(f"input '{spec.name}' has free dimensions {spec.shape}: give --input {spec.name}=...")
        shape = [d if isinstance(d, int) else 2 for d in spec.shape]
        whole = not spec.dtype.startswith("float")
        array = random.integers(0, 2, shape) if whole else random.standard_normal(shape)
        found[spec.name] = array.astype(spec.dtype)
    return found


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


def export(
    prepared: Prepared,
    chosen: Sequence[Target],
    folders: Sequence[Path],
    settings: Settings,
    gate: Gate,
    metric: Metric | None = None,
    ranges: Ranges | None = None,
) -> list[Artifact]:
    """Runs the road for every target and writes one artifact folder per target.

    One lowering and one calibration serve all targets; targets with equal QuantSpecs share one hub.

    Raises:
        DeploykitError: bad request; nothing is left behind.
        GateFailed: an artifact was written but failed a check.
    """
    for folder in folders:
        refuse_existing(folder, settings.overwrite)
    have = available(prepared.data)
    calibrated = "calibration" in prepared.data or ranges is not None
    for target in chosen:
        exporters.load(target.exporter).runtime()  # a missing extra is said before any long work
        for planned in plan(settings.recipe, target, have, settings.bias_correction, prepared.model.enters):
            cannot_pay = "cannot pay" in planned.refusal
            if planned.refusal and not planned.automatic and not (settings.force and cannot_pay):
                hint = " --force runs it all the same." if cannot_pay else ""
                raise DeploykitError(f"step {planned.step!r} {planned.refusal}.{hint}")
            if "train" in planned.step.needs:
                require_accelerate()
        precisions(target, settings.precisions, calibrated)
    road = _Road(prepared, settings, gate, metric)
    road.lower(chosen, ranges)
    with ExitStack() as together:  # all the folders appear, or none
        works = [together.enter_context(folder_in_place(folder, settings.overwrite)) for folder in folders]
        manifests = [road.write(target, work) for target, work in zip(chosen, works, strict=True)]
    artifacts = []
    failed: list[str] = []
    for target, folder, manifest in zip(chosen, folders, manifests, strict=True):
        exporter = exporters.load(target.exporter)
        artifacts.append(
            Artifact(
                folder, target.name, target.exporter, manifest.files, manifest.inputs, manifest.outputs, exporter.load
            )
        )
        failed += [
            f"{folder}: {c.name} {c.value:.4g}, bound {c.bound:.4g} ({c.precision}; {c.detail})"
            for c in manifest.checks
            if c.passed is False and c.value is not None and c.bound is not None
        ]
        if not manifest.passed and manifest.operators:
            worst = ", ".join(f"{o.layer} ({o.operator}, {o.sqnr_db:.1f} dB)" for o in manifest.operators[:3])
            failed.append(f"{folder}: layers that lose most in int8: {worst}")
    if failed:
        raise GateFailed(
            "the files were written but failed their checks:\n  " + "\n  ".join(failed)
            + "\nTry --thresholds mse, more calibration data, the step qat, or --keep-float NAME for a bad layer."
        )  # fmt: skip
    return artifacts


class _Road:
    """One run: what has been computed so far, so that targets share it."""

    def __init__(self, prepared: Prepared, settings: Settings, gate: Gate, metric: Metric | None) -> None:
        self.prepared, self.settings, self.gate, self.metric = prepared, settings, gate, metric
        self.seconds: dict[str, float] = {}
        self.hubs: dict[QuantSpec, tuple[Hub, tuple[str, ...]]] = {}
        self.notes: list[str] = []
        self.early_steps: list[str] = []
        self.graph: FloatGraph
        self.reference: FloatGraph
        self.ranges: Ranges | None = None
        self.lowering_check: tuple[Check, ...] = ()
        self.reference_answers: Answers | None = None

    def lower(self, chosen: Sequence[Target], given: Ranges | None) -> None:
        """Model-stage steps, lowering, graph-stage steps, calibration (where somebody will need it)."""
        from deploykit.check import check_lowering

        target = chosen[0]
        context = _context(self.prepared, self.settings, target)
        early = [p for p in plan(self.settings.recipe, target, available(self.prepared.data)) if p.step.stage != "hub"]
        model_steps = [p.step for p in early if p.step.stage == "model"]
        graph_steps = [p.step for p in early if p.step.stage == "graph"]
        model = self.prepared.model
        module = model.module
        with self._phase("compress"):
            for step in model_steps:
                module = self._run(step, module, context)
        with self._phase("lower"), status("lowering to ONNX"):
            self.graph = float_graph(model, self.prepared.example, module)
            same = module is model.module
            self.reference = self.graph if same else float_graph(model, self.prepared.example)
        self.notes += self.graph.notes
        if module is not None and model.module is not None:
            self.lowering_check = (check_lowering(self.reference, model.module, self.prepared.example),)
        self._check_labels()
        with self._phase("graph steps"):
            for step in graph_steps:
                self.graph = self._run(step, self.graph, context)
        if given is not None and given.graph != self.graph.hash:
            raise DeploykitError(
                f"--ranges were measured on another graph ({given.graph}; this model lowers to {self.graph.hash}). "
                "Leave --ranges out to calibrate again."
            )
        self.ranges = given
        wanted = [p for t in chosen for p in self.settings.precisions or t.precisions]
        if given is not None and "calibration" not in self.prepared.data and self.settings.bias_correction:
            self.notes.append("--ranges without --calib: biases were not corrected, which needs the samples")
        if given is None and "calibration" in self.prepared.data and any("int8" in p for p in wanted):
            with self._phase("calibrate"):
                self.ranges = calibrate(self.graph, self.prepared.data["calibration"], self.settings.thresholds)

    def write(self, target: Target, folder: Path) -> Manifest:
        """Everything for one target, into an empty folder."""
        from deploykit import bench
        from deploykit.check import shrink_notes
        from deploykit.hub.graph import specs
        from deploykit.report import write_usage

        exporter = exporters.load(target.exporter)
        chosen, notes = precisions(target, self.settings.precisions, self.ranges is not None)
        hub, hub_steps = self._hub(target, any("int8" in p for p in chosen))
        source = self.prepared.data.get("calibration")
        samples = next(source.batches(GOLDEN)).inputs if source is not None else {}
        with self._phase(f"write {target.name}"):
            hub = replace(hub, samples=samples)
            files = exporter.export(hub, target, folder, chosen)
        with self._phase(f"check {target.name}"):
            scores, checks, operators = self._evaluate(hub, target, folder, files)
        manifest = Manifest(
            target=target.name,
            exporter=target.exporter,
            model=self.prepared.model.origin,
            recipe=dump_recipe(self.settings.recipe),
            steps=(*self.early_steps, *hub_steps),
            seed=self.settings.seed,
            graph=self.graph.hash,
            thresholds=self.settings.thresholds,
            inputs=specs(list(self.graph.model.graph.inputs)),
            outputs=specs(list(self.graph.model.graph.outputs)),
            files=files,
            stored=(),
            data={role: Source(d.origin, len(d), d.hash) for role, d in self.prepared.data.items()},
            preprocess=self.prepared.preprocess,
            checks=(*self.lowering_check, *checks),
            scores=tuple(scores),
            operators=tuple(operators[:WORST]),
            classes=next((d.classes for d in self.prepared.data.values() if d.classes), ()),
            notes=(
                *self.notes,
                *notes,
                *self._forced(target),
                *([] if scores else [NOT_EVALUATED]),
                *shrink_notes(folder, files),
            ),
            versions=versions(),
        )
        if self.ranges is not None:
            (folder / "ranges.json").write_text(self.ranges.to_json(), encoding="utf-8")
        write_usage(folder, manifest)
        manifest = replace(manifest, stored=stored_files(folder))
        manifest.save(folder)
        if self.settings.benchmark:
            with self._phase(f"benchmark {target.name}"):
                measurements, advice = bench.measure_artifact(
                    folder, self.prepared.example, threads=self.settings.threads
                )
            manifest = replace(manifest, measurements=measurements, notes=(*manifest.notes, *advice))
        manifest = replace(manifest, seconds={k: round(v, 3) for k, v in self.seconds.items()})
        manifest.save(folder)
        return manifest

    def _forced(self, target: Target) -> list[str]:
        """The steps that ran although the target cannot profit from them."""
        planned = plan(self.settings.recipe, target, available(self.prepared.data))
        return [f"--force ran {p.step!r}: it {p.refusal}" for p in planned if p.refusal and not p.automatic]

    def _hub(self, target: Target, integer: bool) -> tuple[Hub, tuple[str, ...]]:
        """The hub of the target's spec after its hub steps, made once per spec."""
        from deploykit.hub.graph import Hub
        from deploykit.hub.quantize import quantize

        if not integer or self.ranges is None:
            return Hub(self.graph, target.quant), ()
        if target.quant not in self.hubs:
            with self._phase(f"quantize {target.name}"):
                hub = quantize(
                    self.graph, self.ranges, target.quant, self.settings.thresholds, self.settings.keep_float
                )  # fmt: skip
            context = _context(self.prepared, self.settings, target)
            done = []
            planned = plan(self.settings.recipe, target, available(self.prepared.data), self.settings.bias_correction)
            for p in planned:
                if p.step.stage != "hub" or (p.automatic and p.refusal):
                    continue
                if not p.automatic:
                    say(f"running {p.step!r} for {target.name}")
                with self._phase(f"{type(p.step).__name__} {target.name}"):
                    hub = p.step(hub, context)
                done.append(repr(p.step))
            self.hubs[target.quant] = hub, tuple(done)
        return self.hubs[target.quant]

    def _run(self, step: Pass, subject: Any, context: Context) -> Any:
        say(f"running {step!r}")
        result = step(subject, context)
        self.early_steps.append(repr(step))
        return result

    def _check_labels(self) -> None:
        """Refuses labels that are no classes of this model; what a metric of the user's reads is its own business."""
        from deploykit.check import class_scores
        from deploykit.exporters import to_onnx
        from deploykit.hub.running import session
        from deploykit.sources import check_labels

        data = self.prepared.evaluation
        if data is None or data.labels is None or self.metric is not None:
            return
        scores = class_scores(to_onnx.runner(session(self.reference.bytes))(self.prepared.example))
        if scores is not None:
            check_labels(data, scores.shape[1])

    def _evaluate(
        self, hub: Hub, target: Target, folder: Path, files: Sequence[File]
    ) -> tuple[list[Score], list[Check], Sequence[OperatorError]]:
        """Answers of every file on the evaluation data, against labels, the original model and the hub."""
        from deploykit import check
        from deploykit.exporters import to_onnx
        from deploykit.hub.running import session

        judged = self.prepared.evaluation is not None
        data = self.prepared.evaluation or self.prepared.data.get("calibration")
        data = data or DataSet.of(dict(self.prepared.example), origin="the example inputs")
        label = data.origin if not self.prepared.held_out else HELD_OUT_LABEL
        exporter = exporters.load(target.exporter)
        threads = self.settings.threads
        if self.reference_answers is None:
            run = to_onnx.runner(session(self.reference.bytes, threads))
            self.reference_answers = check.answer(run, data, "original model")
        baseline = check.score(self.reference_answers, self.reference_answers, "original", label, self.metric)
        scores = [baseline]
        checks = [] if judged else [Check("accuracy", "all", None, None, None, NOT_EVALUATED)]
        operators: Sequence[OperatorError] = ()
        for file in files:
            answers = check.answer(exporter.load(folder / file.path, threads), data, f"{target.name} {file.precision}")
            found = check.score(answers, self.reference_answers, file.precision, label, self.metric)
            scores.append(found)
            if not judged:  # these inputs show whether the files compute the network, not how well it answers
                found = replace(found, metric=None, agreement=None)
            checks += check.check_score(found, baseline, self.gate, exact=self.reference is self.graph)
            if "int8" in file.precision:
                checks.append(check.check_integer(hub, file))
                part = data.spread(HUB_SAMPLES)
                hub_run = to_onnx.runner(session(hub.bytes, threads, optimize=False))
                ours = check.answer(exporter.load(folder / file.path, threads), part, "file against hub")
                checks += check.check_file_against_hub(
                    ours, check.answer(hub_run, part, "hub"), file.precision, self.gate
                )  # fmt: skip
            if file.precision == "int8":
                found_checks, operators = check.check_operators(hub, exporter, target, data, self.gate)
                checks += found_checks
        return scores if judged else [], checks, operators

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started


def calibrate(graph: FloatGraph, data: DataSet, thresholds: str = "minmax") -> Ranges:
    """Statistics of a float graph on calibration data, with histograms if the threshold method needs them."""
    from deploykit.calibration.observe import observe
    from deploykit.calibration.thresholds import METHODS, NEED_HISTOGRAM
    from deploykit.hub.quantize import observed
    from deploykit.hub.running import summarizing

    if thresholds not in METHODS:
        raise unknown("threshold method", thresholds, METHODS)
    names, channels = observed(graph)
    run = summarizing(graph.model, names, channels, values=thresholds in NEED_HISTOGRAM)
    return observe(run, graph.hash, data)


def compress(prepared: Prepared, settings: Settings, target: Target, folder: Path) -> tuple[str, ...]:
    """Runs the model-stage steps of a recipe and writes a folder that `load_model` and ``export`` read.

    Raises:
        DeploykitError: the recipe has other stages' steps, or the model is no PyTorch module.
    """
    from deploykit.models import save_compressed

    refuse_existing(folder, settings.overwrite)
    steps = [passes.build(step) for step in settings.recipe.steps]
    for step in steps:
        if step.stage != "model":
            raise DeploykitError(
                f"compress runs model-stage steps; {step!r} works on the {step.stage}. Use `deploykit export`."
            )
    module = prepared.model.module
    if module is None:
        raise DeploykitError(f"{prepared.model.origin} holds no PyTorch module to compress")
    context = _context(prepared, settings, target)
    for step in steps:
        say(f"running {step!r}")
        module = step(module, context)
    with folder_in_place(folder, settings.overwrite) as work:
        save_compressed(module, work, prepared.model.origin)
    return tuple(repr(step) for step in steps)


def _context(prepared: Prepared, settings: Settings, target: Target) -> Context:
    from deploykit.cost import cost
    from deploykit.losses import load_loss
    from deploykit.trainer import Trainer

    loss = settings.recipe.train.loss
    return Context(
        target=target,
        data=prepared.data,
        example=prepared.example,
        original=_teacher(prepared.model),
        trainer=Trainer(settings.recipe.train, settings.seed),
        loss=load_loss(loss) if loss else None,
        cost=lambda module: cost(module, prepared.example),
        seed=settings.seed,
    )


def _teacher(model: Model) -> nn.Module | None:
    """The model as it came in, if torch can run it."""
    if model.program is not None:
        return model.program.module()
    return model.module
