"""Calibration without data: int8 files of made-up inputs beside those of real ones.

Every figure is that of an artifact, run in ONNX Runtime on real evaluation data; by default, nothing set by hand.

    python -m benchmarks.data_free
    python -m benchmarks.data_free resnet20
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from benchmarks import data
from benchmarks.quantize import MOBILENET, RESNET, exported, score
from benchmarks.rows import Row, main
from deploykit.core.artifact import TensorSpec
from deploykit.core.data import DataSet, Preprocess
from deploykit.core.manifest import Score
from deploykit.sources import data_of

COMMAND = "python -m benchmarks.data_free"
KINDS = {"synthetic": "matched to batch normalisation", "random": "random images"}
POINTS = 1.0


def answered(module: object, calibration: DataSet, evaluation: DataSet) -> Score:
    """How the int8 file answers in ONNX Runtime."""
    (made,) = exported(module, calibration, evaluation, ["x86"]).values()
    return score(made)


def rows(
    part: str, name: str, where: str, module: object, real: DataSet, evaluation: DataSet, look: Preprocess
) -> Sequence[Row]:
    """Points of top-1 that made-up inputs cost, against calibration on real ones."""
    found: dict[str, Score] = {"real": answered(module, real, evaluation)}
    seconds: dict[str, float] = {}
    for kind in KINDS:
        started = time.process_time()
        made = data_of(kind, [TensorSpec("x", (), "")], look, "calibration", 0, module)  # type: ignore[arg-type]
        seconds[kind] = time.process_time() - started
        found[kind] = answered(module, made, evaluation)
    made_rows = []
    for kind, title in KINDS.items():
        values = {f"top-1, {k} data": float(s.metric or 0) for k, s in found.items() if k in ("real", kind)}
        values |= {
            f"{k} data: {what}": value
            for k, s in found.items()
            if k in ("real", kind)
            for what, value in (
                ("agreement", float(s.agreement or 0)), ("logits, signal to noise (dB)", min(s.sqnr_db.values()))
            )
        }  # fmt: skip
        values["CPU seconds of making them"] = seconds[kind]
        lost = values["top-1, real data"] - values[f"top-1, {kind} data"]
        claim = f"{name} int8, calibrated without data ({title}): points of top-1 lost against real data"
        made_rows.append(Row(claim, lost, POINTS, "lower", where, f"{COMMAND} {part}", [0], values))
    return made_rows


def mobilenetv1() -> Sequence[Row]:
    """Depthwise convolutions, ReLU6."""
    look = Preprocess(crop=224, scale=1 / 127.5, mean=(1.0,), std=(1.0,))
    return rows("mobilenetv1", "MobileNetV1", MOBILENET, data.mobilenetv1(), data.imagenet(True), data.imagenet(False),
                look)  # fmt: skip


def resnet20() -> Sequence[Row]:
    """Residual, ReLU."""
    look = Preprocess(crop=32, mean=data.CIFAR_MEAN, std=data.CIFAR_STD)
    return rows("resnet20", "ResNet-20", RESNET, data.resnet20(), data.cifar("train", 512), data.cifar("test", 10_000),
                look)  # fmt: skip


if __name__ == "__main__":
    main(__doc__, "data_free", [mobilenetv1, resnet20])
