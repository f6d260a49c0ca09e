"""Operators that move elements without computing: reshape, transpose, pad, slice, split, concat, resize."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deploykit.exporters import layout
from deploykit.exporters.c99 import program
from deploykit.exporters.c99.curves import as_curve
from deploykit.exporters.c99.operation import Operation, elements
from deploykit.exporters.c99.program import Tensor
from deploykit.exporters.layout import NHWC, View, identity, permuted
from deploykit.exporters.one_sample import Unsupported, pad_amounts, slice_corners, split_corners
from deploykit.exporters.resizing import COORDINATES, nearest_positions


def reshape(op: Operation) -> View[Tensor]:
    """Reshape, Flatten, Squeeze, Unsqueeze: another view of the same tensor."""
    view, shape = op.view(0), op.output_shape()
    if elements(view.shape) != elements(shape):
        raise Unsupported(f"it turns {view.shape} into {shape} at batch 1, so it mixes the batch with other axes")
    return _reshaped(op, view, shape)


def transpose(op: Operation) -> View[Tensor]:
    """Transpose: another view of the same tensor."""
    view = op.view(0)
    return layout.transpose(view, tuple(op.attribute("perm", range(len(view.shape))[::-1])))


def depth_to_space(op: Operation) -> View[Tensor]:
    """DepthToSpace as ONNX defines it: reshape, transpose, reshape."""
    view, (n, c, h, w), size = op.view(0), op.shape(0), op.attribute("blocksize")
    depth = c // size**2
    if op.attribute("mode", "DCR") == "CRD":
        shape, axes = (n, depth, size, size, h, w), (0, 1, 4, 2, 5, 3)
    else:
        shape, axes = (n, size, size, depth, h, w), (0, 3, 4, 1, 5, 2)
    return _reshaped(op, layout.transpose(_reshaped(op, view, shape), axes), op.output_shape())


def _reshaped(op: Operation, view: View[Tensor], shape: tuple[int, ...]) -> View[Tensor]:
    found = layout.reshape(view, shape)
    if found is None:  # the new shape cuts through an axis: the elements are brought into ONNX's order first
        order = identity(len(view.shape))
        moved = op.builder.read(view, order)
        found = layout.reshape(layout.stored(moved, (elements(view.shape),), (0,)), shape)
    assert found is not None
    return found


def unchanged(op: Operation) -> View[Tensor]:
    """Identity, and Expand where it has nothing to repeat."""
    if op.shape(0) != op.output_shape():
        raise Unsupported(f"repeating {op.shape(0)} to {op.output_shape()} is not supported")
    return op.view(0)


def pad(op: Operation) -> View[Tensor]:
    """Pad with zeros."""
    shape, order, fill = op.shape(0), op.natural(0), op.parameter(2)
    if op.attribute("mode", "constant") != "constant" or (fill is not None and np.any(fill)):
        raise Unsupported("only padding with zeros has an integer form here")
    pads = pad_amounts(op.node, shape)
    before = [first for first, _ in pads]
    grown = [first + size + last for size, (first, last) in zip(shape, pads, strict=True)]
    y, view = op.result(tuple(grown), order)
    op.emit(
        program.Pad(
            op.layer, op.read(0, order), y, permuted(shape, order), permuted(tuple(before), order),
            permuted(tuple(grown), order),
        )
    )  # fmt: skip
    return view


def take(op: Operation) -> View[Tensor]:
    """Slice with constant, forward steps."""
    return _cut(op, op.name, *slice_corners(op.node, op.shape(0)))


def split(op: Operation) -> list[View[Tensor]]:
    """Split: one slice per part."""
    corners = split_corners(op.node, op.shape(0))
    return [_cut(op, v.name or op.name, *part) for v, part in zip(op.node.outputs, corners, strict=True)]


def _cut(op: Operation, name: str, begin: Sequence[int], end: Sequence[int], step: Sequence[int]) -> View[Tensor]:
    order, shape = op.natural(0), op.shape(0)
    cut = tuple(len(range(b, e, s)) for b, e, s in zip(begin, end, step, strict=True))
    x = op.read(0, order)
    y = op.builder.tensor(name, permuted(cut, order), x.quant)
    op.emit(
        program.Slice(
            op.layer, x, y, permuted(shape, order), permuted(tuple(begin), order), permuted(tuple(step), order),
            permuted(cut, order),
        )
    )  # fmt: skip
    return layout.stored(y, cut, order)


def concat(op: Operation) -> View[Tensor]:
    """Concat; parts with another scale go through a table first."""
    shape, order = op.output_shape(), op.natural(0)
    axis = op.axis(op.attribute("axis"))
    parts = []
    for i in range(len(op.operands)):
        view = op.view(i)
        if view.tensor.quant != op.quant:
            view = op.builder.table(as_curve(view), op.quant, f"{view.tensor.name}_rescaled")
        parts.append(op.builder.read(view, order))
    y, result = op.result(shape, order)
    stored = permuted(shape, order)
    op.emit(program.Concat(op.layer, tuple(parts), y, elements(stored[: order.index(axis)])))
    return result


def resize(op: Operation) -> View[Tensor]:
    """Resize to the nearest element: which row and column each result reads is known now."""
    shape, out = op.shape(0), op.output_shape()
    mode, coordinate = op.attribute("mode", "nearest"), op.attribute("coordinate_transformation_mode", "half_pixel")
    if len(shape) != 4 or shape[:2] != out[:2]:
        raise Unsupported("only the height and width of images can be resized")
    if mode != "nearest" or coordinate not in COORDINATES:
        raise Unsupported(f"'{mode}' resizing with '{coordinate}' coordinates has no integer form here; use nearest")
    given = op.parameter(2)
    scales = [out[2] / shape[2], out[3] / shape[3]] if given is None or given.size == 0 else given[-2:].tolist()
    rounding = op.attribute("nearest_mode", "round_prefer_floor")
    rows, columns = (
        nearest_positions(size, made, scale, coordinate, rounding)
        for size, made, scale in zip(shape[2:], out[2:], scales, strict=True)
    )
    y, view = op.result(out, NHWC)
    op.emit(program.Resize(op.layer, op.read(0, NHWC), y, (shape[2], shape[3], shape[1]), rows, columns))
    return view
