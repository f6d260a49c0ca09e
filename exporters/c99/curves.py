"""Functions of one number become tables: what a float operator does to each of the 256 integers, in ONNX Runtime.

So Sigmoid, HardSwish, Tanh, Gelu, a Relu on its own, x * constant and chains of them are integer on a device without
floats, and exact: the table holds what the hub computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

from deploykit.exporters.c99.operation import Constant, Curve
from deploykit.exporters.c99.program import Tensor
from deploykit.exporters.layout import View
from deploykit.hub.running import session

if TYPE_CHECKING:
    from numpy.typing import NDArray

ELEMENTWISE = frozenset({
    "Abs", "Add", "Ceil", "Celu", "Clip", "Cos", "Div", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow", "Reciprocal",
    "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Tanh",
    "ThresholdedRelu",
})  # fmt: skip

Operand = View[Tensor] | Constant | Curve | None


def curve(node: ir.Node, operands: Sequence[Operand], opset: int) -> Curve | None:
    """The result of an elementwise operator whose operands all depend on one tensor; None where that is not so.

    Args:
        node: the operator.
        operands: one per input. Constants are single numbers, or one per index of one axis.
        opset: of the graph.
    """
    if node.op_type not in ELEMENTWISE or node.domain not in ("", "ai.onnx"):
        return None
    curves = [as_curve(o) for o in operands if isinstance(o, (View, Curve))]
    if not curves or any(not _same(c.view, curves[0].view) for c in curves):
        return None
    view = curves[0].view
    axes = {c.axis for c in curves if c.values.shape[1] > 1}
    columns: list[NDArray[np.float32] | None] = []
    for operand in operands:
        if isinstance(operand, Constant):
            wide = [a for a, size in enumerate(operand.values.shape) if size > 1]
            if len(wide) > 1 or operand.values.ndim > len(view.shape):
                return None
            axes |= {a + len(view.shape) - operand.values.ndim for a in wide}
            # limits of Clip have to stay without axes
            columns.append(operand.real.reshape((1, -1) if wide else ()))
        else:
            columns.append(None if operand is None else as_curve(operand).values)
    if len(axes) > 1:
        return None
    axis = axes.pop() if axes else 0
    sizes = {c.shape[1] for c in columns if c is not None and c.ndim == 2} - {1}
    if sizes and sizes != {view.shape[axis]}:
        return None
    return Curve(view, _computed(node, columns, opset), axis)


def as_curve(operand: View[Tensor] | Curve) -> Curve:
    """What a tensor's integers stand for."""
    if isinstance(operand, Curve):
        return operand
    quant = operand.tensor.quant
    integers = np.arange(-128, 128)[:, None] - quant.zero_point
    return Curve(operand, integers.astype(np.float32) * np.float32(quant.scale))


def _same(one: View[Tensor], other: View[Tensor]) -> bool:
    return (one.tensor, one.shape, one.order) == (other.tensor, other.shape, other.order)


def _computed(node: ir.Node, columns: Sequence[NDArray[np.float32] | None], opset: int) -> NDArray[np.float32]:
    """``[256, channels]``"""
    proto = ir.serde.serialize_node(node)
    del proto.output[1:]
    names = [f"x{i}" if column is not None else "" for i, column in enumerate(columns)]
    proto.input[:] = names
    feeds = {name: column for name, column in zip(names, columns, strict=True) if column is not None}
    floats = onnx.TensorProto.FLOAT
    inputs = [onnx.helper.make_tensor_value_info(n, floats, a.shape) for n, a in feeds.items()]
    output = onnx.helper.make_tensor_value_info(proto.output[0], floats, None)
    graph = onnx.helper.make_graph([proto], "curve", inputs, [output])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    (found,) = session(model, optimize=False).run(None, feeds)
    return np.asarray(found, np.float32)
