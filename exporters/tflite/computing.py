"""Operators that compute element by element, over a whole axis, or over all features; and resizing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.exporters import layout
from deploykit.exporters.layout import NHWC, View, identity, permuted, stored
from deploykit.exporters.one_sample import Unsupported, limits_of
from deploykit.exporters.resizing import COORDINATES
from deploykit.exporters.tflite.operation import (
    Constant,
    Operation,
    as_shape,
    limit,
    read,
    requantize,
    uncovered,
)
from deploykit.exporters.tflite.sliding import bias
from deploykit.exporters.tflite.windows import litert_mode
from deploykit.exporters.tflite.writer import Quant, Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

PROBABILITY = Quant((1 / 256,), -128)
"""What LiteRT's integer sigmoid and softmax write."""

SYMMETRIC_UNIT = Quant((1 / 128,), 0)
"""What LiteRT's integer tanh writes."""

WIDE_UNIT = Quant((1 / 32768,), 0, dtype="int16")
"""What all three write in 16 bits."""


def fully_connected(op: Operation) -> View:
    """Gemm, and MatMul with constant weights. A flattened image stays as it is: the weights' columns move instead."""
    if op.attribute("transA", 0) or op.attribute("alpha", 1.0) != 1.0 or op.attribute("beta", 1.0) != 1.0:
        raise Unsupported("Gemm is supported without transA, alpha and beta")
    if len(op.shape(1)) != 2:
        raise Unsupported("a matrix of constant weights is needed; LiteRT's product is with [in, out] features")
    view, shape = op.view(0), op.output_shape()
    columns, order = None, identity(len(shape))
    if len(view.shape) == 2 and view.shape[0] == 1:
        columns = layout.element_order(view)
        x = as_shape(op.writer, view.tensor, view.shape)
    else:
        if op.natural(0)[-1] == len(shape) - 1:
            order = op.natural(0)
        x = op.read(0, order)

    def arranged(weights: NDArray[Any]) -> NDArray[Any]:
        rows = weights if op.attribute("transB", 0) else weights.T
        return rows if columns is None else rows[:, columns]

    filters = op.constant(1, arranged, narrow=True)
    inputs = [x, filters, bias(op, filters, shape[-1])]
    return op.emit("FULLY_CONNECTED", inputs, shape, order, fuses=True, keepNumDims=len(shape) > 2)


def binary(kind: str) -> Callable[[Operation], View]:
    """An operator on two operands that are broadcast against each other."""

    def write(op: Operation) -> View:
        shape = tuple(np.broadcast_shapes(op.shape(0), op.shape(1)))
        views = [i for i in (0, 1) if isinstance(op.operands[i], View) and len(op.shape(i)) == len(shape)]
        orders = [order for i in views if (order := layout.natural(op.view(i))) is not None]
        order = orders[0] if orders else identity(len(shape))
        options = {"potScaleInt16": False} if kind in ("ADD", "SUB") and _is_wide(op.quant) else {}
        return op.emit(kind, [_expanded(op, i, order) for i in (0, 1)], shape, order, fuses=True, **options)

    return write


def _expanded(op: Operation, index: int, order: layout.Order) -> Tensor:
    """An operand with leading axes of size 1 up to the result's rank, stored in ``order``."""
    shape = (1,) * (len(order) - len(op.shape(index))) + op.shape(index)
    operand = op.operands[index]
    if isinstance(operand, Constant):
        if operand.quant is not None and len(operand.quant.scales) > 1:
            raise Unsupported("LiteRT takes constants with one scale here, not one per channel")
        return op.constant(index, lambda values: values.reshape(shape).transpose(order))
    view = layout.reshape(op.view(index), shape)
    assert view is not None
    return read(op.writer, view, order)


def activation(op: Operation) -> View:
    """Relu and Clip that run on their own: rescaling saturates, the rest is left to `limit`."""
    limits, view = limits_of(op.node), op.view(0)
    if limits is None:
        raise Unsupported("its limits are computed at run time; they have to be constants")
    tensor = view.tensor if op.quant is None else requantize(op.writer, view.tensor, op.quant, op.name)
    left = uncovered(limits, op.quant)
    return view.on(tensor if left is None else limit(op.writer, tensor, left))


def unary(kind: str, quant: Quant | None = None) -> Callable[[Operation], View]:
    """An operator on one operand; ``quant`` is the scale its integer kernel insists on."""

    def write(op: Operation) -> View:
        insists = WIDE_UNIT if quant is not None and _is_wide(op.quant) else quant
        return op.elementwise(kind, (insists or op.quant) if op.quant is not None else None)

    return write


def prelu(op: Operation) -> View:
    """PRELU: the slope has the axes of the image but the batch."""
    shape, order = op.shape(0), op.natural(0)
    slope = _expanded(op, 1, order)
    return op.emit("PRELU", [op.read(0, order), as_shape(op.writer, slope, slope.shape[1:])], shape, order)


def gelu(op: Operation) -> View:
    """GELU."""
    return op.elementwise("GELU", op.quant, approximate=op.attribute("approximate", "none") == "tanh")


def elu(op: Operation) -> View:
    """ELU, which has no factor in LiteRT."""
    if op.attribute("alpha", 1.0) != 1.0:
        raise Unsupported(f"LiteRT's ELU has the factor 1, this one {op.attribute('alpha')}")
    return op.elementwise("ELU", op.quant)


def leaky_relu(op: Operation) -> View:
    """LEAKY_RELU."""
    return op.elementwise("LEAKY_RELU", op.quant, alpha=op.attribute("alpha", 0.01))


def hard_sigmoid(op: Operation) -> View:
    """HardSigmoid, max(0, min(1, x / 6 + 1/2)), as min(max(x + 3, 0), 6) / 6.

    The sum is stored in steps six times those of the result, so dividing by six is exact and nothing is rounded twice.
    """
    alpha, beta = op.attribute("alpha", 0.2), op.attribute("beta", 0.5)
    if abs(alpha - 1 / 6) > 1e-6 or abs(beta - 0.5) > 1e-6:
        raise Unsupported(f"HardSigmoid with alpha {alpha:g} and beta {beta:g}; torch's has 1/6 and 1/2")
    view, quant = op.view(0), op.quant
    wide = None if quant is None else replace(quant, scales=(float(np.float32(6) * np.float32(quant.scales[0])),))
    three, sixth = _scalar(op, "three", 3.0), _scalar(op, "sixth", 1 / 6)
    name, shape = f"{op.name}_times_six", view.tensor.shape
    times_six = op.writer.write("ADD", [view.tensor, three], name, shape, wide, fusedActivationFunction="RELU6")
    return view.on(op.writer.write("MUL", [times_six, sixth], op.name, shape, quant))


def _is_wide(quant: Quant | None) -> bool:
    return quant is not None and quant.dtype == "int16"


def _scalar(op: Operation, name: str, value: float) -> Tensor:
    """A number as an operand: in an integer operator, one step of its own size."""
    real = np.array([value], np.float32)
    if op.quant is None:
        return op.writer.constant(f"{op.name}_{name}", real)
    quant = replace(op.quant, scales=(float(real[0]),), zero_point=0)
    return op.writer.constant(f"{op.name}_{name}", np.ones(1, quant.dtype), quant)


def softmax(op: Operation) -> View:
    """SOFTMAX, which runs along the last stored axis: for channels of an image that is where they lie anyway."""
    rank = len(op.shape(0))
    axis = op.axis(op.attribute("axis", -1))
    order = op.natural(0)
    if order[-1] != axis:
        order = (*(a for a in range(rank) if a != axis), axis)
    x = op.read(0, order)
    insists = None if op.quant is None else WIDE_UNIT if _is_wide(op.quant) else PROBABILITY
    made = op.writer.write("SOFTMAX", [x], op.name, x.shape, insists, beta=1.0)
    return stored(made, op.shape(0), order)


def mean(op: Operation) -> View:
    """MEAN over axes; they are kept at size 1 in the file, where image kernels are fast, and dropped in the view."""
    shape = op.shape(0)
    axes = list(range(2, len(shape)))
    if op.node.op_type == "ReduceMean":
        given = op.parameter(1)
        axes = [op.axis(a) for a in (range(len(shape)) if given is None else given.tolist())]
    order = op.natural(0)
    kept = tuple(1 if i in axes else size for i, size in enumerate(shape))
    indices = op.writer.indices(f"{op.name}_axes", sorted(order.index(a) for a in axes))
    made = op.emit("MEAN", [op.read(0, order), indices], kept, order, keepDims=True)
    found = layout.reshape(made, op.output_shape())
    assert found is not None
    return found


def resize(op: Operation) -> View:
    """RESIZE_NEAREST_NEIGHBOR or RESIZE_BILINEAR, in the mode that reads the same places as ONNX's Resize."""
    shape, out = op.shape(0), op.output_shape()
    mode, coordinate = op.attribute("mode", "nearest"), op.attribute("coordinate_transformation_mode", "half_pixel")
    if len(shape) != 4 or shape[:2] != out[:2]:
        raise Unsupported("only the height and width of images can be resized")
    if mode not in ("nearest", "linear") or coordinate not in COORDINATES or op.attribute("antialias", 0):
        raise Unsupported(f"LiteRT has no '{mode}' resizing with '{coordinate}' coordinates, and no antialiasing")
    given = op.parameter(2)
    scales = [out[2] / shape[2], out[3] / shape[3]] if given is None or given.size == 0 else given[-2:].tolist()
    axes = list(zip(shape[2:], out[2:], scales, strict=True))
    rounding = op.attribute("nearest_mode", "round_prefer_floor") if mode == "nearest" else None
    found = litert_mode(axes, coordinate, rounding)
    if found is None:
        raise Unsupported(
            f"from {shape[2:]} to {out[2:]} ({mode}, {coordinate}) it reads other places than LiteRT would; "
            "give the size instead of a scale factor"
        )
    kind = "RESIZE_NEAREST_NEIGHBOR" if mode == "nearest" else "RESIZE_BILINEAR"
    x, size = op.read(0, NHWC), op.writer.indices(f"{op.name}_size", out[2:])
    made = op.writer.write(
        kind, [x, size], op.name, permuted(out, NHWC), x.quant, alignCorners=found[0], halfPixelCenters=found[1]
    )  # fmt: skip
    return stored(made, out, NHWC)
