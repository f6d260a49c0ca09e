"""Codebooks beside linear quantization at 2 to 5 bits, and accuracy over bytes of what is pruned, shared and coded.

Linear weights are fine-tuned as integers (gptq, then qat: weights and scales are learned; activations have 16 bits, so
that nothing else is lost), shared ones as values of a codebook, for as many steps of the same training.

    python -m benchmarks.sharing
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
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
from deploykit.core.journal import Journal
from deploykit.core.recipe import Step, TrainSettings
from deploykit.dkz.container import pack
from deploykit.dkz.extents import files_of
from deploykit.exporters.codebooks import store_codebooks
from deploykit.hub.graph import FloatGraph, Hub
from deploykit.hub.lower import lower
from deploykit.hub.quantize import quantize
from deploykit.hub.running import session
from deploykit.training.trainer import Trainer

COMMAND = "python -m benchmarks.sharing"
X86 = targets.load("x86")
BITS = (2, 3, 4, 5)
STEPS = 200
Ways = Sequence[tuple[float, str, Sequence[Step]]]
"""The share of zeros, what values are chosen for, and ways to choose them."""


def ways(bits: Mapping[float, Sequence[int]], shares: Mapping[float, Sequence[float]]) -> Ways:
    """By the share of zeros: so many bits near the weights, and budgets of bytes near the outputs; 4 bits by both."""
    near = [(zeros, "weights", [Step("share", {"bits": b}) for b in some]) for zeros, some in bits.items()]
    four = [(0.0, "outputs, 4 bits", [Step("share", {"bits": 4, "near": "outputs"})])]
    far = [
        (zeros, "outputs", [Step("share", {"bytes": share, "near": "outputs"}) for share in some])
        for zeros, some in shares.items()
    ]
    return near + four + far


RESNET20 = ways(
    {0.0: (6, 5, 4), 0.3: (6, 5, 4), 0.5: (6, 5, 4), 0.7: (5, 4), 0.8: (5, 4)},
    {0.0: (0.16, 0.13, 0.1, 0.08, 0.06, 0.05), 0.5: (0.08, 0.06)},
)
MOBILENETV1 = ways({0.0: (4,)}, {0.0: (0.2, 0.16, 0.14, 0.12, 0.11, 0.1, 0.08)})
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


def beside(name: str, net: nn.Module, here: Context, evaluation: DataSet, about: str) -> Row:
    """Accuracy of all four at every number of bits."""
    graph = lower(net, here.example)
    values: dict[str, float] = {}
    for bits in BITS:
        ways = {
            "codebook": lambda b: shared(graph, here, b, "optimal"),
            "codebook, linear start": lambda b: shared(graph, here, b, "linear"),
            "one scale": lambda b: linear(graph, here, b, "tensor"),
            "a scale per channel": lambda b: linear(graph, here, b, "channel"),
        }
        for what, way in ways.items():
            values[f"{what}: {bits}"] = top1(way(bits), evaluation)
            print(f"{name}, {bits} bits, {what}", values[f"{what}: {bits}"], flush=True)
    gains = [values[f"codebook: {bits}"] - values[f"one scale: {bits}"] for bits in BITS]
    return Row(
        f"{name}: codebooks above linear quantization, one scale a layer, 2 to 5 bits, both fine-tuned (points, mean)",
        sum(gains) / len(gains), None, "higher", f"{about}; {STEPS} steps each, without labels", f"{COMMAND} codebooks",
        [0], values, note=f"fp32 {top1(graph.bytes, evaluation):.2f}",
    )  # fmt: skip


def codebooks() -> list[Row]:
    """The claim of Han et al. 2016 that codebooks beat linear quantization, each fine-tuned as long."""
    train, test = lenets.images("train"), lenets.images("test")
    net = lenets.reference(lenets.NETS[1], 0, train)
    some = train.pick(np.arange(0, len(train), 120))
    resnet, images = data.resnet20(), in_memory(data.cifar("train", 20_000))
    here = context(resnet, images.pick(np.arange(512)), images, batch=64, augment=("flip", "crop"))
    return [
        beside("LeNet-5", net, context(net, some, train, batch=100), test, "MNIST"),
        beside("ResNet-20", resnet, here, in_memory(data.cifar("test", 2000)), "JPEG CIFAR-10, 2,000 test images"),
    ]


def sizes(model: onnx.ModelProto) -> dict[str, float]:
    """Bytes of a file, of the best xz and of the .dkz."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        path.write_bytes(model.SerializeToString(deterministic=True))
        files = files_of(path)
        return {"file": path.stat().st_size, "xz": xz(files), "dkz": len(pack(files))}


def curve(
    name: str,
    net: nn.Module,
    here: Context,
    evaluation: DataSet,
    about: str,
    part: str,
    every: Ways,
) -> list[Row]:
    """Accuracy and agreement over kilobytes of int8 and of what is pruned and shared, from samples alone."""
    graph = lower(net, here.example)
    exact, bar = classes(graph.bytes, evaluation), top1(graph.bytes, evaluation) - WITHIN
    accuracy: dict[str, float] = {}
    agreement: dict[str, float] = {}
    of_xz: dict[str, float] = {}
    of_plain: dict[str, float] = {}

    def add(line: str, stored: onnx.ModelProto, kinds: Mapping[str, str]) -> dict[str, float]:
        found, taken = classes(stored.SerializeToString(), evaluation), sizes(stored)
        for kind, what in kinds.items():
            key = f"{line}{what}: {taken[kind] / 1000:.1f}"
            accuracy[key] = 100 * float((found == evaluation.labels).mean())
            agreement[key] = 100 * float((found == exact).mean())
            print(name, key, accuracy[key], agreement[key], flush=True)
        return taken

    hub = quantize(graph, pipeline.calibrate(graph, here.data["calibration"]), X86.quant)
    corrected: Hub = run(hub, here, Step("weight_correct"))
    add("int8", onnx.load_model_from_string(corrected.bytes), {"file": "", "xz": " with xz", "dkz": " packed"})
    pruned: dict[float, FloatGraph] = {0.0: graph}
    for zeros, near, steps in every:
        if zeros not in pruned:
            smaller = run(net, here, Step("sparsify", {"sparsity": zeros, "criterion": "auto"}), Step("refit"))
            pruned[zeros] = lower(smaller, here.example)
        with tempfile.TemporaryDirectory() as folder:  # what levels lose is the same for every budget
            kept = replace(here, journal=Journal(Path(folder)))
            for number, way in enumerate(steps):
                made: FloatGraph = run(pruned[zeros], kept, way)
                plain = onnx.load_model_from_string(made.bytes)
                stored = onnx.load_model_from_string(made.bytes)
                store_codebooks(stored, X86.opset)
                line = f"{zeros:.0%} zeros, shared near {near}"
                for shares, taken in ((of_xz, add(line, stored, {"dkz": ", packed"})), (of_plain, sizes(plain))):
                    shares[f"{line}, {number}"] = taken["dkz"] / taken["xz"]

    def smallest(what: str) -> float:
        fine = [float(key.split(": ")[1]) for key, top in accuracy.items() if what in key and top >= bar]
        return min(fine, default=float("inf"))  # none is good enough: worse than any other

    def four(near: str) -> float:
        return [found for key, found in agreement.items() if key.startswith(f"0% zeros, shared near {near}, packed")][
            -1
        ]

    command = f"{COMMAND} {part}"
    return [
        Row(f"{name}, 16 values a layer: agreement of values near outputs above those near weights (points)",
            four("outputs, 4 bits") - four("weights"), 0.0, "higher", about, command, [0],
            {"near the weights: agreement": four("weights"), "near the outputs: agreement": four("outputs, 4 bits")},
            note="neither is trained"),
        Row(f"{name}: pruned, shared and coded, at most {WITHIN:g} point lost: bytes, of int8 with xz",
            smallest("shared near") / smallest("int8 with xz"), 1.0, "lower", about, command, [0], accuracy,
            "xz -9e of the int8 .onnx", "not trained; values are top-1 % at kilobytes"),
        Row(f"{name}: int8 packed, bytes, of int8 with xz", smallest("int8 packed") / smallest("int8 with xz"), 1.0,
            "lower", about, command, [0], agreement, "xz -9e of the int8 .onnx",
            "values are agreement with fp32 in % at kilobytes"),
        Row(f"{name}: pruned or shared, container / xz of the same plain fp32 file (worst)", max(of_plain.values()),
            0.85, "lower", about, command, [0], of_plain, "xz -9e"),
        Row(f"{name}: pruned or shared, container / xz of the same file (worst)", max(of_xz.values()), 0.85, "lower",
            about, command, [0], of_xz, "xz -9e",
            "files that keep codes already: xz comes within a few percent of their entropy, and contexts find "
            "little more where neither zeros nor kernels tell of their neighbours"),
    ]  # fmt: skip


def curve_resnet20() -> list[Row]:
    net, cifar = data.resnet20(), in_memory(data.cifar("train", 512))
    about = "JPEG CIFAR-10, 512 training images calibrate, 2,000 test images evaluate"
    return curve(
        "ResNet-20", net, context(net, cifar), in_memory(data.cifar("test", 2000)), about, "curve_resnet20", RESNET20
    )


def curve_mobilenetv1() -> list[Row]:
    net, photographs = data.mobilenetv1(), in_memory(data.imagenet(True))
    about = "200 sample images calibrate, 800 evaluate"
    return curve(
        "MobileNetV1 0.75", net, context(net, photographs), data.imagenet(False), about, "curve_mobilenetv1",
        MOBILENETV1,
    )  # fmt: skip


if __name__ == "__main__":
    main(__doc__, "deep_compression", [codebooks, curve_resnet20, curve_mobilenetv1])
