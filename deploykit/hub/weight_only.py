"""Weights alone as integers: no sample data, and whatever is computed with them is computed in float.

Products read their weights from a DequantizeLinear: of 8 bits with one scale per output channel, of 4 bits with one per
group of neighbours along the input axis (``block_size``, operator set 21). Rows of tables become floats after they were
read. Scales are searched so that the squared error is smallest: a few large values are cut where that makes the many
small ones finer (Banner, Nahshan, Soudry: Post-training 4-bit quantization of convolutional networks for
rapid-deployment, 2019, section 3, with the error of the weights themselves in place of a distribution's).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from deploykit.coding import nibbles
from deploykit.core.patterns import matching
from deploykit.core.progress import track
from deploykit.core.target import QuantSpec
from deploykit.hub.graph import (
    IR_VERSION,
    OPSET,
    Decision,
    FloatGraph,
    Hub,
    add_initializer,
    attribute,
    constant,
    drop_unused,
    fresh_name,
    register,
)
from deploykit.hub.operators import ROLES, role, weight_axis, weight_positions, why_float
from deploykit.hub.plan import name_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHRUNK = tuple(1.0 - step / 40 for step in range(17))
"""Candidates for a scale, as shares of the one that cuts nothing: down to 0.6."""
CHUNK = 1 << 20
"""Weights that are rounded at once, so that a large tensor takes no memory beside its integers."""
LEAST = 256
"""Operators with fewer weights keep them in float: nothing would be gained."""


@dataclass(frozen=True)
class _Writer:
    """The graph that is being changed, and what was stored in it before: a weight that is read twice is stored once."""

    graph: ir.Graph
    spec: QuantSpec
    shrunk: tuple[float, ...]
    stored: dict[tuple[str, str], tuple[ir.Value, ir.Value]] = field(default_factory=dict)
    """(weight, form) -> integers and scales."""
    weights: dict[str, str] = field(default_factory=dict)
    bits: dict[str, int] = field(default_factory=dict)


def quantize_weights(graph: FloatGraph, spec: QuantSpec, keep_float: Iterable[str] = (), search: bool = True) -> Hub:
    """The hub whose only integers are weights. One float weight is in memory at a time.

    Matrix products and tables get ``spec.weight_bits``. In 8 bits there is one scale per output column, or row of the
    table. In 4 bits there is one per group of ``spec.weight_group``: along the input axis, where the last group may be
    shorter, or along the row, which is one group where groups do not divide it. Convolutions and recurrent layers have
    8 bits in any case and one scale per output channel or unit: no runtime reads them in groups.

    Args:
        graph: float graph; not changed.
        spec: its placement is ``weights``.
        keep_float: names of nodes that stay in float, or patterns of names.
        search: choose scales by the squared error; False: by the largest magnitude alone, which is faster.

    Raises:
        DeploykitError: a pattern in ``keep_float`` that matches nothing.
    """
    model = graph.copy()
    g = model.graph
    stays = matching("layer", keep_float, (name_of(node) for node in g))
    writer = _Writer(g, spec, SHRUNK if search else SHRUNK[:1])
    decisions = []
    for node in track(list(g), "rounding weights"):
        name, kind = name_of(node), role(node)
        if kind not in ("linear", "lookup", "recurrent"):
            if ROLES.get(node.op_type) == "linear":
                decisions.append(Decision(node.op_type, name, False, why_float(node)))
            continue
        why = "kept in float on request" if name in stays else _why_not(node)
        decisions.append(Decision(node.op_type, name, not why, why))
        if why:
            continue
        if kind == "lookup":
            _store_table(writer, node)
        elif node.op_type in ("MatMul", "Gemm"):
            _store_matrix(writer, node)
        else:
            for position in weight_positions(node):
                _store_channels(writer, node, position)
    drop_unused(g)
    if spec.weight_bits <= 4 or any("block_size" in node.attributes for node in g):
        model.opset_imports[""] = max(model.opset_imports[""], OPSET)
        model.ir_version = max(model.ir_version, IR_VERSION)
    return Hub(graph, spec, model, None, tuple(decisions), writer.weights, writer.bits)


def _why_not(node: ir.Node) -> str:
    """Why an operator's weights stay as they are."""
    arrays = [constant(node.inputs[i]) for i in weight_positions(node)]
    if any(a is None or a.dtype != np.float32 or a.ndim < 2 for a in arrays):
        return "its weights are no matrices of float32"
    return f"it has fewer than {LEAST} weights" if max(a.size for a in arrays if a is not None) < LEAST else ""


def _store_matrix(writer: _Writer, node: ir.Node) -> None:
    """Integers [.., inputs, outputs] behind a DequantizeLinear of this product's own, which kernels fuse with it.

    A Gemm that has its weight as [outputs, inputs] is turned: kernels read the other order.
    """
    value, spec = node.inputs[1], writer.spec
    turned = node.op_type == "Gemm" and bool(attribute(node, "transB", 0))
    key = name_of(value), "turned" if turned else "columns"
    inputs = _array(value).shape[-1 if turned else -2]
    group = spec.weight_group if spec.weight_bits <= 4 and spec.weight_group < inputs else None
    if key not in writer.stored:
        weight = _array(value)
        lines = weight if turned else weight.swapaxes(-1, -2)  # [.., outputs, inputs]
        stored, scale = round_lines(lines, group, spec.weight_max, writer.shrunk)
        scale = scale.swapaxes(-1, -2)
        if group is None and weight.ndim == 2:
            scale = scale[0]
        writer.stored[key] = _register(writer, value, stored.swapaxes(-1, -2), scale, spec.weight_bits)
    held, scales = writer.stored[key]
    if group is None and len(scales.shape or ()) == 1:
        attributes = [ir.AttrInt64("axis", 1)]
    else:  # one block is the whole axis where there are no groups in a batch of matrices
        attributes = [ir.AttrInt64("axis", len(held.shape or ()) - 2), ir.AttrInt64("block_size", group or inputs)]
    node.replace_input_with(1, _dequantized(writer.graph, node, held, scales, attributes))
    if turned:
        node.attributes["transB"] = ir.AttrInt64("transB", 0)


def _store_channels(writer: _Writer, node: ir.Node, position: int) -> None:
    """8-bit integers in the weight's own shape, one scale per index of its channel axis."""
    value = node.inputs[position]
    axis = 1 if node.op_type in ("LSTM", "GRU") else weight_axis(node)
    key = name_of(value), f"axis {axis}"
    if key not in writer.stored:
        weight = np.moveaxis(_array(value), axis, 0)
        stored, scale = round_lines(weight.reshape(len(weight), -1), None, 127, writer.shrunk)
        integers = np.moveaxis(stored.reshape(weight.shape), 0, axis)
        writer.stored[key] = _register(writer, value, integers, scale[:, 0], 8)
    held, scales = writer.stored[key]
    attributes = [ir.AttrInt64("axis", axis)]
    node.replace_input_with(position, _dequantized(writer.graph, node, held, scales, attributes))


def _store_table(writer: _Writer, node: ir.Node) -> None:
    """Gather reads rows of integers [rows, groups, group] and of scales [rows, groups, 1]; floats come of those alone.

    4-bit integers become 8-bit first, because nothing gathers 4 bits; runtimes compute that when they load the file.
    """
    g, spec, value, result = writer.graph, writer.spec, node.inputs[0], node.outputs[0]
    width = _array(value).shape[1]
    narrow = spec.weight_bits <= 4
    group = spec.weight_group if narrow and width % spec.weight_group == 0 else width
    key = name_of(value), "rows"
    if key not in writer.stored:
        stored, scale = round_lines(_array(value), group, spec.weight_max, writer.shrunk)
        integers = stored.reshape(len(stored), -1, group)
        held, scales = _register(writer, value, integers, scale[..., None], spec.weight_bits)
        if narrow:
            held = _in_place_of(g, node, "Cast", [held], f"{held.name}_8", [ir.AttrInt64("to", int(ir.DataType.INT8))])
        writer.stored[key] = held, scales
    held, scales = writer.stored[key]
    readers, outputs = list(result.uses()), [i for i, v in enumerate(g.outputs) if v is result]
    indices, name = node.inputs[1], name_of(result)
    assert indices is not None and indices.shape is not None
    read = _in_place_of(g, node, "Gather", [held, indices], f"{name}_q")
    chosen = _in_place_of(g, node, "Gather", [scales, indices], f"{name}_scale")
    real = _in_place_of(g, node, "Cast", [read], f"{name}_cast", [ir.AttrInt64("to", int(ir.DataType.FLOAT))])
    scaled = _in_place_of(g, node, "Mul", [real, chosen], f"{name}_groups")
    shape = add_initializer(g, f"{name}_shape", np.asarray([0] * len(indices.shape) + [width], np.int64))
    rows = _in_place_of(g, node, "Reshape", [scaled, shape], f"{name}_rows")
    rows.type, rows.shape = ir.TensorType(ir.DataType.FLOAT), result.shape
    for user, position in readers:
        user.replace_input_with(position, rows)
    for index in outputs:
        result.name, rows.name = fresh_name(g, f"{name}_float"), name
        g.outputs[index] = rows
    g.remove(node, safe=True)


def round_lines(
    lines: NDArray[Any], group: int | None, top: int, shrunk: tuple[float, ...] = SHRUNK
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Nearest integers, and the scales with the least squared error.

    Args:
        lines: ``[.., n]`` float32.
        group: neighbours in a line that share a scale, the last group as short as it comes; None: whole lines.
        top: largest integer.
        shrunk: the scales that are tried, as shares of max|w| / top.

    Returns:
        integers ``[.., n]`` and scales ``[.., ceil(n / group)]``.
    """
    n = lines.shape[-1]
    group = min(group or n, n)
    groups = -(-n // group)
    flat = lines.reshape(-1, n)
    stored = np.empty(flat.shape, np.int8)
    scales = np.empty((len(flat), groups), np.float32)
    step = max(1, CHUNK // n)
    for first in range(0, len(flat), step):
        part = np.zeros((len(flat[first : first + step]), groups * group), np.float32)
        part[:, :n] = flat[first : first + step]
        integers, scale = _round_groups(part.reshape(len(part), groups, group), top, shrunk)
        stored[first : first + step] = integers.reshape(len(part), -1)[:, :n]
        scales[first : first + step] = scale
    return stored.reshape(lines.shape), scales.reshape(*lines.shape[:-1], groups)


def _round_groups(
    w: NDArray[np.float32], top: int, shrunk: tuple[float, ...]
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Integers ``[l, groups, group]`` and scales ``[l, groups]`` of weights ``[l, groups, group]``."""
    widest = np.maximum(np.abs(w).max(axis=-1) / np.float32(top), np.float32(2.0**-24))
    best, least = widest, np.full(widest.shape, np.inf, np.float32)
    for share in shrunk if len(shrunk) > 1 else ():
        scale = widest * np.float32(share)
        error = _nearest(w, scale, top) * scale[..., None] - w
        square = np.einsum("lgk,lgk->lg", error, error)
        best, least = np.where(square < least, scale, best), np.minimum(square, least)
    return _nearest(w, best, top).astype(np.int8), best


def _nearest(w: NDArray[np.float32], scale: NDArray[np.float32], top: int) -> NDArray[np.float32]:
    """clip(round(w / s), -top, top), halves to even."""
    steps = w / scale[..., None]
    np.rint(steps, out=steps)
    found: NDArray[np.float32] = np.clip(steps, -top, top, out=steps)
    return found


def _array(value: ir.Value | None) -> NDArray[Any]:
    array = constant(value)
    assert array is not None
    return array


def _register(
    writer: _Writer, value: ir.Value | None, integers: NDArray[np.int8], scale: NDArray[np.float32], bits: int
) -> tuple[ir.Value, ir.Value]:
    """Integers and scales as initializers named after the weight."""
    assert value is not None
    integers = np.ascontiguousarray(integers)
    name = f"{value.name}_q"
    if bits <= 4:
        held = register(
            writer.graph, name, ir.PackedTensor(nibbles.packed(integers), ir.DataType.INT4, shape=integers.shape)
        )
    else:
        held = add_initializer(writer.graph, name, integers)
    scales = add_initializer(writer.graph, f"{held.name}_scale", np.ascontiguousarray(scale))
    writer.weights[name_of(held)] = name_of(value)
    if bits != writer.spec.weight_bits:
        writer.bits[name_of(held)] = bits
    return held, scales


def _dequantized(
    graph: ir.Graph, node: ir.Node, held: ir.Value, scales: ir.Value, attributes: list[ir.Attr]
) -> ir.Value:
    """A DequantizeLinear in front of ``node``; its zero point is 0."""
    name = fresh_name(graph, f"{held.name}_dq")
    output = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=held.shape)
    graph.insert_before(
        node, [ir.Node("", "DequantizeLinear", [held, scales], attributes, outputs=[output], name=name)]
    )
    return output


def _in_place_of(
    graph: ir.Graph, node: ir.Node, operator: str, inputs: list[ir.Value], name: str, attributes: Sequence[ir.Attr] = ()
) -> ir.Value:
    """The output of a new node in the place of ``node``, behind those that were put there before."""
    output = ir.Value(name=fresh_name(graph, name))
    graph.insert_before(node, [ir.Node("", operator, inputs, attributes, outputs=[output], name=output.name)])
    return output
