"""Post-training quantization: how close the files answer, and what it costs. No training, no choice but those named.

Every figure is that of an artifact, run in ONNX Runtime and LiteRT on evaluation data. The CPU seconds stand beside
NNCF's with full bias correction: same float graph, same images in memory, processes in turns, imports left out of both.

    python -m benchmarks.quantize
    python -m benchmarks.quantize cost --nncf OTHER/bin/python
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import data
from benchmarks.rows import Row, record
from deploykit import pipeline, targets
from deploykit.core.data import DataSet
from deploykit.core.errors import GateFailed
from deploykit.core.manifest import Manifest, Score, load_manifest
from deploykit.core.precision import Precision
from deploykit.core.recipe import Recipe, Step
from deploykit.core.request import Gate
from deploykit.core.target import Target
from deploykit.models import accept_module

COMMAND = "python -m benchmarks.quantize"
MOBILENET = "MobileNetV1 0.75-224, every fifth of 1,000 sample images calibrates, the other 800 evaluate"
RESNET = "ResNet-20, 512 JPEG CIFAR-10 training images calibrate, all 10,000 JPEG test images evaluate"
MOBILENET_V2 = (
    "MobileNetV2 1.0-224 (dequantized), every fifth of 1,000 sample images calibrates, the other 800 evaluate"
)
FITTED = (Step("fit_ranges"), Step("gptq"))
RESNET_INT8 = (
    "torchao 0.18 PT2E (x86, simulated in torch; sums before residual adds in float), same images: 33.1 / 99.15"
)
RUNTIMES = {"x86": "ONNX Runtime", "mobile-arm": "LiteRT"}

COST = """
import sys, time
import numpy as np
from pathlib import Path
import torch
from deploykit import passes, pipeline, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.recipe import Step
from deploykit.hub.lower import read_onnx
from deploykit.hub.quantize import quantize
images = np.load(sys.argv[2])
data, target = DataSet.of({"x": images}), targets.load("x86")
graph = read_onnx(Path(sys.argv[1]))
started = time.process_time()
hub = quantize(graph, pipeline.calibrate(graph, data), target.quant)
hub = passes.build(Step("weight_correct"))(hub, Context(target, {"calibration": data}))
print(time.process_time() - started)
"""

NNCF = """
import sys, time
sys.modules["openvino_telemetry"] = None
import numpy as np, nncf, openvino
images = np.load(sys.argv[2])
model = openvino.Core().read_model(sys.argv[1])  # half the CPU time of convert_model
data = nncf.Dataset(range(len(images)), lambda i: {"x": images[i : i + 1]})
started = time.process_time()
nncf.quantize(model, data, subset_size=len(images), fast_bias_correction=False)
print(time.process_time() - started)
"""


def chosen(name: str, folder: Path, quant: str) -> Target:
    """A target with other numbers, as a user would write it."""
    if not quant:
        return targets.load(name)
    path = folder / f"{name}-other.toml"
    path.write_text(f'extends = "{name}"\ntitle = "{name} with other numbers"\n[quant]\n{quant}\n')
    return targets.load(str(path))


def scores(
    module: object,
    calibration: DataSet,
    evaluation: DataSet,
    names: Sequence[str],
    precision: Precision = "int8",
    quant: str = "",
    steps: tuple[Step, ...] = (),
) -> dict[str, Score]:
    """Of the files of some targets in one precision, by runtime."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        prepared = pipeline.prepare(accept_module(module), {"calibration": calibration, "eval": evaluation}, None)
        them = [chosen(name, out, quant) for name in names]
        settings = pipeline.Settings(Recipe(steps), precisions=(precision,), benchmark=False, threads=2)
        with contextlib.suppress(GateFailed):  # a row that is not met says so itself
            pipeline.export(prepared, them, [out / n for n in names], settings, Gate())
        found: dict[str, Manifest] = {name: load_manifest(out / name) for name in names}
        for manifest in found.values():
            print(manifest.target, manifest.steps, flush=True)
    return {RUNTIMES[n]: next(s for s in m.scores if s.precision == precision) for n, m in found.items()}


def mobilenet_rows(what: str, part: str, found: dict[str, Score], bars: dict[str, float], neighbour: str) -> list[Row]:
    """The rows of one way of storing numbers: the worst runtime counts."""
    read = {
        "top-1 (%)": lambda s: s.metric, "agreement with fp32 (%)": lambda s: s.agreement,
        "cross-entropy": lambda s: s.cross_entropy, "logits, signal to noise (dB)": lambda s: min(s.sqnr_db.values()),
    }  # fmt: skip
    rows = []
    for figure, bar in bars.items():
        values = {runtime: float(read[figure](s)) for runtime, s in found.items()}
        better, worst = ("lower", max) if figure == "cross-entropy" else ("higher", min)
        rows.append(
            Row(f"{what}: {figure}", worst(values.values()), bar, better, MOBILENET, f"{COMMAND} {part}", [0], values,
                neighbour)  # type: ignore[arg-type]
        )  # fmt: skip
    return rows


def mobilenet() -> tuple[object, DataSet, DataSet]:
    return data.mobilenetv1(), data.imagenet(True), data.imagenet(False)


def int8() -> list[Row]:
    found = scores(*mobilenet(), ["x86", "mobile-arm"])
    bars = {
        "logits, signal to noise (dB)": 25.0, "agreement with fp32 (%)": 97.75, "cross-entropy": 0.558,
        "top-1 (%)": 84.5,
    }  # fmt: skip
    best = "best of some twenty settings: 23.98 dB / 97.75 % / 0.5558 / 85.75 (NNCF, full bias correction)"
    return mobilenet_rows("MobileNetV1 int8", "int8", found, bars, best)


def tensor() -> list[Row]:
    found = scores(*mobilenet(), ["x86", "mobile-arm"], quant='weight_granularity = "tensor"')
    bars = {"top-1 (%)": 84.5, "agreement with fp32 (%)": 95.0, "logits, signal to noise (dB)": 19.0}
    return mobilenet_rows("MobileNetV1 int8, one scale per weight tensor", "tensor", found, bars,
                          "ONNX Runtime, every calibrator: top-1 1.75")  # fmt: skip


def w4a8() -> list[Row]:
    found = scores(*mobilenet(), ["x86", "mobile-arm"], "w4a8")
    bars = {"top-1 (%)": 81.5, "agreement with fp32 (%)": 88.0, "cross-entropy": 0.72}
    return mobilenet_rows("MobileNetV1, 4-bit weights in all layers", "w4a8", found, bars,
                          "ONNX Runtime 0.12, ai-edge-quantizer 0.88 top-1")  # fmt: skip


def power_of_two() -> list[Row]:
    found = scores(*mobilenet(), ["x86"], quant='scale = "power_of_two"')
    return mobilenet_rows("MobileNetV1 int8, scales powers of two (fp32: 85.38)", "power_of_two", found,
                          {"top-1 (%)": 83.38}, "a plain conversion loses 4 to 6 points")  # fmt: skip


def resnet20() -> list[Row]:
    cases: list[tuple[Precision, tuple[Step, ...], float, float, str]] = [
        ("int8", (), 33.0, 99.2, RESNET_INT8),
        ("int8", FITTED, 33.0, 99.2, RESNET_INT8),
        ("w4a8", (), 24.0, 97.0, "plain rounding 14.6 / 91.8"),
        ("w3a8", (), 19.0, 95.0, ""),
    ]
    rows = []
    evaluation = data.cifar("test", 10_000)
    for precision, steps, decibels, percent, neighbour in cases:
        found = scores(data.resnet20(), data.cifar("train", 512), evaluation, ["x86"], precision, steps=steps)
        score = found["ONNX Runtime"]
        what = f"ResNet-20 {precision}, {' + '.join(s.name for s in steps) or 'default'}"
        values = {"top-1": float(score.metric or 0), "cross-entropy": float(score.cross_entropy or 0)}
        command = f"{COMMAND} resnet20"
        rows += [
            Row(f"{what}: logits, signal to noise (dB)", min(score.sqnr_db.values()), decibels, "higher", RESNET,
                command, [0], values, neighbour),
            Row(f"{what}: agreement with fp32 (%)", score.agreement, percent, "higher", RESNET, command, [0], values,
                neighbour),
        ]  # fmt: skip
    return rows


def mobilenetv2() -> list[Row]:
    module, evaluation = data.mobilenetv2(), data.imagenet(False, shift=127.0)
    prepared = pipeline.prepare(accept_module(module), {"calibration": data.imagenet(True, shift=127.0)}, None)
    from deploykit.check import answer, class_scores
    from deploykit.exporters import to_onnx
    from deploykit.hub.running import session

    graph = pipeline.float_graph(prepared.model, prepared.example)
    logits = class_scores(answer(to_onnx.runner(session(graph.bytes, 2)), evaluation, "fp32").outputs)
    assert logits is not None and evaluation.labels is not None
    fp32 = 100.0 * float((logits.argmax(1) == evaluation.labels).mean())
    values = {"fp32 top-1": fp32}
    precisions: tuple[Precision, ...] = ("int8", "w4a8")
    for what in precisions:
        found = scores(module, data.imagenet(True, shift=127.0), evaluation, ["x86"], what)["ONNX Runtime"]
        values |= {f"{what}: top-1": float(found.metric or 0), f"{what}: agreement": float(found.agreement or 0)}
    return [
        Row("MobileNetV2 int8, default: points of top-1 lost", fp32 - values["int8: top-1"], 0.5, "lower", MOBILENET_V2,
            f"{COMMAND} mobilenetv2", [0], values, note="w4a8 is reported beside it")
    ]  # fmt: skip


def cost(nncf: str, rounds: int) -> list[Row]:
    module, calibration, _ = mobilenet()
    prepared = pipeline.prepare(accept_module(module), {"calibration": calibration, "eval": calibration}, None)
    found: dict[str, list[float]] = {"deploykit": [], "NNCF": []}
    with tempfile.TemporaryDirectory() as folder:
        source, images = Path(folder) / "model.onnx", Path(folder) / "images.npy"
        source.write_bytes(pipeline.float_graph(prepared.model, prepared.example).bytes)
        np.save(images, next(calibration.batches(len(calibration))).inputs["x"])
        for _ in range(rounds):
            for tool, python, script in (("deploykit", sys.executable, COST), ("NNCF", nncf, NNCF)):
                ran = subprocess.run(
                    [python, "-c", script, str(source), str(images)], capture_output=True, text=True, check=True
                )
                found[tool].append(float(ran.stdout.split()[-1]))
                print(tool, found[tool][-1], file=sys.stderr, flush=True)
    seconds = {tool: statistics.median(v) for tool, v in found.items()}
    return [
        Row("MobileNetV1 int8: CPU seconds of quantizing, ours / NNCF's with full bias correction",
            seconds["deploykit"] / seconds["NNCF"], 1.0, "lower", MOBILENET, f"{COMMAND} cost --nncf PYTHON", [0],
            seconds,
            "NNCF 3.4, OpenVINO model, fast_bias_correction=False; same run")
    ]  # fmt: skip


PARTS = {f.__name__: f for f in (int8, tensor, w4a8, power_of_two, resnet20, mobilenetv2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "cost", []], help="default: all but cost")
    parser.add_argument("--nncf", help="a Python with nncf and openvino, for cost")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    for name in given.parts or PARTS:
        if name == "cost" and not given.nncf:
            parser.error("cost needs --nncf PYTHON")
        record("quantize", cost(given.nncf, given.rounds) if name == "cost" else PARTS[name]())


if __name__ == "__main__":
    main()
