"""Integer weights of a network that computes in float, as ONNX Runtime reads them best.

A matrix product with a DequantizeLinear of its own becomes one kernel that reads the integers (MatMulNBits). An LSTM
that reads integers is an operator of ONNX Runtime's own. There is no such kernel for convolutions and other recurrent
layers: behind a DequantizeLinear they would have their weights widened at every call, and a convolution would lose the
layout it is fast in. Behind a Cast and a Mul the weights are widened once, when the file is loaded (constants are
folded), and the layer then runs as in fp32.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deploykit.hub.graph import Hub, add_initializer, attribute, constant, drop_unused, fresh_name

FUSED = ("MatMul", "Gemm")
OWN = "com.microsoft"
"""Where ONNX Runtime's own operators are."""


def stored_model(hub: Hub, dynamic: bool = False) -> tuple[ir.Model, tuple[str, ...]]:
    """The hub as this runtime reads it, and what the user should know.

    ``dynamic``: matrix products and LSTMs round their inputs to 8 bits, by the range of each call, and multiply
    integers. Convolutions do not: ConvInteger is three times as slow as a convolution in float.
    """
    assert hub.quantized is not None
    model = hub.quantized.clone()
    graph = model.graph
    widened = 0
    multiplied = _multiply_integers(graph) if dynamic else 0
    recurrent = _recur_in_integers(graph) if dynamic else 0
    if recurrent:
        model.opset_imports[OWN] = 1
    for node in [n for n in graph if n.op_type == "DequantizeLinear"]:
        if not all(user.op_type in FUSED for user, _ in node.outputs[0].uses()):
            _widen_at_load(graph, node)
            widened += 1
    drop_unused(graph)
    notes = []
    if multiplied:
        notes.append(f"{multiplied} matrix products round their inputs by the range of each call, over the whole batch")
    elif any(d.quantized and d.operator in FUSED for d in hub.decisions):
        notes.append(
            "ONNX Runtime 1.31 reads the integers of matrix products as they are and rounds their inputs to 8 bits in "
            "blocks; the session option session.qdq_matmulnbits_accuracy_level=1 keeps those in float32"
        )
    if recurrent:
        notes.append(
            f"{recurrent} LSTMs are {OWN}.DynamicQuantizeLSTM, which ONNX Runtime alone has; they round inputs and "
            "states by the range of each call, over the whole batch"
        )
    if widened:
        notes.append(
            f"ONNX Runtime widens {widened} weights of convolutions and recurrent layers to float when it loads the "
            "file, which is smaller for them, neither faster nor smaller in memory"
        )
    return model, tuple(notes)


def _multiply_integers(graph: ir.Graph) -> int:
    """``x W`` becomes ``s_x s_W (q_x - z_x) q_W``: DynamicQuantizeLinear, one for all that read x, and MatMulInteger.

    Returns:
        How many products there are of that kind.
    """
    rounded: dict[int, list[ir.Value]] = {}
    count = 0
    for node in [n for n in graph if n.op_type in FUSED]:
        dq = node.inputs[1].producer() if node.inputs[1] is not None else None
        x, old = node.inputs[0], node.outputs[0]
        if dq is None or dq.op_type != "DequantizeLinear" or "block_size" in dq.attributes or x is None:
            continue
        if node.op_type == "Gemm" and (attribute(node, "transA", 0), *_factors(node)) != (0, 1.0, 1.0):
            continue
        held, scale = dq.inputs[:2]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if id(x) not in rounded:
            rounded[id(x)] = _nodes(graph, node, "DynamicQuantizeLinear", [x], f"{x.name}_rounded", outputs=3)
        q, s, z = rounded[id(x)]
        (sums,) = _nodes(graph, node, "MatMulInteger", [q, held, z], f"{node.name}_sums")
        (real,) = _nodes(graph, node, "Cast", [sums], f"{node.name}_real", ir.AttrInt64("to", int(ir.DataType.FLOAT)))
        (steps,) = _nodes(graph, node, "Mul", [s, scale], f"{node.name}_step")
        (result,) = _nodes(graph, node, "Mul", [real, steps], f"{node.name}_product")
        if bias is not None:
            (result,) = _nodes(graph, node, "Add", [result, bias], f"{node.name}_biased")
        result.type, result.shape = old.type, old.shape
        for user, position in list(old.uses()):
            user.replace_input_with(position, result)
        for index, output in enumerate(graph.outputs):
            if output is old:
                old.name, result.name = f"{old.name}_float", old.name
                graph.outputs[index] = result
        graph.remove(node, safe=True)
        count += 1
    return count


def _recur_in_integers(graph: ir.Graph) -> int:
    """LSTM becomes DynamicQuantizeLSTM: weights [directions, inputs, 4 units], a scale per direction and column.

    Returns:
        How many there are.
    """
    count = 0
    for node in [n for n in graph if n.op_type == "LSTM" and not attribute(n, "layout", 0)]:
        dequantizers = [value.producer() if value is not None else None for value in node.inputs[1:3]]
        inputs = [*node.inputs, *[None] * (8 - len(node.inputs))]
        for position, dq in enumerate(dequantizers, 1):
            if dq is None or dq.op_type != "DequantizeLinear":
                break
            held, scale = (constant(value) for value in dq.inputs[:2])
            assert held is not None and scale is not None
            name, every = f"{node.name}.{'WR'[position - 1]}", np.tile(scale, (len(held), 1))
            inputs[position] = add_initializer(graph, name, np.ascontiguousarray(held.swapaxes(1, 2)))
            inputs.append(add_initializer(graph, f"{name}_scale", every))
            inputs.append(add_initializer(graph, f"{name}_zero", np.zeros(every.shape, np.int8)))
        else:
            results = [ir.Value(name=v.name, type=v.type, shape=v.shape) for v in node.outputs]
            known = [a for name, a in node.attributes.items() if name != "layout"]
            own = ir.Node(OWN, "DynamicQuantizeLSTM", inputs, known, outputs=results, name=node.name)
            ir.convenience.replace_nodes_and_values(graph, node, [node], [own], node.outputs, results)
            count += 1
    return count


def _factors(gemm: ir.Node) -> tuple[float, float]:
    return float(attribute(gemm, "alpha", 1.0)), float(attribute(gemm, "beta", 1.0))


def _nodes(
    graph: ir.Graph, before: ir.Node, operator: str, inputs: list[ir.Value | None], name: str, *attributes: ir.Attr,
    outputs: int = 1,
) -> list[ir.Value]:  # fmt: skip
    """The outputs of a new node."""
    values = [ir.Value(name=fresh_name(graph, name)) for _ in range(outputs)]
    graph.insert_before(before, [ir.Node("", operator, inputs, attributes, outputs=values, name=values[0].name)])
    return values


def _widen_at_load(graph: ir.Graph, dq: ir.Node) -> None:
    """Cast and Mul, of constants alone, in place of a DequantizeLinear with one scale per index of its axis."""
    held, old = dq.inputs[0], dq.outputs[0]
    scale = constant(dq.inputs[1])
    assert held is not None and held.shape is not None and scale is not None
    axis = attribute(dq, "axis", 1)
    wide = scale.reshape([-1 if i == axis else 1 for i in range(len(held.shape))])
    scales = add_initializer(graph, f"{held.name}_wide_scale", np.ascontiguousarray(wide))
    values = [ir.Value(name=fresh_name(graph, f"{old.name}_{kind}")) for kind in ("cast", "mul")]
    cast = ir.Node(
        "", "Cast", [held], [ir.AttrInt64("to", int(ir.DataType.FLOAT))], outputs=values[:1], name=values[0].name
    )
    times = ir.Node("", "Mul", [values[0], scales], outputs=values[1:], name=values[1].name)
    graph.insert_before(dq, [cast, times])
    for user, position in list(old.uses()):
        user.replace_input_with(position, values[1])
    graph.remove(dq, safe=True)
