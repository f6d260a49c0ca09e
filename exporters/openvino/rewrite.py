"""Says the same in ONNX in a way that OpenVINO gets right, or reads into a smaller graph."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploykit.core.errors import DeploykitError
from deploykit.exporters.one_sample import pad_amounts
from deploykit.hub.graph import add_initializer, attribute, constant, drop_unused, fresh_name

if TYPE_CHECKING:
    from numpy.typing import NDArray


MOVERS = ("Concat", "Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")


def rewrite(model: ir.Model) -> ir.Model:
    """A changed copy."""
    copy = model.clone()
    _fold_biases(copy.graph)
    _count_padding(copy.graph)
    _refuse_padded_channel(copy.graph)
    _clip_floats(copy.graph)
    _quantize_once(copy.graph)  # last: it takes away pairs by which the two above know that integers are read
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


def _quantize_once(graph: ir.Graph) -> None:
    """Values that are only moved are not quantized again to the scale they have: it changes nothing, but around each
    such pair the CPU plugin computes in float."""
    grids: dict[ir.Value | None, tuple[float, int]] = {}
    for node in list(graph):
        if node.op_type == "DequantizeLinear" and (grid := _grid(node)) is not None:
            grids[node.outputs[0]] = grid
        moved = node.inputs if node.op_type == "Concat" else node.inputs[:1]
        if node.op_type in MOVERS and all(value in grids for value in moved) and len({grids[v] for v in moved}) == 1:
            grids |= {output: grids[moved[0]] for output in node.outputs}
        if node.op_type != "QuantizeLinear" or grids.get(node.inputs[0], ()) != _grid(node):
            continue
        for dequantizer, _ in list(node.outputs[0].uses()):
            if dequantizer.outputs[0].is_graph_output():
                continue
            for user, position in list(dequantizer.outputs[0].uses()):
                user.replace_input_with(position, node.inputs[0])


def _grid(node: ir.Node) -> tuple[float, int] | None:
    """Scale and zero point of a QuantizeLinear or DequantizeLinear of a whole tensor."""
    scale, zero = (constant(value) for value in [*node.inputs, None][1:3])
    return None if scale is None or scale.ndim or zero is None else (float(scale), int(zero))


def _count_padding(graph: ir.Graph) -> None:
    """Integer average pools that count their padding become pools that do not, times the share of each window that is
    no padding: the CPU plugin (2026.4) pads with the integer 0, whatever number the zero point makes of that, and
    pulls a Pad in front into the pool."""
    for node in list(graph):
        if node.op_type != "AveragePool" or not any(attribute(node, "pads", [])) or not _reads_integers(node):
            continue
        if not attribute(node, "count_include_pad", 0):
            continue
        sides = _shape(node)[2:]
        if not all(sides):
            raise _wrong(node, "its padding is counted and the size of the image is free")
        share = np.ones(1)
        for axis, side in enumerate(sides):
            share = np.multiply.outer(share, _share(node, axis, len(sides), side))
        node.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 0)
        output = node.outputs[0]
        readers = list(output.uses())
        times = _behind(graph, node, "Mul", output, share[None].astype(np.float32), f"{node.name}.share")
        for user, position in readers:
            user.replace_input_with(position, times)


def _refuse_padded_channel(graph: ir.Graph) -> None:
    """The CPU plugin (2026.4) pads a single channel with the integer 0, whatever its zero point is."""
    for node in graph:
        if node.op_type != "Pad" or not _reads_integers(node) or _shape(node)[1:2] != [1]:
            continue
        if any(pad_amounts(node, tuple(_shape(node)))[1]):
            raise _wrong(node, "it adds channels to a single one")


def _clip_floats(graph: ir.Graph) -> None:
    """A Clip of quantized values becomes Max and Min: of a Clip the CPU plugin (2026.4) rounds the limits to the steps
    of what it reads, which are coarser than those of the result.

    The limits are spread over an axis, so that the frontend does not put the two together again.
    """
    for node in list(graph):
        if node.op_type != "Clip" or not _reads_integers(node) or node.outputs[0].is_graph_output():
            continue
        shape = _shape(node)
        wide = [axis for axis, side in enumerate(shape) if side > 1]
        if not wide:
            raise _wrong(node, "it has no axis of a fixed length")
        spread = np.ones([shape[wide[-1]]] + [1] * (len(shape) - 1 - wide[-1]), np.float32)
        (value, *limits) = node.inputs
        readers = list(node.outputs[0].uses())
        for operator, given in zip(("Max", "Min"), limits, strict=False):
            limit = constant(given)
            if limit is not None:
                assert value is not None
                value = _behind(graph, node, operator, value, limit * spread, f"{node.name}.{operator.lower()}")
        for user, position in readers:
            user.replace_input_with(position, value)


def _reads_integers(node: ir.Node) -> bool:
    behind = node.inputs[0].producer() if node.inputs[0] is not None else None
    return behind is not None and behind.op_type == "DequantizeLinear"


def _shape(node: ir.Node) -> list[int]:
    """Of what a node reads; 0 where it is free."""
    value = node.inputs[0]
    assert value is not None
    return [d if isinstance(d, int) else 0 for d in value.shape or ()]


def _wrong(node: ir.Node, why: str) -> DeploykitError:
    return DeploykitError(
        f"OpenVINO computes {node.op_type} '{node.name}' wrong in int8, and it cannot be written otherwise because "
        f"{why}. Keep it in float: --keep-float {node.name}"
    )


def _behind(
    graph: ir.Graph, node: ir.Node, operator: str, value: ir.Value, operand: NDArray[np.float32], name: str
) -> ir.Value:
    """``operator(value, operand)``, behind whatever computes the value; with the name of the node it is there for, by
    which it is found among the kernels."""
    held = add_initializer(graph, f"{name}.operand", operand)
    output = ir.Value(name=fresh_name(graph, name), type=value.type, shape=node.outputs[0].shape)
    made = ir.Node("", operator, [value, held], outputs=[output], name=node.name)
    producer = value.producer()
    assert producer is not None
    graph.insert_after(producer, [made])
    return output


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
