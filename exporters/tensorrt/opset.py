"""Lowers a graph to an older operator set, by a rule for every operator whose definition changed in between.

``onnx.version_converter`` fails on Pad and writes invalid ReduceMean nodes on the way down, and torch's exporter
returns another operator set than the one asked for without a word. Here the ONNX schemas say which operators changed;
each needs a rule below that rewrites it or says why it cannot. Nothing is relabelled without a rule.

Operators that the older set does not have at all are written as their function bodies in ONNX (Gelu, HardSwish,
LayerNormalization, Mish); so are operators that the set has and the device's parser does not read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from deploykit.core.errors import DeploykitError
from deploykit.hub.graph import add_initializer, attribute, constant, drop_unused, fresh_name

OLDEST, NEWEST = 13, 20
"""The rules below cover what changed between these two."""

Rule = Callable[[ir.Graph, ir.Node, int], str | None]
"""Rewrites a node in place for an operator set; returns None, or why it cannot."""


def lower_opset(model: ir.Model, opset: int, unread: Collection[str] = ()) -> None:
    """Rewrites the model in place to the operator set.

    Args:
        model: only standard operators, operator set between ``opset`` and `NEWEST`.
        opset: the one wanted, `OLDEST` or above.
        unread: operators that the runtime does not read although the operator set has them; those with a function body
            below are written out, the others stay.

    Raises:
        DeploykitError: names every operator that has no equivalent there.
    """
    source = model.opset_imports.get("", 0)
    if not OLDEST <= opset <= source <= NEWEST:
        raise DeploykitError(
            f"the graph has operator set {source} and the file would have {opset}; "
            f"deploykit lowers from at most {NEWEST} to at least {OLDEST}"
        )
    offenders = [_lowered(model.graph, node, source, opset, unread) for node in list(model.graph)]
    refused = [o for o in offenders if o]
    if refused:
        raise DeploykitError(
            f"cannot be written with ONNX operator set {opset}: {'; '.join(refused)}. "
            "Change these operators in the model, or choose a target with another exporter."
        )
    drop_unused(model.graph)
    model.opset_imports.clear()
    model.opset_imports[""] = opset
    model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])


def verify_opset(proto: onnx.ModelProto, opset: int) -> None:
    """Raises if the file is not exactly what was asked for: full ONNX check, types included, and the operator set."""
    found = [(o.domain, o.version) for o in proto.opset_import]
    assert found == [("", opset)], f"asked for operator set {opset}, the file says {found}"
    onnx.checker.check_model(proto, full_check=True)


def _lowered(graph: ir.Graph, node: ir.Node, source: int, opset: int, unread: Collection[str]) -> str | None:
    where = f"{node.op_type} (layer '{node.name}')"
    if node.domain not in ("", "ai.onnx"):
        return f"{where} of the domain {node.domain}"
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return f"{where} holds a graph of its own"
    now, then = _since(node.op_type, source), _since(node.op_type, opset)
    if then is None or node.op_type in unread:
        body = BODIES.get(node.op_type)
        if body is not None:
            why = body(graph, node, opset)
            return why and f"{where}: {why}"
        first = next(v for v in range(opset, source + 1) if _since(node.op_type, v) is not None)
        return f"{where} is defined since {first}" if then is None else None
    if now == then and node.op_type != "Pad":  # whose axes TensorRT reads since 10.4 only
        return None
    rule = RULES.get(node.op_type)
    if rule is None:
        return f"{where} changed in {now}"
    why = rule(graph, node, opset) or _foreign_type(node, opset)
    return why and f"{where}: {why}"


def _since(op_type: str, opset: int) -> int | None:
    try:
        return int(onnx.defs.get_schema(op_type, max_inclusive_version=opset).since_version)
    except onnx.defs.SchemaError:
        return None


def _foreign_type(node: ir.Node, opset: int) -> str | None:
    """Most new versions of an operator take more types; whether this node uses one of them."""
    schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=opset)
    for values, parameters in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for i, value in enumerate(values):
            if value is None or value.dtype is None:
                continue
            allowed = parameters[min(i, len(parameters) - 1)].types
            kind = value.dtype.name.lower()
            if f"tensor({kind})" not in allowed:
                return f"it does not take {kind} there"
    return None


def _types_only(graph: ir.Graph, node: ir.Node, opset: int) -> str | None:
    """New versions that only take more types; ``saturate`` means something for float8 alone."""
    node.attributes.pop("saturate", None)
    return None


def _only_defaults(**defaults: object) -> Rule:
    """The rule for attributes that are new: they go where they say nothing."""
    return lambda graph, node, opset: _drop_defaults(node, **defaults)


def _drop_defaults(node: ir.Node, **defaults: object) -> str | None:
    """Takes off attributes that are new and say nothing; an attribute that says something cannot be lowered."""
    for name, default in defaults.items():
        value = attribute(node, name, default)
        if value != default:
            return f"{name} = {value} cannot be said"
        node.attributes.pop(name, None)
    return None


def _reduce(graph: ir.Graph, node: ir.Node, opset: int) -> str | None:
    """Axes were an attribute before 18 (20 only adds the type bool to ReduceMax and ReduceMin)."""
    if opset >= 18:
        return None
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    values = constant(axes)
    if axes is not None and values is None:
        return "its axes are computed"
    nothing = values is None or values.size == 0
    if nothing and attribute(node, "noop_with_empty_axes", 0):
        return "it reduces nothing (noop_with_empty_axes)"
    node.attributes.pop("noop_with_empty_axes", None)
    node.resize_inputs(1)
    if values is not None and values.size:
        node.attributes["axes"] = ir.AttrInt64s("axes", [int(a) for a in values.reshape(-1)])
    return None


def _split(graph: ir.Graph, node: ir.Node, opset: int) -> str | None:
    """Before 18 the number of parts was that of the outputs, and without sizes all were equal."""
    if "num_outputs" not in node.attributes:
        return None
    shape, axis = node.inputs[0].shape if node.inputs[0] is not None else None, attribute(node, "axis", 0)
    size = shape[axis] if shape is not None else None
    if not isinstance(size, int):
        return "the size of the split dimension is not known"
    part = -(-size // len(node.outputs))
    sizes = [part] * (len(node.outputs) - 1)
    sizes.append(size - sum(sizes))
    node.attributes.pop("num_outputs")
    node.resize_inputs(2)
    node.replace_input_with(1, add_initializer(graph, f"{node.name}_sizes", np.asarray(sizes, np.int64)))
    return None


def _pad(graph: ir.Graph, node: ir.Node, opset: int) -> str | None:
    """Before 18 there was no ``axes`` input: pads [2 * rank], all begins and then all ends."""
    if opset < 19 and attribute(node, "mode", "constant") == "wrap":
        return "mode 'wrap' is defined since 19"
    if len(node.inputs) < 4 or node.inputs[3] is None:
        return None
    axes, pads = constant(node.inputs[3]), constant(node.inputs[1])
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if axes is None or pads is None or shape is None:
        return "its axes, pads or rank are not known"
    full = np.zeros((2, len(shape)), np.int64)
    full[:, axes.reshape(-1) % len(shape)] = pads.reshape(2, -1)
    node.replace_input_with(1, add_initializer(graph, f"{node.name}_pads", full.reshape(-1)))
    node.resize_inputs(3)
    return None


def _resize(graph: ir.Graph, node: ir.Node, opset: int) -> str | None:
    if attribute(node, "coordinate_transformation_mode", "half_pixel") == "half_pixel_symmetric":
        return "coordinate_transformation_mode 'half_pixel_symmetric' is defined since 19"
    return _drop_defaults(node, antialias=0, keep_aspect_ratio_policy="stretch", axes=None)


def _pool(graph: ir.Graph, node: ir.Node, opset: int) -> str | None:
    dilations = attribute(node, "dilations")
    if dilations is not None and all(d == 1 for d in dilations):
        node.attributes.pop("dilations")
    return _drop_defaults(node, dilations=None)


def _reshape(graph: ir.Graph, node: ir.Node, opset: int) -> str | None:
    """Before 14 a 0 in the shape always meant the size of the input there."""
    if opset >= 14:
        return None
    shape = constant(node.inputs[1])
    if shape is not None and not (shape == 0).any():
        node.attributes.pop("allowzero", None)
    return _drop_defaults(node, allowzero=0)


def _shape(graph: ir.Graph, node: ir.Node, opset: int) -> str | None:
    """Before 15 Shape gave all dimensions: a Slice takes the part."""
    start, end = attribute(node, "start", 0), attribute(node, "end")
    if opset >= 15 or (start == 0 and end is None):
        if opset < 15:
            node.attributes.pop("start", None)
        return None
    body = _Body(graph, node)
    whole = body.op("Shape", node.inputs[0])
    last = np.iinfo(np.int64).max if end is None else end
    body.replace(body.op("Slice", whole, body.constant([start], "start"), body.constant([last], "end")))
    return None


def _scatter(graph: ir.Graph, node: ir.Node, opset: int) -> str | None:
    """``reduction`` came in 16 with add and mul; 18 added max and min."""
    how = attribute(node, "reduction", "none")
    if opset >= 16 and how in ("none", "add", "mul"):
        return None
    return _drop_defaults(node, reduction="none")


def _grid_sample(graph: ir.Graph, node: ir.Node, opset: int) -> str | None:
    """Before 20 the modes were named for images, and there were only images [n, c, h, w]."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None or len(shape) != 4:
        return "it samples something other than images [n, c, h, w], which is defined since 20"
    older = {"linear": "bilinear", "cubic": "bicubic"}
    mode = attribute(node, "mode", "linear")
    node.attributes["mode"] = ir.AttrString("mode", older.get(mode, mode))
    return None


@dataclass
class _Body:
    """The nodes that take the place of one, and how to make them."""

    graph: ir.Graph
    node: ir.Node
    made: list[ir.Node] = field(default_factory=list)

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: int | float | list[int]) -> ir.Value:
        """One more node; its output has the type of its first input (an int64 vector behind Shape and Slice)."""
        kinds = {int: ir.AttrInt64, float: ir.AttrFloat32, list: ir.AttrInt64s}
        named = [kinds[type(v)](k, v) for k, v in attributes.items()]  # type: ignore[operator]
        name = fresh_name(self.graph, f"{self.node.name or op_type}.{len(self.made)}")
        new = ir.Node("", op_type, list(inputs), named, name=name)
        result, first = new.outputs[0], inputs[0]
        assert first is not None and first.dtype is not None
        result.name, result.dtype = name, ir.DataType.INT64 if op_type == "Shape" else first.dtype
        self.made.append(new)
        return result

    def constant(self, value: float | list[int], what: str) -> ir.Value:
        """A constant: integers are int64 vectors, a float has the type of the node's first input."""
        dtype = self.dtype.numpy() if isinstance(value, float) else np.dtype(np.int64)
        return add_initializer(self.graph, f"{self.node.name}_{what}", np.asarray(value, dtype))

    @property
    def dtype(self) -> ir.DataType:
        """The type that the node computes in."""
        first = self.node.inputs[0]
        assert first is not None and first.dtype is not None
        return first.dtype

    def replace(self, result: ir.Value) -> None:
        """Puts the made nodes in the place of the node, whose only output is now ``result``."""
        old = self.node.outputs[0]
        if old.dtype is not None:
            result.dtype = old.dtype
        result.shape = old.shape
        ir.convenience.replace_nodes_and_values(self.graph, self.node, [self.node], self.made, [old], [result])


def _computes_otherwise(node: ir.Node) -> str | None:
    """Why a node is not written as its function body: it computes in another type than these bodies do."""
    x = node.inputs[0]
    if x is None or x.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return f"it computes in {x.dtype if x is not None else None}"
    if any(list(v.uses()) or v.is_graph_output() for v in node.outputs[1:]):
        return "its second output is read"
    return None


def _gelu(graph: ir.Graph, node: ir.Node, opset: int) -> str | None:
    """x/2 (1 + erf(x/√2)), or tanh of √(2/π) (x + 0.044715 x³) for erf."""
    if why := _computes_otherwise(node):
        return why
    x, body = node.inputs[0], _Body(graph, node)
    if attribute(node, "approximate", "none") == "tanh":
        cube = body.op("Mul", body.op("Mul", x, x), x)
        inner = body.op("Add", x, body.op("Mul", cube, body.constant(0.044715, "cubic")))
        gate = body.op("Tanh", body.op("Mul", inner, body.constant(float(np.sqrt(2 / np.pi)), "slope")))
    else:
        gate = body.op("Erf", body.op("Mul", x, body.constant(float(np.sqrt(0.5)), "slope")))
    gated = body.op("Mul", x, body.op("Add", gate, body.constant(1.0, "one")))
    body.replace(body.op("Mul", gated, body.constant(0.5, "half")))
    return None


def _hard_swish(graph: ir.Graph, node: ir.Node, opset: int) -> str | None:
    """x · max(0, min(1, x/6 + 1/2))."""
    if why := _computes_otherwise(node):
        return why
    x, body = node.inputs[0], _Body(graph, node)
    body.replace(body.op("Mul", x, body.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)))
    return None


def _mish(graph: ir.Graph, node: ir.Node, opset: int) -> str | None:
    """x · tanh(ln(1 + e^x))."""
    if why := _computes_otherwise(node):
        return why
    x, body = node.inputs[0], _Body(graph, node)
    body.replace(body.op("Mul", x, body.op("Tanh", body.op("Softplus", x))))
    return None


def _reciprocal(graph: ir.Graph, node: ir.Node, opset: int) -> str | None:
    """1 / x."""
    if why := _computes_otherwise(node):
        return why
    body = _Body(graph, node)
    body.replace(body.op("Div", body.constant(1.0, "one"), node.inputs[0]))
    return None


def _layer_normalization(graph: ir.Graph, node: ir.Node, opset: int) -> str | None:
    """(x - m) / √(v + ε) · scale + bias, with the mean m and the variance v over the last axes."""
    if why := _computes_otherwise(node):
        return why
    x = node.inputs[0]
    if x is None or x.shape is None:
        return "the rank of its input is not known"
    first = attribute(node, "axis", -1) % len(x.shape)
    axes = list(range(first, len(x.shape)))
    body = _Body(graph, node)

    def mean(value: ir.Value | None) -> ir.Value:
        if opset < 18:
            return body.op("ReduceMean", value, axes=axes)
        return body.op("ReduceMean", value, body.constant(axes, "axes"))

    away = body.op("Sub", x, mean(x))
    variance = mean(body.op("Mul", away, away))
    epsilon = body.constant(float(attribute(node, "epsilon", 1e-5)), "epsilon")
    y = body.op("Div", away, body.op("Sqrt", body.op("Add", variance, epsilon)))
    y = body.op("Mul", y, node.inputs[1])
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        y = body.op("Add", y, node.inputs[2])
    body.replace(y)
    return None


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("Add", "Cast", "CastLike", "Constant", "ConstantOfShape", "CumSum", "DequantizeLinear", "Div", "Equal",
         "GreaterOrEqual", "Identity", "IsInf", "IsNaN", "LeakyRelu", "LessOrEqual", "Mul", "Pow", "PRelu",
         "QuantizeLinear", "Relu", "Size", "Sub", "Where"), _types_only,
    ),
    **dict.fromkeys(
        ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
         "ReduceProd", "ReduceSumSquare"), _reduce,
    ),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), _only_defaults(layout=0)),
    "AveragePool": _pool,
    "BatchNormalization": _only_defaults(training_mode=0),
    "GridSample": _grid_sample,
    "Pad": _pad,
    "Reshape": _reshape,
    "Resize": _resize,
    "ScatterElements": _scatter,
    "ScatterND": _scatter,
    "Shape": _shape,
    "Split": _split,
}  # fmt: skip
"""How an operator is written in an older operator set."""

BODIES: dict[str, Rule] = {
    "Gelu": _gelu,
    "HardSwish": _hard_swish,
    "LayerNormalization": _layer_normalization,
    "Mish": _mish,
    "Reciprocal": _reciprocal,
}
"""How an operator is written with others, where it does not exist."""
