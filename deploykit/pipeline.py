"""The whole road: model and data in, steps, hub, files, checks, measurements, manifest. One direction, no way back."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit import exporters, passes, targets, trial
from deploykit.core.artifact import Artifact, Check, File, Runner
from deploykit.core.context import Context, Role
from deploykit.core.data import DataSet, Preprocess
from deploykit.core.errors import DeploykitError, GateFailed, unknown
from deploykit.core.files import folder_in_place, refuse_existing
from deploykit.core.golden import HUB, ORIGINAL, SAMPLES, Golden, some_samples, some_values
from deploykit.core.machine import this_machine
from deploykit.core.manifest import Layer, Manifest, OperatorError, Score, Source, stored_files, versions
from deploykit.core.progress import say, status
from deploykit.core.ranges import Ranges
from deploykit.core.recipe import Pass
from deploykit.core.request import Gate, Request
from deploykit.core.request import Settings as Settings
from deploykit.core.target import Need, QuantSpec, Target
from deploykit.planning import available, plan, precisions, refusal
from deploykit.trainer import require_accelerate
from deploykit.trial import Exam

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from deploykit.check import Answers, Metric
    from deploykit.hub.graph import FloatGraph, Hub
    from deploykit.models import Model

HELD_OUT = 5
"""Without evaluation data every fifth calibration sample is held out: spread, because folders are sorted by class."""
HELD_OUT_LABEL = "every fifth calibration sample, held out"
NO_LABELS = "the evaluation data has no labels"
NOT_EVALUATED = f"the files were not evaluated: give --eval, or at least {HELD_OUT} samples in --calib"
GOLDEN = 8
"""Real samples that exporters may use, e.g. as golden inputs to be compared on the device."""
ANY_TARGET = "x86"
"""What steps are told about the device where none is named."""
HUB_SAMPLES = 200
"""The hub runs without an optimizer, so files are compared with it on at most this many samples."""


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

    @property
    def have(self) -> list[Need]:
        """What there is of what passes may need."""
        return available(self.data, teacher=self.model.onnx is None)

    def as_pixels(self) -> Prepared:
        """The same samples as raw pixels, for the files.

        Raises:
            DeploykitError: there are no images, or no declared preprocessing.
        """
        pixels: dict[Role, DataSet] = {role: d.as_pixels() for role, d in self.data.items() if role != "train"}
        if not pixels:
            raise DeploykitError("files that take uint8 pixels need image data: give --calib or --eval")
        source = next(iter(pixels.values()))
        return replace(self, data=pixels, example=next(source.batches(2)).inputs, preprocess=source.preprocess)


def prepare(
    model: Model, data: Mapping[Role, DataSet], example: Mapping[str, NDArray[Any]] | None, hold_out: bool = True
) -> Prepared:
    """Splits off evaluation data where none was given (unless nobody will evaluate), and takes an example batch.

    Raises:
        DeploykitError: there is neither calibration data nor an example input.
    """
    _same_shapes(data)
    held_out = False
    given = dict(data)
    if hold_out and "calibration" in given and "eval" not in given:
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


def _same_shapes(data: Mapping[Role, DataSet]) -> None:
    """Refuses data sets whose samples differ in shape: a network is exported for one."""
    known: dict[str, tuple[tuple[int, ...], str]] = {}
    for found in data.values():
        for name, array in found.sample(found.index[0]).items():
            shape, origin = known.setdefault(name, (array.shape, found.origin))
            if array.shape != shape:
                raise DeploykitError(
                    f"{found.origin}: samples of '{name}' are {_sides(array.shape)}, "
                    f"those of {origin} {_sides(shape)}; both must have one shape"
                )


def _sides(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "single numbers"


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
    requests: Sequence[Request] = (),
    device: str | None = None,
) -> list[Artifact]:
    """Runs the road for every target and writes one artifact folder per target.

    One lowering and one calibration serve all targets; targets with equal QuantSpecs share one hub.

    Args:
        requests: what was typed, one per target, for the manifests; without, that it came as Python objects.
        device: address of a device on which the files are timed and answer the evaluation data.

    Raises:
        DeploykitError: bad request; nothing is left behind. Or the device failed: the artifacts are there, checked
            here, and the message says how to go on.
        GateFailed: an artifact was written but failed a check.
    """
    for folder in folders:
        refuse_existing(folder, settings.overwrite)
    have = prepared.have
    calibrated = "calibration" in prepared.data or ranges is not None
    for target in chosen:
        exporters.load(target.exporter).runtime()  # a missing extra is said before any long work
        written, _ = precisions(target, settings.precisions, calibrated)
        for planned in plan(settings.recipe, target, have, settings.bias_correction, prepared.model.enters):
            if not planned.automatic:
                _insist(planned.step, planned.refusal, settings.force)
                if planned.step.stage == "hub" and not any("int8" in p for p in written):
                    raise DeploykitError(
                        f"step {planned.step!r} works on integers, and for '{target.name}' only {', '.join(written)} "
                        "would be written. Give --calib, ask for int8, or leave the step out."
                    )
            if "train" in planned.step.needs:
                require_accelerate()
    if device is not None:
        trial.preflight(device, chosen)
    if settings.uint8_input:
        prepared.as_pixels()  # data that cannot become pixels is refused before any long work
    if not requests:
        objects = ("the model and its data, prepared in Python",)
        requests = [Request(prepared.model.origin, t.name, objects=objects) for t in chosen]
    road = _Road(prepared, settings, gate, metric)
    road.lower(chosen, ranges)
    with ExitStack() as together:  # all the folders appear, or none
        works = [together.enter_context(folder_in_place(folder, settings.overwrite)) for folder in folders]
        manifests = [road.write(t, work, asked) for t, work, asked in zip(chosen, works, requests, strict=True)]
    if device is not None:
        manifests = trial.finish(device, folders, road.fed.example, road.exam(), settings, gate)
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


def _insist(step: Pass, why: str, force: bool) -> None:
    """Raises for a step that will not run; one that only cannot pay may be forced."""
    cannot_pay = "cannot pay" in why
    if why and not (force and cannot_pay):
        raise DeploykitError(f"step {step!r} {why}." + (" --force runs it all the same." if cannot_pay else ""))


class _Road:
    """One run: what has been computed so far, so that targets share it."""

    def __init__(self, prepared: Prepared, settings: Settings, gate: Gate, metric: Metric | None) -> None:
        self.prepared, self.settings, self.gate, self.metric = prepared, settings, gate, metric
        self.fed = prepared.as_pixels() if settings.uint8_input else prepared
        """What the files are fed with; the original model takes what is in ``prepared``."""
        self.seconds: dict[str, float] = {}
        self.hubs: dict[tuple[QuantSpec, tuple[str, ...]], Hub] = {}
        """By the numbers of a target and the hub steps that ran; a hub step reads ``hub.spec``, never a target."""
        self.notes: list[str] = []
        if prepared.model.compressed:
            self.notes.append(f"'original' is {prepared.model.origin} as compress wrote it; what that lost comes on top")
        self.early_steps: list[str] = []
        self.graph: FloatGraph
        self.reference: FloatGraph
        self.ranges: Ranges | None = None
        self.lowering_check: tuple[Check, ...] = ()
        self.baseline: tuple[Answers, Score] | None = None

    def lower(self, chosen: Sequence[Target], given: Ranges | None) -> None:
        """Model-stage steps, lowering, graph-stage steps, calibration (where somebody will need it)."""
        from deploykit.check import check_lowering
        from deploykit.hub.plan import plan as plan_integers

        target = chosen[0]
        context = _context(self.prepared, self.settings, target)
        early = [p for p in plan(self.settings.recipe, target, self.prepared.have) if p.step.stage != "hub"]
        model_steps = [p.step for p in early if p.step.stage == "model"]
        graph_steps = [p.step for p in early if p.step.stage == "graph"]
        model = self.prepared.model
        module = model.module
        with self._phase("lower"), status("lowering to ONNX"):
            self.reference = float_graph(model, self.prepared.example)
            self._rehearse(chosen)
        if module is not None:
            self.lowering_check = (check_lowering(self.reference, module, self.prepared.example),)
        self._check_labels()
        if self.metric is not None:
            self._original()  # a metric that fails is refused before any long work
        with self._phase("compress"):
            for step in model_steps:
                module = self._run(step, module, context)
        with self._phase("lower"), status("lowering to ONNX"):
            self.graph = float_graph(model, self.prepared.example, module) if model_steps else self.reference
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
        self.ranges = given
        wanted = [p for t in chosen for p in self.settings.precisions or t.precisions]
        if given is not None and "calibration" not in self.prepared.data and self.settings.bias_correction:
            self.notes.append("--ranges without --calib: biases were not corrected, which needs the samples")
        if given is None and "calibration" in self.prepared.data and any("int8" in p for p in wanted):
            with self._phase("calibrate"):
                self.ranges = calibrate(self.graph, self.prepared.data["calibration"], self.settings.thresholds)

    def _rehearse(self, chosen: Sequence[Target]) -> None:
        """Writes the float files of the original model and throws them away: operators, operator sets and options that
        an exporter cannot serve are refused before anything is trained or calibrated."""
        from deploykit.hub.graph import Hub

        problems: dict[str, None] = {}  # of all the targets, so that one look is enough
        for target in chosen:
            floats = [p for p in self.settings.precisions or target.precisions if "int8" not in p]
            floats = floats or [p for p in target.precisions if p == "fp32"]
            if not floats:
                continue
            try:
                hub, _, _ = self._take_pixels(Hub(self.reference, target.quant), target)
                with tempfile.TemporaryDirectory() as folder:
                    exporters.load(target.exporter).export(hub, target, Path(folder), floats)
            except DeploykitError as error:
                problems[str(error)] = None
        if problems:
            raise DeploykitError("\n".join(problems))

    def write(self, target: Target, folder: Path, request: Request) -> Manifest:
        """Everything for one target, into an empty folder."""
        from deploykit import bench
        from deploykit.check import shrink_notes
        from deploykit.hub.graph import specs
        from deploykit.report import write_usage

        exporter = exporters.load(target.exporter)
        chosen, notes = precisions(target, self.settings.precisions, self.ranges is not None)
        hub, hub_steps = self._hub(target, any("int8" in p for p in chosen))
        hub, border, why = self._take_pixels(hub, target)
        source = self.fed.data.get("calibration")
        samples = next(source.batches(GOLDEN)).inputs if source is not None else {}
        with self._phase(f"write {target.name}"):
            hub = replace(hub, samples=samples)
            files = exporter.export(hub, target, folder, chosen)
        with self._phase(f"check {target.name}"):
            scores, checks, operators = self._evaluate(hub, target, folder, files)
            self._golden(hub, target, folder, files).save(folder)
        manifest = Manifest(
            target=target.name,
            exporter=target.exporter,
            model=self.prepared.model.origin,
            request=replace(request, settings=replace(self.settings, overwrite=False), gate=self.gate),
            steps=(*self.early_steps, *hub_steps),
            graph=self.graph.hash,
            inputs=specs(list(hub.graph.model.graph.inputs)),
            outputs=specs(list(hub.graph.model.graph.outputs)),
            files=files,
            stored=(),
            data={role: Source(d.origin, len(d), d.hash) for role, d in self.prepared.data.items()},
            preprocess=self.fed.preprocess,
            checks=(*self.lowering_check, *border, *checks),
            scores=tuple(scores),
            operators=tuple(operators),
            layers=tuple(Layer(d.layer, d.operator) for d in hub.decisions),
            classes=next((d.classes for d in self.prepared.data.values() if d.classes), ()),
            notes=(
                *self.notes,
                *notes,
                *why,
                *self._held_out(),
                *self._forced(target),
                *([] if scores else [NOT_EVALUATED]),
                *shrink_notes(folder, files),
            ),
            versions=versions(),
            machine=this_machine(),
        )
        if self.ranges is not None and any("int8" in p for p in chosen):
            (folder / "ranges.json").write_text(self.ranges.to_json(), encoding="utf-8")
        write_usage(folder, manifest)
        manifest = replace(manifest, stored=stored_files(folder))
        manifest.save(folder)
        if self.settings.benchmark:
            with self._phase(f"benchmark {target.name}"):
                measurements, advice = bench.measure_artifact(
                    folder, self.fed.example, threads=self.settings.threads
                )
            manifest = replace(manifest, measurements=measurements, advice=advice)
        manifest = replace(manifest, seconds={k: round(v, 3) for k, v in self.seconds.items()})
        manifest.save(folder)
        return manifest

    def _held_out(self) -> list[str]:
        """That the figures come from samples of the calibration data."""
        data = self.prepared.evaluation
        if not self.prepared.held_out or data is None:
            return []
        return [f"scored on {len(data)} calibration samples that were held out (every fifth); --eval names other data"]

    def _forced(self, target: Target) -> list[str]:
        """The steps that ran although the target cannot profit from them."""
        planned = plan(self.settings.recipe, target, self.prepared.have)
        return [f"--force ran {p.step!r}: it {p.refusal}" for p in planned if p.refusal and not p.automatic]

    def _hub(self, target: Target, integer: bool) -> tuple[Hub, tuple[str, ...]]:
        """The hub of the target's spec after its hub steps, and these; made once for all targets that want the same."""
        from deploykit.hub.graph import Hub
        from deploykit.hub.quantize import quantize

        if not integer or self.ranges is None:
            return Hub(self.graph, target.quant), ()
        planned = plan(self.settings.recipe, target, self.prepared.have, self.settings.bias_correction)
        steps = [p for p in planned if p.step.stage == "hub" and not (p.automatic and p.refusal)]
        done = tuple(repr(p.step) for p in steps)  # targets of one spec may profit from different steps
        if (target.quant, done) not in self.hubs:
            with self._phase(f"quantize {target.name}"):
                hub = quantize(
                    self.graph, self.ranges, target.quant, self.settings.thresholds, self.settings.keep_float
                )  # fmt: skip
            context = _context(self.prepared, self.settings, target)
            for p in steps:
                if not p.automatic:
                    say(f"running {p.step!r} for {target.name}")
                with self._phase(f"{type(p.step).__name__} {target.name}"):
                    hub = p.step(hub, context)
            self.hubs[target.quant, done] = hub
        return self.hubs[target.quant, done], done

    def _take_pixels(self, hub: Hub, target: Target) -> tuple[Hub, tuple[Check, ...], tuple[str, ...]]:
        """The hub as the files are written from it, what folding costs, and what the user should know."""
        from deploykit.check import check_border
        from deploykit.hub.pixels import folded_floats, take_pixels

        if not self.settings.uint8_input:
            return hub, (), ()
        p, data = self.prepared.preprocess, self.fed.evaluation or self.fed.data["calibration"]
        assert p is not None
        images = [name for name, array in self.fed.example.items() if array.dtype == np.uint8 and array.ndim == 4]
        fed, notes = take_pixels(hub, p, images, fold=target.pixels == "folded")
        if hub.quantized is None or target.pixels != "folded" or notes:
            return fed, (), notes
        folded = folded_floats(self.graph, p, images)
        assert folded is not None
        return fed, (check_border(fed.graph, folded, data.spread(HUB_SAMPLES)),), notes

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

        if self.metric is not None:
            return
        data = self.prepared.evaluation
        scores = class_scores(to_onnx.runner(session(self.reference.bytes))(self.prepared.example))
        if data is None or data.labels is None or scores is None:
            if self.gate.max_drop is not None:
                why = "the model's first output is no class scores" if scores is None else NO_LABELS
                raise DeploykitError(
                    f"--max-drop {self.gate.max_drop:g} is a bound on lost accuracy, but {why}. Give --eval data with "
                    "labels, a --metric that reads what there is, or leave --max-drop out."
                )
            if data is not None and scores is not None:
                self.notes.append(f"{NO_LABELS}: files are judged by how often they answer as the original model does")
            return
        check_labels(data, scores.shape[1])

    def _evaluate(
        self, hub: Hub, target: Target, folder: Path, files: Sequence[File]
    ) -> tuple[list[Score], list[Check], Sequence[OperatorError]]:
        """Answers of every file on the evaluation data, against labels, the original model and the hub."""
        from deploykit import check
        from deploykit.exporters import to_onnx
        from deploykit.hub.running import session

        judged = self.prepared.evaluation is not None
        data = _judging(self.fed)
        exporter = exporters.load(target.exporter)
        threads = self.settings.threads
        reference, baseline = self._original()
        scores = [baseline]
        checks = [] if judged else [Check("accuracy", "all", None, None, None, NOT_EVALUATED)]
        operators: Sequence[OperatorError] = ()
        for file in files:
            answers = check.answer(exporter.load(folder / file.path, threads), data, f"{target.name} {file.precision}")
            found = check.score(answers, reference, file.precision, baseline.data, self.metric)
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
            checks += exporters.own_checks(exporter, hub, target, folder, file)
            if file.precision == "int8":
                found_checks, operators = check.check_operators(hub, exporter, target, data, self.gate)
                checks += found_checks
        return scores if judged else [], checks, operators

    def _original(self) -> tuple[Answers, Score]:
        """What the model as it came in answers on the evaluation data, and its score; computed once."""
        from deploykit import check
        from deploykit.exporters import to_onnx
        from deploykit.hub.running import session

        if self.baseline is None:
            data = _judging(self.prepared)
            label = data.origin if not self.prepared.held_out else HELD_OUT_LABEL
            run = to_onnx.runner(session(self.reference.bytes, self.settings.threads))
            answers = check.answer(run, data, "original model")
            self.baseline = answers, check.score(answers, answers, "original", label, self.metric)
            self.notes += [] if self.metric is not None else check.doubts(answers)
        return self.baseline

    def _golden(self, hub: Hub, target: Target, folder: Path, files: Sequence[File]) -> Golden:
        """A few samples and what everybody answers to them, for ``deploykit verify``."""
        from deploykit.exporters import to_onnx
        from deploykit.hub.running import session

        exporter = exporters.load(target.exporter)
        plain, fed = (next(_judging(p).spread(SAMPLES).batches(SAMPLES)).inputs for p in (self.prepared, self.fed))
        inputs = some_samples(fed)
        count = len(next(iter(inputs.values())))
        original = to_onnx.runner(session(self.reference.bytes))({name: a[:count] for name, a in plain.items()})
        runs: dict[str, Runner] = {file.precision: exporter.load(folder / file.path, 1) for file in files}
        if hub.quantized is not None:
            runs[HUB] = to_onnx.runner(session(hub.bytes, optimize=False))
        answers = {ORIGINAL: original, **{who: run(inputs) for who, run in runs.items()}}
        return Golden(inputs, {who: some_values(outputs) for who, outputs in answers.items()})

    def exam(self) -> Exam | None:
        """The evaluation data as a device gets it; None: there is none."""
        if self.prepared.evaluation is None:
            return None
        answers, score = self._original()
        return Exam(_judging(self.fed), score.data, self.metric, answers)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started


def _judging(prepared: Prepared) -> DataSet:
    """The samples that files are run on."""
    found = prepared.evaluation or prepared.data.get("calibration")
    return found or DataSet.of(dict(prepared.example), origin="the example inputs")


def exam(prepared: Prepared, settings: Settings, gate: Gate, metric: Metric | None = None) -> Exam | None:
    """The evaluation data of an export and what the original model answers; None: there is none."""
    road = _Road(prepared, settings, gate, metric)
    road.reference = float_graph(prepared.model, prepared.example)
    return road.exam()


def calibrate(graph: FloatGraph, data: DataSet, thresholds: str = "minmax") -> Ranges:
    """Statistics of a float graph on calibration data, with histograms if the threshold method needs them."""
    from deploykit.calibration.observe import observe
    from deploykit.calibration.thresholds import METHODS, NEED_HISTOGRAM
    from deploykit.hub.plan import observed
    from deploykit.hub.running import summarizing

    if thresholds not in METHODS:
        raise unknown("threshold method", thresholds, METHODS)
    names, channels = observed(graph)
    run = summarizing(graph.model, names, channels, values=thresholds in NEED_HISTOGRAM)
    return observe(run, graph.hash, data)


def compress(prepared: Prepared, settings: Settings, target: Target | None, folder: Path) -> tuple[str, ...]:
    """Runs the model-stage steps of a recipe and writes a folder that `load_model` and ``export`` read.

    Args:
        target: what the steps have to pay on; None: they run in any case.

    Raises:
        DeploykitError: the recipe has other stages' steps or one that the target has no profit from, or the model is
            no PyTorch module.
    """
    from deploykit.models import save_compressed

    refuse_existing(folder, settings.overwrite)
    steps = [passes.build(step) for step in settings.recipe.steps]
    for step in steps:
        if target is not None:
            _insist(step, refusal(step, target, prepared.have, prepared.model.enters), settings.force)
        if step.stage != "model":
            raise DeploykitError(
                f"compress runs model-stage steps; {step!r} works on the {step.stage}. Use `deploykit export`."
            )
    module = prepared.model.module
    if module is None:
        raise DeploykitError(f"{prepared.model.origin} holds no PyTorch module to compress")
    context = _context(prepared, settings, target or targets.load(ANY_TARGET))
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
