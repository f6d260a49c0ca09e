"""The recipe small_file as it ships: from samples alone the smallest file within half a point, packed.

The recipe judges points on a part of the calibration samples. What they are on other images is measured here, with
the file that comes out of the container again.

    python -m benchmarks.small_file
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import nn

from benchmarks import data
from benchmarks.choices import in_memory
from benchmarks.deep_compression import xz
from benchmarks.rows import Row, main
from benchmarks.sharing import classes
from deploykit import pipeline, recipes, targets
from deploykit.core.data import DataSet
from deploykit.core.request import Gate
from deploykit.dkz.extents import files_of
from deploykit.dkz.files import unpack_file
from deploykit.hub.lower import lower
from deploykit.models import accept_module

COMMAND = "python -m benchmarks.small_file"
LOST = 0.5
"""Points, by the recipe."""


def within(name: str, net: nn.Module, calibration: DataSet, evaluation: DataSet, about: str, part: str) -> list[Row]:
    """Points lost on other images than the recipe saw, beside bytes."""
    x86 = targets.load("x86")
    whole = lower(net, next(calibration.batches(2)).inputs).bytes
    with tempfile.TemporaryDirectory() as folder:
        out, again = Path(folder) / "x86", Path(folder) / "again"
        prepared = pipeline.prepare(accept_module(net), {"calibration": calibration}, None)
        steps = recipes.load("small_file", [x86])
        settings = pipeline.Settings(steps, precisions=("fp32",), benchmark=False, pack=True)
        pipeline.export(prepared, [x86], [out], settings, Gate())
        packed = out / "model.fp32.onnx.dkz"
        unpack_file(packed, again)
        file = again / "model.fp32.onnx"
        found, exact = classes(file.read_bytes(), evaluation), classes(whole, evaluation)
        size, beside = packed.stat().st_size, xz(files_of(file))
    before, after = (100 * float((c == evaluation.labels).mean()) for c in (exact, found))
    values = {
        "top-1, fp32": before, "top-1": after, "agreement": 100 * float((found == exact).mean()),
        "kB": size / 1000, "kB, xz of the same file": beside / 1000, "times smaller than fp32": len(whole) / size,
    }  # fmt: skip
    return [
        Row(f"{name}, recipe small_file: points lost on images it did not see", before - after, LOST, "lower", about,
            f"{COMMAND} {part}", [0], values, note="not trained"),
    ]  # fmt: skip


def resnet20() -> list[Row]:
    about = "JPEG CIFAR-10, 512 training images calibrate, 10,000 test images evaluate"
    calibration, evaluation = in_memory(data.cifar("train", 512)), in_memory(data.cifar("test", 10_000))
    return within("ResNet-20", data.resnet20(), calibration, evaluation, about, "resnet20")


def mobilenetv1() -> list[Row]:
    about = "200 sample images calibrate, 800 evaluate"
    calibration, evaluation = in_memory(data.imagenet(True)), data.imagenet(False)
    return within("MobileNetV1 0.75", data.mobilenetv1(), calibration, evaluation, about, "mobilenetv1")


if __name__ == "__main__":
    main(__doc__, "deep_compression", [resnet20, mobilenetv1])
