"""Operators that compute element by element, over a whole axis, or over all features; and resizing."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import numpy as np

from deploykit.exporters.tflite import layout
from deploykit.exporters.tflite.layout import NHWC, View, identity, permuted, stored
from deploykit.exporters.tflite.operation import (
    Constant,
    Limits,
    Operation,
    Unsupported,
    as_shape,
    limit,
    read,
    requantize,
    uncovered,
)
from deploykit.exporters.tflite.sliding import bias
from deploykit.exporters.tflite.windows import litert_coordinate, litert_nearest, nearest_source, source_coordinate
from deploykit.exporters.tflite.writer import Quant, Tensor

RESIZE_MODES = ((False, False), (False, True), (True, False))
"""align_corners, half_pixel_centers."""


def fully_connected(op: Operation) -> View:
    """Gemm, and MatMul with constant weights. A flattened image stays as it is: the weights' columns move instead."""
    if op.attribute("transA", 0) or op.attribute("alpha", 1.0) != 1.0 or op.attribute("beta", 1.0) != 1.0:
        raise Unsupported("Gemm is supported without transA, alpha and beta")
    if len(op.shape(1)) != 2:
        raise Unsupported("a matrix of constant weights is needed; LiteRT's product is with [in, out] features")
    view, flipped = op.view(0), not op.attribute("transB", 0)
    columns = None
    if len(view.shape) == 2 and view.shape[0] == 1:
        columns = layout.element_order(view)
        x = as_shape(op.writer, view.tensor, view.shape)
    else:
        order = op.natural(0)
        order = order if order[-1] == len(order) - 1 else identity(len(order))
        x = op.read(0, order)

    def arranged(weights: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        rows = weights.T if flipped else weights
        return rows if columns is None else rows[:, columns]

    filters = op.constant(1, arranged)
    shape = op.output_shape()
    order = identity(len(shape)) if len(shape) == 2 else order
    inputs = [x, filters, bias(op, filters, shape[-1])]
    return op.emit("FULLY_CONNECTED", inputs, shape, order, fuses=True, keepNumDims=len(shape) > 2)


def binary(kind: str) -> Callable[[Operation], View]:
    """An operator on two operands that are broadcast against each other."""

    def write(op: Operation) -> View:
        shape = tuple(np.broadcast_shapes(op.shape(0), op.shape(1)))
        views = [i for i in (0, 1) if isinstance(op.operands[i], View) and len(op.shape(i)) == len(shape)]
        orders = [order for i in views if (order := layout.natural(op.view(i))) is not None]
        order = orders[0] if orders else identity(len(shape))
        return op.emit(kind, [_expanded(op, i, order) for i in (0, 1)], shape, order, fuses=True)

    return write


def _expanded(op: Operation, index: int, order: layout.Order) -> Tensor:
    """An operand with leading axes of size 1 up to the result's rank, stored in ``order``."""
    shape = (1,) * (len(order) - len(op.shape(index))) + op.shape(index)
    if isinstance(op.operands[index], Constant):
        return op.constant(index, lambda values: values.reshape(shape).transpose(order))
    view = layout.reshape(op.view(index), shape)
    assert view is not None
    return read(op.writer, view, order)


def activation(op: Operation) -> View:
    """Relu and Clip that run on their own: rescaling saturates, the rest is left to `limit`."""
    view = op.view(0)
    limits = op_limits(op)
    tensor = view.tensor
    if op.quant is not None:
        tensor = requantize(op.writer, tensor, op.quant, op.name)
    left = uncovered(limits, op.quant)
    return view.on(tensor if left is None else limit(op.writer, tensor, left))


def op_limits(op: Operation) -> Limits:
    """What a Relu or Clip lets through."""
    if op.node.op_type == "Relu":
        return 0.0, inf
    low, high = op.parameter(1), op.parameter(2)
    return -inf if low is None else float(low.item()), inf if high is None else float(high.item())


def unary(kind: str, quant: Quant | None = None) -> Callable[[Operation], View]:
    """An operator on one operand; ``quant`` is the scale its integer kernel insists on."""

    def write(op: Operation) -> View:
        return op.elementwise(kind, (quant or op.quant) if op.quant is not None else None)

    return write


def hard_sigmoid(op: Operation) -> View:
    """HardSigmoid, max(0, min(1, x / 6 + 1/2)), as min(max(x + 3, 0), 6) / 6.

    The sum is stored in steps six times those of the result, so dividing by six is exact and nothing is rounded twice.
    """
    alpha, beta = op.attribute("alpha", 0.2), op.attribute("beta", 0.5)
    if abs(alpha - 1 / 6) > 1e-6 or abs(beta - 0.5) > 1e-6:
        raise Unsupported(f"HardSigmoid with alpha {alpha:g} and beta {beta:g}; torch's has 1/6 and 1/2")
    view = op.view(0)
    three, sixth = np.array([3], np.float32), np.array([1 / 6], np.float32)
    if op.quant is None:
        held = [op.writer.constant(f"{op.name}_{n}", v) for n, v in (("three", three), ("sixth", sixth))]
        wide = None
    else:
        one = np.array([1], np.int8)
        held = [
            op.writer.constant(f"{op.name}_{n}", one, Quant((float(v[0]),)))
            for n, v in (("three", three), ("sixth", sixth))
        ]
        wide = Quant((float(np.float32(op.quant.scales[0]) * np.float32(6)),), op.quant.zero_point)
    shape = view.tensor.shape
    summed = op.writer.write(
        "ADD", [view.tensor, held[0]], f"{op.name}_sum", shape, wide, fusedActivationFunction="RELU6"
    )  # fmt: skip
    return view.on(op.writer.write("MUL", [summed, held[1]], op.name, shape, op.quant))


def softmax(op: Operation) -> View:
    """SOFTMAX, which runs along the last stored axis: for channels of an image that is where they lie anyway."""
    rank = len(op.shape(0))
    axis = op.attribute("axis", -1) % rank
    order = op.natural(0)
    if order[-1] != axis:
        order = (*(a for a in range(rank) if a != axis), axis)
    x = op.read(0, order)
    made = op.writer.write("SOFTMAX", [x], op.name, x.shape, PROBABILITY if op.quant is not None else None, beta=1.0)
    return stored(made, op.shape(0), order)


PROBABILITY = Quant((1 / 256,), -128)
"""What LiteRT's integer sigmoid and softmax write."""


def mean(op: Operation) -> View:
    """MEAN over axes; they are kept at size 1 in the file, where image kernels are fast, and dropped in the view."""
    shape = op.shape(0)
    axes = list(range(2, len(shape)))
    if op.node.op_type == "ReduceMean":
        given = op.parameter(1)
        axes = list(range(len(shape))) if given is None else [int(a) % len(shape) for a in given]
    order = op.natural(0)
    kept = tuple(1 if i in axes else size for i, size in enumerate(shape))
    indices = op.writer.indices(f"{op.name}_axes", sorted(order.index(a) for a in axes))
    made = op.emit("MEAN", [op.read(0, order), indices], kept, order, keepDims=True)
    found = layout.reshape(made, op.output_shape())
    assert found is not None
    return found


def resize(op: Operation) -> View:
    """RESIZE_NEAREST_NEIGHBOR or RESIZE_BILINEAR, where one of its modes reads the same places as ONNX's Resize."""
    shape, out = op.shape(0), op.output_shape()
    if len(shape) != 4 or shape[:2] != out[:2]:
        raise Unsupported("only the height and width of images can be resized")
    if op.attribute("antialias", 0):
        raise Unsupported("LiteRT does not antialias")
    mode, coordinate = op.attribute("mode", "nearest"), op.attribute("coordinate_transformation_mode", "half_pixel")
    scales = op.parameter(2)
    scale = (
        [float(s) for s in scales[-2:]]
        if scales is not None and scales.size
        else [o / i for i, o in zip(shape, out, strict=True)][2:]
    )
    if coordinate not in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"):
        raise Unsupported(f"resizing with coordinates '{coordinate}'")
    if mode not in ("nearest", "linear"):
        raise Unsupported(f"LiteRT has no '{mode}' resizing; use nearest or bilinear")
    rounding = op.attribute("nearest_mode", "round_prefer_floor")
    axes = list(zip(shape[2:], out[2:], scale, strict=True))
    for align, half in RESIZE_MODES:
        if mode == "nearest":
            agrees = all(
                np.array_equal(nearest_source(i, o, s, coordinate, rounding), litert_nearest(i, o, align, half))
                for i, o, s in axes
            )
        else:
            agrees = all(
                np.allclose(
                    np.clip(source_coordinate(i, o, s, coordinate), 0, i - 1),
                    np.clip(litert_coordinate(i, o, align, half), 0, i - 1), atol=1e-4,
                )
                for i, o, s in axes
            )  # fmt: skip
        if agrees:
            break
    else:
        raise Unsupported(
            f"'{mode}' from {shape[2:]} to {out[2:]} ({coordinate}) reads other places than LiteRT would; give the size"
        )
    kind = "RESIZE_NEAREST_NEIGHBOR" if mode == "nearest" else "RESIZE_BILINEAR"
    x = op.read(0, NHWC)
    size = op.writer.indices(f"{op.name}_size", out[2:])
    made = op.writer.write(
        kind, [x, size], op.name, permuted(out, NHWC), x.quant, alignCorners=align, halfPixelCenters=half
    )  # fmt: skip
    return stored(made, out, NHWC)
