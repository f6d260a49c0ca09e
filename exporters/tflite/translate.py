"""Walks an ONNX graph, float or with Q/DQ, and writes it operator by operator through the translation table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np
import onnx_ir as ir

from deploykit.core.artifact import Island
from deploykit.core.errors import DeploykitError
from deploykit.exporters.tflite import layout
from deploykit.exporters.tflite.layout import NHWC, View, identity, stored
from deploykit.exporters.tflite.operation import (
    Constant,
    Limits,
    Operation,
    Unsupported,
    read,
    requantize,
    static_shape,
)
from deploykit.exporters.tflite.operators import TABLE, Rule
from deploykit.exporters.tflite.runner import METADATA
from deploykit.exporters.tflite.writer import Quant, Tensor, Writer
from deploykit.hub.graph import attribute, constant


@dataclass(frozen=True)
class Translated:
    """A written model and what became of its operators."""

    data: bytes
    kinds: tuple[str, ...]
    """The builtin operators of the file, in order."""
    quantized: Mapping[str, int]
    """How many ONNX operators of each kind are integer."""
    islands: tuple[Island, ...]


def translate(model: ir.Model, half: bool = False, reasons: Mapping[str, str] | None = None) -> Translated:
    """The .tflite form of an ONNX graph, batch 1, images channels-last.

    Args:
        model: float graph, or hub: operators between DequantizeLinear and QuantizeLinear become int8, with the hub's
            scales; uint8 becomes int8 by moving zero points by 128.
        half: store float weights as float16.
        reasons: layer -> why the hub left it in float, for the report.

    Raises:
        DeploykitError: names every operator that cannot be written.
    """
    return _Translation(model.graph, half, reasons or {}).run()


@dataclass
class _Translation:
    graph: ir.Graph
    half: bool
    reasons: Mapping[str, str]
    values: dict[ir.Value, View | Constant] = field(default_factory=dict)
    fused: set[ir.Node] = field(default_factory=set)
    quantized: Counter[str] = field(default_factory=Counter)
    islands: list[Island] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def run(self) -> Translated:
        self.writer = Writer(reserved=[v.name or "" for v in self.graph.outputs])
        self.has_integers = any(node.op_type == "QuantizeLinear" for node in self.graph)
        inputs = [tensor for v in self.graph.inputs if (tensor := self._input(v)) is not None]
        for node in self.graph:
            if node not in self.fused:
                self._node(node)
        if self.complaints:
            raise DeploykitError(
                "this model cannot be written as .tflite:\n  " + "\n  ".join(self.complaints) + "\n"
                "Change these operators in the model, or choose a target with another exporter (x86 runs any of them)."
            )
        outputs: list[Tensor] = []
        orders = []
        for value in self.graph.outputs:
            tensor, order = self._output(value, [*inputs, *outputs])
            outputs.append(tensor)
            orders.append(order)
        metadata = {
            "inputs": [
                _described(v, NHWC if len(t.shape) == 4 else identity(len(t.shape)))
                for v, t in zip(self.graph.inputs, inputs, strict=True)
            ],
            "outputs": [_described(v, order) for v, order in zip(self.graph.outputs, orders, strict=True)],
        }
        data = self.writer.finish(inputs, outputs, {METADATA: metadata})
        return Translated(data, tuple(self.writer.kinds), dict(sorted(self.quantized.items())), tuple(self.islands))

    def _input(self, value: ir.Value) -> Tensor | None:
        """Declares a graph input: int8 where it is only read through one quantization."""
        try:
            shape = static_shape(value)
            if value.dtype not in (None, ir.DataType.FLOAT):
                raise Unsupported(f"it holds {value.dtype}; only float inputs are supported")
        except Unsupported as error:
            self.complaints.append(f"input '{value.name}': {error}")
            return None
        order = NHWC if len(shape) == 4 else identity(len(shape))
        quants = {_quant_of(user) if user.op_type == "QuantizeLinear" else None for user, _ in value.uses()}
        quant = quants.pop() if len(quants) == 1 and not value.is_graph_output() else None
        dtype = "int8" if quant else "float32"
        tensor = self.writer.tensor(value.name or "input", layout.permuted(shape, order), dtype, quant)
        self.values[value] = stored(tensor, shape, order)
        return tensor

    def _output(self, value: ir.Value, taken: Sequence[Tensor]) -> tuple[Tensor, layout.Order]:
        """A graph output's tensor, under its own name: images channels-last, everything else in ONNX's order."""
        view = self._operand(value)
        if not isinstance(view, View):
            raise DeploykitError(f"the model's output '{value.name}' is a constant")
        rank = len(view.shape)
        order = layout.natural(view)
        if order not in (NHWC, identity(rank)):
            order = NHWC if rank == 4 else identity(rank)
        assert order is not None
        tensor = read(self.writer, view, order)
        while tensor.index in {t.index for t in taken}:
            indices = self.writer.indices(f"{value.name}_shape", tensor.shape)
            tensor = self.writer.write("RESHAPE", [tensor, indices], f"{value.name}_copy", tensor.shape, tensor.quant)
        self.writer.rename(tensor, value.name or "output")
        return tensor, order

    def _node(self, node: ir.Node) -> None:
        try:
            if node.op_type == "QuantizeLinear":
                self.values[node.outputs[0]] = self._quantize(node)
            elif node.op_type == "DequantizeLinear":
                self.values[node.outputs[0]] = self._dequantize(node)
            elif node.outputs[0].dtype in (None, ir.DataType.FLOAT):
                self._operation(node)  # the others compute shapes, which are known here
        except Unsupported as error:
            self.complaints.append(f"{node.name or node.outputs[0].name} ({node.op_type}): {error}")
            for value in node.outputs:
                self._stand_in(value)

    def _stand_in(self, value: ir.Value) -> None:
        """Something in place of a result that could not be written, so that what follows is looked at too."""
        try:
            shape = static_shape(value)
        except Unsupported:
            shape = (1,)
        order = NHWC if len(shape) == 4 else identity(len(shape))
        self.values[value] = stored(
            self.writer.tensor("missing", layout.permuted(shape, order), "float32"), shape, order
        )

    def _quantize(self, node: ir.Node) -> View:
        view = self._operand(node.inputs[0])
        if not isinstance(view, View):
            raise Unsupported("it quantizes a constant")
        name = node.outputs[0].name or "quantized"
        return view.on(requantize(self.writer, view.tensor, _quant_of(node), name))

    def _dequantize(self, node: ir.Node) -> View | Constant:
        held = constant(node.inputs[0])
        if held is None:
            operand = self._operand(node.inputs[0])
            assert operand is not None
            return operand
        quant = _quant_of(node)
        return Constant((held.astype(np.int16) - 128).astype(np.int8) if held.dtype == np.uint8 else held, quant)

    def _operation(self, node: ir.Node) -> None:
        rule = TABLE.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if rule is None:
            raise Unsupported("there is no rule for it")
        given = node.inputs if rule.operands is None else node.inputs[: rule.operands]
        operands = tuple(self._operand(v) for v in given)
        tail, limits = _tail(node) if rule.fuses else (None, None)
        last = tail or node
        quant, why = self._scale(node, rule, operands, last)
        if quant is None:
            operands = tuple(self._real(o) for o in operands)
        result = last.outputs[0]
        op = Operation(node, result.name or node.name or "", self.writer, operands, quant, limits, self.half)
        made = rule.write(op)
        views = [made] if isinstance(made, View) else list(made)
        for value, view in zip(last.outputs, views, strict=False):
            self.values[value] = view
        if tail is not None:
            self.fused.add(tail)
        if quant is not None:
            self.quantized[node.op_type] += 1
        elif self.has_integers and rule.scale == "own":
            self.islands.append(Island(node.op_type, node.name or "", why))

    def _scale(
        self, node: ir.Node, rule: Rule, operands: Sequence[View | Constant | None], last: ir.Node
    ) -> tuple[Quant | None, str]:
        """The scale of an operator's integer result; None, and why, where it has to be computed in float."""
        quants = [_quant(o) for o in operands if o is not None]
        if rule.scale == "input":
            return quants[0], ""
        known = self.reasons.get(node.name or "", "")
        if rule.float_only:
            return None, rule.float_only
        if None in quants:
            return None, known or "one of its inputs is not quantized"
        readers = list(last.outputs[0].uses())
        found = {_quant_of(user) for user, _ in readers if user.op_type == "QuantizeLinear"}
        floats = last.outputs[0].is_graph_output() or any(user.op_type != "QuantizeLinear" for user, _ in readers)
        if len(found) != 1 or floats:
            return None, known or "its result is not quantized"
        return found.pop(), ""

    def _operand(self, value: ir.Value | None) -> View | Constant | None:
        if value is None:
            return None
        if value in self.values:
            return self.values[value]
        held = constant(value)
        if held is None:
            raise Unsupported(f"its input '{value.name}' is not known")
        return Constant(held)

    def _real(self, operand: View | Constant | None) -> View | Constant | None:
        """The operand as float32."""
        if not isinstance(operand, View) or operand.tensor.quant is None:
            return operand
        tensor = operand.tensor
        return operand.on(self.writer.write("DEQUANTIZE", [tensor], f"{tensor.name}_real", tensor.shape))


def _tail(node: ir.Node) -> tuple[ir.Node | None, Limits | None]:
    """The Relu or Clip (with constant limits) that alone reads a node's only result, and its limits."""
    value = node.outputs[0]
    readers = [user for user, _ in value.uses()]
    if len(readers) != 1 or value.is_graph_output():
        return None, None
    tail = readers[0]
    if tail.op_type == "Relu":
        return tail, (0.0, inf)
    if tail.op_type != "Clip":
        return None, None
    bounds = [constant(v) for v in tail.inputs[1:3]]
    if any(v is not None and b is None for v, b in zip(tail.inputs[1:3], bounds, strict=True)):
        return None, None
    low, high = (*bounds, None, None)[:2]
    return tail, (-inf if low is None else float(low.item()), inf if high is None else float(high.item()))


def _quant(operand: View | Constant) -> Quant | None:
    return operand.tensor.quant if isinstance(operand, View) else operand.quant


def _quant_of(node: ir.Node) -> Quant:
    """The quantization of a Q or DQ node for int8 storage; per-channel scales that are all equal become one."""
    scale, zero = constant(node.inputs[1]), constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if scale is None or (len(node.inputs) > 2 and zero is None):
        raise Unsupported("its scale is computed at run time")
    zeros = np.zeros(1, np.uint8) if zero is None else zero
    if zeros.dtype not in (np.uint8, np.int8, np.int32):
        raise Unsupported(f"{zeros.dtype} integers")
    shifted = set((zeros.astype(np.int64) - (128 if zeros.dtype == np.uint8 else 0)).ravel().tolist())
    scales = tuple(scale.astype(np.float32).ravel().tolist())
    if len(set(scales)) == 1:
        scales = scales[:1]
    if len(shifted) != 1 or (len(scales) > 1 and shifted != {0}):
        raise Unsupported("per-channel zero points other than 0")
    return Quant(scales, shifted.pop(), attribute(node, "axis", 1) if len(scales) > 1 else 0)


def _described(value: ir.Value, order: layout.Order) -> dict[str, object]:
    assert value.shape is not None
    return {
        "name": value.name,
        "order": list(order),
        "batched": not isinstance(value.shape[0], int) if len(value.shape) else False,
    }
