"""Operators that slide a window over an image: convolutions and pools. Images are read and written channels-last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from deploykit.exporters import layout
from deploykit.exporters.layout import NHWC, View
from deploykit.exporters.one_sample import Unsupported
from deploykit.exporters.tflite.moving import cropped, padded
from deploykit.exporters.tflite.operation import Constant, Operation
from deploykit.exporters.tflite.windows import Pads, same_padding, used_padding
from deploykit.exporters.tflite.writer import Quant, Tensor
from deploykit.hub.graph import attribute


def over_time(write: Callable[[Operation], View]) -> Callable[[Operation], View]:
    """A rule for images that also takes series: they are images of height 1."""

    def rule(op: Operation) -> View:
        if len(op.shape(0)) != 3:
            return write(op)
        found = layout.reshape(write(_as_image(op)), op.output_shape())
        assert found is not None
        return found

    return rule


def _as_image(op: Operation) -> Operation:
    """The same operator on [n, c, 1, t], with windows of height 1."""
    operands: list[View | Constant | None] = []
    for operand in op.operands:
        if isinstance(operand, View):
            operands.append(layout.reshape(operand, (*operand.shape[:2], 1, *operand.shape[2:])))
        elif operand is not None and operand.values.ndim == 3:
            operands.append(replace(operand, values=operand.values[:, :, None]))
        else:
            operands.append(operand)
    node = op.node
    filled = {"kernel_shape": [1], "strides": [1], "dilations": [1], "output_padding": [0]}
    attributes = [a for a in node.attributes.values() if a.name not in (*filled, "pads")]
    attributes += [
        ir.AttrInt64s(name, [*first, *attribute(node, name)])
        for name, first in filled.items()
        if name in node.attributes
    ]
    if "pads" in node.attributes:
        before, behind = attribute(node, "pads")
        attributes.append(ir.AttrInt64s("pads", [0, before, 0, behind]))
    inputs = [None if v is None else ir.Value(name=v.name, shape=v.shape) for v in node.inputs]
    n, c, t = op.output_shape()
    outputs = [ir.Value(name=node.outputs[0].name, shape=ir.Shape([n, c, 1, t]))]
    image = ir.Node("", node.op_type, inputs, attributes, outputs=outputs, name=node.name)
    return replace(op, node=image, operands=tuple(operands))


@over_time
def convolution(op: Operation) -> View:
    """CONV_2D, grouped or not, or DEPTHWISE_CONV_2D where every input channel has filters of its own."""
    weights = op.shape(1)  # [out, in / group, h, w]
    _require_image(op)
    dilations = op.attribute("dilations", [1, 1])
    x, padding = windowed(op, weights[2:], dilations)
    strides = op.attribute("strides", [1, 1])
    options: dict[str, Any] = {
        "padding": padding, "strideH": strides[0], "strideW": strides[1],
        "dilationHFactor": dilations[0], "dilationWFactor": dilations[1],
    }  # fmt: skip
    channels, group = op.shape(0)[1], op.attribute("group", 1)
    if group == channels > 1:
        kind, axis = "DEPTHWISE_CONV_2D", 3
        filters = op.constant(1, lambda w: w.transpose(1, 2, 3, 0), axis, narrow=True)
        options["depthMultiplier"] = weights[0] // group
    else:
        kind, axis = "CONV_2D", 0
        filters = op.constant(1, lambda w: w.transpose(0, 2, 3, 1), axis, narrow=True)
    return op.emit(kind, [x, filters, bias(op, filters, weights[0])], op.output_shape(), NHWC, fuses=True, **options)


@over_time
def transposed_convolution(op: Operation) -> View:
    """TRANSPOSE_CONV. Where ONNX's padding is not SAME, the whole result is computed and its border cut off."""
    weights = op.shape(1)  # [in, out, h, w]
    _require_image(op)
    if op.attribute("group", 1) != 1:
        raise Unsupported("LiteRT has no grouped transposed convolution; use resize and convolution")
    if any(d != 1 for d in op.attribute("dilations", [1, 1])):
        raise Unsupported("LiteRT has no dilated transposed convolution")
    strides, begins = op.attribute("strides", [1, 1]), _pads(op)[:2]
    sizes, outs, kernel = op.shape(0)[2:], op.output_shape()[2:], weights[2:]
    full = [(i - 1) * s + k for i, s, k in zip(sizes, strides, kernel, strict=True)]
    axes = list(zip(sizes, outs, full, begins, strides, strict=True))
    same = all(-(-o // s) == i and f >= o and b == (f - o) // 2 for i, o, f, b, s in axes)
    made = list(outs) if same else [max(f, b + o) for _, o, f, b, _ in axes]
    filters = op.constant(1, lambda w: w.transpose(1, 2, 3, 0))
    inputs = [
        op.writer.indices(f"{op.name}_size", [1, *made, weights[1]]), filters, op.read(0, NHWC),
        bias(op, filters, weights[1]),
    ]  # fmt: skip
    padding = "SAME" if same else "VALID"
    result = op.emit(
        "TRANSPOSE_CONV", inputs, (1, weights[1], *made), NHWC, padding=padding, strideH=strides[0], strideW=strides[1]
    )  # fmt: skip
    if made == list(outs):
        return result
    return cropped(op, result, (0, 0, *begins), (1, weights[1], *(b + o for b, o in zip(begins, outs, strict=True))))


@over_time
def max_pool(op: Operation) -> View:
    """MAX_POOL_2D; padding never wins."""
    _require_image(op)
    if any(d != 1 for d in op.attribute("dilations", [1, 1])):
        raise Unsupported("LiteRT has no dilated max pool")
    if len(op.node.outputs) > 1 and list(op.node.outputs[1].uses()):
        raise Unsupported("the positions of the maxima are not available")
    x, padding = windowed(op, op.attribute("kernel_shape"), [1, 1], fill=-np.inf)
    return _pool(op, "MAX_POOL_2D", x, padding)


@over_time
def average_pool(op: Operation) -> View:
    """AVERAGE_POOL_2D: its SAME leaves padding out of the mean; zeros written by PAD count."""
    _require_image(op)
    if op.view(0).tensor.quant != op.quant:
        raise Unsupported(
            "LiteRT's average pool has one scale for input and output; add 'AveragePool' to the target's shared_scale"
        )
    kernel, counted = op.attribute("kernel_shape"), op.attribute("count_include_pad", 0)
    if any(d != 1 for d in op.attribute("dilations", [1, 1])):
        raise Unsupported("LiteRT has no dilated average pool")
    padding, pads = window_padding(op, kernel, [1, 1])
    declared = zip(_pads(op)[2:], pads, strict=True)
    if counted and any(end > asked for asked, (_, end) in declared):
        raise Unsupported("its last window reaches beyond the padding (ceil_mode); choose sizes that divide")
    if padding == "EXPLICIT" and not counted:
        raise Unsupported("it leaves uneven padding out of the mean; use count_include_pad=True")
    return _pool(op, "AVERAGE_POOL_2D", *windowed(op, kernel, [1, 1], explicit=bool(counted)))


def windowed(
    op: Operation, kernel: Sequence[int], dilations: Sequence[int], fill: float = 0.0, explicit: bool = False
) -> tuple[Tensor, str]:
    """The image to slide over, padded where LiteRT cannot do it on the way, and the padding that is left to LiteRT.

    Args:
        op: its operand 0 is the image; ``pads`` and ``strides`` are its attributes.
        kernel: [h, w].
        dilations: [h, w].
        fill: the padding's value.
        explicit: write all padding out.

    Returns:
        The tensor, channels-last, and ``"VALID"`` or ``"SAME"``.
    """
    x = op.read(0, NHWC)
    padding, pads = window_padding(op, kernel, dilations)
    if padding == "VALID" or (padding == "SAME" and not explicit):
        return x, padding
    return padded(op, x, [(0, 0), *pads, (0, 0)], fill), "VALID"


def window_padding(op: Operation, kernel: Sequence[int], dilations: Sequence[int]) -> tuple[str, Pads]:
    """How LiteRT can pad for the windows: ``VALID`` (not at all), ``SAME`` (its own way) or ``EXPLICIT``; how much."""
    sizes, outs, strides = op.shape(0)[2:], op.output_shape()[2:], op.attribute("strides", [1, 1])
    pads = used_padding(sizes, outs, kernel, strides, dilations, _pads(op)[:2])
    if all(pad == (0, 0) for pad in pads):
        return "VALID", pads
    same = [same_padding(*axis) for axis in zip(sizes, outs, kernel, strides, dilations, strict=True)]
    return ("SAME" if pads == same else "EXPLICIT"), pads


def bias(op: Operation, filters: Tensor, channels: int) -> Tensor:
    """The bias, in steps of s_x * s_w where the operator is integer (int32; int64 where activations have 16 bits);
    zeros where there is none."""
    wide = np.int64 if op.quant is not None and op.quant.dtype == "int16" else None
    if len(op.operands) > 2 and op.operands[2] is not None:
        return op.constant(2, lambda b: np.broadcast_to(b.reshape(-1), (channels,)).astype(wide or b.dtype))
    if op.quant is None:
        return op.float_constant(f"{op.name}_bias", np.zeros(channels, np.float32))
    source = op.view(0).tensor.quant
    assert source is not None and filters.quant is not None
    scales = np.float32(source.scales[0]) * np.array(filters.quant.scales, np.float32)
    zeros = np.zeros(channels, wide or np.int32)
    return op.writer.constant(f"{op.name}_bias", zeros, Quant(tuple(scales.tolist())))


def _pool(op: Operation, kind: str, x: Tensor, padding: str) -> View:
    kernel, strides = op.attribute("kernel_shape"), op.attribute("strides", [1, 1])
    return op.emit(
        kind, [x], op.output_shape(), NHWC, fuses=True, padding=padding,
        strideH=strides[0], strideW=strides[1], filterHeight=kernel[0], filterWidth=kernel[1],
    )  # fmt: skip


def _pads(op: Operation) -> list[int]:
    """[top, left, bottom, right]"""
    if op.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise Unsupported("auto_pad is out of use in ONNX; export the model with explicit pads")
    pads: list[int] = op.attribute("pads", [0, 0, 0, 0])
    return pads


def _require_image(op: Operation) -> None:
    if len(op.shape(0)) != 4:
        raise Unsupported(f"it has {len(op.shape(0)) - 2} spatial axes; LiteRT's is for images with 2")
