"""Codebooks beside linear quantization at 2 to 5 bits, and accuracy over bytes of what is pruned, shared and coded.

Linear weights are fine-tuned as integers (gptq, then qat: weights and scales are learned; activations have 16 bits, so
that nothing else is lost), shared ones as values of a codebook, for as many steps of the same training.

    python -m benchmarks.sharing
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import nn

from benchmarks import data, lenets
from benchmarks.choices import in_memory
from benchmarks.deep_compression import xz
from benchmarks.rows import Row, main
from deploykit import passes, pipeline, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.recipe import Step, TrainSettings
from deploykit.dkz.container import pack
from deploykit.dkz.extents import files_of
from deploykit.exporters.codebooks import store_codebooks
from deploykit.hub.graph import FloatGraph, Hub
from deploykit.hub.lower import lower
from deploykit.hub.quantize import quantize
from deploykit.hub.running import session
from deploykit.trainer import Trainer

COMMAND = "python -m benchmarks.sharing"
X86 = targets.load("x86")
BITS = (2, 3, 4, 5)
STEPS = 300
KEPT = ((0.0, 6), (0.0, 5), (0.0, 4), (0.5, 5), (0.5, 4), (0.7, 5), (0.7, 4), (0.8, 5), (0.8, 4))
"""Zeros and bits of the curves."""
WITHIN = 1.0
"""Points that a file may lose to be compared by its bytes."""


def classes(model: bytes, evaluation: DataSet) -> NDArray[np.int64]:
    """Top-1 of the first output."""
    run = session(onnx.load_model_from_string(model))
    return np.concatenate([run.run(None, dict(b.inputs))[0].argmax(1) for b in evaluation.batches(100)])


def top1(model: bytes, evaluation: DataSet) -> float:
    """In percent."""
    assert evaluation.labels is not None
    return 100 * float((classes(model, evaluation) == evaluation.labels).mean())


def context(net: nn.Module, calibration: DataSet, train: DataSet | None = None, **settings: Any) -> Context:
    """What steps may ask for; the loss is what they follow without labels."""
    roles = {"calibration": replace(calibration, labels=None)} | ({"train": train} if train is not None else {})
    return Context(
        X86, roles, next(calibration.batches(2)).inputs, original=net, trainer=Trainer(TrainSettings(**settings))
    )


def run(subject: Any, here: Context, *steps: Step) -> Any:
    """Steps of a recipe, one after the other."""
    for step in steps:
        subject = passes.build(step)(subject, here)
    return subject


def linear(graph: FloatGraph, here: Context, bits: int, granularity: Literal["tensor", "channel"]) -> bytes:
    """Weights as integers times a scale, fine-tuned."""
    spec = replace(X86.quant, weight_bits=bits, activation_bits=16, weight_granularity=granularity)
    hub: Hub = quantize(graph, pipeline.calibrate(graph, here.data["calibration"]), spec)
    tuned: Hub = run(hub, here, Step("gptq"), Step("qat", {"steps": STEPS}))
    return tuned.bytes


def shared(graph: FloatGraph, here: Context, bits: int, start: str) -> bytes:
    """Weights as values of a codebook, fine-tuned."""
    made: FloatGraph = run(
        graph, here, Step("share", {"bits": bits, "start": start}), Step("tune_codebooks", {"steps": STEPS})
    )
    return made.bytes


def beside(name: str, net: nn.Module, here: Context, evaluation: DataSet) -> dict[str, float]:
    """Accuracy of all four at every number of bits."""
    graph = lower(net, here.example)
    values = {f"{name}, fp32": top1(graph.bytes, evaluation)}
    for bits in BITS:
        ways = {
            "codebook": lambda b: shared(graph, here, b, "optimal"),
            "codebook, linear start": lambda b: shared(graph, here, b, "linear"),
            "one scale": lambda b: linear(graph, here, b, "tensor"),
            "a scale per channel": lambda b: linear(graph, here, b, "channel"),
        }
        for what, way in ways.items():
            values[f"{name}, {bits} bits, {what}"] = top1(way(bits), evaluation)
            print(f"{name}, {bits} bits, {what}", values[f"{name}, {bits} bits, {what}"], flush=True)
    return values


def codebooks() -> list[Row]:
    """The claim of Han et al. 2016 that codebooks beat linear quantization, each fine-tuned as long."""
    train, test = lenets.images("train"), lenets.images("test")
    net = lenets.reference(lenets.NETS[1], 0, train)
    some = train.pick(np.arange(0, len(train), 120))
    values = beside("LeNet-5", net, context(net, some, train, batch=100), test)
    resnet, images = data.resnet20(), in_memory(data.cifar("train", 20_000))
    here = context(resnet, images.pick(np.arange(512)), images, batch=64, augment=("flip", "crop"))
    values |= beside("ResNet-20", resnet, here, in_memory(data.cifar("test", 2000)))
    gains = [
        values[f"{name}, {bits} bits, codebook"] - values[f"{name}, {bits} bits, one scale"]
        for name in ("LeNet-5", "ResNet-20")
        for bits in BITS
    ]
    return [
        Row("Codebooks above linear quantization with one scale a layer, 2 to 5 bits, both fine-tuned (points, mean)",
            sum(gains) / len(gains), 0.0, "higher",
            f"LeNet-5 on MNIST, ResNet-20 on JPEG CIFAR-10 (2,000 test images); {STEPS} steps each, without labels",
            f"{COMMAND} codebooks", [0], values, note="reported as measured")
    ]  # fmt: skip


def sizes(model: onnx.ModelProto) -> dict[str, float]:
    """Bytes of a file, of the best xz and of the .dkz."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        path.write_bytes(model.SerializeToString(deterministic=True))
        files = files_of(path)
        return {"file": path.stat().st_size, "xz": xz(files), "dkz": len(pack(files))}


def curve(name: str, net: nn.Module, here: Context, evaluation: DataSet) -> dict[str, float]:
    """Accuracy, agreement and bytes of int8 and of what is pruned and shared, from calibration samples alone."""
    graph = lower(net, here.example)
    exact = classes(graph.bytes, evaluation)
    values: dict[str, float] = {}

    def add(what: str, stored: onnx.ModelProto) -> None:
        model = stored.SerializeToString()
        found = {
            "accuracy": top1(model, evaluation),
            "agreement": 100 * float((classes(model, evaluation) == exact).mean()),
        }
        for key, value in (found | sizes(stored)).items():
            values[f"{name}, {what}: {key}"] = value
        print(name, what, found, flush=True)

    add("fp32", onnx.load_model_from_string(graph.bytes))
    hub = quantize(graph, pipeline.calibrate(graph, here.data["calibration"]), X86.quant)
    corrected: Hub = run(hub, here, Step("weight_correct"))
    add("int8", onnx.load_model_from_string(corrected.bytes))
    sparse: dict[float, FloatGraph] = {0.0: graph}
    for zeros, bits in KEPT:
        if zeros not in sparse:
            pruned: nn.Module = run(net, here, Step("sparsify", {"sparsity": zeros}), Step("refit"))
            sparse[zeros] = lower(pruned, here.example)
        made: FloatGraph = run(sparse[zeros], here, Step("share", {"bits": bits}))
        stored = onnx.load_model_from_string(made.bytes)
        store_codebooks(stored, X86.opset)
        add(f"{zeros:.0%} zeros, {bits} bits", stored)
    return values


def smallest(name: str, values: Mapping[str, float], what: str, key: str) -> float:
    """Bytes of the smallest file that loses little enough."""
    bar = values[f"{name}, fp32: accuracy"] - WITHIN
    them = {
        k.removesuffix(": accuracy") for k in values if k.startswith(name) and k.endswith(": accuracy") and what in k
    }
    return min(values[f"{k}: {key}"] for k in them if values[f"{k}: accuracy"] >= bar)


def curves() -> list[Row]:
    """Pruned, shared and coded beside int8 and its xz."""
    resnet, cifar = data.resnet20(), in_memory(data.cifar("train", 512))
    values = curve("ResNet-20", resnet, context(resnet, cifar), in_memory(data.cifar("test", 2000)))
    mobile, photographs = data.mobilenetv1(), in_memory(data.imagenet(True))
    values |= curve("MobileNetV1", mobile, context(mobile, photographs), data.imagenet(False))
    shares = {
        name: smallest(name, values, "zeros", "dkz") / values[f"{name}, int8: xz"]
        for name in ("ResNet-20", "MobileNetV1")
    }
    return [
        Row(f"Pruned, shared and coded without training, at most {WITHIN:g} point lost: bytes, of int8 with xz (worst)",
            max(shares.values()), 1.0, "lower",
            "ResNet-20 (512 images calibrate, 2,000 evaluate) and MobileNetV1 0.75 (200 and 800)", f"{COMMAND} curves",
            [0], values | shares, "xz -9e of the int8 .onnx")
    ]  # fmt: skip


if __name__ == "__main__":
    main(__doc__, "deep_compression", [codebooks, curves])
