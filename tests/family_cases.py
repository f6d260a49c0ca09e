"""Cases of the operators that transformers, recurrent networks, series and tables bring, like `operator_cases`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st
from operator_cases import Case, Draw, image, index, number, single, weights
from tflite_graphs import Node


def conv_over_time(draw: Draw) -> Case:
    c, t, kernel, out = number(draw, 1, 6), number(draw, 6, 12), number(draw, 1, 3), number(draw, 1, 6)
    group = c if draw(st.booleans()) else 1
    out *= group
    options = {
        "strides": [number(draw, 1, 2)], "pads": [number(draw, 0, kernel - 1), number(draw, 0, kernel - 1)],
        "dilations": [number(draw, 1, 2)], "group": group,
    }  # fmt: skip
    constants = {"w": weights(draw, out, c // group, kernel, size=1.0), "b": weights(draw, out)}
    return [("Conv", ["x", "w", "b"], ["y"], options)], {"x": (c, t)}, constants


def pool_over_time(kind: str) -> Callable[[Draw], Case]:
    def case(draw: Draw) -> Case:
        return [(kind, ["x"], ["y"], {"kernel_shape": [2], "strides": [2]})], {"x": (number(draw, 1, 6), 8)}, {}

    return case


def transposed_over_time(draw: Draw) -> Case:
    channels, out, stride = number(draw, 1, 4), number(draw, 1, 4), number(draw, 1, 3)
    constants = {"w": weights(draw, channels, out, 3), "b": weights(draw, out)}
    nodes: list[Node] = [("ConvTranspose", ["x", "w", "b"], ["y"], {"strides": [stride], "pads": [1, 1]})]
    return nodes, {"x": (channels, number(draw, 3, 6))}, constants


def matmul_and_bias(draw: Draw) -> Case:
    n, k = number(draw, 1, 9), number(draw, 1, 30)
    nodes: list[Node] = [("MatMul", ["x", "w"], ["m"], {}), ("Add", ["m", "b"], ["a"], {}), ("Relu", ["a"], ["y"], {})]
    return nodes, {"x": (number(draw, 1, 5), k)}, {"w": weights(draw, k, n), "b": weights(draw, n)}


def attention(draw: Draw) -> Case:
    heads, length, width = number(draw, 1, 3), number(draw, 2, 5), number(draw, 2, 5)
    if draw(st.booleans()):
        nodes: list[Node] = [
            ("Transpose", ["z"], ["t"], {"perm": [0, 1, 3, 2]}),
            ("MatMul", ["x", "t"], ["y"], {}),
        ]
        return nodes, {"x": (heads, length, width), "z": (heads, length + 1, width)}, {}
    return [("MatMul", ["x", "z"], ["y"], {})], {"x": (heads, length, width), "z": (heads, width, length + 1)}, {}


def prelu(draw: Draw) -> Case:
    c, h, w = image(draw, 2)
    slope = draw(st.sampled_from([(c, 1, 1), (1, 1, 1), (1, c, 1, 1)]))
    return [("PRelu", ["x", "a"], ["y"], {})], {"x": (c, h, w)}, {"a": weights(draw, *slope)}


def layer_norm(draw: Draw) -> Case:
    n = number(draw, 2, 12)
    constants = {"g": weights(draw, n) + 1, "b": weights(draw, n)}
    return [("LayerNormalization", ["x", "g", "b"], ["y"], {"axis": -1})], {"x": (number(draw, 1, 5), n)}, constants


def batch_norm(draw: Draw) -> Case:
    n = number(draw, 1, 9)
    constants = {k: np.abs(weights(draw, n)) + np.float32(0.5) for k in ("g", "b", "m", "v")}
    return [("BatchNormalization", ["x", "g", "b", "m", "v"], ["y"], {})], {"x": (n,)}, constants


def norm(draw: Draw) -> Case:
    nodes: list[Node] = [("ReduceL2", ["x", "a"], ["y"], {"keepdims": number(draw, 0, 1)})]
    return nodes, {"x": image(draw, 2)}, {"a": index(*draw(st.sampled_from([(1,), (2, 3), (-1,)])))}


def positive(kind: str, *more: str) -> Callable[[Draw], Case]:
    """An operator on numbers that are not negative, and perhaps a constant."""

    def case(draw: Draw) -> Case:
        nodes: list[Node] = [("Relu", ["x"], ["r"], {}), (kind, ["r", *more], ["y"], {})]
        return nodes, {"x": image(draw, 2)}, {name: np.float32(1.5) for name in more}

    return case


def recurrent(kind: str, gates: int) -> Callable[[Draw], Case]:
    """All its results: every step, the last one, in one or both directions."""

    def case(draw: Draw) -> Case:
        n, units, length = number(draw, 1, 5), number(draw, 1, 5), number(draw, 1, 4)
        direction = draw(st.sampled_from(["forward", "reverse", "bidirectional"]))
        d = 2 if direction == "bidirectional" else 1
        options = {"hidden_size": units, "direction": direction} | ({"linear_before_reset": 1} if kind == "GRU" else {})
        nodes: list[Node] = [
            ("Transpose", ["x"], ["s"], {"perm": [1, 0, 2]}),
            (kind, ["s", "w", "r", "b"], ["all", "last"], options),
            ("ReduceMean", ["last", "first"], ["end"], {"keepdims": 0}),
            ("Transpose", ["all"], ["turned"], {"perm": [2, 0, 1, 3]}),
            ("ReduceMean", ["turned", "middle"], ["mean"], {"keepdims": 0}),
            ("Add", ["end", "mean"], ["y"], {}),
        ]
        constants = {
            "w": weights(draw, d, gates * units, n), "r": weights(draw, d, gates * units, units),
            "b": weights(draw, d, 2 * gates * units), "first": index(0), "middle": index(1, 2),
        }  # fmt: skip
        return nodes, {"x": (length, n)}, constants

    return case


def chosen(draw: Draw) -> Case:
    c, h, w = image(draw, 2)
    return [("Gather", ["x", "i"], ["y"], {"axis": 2})], {"x": (c, h, w)}, {"i": index(h - 1, 0, -1)}


def repeated(draw: Draw) -> Case:
    c, h = number(draw, 1, 5), number(draw, 2, 5)
    return [("Expand", ["x", "s"], ["y"], {})], {"x": (c, 1, 3)}, {"s": index(1, c, h, 3)}


MORE: dict[str, Callable[[Draw], Case]] = {
    "Conv over time": conv_over_time,
    "ConvTranspose over time": transposed_over_time,
    "MaxPool over time": pool_over_time("MaxPool"),
    "AveragePool over time": pool_over_time("AveragePool"),
    "MatMul and bias": matmul_and_bias,
    "PRelu": prelu,
    "Elu": single("Elu"),
    "Expand repeating": repeated,
}
"""With an integer form."""

IN_FLOAT: dict[str, Callable[[Draw], Case]] = {
    "MatMul of activations": attention,
    "Gelu": single("Gelu"),
    "Gelu by tanh": single("Gelu", approximate="tanh"),
    "Sqrt": positive("Sqrt"),
    "Exp": single("Exp"),
    "Pow": positive("Pow", "p"),
    "LayerNormalization": layer_norm,
    "BatchNormalization": batch_norm,
    "ReduceL2": norm,
    "LSTM": recurrent("LSTM", 4),
    "GRU": recurrent("GRU", 3),
    "Gather": chosen,
    "Cast": single("Cast", to=1),
}
"""What the hub leaves in float."""
