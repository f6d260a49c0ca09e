"""One way to say each thing: rewrites of a float graph that compute the same with fewer kinds of operators.

What is gone afterwards needs no rule in the operator table and none in any exporter: divisions by constants, squares by
Pow, a Gemm's factors, normalisations that stand alone, picking one position by Gather, repeating what is broadcast
anyway, states of recurrent layers that are zero, shapes that are computed although they are known.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
import onnx_ir as ir

from deploykit.core.errors import DeploykitError
from deploykit.hub.graph import add_initializer, attribute, constant, fresh_name

Dim = int | str | None
"""A size: known, free under a name, or not known at all."""
BROADCASTING = frozenset({"Add", "Sub", "Mul", "Div"})
RECURRENT_STATES = {"LSTM": (5, 6), "GRU": (5,), "RNN": (5,)}
"""Positions of the initial states; a state that is left out is zero."""
REARRANGING = frozenset(
    {"Expand", "Reshape", "Slice", "Transpose", "Unsqueeze", "Squeeze", "Identity", "ConstantOfShape"}
)
WINDOWS = ("Conv", "MaxPool", "AveragePool")
LAST = np.iinfo(np.int64).max


def canonical(graph: ir.Graph) -> None:
    """Rewrites the graph in place; nodes have names and constants are initializers."""
    for rule in RULES:
        for node in list(graph):
            if node.graph is graph and node.domain in ("", "ai.onnx"):
                rule(graph, node)


def computed_shapes(graph: ir.Graph) -> int:
    """How many operators take a shape that is computed while the model runs."""
    return sum(node.op_type in ("Reshape", "Expand") and constant(node.inputs[1]) is None for node in graph)


def _known_shape(graph: ir.Graph, node: ir.Node) -> None:
    """The shape that a Reshape or Expand computes becomes a constant where at most the batch is free."""
    if node.op_type not in ("Reshape", "Expand") or constant(node.inputs[1]) is not None:
        return
    sizes = elements(node.inputs[1])
    if sizes is None:
        return
    result = node.outputs[0]
    if node.op_type == "Reshape":
        free = [i for i, size in enumerate(sizes) if not isinstance(size, int) or size == -1]
        if len(free) > 1 or 0 in sizes:
            return
        held = [-1 if i in free else size for i, size in enumerate(sizes)]
        left = _left_over(node.inputs[0], sizes)
        result.shape = ir.Shape([left if size == -1 else size for size in sizes])
    else:
        x = node.inputs[0]
        if x is None or x.shape is None:
            return
        before: list[Dim] = [*[1] * (len(sizes) - len(x.shape)), *dims(x)]
        held = [size if isinstance(size, int) else 1 for size in sizes]  # 1 keeps what is there
        if any(not isinstance(size, int) and size != old for size, old in zip(sizes, before, strict=True)):
            return
        result.shape = ir.Shape([old if size == 1 else size for size, old in zip(sizes, before, strict=True)])
    node.replace_input_with(1, add_initializer(graph, f"{node.name}.shape", np.asarray(held, np.int64)))
    node.attributes.pop("allowzero", None)


def _known_scales(graph: ir.Graph, node: ir.Node) -> None:
    """The sizes that a Resize computes become constant factors where those give the same sizes."""
    if node.op_type != "Resize" or len(node.inputs) < 4 or node.attributes.get("axes") is not None:
        return
    if attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        return
    x, sizes = node.inputs[0], elements(node.inputs[3])
    if constant(node.inputs[3]) is not None or sizes is None or x is None or x.shape is None:
        return
    before = dims(x)
    factors = [1.0 if a == b else b / a if isinstance(a, int) and isinstance(b, int) else 0.0
               for a, b in zip(before, sizes, strict=True)]  # fmt: skip
    scales = np.asarray(factors, np.float32)
    same = [
        int(np.floor(n * s)) == size for n, s, size in zip(before, scales, sizes, strict=True) if isinstance(n, int)
    ]
    if not scales.all() or not all(same):
        return
    node.replace_input_with(2, add_initializer(graph, f"{node.name}.scales", scales))
    node.resize_inputs(3)
    node.outputs[0].shape = ir.Shape(sizes)


def _left_over(value: ir.Value | None, sizes: list[Dim]) -> Dim:
    """The size that -1 stands for in a reshape of ``value``; None where it is not a plain number."""
    whole = None if value is None or value.shape is None else dims(value)
    if whole is None or not all(isinstance(d, int) for d in whole):
        return None
    known = prod(s for s in sizes if isinstance(s, int) and s > 0)
    return prod(d for d in whole if isinstance(d, int)) // max(known, 1)


def elements(value: ir.Value | None) -> list[Dim] | None:
    """What a vector of sizes holds, as far as the shapes of the graph say it."""
    held = constant(value)
    if held is not None:
        return [int(v) for v in held.reshape(-1)] if held.dtype.kind == "i" else None
    node = value.producer() if value is not None else None
    if node is None:
        return None
    if node.op_type == "Shape":
        x = node.inputs[0]
        if x is None or x.shape is None:
            return None
        return dims(x)[attribute(node, "start", 0) : attribute(node, "end", len(x.shape))]
    parts = [elements(v) for v in node.inputs]
    if any(part is None for part in parts):
        return None
    first, *rest = [part for part in parts if part is not None]
    if node.op_type == "Concat":
        return [size for part in (first, *rest) for size in part]
    if node.op_type == "Cast" and attribute(node, "to") not in (int(ir.DataType.INT64), int(ir.DataType.INT32)):
        return None  # a size times a fraction is rounded somewhere, and where is not known here
    if node.op_type in ("Squeeze", "Unsqueeze", "Reshape", "Cast", "Identity"):
        return first
    if node.op_type == "Slice":
        start, stop, step = rest[0][0], rest[1][0], rest[3][0] if len(rest) > 3 else 1
        if isinstance(start, int) and isinstance(stop, int) and isinstance(step, int):
            return first[start:stop:step]
    if node.op_type == "Gather" and all(isinstance(i, int) for i in rest[0]):
        return [first[i] for i in rest[0] if isinstance(i, int)]
    if node.op_type == "Mul" and len(first) == len(rest[0]):
        return [_product(a, b) for a, b in zip(first, rest[0], strict=True)]
    return None


def _product(a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    return b if a == 1 else a if b == 1 else None


def dims(value: ir.Value) -> list[Dim]:
    """The sizes of a value."""
    assert value.shape is not None
    return [d if isinstance(d, int) else d.value for d in value.shape]


def _transposed_matrices(graph: ir.Graph, node: ir.Node) -> None:
    """Reshape to [-1, t, d], swap the last two axes, reshape to [..., d, t]: one Transpose (torch's attention)."""
    swap = node.inputs[0].producer() if node.op_type == "Reshape" and node.inputs[0] is not None else None
    first = swap.inputs[0].producer() if swap is not None and swap.inputs[0] is not None else None
    if swap is None or first is None or (swap.op_type, first.op_type) != ("Transpose", "Reshape"):
        return
    x, out = first.inputs[0], node.outputs[0]
    if x is None or x.shape is None or out.shape is None or attribute(swap, "perm") != [0, 2, 1]:
        return
    flat = elements(first.inputs[1])
    before, after = dims(x), dims(out)
    if flat is None or len(before) < 3 or flat[0] != -1 or flat[1:] != before[-2:] or None in before[-2:]:
        return
    if after != [*before[:-2], before[-1], before[-2]]:
        return
    axes = [*range(len(before) - 2), len(before) - 1, len(before) - 2]
    node.op_type = "Transpose"
    node.resize_inputs(1)
    node.replace_input_with(0, x)
    node.attributes.clear()
    node.attributes["perm"] = ir.AttrInt64s("perm", axes)


def _needless_expand(graph: ir.Graph, node: ir.Node) -> None:
    """Repeating an operand of +, -, * or / to the size of the other one, which happens anyway."""
    if node.op_type != "Expand" or node.outputs[0].is_graph_output() or node.outputs[0].shape is None:
        return
    wanted = dims(node.outputs[0])
    for reader, position in list(node.outputs[0].uses()):
        if reader.op_type not in BROADCASTING:
            continue
        other = reader.inputs[1 - position]
        if other is not None and other.shape is not None and None not in wanted and dims(other) == wanted:
            reader.replace_input_with(position, node.inputs[0])


def _one_position(graph: ir.Graph, node: ir.Node) -> None:
    """Gather of one constant position of an activation is a Slice and a Squeeze."""
    index, x = constant(node.inputs[1]) if node.op_type == "Gather" else None, node.inputs[0]
    if index is None or index.ndim != 0 or x is None or constant(x) is not None or x.dtype != ir.DataType.FLOAT:
        return
    axis, at = attribute(node, "axis", 0), int(index)
    corners = [np.asarray([v], np.int64) for v in (at, LAST if at == -1 else at + 1, axis)]
    held = [
        add_initializer(graph, f"{node.name}.{what}", values)
        for what, values in zip(("from", "to", "axis"), corners, strict=True)
    ]
    name = fresh_name(graph, f"{node.name}.slice")
    part = ir.Value(name=name, type=x.type)
    if x.shape is not None:
        kept = dims(x)
        kept[axis] = 1
        part.shape = ir.Shape(kept)
    cut = ir.Node("", "Slice", [x, *held], outputs=[part], name=name)
    cut.metadata_props.update(node.metadata_props)
    graph.insert_before(node, [cut])
    node.op_type = "Squeeze"
    node.attributes.clear()
    node.replace_input_with(0, part)
    node.replace_input_with(1, held[2])


def _largest_of_image(graph: ir.Graph, node: ir.Node) -> None:
    """The largest value of every channel ``[n, c, ...]`` is a MaxPool with a window as large as the image."""
    x = node.inputs[0] if node.op_type in ("ReduceMax", "GlobalMaxPool") else None
    if x is None or x.shape is None or x.dtype != ir.DataType.FLOAT or len(x.shape) not in (3, 4):
        return
    window, inner = [size for size in dims(x)[2:] if isinstance(size, int)], range(2, len(x.shape))
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    reduced = list(inner) if node.op_type == "GlobalMaxPool" else [] if axes is None else axes.reshape(-1).tolist()
    if len(window) < len(inner) or sorted(axis % len(x.shape) for axis in reduced) != list(inner):
        return
    window_attribute = ir.AttrInt64s("kernel_shape", window)
    if node.op_type == "GlobalMaxPool" or attribute(node, "keepdims", 1):
        node.op_type = "MaxPool"
        node.attributes.clear()
        node.attributes["kernel_shape"] = window_attribute
        node.resize_inputs(1)
        return
    name = fresh_name(graph, f"{node.name}.window")
    pooled = ir.Value(name=name, type=x.type, shape=ir.Shape([*dims(x)[:2], *[1] * len(inner)]))
    pool = ir.Node("", "MaxPool", [x], [window_attribute], outputs=[pooled], name=name)
    pool.metadata_props.update(node.metadata_props)
    graph.insert_before(node, [pool])
    node.op_type = "Squeeze"
    node.attributes.clear()
    node.replace_input_with(0, pooled)
    node.replace_input_with(1, add_initializer(graph, f"{node.name}.axes", np.asarray(inner, np.int64)))


def _zero_states(graph: ir.Graph, node: ir.Node) -> None:
    """Initial states that are zero are left out."""
    for position in RECURRENT_STATES.get(node.op_type, ()):
        if position < len(node.inputs) and _is_zero(node.inputs[position]):
            node.replace_input_with(position, None)
    while node.op_type in RECURRENT_STATES and node.inputs and node.inputs[-1] is None:
        node.resize_inputs(len(node.inputs) - 1)


def _is_zero(value: ir.Value | None) -> bool:
    """Whether a value is zero throughout: made of zeros by operators that only rearrange and repeat."""
    held = constant(value)
    if held is not None:
        return not held.any()
    node = value.producer() if value is not None else None
    if node is None or node.op_type not in REARRANGING:
        return False
    if node.op_type == "ConstantOfShape":
        fill = node.attributes.get("value")
        return fill is None or not fill.as_tensor().numpy().any()
    return _is_zero(node.inputs[0])


def _square(graph: ir.Graph, node: ir.Node) -> None:
    """x ** 2 is x * x."""
    power = constant(node.inputs[1]) if node.op_type == "Pow" else None
    if power is not None and power.size == 1 and float(power.item()) == 2.0:
        node.op_type = "Mul"
        node.replace_input_with(1, node.inputs[0])


def _multiply_instead_of_dividing(graph: ir.Graph, node: ir.Node) -> None:
    """x / c becomes x * (1/c): integer kernels multiply, few divide."""
    divisor = constant(node.inputs[1]) if node.op_type == "Div" else None
    if divisor is None or divisor.dtype != np.float32 or not divisor.all():
        return
    node.op_type = "Mul"
    node.replace_input_with(1, add_initializer(graph, f"{node.name}.inverse", np.float32(1) / divisor))


def _explicit_pads(graph: ir.Graph, node: ir.Node) -> None:
    """Padding that a window works out by itself (auto_pad) is written down, where the sizes of its input are known."""
    mode = attribute(node, "auto_pad", "NOTSET")
    if node.op_type not in WINDOWS or mode == "NOTSET":
        return
    x, weight = node.inputs[0], node.inputs[1] if node.op_type == "Conv" else None
    kernel = attribute(node, "kernel_shape") or (dims(weight)[2:] if weight is not None and weight.shape else None)
    sizes = dims(x)[2:] if x is not None and x.shape is not None else [None]
    known = [size for size in sizes if isinstance(size, int)]
    if kernel is None or len(known) < len(kernel) or not all(isinstance(size, int) for size in kernel):
        return
    strides, dilations = (attribute(node, name) or [1] * len(kernel) for name in ("strides", "dilations"))
    front, back = [], []
    for n, k, s, d in zip(known, kernel, strides, dilations, strict=True):
        missing = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0) if mode != "VALID" else 0
        front.append(missing // 2 if mode == "SAME_UPPER" else missing - missing // 2)
        back.append(missing - front[-1])
    node.attributes.pop("auto_pad")
    node.attributes["pads"] = ir.AttrInt64s("pads", [*front, *back])


def _plain_product(graph: ir.Graph, node: ir.Node) -> None:
    """A Gemm's factors alpha and beta go into its constants and what it turns is turned in front of it, so that nobody
    else has to know them."""
    if node.op_type != "Gemm":
        return
    x = node.inputs[0]
    if attribute(node, "transA", 0) and x is not None and constant(x) is None:
        name = fresh_name(graph, f"{node.name}.turned")
        turned = ir.Value(name=name, type=x.type)
        if x.shape is not None:
            turned.shape = ir.Shape(dims(x)[::-1])
        turn = ir.Node("", "Transpose", [x], [ir.AttrInt64s("perm", [1, 0])], outputs=[turned], name=name)
        turn.metadata_props.update(node.metadata_props)
        graph.insert_before(node, [turn])
        node.replace_input_with(0, turned)
        node.attributes["transA"] = ir.AttrInt64("transA", 0)
    for position, name in ((1, "alpha"), (2, "beta")):
        factor = attribute(node, name, 1.0)
        value = node.inputs[position] if len(node.inputs) > position else None
        array = constant(value)
        if factor != 1.0 and value is not None and array is not None:
            scaled = add_initializer(graph, f"{value.name}_times_{name}", np.float32(factor) * array)
            node.replace_input_with(position, scaled)
            node.attributes[name] = ir.AttrFloat32(name, 1.0)


def _normalisation(graph: ir.Graph, node: ir.Node) -> None:
    """A batch norm that no convolution could absorb, y = s x + t per channel.

    On images and series it is a depthwise convolution with a kernel of one element, which has a scale per channel and
    an exact bias. On vectors it goes into the product that alone reads it. In front of everything it stays: columns of
    data keep their units there, and no single scale holds ages beside incomes.
    """
    if node.op_type != "BatchNormalization":
        return
    x, held = node.inputs[0], [constant(v) for v in node.inputs[1:5]]
    rank = len(x.shape) if x is not None and x.shape is not None else 0
    if x is None or any(h is None for h in held) or rank < 2:
        return
    gamma, beta, mean, variance = (np.asarray(h, np.float64) for h in held)
    s = gamma / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    t = beta - mean * s
    if rank == 2:
        if x.is_graph_input():
            _plain_normalisation(graph, node, s, t)
        else:
            _into_product(graph, node, s, t)
        return
    kernel = [1] * (rank - 2)
    weight = add_initializer(graph, f"{node.name}.weight", s.reshape(-1, 1, *kernel).astype(np.float32))
    bias = add_initializer(graph, f"{node.name}.bias", t.astype(np.float32))
    node.op_type = "Conv"
    node.resize_inputs(3)
    node.replace_input_with(1, weight)
    node.replace_input_with(2, bias)
    node.attributes.clear()
    node.attributes["group"] = ir.AttrInt64("group", len(s))
    node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", kernel)


def _plain_normalisation(graph: ir.Graph, node: ir.Node, s: np.ndarray, t: np.ndarray) -> None:
    """Mean 0 and variance 1: variances of data in the thousands do not fit into float16, the factor s does."""
    unit = np.full_like(s, 1.0 - attribute(node, "epsilon", 1e-5))
    for position, values in enumerate((s, t, np.zeros_like(s), unit), start=1):
        _set_constant(graph, node, position, values)


def _into_product(graph: ir.Graph, node: ir.Node, s: np.ndarray, t: np.ndarray) -> None:
    """W (s x + t) + b = (W s) x + (W t + b)."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or node.outputs[0].is_graph_output() or uses[0][0].op_type != "Gemm" or uses[0][1] != 0:
        return
    gemm = uses[0][0]
    weight, bias = constant(gemm.inputs[1]), constant(gemm.inputs[2]) if len(gemm.inputs) > 2 else None
    if weight is None or attribute(gemm, "transA", 0) or (bias is None and len(gemm.inputs) > 2):
        return
    rows = weight if attribute(gemm, "transB", 0) else weight.T
    shift = rows.astype(np.float64) @ t + (0.0 if bias is None else bias)
    scaled = rows * s
    made = scaled if attribute(gemm, "transB", 0) else scaled.T
    gemm.resize_inputs(3)
    gemm.replace_input_with(0, node.inputs[0])
    _set_constant(graph, gemm, 1, made)
    _set_constant(graph, gemm, 2, shift)


def _set_constant(graph: ir.Graph, node: ir.Node, position: int, array: np.ndarray) -> None:
    """Another constant operand; it keeps the name (and so the mask) of one that nobody else reads."""
    old, values = node.inputs[position], array.astype(np.float32)
    if old is not None and len(list(old.uses())) == 1:
        old.const_value = ir.tensor(values, name=old.name)
        return
    name = old.name if old is not None else f"{node.name}.bias"
    node.replace_input_with(position, add_initializer(graph, name or "constant", values))


Rule = Callable[[ir.Graph, ir.Node], None]
RULES: tuple[Rule, ...] = (
    _explicit_pads,
    _known_shape,
    _known_scales,
    _transposed_matrices,
    _largest_of_image,
    _zero_states,
    _needless_expand,
    _one_position,
    _square,
    _multiply_instead_of_dividing,
    _plain_product,
    _normalisation,
)


def refuse_branches(graph: ir.Graph) -> None:
    """Raises for operators that hold graphs of their own: which one runs is decided by the data.

    Raises:
        DeploykitError: names them all.
    """
    held = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    found = [f"{n.op_type} '{n.name}'" for n in graph if any(a.type in held for a in n.attributes.values())]
    if found:
        raise DeploykitError(
            f"the model branches or loops on its data ({', '.join(found)}); every operator has to run on every input. "
            "Write it with torch.where, or export the branch that runs."
        )


def refuse_passing_through(graph: ir.Graph) -> None:
    """Raises for inputs that are outputs under the same name: there would be two values of that name, one quantized."""
    found = [f"'{v.name}'" for v in graph.outputs if v.is_graph_input()]
    if found:
        raise DeploykitError(f"output {', '.join(found)} of the model is its own input; leave it out")
