"""Float graph + ranges + QuantSpec -> hub: sets scales once and inserts Q/DQ where the plan wants integers.

Where the spec wants 8-bit floating point, read that for integers: it only rounds otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from deploykit.calibration.thresholds import threshold
from deploykit.core.errors import DeploykitError
from deploykit.core.ranges import Ranges, Stats
from deploykit.core.target import LARGEST_FLOAT8, QuantSpec
from deploykit.hub.graph import (
    IR_VERSION,
    OPSET,
    FloatGraph,
    Hub,
    add_initializer,
    attribute,
    constant,
    drop_unused,
    fresh_name,
)
from deploykit.hub.operators import bias_of, is_float, role, weight_axis, weight_positions
from deploykit.hub.plan import Plan, name_of, plan, root_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

BIAS_LIMIT = 2.0**29
"""Largest |bias| in int32 steps: leaves two bits for the sum of products. A channel with weights near zero would
otherwise get a scale so small that its bias saturates and the integer accumulator wraps."""


@dataclass(frozen=True)
class QParams:
    """scale (float32) and zero point of one activation: real = scale * (integer - zero_point).

    The zero point has the type of the integers, which are cut where it ends.
    """

    scale: NDArray[np.float32]
    zero_point: NDArray[Any]
    limits: tuple[int, int]
    """Smallest and largest integer that the calibrated range takes."""


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
            because cutting the largest logit changes the answer, and so does 8-bit floating point, which is as fine
            for small numbers wherever its range ends.
        keep_float: names of nodes that stay in float, or patterns of names.

    Raises:
        DeploykitError: the ranges belong to another graph, or lack what the method needs.
    """
    if spec.placement == "weights":
        raise DeploykitError('placement = "weights" is that of the precisions w8, w4 and dynamic: ask for these')
    if ranges.graph != graph.hash:
        raise DeploykitError(
            f"these ranges were measured on another graph ({ranges.graph}, this one is {graph.hash}); calibrate again"
        )
    model = graph.copy()
    g = model.graph
    made = plan(g, spec, keep_float)
    params = _activation_params(g, made, ranges, spec, method)
    names = {id(v): name_of(v) for v in [*g.inputs, *(o for n in g for o in n.outputs)]}  # outputs are renamed below
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
            suffix = "" if root == root_of(made, name) else f"_as_{root}"
            pairs[name, root] = _insert_pair(g, after or value, f"{name}{suffix}", *constants[root])
        return pairs[name, root]

    # 1. every written tensor goes through Q/DQ; its float readers read the dequantized value too, as on the device
    entering = [v for v in g.inputs if is_float(v) and any(node.inputs[i] is v for node, i in made.inputs)]
    for value in [*(entering if spec.placement == "everywhere" else []), *made.written.values()]:
        readers = list(value.uses())
        result = dequantized(value, root_of(made, names[id(value)]))
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
        shared_root = _shared_root(made, node, spec, names)
        array = constant(current)
        if array is not None:
            own = params[shared_root] if shared_root else _range_params(array, spec)
            node.replace_input_with(position, _constant_operand(g, node, current, own))
            continue
        source = _behind_pair(current)
        root = shared_root or root_of(made, names[id(source or current)])
        if source is None:
            node.replace_input_with(position, dequantized(current, root))
        elif root != root_of(made, names[id(source)]):
            node.replace_input_with(position, dequantized(source, root, after=current))
    # 3. weights, tables and biases
    shared: dict[tuple[str, int, bytes], ir.Value] = {}
    for node in [n for n in g if name_of(n) in made.integer and role(n) == "linear"]:
        _quantize_weights(g, node, graph.masks, spec, shared)
    for node in made.stored:
        _store_weights(g, node, spec, shared)
    drop_unused(g)
    if not {spec.activation_storage, spec.ports.activation_storage} <= {"int8", "uint8", "float8e4m3fn"}:
        model.opset_imports[""] = max(model.opset_imports[""], OPSET)
        model.ir_version = max(model.ir_version, IR_VERSION)
    weights = {name_of(_stored(value)): name for (name, _, _), value in shared.items()}
    return Hub(graph, spec, model, ranges, tuple(made.decisions), weights)


def _shared_root(made: Plan, node: ir.Node, spec: QuantSpec, names: Mapping[int, str]) -> str:
    """The root of the scale that all inputs of an operator share with its output; empty where they do not."""
    if node.op_type not in spec.shared_scale or spec.placement != "everywhere":
        return ""
    return root_of(made, names[id((made.integer[name_of(node)] or node).outputs[0])])


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
    ports = {root_of(made, name_of(v)) for v in [*graph.inputs, *graph.outputs]}
    specs = {root: spec.ports for root in ports}
    lows: dict[str, float] = {}
    highs: dict[str, float] = {}
    names = {*made.written, *(name_of(node.inputs[i]) for node, i in made.inputs if constant(node.inputs[i]) is None)}
    for name in sorted(names):
        root = root_of(made, name)
        if root in made.fixed:
            lows[root], highs[root] = made.fixed[root]
            continue
        if name not in ranges.tensors:
            raise DeploykitError(f"the ranges have no tensor '{name}'; calibrate again")
        stats: Stats = ranges.tensors[name]
        bottom, top = specs.get(root, spec).activation_range
        how = "minmax" if name in exact or spec.grid == "float8" else method
        low, high = threshold(stats, how, top - bottom, spec.activation_symmetric)
        lows[root] = min(lows.get(root, 0.0), low)
        highs[root] = max(highs.get(root, 0.0), high)
    before_renaming = {id(v): name_of(v) for node in graph for v in node.outputs}
    for node, position in made.inputs:  # a constant branch is one more tensor of the same scale
        array, root = constant(node.inputs[position]), _shared_root(made, node, spec, before_renaming)
        if array is not None and root in lows and root not in made.fixed:
            lows[root], highs[root] = min(lows[root], float(array.min())), max(highs[root], float(array.max()))
    return {
        root: _fixed_params(made.fixed[root], specs.get(root, spec))
        if root in made.fixed
        else activation_params(lows[root], highs[root], specs.get(root, spec))
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
    return _params(scale, zero, spec)


def _params(scale: float, zero: int, spec: QuantSpec) -> QParams:
    dtype = ir.DataType[spec.activation_storage.upper()].numpy()
    return QParams(np.asarray(scale, np.float32), np.asarray(zero).astype(dtype), spec.activation_range)


def _fixed_params(limits: tuple[float, float], spec: QuantSpec) -> QParams:
    """[0, 1) or [-1, 1) in 2^bits steps: what integer softmax, sigmoid and tanh kernels write."""
    half = 2 ** (spec.activation_bits - 1)
    if spec.activation_symmetric:  # half of the integers of [0, 1) are not used
        return _params(1 / half, 0, spec)
    bottom, _ = spec.activation_range
    scale, zero = (1 / (2 * half), bottom) if limits[0] == 0 else (1 / half, bottom + half)
    return _params(scale, zero, spec)


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


def round_float8(steps: NDArray[Any]) -> NDArray[Any]:
    """Nearest E4M3 values, halves to even; what lies beyond the largest becomes the largest, as in QuantizeLinear."""
    cut = np.clip(steps, -LARGEST_FLOAT8, LARGEST_FLOAT8)
    return np.asarray(cut, np.float32).astype(ir.DataType.FLOAT8E4M3FN.numpy())


def round_weight(weight: NDArray[Any], scale: NDArray[np.float32], axis: int, spec: QuantSpec) -> NDArray[Any]:
    """Nearest integers in float32 arithmetic (as torch rounds in training), halves to even, within the spec's range.

    Returns:
        int8, or float8_e4m3fn under that grid.
    """
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    steps = np.divide(weight, scale.reshape(shape), dtype=np.float32)
    if spec.grid == "float8":
        return round_float8(steps)
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
    name = name_of(weight_value)
    axis = weight_axis(node)
    holder, position = bias_of(node)
    bias_value = holder.inputs[position] if len(holder.inputs) > position else None
    group = attribute(node, "group", 1) if node.op_type == "ConvTranspose" else 1
    channels = weight.shape[axis] * group
    bias = np.zeros(channels, np.float32) if bias_value is None else constant(bias_value)
    bias = bias.reshape(-1) if bias is not None and bias.size == channels else None
    x = node.inputs[0]
    input_scale = float(constant(x.producer().inputs[1]))  # type: ignore[union-attr, arg-type]
    # the groups of a transposed convolution share the scales of their channels
    largest = None if bias is None else np.abs(bias).reshape(group, -1).max(axis=0)
    scale = weight_scale(weight, axis, spec, largest, input_scale)
    key = (name, axis, scale.tobytes())
    if key not in shared:
        stored = round_weight(weight, scale, axis, spec)
        if name in masks:
            assert not stored[~masks[name]].any(), f"quantizing filled zeros of {name}"
        along = (scale[0], None) if spec.grid == "float8" else (scale, axis)  # its kernels take one number
        shared[key] = dequantize_constant(graph, node, f"{name}_q", stored, *along)
    node.replace_input_with(1, shared[key])
    if bias is None or (node.op_type == "MatMul" and (bias_value is None or spec.bias == "float")):
        return
    if spec.bias == "int32":
        scales = np.tile(np.float32(input_scale) * scale, group)
        value = dequantize_constant(graph, node, f"{node.name}.bias_q", round_bias(bias, scales), scales, 0)
    elif bias_value is None or len(list(bias_value.uses())) > 1:  # each operator's bias is corrected on its own
        value = add_initializer(graph, f"{node.name}.bias", bias)
    else:
        value = bias_value
    if len(holder.inputs) <= position:
        holder.resize_inputs(position + 1)
    holder.replace_input_with(position, value)


def _store_weights(
    graph: ir.Graph, node: ir.Node, spec: QuantSpec, shared: dict[tuple[str, int, bytes], ir.Value]
) -> None:
    """Integers in place of the weights of an operator that computes in float.

    A table has one scale, so that rows are read as integers and only those become float. A recurrent layer has one per
    gate and unit, which its directions share.
    """
    if node.op_type == "Gather":
        _store_table(graph, node, spec, shared)
        return
    for position in weight_positions(node):  # W and R: [directions, gates * units, inputs]
        value, weight = node.inputs[position], constant(node.inputs[position])
        assert weight is not None
        scale = weight_scale(weight, 1, spec, None, 1.0)
        key = (name_of(value), 1, scale.tobytes())
        if key not in shared:
            stored = round_weight(weight, scale, 1, spec)
            shared[key] = dequantize_constant(graph, node, f"{name_of(value)}_q", stored, scale, 1)
        node.replace_input_with(position, shared[key])


def _stored(value: ir.Value) -> ir.Value | None:
    """The integers: the value itself, or what its DequantizeLinear reads."""
    dq = value.producer()
    return value if dq is None else dq.inputs[0]


def _store_table(
    graph: ir.Graph, node: ir.Node, spec: QuantSpec, shared: dict[tuple[str, int, bytes], ir.Value]
) -> None:
    """Gather reads rows of int8 [rows, width]; a DequantizeLinear with one scale follows."""
    table, result = node.inputs[0], node.outputs[0]
    weight = constant(table)
    assert table is not None and weight is not None
    scale = weight_scale(weight, 0, replace(spec, weight_granularity="tensor"), None, 1.0)[:1]
    key = (name_of(table), 0, scale.tobytes())
    if key not in shared:  # tied embeddings: one table, read twice
        stored = round_weight(weight, np.repeat(scale, len(weight)), 0, spec)
        shared[key] = add_initializer(graph, f"{table.name}_q", stored)
    readers, outputs = list(result.uses()), [i for i, v in enumerate(graph.outputs) if v is result]
    node.replace_input_with(0, shared[key])
    name = name_of(result)
    held = add_initializer(graph, f"{table.name}_scale", scale.reshape(()))
    zero = add_initializer(graph, f"{table.name}_zero", np.zeros((), np.int8))
    real = ir.Value(name=fresh_name(graph, f"{name}_dq"), type=ir.TensorType(ir.DataType.FLOAT), shape=result.shape)
    dq = ir.Node("", "DequantizeLinear", [result, held, zero], outputs=[real], name=real.name)
    graph.insert_after(node, [dq])
    result.type = ir.TensorType(ir.DataType.INT8)
    for user, position in readers:
        user.replace_input_with(position, real)
    for index in outputs:
        _become_output(graph, index, real)


def _range_params(array: NDArray[Any], spec: QuantSpec) -> QParams:
    """Parameters that cover a constant."""
    return activation_params(float(array.min()), float(array.max()), spec)


def _constant_operand(graph: ir.Graph, node: ir.Node, value: ir.Value, p: QParams) -> ir.Value:
    """A constant operand of an operator that is not a product becomes an integer tensor."""
    array = constant(value)
    assert array is not None
    stored = np.clip(np.rint(array / p.scale) + float(p.zero_point), *p.limits).astype(p.zero_point.dtype)
    held = add_initializer(graph, f"{value.name}_q", stored)
    scale, zero = (
        add_initializer(graph, f"{value.name}_scale", p.scale),
        add_initializer(graph, f"{value.name}_zero", p.zero_point),
    )
    return _dequantize(graph, node, held, scale, zero, None)


def dequantize_constant(
    graph: ir.Graph, node: ir.Node, name: str, stored: NDArray[Any], scale: NDArray[np.float32], axis: int | None
) -> ir.Value:
    """Integers behind a DequantizeLinear in front of ``node``; zero points are 0. There is one scale per index of
    ``axis``; None: one in all."""
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
