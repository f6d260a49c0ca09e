"""What the default choices and the passes are worth on trained networks: the figures that the documentation quotes."""

from __future__ import annotations

import argparse
import gzip
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import data
from benchmarks.rows import Row, record
from deploykit import exporters, passes, pipeline, targets
from deploykit.calibration.thresholds import METHODS
from deploykit.check import answer
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.precision import Precision
from deploykit.core.ranges import Ranges
from deploykit.core.recipe import Step, TrainSettings
from deploykit.core.target import QuantSpec
from deploykit.hub.graph import FloatGraph, Hub
from deploykit.hub.quantize import quantize
from deploykit.models import accept_module
from deploykit.training.trainer import Trainer

COMMAND = "python -m benchmarks.choices"
X86 = targets.load("x86")
SPEC = X86.quant


@dataclass(frozen=True)
class Case:
    """A trained network with its data; answers are top-1 classes in ONNX Runtime."""

    name: str
    about: str
    module: Any
    calibration: DataSet
    evaluation: DataSet

    @cached_property
    def graph(self) -> FloatGraph:
        """The float graph."""
        return self.lower(self.module)

    @cached_property
    def ranges(self) -> Ranges:
        """With histograms, for every threshold method."""
        return self.observe(self.graph)

    @cached_property
    def expected(self) -> NDArray[np.int64]:
        """What the fp32 file answers."""
        return self.classes(Hub(self.graph, SPEC), "fp32")

    @property
    def context(self) -> Context:
        """What the passes may ask for."""
        return Context(X86, {"calibration": self.calibration}, original=self.module)

    def lower(self, module: Any) -> FloatGraph:
        """A module's float graph."""
        prepared = pipeline.prepare(accept_module(module), {"calibration": self.calibration}, None)
        return pipeline.float_graph(prepared.model, prepared.example)

    def observe(self, graph: FloatGraph) -> Ranges:
        """A graph's ranges on the calibration data."""
        return pipeline.calibrate(graph, self.calibration, "mse")

    def hub(self, spec: QuantSpec = SPEC, method: str = "minmax", correction: str = "weight_correct") -> Hub:
        """The quantized graph."""
        found = quantize(self.graph, self.ranges, spec, method)
        return passes.build(Step(correction))(found, self.context) if correction else found

    def classes(self, hub: Hub, precision: Precision = "int8") -> NDArray[np.int64]:
        """Top-1 classes of a file written from a hub, on the evaluation data."""
        with tempfile.TemporaryDirectory() as folder:
            exporter = exporters.load("onnx")
            (file,) = exporter.export({precision: hub}, X86, Path(folder))
            found = answer(exporter.load(Path(folder) / file.path, 2), self.evaluation, self.name)
        return next(iter(found.outputs.values())).argmax(1)

    def agreement(self, hub: Hub) -> float:
        """Percent of the evaluation data on which an int8 file answers as fp32 does."""
        return 100 * float((self.classes(hub) == self.expected).mean())

    def accuracy(self, hub: Hub, precision: Precision = "int8") -> float:
        """Top-1 accuracy in percent."""
        return 100 * float((self.classes(hub, precision) == self.evaluation.labels).mean())


def resnet20() -> Case:
    about = "ResNet-20, 256 JPEG CIFAR-10 training images calibrate, all 10,000 JPEG test images evaluate"
    return Case("ResNet-20", about, data.resnet20(), data.cifar("train", 256), in_memory(data.cifar("test", 10_000)))


def mobilenetv1() -> Case:
    about = "MobileNetV1 0.75-224, every fifth of 1,000 sample images calibrates, the other 800 evaluate"
    return Case("MobileNetV1", about, data.mobilenetv1(), data.imagenet(True), in_memory(data.imagenet(False)))


def in_memory(source: DataSet) -> DataSet:
    whole = next(source.batches(len(source)))
    return DataSet.of(whole.inputs, whole.labels, source.origin)


def corrections() -> Row:
    cases = [mobilenetv1(), resnet20()]
    found = {
        f"{case.name}: {step or 'none'}": case.agreement(case.hub(correction=step))
        for case in cases
        for step in ("", "bias_correct", "weight_correct")
    }
    gain = found["MobileNetV1: weight_correct"] - found["MobileNetV1: none"]
    about = "; ".join(case.about for case in cases)
    return row("MobileNetV1 int8: agreement gained by the default correction (points)", gain, 0.0, about, found)


def thresholds() -> Row:
    cases = [mobilenetv1(), resnet20()]
    found = {f"{case.name}: {m}": case.agreement(case.hub(method=m)) for case in cases for m in METHODS}
    behind = max(
        max(v for k, v in found.items() if k.startswith(case.name)) - found[f"{case.name}: minmax"] for case in cases
    )
    about = "; ".join(case.about for case in cases)
    claim = "int8: agreement of minmax ranges less that of the best method (points)"
    return row(claim, -behind, -0.5, about, found)


def equalization() -> Row:
    case = mobilenetv1()
    graph = passes.build(Step("equalize"))(case.graph, case.context)
    ranges = case.observe(graph)
    tensor = replace(SPEC, weight_granularity="tensor")
    correct = passes.build(Step("weight_correct"))
    found = {}
    for what, spec in (("a scale per channel", SPEC), ("one scale per tensor", tensor)):
        found[f"{what}: without"] = case.agreement(case.hub(spec))
        found[f"{what}: with"] = case.agreement(correct(quantize(graph, ranges, spec), case.context))
    gain = found["one scale per tensor: with"] - found["one scale per tensor: without"]
    claim = "MobileNetV1 int8, one scale per tensor: agreement gained by equalize (points)"
    return row(claim, gain, 0.0, case.about, found)


def training() -> Row:
    case = resnet20()
    spec = replace(SPEC, weight_bits=3)
    start = case.hub(spec)
    images = in_memory(data.cifar("train", 10_000))
    settings = TrainSettings(batch=64, augment=("flip", "crop"))
    context = replace(case.context, data={"train": images}, trainer=Trainer(settings, seed=0))
    trained = passes.build(Step("qat", {"steps": 150, "learning_rate": 2e-4}))(start, context)
    found = {
        "fp32: accuracy": case.accuracy(Hub(case.graph, SPEC), "fp32"),
        "3-bit weights: accuracy": case.accuracy(start),
        "3-bit weights, qat: accuracy": case.accuracy(trained),
    }
    claim = "ResNet-20, 3-bit weights: accuracy gained by 150 steps of qat (points)"
    return row(claim, found["3-bit weights, qat: accuracy"] - found["3-bit weights: accuracy"], 0.0, case.about, found)


def pruning() -> Row:
    case = resnet20()
    found: dict[str, float] = {}
    target = targets.load("mobile-arm")
    exporter = exporters.load(target.exporter)
    for sparsity in (0.0, 0.3, 0.5, 0.7):
        net = case.module
        if sparsity:
            net = passes.build(Step("sparsify", {"sparsity": sparsity, "criterion": "l1"}))(net, case.context).eval()
        pruned = replace(case, module=net)
        hub = pruned.hub()
        with tempfile.TemporaryDirectory() as folder:
            (file,) = exporter.export({"int8": hub}, target, Path(folder))
            raw = (Path(folder) / file.path).read_bytes()
        found[f"{sparsity:.0%} zeros: accuracy"] = pruned.accuracy(hub)
        found[f"{sparsity:.0%} zeros: bytes"] = len(raw)
        found[f"{sparsity:.0%} zeros: bytes after gzip"] = len(gzip.compress(raw, 9, mtime=0))
    ratio = found["50% zeros: bytes after gzip"] / found["0% zeros: bytes after gzip"]
    claim = "ResNet-20 int8 .tflite, half of the weights pruned: gzip bytes / unpruned gzip bytes"
    about = f"{case.about}; bytes of the .tflite, accuracy of the same integers"
    return replace(row(claim, ratio, 1.0, about, found), better="lower")


def row(claim: str, value: float, bar: float, about: str, values: dict[str, float]) -> Row:
    return Row(claim, value, bar, "higher", f"{about}; ONNX Runtime", COMMAND, [0], values)


PARTS = {f.__name__: f for f in (corrections, thresholds, equalization, training, pruning)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    for name in parser.parse_args().parts or PARTS:
        record("choices", [replace(PARTS[name](), command=f"{COMMAND} {name}")])


if __name__ == "__main__":
    main()
