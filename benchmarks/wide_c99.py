"""The acceptance lines of integer C: accuracy against the hub, C against the oracle, warnings, power of two."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import data
from benchmarks.rows import Row, record
from deploykit import passes, pipeline, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.recipe import Step
from deploykit.core.target import Target
from deploykit.exporters import to_c99, to_onnx
from deploykit.exporters.c99.compiled import Compiled
from deploykit.exporters.c99.execute import execute
from deploykit.exporters.c99.golden import to_integers
from deploykit.exporters.c99.lower import lower
from deploykit.exporters.c99.program import Program
from deploykit.hub.graph import FloatGraph, Hub
from deploykit.hub.quantize import quantize
from deploykit.hub.running import session
from deploykit.models import accept_module

COMMAND = "python -m benchmarks.wide_c99"
IMAGES = 500
"""Through the compiled C."""
BATCH = 50
STRICT = ("-std=c99", "-Wall", "-Wextra", "-Wconversion", "-pedantic", "-Werror")
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
SOURCES = ("selftest.c", "model.c", "dk_kernels.c")
RESNET_DATA = "ResNet-20, 256 JPEG CIFAR-10 training images calibrate, JPEG test images evaluate"
MOBILENET_DATA = "MobileNetV1 0.75-224, every fifth of 1,000 sample images calibrates, 500 of the others evaluate"


def resnet20(out: Path) -> None:
    calibration, evaluation = data.cifar("train", 256), data.cifar("test", 10_000)
    graph = _graph(data.resnet20(), calibration)
    fp32 = _accuracy(_onnx_classes(graph.bytes, evaluation), evaluation)
    rows = []
    for name, thresholds in (("cortex-m4", ("minmax",)), ("fpga-int8", ("minmax", "mse"))):
        target = targets.load(name)
        drops, lost = {}, {}
        for method in thresholds:
            hub = _hub(graph, target, calibration, method)
            program = _program(hub, target)
            oracle = _accuracy(_integer_classes(program, evaluation), evaluation)
            in_hub = _accuracy(_onnx_classes(hub.bytes, evaluation), evaluation)
            drops[method], lost[method] = in_hub - oracle, fp32 - oracle
            if method == "minmax":
                some = evaluation.spread(IMAGES)
                rows += _compiled(f"ResNet-20 {name}", hub, target, some, out / name, "resnet20")[0]
        worst = max(drops.values(), key=abs)
        rows.append(
            Row(f"C, ResNet-20 {name}: points from the hub, all 10,000 images through the oracle", abs(worst), 0.5,
                "lower", RESNET_DATA, f"{COMMAND} resnet20", [0], drops)
        )  # fmt: skip
        if name == "fpga-int8":
            rows.append(
                Row("fpga-int8, ResNet-20: points lost against fp32 by PTQ (default thresholds)", lost["minmax"], 1.5,
                    "lower", RESNET_DATA, f"{COMMAND} resnet20", [0], {**lost, "fp32 accuracy": fp32})
            )  # fmt: skip
    record("wide", rows)


def mobilenetv1(out: Path) -> None:
    """The budget is lifted by a target of the script's own: this network takes more than the profile of the M7 has."""
    calibration, evaluation = data.imagenet(True), data.imagenet(False).spread(IMAGES)
    own = out / "large-board.toml"
    own.write_text(
        'extends = "cortex-m7"\ntitle = "a board of any size"\n[options]\nflash_bytes = 100_000_000\n'
        "ram_bytes = 100_000_000\n"
    )
    target = targets.load(str(own))
    hub = _hub(_graph(data.mobilenetv1(), calibration), target, calibration, "minmax")
    in_hub = _accuracy(_onnx_classes(hub.bytes, evaluation), evaluation)
    rows, classes = _compiled("MobileNetV1", hub, target, evaluation, out / "mobilenetv1", "mobilenetv1")
    in_c = _accuracy(classes, evaluation)
    rows.append(
        Row("C, MobileNetV1: points from the hub", abs(in_hub - in_c), 0.5, "lower", MOBILENET_DATA,
            f"{COMMAND} mobilenetv1", [0], {"hub": in_hub, "C": in_c})
    )  # fmt: skip
    record("wide", rows)


def _compiled(
    what: str, hub: Hub, target: Target, evaluation: DataSet, folder: Path, command: str
) -> tuple[list[Row], NDArray[np.int64]]:
    """C against the oracle on every image; the compiler's warnings; the sanitizers. And the classes C answers."""
    folder.mkdir(parents=True)
    samples = next(evaluation.batches(2)).inputs
    (file,) = to_c99.export({"int8": replace(hub, samples=samples)}, target, folder)
    network, program = Compiled(folder / file.path), _program(hub, target)
    differing, classes = 0, []
    (port,) = program.outputs
    for batch in evaluation.batches(BATCH):
        fed = _integers(program, batch.inputs)
        found, expected = network.run(fed), execute(program, fed)
        differing += sum(int((found[name] != expected[name]).any(axis=1).sum()) for name in found)
        classes.append(found[port.name].argmax(axis=1))
    strict = _build(folder, *STRICT, "-O2")
    clean = _build(folder, *STRICT, "-O1", *SANITIZERS)
    images = f"{len(evaluation)} images, {file.notes[0]} {file.notes[1]}"
    command = f"{COMMAND} {command}"
    rows = [
        Row(f"C, {what}: images on which C and numpy differ in any bit", float(differing), 0, "lower", images, command),
        Row(f"C, {what}: warnings or failures with {' '.join(STRICT)}", strict, 0, "lower", "self-test", command),
        Row(f"C, {what}: findings of the address and undefined-behaviour sanitizers", clean, 0, "lower", "self-test",
            command),
    ]  # fmt: skip
    return rows, np.concatenate(classes)


def _build(folder: Path, *flags: str) -> float:
    """0 if the self-test compiles in silence and passes in silence on stderr."""
    compiler = shutil.which("cc") or "gcc"
    program = folder / "selftest"
    made = subprocess.run(
        [compiler, *flags, "-o", program, *(folder / s for s in SOURCES)], capture_output=True, text=True
    )
    if made.returncode or made.stderr:
        return 1.0
    ran = subprocess.run([program], capture_output=True, text=True)
    return float(ran.returncode != 0 or bool(ran.stderr))


def _graph(module: object, calibration: DataSet) -> FloatGraph:
    prepared = pipeline.prepare(accept_module(module), {"calibration": calibration}, None)
    return pipeline.float_graph(prepared.model, prepared.example)


def _hub(graph: FloatGraph, target: Target, calibration: DataSet, thresholds: str) -> Hub:
    """As an export makes it: quantized, biases corrected."""
    ranges = pipeline.calibrate(graph, calibration, thresholds)
    hub = quantize(graph, ranges, target.quant, thresholds)
    return passes.build(Step("weight_correct"))(hub, Context(target, {"calibration": calibration}))  # type: ignore[no-any-return]


def _program(hub: Hub, target: Target) -> Program:
    assert hub.quantized is not None
    return lower(hub.quantized, target.options["rounding"]).program


def _integers(program: Program, inputs: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.int8]]:
    return {port.name: to_integers(port, inputs[port.name]) for port in program.inputs}


def _integer_classes(program: Program, evaluation: DataSet) -> NDArray[np.int64]:
    (port,) = program.outputs
    return np.concatenate(
        [execute(program, _integers(program, b.inputs))[port.name].argmax(axis=1) for b in evaluation.batches(BATCH)]
    )


def _onnx_classes(model: bytes, evaluation: DataSet) -> NDArray[np.int64]:
    """The float graph, or the hub in ONNX Runtime's integer kernels."""
    run = to_onnx.runner(session(model))
    return np.concatenate([next(iter(run(b.inputs).values())).argmax(axis=1) for b in evaluation.batches(BATCH)])


def _accuracy(classes: NDArray[np.int64], evaluation: DataSet) -> float:
    assert evaluation.labels is not None
    return 100.0 * float((classes == evaluation.labels).mean())


PARTS = {"resnet20": resnet20, "mobilenetv1": mobilenetv1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    for part in parser.parse_args().parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[part](Path(folder))


if __name__ == "__main__":
    main()
