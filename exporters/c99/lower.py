"""Lowers the hub to an integer `Program`: walks the Q/DQ graph once, operator by operator, batch 1.

Scales never change. uint8 becomes int8 by moving zero points by 128, images are stored channels-last, and a Relu or
Clip becomes the limits of what it was fused with. What has no integer form is refused: nothing falls back to float.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import onnx_ir as ir

from deploykit.core.errors import DeploykitError
from deploykit.exporters import layout
from deploykit.exporters.c99 import program
from deploykit.exporters.c99.curves import ELEMENTWISE, Operand, as_curve, curve
from deploykit.exporters.c99.operation import Builder, Constant, Curve, Operation
from deploykit.exporters.c99.operators import TABLE, Rule
from deploykit.exporters.c99.program import Port, Program, Quant, Tensor
from deploykit.exporters.c99.rounding import Rounding
from deploykit.exporters.layout import NHWC, Order, View, identity
from deploykit.exporters.one_sample import Limits, Unsupported, static_shape, tail
from deploykit.hub.graph import attribute, constant

SLIDES = ("Conv", "ConvTranspose", "MaxPool", "AveragePool")
"""Operators that read images channels-last."""

ANY: Limits = (-inf, inf)
PIXELS = Quant(1.0, -128)
"""What uint8 pixels are as int8."""

ADVICE = (
    "Every operator has to be integer on this target. Change these in the model, leave them to the code around it, or "
    "choose a target that can run floats (mobile-arm, x86)."
)


@dataclass(frozen=True)
class Lowered:
    """A program and how many ONNX operators of each kind became part of it."""

    program: Program
    operators: Mapping[str, int]


def lower(model: ir.Model, rounding: Rounding, reasons: Mapping[str, str] | None = None) -> Lowered:
    """The integer program of a Q/DQ graph.

    Args:
        model: the hub's quantized graph; not changed.
        rounding: how sums are brought to the result's scale.
        reasons: layer -> why the hub left it in float.

    Raises:
        DeploykitError: names every operator that has no integer form, and why.
    """
    return _Lowering(model, rounding, reasons or {}).run()


class _Lowering:
    def __init__(self, model: ir.Model, rounding: Rounding, reasons: Mapping[str, str]) -> None:
        self.graph, self.opset, self.reasons = model.graph, model.opset_imports[""], reasons
        self.builder = Builder(rounding)
        self.values: dict[ir.Value, Operand] = {}
        self.fused: set[ir.Node] = set()
        self.lost: set[ir.Value] = set()
        """Results of what could not be lowered, so that what follows does not complain again."""
        self.operators: Counter[str] = Counter()
        self.complaints: list[str] = []

    def run(self) -> Lowered:
        inputs = [port for value in self.graph.inputs if (port := self._input(value)) is not None]
        for node in self.graph:
            if node not in self.fused:
                self._node(node)
        outputs: list[Port] = []
        for value in self.graph.outputs:
            taken = {port.tensor for port in (*inputs, *outputs)}
            if (port := self._output(value, taken)) is not None:
                outputs.append(port)
        batched = any(port.batched for port in inputs) and all(port.batched for port in outputs)
        if not batched and not self.lost:
            self.complaints.append("its inputs and outputs need a leading batch dimension")
        if self.complaints:
            listed = "\n  ".join(dict.fromkeys(self.complaints))
            raise DeploykitError(f"this model cannot be written as integer C:\n  {listed}\n{ADVICE}")
        made = Program(tuple(self.builder.operations), tuple(inputs), tuple(outputs), self.builder.rounding)
        return Lowered(made, dict(sorted(self.operators.items())))

    # ------------------------------------------------------------------ inputs and outputs

    def _input(self, value: ir.Value) -> Port | None:
        """Declares a graph input. It holds int8, by the scale of the one quantization that reads it."""
        name = value.name or "input"
        try:
            shape = static_shape(value)
            quant, unsigned = _input_quant(value)
        except Unsupported as error:
            readers = [user for user, _ in value.uses()]
            if any(user.op_type == "QuantizeLinear" for user in readers) or value.dtype != ir.DataType.FLOAT:
                self.complaints.append(f"input '{name}': {error}")
                self.lost.add(value)
            return None  # who reads it complains
        order = _input_order(value, len(shape))
        tensor = self.builder.tensor(name, layout.permuted(shape, order), quant)
        view = layout.stored(tensor, shape, order)
        if unsigned:
            moved = self.builder.tensor(f"{name}_int8", tensor.shape, quant)
            flipped = (np.arange(256) - 128).astype(np.uint8) ^ 0x80  # the byte read as int8 -> byte - 128
            self.builder.operations.append(program.Table(name, tensor, moved, flipped.view(np.int8)[None]))
            view = view.on(moved)
        self.values[value] = view
        return Port(name, tensor, shape, order, _batched(value), unsigned)

    def _output(self, value: ir.Value, taken: set[Tensor]) -> Port | None:
        """A graph output: images channels-last, everything else in ONNX's order."""
        operand = self.values.get(value)
        name = value.name or "output"
        if value in self.lost:
            return None
        if not isinstance(operand, View):
            self.complaints.append(f"output '{name}': it is {'a constant' if operand else 'not quantized'}")
            return None
        order = layout.natural(operand)
        rank = len(operand.shape)
        if order is None or order not in (identity(rank), NHWC, (0, 2, 1)):
            order = NHWC if rank == 4 else identity(rank)
        self.builder.layer = name
        tensor = self.builder.read(operand, order)
        if tensor in taken or tensor.data is not None:
            copy = self.builder.tensor(f"{tensor.name}_copy", tensor.shape, tensor.quant)
            self.builder.operations.append(program.Transpose(name, tensor, copy, (tensor.size,), (0,)))
            tensor = copy
        return Port(name, tensor, operand.shape, order, _batched(value))

    # ------------------------------------------------------------------ operators

    def _node(self, node: ir.Node) -> None:
        self.builder.layer = layer_of(node)
        try:
            if any(value in self.lost for value in node.inputs if value is not None):
                self._lose(node)
            elif node.op_type == "QuantizeLinear":
                self.values[node.outputs[0]] = self._quantize(node)
            elif node.op_type == "DequantizeLinear":
                self.values[node.outputs[0]] = self._dequantize(node)
            elif self._is_data(node):
                self._operation(node)  # the others compute shapes, which are known here
        except Unsupported as error:
            why = self.reasons.get(node.name or "") or error
            self.complaints.append(f"{named(node)} ({node.op_type}): {why}")
            self._lose(node)

    def _lose(self, node: ir.Node) -> None:
        """What follows is looked at too: behind the next quantization everything is known again."""
        if node.op_type == "QuantizeLinear" and node.outputs[0].shape is not None:
            try:
                shape = static_shape(node.outputs[0])
                stand_in = self.builder.tensor("missing", shape, quant_of(node))
                self.values[node.outputs[0]] = layout.stored(stand_in, shape, identity(len(shape)))
                return
            except Unsupported:
                pass
        self.lost.update(node.outputs)

    def _is_data(self, node: ir.Node) -> bool:
        if node.op_type == "Shape":
            return False
        floats = node.outputs[0].dtype in (None, ir.DataType.FLOAT)
        return floats or isinstance(self.values.get(node.inputs[0]) if node.inputs and node.inputs[0] else None, View)

    def _quantize(self, node: ir.Node) -> View[Tensor]:
        operand = self._operand(node.inputs[0])
        quant, name = quant_of(node), node.outputs[0].name or "quantized"
        if isinstance(operand, View):
            return operand if operand.tensor.quant == quant else self.builder.table(as_curve(operand), quant, name)
        if not isinstance(operand, Curve):
            raise Unsupported("it quantizes a constant")
        return self.builder.table(operand, quant, name)

    def _dequantize(self, node: ir.Node) -> Operand:
        held = constant(node.inputs[0])
        if held is None:
            return self._operand(node.inputs[0])
        scales = constant(node.inputs[1])
        zeros = constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1, held.dtype)
        if scales is None or zeros is None or len(set(np.ravel(zeros).tolist())) != 1:
            raise Unsupported("its constant has zero points per channel, or a scale that is computed at run time")
        zero = int(np.ravel(zeros)[0])
        if held.dtype == np.uint8:
            held, zero = (held.astype(np.int16) - 128).astype(np.int8), zero - 128
        return Constant(held, np.ravel(scales).astype(np.float32), zero, attribute(node, "axis", 1))

    def _operation(self, node: ir.Node) -> None:
        known = TABLE.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        given = node.inputs if known is None or known.operands is None else node.inputs[: known.operands]
        if node.op_type == "Cast" and isinstance(view := self._operand(node.inputs[0]), View):
            if attribute(node, "to") != int(ir.DataType.FLOAT):
                raise Unsupported("it cuts numbers to another type")
            self.values[node.outputs[0]] = view  # pixels as numbers: what the tensor stands for already
            return
        if node.op_type in ELEMENTWISE:  # exact, where it is a function of one number
            found = curve(node, [self._operand(v) for v in node.inputs], self.opset)
            if found is not None:
                self.values[node.outputs[0]] = found
                self.operators[node.op_type] += 1
                return
        if known is None:
            raise Unsupported("it has no integer form here")
        operands = [self._operand(v) for v in given]
        if any(isinstance(o, Curve) for o in operands):
            raise Unsupported("it reads the result of a float function; only a function of one number can follow one")
        last, limits = node, ANY
        if node.op_type == "MatMul" and (bias := self._bias(node)) is not None:
            last, held = bias
            operands.append(held)
        before = last
        if known.fuses:
            behind, own = tail(last)
            last, limits = behind or last, own or ANY
        result = last.outputs[0]
        op = Operation(
            node, result.name or node.name or "", self.builder,
            tuple(o for o in operands if not isinstance(o, Curve)), self._scale(node, known, operands, last), limits,
        )  # fmt: skip
        made = known.write(op)
        for value, view in zip(last.outputs, [made] if isinstance(made, View) else made, strict=False):
            self.values[value] = view
        self.fused.update({before, last})
        self.operators.update(n.op_type for n in {node, before, last})

    def _bias(self, node: ir.Node) -> tuple[ir.Node, Constant] | None:
        """The Add of one constant per column that alone reads a MatMul, and that constant."""
        result = node.outputs[0]
        readers = [user for user, _ in result.uses()]
        if len(readers) != 1 or readers[0].op_type != "Add" or result.is_graph_output() or result.shape is None:
            return None
        other = next((v for v in readers[0].inputs if v is not result), None)
        held = self.values.get(other) if other is not None else None
        is_bias = isinstance(held, Constant) and held.values.dtype == np.int32
        return (readers[0], held) if is_bias and isinstance(held, Constant) else None

    def _scale(self, node: ir.Node, rule: Rule, operands: Sequence[Operand], last: ir.Node) -> Quant:
        """The scale of an operator's integer result."""
        if rule.scale == "input":
            if not isinstance(operands[0], View):
                raise Unsupported("it works on a constant")
            return operands[0].tensor.quant
        readers = [user for user, _ in last.outputs[0].uses()]
        found = {quant_of(user) for user in readers if user.op_type == "QuantizeLinear"}
        floats = sorted({user.op_type for user in readers if user.op_type != "QuantizeLinear"})
        if len(found) != 1 or floats:
            raise Unsupported(f"its result goes into {', '.join(floats)} in float" if floats else "it has no scale")
        return found.pop()

    def _operand(self, value: ir.Value | None) -> Operand:
        if value is None or value in self.values:
            return self.values[value] if value is not None else None
        held = constant(value)
        if held is None:
            raise Unsupported(f"its input '{value.name}' is not quantized")
        return Constant(held)


def named(node: ir.Node) -> str:
    """A node's name, or that of its result."""
    return node.name or node.outputs[0].name or ""


def layer_of(node: ir.Node) -> str:
    """The operator that a node belongs to: itself, or the one whose result it quantizes; or the input."""
    while node.op_type in ("QuantizeLinear", "DequantizeLinear") and (value := node.inputs[0]) is not None:
        producer = value.producer()
        if producer is None:
            return value.name or named(node)
        node = producer
    return named(node)


def quant_of(node: ir.Node) -> Quant:
    """The quantization of a Q or DQ node of activations, for int8 storage."""
    scale, zero = constant(node.inputs[1]), constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1, np.uint8)
    if scale is None or zero is None:
        raise Unsupported("its scale is computed at run time")
    if scale.size != 1 or zero.dtype not in (np.uint8, np.int8):
        raise Unsupported(f"activations have one scale and 8 bits here, not {scale.size} scales of {zero.dtype}")
    return Quant(float(scale.ravel()[0]), int(zero.ravel()[0]) - (128 if zero.dtype == np.uint8 else 0))


def _input_quant(value: ir.Value) -> tuple[Quant, bool]:
    """How an input is quantized, and whether its numbers are uint8 as they come."""
    readers = [user for user, _ in value.uses()]
    if value.dtype in (ir.DataType.UINT8, ir.DataType.INT8):
        pending, found = list(readers), set()
        while pending:
            node = pending.pop()
            if node.op_type == "DequantizeLinear":
                found.add(quant_of(node))
            elif node.op_type == "Cast" and value.dtype == ir.DataType.UINT8:
                found.add(PIXELS)
            elif node.op_type in ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity"):
                pending.extend(user for user, _ in node.outputs[0].uses())
            else:
                raise Unsupported(f"its {value.dtype} numbers go into {node.op_type}")
        if len(found) != 1:
            raise Unsupported("nothing, or several scales, read it")
        return found.pop(), value.dtype == ir.DataType.UINT8
    if value.dtype not in (None, ir.DataType.FLOAT):
        raise Unsupported(f"it holds {value.dtype} numbers; integer programs take quantized floats or pixels")
    quants = {quant_of(user) if user.op_type == "QuantizeLinear" else None for user in readers}
    quant = quants.pop() if len(quants) == 1 else None
    if quant is None:
        raise Unsupported("it is read by more than one quantization, or in float")
    return quant, False


def _input_order(value: ir.Value, rank: int) -> Order:
    """Images and signals come channels-last, whichever way round the model takes them."""
    readers = [user for user, _ in value.uses()]
    while readers and all(user.op_type in ("QuantizeLinear", "DequantizeLinear", "Cast") for user in readers):
        readers = [user for node in readers for user, _ in node.outputs[0].uses()]
    if rank == 4:
        channels_first = [attribute(user, "perm", []) == [0, 3, 1, 2] for user in readers]
        return identity(4) if channels_first and all(channels_first) else NHWC
    if rank == 3 and readers and all(user.op_type in SLIDES for user in readers):
        return (0, 2, 1)
    return identity(rank)


def _batched(value: ir.Value) -> bool:
    """The first axis counts samples. Models exported with batch 1 only count as batched too."""
    shape = value.shape
    return shape is not None and len(shape) > 0 and (not isinstance(shape[0], int) or shape[0] == 1)
