"""What tests of mixed precision have in common."""

from __future__ import annotations

import onnx
from graphs import graph, images, measured, normal

from deploykit.core.data import DataSet
from deploykit.core.target import QuantSpec
from deploykit.hub.graph import FloatGraph, Hub
from deploykit.hub.quantize import quantize
from deploykit.hub.slices import Slicer


def hub_of(made: FloatGraph, data: DataSet, spec: QuantSpec | None = None) -> Hub:
    return quantize(made, measured(made, data), spec or QuantSpec())


def slicer_of(hub: Hub) -> Slicer:
    return Slicer(onnx.load_model_from_string(hub.bytes))


def classifier(seed: int = 0) -> tuple[FloatGraph, DataSet]:
    """Scores of ten classes from three layers of very different size, and samples for it."""
    made = graph(
        """(float[batch,12] x) => (float[batch,10] y) {
            a = Gemm<transB=1>(x, wa, ba)
            ra = Relu(a)
            b = Gemm<transB=1>(ra, wb, bb)
            rb = Relu(b)
            y = Gemm<transB=1>(rb, wc, bc)
        }""",
        wa=normal(seed, 16, 12), ba=normal(1, 16), wb=normal(2, 64, 16), bb=normal(3, 64), wc=normal(4, 10, 64),
        bc=normal(5, 10),
    )  # fmt: skip
    return made, images(100, shape=(12,))
