"""Few bits after a little training: what an epoch of qat makes of files that calibration alone leaves too far off.

Accuracy is that of the artifact, run in ONNX Runtime on all 10,000 test images; training sees the 30,000 training
images once, without their labels.

    python -m benchmarks.qat
"""

from __future__ import annotations

from benchmarks import data
from benchmarks.choices import in_memory
from benchmarks.quantize import exported, score, size
from benchmarks.rows import Row, main
from deploykit.core.data import DataSet
from deploykit.core.precision import Precision
from deploykit.core.recipe import Recipe, Step, TrainSettings

COMMAND = "python -m benchmarks.qat"
ABOUT = (
    "ResNet-20, 512 JPEG CIFAR-10 training images calibrate (thresholds mse), 30,000 train once, all 10,000 test "
    "images evaluate"
)
IMAGES, BATCH = 30_000, 64


def trained(precision: Precision, images: DataSet) -> dict[str, float]:
    """Accuracy and agreement of files without and with training, in percent, and their bytes."""
    training = TrainSettings(batch=BATCH, augment=("flip", "crop"))
    net, calibration = data.resnet20(), data.cifar("train", 512)
    evaluation = in_memory(data.cifar("test", 10_000))
    (plain,) = exported(net, calibration, evaluation, ["x86"], "fp32").values()
    after = Recipe((Step("gptq"), Step("qat", {"steps": len(images) // BATCH})), training)
    found = {"fp32: accuracy": float(score(plain, "fp32").metric or 0)}
    for what, recipe in (("calibration alone", Recipe()), ("qat", after)):
        (made,) = exported(
            net, calibration, evaluation, ["x86"], precision, recipe=recipe, train=images, thresholds="mse"
        ).values()
        scored = score(made, precision)
        found |= {f"{what}: accuracy": float(scored.metric or 0), f"{what}: agreement": float(scored.agreement or 0)}
        found["bytes"] = size(made, precision)
        print(precision, found, flush=True)
    return found


def w4a4() -> list[Row]:
    found = trained("w4a4", in_memory(data.cifar("train", IMAGES)))
    return [
        Row("ResNet-20, weights and activations in 4 bits, after an epoch of qat: top-1 (%)", found["qat: accuracy"],
            found["fp32: accuracy"] - 2.0, "higher", ABOUT, f"{COMMAND} w4a4", [0], found)
    ]  # fmt: skip


def ternary() -> list[Row]:
    found = trained("w2a8", in_memory(data.cifar("train", IMAGES)))
    return [
        Row("ResNet-20, weights -1, 0 or 1, after an epoch of qat: top-1 gained (points)",
            found["qat: accuracy"] - found["calibration alone: accuracy"], 0.0, "higher", ABOUT, f"{COMMAND} ternary",
            [0], found, note="reported; no bar was set for ternary weights but this one")
    ]  # fmt: skip


if __name__ == "__main__":
    main(__doc__, "qat", [w4a4, ternary])
