"""The acceptance lines of the whole road that need the measuring data: accuracy, agreement, bytes, speed, time."""

from __future__ import annotations

import argparse
import collections
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import data
from benchmarks.rows import Row, record
from benchmarks.tensorrt_oracle import judge
from deploykit import bench, exporters, passes, pipeline, targets
from deploykit.check import Gate, answer
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.manifest import Manifest, load_manifest
from deploykit.core.recipe import Step
from deploykit.hub.graph import Hub
from deploykit.hub.quantize import quantize
from deploykit.models import accept_module

COMMAND = "python -m benchmarks.road"
RESNET_DATA = "ResNet-20, 256 JPEG CIFAR-10 training images calibrate, all 10,000 JPEG test images evaluate"
MOBILENET_DATA = "MobileNetV1 0.75-224, every fifth of 1,000 sample images calibrates, the other 800 evaluate"
NNCF = "NNCF default with bias correction 94.38 / 84.62; ONNX Runtime 93.62 / 83.38; ai-edge-quantizer 84.5 / 74.5"


def export(
    module: object, calibration: DataSet, evaluation: DataSet, names: list[str], out: Path
) -> dict[str, Manifest]:
    """The road as a user would run it with default settings, without the benchmark at its end."""
    prepared = pipeline.prepare(accept_module(module), {"calibration": calibration, "eval": evaluation}, None)
    chosen = [targets.load(n) for n in names]
    settings = pipeline.Settings(benchmark=False, threads=2)
    pipeline.export(prepared, chosen, [out / n for n in names], settings, Gate())
    return {n: load_manifest(out / n) for n in names}


def accuracy(manifest: Manifest, precision: str) -> float:
    (found,) = [s.metric for s in manifest.scores if s.precision == precision]
    assert found is not None
    return found


def agreement(manifest: Manifest, precision: str) -> float:
    (found,) = [s.agreement for s in manifest.scores if s.precision == precision]
    assert found is not None
    return found


def classes(folder: Path, manifest: Manifest, evaluation: DataSet) -> np.ndarray:
    """Top-1 classes that an artifact's int8 file answers."""
    (file,) = [f for f in manifest.files if f.precision == "int8"]
    run = exporters.load(manifest.exporter).load(folder / file.path, 2)
    return next(iter(answer(run, evaluation, "answers").outputs.values())).argmax(1)


def resnet20(out: Path) -> None:
    evaluation = data.cifar("test", 10_000)
    found = export(data.resnet20(), data.cifar("train", 256), evaluation, ["x86", "mobile-arm", "jetson"], out)
    fp32 = accuracy(found["x86"], "original")
    drops = {
        "ONNX Runtime int8": fp32 - accuracy(found["x86"], "int8"),
        "LiteRT int8": fp32 - accuracy(found["mobile-arm"], "int8"),
        "TensorRT int8 in ONNX Runtime": fp32 - accuracy(found["jetson"], "int8"),
        "TensorRT int8-fp16 in ONNX Runtime": fp32 - accuracy(found["jetson"], "int8-fp16"),
    }
    same = classes(out / "x86", found["x86"], evaluation) == classes(
        out / "mobile-arm", found["mobile-arm"], evaluation
    )
    record(
        "road",
        [
            Row("ResNet-20: points lost by int8 (fp32 is 86.33)", max(drops.values()), 0.5, "lower", RESNET_DATA,
                f"{COMMAND} resnet20", [0], drops | {"fp32 accuracy": fp32}),
            Row("ResNet-20: ONNX Runtime and LiteRT int8 answer alike (%)", 100 * float(same.mean()), 99.5, "higher",
                RESNET_DATA, f"{COMMAND} resnet20", [0]),
        ],
    )  # fmt: skip


def mobilenetv1(out: Path) -> None:
    evaluation = data.imagenet(False)
    found = export(data.mobilenetv1(), data.imagenet(True), evaluation, ["x86", "mobile-arm"], out)
    names = {"x86": "ONNX Runtime", "mobile-arm": "LiteRT"}
    agree = {runtime: agreement(found[t], "int8") for t, runtime in names.items()}
    top1 = {runtime: accuracy(found[t], "int8") for t, runtime in names.items()}
    sizes = {}
    for target, runtime in names.items():
        stored = {s.path: s.bytes for s in found[target].stored}
        by_precision = {f.precision: stored[f.path] for f in found[target].files}
        sizes[runtime] = by_precision["int8"] / by_precision["fp32"]
    measured = {
        runtime: bench.measure([out / target], runs=200, batch=1, threads=1) for target, runtime in names.items()
    }
    speed = {
        runtime: _p50(result.timings, "int8") / _p50(result.timings, "fp32") for runtime, result in measured.items()
    }
    command = f"{COMMAND} mobilenetv1"
    record(
        "road",
        [
            Row("MobileNetV1: int8 agreement with fp32 (%)", min(agree.values()), 94.3, "higher", MOBILENET_DATA,
                command, [0], agree, f"agreement / top-1: {NNCF}"),
            Row("MobileNetV1: int8 top-1 (%), fp32 85.38", min(top1.values()), 84.6, "higher", MOBILENET_DATA,
                command, [0], top1, f"agreement / top-1: {NNCF}"),
            Row("MobileNetV1: int8 bytes / fp32 bytes", max(sizes.values()), 0.275, "lower", MOBILENET_DATA, command,
                [0], sizes, "ONNX Runtime 0.271"),
            Row("MobileNetV1: int8 time / own fp32 time, 1 thread, same run", max(speed.values()), 1.0, "lower",
                MOBILENET_DATA, command, [0], speed),
        ],
    )  # fmt: skip


def _p50(timings: object, precision: str) -> float:
    (found,) = [t.measurement.p50_ms for t in timings if t.file.precision == precision]  # type: ignore[attr-defined]
    return float(found)


def _hub(module: object, calibration: DataSet, target: str) -> tuple[Hub, float]:
    """A hub with corrected biases, and the CPU seconds of quantizing alone."""
    prepared = pipeline.prepare(accept_module(module), {"calibration": calibration}, None)
    graph = pipeline.float_graph(prepared.model, prepared.example)
    ranges = pipeline.calibrate(graph, calibration)
    chosen = targets.load(target)
    started = time.process_time()
    hub = quantize(graph, ranges, chosen.quant)
    seconds = time.process_time() - started
    return passes.build(Step("weight_correct"))(hub, Context(chosen, {"calibration": calibration})), seconds


def retarget(out: Path) -> None:
    """A further target after the first: quantize (again) and write the int8 file."""
    costs = {}
    for name, module, calibration in (
        ("ResNet-20", data.resnet20(), data.cifar("train", 32)),
        ("MobileNetV1", data.mobilenetv1(), data.imagenet(True).spread(16)),
    ):
        hub, seconds = _hub(module, calibration, "x86")
        for target in ("x86", "mobile-arm"):
            chosen = targets.load(target)
            started = time.process_time()
            exporters.load(chosen.exporter).export({"int8": hub}, chosen, out)
            costs[f"{name} {target}"] = seconds + time.process_time() - started
    record(
        "road",
        [Row("CPU seconds for a further target (quantize and write int8)", max(costs.values()), 1.0, "lower",
             "ResNet-20 and MobileNetV1, one calibration each", f"{COMMAND} retarget", [0], costs)],
    )  # fmt: skip


def mobilenetv2(out: Path) -> None:
    """Hub to .tflite: seconds, operators that are not int8, transposes."""
    hub, _ = _hub(data.mobilenetv2(), data.imagenet(True, shift=127.0).spread(16), "mobile-arm")
    chosen = targets.load("mobile-arm")
    exporter = exporters.load(chosen.exporter)
    started = time.process_time()
    (file,) = exporter.export({"int8": hub}, chosen, out)
    seconds = time.process_time() - started
    found = _tflite_operators(out / file.path)
    kinds = collections.Counter(name for name, _ in found)
    other = sum(not integer for _, integer in found)
    row_data = "MobileNetV2 1.0-224, 16 calibration images"
    command = f"{COMMAND} mobilenetv2"
    record(
        "road",
        [
            Row("MobileNetV2 hub -> .tflite, CPU seconds", seconds, 2.0, "lower", row_data, command, [0]),
            Row("MobileNetV2 .tflite: operators that are not int8", float(other), 0.0, "lower", row_data, command, [0],
                {k: float(v) for k, v in kinds.items()}),
            Row("MobileNetV2 .tflite: TRANSPOSE operators", float(kinds["TRANSPOSE"]), 0.0, "lower", row_data, command,
                [0]),
        ],
    )  # fmt: skip


def oracle(out: Path) -> None:
    """NVIDIA's own parser and builder on the bundles; needs DEPLOYKIT_ORACLE_PYTHON (see tensorrt_oracle)."""
    python = os.environ.get("DEPLOYKIT_ORACLE_PYTHON")
    if python is None:
        print("oracle: skipped, DEPLOYKIT_ORACLE_PYTHON is not set")
        return
    shares = {}
    for name, module, calibration in (
        ("ResNet-20", data.resnet20(), data.cifar("train", 32)),
        ("MobileNetV1", data.mobilenetv1(), data.imagenet(True).spread(16)),
    ):
        hub, _ = _hub(module, calibration, "jetson")
        folder = out / name
        folder.mkdir()
        files = exporters.load("tensorrt").export(
            dict.fromkeys(("fp16", "int8", "int8-fp16"), hub), targets.load("jetson"), folder
        )
        for file, verdict in zip(files, judge([folder / f.path for f in files], python), strict=True):
            accepted = bool(verdict["accepted"])
            convolutions = verdict.get("int8_convolution_kernels", 0) / max(verdict.get("convolutions", 0), 1)
            shares[f"{name} {file.precision}"] = 100.0 * (convolutions if "int8" in file.precision else 1.0) * accepted
    record(
        "road",
        [Row("TensorRT-RTX takes the bundles and runs this share of convolutions in int8 (%; fp16: taken or not)",
             min(shares.values()), 95.0, "higher", "ResNet-20 and MobileNetV1, jetson bundles", f"{COMMAND} oracle",
             [0], shares, note="parser and builder of TensorRT-RTX 1.7.1 on a CPU; nothing ran on a GPU")],
    )  # fmt: skip


def _tflite_operators(path: Path) -> list[tuple[str, bool]]:
    """Every operator's name, and whether all activations it reads and writes are int8."""
    from deploykit.exporters.tflite.schema import schema

    model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
    graph = model.subgraphs[0]
    found = []
    for op in graph.operators:
        code = model.operatorCodes[op.opcodeIndex]
        touched = [graph.tensors[i] for i in [*op.inputs, *op.outputs] if i >= 0]
        computed = [t for t in touched if model.buffers[t.buffer].data is None]  # constants have buffers of their own
        kind = names[max(code.builtinCode, code.deprecatedBuiltinCode)]
        found.append((kind, all(t.type == schema.TensorType.INT8 for t in computed)))
    return found


PARTS = {f.__name__: f for f in (resnet20, mobilenetv1, retarget, mobilenetv2, oracle)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    chosen = parser.parse_args().parts or list(PARTS)
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](Path(folder))


if __name__ == "__main__":
    main()
