"""Float graph + ranges + QuantSpec -> hub: decides what becomes integer, sets scales once, inserts Q/DQ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from deploykit.calibration.thresholds import threshold
from deploykit.core.errors import DeploykitError, unknown
from deploykit.core.ranges import Ranges, Stats
from deploykit.core.target import QuantSpec
from deploykit.hub.graph import Decision, FloatGraph, Hub, add_initializer, attribute, constant, drop_unused, fresh_name
from deploykit.hub.operators import (
    FIXED_OUTPUT,
    channel_axis,
    data_inputs,
    fused_activation,
    has_constant_limits,
    is_float,
    role,
    weight_axis,
    why_float,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

BIAS_LIMIT = 2.0**29
"""Largest |bias| in int32 steps: leaves two bits for the sum of products. A channel with weights near zero would
otherwise get a scale so small that its bias saturates and the integer accumulator wraps."""


def observed(graph: FloatGraph) -> tuple[list[str], dict[str, int]]:
    """The tensors whose ranges any QuantSpec may ask for, and the channel axis of those whose means are needed.

    The same for every spec, so one calibration serves all targets. What an activation is fused with has no range of
    its own.
    """
    names: dict[str, None] = {}
    channels: dict[str, int] = {}
    for node in graph.model.graph:
        if role(node) == "float" or not is_float(node.outputs[0]):
            continue
        output = node.outputs[0]
        read = [node.inputs[i] for i in data_inputs(node)]
        for value in [*read, *node.outputs]:
            fused = value is not None and (producer := value.producer()) is not None and fused_activation(producer)
            if value is not None and is_float(value) and constant(value) is None and not fused:
                names[_name(value)] = None
        if role(node) == "linear":
            rank = len(output.shape) if output.shape is not None else 2
            channels[_name(output)] = channel_axis(node.op_type, rank)
    return list(names), channels


@dataclass(frozen=True)
class QParams:
    """scale (float32) and zero point of one activation: real = scale * (integer - zero_point)."""

    scale: NDArray[np.float32]
    zero_point: NDArray[Any]


@dataclass(frozen=True)
class Plan:
    """What will be integer: computed from the graph and the spec alone."""

    integer: dict[str, ir.Node | None] = field(default_factory=dict)
    """Node name -> the activation fused with it."""
    inputs: list[tuple[ir.Node, int]] = field(default_factory=list)
    """Edges (node, input position) that read an integer tensor."""
    written: dict[str, ir.Value] = field(default_factory=dict)
    """Values that are written as integers, by name."""
    root: dict[str, str] = field(default_factory=dict)
    """Value name -> name of the value whose scale it has."""
    fixed: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Value name -> range known without data."""
    decisions: list[Decision] = field(default_factory=list)


def plan(graph: ir.Graph, spec: QuantSpec, keep_float: Iterable[str] = ()) -> Plan:
    """Decides, operator by operator, what becomes integer under the spec.

    Args:
        graph: the float graph; not changed.
        spec: placement, shared scales, operators that stay float.
        keep_float: names of nodes that stay in float.

    Raises:
        DeploykitError: no operator has one of those names.
    """
    made = Plan()
    excluded = set(keep_float)
    layers = {_name(node) for node in graph}
    for name in excluded - layers:
        raise unknown("layer", name, layers)
    fused: set[str] = set()
    for node in graph:
        name = _name(node)
        kind = role(node)
        if name in fused or not is_float(node.outputs[0]):
            continue
        if kind == "float" or name in excluded or node.op_type in spec.float_operators:
            tail = fused_activation(node)  # stays with what it would have been fused with
            fused.update([_name(tail)] if tail is not None else [])
            if _computes(node):
                why = "kept in float on request" if name in excluded else why_float(node)
                if node.op_type in spec.float_operators:
                    why = f"{node.op_type} stays in float on this target"
                made.decisions.append(Decision(node.op_type, name, False, why))
            continue
        if spec.placement == "linear_inputs":
            _plan_linear_inputs(node, kind, made)
        else:
            tail = _plan_everywhere(node, kind, spec, made)
            if tail is not None:
                fused.add(_name(tail))
    return made


def _plan_everywhere(node: ir.Node, kind: str, spec: QuantSpec, made: Plan) -> ir.Node | None:
    """Integer in, integer out. Returns the activation that was fused."""
    if kind == "activation" and not has_constant_limits(node):
        made.decisions.append(Decision(node.op_type, _name(node), False, "its limits are not constants"))
        return None
    if kind == "moves" and not _is_integer(node.inputs[0], made):
        return None  # moves floats around: nothing to gain
    tail = fused_activation(node)
    outputs = [v for v in (tail or node).outputs if is_float(v)]
    sources = [_name(node.inputs[i]) for i in data_inputs(node) if constant(node.inputs[i]) is None]
    made.integer[_name(node)] = tail
    made.inputs.extend((node, i) for i in data_inputs(node))
    made.written.update((_name(v), v) for v in outputs)
    made.decisions.append(Decision(node.op_type, _name(node), True))
    if kind == "moves":
        made.root.update((_name(v), _root(made, sources[0])) for v in outputs)
    elif node.op_type in spec.shared_scale:
        for source in sources:
            if _root(made, source) not in made.fixed:  # a fixed range is converted at the edge instead
                _unite(made, _name(outputs[0]), source)
    elif node.op_type in FIXED_OUTPUT and not spec.activation_symmetric:
        made.fixed[_name(outputs[0])] = FIXED_OUTPUT[node.op_type]
    return tail


def _plan_linear_inputs(node: ir.Node, kind: str, made: Plan) -> None:
    """Inputs of products, and the skip branch of residual adds: the other branch fuses with the product before it."""
    if kind == "linear":
        made.integer[_name(node)] = None
        made.inputs.append((node, 0))
        made.decisions.append(Decision(node.op_type, _name(node), True))
    elif node.op_type == "Add" and all(constant(v) is None for v in node.inputs):
        products = [i for i in (0, 1) if _is_lone_product(node.inputs[i])]
        if products:
            made.inputs.append((node, 1 - products[0]))


def _is_lone_product(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and role(producer) == "linear" and len(list(producer.outputs[0].uses())) == 1


def _computes(node: ir.Node) -> bool:
    return role(node) != "moves" and node.op_type not in ("Shape", "Cast", "Constant", "Gather", "Identity")


def _is_integer(value: ir.Value | None, made: Plan) -> bool:
    if value is None:
        return False
    return value.is_graph_input() or _name(value) in made.written


def _name(thing: ir.Value | ir.Node | None) -> str:
    return (thing.name if thing is not None else None) or ""


def _root(made: Plan, name: str) -> str:
    while made.root.get(name, name) != name:
        name = made.root[name]
    return name


def _unite(made: Plan, one: str, other: str) -> None:
    a, b = _root(made, one), _root(made, other)
    if a != b:
        made.root[a] = b


def quantize(
    graph: FloatGraph,
    ranges: Ranges,
    spec: QuantSpec,
    method: str = "minmax",
    keep_float: Iterable[str] = (),
) -> Hub:
    """The hub of a spec.

    Args:
        graph: float graph; not changed.
        ranges: statistics of exactly this graph.
        spec: how numbers are stored and where.
        method: how thresholds are chosen (`deploykit.calibration.thresholds`); graph outputs always use min-max,
            because cutting the largest logit changes the answer.
        keep_float: names of nodes that stay in float.

    Raises:
        DeploykitError: the ranges belong to another graph, or lack what the method needs.
    """
    if ranges.graph != graph.hash:
        raise DeploykitError(
            f"these ranges were measured on another graph ({ranges.graph}, this one is {graph.hash}); calibrate again"
        )
    model = graph.copy()
    g = model.graph
    made = plan(g, spec, keep_float)
    params = _activation_params(g, made, ranges, spec, method)
    names = {id(v): _name(v) for v in [*g.inputs, *(o for n in g for o in n.outputs)]}  # outputs are renamed below
    constants: dict[str, tuple[ir.Value, ir.Value]] = {}
    pairs: dict[tuple[str, str], ir.Value] = {}

    def dequantized(value: ir.Value, root: str, after: ir.Value | None = None) -> ir.Value:
        """``value`` behind a Q/DQ pair with the parameters of ``root``; one pair per value and root."""
        name = names[id(value)]
        if (name, root) not in pairs:
            if root not in constants:
                p = params[root]
                constants[root] = (
                    add_initializer(g, f"{root}_scale", p.scale),
                    add_initializer(g, f"{root}_zero", p.zero_point),
                )
            suffix = "" if root == _root(made, name) else f"_as_{root}"
            pairs[name, root] = _insert_pair(g, after or value, f"{name}{suffix}", *constants[root])
        return pairs[name, root]

    # 1. every written tensor goes through Q/DQ; its float readers read the dequantized value too, as on the device
    entering = [v for v in g.inputs if is_float(v) and any(node.inputs[i] is v for node, i in made.inputs)]
    for value in [*(entering if spec.placement == "everywhere" else []), *made.written.values()]:
        readers = list(value.uses())
        result = dequantized(value, _root(made, names[id(value)]))
        for node, position in readers:
            node.replace_input_with(position, result)
        for i, output in enumerate(g.outputs):
            if output is value:
                _become_output(g, i, result)
    # 2. edges that still read floats (linear_inputs placement, float islands), and scale changes before operators
    #    whose inputs and output share one scale
    for node, position in made.inputs:
        current = node.inputs[position]
        assert current is not None
        if constant(current) is not None:
            node.replace_input_with(position, _constant_operand(g, node, current, spec))
            continue
        source = _behind_pair(current)
        root = _root(made, names[id(source or current)])
        if node.op_type in spec.shared_scale and spec.placement == "everywhere":
            root = _root(made, names[id((made.integer[_name(node)] or node).outputs[0])])
        if source is None:
            node.replace_input_with(position, dequantized(current, root))
        elif root != _root(made, names[id(source)]):
            node.replace_input_with(position, dequantized(source, root, after=current))
    # 3. weights and biases
    shared: dict[tuple[str, int, bytes], ir.Value] = {}
    for node in [n for n in g if _name(n) in made.integer and role(n) == "linear"]:
        _quantize_weights(g, node, graph.masks, spec, shared)
    drop_unused(g)
    weights = {_name(dq.producer().inputs[0]): name for (name, _, _), dq in shared.items()}  # type: ignore[union-attr]
    return Hub(graph, spec, model, ranges, tuple(made.decisions), weights)


def _behind_pair(value: ir.Value) -> ir.Value | None:
    """The float value behind a DequantizeLinear(QuantizeLinear(.)) pair, or None."""
    dq = value.producer()
    if dq is None or dq.op_type != "DequantizeLinear" or dq.inputs[0] is None:
        return None
    q = dq.inputs[0].producer()
    return q.inputs[0] if q is not None and q.op_type == "QuantizeLinear" else None


def _become_output(graph: ir.Graph, index: int, value: ir.Value) -> None:
    """The dequantized value takes over the place and the name of a graph output."""
    old = graph.outputs[index]
    name = old.name
    old.name = fresh_name(graph, f"{name}_float")
    value.name = name
    graph.outputs[index] = value


def _insert_pair(graph: ir.Graph, value: ir.Value, name: str, scale: ir.Value, zero: ir.Value) -> ir.Value:
    """Q and DQ right after the producer of ``value``; returns the dequantized value."""
    names = [fresh_name(graph, f"{name}_{kind}") for kind in ("q", "dq")]
    q = ir.Node("", "QuantizeLinear", [value, scale, zero], outputs=[ir.Value(name=names[0])], name=names[0])
    q.outputs[0].type, q.outputs[0].shape = zero.type, value.shape
    dq_value = ir.Value(name=names[1], type=value.type, shape=value.shape)
    dq = ir.Node("", "DequantizeLinear", [q.outputs[0], scale, zero], outputs=[dq_value], name=names[1])
    producer = value.producer()
    if producer is None:
        first = graph[0]
        graph.insert_before(first, [q, dq])
    else:
        graph.insert_after(producer, [q, dq])
    return dq_value


def _activation_params(graph: ir.Graph, made: Plan, ranges: Ranges, spec: QuantSpec, method: str) -> dict[str, QParams]:
    """Scale and zero point per root tensor: the union of the ranges of all tensors that share it."""
    exact = {v.name for v in graph.outputs}
    lows: dict[str, float] = {}
    highs: dict[str, float] = {}
    names = {*made.written, *(_name(node.inputs[i]) for node, i in made.inputs if constant(node.inputs[i]) is None)}
    for name in sorted(names):
        root = _root(made, name)
        if root in made.fixed:
            lows[root], highs[root] = made.fixed[root]
            continue
        if name not in ranges.tensors:
            raise DeploykitError(f"the ranges have no tensor '{name}'; calibrate again")
        stats: Stats = ranges.tensors[name]
        steps = spec.activation_range[1] - spec.activation_range[0]
        how = "minmax" if name in exact else method
        low, high = threshold(stats, how, steps, spec.activation_symmetric)
        lows[root] = min(lows.get(root, 0.0), low)
        highs[root] = max(highs.get(root, 0.0), high)
    return {
        root: _fixed_params(spec) if root in made.fixed else activation_params(lows[root], highs[root], spec)
        for root in lows
    }


def activation_params(low: float, high: float, spec: QuantSpec) -> QParams:
    """Scale and zero point that cover [low, high] and represent 0 exactly.

    A rounded zero point pushes one end of an asymmetric range outside by up to half a step; the scale is widened until
    both ends are inside, and of the two zero points next to the exact one that is taken which widens it less. This also
    moves images normalised to [-1, 1] (pixel/127.5 - 1), every value of which would fall on a rounding tie, off the
    ties.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    bottom, top = spec.activation_range
    dtype = np.int8 if spec.activation_signed else np.uint8
    if low == high:  # nothing but zeros: any scale does, and kernels dislike tiny ones
        high = 1.0
    if spec.activation_symmetric:
        reach = top if spec.activation_signed else (top + 1) // 2
        scale, zero = max(-low, high) / reach, 0 if spec.activation_signed else reach
    else:
        exact = bottom - low / (high - low) * (top - bottom)

        def covering(z: int) -> float:
            """The smallest scale at which [low, high] lies inside, with this zero point."""
            below = -low / (z - bottom) if low < 0 else 0.0
            return max(below, high / (top - z) if high > 0 else 0.0)

        first, last = bottom + (low < 0), top - (high > 0)  # an end that is not empty needs a step of its own
        candidates = {min(max(int(z), first), last) for z in (np.floor(exact), np.ceil(exact))}
        zero = min(sorted(candidates), key=covering)
        scale = covering(zero)
    scale = max(scale, 2.0**-24)
    if spec.scale == "power_of_two":
        scale = 2.0 ** np.ceil(np.log2(scale))
    return QParams(np.asarray(scale, np.float32), np.asarray(zero, dtype))


def _fixed_params(spec: QuantSpec) -> QParams:
    """[0, 1) in 2^bits steps: what integer softmax and sigmoid kernels write."""
    bottom, _ = spec.activation_range
    dtype = np.int8 if spec.activation_signed else np.uint8
    return QParams(np.asarray(2.0**-spec.activation_bits, np.float32), np.asarray(bottom, dtype))


def weight_scale(
    weight: NDArray[np.float32], axis: int, spec: QuantSpec, bias: NDArray[np.float32] | None, input_scale: float
) -> NDArray[np.float32]:
    """Scale per output channel ``[c]`` (all equal under per-tensor granularity), never so small that a bias saturates.

    Args:
        weight: any rank, float32.
        axis: its output-channel axis.
        spec: bits, granularity, smallest scale.
        bias: ``[c]`` float32, or None.
        input_scale: of the activation the weight is multiplied with.
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = np.abs(weight).max(axis=others).astype(np.float64) / spec.weight_max
    if spec.weight_granularity == "tensor":
        scale = np.full_like(scale, scale.max())
    scale = np.maximum(scale, spec.weight_scale_floor)
    if bias is not None and spec.bias == "int32":
        scale = np.maximum(scale, np.abs(bias).astype(np.float64) / (input_scale * BIAS_LIMIT))
        if spec.weight_granularity == "tensor":
            scale = np.full_like(scale, scale.max())
    if spec.scale == "power_of_two":
        scale = 2.0 ** np.ceil(np.log2(scale))
    return np.asarray(scale, np.float32)


def round_weight(weight: NDArray[Any], scale: NDArray[np.float32], axis: int, spec: QuantSpec) -> NDArray[np.int8]:
    """Nearest integers in float32 arithmetic (as torch rounds in training), halves to even, within the spec's range."""
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    steps = np.divide(weight, scale.reshape(shape), dtype=np.float32)
    np.rint(steps, out=steps)
    return np.asarray(np.clip(steps, -spec.weight_max, spec.weight_max, out=steps), np.int8)


def round_bias(bias: NDArray[Any], scale: NDArray[np.float32]) -> NDArray[np.int32]:
    """Nearest int32 steps of ``scale`` [c]."""
    return np.clip(np.rint(bias.astype(np.float64) / scale), -(2**31) + 1, 2**31 - 1).astype(np.int32)


def _quantize_weights(
    graph: ir.Graph,
    node: ir.Node,
    masks: Mapping[str, Any],
    spec: QuantSpec,
    shared: dict[tuple[str, int, bytes], ir.Value],
) -> None:
    """Puts integers behind a linear operator's weight and bias.

    ``shared`` holds what was written before: a weight that several operators use with one scale is stored once.
    """
    weight_value = node.inputs[1]
    weight = constant(weight_value)
    assert weight_value is not None and weight is not None
    name = _name(weight_value)
    axis = weight_axis(node)
    bias_value = node.inputs[2] if len(node.inputs) > 2 else None
    channels = weight.shape[axis] * (attribute(node, "group", 1) if node.op_type == "ConvTranspose" else 1)
    bias = constant(bias_value)
    if bias is None and bias_value is None:
        bias = np.zeros(channels, np.float32)
    x = node.inputs[0]
    input_scale = float(constant(x.producer().inputs[1]))  # type: ignore[union-attr, arg-type]
    fits = bias is not None and bias.shape == (weight.shape[axis],)
    scale = weight_scale(weight, axis, spec, bias if fits else None, input_scale)
    key = (name, axis, scale.tobytes())
    if key not in shared:
        stored = round_weight(weight, scale, axis, spec)
        if name in masks:
            assert not stored[~masks[name]].any(), f"quantizing filled zeros of {name}"
        shared[key] = _dequantize_constant(graph, node, f"{name}_q", stored, scale, axis)
    node.replace_input_with(1, shared[key])
    if node.op_type == "MatMul" or not fits or bias is None:
        return
    if spec.bias == "int32":
        bias_scale = np.float32(input_scale) * scale
        value = _dequantize_constant(graph, node, f"{node.name}.bias_q", round_bias(bias, bias_scale), bias_scale, 0)
    elif bias_value is None or len(list(bias_value.uses())) > 1:  # each operator's bias is corrected on its own
        value = add_initializer(graph, f"{node.name}.bias", bias)
    else:
        value = bias_value
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, value)


def _constant_operand(graph: ir.Graph, node: ir.Node, value: ir.Value, spec: QuantSpec) -> ir.Value:
    """A constant factor or summand becomes an integer tensor with a scale of its own."""
    array = constant(value)
    assert array is not None
    p = activation_params(float(array.min()), float(array.max()), spec)
    bottom, top = spec.activation_range
    stored = np.clip(np.rint(array / p.scale) + p.zero_point, bottom, top).astype(p.zero_point.dtype)
    held = add_initializer(graph, f"{value.name}_q", stored)
    scale, zero = (
        add_initializer(graph, f"{value.name}_scale", p.scale),
        add_initializer(graph, f"{value.name}_zero", p.zero_point),
    )
    return _dequantize(graph, node, held, scale, zero, None)


def _dequantize_constant(
    graph: ir.Graph, node: ir.Node, name: str, stored: NDArray[Any], scale: NDArray[np.float32], axis: int
) -> ir.Value:
    held = add_initializer(graph, name, stored)
    scales = add_initializer(graph, f"{name}_scale", scale)
    zeros = add_initializer(graph, f"{name}_zero", np.zeros(scale.shape, stored.dtype))
    return _dequantize(graph, node, held, scales, zeros, axis)


def _dequantize(
    graph: ir.Graph, node: ir.Node, held: ir.Value, scale: ir.Value, zero: ir.Value, axis: int | None
) -> ir.Value:
    name = fresh_name(graph, f"{held.name}_dq")
    output = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=held.shape)
    attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
    dq = ir.Node("", "DequantizeLinear", [held, scale, zero], attributes, outputs=[output], name=name)
    graph.insert_before(node, [dq])
    return output
