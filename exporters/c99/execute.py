"""Runs a `Program` in numpy, exactly: the oracle that the compiled C has to equal bit for bit.

Every operation is written out from its docstring in `program`, on arrays ``[samples, ...]``, in integers. Sums of
products go through floating-point matrix products, which are fast; they are exact, because the proof of room in
`products` bounds every partial sum, and float32 is taken only where that bound is below 2^24.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.exporters.c99 import rounding
from deploykit.exporters.c99.program import (
    Add,
    AveragePool,
    Concat,
    Conv,
    ConvTranspose,
    Dense,
    MaxPool,
    Mean,
    Multiply,
    Operation,
    Pad,
    Pair,
    Program,
    Quant,
    Resize,
    Slice,
    Softmax,
    Table,
    Tensor,
    Transpose,
    reads,
)
from deploykit.exporters.c99.rounding import Rounding

if TYPE_CHECKING:
    from numpy.typing import NDArray


BLOCK = 2**16
"""Elements of the largest tensor over all samples that are run at once: what fits in a processor's cache."""


def execute(
    program: Program, inputs: Mapping[str, NDArray[Any]], taps: dict[str, NDArray[np.int8]] | None = None
) -> dict[str, NDArray[np.int8]]:
    """Runs samples through a program.

    Args:
        program: the network.
        inputs: by port name, int8 (or uint8 pixels) as stored: ``[n, elements]`` in any shape.
        taps: receives every tensor by name, ``[n, elements]``.

    Returns:
        Outputs by port name, ``[n, elements]`` int8 as stored.
    """
    count = len(next(iter(inputs.values())))
    tensors = [*(port.tensor for port in program.inputs), *(operation.y for operation in program.operations)]
    step = max(1, BLOCK // max(tensor.size for tensor in tensors))
    blocks = [
        _execute(program, {name: array[i : i + step] for name, array in inputs.items()}, taps is not None)
        for i in range(0, count, step)
    ]
    found = {tensor: np.concatenate([block[tensor] for block in blocks]) for tensor in blocks[0]}
    if taps is not None:
        taps.update({tensor.name: array for tensor, array in found.items()})
    return {port.name: found[port.tensor] for port in program.outputs}


def _execute(program: Program, inputs: Mapping[str, NDArray[Any]], keep: bool) -> dict[Tensor, NDArray[np.int8]]:
    """The outputs, or every tensor, of some samples."""
    last_read = {tensor: i for i, operation in enumerate(program.operations) for tensor in reads(operation)}
    kept = {port.tensor for port in program.outputs}
    held: dict[Tensor, NDArray[np.int8]] = {}
    for port in program.inputs:
        array = np.asarray(inputs[port.name])
        held[port.tensor] = np.ascontiguousarray(array.reshape(len(array), port.tensor.size)).view(np.int8)
    for i, operation in enumerate(program.operations):
        read = [_constant(t) if t.data is not None else held[t] for t in reads(operation)]
        held[operation.y] = _limited(_run(operation, read, program.rounding), operation)
        for tensor in reads(operation):
            if last_read[tensor] == i and not keep and tensor not in kept:
                held.pop(tensor, None)
    return held


def _constant(tensor: Tensor) -> NDArray[np.int8]:
    assert tensor.data is not None
    return tensor.data.reshape(1, -1)


def _limited(y: NDArray[Any], operation: Operation) -> NDArray[np.int8]:
    """Saturated, or clamped to the operation's limits, as ``[n, elements]``."""
    low, high = getattr(operation, "low", -128), getattr(operation, "high", 127)
    found: NDArray[np.int8] = np.clip(y, low, high).astype(np.int8).reshape(len(y), -1)
    return found


def _run(operation: Operation, read: list[NDArray[np.int8]], how: Rounding) -> NDArray[Any]:
    found: NDArray[Any] = _computed(operation, read, how)
    return found


@singledispatch
def _computed(operation: Operation, read: list[NDArray[np.int8]], how: Rounding) -> NDArray[Any]:
    raise TypeError(f"no rule to execute {type(operation).__name__}")


@_computed.register(Conv)
def _conv(op: Conv, read: list[NDArray[np.int8]], how: Rounding) -> NDArray[Any]:
    (x,) = read
    n, c, (oh, ow, out) = len(x), op.x_shape[2], op.y_shape
    (kh, kw), (sh, sw), (dh, dw) = op.weights.shape[1:3], op.strides, op.dilations
    type_ = _exact(op.weights, op.x.quant)
    padded = _bordered(op, x, (oh - 1) * sh + (kh - 1) * dh + 1, (ow - 1) * sw + (kw - 1) * dw + 1, type_)

    def shifted(i: int, j: int) -> NDArray[Any]:
        """What kernel element (i, j) sees: [n, oh, ow, c]."""
        rows = slice(i * dh, i * dh + (oh - 1) * sh + 1, sh)
        return padded[:, rows, slice(j * dw, j * dw + (ow - 1) * sw + 1, sw)]

    sums = np.zeros((n, oh, ow, out), type_)
    if op.depthwise:
        repeat = out // c
        for i in range(kh):
            for j in range(kw):
                seen = shifted(i, j) if repeat == 1 else np.repeat(shifted(i, j), repeat, axis=3)
                sums += seen * op.weights[:, i, j, 0].astype(type_)
    else:
        part, share = c // op.groups, out // op.groups
        for g in range(op.groups):
            outs, ins = slice(g * share, (g + 1) * share), slice(g * part, (g + 1) * part)
            for i in range(kh):
                for j in range(kw):
                    seen = shifted(i, j)[..., ins].reshape(-1, part)
                    product = seen @ op.weights[outs, i, j].T.astype(type_)
                    sums[..., outs] += product.reshape(n, oh, ow, share)
    return _rescaled(sums, op, how)


@_computed.register(ConvTranspose)
def _conv_transpose(op: ConvTranspose, read: list[NDArray[np.int8]], how: Rounding) -> NDArray[Any]:
    (x,) = read
    n, (h, w, c), (oh, ow, out) = len(x), op.x_shape, op.y_shape
    (kh, kw), (sh, sw), (dh, dw), (ph, pw) = op.weights.shape[1:3], op.strides, op.dilations, op.pads
    type_ = _exact(op.weights, op.x.quant)
    centred = x.reshape(n, h, w, c).astype(type_) - op.x.quant.zero_point
    tall = max((h - 1) * sh + (kh - 1) * dh + 1, ph + oh)
    wide = max((w - 1) * sw + (kw - 1) * dw + 1, pw + ow)
    sums = np.zeros((n, tall, wide, out), type_)
    part, share = c // op.groups, out // op.groups
    for g in range(op.groups):
        outs, ins = slice(g * share, (g + 1) * share), slice(g * part, (g + 1) * part)
        for i in range(kh):
            for j in range(kw):
                product = centred[..., ins] @ op.weights[outs, i, j].T.astype(type_)
                rows = slice(i * dh, i * dh + (h - 1) * sh + 1, sh)
                columns = slice(j * dw, j * dw + (w - 1) * sw + 1, sw)
                sums[:, rows, columns, outs] += product
    return _rescaled(sums[:, ph : ph + oh, pw : pw + ow], op, how)


@_computed.register(Dense)
def _dense(op: Dense, read: list[NDArray[np.int8]], how: Rounding) -> NDArray[Any]:
    (x,) = read
    type_ = _exact(op.weights, op.x.quant)
    centred = x.reshape(len(x), op.rows, -1).astype(type_) - op.x.quant.zero_point
    return _rescaled(centred @ op.weights.T.astype(type_), op, how)


@_computed.register(Add)
def _add(op: Add, read: list[NDArray[np.int8]], how: Rounding) -> NDArray[Any]:
    a, b = _summands(op, read)
    a = rounding.apply(a << op.lift, op.a_rescale, how)
    b = rounding.apply(b << op.lift, op.b_rescale, how)
    total = (a - b if op.subtract else a + b) + op.offset
    return rounding.apply(total, op.y_rescale, how) + op.y.quant.zero_point


@_computed.register(Multiply)
def _multiply(op: Multiply, read: list[NDArray[np.int8]], how: Rounding) -> NDArray[Any]:
    a, b = _summands(op, read)
    return rounding.apply(a * b + op.offset, op.rescale, how) + op.y.quant.zero_point


@_computed.register(MaxPool)
def _max_pool(op: MaxPool, read: list[NDArray[np.int8]], how: Rounding) -> NDArray[Any]:
    (x,) = read
    inside = np.full((1, *op.x_shape), True)
    windows = _windows(op, x.reshape(len(x), *op.x_shape), op.dilations, -128)
    seen = _windows(op, inside, op.dilations, 0)
    largest: NDArray[np.int8] = np.where(seen, windows, -128).max(axis=(-2, -1))
    return largest


@_computed.register(AveragePool)
def _average_pool(op: AveragePool, read: list[NDArray[np.int8]], how: Rounding) -> NDArray[Any]:
    (x,) = read
    (h, w, _), (top, left, bottom, right) = op.x_shape, op.pads
    image = np.zeros((1, top + h + bottom, left + w + right, 1), np.int8)
    image[:, top : top + h, left : left + w] = 1
    inside = _cut_windows(op, image, (1, 1)).sum(axis=(-2, -1), dtype=np.int64)
    count = _cut_windows(op, np.ones_like(image), (1, 1)).sum(axis=(-2, -1), dtype=np.int64)
    total = _windows(op, x.reshape(len(x), *op.x_shape), (1, 1), 0).sum(axis=(-2, -1), dtype=np.int64)
    if not op.counts_padding:
        return rounding.divide(total, inside, how)
    return rounding.divide(total + op.x.quant.zero_point * (count - inside), count, how)


@_computed.register(Mean)
def _mean(op: Mean, read: list[NDArray[np.int8]], how: Rounding) -> NDArray[Any]:
    (x,) = read
    centred = x.reshape(len(x), *op.shape).astype(np.int64) - op.x.quant.zero_point
    return rounding.apply(centred.sum(axis=2) + op.offset, op.rescale, how) + op.y.quant.zero_point


@_computed.register(Table)
def _table(op: Table, read: list[NDArray[np.int8]], how: Rounding) -> NDArray[Any]:
    (x,) = read
    index = x.reshape(len(x), -1, len(op.values), op.inner).astype(np.int16) + 128
    found: NDArray[Any] = op.values[np.arange(len(op.values))[:, None], index]
    return found


@_computed.register(Softmax)
def _softmax(op: Softmax, read: list[NDArray[np.int8]], how: Rounding) -> NDArray[Any]:
    (x,) = read
    rows = x.reshape(len(x), *op.shape).astype(np.int64)
    exponentials = op.exponentials.astype(np.int64)[rows.max(axis=2, keepdims=True) - rows]
    total = exponentials.sum(axis=2, keepdims=True)
    shares: NDArray[np.int64] = (exponentials * op.one + total // 2) // total + op.y.quant.zero_point
    return shares


@_computed.register(Concat)
def _concat(op: Concat, read: list[NDArray[np.int8]], how: Rounding) -> NDArray[Any]:
    n = max(len(part) for part in read)
    blocks = [
        np.broadcast_to(p.reshape(len(p), op.outer, -1), (n, op.outer, p.size // len(p) // op.outer)) for p in read
    ]
    return np.concatenate(blocks, axis=2)


@_computed.register(Pad)
def _pad(op: Pad, read: list[NDArray[np.int8]], how: Rounding) -> NDArray[Any]:
    (x,) = read
    after = [y - b - s for y, b, s in zip(op.y_shape, op.before, op.x_shape, strict=True)]
    widths = [(0, 0), *zip(op.before, after, strict=True)]
    return np.pad(x.reshape(len(x), *op.x_shape), widths, constant_values=op.x.quant.zero_point)


@_computed.register(Slice)
def _slice(op: Slice, read: list[NDArray[np.int8]], how: Rounding) -> NDArray[Any]:
    (x,) = read
    axes = zip(op.begin, op.step, op.y_shape, strict=True)
    return x.reshape(len(x), *op.x_shape)[(slice(None), *(slice(b, b + s * (n - 1) + 1, s) for b, s, n in axes))]


@_computed.register(Transpose)
def _transpose(op: Transpose, read: list[NDArray[np.int8]], how: Rounding) -> NDArray[Any]:
    (x,) = read
    return x.reshape(len(x), *op.x_shape).transpose(0, *(a + 1 for a in op.axes))


@_computed.register(Resize)
def _resize(op: Resize, read: list[NDArray[np.int8]], how: Rounding) -> NDArray[Any]:
    (x,) = read
    return x.reshape(len(x), *op.x_shape)[:, list(op.rows)][:, :, list(op.columns)]


# ---------------------------------------------------------------------- what several of them do


def _exact(weights: NDArray[np.int8], quant: Quant) -> type[np.floating[Any]]:
    """The fastest type in which no sum of products is rounded."""
    reach = max(abs(-128 - quant.zero_point), abs(127 - quant.zero_point))
    largest = np.abs(weights.reshape(len(weights), -1).astype(np.int64)).sum(axis=1).max() * reach
    return np.float32 if largest < 2**24 else np.float64


def _bordered(op: Conv, x: NDArray[np.int8], tall: int, wide: int, type_: type[np.floating[Any]]) -> NDArray[Any]:
    """x - zero_x with zeros around it, exactly as large as the windows reach."""
    (h, w, c), (top, left) = op.x_shape, op.pads
    found = np.zeros((len(x), max(tall, top + h), max(wide, left + w), c), type_)
    np.subtract(
        x.reshape(-1, h, w, c), np.int16(op.x.quant.zero_point), out=found[:, top : top + h, left : left + w],
        casting="unsafe", dtype=type_,
    )  # fmt: skip
    return found


def _rescaled(sums: NDArray[Any], op: Conv | ConvTranspose | Dense, how: Rounding) -> NDArray[np.int64]:
    """Bias, rescaling and zero point, channel by channel."""
    return rounding.apply(sums.astype(np.int64) + op.bias, op.rescale, how) + op.y.quant.zero_point


def _summands(op: Add | Multiply, read: list[NDArray[np.int8]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Both operands without their zero points, broadcast to the result."""
    n = max(len(x) for x in read)
    a, b = (
        np.broadcast_to(x.reshape(len(x), *shape).astype(np.int64) - tensor.quant.zero_point, (n, *op.y_shape))
        for x, shape, tensor in zip(read, (op.a_shape, op.b_shape), (op.a, op.b), strict=True)
    )
    return a, b


def _windows(op: MaxPool | AveragePool, x: NDArray[Any], dilations: Pair, fill: int) -> NDArray[Any]:
    """The windows ``[n, oh, ow, c, kh, kw]`` of an image, ``fill`` around it."""
    (h, w, _), (top, left) = op.x_shape, op.pads[:2]
    padded = np.full((len(x), *_reach(op, dilations, (top + h, left + w)), x.shape[3]), fill, x.dtype)
    padded[:, top : top + h, left : left + w] = x
    return _cut_windows(op, padded, dilations)


def _cut_windows(op: MaxPool | AveragePool, x: NDArray[Any], dilations: Pair) -> NDArray[Any]:
    """The windows of an image that is padded already; zeros beyond it."""
    (kh, kw), (dh, dw) = op.kernel, dilations
    tall, wide = _reach(op, dilations, x.shape[1:3])
    x = np.pad(x, ((0, 0), (0, tall - x.shape[1]), (0, wide - x.shape[2]), (0, 0)))
    found = np.lib.stride_tricks.sliding_window_view(x, ((kh - 1) * dh + 1, (kw - 1) * dw + 1), (1, 2))
    (oh, ow, _), (sh, sw) = op.y_shape, op.strides
    return found[:, : (oh - 1) * sh + 1 : sh, : (ow - 1) * sw + 1 : sw, :, ::dh, ::dw]


def _reach(op: MaxPool | AveragePool, dilations: Pair, at_least: tuple[int, ...]) -> tuple[int, int]:
    """How tall and wide the windows go."""
    tall, wide = (
        max((o - 1) * s + (k - 1) * d + 1, least)
        for o, s, k, d, least in zip(op.y_shape, op.strides, op.kernel, dilations, at_least, strict=False)
    )
    return tall, wide
