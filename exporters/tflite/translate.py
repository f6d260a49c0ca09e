"""Walks an ONNX graph, float or with Q/DQ, and writes it operator by operator through the translation table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import onnx_ir as ir

from deploykit.core.artifact import Island, Port
from deploykit.core.errors import DeploykitError
from deploykit.exporters import layout
from deploykit.exporters.layout import NHWC, View, identity, stored
from deploykit.exporters.one_sample import Unsupported, static_shape, tail
from deploykit.exporters.tflite.operation import Constant, Operation, read, requantize
from deploykit.exporters.tflite.operators import PRODUCT_OF_ACTIVATIONS, TABLE, Rule, no_int16
from deploykit.exporters.tflite.runner import METADATA
from deploykit.exporters.tflite.schema import schema
from deploykit.exporters.tflite.writer import Quant, Tensor, Writer
from deploykit.hub.graph import attribute, constant

WHOLE = (ir.DataType.INT64, ir.DataType.INT32)
"""Whole numbers, as tokens and masks come."""

LARGEST_RESCALING = 256.0
"""From here on XNNPACK refuses products with the whole file, and sums come out wrong. It takes an output range below
one step of the sum to get there: a tensor that was zero throughout the calibration."""


@dataclass(frozen=True)
class Translated:
    """A written model and what became of its operators."""

    data: bytes
    quantized: Mapping[str, int]
    """How many ONNX operators of each kind are integer."""
    islands: tuple[Island, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    narrow: int
    """How many weights are stored in 4 bits."""


def translate(
    model: ir.Model,
    half: bool = False,
    reasons: Mapping[str, str] | None = None,
    narrow: Collection[str] = (),
    dynamic: bool = False,
) -> Translated:
    """The .tflite form of an ONNX graph, batch 1, images channels-last.

    Args:
        model: float graph, or hub: operators between DequantizeLinear and QuantizeLinear become integer, with the
            hub's scales; uint8 becomes int8 by moving zero points by 128.
        half: store float weights as float16.
        reasons: layer -> why the hub left it in float, for the report.
        narrow: initializers of integer weights that fit into 4 bits, and are stored so where LiteRT reads that.
        dynamic: products between floats and integer weights multiply integers; otherwise the weights become floats.

    Raises:
        DeploykitError: names every operator that cannot be written.
    """
    return _Translation(model.graph, half, reasons or {}, narrow, dynamic).run()


@dataclass(frozen=True)
class _Entry:
    """An input or output of the file, and how its axes are stored."""

    value: ir.Value
    tensor: Tensor
    order: layout.Order

    @property
    def batched(self) -> bool:
        """The first axis counts samples. Models exported with batch 1 only count as batched too."""
        shape = self.value.shape
        return shape is not None and len(shape) > 0 and (not isinstance(shape[0], int) or shape[0] == 1)

    def described(self) -> dict[str, object]:
        """Its line in the metadata."""
        return {"name": self.value.name, "order": list(self.order), "batched": self.batched}

    def port(self) -> Port:
        """What a caller has to know about it."""
        quant = self.tensor.quant
        scaled = (None, None) if quant is None else (quant.scales[0], quant.zero_point)
        return Port(self.value.name or "", self.tensor.shape, self.tensor.dtype, *scaled)


class _Translation:
    def __init__(
        self, graph: ir.Graph, half: bool, reasons: Mapping[str, str], narrow: Collection[str], dynamic: bool
    ) -> None:
        self.dynamic = dynamic
        self.graph, self.half, self.reasons, self.narrow = graph, half, reasons, narrow
        self.writer = Writer(reserved=[v.name or "" for v in graph.outputs])
        self.has_integers = any(node.op_type == "QuantizeLinear" for node in graph)
        self.values: dict[ir.Value, View | Constant] = {}
        self.fused: set[ir.Node] = set()
        self.quantized: Counter[str] = Counter()
        self.islands: list[Island] = []
        self.complaints: list[str] = []

    def run(self) -> Translated:
        """Translates everything, then complains about everything that could not be translated."""
        inputs = [self._input(value) for value in self.graph.inputs]
        for node in self.graph:
            if node not in self.fused:
                self._node(node)
        outputs: list[_Entry] = []
        for value in self.graph.outputs:
            outputs.append(self._output(value, [*inputs, *outputs]))
        if self.complaints:
            raise DeploykitError(
                "this model cannot be written as .tflite:\n  " + "\n  ".join(self.complaints) + "\n"
                "Change these operators in the model, or choose a target with another exporter (x86 runs any of them)."
            )
        metadata = {"inputs": [p.described() for p in inputs], "outputs": [p.described() for p in outputs]}
        data = self.writer.finish([p.tensor for p in inputs], [p.tensor for p in outputs], {METADATA: metadata})
        takes, gives = (tuple(e.port() for e in side) for side in (inputs, outputs))
        narrow = sum(tensor.type == schema.TensorType.INT4 for tensor in self.writer.tensors)
        return Translated(data, dict(sorted(self.quantized.items())), tuple(self.islands), takes, gives, narrow)

    def _input(self, value: ir.Value) -> _Entry:
        """Declares a graph input: integer where it is only read through one quantization, uint8 where it has pixels."""
        if value.dtype == ir.DataType.UINT8:
            return self._pixels(value)
        if value.dtype in WHOLE:
            return self._whole(value)
        quant: Quant | None = None
        shape: tuple[int, ...] = (1,)
        try:
            if value.dtype not in (None, ir.DataType.FLOAT):
                raise Unsupported(f"it holds {value.dtype} numbers; only float inputs are supported")
            shape = static_shape(value)
            quants = {_quant_of(user) if user.op_type == "QuantizeLinear" else None for user, _ in value.uses()}
            quant = quants.pop() if len(quants) == 1 and not value.is_graph_output() else None
        except Unsupported as error:
            self.complaints.append(f"input '{value.name}': {error}")
        order = _interface_order(len(shape))
        name, dtype = value.name or "input", quant.dtype if quant else "float32"
        tensor = self.writer.tensor(name, layout.permuted(shape, order), dtype, quant)
        self.values[value] = stored(tensor, shape, order)
        return _Entry(value, tensor, order)

    def _pixels(self, value: ir.Value) -> _Entry:
        """A uint8 input, stored as it comes. Read as integers, it becomes int8: its zero point moves."""
        shape = static_shape(value)
        order, name = identity(len(shape)), value.name or "input"
        quant = _behind_moves(value)
        held = None if quant is None else replace(quant, zero_point=quant.zero_point + 128)
        port = _Entry(value, self.writer.tensor(name, shape, "uint8", held), order)
        signed = port.tensor if quant is None else requantize(self.writer, port.tensor, quant, f"{name}_signed")
        self.values[value] = stored(signed, shape, order)
        return port

    def _whole(self, value: ir.Value) -> _Entry:
        """An input of whole numbers (tokens, a mask): int32, which LiteRT's kernels and delegates know best."""
        try:
            shape = static_shape(value)
        except Unsupported as error:
            self.complaints.append(f"input '{value.name}': {error}")
            shape = (1,)
        order = identity(len(shape))
        tensor = self.writer.tensor(value.name or "input", shape, "int32")
        self.values[value] = stored(tensor, shape, order)
        return _Entry(value, tensor, order)

    def _output(self, value: ir.Value, taken: Sequence[_Entry]) -> _Entry:
        """A graph output, under its own name: images channels-last, everything else in ONNX's order."""
        try:
            view = self._operand(value)
            if not isinstance(view, View):
                raise Unsupported("it is a constant")
        except Unsupported as error:
            self.complaints.append(f"output '{value.name}': {error}")
            view = self._stand_in(value)
        order = layout.natural(view)
        if order not in (NHWC, identity(len(view.shape))) or order is None:
            order = _interface_order(len(view.shape))
        tensor = read(self.writer, view, order)
        while tensor.constant or any(tensor.index == port.tensor.index for port in taken):
            indices = self.writer.indices(f"{value.name}_shape", tensor.shape)
            tensor = self.writer.write("RESHAPE", [tensor, indices], f"{value.name}_copy", tensor.shape, tensor.quant)
        self.writer.rename(tensor, value.name or "output")
        port = _Entry(value, tensor, order)
        if any(p.batched for p in taken) and not port.batched:
            self.complaints.append(f"output '{value.name}': it has no leading batch dimension")
        return port

    def _node(self, node: ir.Node) -> None:
        try:
            if node.op_type == "QuantizeLinear":
                self.values[node.outputs[0]] = self._quantize(node)
            elif node.op_type == "DequantizeLinear":
                self.values[node.outputs[0]] = self._dequantize(node)
            elif node.outputs[0].dtype in (None, ir.DataType.FLOAT, ir.DataType.UINT8) or self._is_whole(node):
                self._operation(node)  # the others compute shapes, which are known here
        except Unsupported as error:
            self.complaints.append(f"{node.name or node.outputs[0].name} ({node.op_type}): {error}")
            for value in node.outputs:
                self._stand_in(value)

    def _is_whole(self, node: ir.Node) -> bool:
        """Whether a node reads rows of an integer table, or computes with whole numbers that are an input."""
        if node.op_type == "Shape":
            return False
        return node.outputs[0].dtype == ir.DataType.INT8 or any(v in self.values for v in node.inputs)

    def _stand_in(self, value: ir.Value) -> View:
        """Something in place of a result that could not be written, so that what follows is looked at too."""
        sizes = [1] if value.shape is None else list(value.shape)
        shape = tuple(size if isinstance(size, int) else 1 for size in sizes)
        order = _interface_order(len(shape))
        missing = self.writer.tensor("missing", layout.permuted(shape, order), "float32")
        self.values[value] = stored(missing, shape, order)
        return stored(missing, shape, order)

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
        source = node.inputs[0]
        if source is not None and source.name in self.narrow:
            quant = replace(quant, dtype="int4")
        return Constant((held.astype(np.int16) - 128).astype(np.int8) if held.dtype == np.uint8 else held, quant)

    def _operation(self, node: ir.Node) -> None:
        rule = TABLE.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if rule is None:
            raise Unsupported("there is no rule for it")
        given = node.inputs if rule.operands is None else node.inputs[: rule.operands]
        operands = tuple(self._operand(v) for v in given)
        if node.op_type == "Gather" and node.outputs[0].dtype == ir.DataType.INT8:
            operands = self._table(node, operands)
        if node.outputs[0].dtype in WHOLE and rule.scale == "own":
            raise Unsupported("it computes with whole numbers; only moving them around is supported")
        add, bias = None, None
        if node.op_type == "MatMul" and isinstance(operands[1], View):
            rule = PRODUCT_OF_ACTIVATIONS
        elif node.op_type == "MatMul":
            add, bias = self._bias(node)
            operands = (*operands, *([bias] if bias is not None else []))
        behind, limits = tail(add or node) if rule.fuses else (None, None)
        last = behind or add or node
        quant, why = self._scale(node, rule, operands, last)
        if quant is None:
            operands = tuple(self._real(o) for o in operands)
        result = last.outputs[0]
        op = Operation(
            node, result.name or node.name or "", self.writer, operands, quant, limits, self.half, self.dynamic
        )
        made = rule.write(op)
        views = [made] if isinstance(made, View) else list(made)
        for value, view in zip(last.outputs, views, strict=False):
            self.values[value] = view
        self.fused.update(n for n in (add, behind) if n is not None)
        if quant is not None:
            self.quantized[node.op_type] += 1
        elif self.has_integers and (rule.scale == "own" or why):
            self.islands.append(Island(node.op_type, node.name or "", why))

    def _table(self, node: ir.Node, operands: tuple[View | Constant | None, ...]) -> tuple[View | Constant | None, ...]:
        """The operands of a Gather from an integer table; its scale is that of the DequantizeLinear behind it."""
        table = constant(node.inputs[0])
        readers = {user for user, _ in node.outputs[0].uses()}
        if table is None or len(readers) != 1:
            raise Unsupported("integers that are not read from a constant table")
        return (Constant(table, _quant_of(readers.pop())), *operands[1:])

    def _bias(self, node: ir.Node) -> tuple[ir.Node | None, Constant | None]:
        """The Add of a constant per column that alone reads a MatMul, and the constant, stored or quantized."""
        result = node.outputs[0]
        users = [user for user, _ in result.uses()]
        if result.is_graph_output() or len(users) != 1 or users[0].op_type != "Add":
            return None, None
        other = next((v for v in users[0].inputs if v is not result), None)
        producer = other.producer() if other is not None else None
        quantized = producer is not None and producer.op_type == "DequantizeLinear"
        held = constant(producer.inputs[0]) if producer is not None and quantized else constant(other)
        columns = None if result.shape is None else result.shape[-1]
        if held is None or held.ndim == 0 or not held.size == held.shape[-1] == columns:
            return None, None
        return users[0], Constant(held, _quant_of(producer) if producer is not None else None)

    def _scale(
        self, node: ir.Node, rule: Rule, operands: Sequence[View | Constant | None], last: ir.Node
    ) -> tuple[Quant | None, str]:
        """The scale of an operator's integer result; None, and why, where it has to be computed in float."""
        quants = [_quant(o) for o in operands if o is not None]
        wide = quants[0] is not None and quants[0].dtype == "int16"
        if wide and no_int16(node):
            return None, no_int16(node)
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
        quant = found.pop()
        if _rescaling(rule, quants) / quant.scales[0] >= LARGEST_RESCALING:
            return None, "its result is almost zero in calibration, and LiteRT cannot compute in steps that small"
        return quant, ""

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


def _rescaling(rule: Rule, quants: Sequence[Quant | None]) -> float:
    """The size of the steps that an integer operator sums in; 0 where it does not matter."""
    steps = [max(q.scales) for q in quants[:2] if q is not None]
    return {"product": prod(steps), "sum": max(steps), "": 0.0}[rule.joins]


def _quant(operand: View | Constant) -> Quant | None:
    return operand.tensor.quant if isinstance(operand, View) else operand.quant


def _behind_moves(value: ir.Value) -> Quant | None:
    """The quantization under which uint8 values are read, directly or transposed; None where they become floats."""
    (reader,) = {user for user, _ in value.uses()}
    if reader.op_type == "Transpose":
        return _behind_moves(reader.outputs[0])
    return _quant_of(reader) if reader.op_type == "DequantizeLinear" else None


def _quant_of(node: ir.Node) -> Quant:
    """The quantization of a Q or DQ node, uint8 as int8; per-channel scales that are all equal become one."""
    scale, zero = constant(node.inputs[1]), constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if scale is None or (len(node.inputs) > 2 and zero is None):
        raise Unsupported("its scale is computed at run time")
    held = node.inputs[0].dtype if node.op_type == "DequantizeLinear" and node.inputs[0] is not None else None
    zeros = np.zeros(1, np.uint8 if held is None else held.numpy()) if zero is None else zero
    if zeros.dtype not in (np.uint8, np.int8, np.int16, np.int32):
        raise Unsupported(f"{zeros.dtype} integers")
    shifted = set((zeros.astype(np.int64) - (128 if zeros.dtype == np.uint8 else 0)).ravel().tolist())
    scales = tuple(scale.astype(np.float32).ravel().tolist())
    if len(set(scales)) == 1:
        scales = scales[:1]
    if len(shifted) != 1 or (len(scales) > 1 and shifted != {0}):
        raise Unsupported("per-channel zero points other than 0")
    axis = attribute(node, "axis", 1) if len(scales) > 1 else 0
    return Quant(scales, shifted.pop(), axis, "int8" if zeros.dtype == np.uint8 else zeros.dtype.name)


def _interface_order(rank: int) -> layout.Order:
    """How inputs and outputs are stored: images channels-last."""
    return NHWC if rank == 4 else identity(rank)
