"""Weights alone in 4 bits: what `deploykit export` takes and makes of a transformer of 100 million random parameters.

The network is an encoder of 12 layers, saved as ``.onnx`` with its weights in a file beside it. Every export is a
process of its own; its peak resident memory stands beside that of one that imported deploykit, onnx and onnxruntime.

    python -m benchmarks.weight_only
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from benchmarks.rows import Row, record

COMMAND = "python -m benchmarks.weight_only"
LAYERS, WIDTH, INNER, HEADS, TOKENS, LENGTH, CLASSES = 12, 768, 3072, 12, 19000, 64, 100
GROUPS = (32, 128)
MEMORY_BAR, FILE_BAR = 1.3, 0.16

EXPORT = """
import json, re, sys
import deploykit, onnx, onnxruntime
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
before = peak()
from deploykit import cli
code = 0
try:
    cli.main(sys.argv[2:])
except SystemExit as end:
    code = end.code
with open(sys.argv[1], "w") as found:
    json.dump({"peak": peak() - before, "code": code}, found)
"""


class Network:
    """An ONNX graph that grows node by node."""

    def __init__(self, seed: int) -> None:
        """Empty."""
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, operator: str, inputs: list[str], name: str, **attributes: object) -> str:
        """A node and its only output, both called ``name``."""
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def hold(self, name: str, array: NDArray[np.generic]) -> str:
        """A constant."""
        self.constants.append(onnx.numpy_helper.from_array(array, name))
        return name

    def normal(self, name: str, *shape: int, spread: float) -> str:
        """A constant of random numbers."""
        return self.hold(name, np.float32(spread) * self.random.standard_normal(shape, dtype=np.float32))

    def linear(self, x: str, name: str, inputs: int, outputs: int) -> str:
        """A matrix product and its bias."""
        made = self.add("MatMul", [x, self.normal(f"{name}.weight", inputs, outputs, spread=inputs**-0.5)], name)
        return self.add("Add", [made, self.normal(f"{name}.bias", outputs, spread=0.02)], f"{name}.sum")

    def norm(self, x: str, name: str) -> str:
        """LayerNormalization."""
        scale, shift = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
        return self.add(
            "LayerNormalization", [x, self.hold(f"{name}.scale", scale), self.hold(f"{name}.shift", shift)], name
        )

    def heads(self, x: str, name: str, order: list[int]) -> str:
        """A projection, cut into heads."""
        cut = self.add("Reshape", [self.linear(x, name, WIDTH, WIDTH), "split"], f"{name}.heads")
        return self.add("Transpose", [cut], f"{name}.turned", perm=order)

    def attention(self, x: str, name: str) -> str:
        """Softmax(q k / sqrt(d)) v over all heads."""
        q, k, v = (self.heads(x, f"{name}.{which}", [0, 2, 3, 1] if which == "k" else [0, 2, 1, 3]) for which in "qkv")
        scores = self.add("Mul", [self.add("MatMul", [q, k], f"{name}.scores"), "per_head"], f"{name}.scaled")
        mixed = self.add("MatMul", [self.add("Softmax", [scores], f"{name}.softmax"), v], f"{name}.mixed")
        joined = self.add("Transpose", [mixed], f"{name}.joined", perm=[0, 2, 1, 3])
        return self.linear(self.add("Reshape", [joined, "join"], f"{name}.flat"), f"{name}.out", WIDTH, WIDTH)


def encoder(path: Path, layers: int = LAYERS, tokens: int = TOKENS, seed: int = 0) -> int:
    """Writes the network, its weights in a file beside it; returns their bytes in float32."""
    net = Network(seed)
    net.hold("split", np.array([0, 0, HEADS, WIDTH // HEADS]))
    net.hold("join", np.array([0, 0, WIDTH]))
    net.hold("per_head", np.float32((WIDTH // HEADS) ** -0.5))
    x = net.add("Gather", [net.normal("tokens", tokens, WIDTH, spread=1.0), "ids"], "embedded", axis=0)
    x = net.add("Add", [x, net.normal("positions", LENGTH, WIDTH, spread=0.1)], "placed")
    for i in range(layers):
        x = net.add("Add", [x, net.attention(net.norm(x, f"{i}.norm1"), f"{i}.attention")], f"{i}.first")
        inner = net.add("Gelu", [net.linear(net.norm(x, f"{i}.norm2"), f"{i}.up", WIDTH, INNER)], f"{i}.gelu")
        x = net.add("Add", [x, net.linear(inner, f"{i}.down", INNER, WIDTH)], f"{i}.second")
    mean = net.add("ReduceMean", [net.norm(x, "norm"), net.hold("axes", np.array([1]))], "mean", keepdims=0)
    net.linear(mean, "head", WIDTH, CLASSES)
    graph = helper.make_graph(
        net.nodes, "encoder",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", LENGTH])],
        [helper.make_tensor_value_info("head.sum", TensorProto.FLOAT, ["batch", CLASSES])],
        net.constants,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    weights = sum(int(np.prod(t.dims)) for t in net.constants if t.data_type == TensorProto.FLOAT)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.stem}.bin", size_threshold=1024)
    return 4 * weights


def exported(model: Path, group: int, folder: Path) -> dict[str, float]:
    """Peak memory above the baseline and bytes of the file of one export, and what it says about accuracy."""
    target, out, told = folder / f"x86-{group}.toml", folder / f"out-{group}", folder / f"told-{group}.json"
    target.write_text(f'extends = "x86"\ntitle = "x86, groups of {group}"\n[quant]\nweight_group = {group}\n')
    command = [
        sys.executable, "-c", EXPORT, str(told), "export", str(model), "--target", str(target), "--precision", "w4",
        "--input", f"ids=1x{LENGTH}:int64", "--no-benchmark", "-o", str(out),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads(told.read_text())
    if found["code"]:
        raise SystemExit(f"the export with groups of {group} failed with exit code {found['code']}")
    checks = json.loads((out / "manifest.json").read_text())["checks"]
    noise = next(c["value"] for c in checks if c["name"].startswith("signal to noise") and c["precision"] == "w4")
    against = next(c["value"] for c in checks if c["name"].startswith("file against hub"))
    return {
        "peak": found["peak"], "file": (out / "model.w4.onnx").stat().st_size, "logit SQNR (dB)": noise,
        "file against hub (dB)": against,
    }  # fmt: skip


def rows() -> list[Row]:
    """Memory and size for both sizes of groups."""
    made = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bytes_ = encoder(folder / "encoder.onnx")
        data = f"encoder of {LAYERS} layers, {bytes_ // 4:,} random parameters, .onnx with external data, 2 samples"
        for group in GROUPS:
            found = exported(folder / "encoder.onnx", group, folder)
            values = {k: v for k, v in found.items() if "dB" in k} | {"fp32 bytes": bytes_}
            what = f"Weight-only int4, groups of {group}"
            memory, size = found["peak"] / bytes_, found["file"] / bytes_
            made += [
                Row(
                    f"{what}: peak memory above imports (x fp32 bytes)", round(memory, 3), MEMORY_BAR, "lower", data,
                    COMMAND, [0], values | {"bytes": found["peak"]},
                    note="deploykit export to x86, all checks included; VmHWM of a fresh process",
                ),
                Row(
                    f"{what}: file (x fp32 bytes)", round(size, 4), FILE_BAR, "lower", data, COMMAND, [0],
                    values | {"bytes": found["file"]},
                ),
            ]  # fmt: skip
    return made


def main() -> None:
    """Measures and records."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    record("quantize", rows())


if __name__ == "__main__":
    main()
