"""What becomes integer: decided operator by operator, from the graph and the QuantSpec alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx_ir as ir

from deploykit.core.patterns import matching
from deploykit.core.target import QuantSpec
from deploykit.hub.graph import Decision, FloatGraph, constant
from deploykit.hub.operators import (
    CANNOT_BE_STORED,
    FIXED_OUTPUT,
    channel_axis,
    data_inputs,
    fused,
    has_constant_limits,
    is_float,
    role,
    why_float,
    why_not_float8,
)


def observed(graph: FloatGraph) -> tuple[list[str], dict[str, int]]:
    """The tensors whose ranges any QuantSpec may ask for, and the channel axis of those whose means are needed.

    The same for every spec, so one calibration serves all targets. What an activation is fused with has no range of
    its own.
    """
    names: dict[str, None] = {}
    channels: dict[str, int] = {}
    for node in graph.model.graph:
        if role(node) in ("float", "lookup", "recurrent") or not is_float(node.outputs[0]):
            continue
        output = node.outputs[0]
        read = [node.inputs[i] for i in data_inputs(node)]
        for value in [*read, *node.outputs]:
            if value is not None and is_float(value) and constant(value) is None and not _is_fused(value):
                names[name_of(value)] = None
        if role(node) == "linear":
            channels[name_of(output)] = channel_axis(node.op_type)
    return list(names), channels


def _is_fused(value: ir.Value) -> bool:
    """Whether what reads the value runs together with what wrote it, so that it never comes to be."""
    producer = value.producer()
    if producer is None:
        return False
    if fused(producer):
        return True
    first = next((v.producer() for v in producer.inputs if v is not None and v.producer() is not None), None)
    return first is not None and producer in fused(first)[:-1]


@dataclass(frozen=True)
class Plan:
    """What will be integer: computed from the graph and the spec alone."""

    integer: dict[str, ir.Node | None] = field(default_factory=dict)
    """Node name -> the last of the nodes fused with it."""
    stored: list[ir.Node] = field(default_factory=list)
    """Nodes that compute in float with weights stored as integers."""
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
        keep_float: names of nodes that stay in float, or patterns of names (`deploykit.core.patterns`).

    Raises:
        DeploykitError: no operator has one of those names, or matches one of the patterns.
    """
    made = Plan()
    excluded = matching("layer", keep_float, (name_of(node) for node in graph))
    stays = excluded | {name_of(node) for node in graph if node.op_type in spec.float_operators}
    wanted = _wanted(graph, stays)
    done: set[str] = set()
    for node in graph:
        name = name_of(node)
        kind = role(node)
        if name in done or not is_float(node.outputs[0]):
            continue
        behind = {name_of(n) for n in fused(node)}
        asked = name in excluded or bool(behind & excluded and spec.placement == "everywhere")
        if kind == "float" or name in stays or asked:
            done.update(behind)  # they stay with what they would have been fused with
            if _computes(node):
                why = "kept in float on request" if asked else why_float(node)
                if node.op_type in spec.float_operators:
                    why = f"{node.op_type} stays in float on this target"
                made.decisions.append(Decision(node.op_type, name, False, why))
            continue
        if spec.placement == "linear_inputs":
            _plan_linear_inputs(node, kind, spec, made)
        elif kind in ("lookup", "recurrent"):
            _plan_storage(node, kind, made)
        else:
            done.update(name_of(n) for n in _plan_everywhere(node, kind, spec, wanted, made))
    return made


def _wanted(graph: ir.Graph, stays: set[str]) -> set[str]:
    """The values that some integer operator reads, directly or after they were moved around, and the outputs.

    An operator that computes becomes integer only for those: what only floats read is better computed in float, as the
    residual stream of a transformer, which its LayerNormalizations read. Products are worth it in any case.
    """
    found: set[str] = set()
    for node in reversed(list(graph)):
        for value in node.outputs:
            readers = [(user, i) for user, i in value.uses() if name_of(user) not in stays]
            if value.is_graph_output() or any(_wants(user, i, found) for user, i in readers):
                found.add(name_of(value))
    return found


def _wants(reader: ir.Node, position: int, wanted: set[str]) -> bool:
    kind = role(reader)
    if kind == "linear":
        return position == 0
    return kind in ("arithmetic", "activation", "moves") and any(name_of(v) in wanted for v in reader.outputs)


def _why_not(node: ir.Node, kind: str, wanted: set[str], made: Plan) -> str:
    """Why an operator that could be integer is better off in float here; empty where it is not."""
    if kind == "activation" and not has_constant_limits(node):
        return "its limits are not constants"
    if kind in ("arithmetic", "activation"):
        if not any(_is_integer(node.inputs[i], made) for i in data_inputs(node)):
            return "what it reads was computed in float"
        if not any(name_of(v) in wanted for v in node.outputs):
            return "what reads it computes in float"
    return ""


def _plan_storage(node: ir.Node, kind: str, made: Plan) -> None:
    """Weights in int8, sums in float."""
    made.stored.append(node)
    why = "" if kind == "lookup" else "it computes in float, with weights stored in int8"
    made.decisions.append(Decision(node.op_type, name_of(node), kind == "lookup", why))


def _plan_everywhere(node: ir.Node, kind: str, spec: QuantSpec, wanted: set[str], made: Plan) -> list[ir.Node]:
    """Integer in, integer out. Returns what was fused."""
    why = _why_not(node, kind, wanted, made)
    if why:
        made.decisions.append(Decision(node.op_type, name_of(node), False, why))
        return []
    if kind == "moves" and not _is_integer(node.inputs[0], made):
        return []  # moves floats around: nothing to gain
    chain = fused(node)
    tail = chain[-1] if chain else None
    outputs = [v for v in (tail or node).outputs if is_float(v)]
    if node.op_type in spec.float_outputs:
        outputs = [v for v in outputs if any(_wants(user, i, wanted) for user, i in v.uses())]
    sources = [name_of(node.inputs[i]) for i in data_inputs(node) if constant(node.inputs[i]) is None]
    made.integer[name_of(node)] = tail
    made.inputs.extend((node, i) for i in data_inputs(node))
    made.written.update((name_of(v), v) for v in outputs)
    made.decisions.append(Decision(node.op_type, name_of(node), True))
    if kind == "moves":
        made.root.update((name_of(v), root_of(made, sources[0])) for v in outputs)
    elif node.op_type in spec.shared_scale:
        for source in sources:
            if root_of(made, source) not in made.fixed:  # a fixed range is converted at the edge instead
                _unite(made, name_of(outputs[0]), source)
    elif node.op_type in FIXED_OUTPUT and (not spec.activation_symmetric or spec.activation_bits == 16):
        made.fixed[name_of(outputs[0])] = FIXED_OUTPUT[node.op_type]
    return chain


def _plan_linear_inputs(node: ir.Node, kind: str, spec: QuantSpec, made: Plan) -> None:
    """Inputs of products, and the skip branch of residual adds: the other branch fuses with the product before it.

    In 8-bit floating point the skip branch stays as it is: it would lose more than in integers.
    """
    why = why_not_float8(node) if kind == "linear" and spec.grid == "float8" else ""
    if why:
        made.decisions.append(Decision(node.op_type, name_of(node), False, why))
    elif kind == "linear":
        made.integer[name_of(node)] = None
        made.inputs.append((node, 0))
        made.decisions.append(Decision(node.op_type, name_of(node), True))
    elif kind in ("lookup", "recurrent"):
        made.decisions.append(Decision(node.op_type, name_of(node), False, CANNOT_BE_STORED))
    elif node.op_type == "Add" and spec.grid == "integer" and all(constant(v) is None for v in node.inputs):
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
    return value.is_graph_input() or name_of(value) in made.written


def name_of(thing: ir.Value | ir.Node | None) -> str:
    """Its name; empty where it has none."""
    return (thing.name if thing is not None else None) or ""


def root_of(made: Plan, name: str) -> str:
    """The value whose scale a value has."""
    while made.root.get(name, name) != name:
        name = made.root[name]
    return name


def _unite(made: Plan, one: str, other: str) -> None:
    a, b = root_of(made, one), root_of(made, other)
    if a != b:
        made.root[a] = b
