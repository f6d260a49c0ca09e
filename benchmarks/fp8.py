"""8-bit floating point beside 8-bit integers: the files for NVIDIA GPUs, run in ONNX Runtime on the CPU.

python -m benchmarks.fp8
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from benchmarks import data
from benchmarks.choices import in_memory
from benchmarks.quantize import exported, score
from benchmarks.rows import Row, record
from benchmarks.transformers import digits, planted, trained
from deploykit.core.data import DataSet
from deploykit.core.precision import Precision

COMMAND = "python -m benchmarks.fp8"
ABOUT = (
    "500 sample images (MobileNetV1), 2,000 JPEG CIFAR-10 test images (ResNet-20), scikit-learn digits (transformer); "
    "target gpu-h100, corrected as by default"
)
PRECISIONS: tuple[Precision, ...] = ("int8-fp16", "fp8")


def networks() -> Iterator[tuple[str, object, DataSet, DataSet]]:
    """Name, module, calibration and evaluation data."""
    yield "MobileNetV1 0.75", data.mobilenetv1(), data.imagenet(True), data.imagenet(False).take(slice(0, 500))
    yield "ResNet-20", data.resnet20(), data.cifar("train", 512), in_memory(data.cifar("test", 2000))
    train, evaluation = digits()
    net = trained(train)
    yield "vision transformer", net, train.spread(256), evaluation
    for factor in (20, 100):
        yield f"the same, 3 channels times {factor}", planted(net, factor), train.spread(256), evaluation


def rows() -> list[Row]:
    values: dict[str, float] = {}
    for name, module, calibration, evaluation in networks():
        for precision in PRECISIONS:
            (made,) = exported(module, calibration, evaluation, ["gpu-h100"], precision).values()
            found = score(made, precision)
            values |= {
                f"{name}, {precision}: accuracy": float(found.metric or 0),
                f"{name}, {precision}: agreement": float(found.agreement or 0),
                f"{name}, {precision}: dB": min(found.sqnr_db.values()),
            }
        print(name, values, flush=True)
    outliers = "the same, 3 channels times 100"
    gained = values[f"{outliers}, fp8: dB"] - values[f"{outliers}, int8-fp16: dB"]
    claim = "fp8 beside int8-fp16: decibels gained in a transformer with channels that stick out"
    return [
        Row(claim, gained, 0.0, "higher",
            ABOUT, COMMAND, [0], values)
    ]  # fmt: skip


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    record("quantize", rows())
