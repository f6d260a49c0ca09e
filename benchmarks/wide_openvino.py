"""OpenVINO files against the hub they were written from, and against NNCF's files of the same networks.

NNCF runs in an environment of its own, quantizes the same float graph with the same calibration images and its default
settings, and writes its IR; both IRs are then timed in this process, in turns, with one thread and the same precision
hint. Without ``--nncf`` that part is skipped.

    python -m benchmarks.wide_openvino --nncf OTHER/bin/python
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import data
from benchmarks.rows import Row, record
from deploykit import exporters, passes, pipeline, targets
from deploykit.check import answer, class_scores
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.recipe import Step
from deploykit.exporters import to_onnx
from deploykit.exporters.openvino.library import openvino
from deploykit.hub.graph import Hub
from deploykit.hub.quantize import quantize
from deploykit.hub.running import session
from deploykit.models import accept_module

COMMAND = "python -m benchmarks.wide_openvino"
ROUNDS, SECONDS, CALLS = 200, 20.0, 5
SETTINGS = {
    "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1,
}  # fmt: skip

NNCF = """
import sys
sys.modules["openvino_telemetry"] = None
import numpy as np, nncf, openvino
source, images, out = sys.argv[1:]
x = np.load(images)
model = openvino.convert_model(source)
data = nncf.Dataset(range(len(x)), lambda i: {"x": x[i : i + 1]})
made = nncf.quantize(model, data, subset_size=len(x))
made.reshape({"x": [1, *x.shape[1:]]})
openvino.save_model(made, out, compress_to_fp16=False)
print("nncf", nncf.__version__, "openvino", openvino.__version__)
"""


def networks() -> dict[str, tuple[Any, DataSet, DataSet]]:
    """Module, calibration and evaluation data by name."""
    return {
        "ResNet-20": (data.resnet20(), data.cifar("train", 256), data.cifar("test", 10_000)),
        "MobileNetV1": (data.mobilenetv1(), data.imagenet(True), data.imagenet(False)),
    }


def hub_of(module: Any, calibration: DataSet) -> Hub:
    """The hub that the road makes with default settings."""
    prepared = pipeline.prepare(accept_module(module), {"calibration": calibration, "eval": calibration}, None)
    graph = pipeline.float_graph(prepared.model, prepared.example)
    target = targets.load("x86-openvino")
    hub = quantize(graph, pipeline.calibrate(graph, calibration), target.quant)
    return passes.build(Step("weight_correct"))(hub, Context(target, {"calibration": calibration}))


def top1(run: Any, evaluation: DataSet) -> float:
    """Percent of right answers."""
    scores = class_scores(answer(run, evaluation, "answers").outputs)
    assert scores is not None and evaluation.labels is not None
    return 100.0 * float((scores.argmax(1) == evaluation.labels).mean())


def in_turns(ours: Path, theirs: Path, x: NDArray[np.float32]) -> dict[str, float]:
    """Medians of milliseconds and of their quotients, wall clock and CPU, over rounds in which both ran."""
    core = openvino().Core()
    requests = [
        core.compile_model(core.read_model(str(path)), "CPU", SETTINGS).create_infer_request()
        for path in (ours, theirs)
    ]
    wall: list[list[float]] = [[], []]
    cpu: list[list[float]] = [[], []]
    started = time.perf_counter()
    while len(wall[0]) < ROUNDS or time.perf_counter() - started < SECONDS:
        order = (0, 1) if len(wall[0]) % 2 else (1, 0)
        for i in order:
            requests[i].infer([x])  # brings its weights back into the caches
            begin, spent = time.perf_counter(), time.process_time()
            for _ in range(CALLS):
                requests[i].infer([x])
            wall[i].append((time.perf_counter() - begin) / CALLS * 1e3)
            cpu[i].append((time.process_time() - spent) / CALLS * 1e3)
    w, c = np.asarray(wall), np.asarray(cpu)
    return {
        "ours ms": float(np.median(w[0])), "NNCF ms": float(np.median(w[1])),
        "wall ratio": float(np.median(w[0] / w[1])), "CPU ratio": float(np.median(c[0] / c[1])),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nncf", help="a Python with nncf and openvino")
    given = parser.parse_args()
    if given.nncf is None:
        print("NNCF: skipped, no --nncf PYTHON was given")
    target, exporter = targets.load("x86-openvino"), exporters.load("openvino")
    lost, sizes, speed, accuracy, versions = {}, {}, {}, {}, ""
    for name, (module, calibration, evaluation) in networks().items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            hub = hub_of(module, calibration)
            fp32, int8 = exporter.export(dict.fromkeys(("fp32", "int8"), hub), target, out)
            reference = top1(to_onnx.runner(session(hub.bytes, 2, optimize=False)), evaluation)
            ours = top1(exporter.load(out / int8.path, 2), evaluation)
            lost[name] = abs(reference - ours)
            accuracy |= {f"{name} hub": reference, f"{name} OpenVINO int8": ours}
            sizes[name] = int8.size(out) / fp32.size(out)
            if given.nncf is None:
                continue
            source, images, theirs = out / "float.onnx", out / "images.npy", out / "nncf.xml"
            source.write_bytes(hub.graph.bytes)
            np.save(images, next(calibration.batches(len(calibration))).inputs["x"])
            command = [given.nncf, "-c", NNCF, str(source), str(images), str(theirs)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{given.nncf} failed:\n{done.stderr[-2000:]}")
            versions = done.stdout.strip().splitlines()[-1]
            x = next(evaluation.batches(1)).inputs["x"]
            speed |= {f"{name} {what}": value for what, value in in_turns(out / int8.path, theirs, x).items()}
    images_used = "ResNet-20: 256 CIFAR-10 training images calibrate, 10,000 test; MobileNetV1 0.75: 200 of 1,000, 800"
    rows = [
        Row("OpenVINO int8: accuracy away from the hub's (points)", max(lost.values()), 0.5, "lower", images_used,
            COMMAND, [0], {**lost, **accuracy}),
        Row("OpenVINO int8 bytes / fp32 bytes, .xml and .bin", max(sizes.values()), 0.5, "lower", images_used, COMMAND,
            [0], sizes),
    ]  # fmt: skip
    if speed:
        ratios = [value for what, value in speed.items() if what.endswith("wall ratio")]
        rows.append(
            Row("OpenVINO int8: our time / the time of NNCF's file, 1 thread, same process", max(ratios), 1.05, "lower",
                images_used, COMMAND, [0], speed, f"{versions}, default settings, same images")
        )  # fmt: skip
    record("wide", rows)


if __name__ == "__main__":
    main()
