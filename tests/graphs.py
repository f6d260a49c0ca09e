"""Small float graphs for tests, written as ONNX text."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
from numpy.typing import NDArray

from deploykit.core.data import DataSet
from deploykit.core.ranges import Ranges
from deploykit.hub.graph import FloatGraph
from deploykit.hub.lower import from_proto
from deploykit.pipeline import calibrate


def graph(text: str, **weights: NDArray[Any]) -> FloatGraph:
    """A float graph from ``(inputs) => (outputs) { nodes }`` and its weights by name."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> test {text}')
    for node in proto.graph.node:
        node.name = node.name or node.output[0]
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items())
    return from_proto(proto, "test")


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def conv_relu_conv(seed: int = 0) -> FloatGraph:
    """x [n,3,8,8] -> Conv 4 -> Relu -> Conv 5 -> y."""
    return graph(
        """(float[batch,3,8,8] x) => (float[batch,5,8,8] y) {
            a = Conv<pads=[1,1,1,1]>(x, wa, ba)
            r = Relu(a)
            y = Conv<pads=[1,1,1,1]>(r, wb, bb)
        }""",
        wa=normal(seed, 4, 3, 3, 3), ba=normal(seed + 1, 4), wb=normal(seed + 2, 5, 4, 3, 3), bb=normal(seed + 3, 5),
    )  # fmt: skip


def residual(seed: int = 0) -> FloatGraph:
    """Two convolutions with a shortcut, mean over positions, and a dense layer: x [n,3,8,8] -> y [n,4]."""
    return graph(
        """(float[batch,3,8,8] x) => (float[batch,4] y) {
            a = Conv<pads=[1,1,1,1]>(x, wa, ba)
            r = Relu(a)
            b = Conv<pads=[1,1,1,1]>(r, wb, bb)
            s = Add(b, r)
            t = Relu(s)
            m = ReduceMean<keepdims=0>(t, axes)
            y = Gemm<transB=1>(m, wc, bc)
        }""",
        wa=normal(seed, 4, 3, 3, 3), ba=normal(seed + 1, 4), wb=normal(seed + 2, 4, 4, 3, 3), bb=normal(seed + 3, 4),
        wc=normal(seed + 4, 4, 4), bc=normal(seed + 5, 4), axes=np.array([2, 3]),
    )  # fmt: skip


def images(count: int = 16, seed: int = 9, shape: tuple[int, ...] = (3, 8, 8), name: str = "x") -> DataSet:
    return DataSet.of({name: normal(seed, count, *shape)})


def measured(made: FloatGraph, data: DataSet, method: str = "minmax") -> Ranges:
    return calibrate(made, data, method)


def run(model: bytes, data: DataSet, optimize: bool = True) -> list[NDArray[Any]]:
    """All outputs on all of the data, from ONNX Runtime."""
    from deploykit.hub.running import session

    batch = next(data.batches(len(data)))
    outputs: list[NDArray[Any]] = session(model, optimize=optimize).run(None, batch.inputs)
    return outputs
