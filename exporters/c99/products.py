"""Products with constant weights: convolutions, transposed convolutions, matrix products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.exporters import layout
from deploykit.exporters.c99 import program
from deploykit.exporters.c99.operation import Constant, Operation, require_room
from deploykit.exporters.c99.program import Pair, Shape, Tensor
from deploykit.exporters.c99.rounding import Rescale
from deploykit.exporters.layout import NHWC, Order, View, identity
from deploykit.exporters.one_sample import Unsupported

if TYPE_CHECKING:
    from numpy.typing import NDArray

INT32 = 2**31


def convolution(op: Operation) -> View[Tensor]:
    """Conv in one or two dimensions, any groups."""
    order = channels_last(op)
    held = op.weights(1)
    weights = _filters(held.values, (0, *range(2, held.values.ndim), 1))  # [out, h, w, in / group]
    bias, rescale = _sums(op, held, weights.shape[0])
    y, view = op.result(op.output_shape(), order)
    x = op.read(0, order)
    x_shape, y_shape = image(op.shape(0)), image(op.output_shape())
    low, high = op.clamp
    made = program.Conv(
        op.layer, x, y, x_shape, y_shape, weights, bias, rescale, pair(op, "strides"), pair(op, "dilations"),
        pads(op)[:2], op.attribute("group", 1), low, high,
    )  # fmt: skip
    require_room(largest_sums(weights, bias, x), rescale)
    op.emit(made)
    return view


def transposed_convolution(op: Operation) -> View[Tensor]:
    """ConvTranspose: ONNX's weights are [in, out / group, ...]; every output channel gets its own filter here."""
    order = channels_last(op)
    held, groups = op.weights(1), op.attribute("group", 1)
    ins, outs, *kernel = held.values.shape
    grouped = held.values.reshape(groups, ins // groups, outs, *kernel).swapaxes(1, 2)
    weights = _filters(grouped.reshape(groups * outs, ins // groups, *kernel), (0, *range(2, 2 + len(kernel)), 1))
    scales = held.scales
    if groups > 1 and scales is not None and scales.size > 1:
        held = Constant(held.values, np.tile(scales, groups), 0, held.axis)
    bias, rescale = _sums(op, held, weights.shape[0])
    y, view = op.result(op.output_shape(), order)
    low, high = op.clamp
    x = op.read(0, order)
    require_room(largest_sums(weights, bias, x), rescale)
    op.emit(
        program.ConvTranspose(
            op.layer, x, y, image(op.shape(0)), image(op.output_shape()), weights, bias, rescale,
            pair(op, "strides"), pair(op, "dilations"), pads(op)[:2], groups, low, high,
        )
    )  # fmt: skip
    return view


def dense(op: Operation) -> View[Tensor]:
    """Gemm, and MatMul with constant weights. A flattened image stays as it is: the weights' columns move instead."""
    if op.attribute("transA", 0) or op.attribute("alpha", 1.0) != 1.0 or op.attribute("beta", 1.0) != 1.0:
        raise Unsupported("Gemm is supported without transA, alpha and beta")
    held = op.weights(1)
    if held.values.ndim != 2:
        raise Unsupported("its weights have to be one matrix [in, out]")
    weights = held.values if op.attribute("transB", 0) else held.values.T
    view, shape = op.view(0), op.output_shape()
    order: Order = identity(len(shape))
    if len(view.shape) == 2 and view.shape[0] == 1:
        columns = layout.element_order(view)
        weights, x = weights if columns is None else weights[:, columns], view.tensor
    else:
        if op.natural(0)[-1] == len(shape) - 1:
            order = op.natural(0)
        x = op.read(0, order)
    weights = np.ascontiguousarray(weights)
    bias, rescale = _sums(op, held, len(weights))
    y, result = op.result(shape, order)
    low, high = op.clamp
    require_room(largest_sums(weights, bias, x), rescale)
    op.emit(program.Dense(op.layer, x, y, y.size // len(weights), weights, bias, rescale, low, high))
    return result


def channels_last(op: Operation) -> Order:
    """How the images of operand 0 are stored."""
    rank = len(op.shape(0))
    if rank not in (3, 4):
        raise Unsupported(f"it has {rank - 2} spatial axes; 1 and 2 are supported")
    return NHWC if rank == 4 else (0, 2, 1)


def image(shape: Shape) -> Shape:
    """(height, width, channels) of an ONNX shape [n, c, (h,) w]."""
    return (shape[2] if len(shape) == 4 else 1), shape[-1], shape[1]


def pair(op: Operation, name: str) -> Pair:
    """An attribute for height and width; 1 where it is not given."""
    spatial = len(op.shape(0)) - 2
    given = op.attribute(name, [1] * spatial)
    return (given[0] if spatial == 2 else 1), given[-1]


def pads(op: Operation) -> tuple[int, int, int, int]:
    """(top, left, bottom, right)"""
    if op.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise Unsupported("auto_pad is out of use in ONNX; export the model with explicit pads")
    spatial = len(op.shape(0)) - 2
    given = op.attribute("pads", [0] * 2 * spatial)
    if spatial == 1:
        return 0, given[0], 0, given[1]
    return given[0], given[1], given[2], given[3]


def _filters(values: NDArray[Any], axes: Shape) -> NDArray[np.int8]:
    moved = values.transpose(axes)
    return np.ascontiguousarray(moved if moved.ndim == 4 else moved[:, None])


def _sums(op: Operation, weights: Constant, channels: int) -> tuple[NDArray[np.int32], Rescale]:
    """Bias and rescaling of the int32 sums: their step is s_x * s_w, the result's is s_y."""
    x = op.operands[0]
    if not isinstance(x, View):
        raise Unsupported("it has constant inputs only")
    assert weights.scales is not None
    if weights.zero_point:
        raise Unsupported("its weights have a zero point other than 0")
    scales = np.broadcast_to(weights.scales.astype(np.float64), (channels,))
    rescale, half = op.rescaling(x.tensor.quant.scale * scales / op.quant.scale)
    given = op.operands[2] if len(op.operands) > 2 else None
    bias = np.zeros(channels, np.int64)
    if given is not None:
        if not isinstance(given, Constant) or given.scales is None:
            raise Unsupported('its bias is not int32; integer targets need bias = "int32" in [quant]')
        bias = np.broadcast_to(given.values.reshape(-1), (channels,)).astype(np.int64)
    bias = bias + half
    if np.abs(bias).max() >= INT32:
        raise Unsupported("its bias does not fit in 32 bits")
    return bias.astype(np.int32), rescale


def largest_sums(weights: NDArray[np.int8], bias: NDArray[np.int32], x: Tensor) -> NDArray[np.int64]:
    """How far from zero the sum of each channel can get, whatever x holds: the proof from the actual weights.

    Every partial sum lies between bias + the negative products and bias + the positive ones, each at its largest.
    """
    lowest, highest = -128 - x.quant.zero_point, 127 - x.quant.zero_point
    rows = weights.reshape(len(weights), -1).astype(np.int64)
    positive, negative = np.maximum(rows, 0).sum(axis=1), np.minimum(rows, 0).sum(axis=1)
    top = bias + positive * max(highest, 0) + negative * min(lowest, 0)
    bottom = bias + positive * min(lowest, 0) + negative * max(highest, 0)
    found: NDArray[np.int64] = np.maximum(np.abs(top), np.abs(bottom))
    return found
