"""Post-training quantization: how close the files answer. No training, no choice but those named.

Every figure is that of an artifact, run in ONNX Runtime and LiteRT on evaluation data.

    python -m benchmarks.quantize
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import data
from benchmarks.rows import Row, main
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
ONE_FILE = "no bar: 99.2 is asked of one file, that of OpenVINO with fit_ranges + gptq; decision 19"
RUNTIMES = {
    "x86": "ONNX Runtime", "mobile-arm": "LiteRT", "gpu-h100": "TensorRT file in ONNX Runtime",
    "x86-openvino": "OpenVINO",
}  # fmt: skip


def chosen(name: str, folder: Path, quant: str) -> Target:
    """A target with other numbers, as a user would write it."""
    if not quant:
        return targets.load(name)
    path = folder / f"{name}-other.toml"
    path.write_text(f'extends = "{name}"\ntitle = "{name} with other numbers"\n[quant]\n{quant}\n')
    return targets.load(str(path))


def exported(
    module: object,
    calibration: DataSet,
    evaluation: DataSet,
    names: Sequence[str],
    precision: Precision = "int8",
    quant: str = "",
    recipe: Recipe | None = None,
    train: DataSet | None = None,
    thresholds: str = "minmax",
) -> dict[str, Manifest]:
    """What was made for some targets in one precision, by runtime."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        roles = {"calibration": calibration, "eval": evaluation} | ({"train": train} if train is not None else {})
        prepared = pipeline.prepare(accept_module(module), roles, None)
        them = [chosen(name, out, quant) for name in names]
        settings = pipeline.Settings(
            recipe or Recipe(), precisions=(precision,), thresholds=thresholds, benchmark=False, threads=2
        )
        with contextlib.suppress(GateFailed):  # a row that is not met says so itself
            pipeline.export(prepared, them, [out / n for n in names], settings, Gate())
        found: dict[str, Manifest] = {name: load_manifest(out / name) for name in names}
        for manifest in found.values():
            print(manifest.target, manifest.steps, flush=True)
    return {RUNTIMES[name]: manifest for name, manifest in found.items()}


def score(manifest: Manifest, precision: Precision = "int8") -> Score:
    """How the file of a precision answers."""
    return next(s for s in manifest.scores if s.precision == precision)


def size(manifest: Manifest, precision: Precision = "int8") -> int:
    """Bytes of the file of a precision, with those of its weights where they are in one of their own."""
    path = Path(next(f.path for f in manifest.files if f.precision == precision))
    return sum(s.bytes for s in manifest.stored if Path(s.path).stem == path.stem)


def mobilenet_rows(
    what: str,
    part: str,
    found: dict[str, Manifest],
    bars: dict[str, float],
    neighbour: str,
    precision: Precision = "int8",
) -> list[Row]:
    """The rows of one way of storing numbers: the worst runtime counts."""
    read = {
        "top-1 (%)": lambda s: s.metric, "agreement with fp32 (%)": lambda s: s.agreement,
        "cross-entropy": lambda s: s.cross_entropy, "logits, signal to noise (dB)": lambda s: min(s.sqnr_db.values()),
    }  # fmt: skip
    rows = []
    for figure, bar in bars.items():
        values = {runtime: float(read[figure](score(m, precision))) for runtime, m in found.items()}
        values |= {f"{runtime}: bytes": size(m, precision) for runtime, m in found.items()}
        better, worst = ("lower", max) if figure == "cross-entropy" else ("higher", min)
        value = worst(values[runtime] for runtime in found)
        rows.append(
            Row(f"{what}: {figure}", value, bar, better, MOBILENET, f"{COMMAND} {part}", [0], values,
                neighbour)
        )  # fmt: skip
    return rows


def mobilenet() -> tuple[object, DataSet, DataSet]:
    return data.mobilenetv1(), data.imagenet(True), data.imagenet(False)


def int8() -> list[Row]:
    found = exported(*mobilenet(), ["x86", "mobile-arm"])
    bars = {
        "logits, signal to noise (dB)": 25.0, "agreement with fp32 (%)": 97.75, "cross-entropy": 0.558,
        "top-1 (%)": 84.5,
    }  # fmt: skip
    best = "best of some twenty settings: 23.98 dB / 97.75 % / 0.5558 / 85.75 (NNCF, full bias correction)"
    return mobilenet_rows("MobileNetV1 int8", "int8", found, bars, best)


def tensor() -> list[Row]:
    found = exported(*mobilenet(), ["x86", "mobile-arm"], quant='weight_granularity = "tensor"')
    bars = {"top-1 (%)": 84.5, "agreement with fp32 (%)": 95.0, "logits, signal to noise (dB)": 19.0}
    return mobilenet_rows("MobileNetV1 int8, one scale per weight tensor", "tensor", found, bars,
                          "ONNX Runtime, every calibrator: top-1 1.75")  # fmt: skip


def w4a8() -> list[Row]:
    found = exported(*mobilenet(), ["x86", "mobile-arm"], "w4a8")
    bars = {"top-1 (%)": 81.5, "agreement with fp32 (%)": 88.0, "cross-entropy": 0.72}
    return mobilenet_rows("MobileNetV1, 4-bit weights in all layers", "w4a8", found, bars,
                          "ONNX Runtime 0.12, ai-edge-quantizer 0.88 top-1", "w4a8")  # fmt: skip


def power_of_two() -> list[Row]:
    found = exported(*mobilenet(), ["x86"], quant='scale = "power_of_two"')
    return mobilenet_rows("MobileNetV1 int8, scales powers of two (fp32: 85.38)", "power_of_two", found,
                          {"top-1 (%)": 83.38}, "a plain conversion loses 4 to 6 points")  # fmt: skip


def resnet20() -> list[Row]:
    """Agreement of int8 has no bar here: ONNX Runtime rounds in front of residual sums; see `openvino`."""
    cases: list[tuple[Precision, tuple[Step, ...], float, float | None, str]] = [
        ("int8", (), 33.0, None, RESNET_INT8),
        ("int8", FITTED, 33.0, None, RESNET_INT8),
        ("w4a8", (), 24.0, 97.0, "plain rounding 14.6 / 91.8"),
        ("w3a8", (), 19.0, 95.0, ""),
    ]
    rows = []
    for precision, steps, decibels, percent, neighbour in cases:
        what = f"ResNet-20 {precision}, {' + '.join(s.name for s in steps) or 'default'}"
        rows += resnet_rows(what, "resnet20", "x86", precision, steps, (decibels, percent), neighbour)
    return rows


def openvino() -> list[Row]:
    """OpenVINO adds to a convolution before it rounds, as torchao simulates it."""
    rows = []
    for steps, bars in (((), (33.0, None)), (FITTED, (33.0, 99.2))):
        what = f"ResNet-20 int8 for OpenVINO, {' + '.join(s.name for s in steps) or 'default'}"
        rows += resnet_rows(what, "openvino", "x86-openvino", "int8", steps, bars, RESNET_INT8)
    return rows


def resnet_rows(
    what: str,
    part: str,
    target: str,
    precision: Precision,
    steps: tuple[Step, ...],
    bars: tuple[float | None, float | None],
    neighbour: str,
) -> list[Row]:
    """Decibels and agreement of one file on all test images."""
    found = exported(
        data.resnet20(), data.cifar("train", 512), data.cifar("test", 10_000), [target], precision,
        recipe=Recipe(steps),
    )  # fmt: skip
    manifest = found[RUNTIMES[target]]
    scored = score(manifest, precision)
    values = {
        "top-1": float(scored.metric or 0), "cross-entropy": float(scored.cross_entropy or 0),
        "bytes": size(manifest, precision),
    }  # fmt: skip
    command = f"{COMMAND} {part}"
    return [
        Row(f"{what}: logits, signal to noise (dB)", min(scored.sqnr_db.values()), bars[0], "higher", RESNET,
            command, [0], values, neighbour),
        Row(f"{what}: agreement with fp32 (%)", scored.agreement, bars[1], "higher", RESNET, command, [0], values,
            neighbour, "" if bars[1] else ONE_FILE),
    ]  # fmt: skip


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
        (made,) = exported(module, data.imagenet(True, shift=127.0), evaluation, ["x86"], what).values()
        found = score(made, what)
        values |= {f"{what}: top-1": float(found.metric or 0), f"{what}: agreement": float(found.agreement or 0)}
        values[f"{what}: bytes"] = size(made, what)
    return [
        Row("MobileNetV2 int8, default: points of top-1 lost", fp32 - values["int8: top-1"], 0.5, "lower", MOBILENET_V2,
            f"{COMMAND} mobilenetv2", [0], values, note="w4a8 is reported beside it")
    ]  # fmt: skip


def reconstruction() -> list[Row]:
    """MobileNetV2 with 4-bit weights, block by block, beside what gptq alone makes of it."""
    module, calibration = data.mobilenetv2(), data.imagenet(True, shift=127.0)
    evaluation, values = data.imagenet(False, shift=127.0), {}
    for step in ("gptq", "reconstruct"):
        (made,) = exported(module, calibration, evaluation, ["x86"], "w4a8", recipe=Recipe((Step(step),))).values()
        found = score(made, "w4a8")
        values |= {f"{step}: top-1": float(found.metric or 0), f"{step}: agreement": float(found.agreement or 0)}
        values[f"{step}: dB"] = min(found.sqnr_db.values())
    gain = values["reconstruct: dB"] - values["gptq: dB"]
    return [
        Row("MobileNetV2 w4a8: decibels gained by reconstruct", gain, 0.0, "higher", MOBILENET_V2,
            f"{COMMAND} reconstruction", [0], values)
    ]  # fmt: skip


if __name__ == "__main__":
    main(__doc__, "quantize", [int8, tensor, w4a8, power_of_two, resnet20, openvino, mobilenetv2, reconstruction])
