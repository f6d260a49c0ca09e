"""Says the same in ONNX in a way that OpenVINO gets right, or reads into a smaller graph."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploykit.hub.graph import add_initializer, attribute, constant, drop_unused, fresh_name

if TYPE_CHECKING:
    from numpy.typing import NDArray


def rewrite(model: ir.Model) -> ir.Model:
    """A changed copy."""
    copy = model.clone()
    _fold_biases(copy.graph)
    _count_padding(copy.graph)
    drop_unused(copy.graph)
    return copy


def _fold_biases(graph: ir.Graph) -> None:
    """int32 biases become the floats they stand for: OpenVINO adds biases in float, so it needs four operators less."""
    for node in list(graph):
        if node.op_type != "DequantizeLinear":
            continue
        integers, scale = constant(node.inputs[0]), constant(node.inputs[1])
        if integers is None or scale is None or integers.dtype != np.int32:
            continue
        bias = add_initializer(graph, f"{node.outputs[0].name}_float", integers.astype(np.float32) * scale)
        for user, position in list(node.outputs[0].uses()):
            user.replace_input_with(position, bias)


def _count_padding(graph: ir.Graph) -> None:
    """Integer average pools that count their padding become pools that do not, times the share of each window that is
    no padding: the CPU plugin (2026.4) pads with the integer 0, whatever number the zero point makes of that, and
    pulls a Pad in front into the pool."""
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "AveragePool" else None
        if source is None or not attribute(node, "count_include_pad", 0) or not any(attribute(node, "pads", [])):
            continue
        behind = source.producer()
        if behind is None or behind.op_type != "DequantizeLinear" or source.shape is None:
            continue
        sides = [d for d in source.shape[2:] if isinstance(d, int)]
        share = np.ones(1, np.float32)
        for axis, side in enumerate(sides):
            share = np.multiply.outer(share, _share(node, axis, len(sides), side))
        node.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 0)
        output = node.outputs[0]
        name = fresh_name(graph, f"{node.name}.share")
        held = add_initializer(graph, name, share[None].astype(np.float32))
        times = ir.Node("", "Mul", [output, held], name=f"{name}.mul")
        times.outputs[0].name, times.outputs[0].dtype, times.outputs[0].shape = times.name, output.dtype, output.shape
        graph.insert_after(node, [times])
        for user, position in list(output.uses()):
            if user is not times:
                user.replace_input_with(position, times.outputs[0])


def _share(node: ir.Node, axis: int, rank: int, side: int) -> NDArray[np.float64]:
    """Along one axis: how much of each window lies on the image, of what lies on it or on its padding."""
    kernel = attribute(node, "kernel_shape")[axis]
    stride = attribute(node, "strides", [1] * rank)[axis]
    dilation = attribute(node, "dilations", [1] * rank)[axis]
    pads = attribute(node, "pads")
    before, after = pads[axis], pads[axis + rank]
    reach = before + side + after - dilation * (kernel - 1) - 1
    count = (math.ceil if attribute(node, "ceil_mode", 0) else math.floor)(reach / stride) + 1
    if attribute(node, "ceil_mode", 0) and (count - 1) * stride >= before + side:
        count -= 1  # no window starts in the padding behind
    at = np.arange(count)[:, None] * stride + dilation * np.arange(kernel) - before
    inside, counted = (at >= 0) & (at < side), at < side + after
    share: NDArray[np.float64] = inside.sum(1) / counted.sum(1)
    return share
