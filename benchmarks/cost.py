"""What quantizing costs: CPU seconds and memory of every method, beside NNCF's.

MobileNetV1, 200 images. Same float graph, same images in memory, every run a process of its own, imports left out; what
is compared runs in turns. Memory is the peak of the resident set above what it was before the first sample.

    python -m benchmarks.cost --nncf OTHER/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.quantize import MOBILENET, mobilenet
from benchmarks.rows import Row, record
from deploykit import pipeline
from deploykit.models import accept_module

COMMAND = "python -m benchmarks.cost --nncf PYTHON"
START = """
import json, re, sys, time
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024
"""
OURS = (
    START
    + """
import numpy as np, scipy.optimize, torch
from dataclasses import replace
from pathlib import Path
from deploykit import passes, pipeline, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.recipe import Step
from deploykit.hub.lower import read_onnx
from deploykit.hub.quantize import quantize
images = np.load(sys.argv[2])
data, target = DataSet.of({"x": images}), targets.load("x86")
graph, step, spec = read_onnx(Path(sys.argv[1])), sys.argv[3], replace(target.quant, weight_bits=int(sys.argv[4]))
started, before = time.process_time(), peak()
hub = quantize(graph, pipeline.calibrate(graph, data), spec)
hub = passes.build(Step(step))(hub, Context(target, {"calibration": data})) if step else hub
print(json.dumps([time.process_time() - started, peak() - before]))
"""
)
NNCF = (
    START
    + """
sys.modules["openvino_telemetry"] = None
import numpy as np, nncf, openvino
images = np.load(sys.argv[2])
model = openvino.Core().read_model(sys.argv[1])  # half the CPU time of convert_model
data = nncf.Dataset(range(len(images)), lambda i: {"x": images[i : i + 1]})
started, before = time.process_time(), peak()
nncf.quantize(model, data, subset_size=len(images), fast_bias_correction=sys.argv[3] == "fast")
print(json.dumps([time.process_time() - started, peak() - before]))
"""
)
COMPARED = {"bias_correct": ("bias_correct", "8"), "weight_correct": ("weight_correct", "8")}
NEIGHBOUR = {"NNCF, fast bias correction": "fast", "NNCF, full bias correction": "full"}
ALONE = {
    "gptq, 4 bits": ("gptq", "4"), "adaround, 4 bits": ("adaround", "4"), "fit_ranges": ("fit_ranges", "8"),
    "mixed, 4 or 8 bits": ("mixed", "8"),
}  # fmt: skip
"""Methods that the neighbour has no equivalent of; run once."""


def ran(python: str, script: str, *arguments: str) -> tuple[float, float]:
    """CPU seconds and MB of a process. OpenMP gets one thread: those that wait for work spin, and would be counted."""
    done = subprocess.run(
        [python, "-c", script, *arguments], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    seconds, megabytes = json.loads(done.stdout.splitlines()[-1])
    return seconds, megabytes


def measured(nncf: str, rounds: int) -> Mapping[str, tuple[float, float]]:
    """Medians of CPU seconds and MB, by method."""
    module, calibration, _ = mobilenet()
    prepared = pipeline.prepare(accept_module(module), {"calibration": calibration, "eval": calibration}, None)
    found: dict[str, list[tuple[float, float]]] = {}

    def run(what: str, python: str, script: str, *arguments: str) -> None:
        found.setdefault(what, []).append(ran(python, script, str(source), str(images), *arguments))
        print(what, found[what][-1], file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        source, images = Path(folder) / "model.onnx", Path(folder) / "images.npy"
        source.write_bytes(pipeline.float_graph(prepared.model, prepared.example).bytes)
        np.save(images, next(calibration.batches(len(calibration))).inputs["x"])
        for _ in range(rounds):
            for what, arguments in COMPARED.items():
                run(what, sys.executable, OURS, *arguments)
            for what, how in NEIGHBOUR.items():
                run(what, nncf, NNCF, how)
        for what, arguments in ALONE.items():
            run(what, sys.executable, OURS, *arguments)
    return {what: (statistics.median(s for s, _ in v), statistics.median(m for _, m in v)) for what, v in found.items()}


def rows(nncf: str, rounds: int) -> list[Row]:
    found = measured(nncf, rounds)
    ours, theirs = found["weight_correct"], found["NNCF, full bias correction"]
    neighbour = "NNCF 3.4, OpenVINO model, fast_bias_correction=False; same run"
    seconds = {f"{what}: CPU seconds": s for what, (s, _) in found.items()}
    megabytes = {f"{what}: MB": m for what, (_, m) in found.items()}
    return [
        Row("MobileNetV1 int8: CPU seconds of quantizing, ours / NNCF's with full bias correction",
            ours[0] / theirs[0], 1.0, "lower", MOBILENET, COMMAND, [0], seconds, neighbour),
        Row("MobileNetV1 int8: peak memory of quantizing, ours / NNCF's with full bias correction",
            ours[1] / theirs[1], None, "lower", MOBILENET, COMMAND, [0], megabytes, neighbour),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nncf", required=True, help="a Python with nncf and openvino")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    record("quantize", rows(given.nncf, given.rounds))


if __name__ == "__main__":
    main()
