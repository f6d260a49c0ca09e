"""Lowers a graph to an older operator set, by a rule for every operator whose definition changed in between.

``onnx.version_converter`` fails on Pad and writes invalid ReduceMean nodes on the way down, and torch's exporter
returns another operator set than the one asked for without a word. Here the ONNX schemas say which operators changed;
each needs a rule below that rewrites it or says why it cannot. Nothing is relabelled without a rule.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir

from deploykit.core.errors import DeploykitError
from deploykit.hub.graph import add_initializer, attribute, constant, drop_unused

OLDEST, NEWEST = 17, 20
"""The rules below cover what changed between these two."""

Rule = Callable[[ir.Graph, ir.Node], str | None]
"""Rewrites a node in place; returns None, or why it cannot."""


def lower_opset(model: ir.Model, opset: int) -> None:
    """Rewrites the model in place to the operator set.

    Args:
        model: only standard operators, operator set between ``opset`` and `NEWEST`.
        opset: the one wanted, `OLDEST` or above.

    Raises:
        DeploykitError: names every operator that has no equivalent there.
    """
    source = model.opset_imports.get("", 0)
    if not OLDEST <= opset <= source <= NEWEST:
        raise DeploykitError(
            f"the graph has operator set {source} and the file would have {opset}; "
            f"deploykit lowers from at most {NEWEST} to at least {OLDEST}"
        )
    offenders = [_lowered(model.graph, node, source, opset) for node in list(model.graph)]
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


def _lowered(graph: ir.Graph, node: ir.Node, source: int, opset: int) -> str | None:
    where = f"{node.op_type} (layer '{node.name}')"
    if node.domain not in ("", "ai.onnx"):
        return f"{where} of the domain {node.domain}"
    now, then = _since(node.op_type, source), _since(node.op_type, opset)
    if now == then:
        return None
    rule = RULES.get(node.op_type)
    if rule is None:
        return f"{where} is defined since {now}" if then is None else f"{where} changed in {now}"
    why = rule(graph, node)
    return why and f"{where}: {why}"


def _since(op_type: str, opset: int) -> int | None:
    try:
        return int(onnx.defs.get_schema(op_type, max_inclusive_version=opset).since_version)
    except onnx.defs.SchemaError:
        return None


def _types_only(graph: ir.Graph, node: ir.Node) -> str | None:
    """New versions that only take more types; ``saturate`` means something for float8 alone."""
    node.attributes.pop("saturate", None)
    return None


def _reduce(graph: ir.Graph, node: ir.Node) -> str | None:
    """Axes were an attribute before 18 (20 only adds the type bool to ReduceMax and ReduceMin)."""
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


def _split(graph: ir.Graph, node: ir.Node) -> str | None:
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


def _pad(graph: ir.Graph, node: ir.Node) -> str | None:
    """Before 18 there was no ``axes`` input: pads [2 * rank], all begins and then all ends."""
    if attribute(node, "mode", "constant") == "wrap":
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


def _resize(graph: ir.Graph, node: ir.Node) -> str | None:
    if attribute(node, "coordinate_transformation_mode", "half_pixel") == "half_pixel_symmetric":
        return "coordinate_transformation_mode 'half_pixel_symmetric' is defined since 19"
    return _drop_defaults(node, antialias=0, keep_aspect_ratio_policy="stretch", axes=None)


def _pool(graph: ir.Graph, node: ir.Node) -> str | None:
    dilations = attribute(node, "dilations")
    if dilations is not None and all(d == 1 for d in dilations):
        node.attributes.pop("dilations")
    return _drop_defaults(node, dilations=None)


def _drop_defaults(node: ir.Node, **defaults: object) -> str | None:
    """Takes off attributes that are new and say nothing; an attribute that says something cannot be lowered."""
    for name, default in defaults.items():
        value = attribute(node, name, default)
        if value != default:
            return f"{name} = {value} cannot be said"
        node.attributes.pop(name, None)
    return None


def _gelu(graph: ir.Graph, node: ir.Node) -> str | None:
    """x/2 (1 + erf(x/√2)), or tanh of √(2/π) (x + 0.044715 x³) for erf: the function body of Gelu in ONNX."""
    x, name = node.inputs[0], node.name or "gelu"
    assert x is not None
    dtype, shape = x.dtype, x.shape
    if dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return f"it computes in {dtype}"
    made: list[ir.Node] = []

    def number(value: float, what: str) -> ir.Value:
        return add_initializer(graph, f"{name}_{what}", np.asarray(value, dtype.numpy()))

    def op(op_type: str, *inputs: ir.Value) -> ir.Value:
        new = ir.Node("", op_type, list(inputs), name=f"{name}.{len(made)}")
        result = new.outputs[0]
        result.name, result.dtype, result.shape = new.name, dtype, shape
        made.append(new)
        return result

    if attribute(node, "approximate", "none") == "tanh":
        cube = op("Mul", op("Mul", x, x), x)
        inner = op("Add", x, op("Mul", cube, number(0.044715, "cubic")))
        gate = op("Tanh", op("Mul", inner, number(np.sqrt(2 / np.pi), "slope")))
    else:
        gate = op("Erf", op("Mul", x, number(np.sqrt(0.5), "slope")))
    result = op("Mul", op("Mul", x, op("Add", gate, number(1.0, "one"))), number(0.5, "half"))
    ir.convenience.replace_nodes_and_values(graph, node, [node], made, list(node.outputs), [result])
    return None


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("Cast", "CastLike", "Constant", "ConstantOfShape", "DequantizeLinear", "Equal", "Identity", "IsInf", "IsNaN",
         "QuantizeLinear", "Reshape", "Shape", "Size"), _types_only,
    ),
    **dict.fromkeys(
        ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
         "ReduceProd", "ReduceSumSquare"), _reduce,
    ),
    "AveragePool": _pool,
    "Gelu": _gelu,
    "Pad": _pad,
    "Resize": _resize,
    "Split": _split,
}  # fmt: skip
"""How an operator is written in an older operator set."""
