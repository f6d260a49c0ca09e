"""Deep Compression: what containers save beside xz, of files of every runtime and of weights that share values.

python -m benchmarks.deep_compression
"""

from __future__ import annotations

import json
import lzma
import math
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks import data, road
from benchmarks.choices import in_memory
from benchmarks.rows import Row, main
from deploykit import exporters, passes, pipeline, targets
from deploykit.bench.memory import peak_megabytes
from deploykit.core.context import Context
from deploykit.core.manifest import load_manifest
from deploykit.core.recipe import Step
from deploykit.dkz.container import pack
from deploykit.dkz.extents import files_of
from deploykit.dkz.front import CODERS, CONTEXTS
from deploykit.dkz.reading import unpack
from deploykit.dkz.weights import Extent, File, Shape
from deploykit.exporters.codebooks import store_codebooks
from deploykit.hub.lower import lower
from deploykit.hub.quantize import quantize
from deploykit.hub.sharing.codebooks import share, weights, with_weights

COMMAND = "python -m benchmarks.deep_compression"
SQUEEZENET = "squeezenet10_deepcompressed_imagenet.safetensors"
AUTHORS = 675_763
"""Bytes of the file that came with Han et al. 2016 for SqueezeNet."""
TARGETS = {"x86": "ONNX", "mobile-arm": "TFLite", "x86-openvino": "OpenVINO"}
TURNS = 5


def xz(files: Sequence[File]) -> int:
    """Bytes of ``xz -9e`` of each."""
    return sum(len(lzma.compress(file.data, preset=9 | lzma.PRESET_EXTREME)) for file in files)


def opened(container: bytes) -> dict[str, bytes]:
    return {name: b"".join(pieces) for name, pieces in unpack(container)}


def median_seconds(call: Callable[[], Any]) -> float:
    """Of CPU."""
    found = []
    for _ in range(TURNS):
        started = time.process_time()
        call()
        found.append(time.process_time() - started)
    return sorted(found)[TURNS // 2]


def squeezenet() -> list[Row]:
    """Weights that are pruned and share 256 values a layer already."""
    raw = (data.ROOT / SQUEEZENET).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    tensors = [own for name, own in json.loads(raw[8 : 8 + length]).items() if name != "__metadata__"]
    extents = []
    for own in sorted(tensors, key=lambda told: told["data_offsets"]):
        (start, end), dims = own["data_offsets"], own["shape"]
        kernel = math.prod(dims[2:])
        shape = Shape(dims[0], dims[1], kernel) if len(dims) > 1 else None
        extents.append(Extent(8 + length + start, (end - start) // 4, 32, shape=shape))
    file = File(SQUEEZENET, raw, extents)
    values: dict[str, float] = {coder: len(pack([file], coder)) for coder in CODERS}
    container = pack([file])
    if opened(container)[SQUEEZENET] != raw:
        raise AssertionError("what was unpacked is not what was packed")
    values |= {"fp32": len(raw), "xz": xz([file]), "the authors' file": AUTHORS}
    packed = lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)
    ours, theirs = median_seconds(lambda: opened(container)), median_seconds(lambda: lzma.decompress(packed))
    about, command = "SqueezeNet 1.0 as its authors compressed it, fp32 weights", f"{COMMAND} squeezenet"
    return [
        Row("SqueezeNet, pruned and shared: bytes of the container", len(container), AUTHORS, "lower", about, command,
            [], values, f"the authors' own file: {AUTHORS:,}"),
        Row("SqueezeNet, pruned and shared: container / xz", len(container) / values["xz"], 0.85, "lower", about,
            command, [], values, "xz -9e"),
        Row("SqueezeNet, pruned and shared: speed of unpacking, of xz -d", theirs / ours, 0.25, "higher", about,
            command, [], {"unpack: CPU seconds": ours, "xz -d: CPU seconds": theirs}, "xz -9e"),
    ]  # fmt: skip


def artifacts() -> list[Row]:
    """Files as they are exported: nothing is pruned or shared."""
    values = {}
    cases = {
        "ResNet-20": (data.resnet20(), data.cifar("train", 256), data.cifar("test", 500)),
        "MobileNetV1": (data.mobilenetv1(), in_memory(data.imagenet(True)), data.imagenet(False).spread(100)),
    }
    for name, (net, calibration, evaluation) in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            road.export(net, calibration, evaluation, list(TARGETS), Path(folder))
            for target, runtime in TARGETS.items():
                out = Path(folder) / target
                for file in load_manifest(out).files:
                    files = files_of(out / file.path)
                    container = pack(files)
                    if opened(container) != {own.name: own.data for own in files}:
                        raise AssertionError(f"{file.path} is not what was packed")
                    what = f"{name}, {runtime} {file.precision}"
                    values |= {f"{what}: bytes": len(container), f"{what}: of xz": len(container) / xz(files)}
                    print(what, values[f"{what}: of xz"], flush=True)
    return [
        Row("Files of ONNX Runtime, LiteRT and OpenVINO as exported, packed: container / xz, the largest",
            max(share for what, share in values.items() if what.endswith("of xz")), 1.0, "lower",
            "ResNet-20 and MobileNetV1 0.75, every precision", f"{COMMAND} artifacts", [0], values, "xz -9e")
    ]  # fmt: skip


def codebook_file() -> list[Row]:
    """MobileNetV1 with 16 and with 256 values a layer: what ONNX Runtime makes of codebooks when it loads them."""
    example = next(data.imagenet(False).batches(1)).inputs
    graph = lower(data.mobilenetv1(), example)
    onnx_exporter, values = exporters.load("onnx"), dict[str, float]()
    with tempfile.TemporaryDirectory() as folder:
        for bits in (4, 8):
            made = with_weights(graph, {own.name: share(own.values, bits).weight for own in weights(graph)})
            plain, coded = Path(folder) / f"plain-{bits}.onnx", Path(folder) / f"coded-{bits}.onnx"
            model = onnx.load_model_from_string(made.bytes)
            onnx.save_model(model, plain)
            store_codebooks(model, targets.load("x86").opset)
            onnx.save_model(model, coded)
            (left,), (right,) = (list(onnx_exporter.load(path)(example).values()) for path in (plain, coded))
            if not np.array_equal(left, right):
                raise AssertionError("codebooks changed the answers")
            for kind, path in (("plain", plain), ("codebook", coded)):
                values |= {
                    f"{bits} bits, {kind}: bytes": path.stat().st_size,
                    f"{bits} bits, {kind}: CPU seconds to load": median_seconds(lambda p=path: onnx_exporter.load(p)),
                    f"{bits} bits, {kind}: MB to load and run": peak_megabytes("onnx", path, example, 1) or 0.0,
                }
    return [
        Row("MobileNetV1, 4-bit codebooks in plain ONNX: bytes, of the fp32 file",
            values["4 bits, codebook: bytes"] / values["4 bits, plain: bytes"], 0.2, "lower",
            "MobileNetV1 0.75, weights shared in 4 and 8 bits; ONNX Runtime on one thread", f"{COMMAND} codebook_file",
            [], values, "several times smaller was asked for; answers are equal bit for bit")
    ]  # fmt: skip


def small_file() -> list[Row]:
    """ResNet-20 with 16 values a layer: what contexts save of a small file, and what that takes."""
    example = next(data.cifar("test", 2).batches(1)).inputs
    graph = lower(data.resnet20(), example)
    made = with_weights(graph, {own.name: share(own.values, 4).weight for own in weights(graph)})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        path.write_bytes(made.bytes)
        files = files_of(path)
    values: dict[str, float] = {"fp32": len(files[0].data), "xz": xz(files)}
    whole = lzma.compress(files[0].data, preset=9 | lzma.PRESET_EXTREME)
    values["xz -d: CPU seconds"] = median_seconds(lambda: lzma.decompress(whole))
    for coder in (*CODERS, CONTEXTS):
        container = pack(files, coder)
        if opened(container) != {own.name: own.data for own in files}:
            raise AssertionError("what was unpacked is not what was packed")
        values |= {coder: len(container), f"{coder}: CPU seconds": median_seconds(lambda c=container: opened(c))}
    slowest = max(values[f"{coder}: CPU seconds"] for coder in CODERS)
    return [
        Row("ResNet-20, 16 values a layer: speed of unpacking by rans and huffman (the slower), of xz -d",
            values["xz -d: CPU seconds"] / slowest, 0.25, "higher", "fp32 .onnx, nothing pruned",
            f"{COMMAND} small_file", [], {}, "xz -9e"),
        Row("ResNet-20, 16 values a layer: speed of unpacking by contexts, of xz -d",
            values["xz -d: CPU seconds"] / values[f"{CONTEXTS}: CPU seconds"], 0.25, "higher",
            "fp32 .onnx, nothing pruned", f"{COMMAND} small_file", [], {}, "xz -9e"),
        Row("ResNet-20, 16 values a layer: container with contexts, bytes, of one without",
            values[CONTEXTS] / min(values[coder] for coder in CODERS), None, "lower", "fp32 .onnx, nothing pruned",
            f"{COMMAND} small_file", [], values, "rANS and Huffman, every code by itself",
            note="decoding a small file is calls of numpy more than work: 0.1 s, where xz takes less than 0.01"),
    ]  # fmt: skip


def pruned() -> list[Row]:
    """ResNet-20 with zeros whose other weights share nothing, and the integers made of it."""
    net, images, values = data.resnet20(), in_memory(data.cifar("train", 512)), dict[str, float]()
    here = Context(
        targets.load("x86"), {"calibration": replace(images, labels=None)}, next(images.batches(2)).inputs, original=net
    )
    for zeros in (0.5, 0.7, 0.8, 0.9):
        made = net
        for step in (Step("sparsify", {"sparsity": zeros, "criterion": "auto"}), Step("refit")):
            made = passes.build(step)(made, here)
        graph = lower(made, here.example)
        hub = quantize(graph, pipeline.calibrate(graph, images), targets.load("x86").quant)
        for precision, model in (("fp32", graph.bytes), ("int8", hub.bytes)):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "net.onnx"
                path.write_bytes(model)
                files = files_of(path)
            values[f"{zeros:.0%} zeros, {precision}"] = len(pack(files)) / xz(files)
            print(zeros, precision, values[f"{zeros:.0%} zeros, {precision}"], flush=True)
    return [
        Row("ResNet-20: pruned alone, container / xz of the same file (worst)", max(values.values()), 0.85, "lower",
            "512 training images; the weights that are left are fitted to them, and share no values",
            f"{COMMAND} pruned", [0], values, "xz -9e",
            "three of four bytes of an fp32 weight are as good as random, and so is most of an int8 weight"),
    ]  # fmt: skip


if __name__ == "__main__":
    main(__doc__, "deep_compression", [squeezenet, artifacts, codebook_file, small_file, pruned])
