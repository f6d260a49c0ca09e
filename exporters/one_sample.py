"""An ONNX operator read for a file that holds one sample: what is computed elsewhere has to be a constant here.

The .tflite and the C exporter write fixed shapes with batch 1; this is what both have to know about a node.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import inf
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from deploykit.hub.graph import attribute, constant

if TYPE_CHECKING:
    from numpy.typing import NDArray

Shape = tuple[int, ...]
Limits = tuple[float, float]
"""Smallest and largest value that a Relu or Clip lets through."""
Corners = tuple[list[int], list[int], list[int]]
"""Begin, end and step of a part of a tensor, per axis."""


class Unsupported(Exception):
    """This operator cannot be written: why, and what would help."""


def static_shape(value: ir.Value) -> Shape:
    """A value's shape with batch 1.

    Raises:
        Unsupported: another dimension is free, or the shape is not known.
    """
    if value.shape is None:
        raise Unsupported(f"the shape of '{value.name}' is not known")
    batch = _batch(value)
    for i, size in enumerate(value.shape):
        if not isinstance(size, int) and i > 0 and _times(size, batch) is None:
            raise Unsupported(
                f"dimension {i} of '{value.name}' is free ({size}), and shapes are fixed here but for the batch; "
                "export the model with a fixed size"
            )
        if size == 0:
            raise Unsupported(f"'{value.name}' has no elements")
    return tuple(size if isinstance(size, int) else _times(size, batch) or 1 for size in value.shape)


def parameter(node: ir.Node, index: int) -> NDArray[Any] | None:
    """The constant behind an input that is a shape, axes, limits; None where it is left out.

    Raises:
        Unsupported: it is computed while the model runs.
    """
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return None
    found = constant(value)
    if found is None:
        raise Unsupported(f"its input {index} is computed at run time; it has to be a constant")
    return found


def counted_axis(node: ir.Node, axis: int, rank: int) -> int:
    """An axis of input 0 ``[rank]``, counted from the front.

    Raises:
        Unsupported: it is the batch, of which there is one sample.
    """
    value = node.inputs[0]
    if value is not None and value.shape is not None and not isinstance(value.shape[axis % rank], int):
        raise Unsupported("it works across the batch, and the file holds one sample")
    return axis % rank


def limits_of(node: ir.Node) -> Limits | None:
    """What a Relu or Clip lets through; None where the limits are computed at run time."""
    if node.op_type == "Relu":
        return 0.0, inf
    limits = [-inf, inf]
    for i, value in enumerate(node.inputs[1:3]):
        if value is not None:
            found = constant(value)
            if found is None:
                return None
            limits[i] = float(found.item())
    return limits[0], limits[1]


def tail(node: ir.Node) -> tuple[ir.Node | None, Limits | None]:
    """The Relu or Clip (with constant limits) that alone reads a node's only result, and its limits."""
    readers = [user for user, _ in node.outputs[0].uses()]
    if len(readers) != 1 or readers[0].op_type not in ("Relu", "Clip") or node.outputs[0].is_graph_output():
        return None, None
    limits = limits_of(readers[0])
    return (readers[0], limits) if limits is not None else (None, None)


def slice_corners(node: ir.Node, shape: Shape) -> Corners:
    """What a Slice with constant, forward steps takes out of ``shape``.

    Raises:
        Unsupported: it counts backwards, or its corners are computed while the model runs.
    """
    starts, ends, axes, steps = (parameter(node, i) for i in range(1, 5))
    assert starts is not None and ends is not None
    begin, end, step = [0] * len(shape), list(shape), [1] * len(shape)
    for i, start in enumerate(starts):
        axis = counted_axis(node, i if axes is None else int(axes[i]), len(shape))
        begin[axis], end[axis], step[axis] = slice(
            int(start), int(ends[i]), int(steps[i]) if steps is not None else 1
        ).indices(shape[axis])
        if step[axis] < 0:
            raise Unsupported("it counts backwards")
    return begin, end, step


def split_corners(node: ir.Node, shape: Shape) -> Iterator[Corners]:
    """What each output of a Split takes out of ``shape``."""
    axis, start = counted_axis(node, attribute(node, "axis", 0), len(shape)), 0
    for output in node.outputs:
        begin, end = [0] * len(shape), list(shape)
        begin[axis], end[axis] = start, start + static_shape(output)[axis]
        yield begin, end, [1] * len(shape)
        start = end[axis]


def pad_amounts(node: ir.Node, shape: Shape) -> list[tuple[int, int]]:
    """What a Pad adds before and behind each axis of ``shape``.

    Raises:
        Unsupported: it cuts, or its amounts are computed while the model runs.
    """
    amounts, axes = parameter(node, 1), parameter(node, 3)
    assert amounts is not None
    pads = [(0, 0)] * len(shape)
    for i, axis in enumerate(range(len(shape)) if axes is None else axes.tolist()):
        pads[axis % len(shape)] = (int(amounts[i]), int(amounts[i + len(amounts) // 2]))
    if any(min(p) < 0 for p in pads):
        raise Unsupported("it cuts (negative padding); use slicing")
    return pads


def _times(size: object, batch: str) -> int | None:
    """How often the batch goes into a free dimension: 1 for ``"batch"``, 2 for ``"2*batch"``."""
    found = re.fullmatch(rf"(?:(\d+)\*)?{re.escape(batch)}", str(size)) if batch else None
    return int(found[1] or 1) if found else None


def _batch(value: ir.Value) -> str:
    """What the graph calls its free batch dimension; sequences have it on their second axis inside a network."""
    producer = value.producer()
    graph = producer.graph if producer is not None else value.graph
    inputs = [] if graph is None else [v.shape for v in graph.inputs]
    return next((str(s[0]) for s in inputs if s is not None and len(s) > 0 and not isinstance(s[0], int)), "")
