"""Preprocessing folded in: files that take raw uint8 images against files that take normalised floats."""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from benchmarks import data
from benchmarks.rows import Row, record
from deploykit import pipeline, targets
from deploykit.check import Gate
from deploykit.core.artifact import TensorSpec
from deploykit.core.data import DataSet, Preprocess
from deploykit.core.manifest import Manifest, load_manifest
from deploykit.models import accept_module
from deploykit.sources import load_data

COMMAND = "python -m benchmarks.wide_pixels"
TARGETS = ("x86", "mobile-arm", "x86-openvino")
IMAGES = 500
X = (TensorSpec("x", (), ""),)


def cifar_pixels(split: str, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The first images of a split, ``[n, 32, 32, 3]``, and their classes."""
    raw = np.load(data.ROOT / "cifar10_jpg.npz")
    stream, offsets = raw[f"jpg_{split}"], raw[f"off_{split}"]
    streams = (stream[offsets[i] : offsets[i + 1]].tobytes() for i in range(count))
    images = np.stack([np.asarray(Image.open(io.BytesIO(s)).convert("RGB")) for s in streams])
    return images, raw[f"y_{split}"][:count].astype(np.int64)


def imagenet_pixels(positions: range) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Sample images, ``[n, 224, 224, 3]``, and their classes."""
    with tarfile.open(data.ROOT / "imagenet_samples_224.tar") as archive:
        members = sorted((m for m in archive.getmembers() if m.name.endswith(".jpg")), key=lambda m: Path(m.name).name)
        streams = [archive.extractfile(members[i]) for i in positions]
        images = np.stack([np.asarray(Image.open(s).convert("RGB")) for s in streams if s is not None])
    return images, np.asarray([int(Path(members[i].name).name.split("_")[0]) for i in positions], np.int64)


def export(
    module: nn.Module, parts: dict[str, DataSet], out: Path, uint8_input: bool
) -> dict[str, tuple[Path, Manifest]]:
    """The road with default settings, with or without the preprocessing inside the files."""
    prepared = pipeline.prepare(accept_module(module), {"calibration": parts["calib"], "eval": parts["eval"]}, None)
    known = [t for t in TARGETS if t in targets.names()]
    folders = [out / t for t in known]
    settings = pipeline.Settings(benchmark=False, threads=2, uint8_input=uint8_input)
    pipeline.export(prepared, [targets.load(t) for t in known], folders, settings, Gate())
    return {t: (f, load_manifest(f)) for t, f in zip(known, folders, strict=True)}


def first_operator_is_integer(exporter: str, path: Path) -> bool:
    """Whether nothing is computed in float between the pixels and the first convolution of the runtime's own graph."""
    if exporter == "onnx":
        return _first_in_onnxruntime(path) == "QLinearConv"
    return _first_in_litert(path) == "CONV_2D"


def _first_in_onnxruntime(path: Path) -> str:
    """The first operator behind the input in the graph that ONNX Runtime really runs, layout changes left out."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        options.log_severity_level = 4
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath).graph
    value = graph.input[0].name
    while True:
        (node,) = [n for n in graph.node if value in n.input]
        if node.op_type not in ("Transpose", "ReorderInput"):
            return str(node.op_type)
        value = node.output[0]


def _first_in_litert(path: Path) -> str:
    """The first operator of a .tflite file behind the change from uint8 to int8 storage, which moves zero points."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path))
    names = [op["op_name"] for op in interpreter._get_ops_details()]
    return str(next(n for n in names if n not in ("QUANTIZE", "PAD", "RESHAPE")))


def measure(name: str, module: Callable[[], nn.Module], parts: dict[str, DataSet], what: str) -> list[Row]:
    """The rows of one network."""
    with tempfile.TemporaryDirectory() as folder:
        plain = export(module(), parts, Path(folder) / "plain", uint8_input=False)
        inside = export(module(), parts, Path(folder) / "inside", uint8_input=True)
        lost, border, integer = {}, {}, {}
        for target, (path, manifest) in inside.items():
            before, after = (_int8(m) for m in (plain[target][1], manifest))
            lost[target] = before - after
            for check in manifest.checks:
                if "border" in check.name and check.value is not None:
                    border[target] = check.value
            (file,) = [f for f in manifest.files if f.precision == "int8"]
            if manifest.exporter in ("onnx", "tflite"):
                integer[target] = float(first_operator_is_integer(manifest.exporter, path / file.path))
    worst = max(map(abs, lost.values()))
    return [
        Row(f"{name}: raw uint8 input against normalised floats, points apart ({', '.join(lost)})", worst, 0.5, "lower",
            what, COMMAND, values=lost),
        Row(f"{name}: border error of folding, signal to error (dB)", min(border.values()), 30.0, "higher", what,
            COMMAND, values=border),
        Row(f"{name}: first operator integer with raw uint8 input (ORT, LiteRT)", min(integer.values()), 1.0, "higher",
            what, COMMAND, values=integer),
    ]  # fmt: skip


def _int8(manifest: Manifest) -> float:
    (found,) = [s.metric for s in manifest.scores if s.precision == "int8"]
    assert found is not None
    return found


def _data(folder: Path, role: str, images: NDArray[np.uint8], labels: NDArray[np.int64], p: Preprocess) -> DataSet:
    np.savez(folder / f"{role}.npz", x=images, y=labels)
    return load_data(str(folder / f"{role}.npz"), X, p, "calibration" if role == "calib" else "eval")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("nets", nargs="*", choices=["resnet20", "mobilenetv1", []], help="default: all")
    chosen = parser.parse_args().nets or ["resnet20", "mobilenetv1"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "resnet20" in chosen:
            p = Preprocess(mean=data.CIFAR_MEAN, std=data.CIFAR_STD)
            parts = {
                "calib": _data(folder, "calib", *cifar_pixels("train", 256), p),
                "eval": _data(folder, "eval", *cifar_pixels("test", IMAGES), p),
            }
            what = f"256 JPEG CIFAR-10 training images calibrate, {IMAGES} test images evaluate"
            record("wide", measure("ResNet-20", data.resnet20, parts, what))
        if "mobilenetv1" in chosen:
            p = Preprocess(mean=(0.5,), std=(0.5,))
            parts = {
                "calib": _data(folder, "calib", *imagenet_pixels(range(0, 1000, 10)), p),
                "eval": _data(folder, "eval", *imagenet_pixels(range(1, 1000, 2)), p),
            }
            what = "100 ImageNet sample images calibrate, 500 others evaluate"
            record("wide", measure("MobileNetV1 0.75", data.mobilenetv1, parts, what))


if __name__ == "__main__":
    main()
