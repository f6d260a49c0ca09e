"""`Judge`: how well the original model and every file of it answer, and what is kept of that for later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit import exporters
from deploykit.core.artifact import Arrays, Check, File
from deploykit.core.data import HELD_OUT
from deploykit.core.errors import DeploykitError
from deploykit.core.golden import ORIGINAL, SAMPLES, Golden, hub_of, some_samples, some_values
from deploykit.core.manifest import OperatorError, Score
from deploykit.core.precision import FORMATS, Precision, is_quantized, needs_calibration
from deploykit.core.request import Gate, Settings
from deploykit.core.target import Target
from deploykit.pipeline.prepared import HELD_OUT_LABEL, Prepared
from deploykit.trial import Exam

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deploykit.check import Answers, Metric
    from deploykit.hub.graph import FloatGraph, Hub

NO_LABELS = "the evaluation data has no labels"
NOT_EVALUATED = f"the files were not evaluated: give --eval, or at least {HELD_OUT} samples in --calib"
HUB_SAMPLES = 200
"""The hub runs without an optimizer, so files are compared with it on at most this many samples."""


@dataclass
class Judge:
    """One run's evaluation data, and what the original model answered to it."""

    reference: FloatGraph
    """The original model, lowered."""
    prepared: Prepared
    """What the original model is fed with."""
    fed: Prepared
    """The same samples as the files take them."""
    settings: Settings
    gate: Gate
    metric: Metric | None
    notes: list[str] = field(default_factory=list)
    """What the user should know about data and model."""
    baseline: tuple[Answers, Score] | None = None
    """The original model's answers and score, once they were computed."""
    shown: tuple[Arrays, dict[str, NDArray[Any]]] | None = None
    """A few samples as files take them, and the original model's answers to them, once they were computed."""

    def check_labels(self) -> None:
        """Refuses labels that are no classes of this model; what a metric of the user's reads is its own business."""
        from deploykit.check import class_scores
        from deploykit.exporters import to_onnx
        from deploykit.hub.running import session
        from deploykit.sources import check_labels

        if self.metric is not None:
            return
        data = self.prepared.evaluation
        scores = class_scores(to_onnx.runner(session(self.reference.model))(self.prepared.example))
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

    def evaluate(
        self, hubs: Mapping[Precision, Hub], target: Target, folder: Path, files: Sequence[File], exact: bool
    ) -> tuple[list[Score], list[Check], list[OperatorError]]:
        """Answers of every file on the evaluation data, against labels, the original model and its own hub.

        ``exact``: no step changed the model, so float files must answer as it does.
        """
        from deploykit import check
        from deploykit.exporters import to_onnx
        from deploykit.hub.running import session

        judged = self.prepared.evaluation is not None
        data = self.fed.judged
        exporter = exporters.load(target.exporter)
        threads = self.settings.threads
        reference, baseline = self.original()
        scores = [baseline]
        checks = [] if judged else [Check("accuracy", "all", None, None, None, NOT_EVALUATED)]
        operators: list[OperatorError] = []
        for file in files:
            hub = hubs[file.precision]
            answers = check.answer(exporter.load(folder / file.path, threads), data, f"{target.name} {file.precision}")
            found = check.score(answers, reference, file.precision, baseline.data, self.metric)
            scores.append(found)
            if not judged:  # these inputs show whether the files compute the network, not how well it answers
                found = replace(found, metric=None, agreement=None)
            checks += check.check_score(found, baseline, self.gate, exact=exact)
            if is_quantized(file.precision):
                checks.append(check.check_quantized(hub, file))
                part = data.spread(HUB_SAMPLES)
                assert hub.quantized is not None
                theirs = check.answer(to_onnx.runner(session(hub.quantized, threads, optimize=False)), part, "hub")
                ours = check.answer(exporter.load(folder / file.path, threads), part, "file against hub")
                checks += check.check_file_against_hub(
                    ours, theirs, file.precision, self.gate, ties=needs_calibration(file.precision)
                )
            checks += exporters.own_checks(exporter, hub, target, folder, file)
            shares_hub = FORMATS[file.precision].half and not FORMATS[file.precision].numbers  # with int8
            if is_quantized(file.precision) and not shares_hub:
                found_checks, errors = check.check_operators(hub, exporter, target, data, self.gate, file.precision)
                checks += found_checks
                operators += errors
        return scores if judged else [], checks, operators

    def original(self) -> tuple[Answers, Score]:
        """What the model as it came in answers on the evaluation data, and its score; computed once."""
        from deploykit import check
        from deploykit.exporters import to_onnx
        from deploykit.hub.running import session

        if self.baseline is None:
            data = self.prepared.judged
            label = data.origin if not self.prepared.held_out else HELD_OUT_LABEL
            run = to_onnx.runner(session(self.reference.model, self.settings.threads))
            answers = check.answer(run, data, "original model")
            self.baseline = answers, check.score(answers, answers, "original", label, self.metric)
            self.notes += [] if self.metric is not None else check.doubts(answers)
        return self.baseline

    def few(self) -> tuple[Arrays, dict[str, NDArray[Any]]]:
        """A few samples as files take them, and what the original model answers to them; computed once."""
        from deploykit.exporters import to_onnx
        from deploykit.hub.running import session

        if self.shown is None:
            plain, fed = (next(p.judged.spread(SAMPLES).batches(SAMPLES)).inputs for p in (self.prepared, self.fed))
            inputs = some_samples(fed)
            count = len(next(iter(inputs.values())))
            run = to_onnx.runner(session(self.reference.model))
            self.shown = inputs, run({name: a[:count] for name, a in plain.items()})
        return self.shown

    def golden(self, hubs: Mapping[Precision, Hub], target: Target, folder: Path, files: Sequence[File]) -> Golden:
        """A few samples and what everybody answers to them, for ``deploykit verify``."""
        from deploykit.exporters import to_onnx
        from deploykit.hub.running import session

        exporter = exporters.load(target.exporter)
        inputs, original = self.few()
        answers = {ORIGINAL: original}  # one runtime at a time: models may be large
        for file in files:
            answers[file.precision] = exporter.load(folder / file.path, 1)(inputs)
        for precision in filter(is_quantized, hubs):
            quantized = hubs[precision].quantized
            if hub_of(precision) not in answers and quantized is not None:
                answers[hub_of(precision)] = to_onnx.runner(session(quantized, optimize=False))(inputs)
        return Golden(inputs, {who: some_values(outputs) for who, outputs in answers.items()})

    def exam(self) -> Exam | None:
        """The evaluation data as a device gets it; None: there is none."""
        if self.prepared.evaluation is None:
            return None
        answers, score = self.original()
        return Exam(self.fed.judged, score.data, self.metric, answers)

    def held_out(self) -> list[str]:
        """That the figures come from samples of the calibration data."""
        data = self.prepared.evaluation
        if not self.prepared.held_out or data is None:
            return []
        return [f"scored on {len(data)} calibration samples that were held out (every fifth); --eval names other data"]
