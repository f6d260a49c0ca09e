"""Operators that compute without weights: sums, products, pools, means, softmax."""

from __future__ import annotations

from collections.abc import Callable
from math import log2, prod

import numpy as np

from deploykit.exporters import layout
from deploykit.exporters.c99 import program
from deploykit.exporters.c99.operation import Operation, require_room
from deploykit.exporters.c99.products import channels_last, image, pads, pair
from deploykit.exporters.c99.program import Shape, Tensor
from deploykit.exporters.c99.rounding import folded_half, mean_rescaling
from deploykit.exporters.layout import Order, View, identity
from deploykit.exporters.one_sample import Unsupported

SPAN = 255
"""The largest x - zero_x can be."""

TFLM_LIFT = 20
"""TFLM shifts both summands up by so many bits before it brings them to a common scale."""

LARGEST_LIFT = 21
"""A difference of 9 bits shifted by this stays within 31, and so does the sum of two."""

EXPONENTIAL_BITS = 22


def add(subtract: bool) -> Callable[[Operation], View[Tensor]]:
    """Add and Sub. Both summands are brought to a common finer step first, then the sum is rounded once to y's.

    TFLM takes twice the larger step / 2^20 as the common one; with powers of two it is the smaller step, exactly.
    """

    def write(op: Operation) -> View[Tensor]:
        a, b, y, a_shape, b_shape, y_shape, view = _broadcast(op)
        steps = a.quant.scale, b.quant.scale
        if op.builder.rounding == "tflm_double":
            common, lift = 2 * max(steps), TFLM_LIFT
        else:
            common, lift = min(steps), 0
            if max(steps) / common > 2**LARGEST_LIFT:
                raise Unsupported("the scales of its inputs are too far apart to add them in 32 bits")
        (a_rescale, _), (b_rescale, _) = (op.rescaling(step / common) for step in steps)
        y_rescale, half = op.rescaling(common / (2**lift * op.quant.scale))
        require_room(int(SPAN * 2**lift * sum(steps) / common) + int(half[0]) + 2, y_rescale)
        low, high = op.clamp
        op.emit(
            program.Add(
                op.layer, a, b, y, a_shape, b_shape, y_shape, lift, a_rescale, b_rescale, y_rescale, int(half[0]),
                subtract, low, high,
            )
        )  # fmt: skip
        return view

    return write


def multiply(op: Operation) -> View[Tensor]:
    """Mul of two tensors, or of a tensor and a constant one."""
    a, b, y, a_shape, b_shape, y_shape, view = _broadcast(op)
    rescale, half = op.rescaling(a.quant.scale * b.quant.scale / op.quant.scale)
    require_room(SPAN**2 + int(half[0]), rescale)
    low, high = op.clamp
    op.emit(program.Multiply(op.layer, a, b, y, a_shape, b_shape, y_shape, rescale, int(half[0]), low, high))
    return view


def _broadcast(op: Operation) -> tuple[Tensor, Tensor, Tensor, Shape, Shape, Shape, View[Tensor]]:
    """Both operands, the result, and their shapes as stored, all of one rank."""
    shape = tuple(np.broadcast_shapes(op.shape(0), op.shape(1)))
    views = [op.view(0), op.view(1)]
    full = [v for v in views if v.tensor.data is None and len(v.shape) == len(shape)]
    orders = [order for v in sorted(full, key=lambda v: -v.tensor.size) if (order := layout.natural(v)) is not None]
    order = orders[0] if orders else identity(len(shape))
    tensors, shapes = [], []
    for view in views:
        grown = layout.reshape(view, (1,) * (len(shape) - len(view.shape)) + view.shape)
        assert grown is not None
        held = grown.tensor
        if held.data is not None:  # a constant is rearranged now, not on the device
            arranged = np.ascontiguousarray(held.data.reshape(grown.shape).transpose(order))
            tensors.append(program.Tensor(held.name, arranged.shape, held.quant, arranged))
        else:
            tensors.append(op.builder.read(grown, order))
        shapes.append(layout.permuted(grown.shape, order))
    y, result = op.result(shape, order)
    return tensors[0], tensors[1], y, shapes[0], shapes[1], layout.permuted(shape, order), result


def max_pool(op: Operation) -> View[Tensor]:
    """MaxPool."""
    if len(op.node.outputs) > 1 and list(op.node.outputs[1].uses()):
        raise Unsupported("the positions of the maxima are not available")
    order = channels_last(op)
    y, view = op.result(op.output_shape(), order)
    op.emit(
        program.MaxPool(
            op.layer, op.read(0, order), y, image(op.shape(0)), image(op.output_shape()), pair(op, "kernel_shape"),
            pair(op, "strides"), pair(op, "dilations"), pads(op)[:2],
        )
    )  # fmt: skip
    return view


def average_pool(op: Operation) -> View[Tensor]:
    """AveragePool."""
    order = channels_last(op)
    if op.view(0).tensor.quant != op.quant:
        raise Unsupported(
            "its input and output have different scales; add 'AveragePool' to the target's shared_scale in [quant]"
        )
    if pair(op, "dilations") != (1, 1):
        raise Unsupported("a dilated average pool is not supported")
    y, view = op.result(op.output_shape(), order)
    op.emit(
        program.AveragePool(
            op.layer, op.read(0, order), y, image(op.shape(0)), image(op.output_shape()), pair(op, "kernel_shape"),
            pair(op, "strides"), pads(op), bool(op.attribute("count_include_pad", 0)),
        )
    )  # fmt: skip
    return view


def mean(op: Operation) -> View[Tensor]:
    """GlobalAveragePool and ReduceMean: the averaged axes become one, and so do those before and behind it."""
    shape = op.shape(0)
    axes = list(range(2, len(shape)))
    if op.node.op_type == "ReduceMean":
        given = op.parameter(1)
        axes = [op.axis(a) for a in (range(len(shape)) if given is None else given.tolist())]
        if given is None and op.attribute("noop_with_empty_axes", 0):
            raise Unsupported("a mean over no axes")
    order, sizes = _together(op, axes)
    kept = tuple(1 if i in axes else size for i, size in enumerate(shape))
    x = op.read(0, order)
    rescale = mean_rescaling(x.quant.scale / op.quant.scale, sizes[1], op.builder.rounding)
    y, view = op.result(kept, order)
    offset = int(folded_half(rescale, op.builder.rounding)[0])
    require_room(SPAN * sizes[1] + offset, rescale)
    op.emit(program.Mean(op.layer, x, y, sizes, rescale, offset))
    found = layout.reshape(view, op.output_shape())
    assert found is not None
    return found


def softmax(op: Operation) -> View[Tensor]:
    """Softmax by a table of exponentials; the sum of all of them stays within 32 bits."""
    axis = op.axis(op.attribute("axis", -1))
    order, sizes = _together(op, [axis])
    x = op.read(0, order)
    one = 1 / op.quant.scale
    bits = min(EXPONENTIAL_BITS, 31 - int(np.ceil(log2(max(sizes[1], 2)))))
    if one != int(one) or one * 2**bits >= 2**31 or bits < 18:
        raise Unsupported(
            "an integer softmax writes steps of a power of two over at most 8192 classes; leave it out of the model "
            "(the largest score is the answer, and dk_argmax finds it)"
        )
    exponentials = np.rint(np.exp(-np.arange(256) * x.quant.scale) * 2**bits).astype(np.uint32)
    y, view = op.result(op.shape(0), order)
    op.emit(program.Softmax(op.layer, x, y, sizes, exponentials, int(one)))
    return view


def _together(op: Operation, axes: list[int]) -> tuple[Order, tuple[int, int, int]]:
    """An order in which some axes lie side by side, and the sizes (before, those, behind); moves what it must."""
    order, shape = op.natural(0), op.shape(0)

    def spread(order: Order) -> bool:
        places = [i for i, a in enumerate(order) if shape[a] != 1]
        taken = [k for k, i in enumerate(places) if order[i] in axes]
        return bool(taken) and taken[-1] - taken[0] + 1 != len(taken)

    if spread(order):
        rest = [a for a in order if a not in axes]
        order = (*rest, *sorted(axes))
    places = [i for i, a in enumerate(order) if a in axes and shape[a] != 1] or [order.index(axes[0])]
    sizes = [shape[a] for a in order]
    return order, (
        prod(sizes[: places[0]]), prod(sizes[places[0] : places[-1] + 1]), prod(sizes[places[-1] + 1 :]),
    )  # fmt: skip
