"""Every operator that an exporter for integers may write, on random shapes: small float graphs for hypothesis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from tflite_graphs import Node

Case = tuple[Sequence[Node], Mapping[str, Sequence[int]], Mapping[str, NDArray[Any]]]
"""Nodes, input shapes without batch, constants."""
Draw = Callable[[st.SearchStrategy[Any]], Any]


def weights(draw: Draw, *shape: int, size: float = 0.3) -> NDArray[np.float32]:
    seed = draw(st.integers(0, 2**16))
    return (np.random.default_rng(seed).normal(size=shape) * size).astype(np.float32)


def number(draw: Draw, low: int, high: int) -> int:
    return int(draw(st.integers(low, high)))


def index(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def image(draw: Draw, smallest: int = 5) -> tuple[int, int, int]:
    return number(draw, 1, 9), number(draw, smallest, 11), number(draw, smallest, 11)


def conv(draw: Draw, depthwise: bool = False, groups: int = 1, tail: Sequence[Node] = ()) -> Case:
    c, h, w = image(draw)
    kernel = [number(draw, 1, 3), number(draw, 1, 3)]
    c = c if depthwise else c * groups
    group = c if depthwise else groups
    out = group * number(draw, 1, 3) if group > 1 else number(draw, 1, 9)
    # a padding as wide as the kernel would make windows that see nothing
    pads = [number(draw, 0, min(1, kernel[i % 2] - 1)) for i in range(4)]
    options = {
        "strides": [number(draw, 1, 2), number(draw, 1, 2)], "pads": pads, "group": group,
        "dilations": [1, 1] if depthwise else [number(draw, 1, 2), 1],
    }  # fmt: skip
    reads = ["x", "w", "b"] if draw(st.booleans()) else ["x", "w"]
    constants = {"w": weights(draw, out, c // group, *kernel, size=1.0), "b": weights(draw, out)}
    return [("Conv", reads, ["c" if tail else "y"], options), *tail], {"x": (c, h, w)}, constants


def clipped(low: float, high: float) -> Callable[[Draw], Case]:
    def case(draw: Draw) -> Case:
        nodes, inputs, constants = conv(draw, tail=[("Clip", ["c", "low", "high"], ["y"], {})])
        return nodes, inputs, {**constants, "low": np.float32(low), "high": np.float32(high)}

    return case


def transposed(draw: Draw) -> Case:
    stride, kernel = number(draw, 1, 3), number(draw, 1, 4)
    pad = number(draw, 0, min(2, kernel - 1))
    options = {"strides": [stride] * 2, "pads": [pad] * 4, "output_padding": [number(draw, 0, stride - 1)] * 2}
    channels, out = number(draw, 1, 6), number(draw, 1, 6)
    side = [number(draw, 3, 6), number(draw, 3, 6)]
    constants = {"w": weights(draw, channels, out, kernel, kernel), "b": weights(draw, out)}
    return [("ConvTranspose", ["x", "w", "b"], ["y"], options)], {"x": (channels, *side)}, constants


def gemm(draw: Draw) -> Case:
    n, k = number(draw, 1, 9), number(draw, 1, 30)
    flipped = draw(st.booleans())
    shape = (n, k) if flipped else (k, n)
    nodes: list[Node] = [("Gemm", ["x", "w", "b"], ["y"], {"transB": int(flipped)})]
    return nodes, {"x": (k,)}, {"w": weights(draw, *shape), "b": weights(draw, n)}


def matmul(draw: Draw) -> Case:
    n, k = number(draw, 1, 9), number(draw, 1, 30)
    return [("MatMul", ["x", "w"], ["y"], {})], {"x": (number(draw, 1, 5), k)}, {"w": weights(draw, k, n)}


def flattened_image(draw: Draw) -> Case:
    c, h, w = image(draw)
    nodes: list[Node] = [
        ("Conv", ["x", "w"], ["c"], {}),
        ("Relu", ["c"], ["r"], {}),
        ("Flatten", ["r"], ["f"], {}),
        ("Gemm", ["f", "v", "b"], ["y"], {"transB": 1}),
    ]
    constants = {"w": weights(draw, 4, c, 2, 2), "v": weights(draw, 5, 4 * (h - 1) * (w - 1)), "b": weights(draw, 5)}
    return nodes, {"x": (c, h, w)}, constants


def binary(kind: str) -> Callable[[Draw], Case]:
    def case(draw: Draw) -> Case:
        shape = image(draw, 2)
        other = draw(st.sampled_from([shape, (shape[0], 1, 1), (1, *shape[1:]), (shape[2],)]))
        if len(other) == 1 or draw(st.booleans()):  # inputs have a batch: what is broadcast against it is a constant
            return [(kind, ["x", "k"], ["y"], {})], {"x": shape}, {"k": weights(draw, *other) + 2}
        tail: list[Node] = [("Relu", ["s"], ["y"], {})]
        return [(kind, ["x", "z"], ["s"], {}), *tail], {"x": shape, "z": other}, {}

    return case


def single(kind: str, **options: Any) -> Callable[[Draw], Case]:
    return lambda draw: ([(kind, ["x"], ["y"], options)], {"x": image(draw, 2)}, {})


def softmax(draw: Draw) -> Case:
    shape, axis = draw(st.sampled_from([((17,), -1), ((5, 8), -1), ((6, 4, 3), 1), ((2, 3, 4), 3)]))
    return [("Softmax", ["x"], ["y"], {"axis": axis})], {"x": shape}, {}


def clip(draw: Draw) -> Case:
    low, high = draw(st.sampled_from([(0.0, 6.0), (-1.0, 1.0), (-0.4, 0.7), (0.0, 0.5)]))
    constants = {"low": np.float32(low), "high": np.float32(high)}
    return [("Clip", ["x", "low", "high"], ["y"], {})], {"x": image(draw, 2)}, constants


def reduce_mean(draw: Draw) -> Case:
    axes = draw(st.sampled_from([(2, 3), (-1,), (1,), (2,)]))
    nodes: list[Node] = [("ReduceMean", ["x", "a"], ["y"], {"keepdims": number(draw, 0, 1)})]
    return nodes, {"x": image(draw, 2)}, {"a": index(*axes)}


def max_pool(draw: Draw) -> Case:
    kernel = number(draw, 2, 3)
    options = {"kernel_shape": [kernel] * 2, "strides": [number(draw, 1, 2)] * 2, "pads": [number(draw, 0, 1)] * 4}
    return [("MaxPool", ["x"], ["y"], options)], {"x": image(draw)}, {}


def average_pool(draw: Draw) -> Case:
    size = {"kernel_shape": [2, 2], "strides": [2, 2]}
    options = draw(
        st.sampled_from(
            [
                size,
                {**size, "pads": [1, 1, 1, 1], "count_include_pad": 1},
                {"kernel_shape": [3, 3], "strides": [1, 1], "pads": [1, 1, 1, 1]},
                {"kernel_shape": [3, 1], "strides": [2, 1], "pads": [1, 0, 1, 0], "count_include_pad": 1},
            ]
        )
    )
    return [("AveragePool", ["x"], ["y"], options)], {"x": image(draw)}, {}


def nearest(draw: Draw) -> Case:
    coordinate, rounding = draw(
        st.sampled_from(
            [("asymmetric", "floor"), ("half_pixel", "round_prefer_ceil"), ("half_pixel", "round_prefer_floor")]
        )
    )
    options = {"mode": "nearest", "coordinate_transformation_mode": coordinate, "nearest_mode": rounding}
    constants = {"s": np.array([1, 1, number(draw, 1, 3), number(draw, 1, 3)], np.float32)}
    return [("Resize", ["x", "", "s"], ["y"], options)], {"x": image(draw, 2)}, constants


def bilinear(draw: Draw) -> Case:
    c, h, w = image(draw, 2)
    coordinate = draw(st.sampled_from(["half_pixel", "pytorch_half_pixel", "align_corners"]))
    options = {"mode": "linear", "coordinate_transformation_mode": coordinate, "axes": [2, 3]}
    size = index(number(draw, h, 3 * h), number(draw, w, 3 * w))
    return [("Resize", ["x", "", "", "s"], ["y"], options)], {"x": (c, h, w)}, {"s": size}


def pad(draw: Draw) -> Case:
    amounts = [0, *(number(draw, 0, 2) for _ in range(3)), 0, *(number(draw, 0, 2) for _ in range(3))]
    return [("Pad", ["x", "p"], ["y"], {})], {"x": image(draw, 2)}, {"p": index(*amounts)}


def strided_slice(draw: Draw) -> Case:
    constants = {"s": index(1, 0), "e": index(2**62, -1), "a": index(2, 3), "t": index(number(draw, 1, 2), 1)}
    return [("Slice", ["x", "s", "e", "a", "t"], ["y"], {})], {"x": image(draw)}, constants


def split(draw: Draw) -> Case:
    c, h, w = image(draw)
    nodes: list[Node] = [("Split", ["x", "n"], ["p", "q"], {"axis": 1}), ("Concat", ["q", "p"], ["y"], {"axis": 1})]
    return nodes, {"x": (c + 1, h, w)}, {"n": index(1, c)}


def concat(draw: Draw) -> Case:
    c, h, w = image(draw, 2)
    axis = number(draw, 1, 3)
    other = [c, h, w]
    other[axis - 1] = number(draw, 1, 9)
    return [("Concat", ["x", "z"], ["y"], {"axis": axis})], {"x": (c, h, w), "z": other}, {}


def reshape(draw: Draw) -> Case:
    c, h, w = image(draw, 2)
    shape = draw(st.sampled_from([(c * h, w), (c, h * w), (c * h * w,), (w, h, c), (1, c, h, w)]))
    return [("Reshape", ["x", "s"], ["y"], {})], {"x": (c, h, w)}, {"s": index(0, *shape)}


def squeezed(draw: Draw) -> Case:
    nodes: list[Node] = [("Squeeze", ["x", "a"], ["s"], {}), ("Unsqueeze", ["s", "b"], ["y"], {})]
    return nodes, {"x": (number(draw, 1, 9), 1, 1)}, {"a": index(2, 3), "b": index(1)}


def transpose(draw: Draw) -> Case:
    axes = [0, *(1 + a for a in draw(st.permutations(range(3))))]
    return [("Transpose", ["x"], ["y"], {"perm": axes})], {"x": image(draw, 2)}, {}


def depth_to_space(draw: Draw) -> Case:
    c, h, w = image(draw, 2)
    mode = draw(st.sampled_from(["DCR", "CRD"]))
    return [("DepthToSpace", ["x"], ["y"], {"blocksize": 2, "mode": mode})], {"x": (4 * c, h, w)}, {}


def expand(draw: Draw) -> Case:
    shape = image(draw, 2)
    nodes: list[Node] = [("Identity", ["x"], ["i"], {}), ("Expand", ["i", "s"], ["y"], {})]
    return nodes, {"x": shape}, {"s": index(1, *shape)}


CASES: dict[str, Callable[[Draw], Case]] = {
    "Conv": conv,
    "Conv depthwise": lambda draw: conv(draw, depthwise=True),
    "Conv grouped": lambda draw: conv(draw, groups=number(draw, 2, 3)),
    "Conv Relu": lambda draw: conv(draw, tail=[("Relu", ["c"], ["y"], {})]),
    "Conv Clip6": clipped(0, 6),
    "Conv Clip1": clipped(-1, 1),
    "Conv Clip": clipped(-0.7, 1.3),
    "ConvTranspose": transposed,
    "Gemm": gemm,
    "Gemm of a flattened image": flattened_image,
    "MatMul": matmul,
    "Add": binary("Add"),
    "Sub": binary("Sub"),
    "Mul": binary("Mul"),
    "Div": binary("Div"),
    "ReduceMean": reduce_mean,
    "GlobalAveragePool": single("GlobalAveragePool"),
    "AveragePool": average_pool,
    "MaxPool": max_pool,
    "Relu": single("Relu"),
    "Clip": clip,
    "HardSwish": single("HardSwish"),
    "HardSigmoid": single("HardSigmoid", alpha=1 / 6, beta=0.5),
    "Sigmoid": single("Sigmoid"),
    "Tanh": single("Tanh"),
    "LeakyRelu": single("LeakyRelu", alpha=0.1),
    "Softmax": softmax,
    "Resize nearest": nearest,
    "Resize bilinear": bilinear,
    "Pad": pad,
    "Slice": strided_slice,
    "Split": split,
    "Concat": concat,
    "Reshape": reshape,
    "Flatten": single("Flatten"),
    "Squeeze": squeezed,
    "Unsqueeze": squeezed,
    "Transpose": transpose,
    "DepthToSpace": depth_to_space,
    "Identity": expand,
    "Expand": expand,
}


def samples(draw: Draw, inputs: Mapping[str, Sequence[int]]) -> dict[str, NDArray[np.float32]]:
    size, shift = draw(st.floats(0.3, 4)), draw(st.floats(-1, 1))
    return {name: weights(draw, 3, *shape, size=size) + np.float32(shift) for name, shape in inputs.items()}
