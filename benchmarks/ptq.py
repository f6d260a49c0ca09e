"""Post-training quantization of ResNet-18 (random weights, 224 x 224): a float .onnx in, an int8 .onnx out.

Each tool runs as a process of its own in an environment of its own, with its default settings, on the same images; CPU
seconds and peak memory are those of the whole process, imports included. The runs are interleaved and the medians
compared.

    python -m benchmarks.ptq --onnxruntime OTHER/bin/python --nncf ANOTHER/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.rows import Row, record

IMAGES = """
import numpy as np
def image(i):
    return np.random.default_rng(i).standard_normal((1, 3, 224, 224), np.float32)
"""

OURS = """
import sys
from pathlib import Path
from deploykit import exporters, passes, pipeline, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.recipe import Step
from deploykit.hub.lower import read_onnx
from deploykit.hub.quantize import quantize
source, out, count, method = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
data = DataSet(lambda i: {"x": image(i)[0]}, tuple(range(count)))
target = targets.load("x86")
graph = read_onnx(Path(source))
hub = quantize(graph, pipeline.calibrate(graph, data, method), target.quant, method)
hub = passes.build(Step("weight_correct"))(hub, Context(target, {"calibration": data}))
exporters.load("onnx").export({"int8": hub}, target, out)
"""

ONNXRUNTIME = """
import sys
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
source, out, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
class Reader(CalibrationDataReader):
    def __init__(self):
        self.images = iter(range(count))
    def get_next(self):
        i = next(self.images, None)
        return None if i is None else {"x": image(i)}
quantize_static(source, out + "/model.int8.onnx", Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
"""

NNCF = """
import sys
import nncf, onnx
source, out, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
data = nncf.Dataset(range(count), lambda i: {"x": image(i)})
onnx.save(nncf.quantize(onnx.load(source), data, subset_size=count), out + "/model.int8.onnx")
"""


def measure(python: str, script: str, *arguments: str) -> tuple[float, float]:
    """CPU seconds and peak resident megabytes (10^6 bytes) of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    wrapped = f"{IMAGES}\n{script}\nimport resource\nprint('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run(
            [python, "-c", wrapped, arguments[0], out, *arguments[1:]], capture_output=True, text=True, env=environment
        )
        if done.returncode or not list(Path(out).glob("*.onnx")):
            raise SystemExit(f"{python} failed:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak = next(int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("PEAK"))
    return seconds, peak * 1024 / 1e6


def write_resnet18(path: Path) -> None:
    from benchmarks.nets import resnet18
    from deploykit.hub.lower import lower

    path.write_bytes(lower(resnet18(), {"x": np.zeros((2, 3, 224, 224), np.float32)}).bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnxruntime", required=True, help="a Python with onnx and onnxruntime")
    parser.add_argument("--nncf", required=True, help="a Python with nncf, onnx and openvino")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "resnet18.onnx"
        subprocess.run([sys.executable, "-c", f"from benchmarks.ptq import *; write_resnet18(Path({str(source)!r}))"],
                       check=True)  # fmt: skip
        tools = {
            "deploykit": (sys.executable, OURS, ("64", "minmax")),
            "onnxruntime": (given.onnxruntime, ONNXRUNTIME, ("64",)),
            "nncf": (given.nncf, NNCF, ("64",)),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in tools}
        for _ in range(given.rounds):
            for name, (python, script, arguments) in tools.items():
                found[name].append(measure(python, script, str(source), *arguments))
                print(name, *(f"{v:.1f}" for v in found[name][-1]), file=sys.stderr, flush=True)
        growth = [
            measure(sys.executable, OURS, str(source), "300", "mse")[1]
            - measure(sys.executable, OURS, str(source), "32", "mse")[1]
            for _ in range(given.rounds)
        ]
    cpu = {name: statistics.median(v[0] for v in values) for name, values in found.items()}
    peak = {name: statistics.median(v[1] for v in values) for name, values in found.items()}
    data = "ResNet-18, random weights, 64 random images, 224 x 224, one at a time"
    command = "python -m benchmarks.ptq"
    record(
        "road",
        [
            Row("PTQ of ResNet-18, 64 images: CPU seconds, ours / the better neighbour's",
                cpu["deploykit"] / min(cpu["onnxruntime"], cpu["nncf"]), 1.0, "lower", data, command, [0], cpu,
                "ONNX Runtime quantize_static per channel, NNCF 3.4 quantize; same run",
                "defaults: minmax, weight correction"),
            Row("PTQ of ResNet-18, 64 images: peak memory, ours / the smaller neighbour's",
                peak["deploykit"] / min(peak["onnxruntime"], peak["nncf"]), 1.0, "lower", data, command, [0], peak,
                "same run (MB)"),
            Row("Histogram thresholds (mse): peak MB at 300 images more than at 32", statistics.median(growth), 50.0,
                "lower", data, command, [0], {}, "ONNX Runtime entropy: about 30 MB per image"),
        ],
    )  # fmt: skip
    print(json.dumps({"cpu": cpu, "peak": peak, "growth": growth}))


if __name__ == "__main__":
    main()
