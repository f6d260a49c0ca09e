"""Operators that move elements around without computing: pad, slice, split, concat and changes of shape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from deploykit.exporters import layout
from deploykit.exporters.layout import View, identity, permuted, stored
from deploykit.exporters.one_sample import Unsupported, pad_amounts, slice_corners, split_corners
from deploykit.exporters.tflite.operation import Operation, canonical, read, requantize
from deploykit.exporters.tflite.writer import DTYPES, Tensor

LOWEST = np.finfo(np.float32).min


def reshape(op: Operation) -> View:
    """Reshape, Flatten, Squeeze, Unsqueeze: another view of the same tensor."""
    view, shape = op.view(0), op.output_shape()
    if np.prod(view.shape) != np.prod(shape):
        raise Unsupported(f"it turns {view.shape} into {shape} at batch 1, so it mixes the batch with other axes")
    found = layout.reshape(view, shape) or layout.reshape(canonical(op.writer, view), shape)
    assert found is not None
    return found


def transpose(op: Operation) -> View:
    """Transpose: another view of the same tensor."""
    view = op.view(0)
    return layout.transpose(view, tuple(op.attribute("perm", range(len(view.shape))[::-1])))


def depth_to_space(op: Operation) -> View:
    """DepthToSpace as ONNX defines it: reshape, transpose, reshape."""
    view, (n, c, h, w), size = op.view(0), op.shape(0), op.attribute("blocksize")
    depth = c // size**2
    if op.attribute("mode", "DCR") == "CRD":
        shape, axes = (n, depth, size, size, h, w), (0, 1, 4, 2, 5, 3)
    else:
        shape, axes = (n, size, size, depth, h, w), (0, 3, 4, 1, 5, 2)
    blocks = layout.reshape(view, shape) or layout.reshape(canonical(op.writer, view), shape)
    assert blocks is not None
    found = layout.reshape(layout.transpose(blocks, axes), op.output_shape())
    assert found is not None
    return found


def unchanged(op: Operation) -> View:
    """Identity, and Expand: BROADCAST_TO where there is something to repeat."""
    shape = op.output_shape()
    if op.shape(0) == shape:
        return op.view(0)
    whole = layout.reshape(op.view(0), (1,) * (len(shape) - len(op.shape(0))) + op.shape(0))
    assert whole is not None
    x = read(op.writer, whole, identity(len(shape)))
    indices = op.writer.indices(f"{op.name}_shape", shape)
    made = op.writer.write("BROADCAST_TO", [x, indices], op.name, shape, x.quant, dtype=x.dtype)
    return stored(made, shape, identity(len(shape)))


def cast(op: Operation) -> View:
    """Cast to float32: of pixels, or of what is float32 already."""
    view, to = op.view(0), op.attribute("to")
    kind = view.tensor.dtype
    if to != int(ir.DataType.FLOAT) and (kind == "float32" or view.tensor.quant is not None):
        raise Unsupported("it cuts numbers to another type")
    if kind == "float32" or view.tensor.quant is not None:
        return view
    return op.elementwise("CAST", inDataType=DTYPES[kind], outDataType=DTYPES["float32"])


def pad(op: Operation) -> View:
    """PAD with zeros, PADV2 with another constant, MIRROR_PAD."""
    order, shape = op.natural(0), op.shape(0)
    pads = pad_amounts(op.node, shape)
    mode, fill = op.attribute("mode", "constant"), op.parameter(2)
    x, arranged = op.read(0, order), [pads[a] for a in order]
    if mode == "constant":
        made = padded(op, x, arranged, 0.0 if fill is None else float(fill.item()))
    elif mode == "reflect":
        indices = op.writer.indices(f"{op.name}_paddings", arranged)
        grown = _grown(x.shape, arranged)
        made = op.writer.write("MIRROR_PAD", [x, indices], op.name, grown, x.quant, mode="REFLECT")
    else:
        raise Unsupported(f"LiteRT has no padding in mode '{mode}'; use constant or reflect")
    return stored(made, op.output_shape(), order)


def padded(op: Operation, x: Tensor, pads: Sequence[tuple[int, int]], fill: float = 0.0) -> Tensor:
    """A stored tensor with padding of one value; -inf stands for the smallest there is."""
    name, shape = f"{x.name}_padded", _grown(x.shape, pads)
    indices = op.writer.indices(f"{name}_paddings", pads)
    if fill == 0 or (fill == -np.inf and x.quant is not None and x.quant.zero_point == x.quant.ends[0]):
        return op.writer.write("PAD", [x, indices], name, shape, x.quant)
    if x.quant is None:
        value = op.writer.constant(f"{name}_value", np.array([max(fill, LOWEST)], np.float32))
    else:
        bottom, top = x.quant.ends
        integer = bottom if fill == -np.inf else min(max(x.quant.to_integer(fill), bottom), top)
        value = op.writer.constant(f"{name}_value", np.array([integer], x.quant.dtype), x.quant)
    return op.writer.write("PADV2", [x, indices, value], name, shape, x.quant)


def take(op: Operation) -> View:
    """Slice: STRIDED_SLICE with constant, forward steps."""
    return cropped(op, op.view(0), *slice_corners(op.node, op.shape(0)))


def split(op: Operation) -> list[View]:
    """Split: one STRIDED_SLICE per part."""
    return [cropped(op, op.view(0), *corners) for corners in split_corners(op.node, op.shape(0))]


def cropped(op: Operation, view: View, begin: Sequence[int], end: Sequence[int], step: Sequence[int] = ()) -> View:
    """The part of a view between two corners, all in ONNX's order of the axes."""
    step = step or [1] * len(view.shape)
    order = layout.natural(view) or identity(len(view.shape))
    shape = tuple(len(range(b, e, s)) for b, e, s in zip(begin, end, step, strict=True))
    x = read(op.writer, view, order)
    corners = [
        op.writer.indices(f"{op.name}_{what}", permuted(tuple(values), order))
        for what, values in (("begin", begin), ("end", end), ("step", step))
    ]
    made = op.writer.write("STRIDED_SLICE", [x, *corners], op.name, permuted(shape, order), x.quant, dtype=x.dtype)
    return stored(made, shape, order)


def concat(op: Operation) -> View:
    """CONCATENATION; integer operands are brought to the result's scale first."""
    shape = op.output_shape()
    axis, order = op.axis(op.attribute("axis")), op.natural(0)
    parts = [op.read(i, order) for i in range(len(op.operands))]
    if op.quant is not None:
        parts = [requantize(op.writer, part, op.quant, f"{part.name}_rescaled") for part in parts]
    return op.emit("CONCATENATION", parts, shape, order, axis=order.index(axis))


def _grown(shape: Sequence[int], pads: Sequence[tuple[int, int]]) -> list[int]:
    return [size + before + behind for size, (before, behind) in zip(shape, pads, strict=True)]
