"""Raw pixels in: graphs that take uint8 images ``[n, h, w, c]`` and do the scaling and normalising themselves.

The network was fed x = (p * scale - mean) / std = a * p + b, per channel. There are two ways to move that inside:

* a float front: Cast, (Transpose,) Mul, Add before the graph. Exact, for every network and every runtime, but the front
  runs in float;
* folded into the convolutions that read the image: W' = W * a on the integers p - z, where z = round(mean / scale) is
  one zero point for all channels, and the rest of the sum, W * (a * z + b), goes into the bias. Everything stays
  integer. Inside the image this is exact; at the border the padding stands for p = z where the network was trained with
  x = 0, that is p = mean of the channel, which is up to half the difference of the channels' means away.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from deploykit.core.data import Preprocess
from deploykit.core.target import QuantSpec
from deploykit.hub.graph import FloatGraph, Hub, add_initializer, attribute, constant, drop_unused, fresh_name
from deploykit.hub.quantize import dequantize_constant, round_bias, round_weight, weight_scale

if TYPE_CHECKING:
    from numpy.typing import NDArray

PIXEL = ir.DataType.UINT8
LARGEST = 255


@dataclass(frozen=True)
class Affine:
    """x = a * p + b per channel, ``[c]`` float64 each."""

    a: NDArray[np.float64]
    b: NDArray[np.float64]

    @property
    def zero(self) -> int:
        """The pixel value next to x = 0, over all channels."""
        return int(np.clip(np.rint((-self.b / self.a).mean()), 0, LARGEST))


@dataclass(frozen=True)
class Folded:
    """A convolution's weight ``[o, i, ...]`` and bias ``[o]`` (float64) after folding, for the integers p - z."""

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]


def affine(p: Preprocess) -> Affine:
    """What a declared preprocessing does to a pixel value."""
    mean = np.broadcast_to(np.asarray(p.mean or (0.0,), np.float64), (p.depth,))
    std = np.broadcast_to(np.asarray(p.std or (1.0,), np.float64), (p.depth,))
    return Affine(p.scale / std, -mean / std)


@dataclass(frozen=True)
class Fed:
    """What takes pixels."""

    hub: Hub
    notes: tuple[str, ...] = ()
    """What the user should know, one sentence each."""
    folded: tuple[str, ...] = ()
    """Inputs that convolutions read as the integers they are."""


def take_pixels(hub: Hub, p: Preprocess, inputs: Sequence[str], fold: bool) -> Fed:
    """The hub with uint8 images ``[n, h, w, c]`` as inputs; the float graph gets a float front.

    Args:
        hub: not changed.
        p: the preprocessing that moves inside (scale, mean, std, layout).
        inputs: which inputs are images.
        fold: into the convolutions of the quantized graph where that is possible.
    """
    graph = FloatGraph(_with_fronts(hub.graph.copy(), p, inputs), hub.graph.masks, hub.graph.notes)
    if hub.quantized is None:
        return Fed(replace(hub, graph=graph))
    quantized = hub.quantized.clone()
    notes, folded = [], []
    for name in inputs:
        why = _fold_integers(quantized.graph, name, p, hub.spec) if fold else ""
        if fold and not why:
            folded.append(name)
        else:
            _front(quantized.graph, name, p)
        if why:
            notes.append(f"input '{name}': the image is scaled and normalised in float, because {why}")
    return Fed(replace(hub, graph=graph, quantized=quantized), tuple(notes), tuple(folded))


def folded_floats(graph: FloatGraph, p: Preprocess, inputs: Sequence[str], folded_in: Collection[str]) -> FloatGraph:
    """The float graph with the preprocessing folded as in the integer graph, to measure what that costs by itself.

    Args:
        graph: not changed.
        p: the preprocessing that moves inside.
        inputs: which inputs are images.
        folded_in: those of them whose preprocessing `take_pixels` folded.
    """
    model = graph.copy()
    how = affine(p)
    for name in inputs:
        if name not in folded_in:
            _front(model.graph, name, p)
            continue
        for node in [node for node, _ in _input(model.graph, name).uses()]:
            weight, bias = constant(node.inputs[1]), _bias(node)
            assert weight is not None
            folded = fold(weight, bias, attribute(node, "group", 1), how)
            _replace_weights(model.graph, node, folded.weight.astype(np.float32), folded.bias.astype(np.float32))
        _front(model.graph, name, p, Affine(np.ones(p.depth), np.full(p.depth, -float(how.zero))))
    drop_unused(model.graph)
    return FloatGraph(model)


def fold(weight: NDArray[Any], bias: NDArray[Any], group: int, how: Affine) -> Folded:
    """The convolution that computes on p - z what the given one computes on x = a * p + b, but for the padding.

    Args:
        weight: ``[o, i/group, ...]``.
        bias: ``[o]``.
        group: of the convolution.
        how: ``a`` and ``b`` per input channel.
    """
    o, i = weight.shape[:2]
    channel = (np.arange(o) // (o // group))[:, None] * i + np.arange(i)[None, :]  # [o, i/group]: which one it reads
    a, b = how.a[channel], how.b[channel]
    wide = weight.astype(np.float64)
    sums = wide.reshape(o, i, -1).sum(axis=2)
    shape = (o, i) + (1,) * (weight.ndim - 2)
    return Folded(wide * a.reshape(shape), bias + (sums * (a * how.zero + b)).sum(axis=1))


def _with_fronts(model: ir.Model, p: Preprocess, inputs: Sequence[str]) -> ir.Model:
    for name in inputs:
        _front(model.graph, name, p)
    return model


def _input(graph: ir.Graph, name: str) -> ir.Value:
    (found,) = [v for v in graph.inputs if v.name == name]
    return found


def _take_over(graph: ir.Graph, name: str, p: Preprocess) -> tuple[ir.Value, ir.Value]:
    """Puts a uint8 input ``[n, h, w, c]`` in the place of a float one; returns both."""
    old = _input(graph, name)
    assert old.shape is not None
    n, *sides = old.shape
    shape = [n, *sides] if p.layout == "NHWC" else [n, *sides[1:], sides[0]]
    old.name = fresh_name(graph, f"{name}_normalised")
    pixels = ir.Value(name=name, type=ir.TensorType(PIXEL), shape=ir.Shape(shape))
    graph.inputs[list(graph.inputs).index(old)] = pixels
    return pixels, old


def _front(graph: ir.Graph, name: str, p: Preprocess, how: Affine | None = None) -> None:
    """Cast, (Transpose,) Mul and Add between the pixels and whoever read the float input."""
    how = how or affine(p)
    pixels, old = _take_over(graph, name, p)
    assert pixels.shape is not None
    cast = _node(graph, "Cast", [pixels], f"{name}_float", pixels.shape, [ir.AttrInt64("to", int(ir.DataType.FLOAT))])
    nodes = [cast]
    if p.layout == "NCHW":
        nodes.append(_channels_first(graph, cast.outputs[0], f"{name}_channels_first", old.shape))
    sides = (p.depth, 1, 1) if p.layout == "NCHW" else (p.depth,)
    for operator, factor in (("Mul", how.a), ("Add", how.b)):
        held = add_initializer(graph, f"{name}.{operator.lower()}", factor.astype(np.float32).reshape(sides))
        nodes.append(_node(graph, operator, [nodes[-1].outputs[0], held], f"{name}_{operator.lower()}", old.shape))
    _read_instead(graph, old, nodes[-1].outputs[0])
    graph.insert_before(graph[0], nodes)


def _fold_integers(graph: ir.Graph, name: str, p: Preprocess, spec: QuantSpec) -> str:
    """Feeds the pixels, as the integers they are, to the convolutions; returns why that is not possible, if so."""
    old = _input(graph, name)
    if spec.ports.activation_range != (0, LARGEST) or spec.activation_symmetric or spec.scale != "float":
        return "this target's activations cannot hold a pixel value with a zero point of its own"
    quantizers = [node for node, _ in old.uses()]
    if len(quantizers) != 1 or quantizers[0].op_type != "QuantizeLinear":
        return "it is read by more than one operator, or in float"
    dequantizers = [node for node, _ in quantizers[0].outputs[0].uses()]
    readers = [(node, i) for dq in dequantizers for node, i in dq.outputs[0].uses()]
    if not readers or any(node.op_type != "Conv" or i != 0 for node, i in readers):
        return "not every operator that reads it is a convolution"
    how = affine(p)
    zero = np.asarray(how.zero, np.uint8)
    parts = []
    for node, _ in readers:
        weight, source = _dequantized(node.inputs[1]), node.inputs[1].producer() if node.inputs[1] is not None else None
        if weight is None or source is None:
            return "a convolution that reads it has no integer weights"
        parts.append((node, fold(weight, _bias(node), attribute(node, "group", 1), how)))
    # what was rounded once, to few bits, would suffer from being rounded to as few again
    spec = replace(spec, weight_bits=max(spec.weight_bits, 7))
    for node, folded in parts:
        w, b = folded.weight.astype(np.float32), folded.bias.astype(np.float32)
        scale = weight_scale(w, 0, spec, b, 1.0)
        names = f"{node.name}.weight_pixels", f"{node.name}.bias_pixels"
        stored = dequantize_constant(graph, node, names[0], round_weight(w, scale, 0, spec), scale, 0)
        biases = dequantize_constant(graph, node, names[1], round_bias(b, scale), scale, 0)
        _replace_inputs(node, stored, biases)
    pixels, _ = _take_over(graph, name, p)
    nodes: list[ir.Node] = []
    if p.layout == "NCHW":
        nodes.append(_channels_first(graph, pixels, f"{name}_channels_first", old.shape))
    integers = nodes[-1].outputs[0] if nodes else pixels
    parameters = [
        add_initializer(graph, f"{name}_pixel_scale", np.asarray(1.0, np.float32)),
        add_initializer(graph, f"{name}_pixel_zero", zero),
    ]
    dq = _node(graph, "DequantizeLinear", [integers, *parameters], f"{name}_pixels_dq", old.shape)
    dq.outputs[0].dtype = ir.DataType.FLOAT
    for node, position in readers:
        node.replace_input_with(position, dq.outputs[0])
    graph.insert_before(graph[0], [*nodes, dq])
    drop_unused(graph)
    return ""


def _channels_first(graph: ir.Graph, value: ir.Value, name: str, shape: ir.Shape | None) -> ir.Node:
    return _node(graph, "Transpose", [value], name, shape, [ir.AttrInt64s("perm", [0, 3, 1, 2])])


def _node(
    graph: ir.Graph,
    operator: str,
    inputs: list[ir.Value],
    name: str,
    shape: ir.Shape | None,
    attributes: Sequence[ir.Attr] = (),
) -> ir.Node:
    unique = fresh_name(graph, name)
    dtype = inputs[0].dtype if operator == "Transpose" else ir.DataType.FLOAT
    output = ir.Value(name=unique, type=ir.TensorType(dtype or ir.DataType.FLOAT), shape=shape)
    return ir.Node("", operator, inputs, attributes, outputs=[output], name=unique)


def _read_instead(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    for node, position in list(old.uses()):
        node.replace_input_with(position, new)
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new


def _bias(node: ir.Node) -> NDArray[np.float64]:
    """A convolution's bias as floats, zeros where it has none."""
    weight = _dequantized(node.inputs[1])
    assert weight is not None
    found = _dequantized(node.inputs[2]) if len(node.inputs) > 2 else None
    return np.zeros(len(weight)) if found is None else found.astype(np.float64)


def _dequantized(value: ir.Value | None) -> NDArray[Any] | None:
    """The numbers behind a constant, or behind the DequantizeLinear (axis 0) of one."""
    if value is None:
        return None
    dq = value.producer()
    if dq is None:
        return constant(value)
    held, scale = constant(dq.inputs[0]), constant(dq.inputs[1])
    if dq.op_type != "DequantizeLinear" or held is None or scale is None:
        return None
    return held.astype(np.float64) * scale.astype(np.float64).reshape([-1] + [1] * (held.ndim - 1))


def _replace_weights(graph: ir.Graph, node: ir.Node, weight: NDArray[Any], bias: NDArray[Any]) -> None:
    _replace_inputs(
        node,
        add_initializer(graph, f"{node.name}.weight_pixels", weight),
        add_initializer(graph, f"{node.name}.bias_pixels", bias),
    )


def _replace_inputs(node: ir.Node, weight: ir.Value, bias: ir.Value) -> None:
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(1, weight)
    node.replace_input_with(2, bias)
