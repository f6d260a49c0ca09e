"""Formats side by side: bytes, time and noise of the files of every precision that a runtime here can run.

Times are medians of one thread, all files of a network in turns.

    python -m benchmarks.formats
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import data
from benchmarks.quantize import RUNTIMES, score, size
from benchmarks.rows import Row, main
from benchmarks.weight_only import LENGTH, WIDTH, encoder
from deploykit import exporters, pipeline, targets
from deploykit.bench.timing import in_turns
from deploykit.core.data import DataSet
from deploykit.core.errors import GateFailed
from deploykit.core.manifest import load_manifest
from deploykit.core.precision import Precision
from deploykit.core.request import Gate
from deploykit.models import Model, accept_module, load_model

COMMAND = "python -m benchmarks.formats"
RUNS, SECONDS = 300, 60.0
ALONE: Mapping[str, tuple[Precision, ...]] = {
    "x86": ("fp32", "w8", "dynamic", "w4"), "x86-openvino": ("fp32", "w8", "w4"),
    "mobile-arm": ("fp32", "w8", "dynamic"),
}  # fmt: skip
"""Precisions of weights alone, by target."""
BOTH: Mapping[str, tuple[Precision, ...]] = {
    "x86": ("fp32", "int8", "w4a8", "w4a4", "int16x8"), "mobile-arm": ("fp32", "int8", "w4a8", "int16x8"),
}  # fmt: skip
"""Precisions of weights and activations."""


def files(
    model: Model, roles: Mapping[Any, DataSet], wanted: Mapping[str, Sequence[Precision]]
) -> dict[tuple[str, str], dict[str, float]]:
    """Bytes, milliseconds and decibels of every file, by runtime and precision."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    prepared = pipeline.prepare(model, roles, None)
    sample = next(roles["calibration"].batches(1)).inputs
    with tempfile.TemporaryDirectory() as name:
        for target, precisions in wanted.items():
            out = Path(name) / target
            settings = pipeline.Settings(precisions=precisions, benchmark=False, threads=1)
            with contextlib.suppress(GateFailed):
                pipeline.export(prepared, [targets.load(target)], [out], settings, Gate())
            made = load_manifest(out)
            exporter = exporters.load(targets.load(target).exporter)
            paths = {f.precision: f.path for f in made.files}
            calls = [functools.partial(exporter.load(out / paths[p], 1), sample) for p in precisions]
            for p, times in zip(precisions, in_turns(calls, RUNS, SECONDS), strict=True):
                noise = min(score(made, p).sqnr_db.values())
                found[RUNTIMES[target], p] = {
                    "bytes": size(made, p), "ms": float(np.median(times)), "dB": float(noise)
                }  # fmt: skip
                print(target, p, found[RUNTIMES[target], p], flush=True)
    return found


def weights() -> list[Row]:
    """Weights alone: a transformer."""
    random = np.random.default_rng(0)
    tokens = DataSet.of({"ids": random.integers(0, 2000, (80, LENGTH))})
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "encoder.onnx"
        parameters = encoder(path, layers=2, tokens=2000) // 4
        found = files(load_model(str(path)), {"calibration": tokens}, ALONE)
    values = {
        f"{runtime}, {p}: {what}": v for (runtime, p), own in found.items() for what, v in own.items()
        if (p, what) != ("fp32", "dB")
    }  # fmt: skip
    slowest = max(own["ms"] / found[r, "fp32"]["ms"] for (r, p), own in found.items() if p == "dynamic")
    about = f"encoder of 2 layers, {WIDTH} wide, {parameters:,} random parameters, {LENGTH} tokens"
    return [
        Row("Weights of a transformer alone in few bits: time of dynamic / fp32, the slower runtime", slowest, 1.0,
            "lower", about, f"{COMMAND} weights", [0], values)
    ]  # fmt: skip


def networks() -> list[Row]:
    """Weights and activations: two convolutional networks."""
    rows = []
    cases = {
        "ResNet-20": (data.resnet20(), data.cifar("train", 128)),
        "MobileNetV1 0.75": (data.mobilenetv1(), data.imagenet(True)),
    }
    for name, (net, calibration) in cases.items():
        found = files(accept_module(net), {"calibration": calibration}, BOTH)
        values = {}
        for (runtime, p), own in found.items():
            values[f"{runtime}, {p}: bytes"] = own["bytes"]
            values[f"{runtime}, {p}: time / int8"] = own["ms"] / found[runtime, "int8"]["ms"]
        smaller = max(own["bytes"] / found[r, "int8"]["bytes"] for (r, p), own in found.items() if p == "w4a8")
        rows.append(
            Row(f"Formats of {name}: bytes of w4a8 / int8, the larger", smaller, 0.7, "lower", name,
                f"{COMMAND} networks", [0], values)
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    main(__doc__, "quantize", [weights, networks])
