"""Cuts pieces out of an ONNX graph, so that one operator or one stretch of a network can be run on its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from deploykit.hub.graph import Hub

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Slicer:
    """Index of a model by value name; `cut` extracts pieces of it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        """Indexes the model. Initializers may be changed afterwards (`set_array`); later cuts see the change."""
        self.model = model
        self.producer = {o: node for node in model.graph.node for o in node.output}
        self.position = {id(node): i for i, node in enumerate(model.graph.node)}
        self.initializers = {t.name: t for t in model.graph.initializer}
        self.inputs = {i.name: i for i in model.graph.input}
        self.renamed = {self._float_behind(o.name): o.name for o in model.graph.output}
        """Float values whose name in the float graph went over to the dequantized value behind them."""
        infos = [*model.graph.value_info, *model.graph.output, *model.graph.input]
        self.info = {i.name: i for i in infos}

    def _float_behind(self, output: str) -> str:
        """The float value that an output is the dequantized form of; the output itself, if it is float."""
        dequantizer = self.producer.get(output)
        quantizer = self.producer.get(dequantizer.input[0]) if dequantizer is not None else None
        pair = dequantizer is not None and dequantizer.op_type == "DequantizeLinear"
        return quantizer.input[0] if pair and quantizer is not None else output

    def array(self, name: str) -> NDArray[Any]:
        """An initializer's values."""
        return np.asarray(onnx.numpy_helper.to_array(self.initializers[name]))

    def set_array(self, name: str, array: NDArray[Any]) -> None:
        """Replaces an initializer's values."""
        self.initializers[name].CopyFrom(onnx.numpy_helper.from_array(array, name))

    def boundary(self, outputs: Sequence[str], known: Collection[str]) -> list[str]:
        """Which of the known values (and graph inputs) the outputs are computed from, in a fixed order."""
        return self._walk(outputs, known)[1]

    def cut(self, outputs: Sequence[str], known: Collection[str]) -> onnx.ModelProto:
        """The model that computes ``outputs`` from the ``known`` values (and graph inputs) they depend on.

        Its inputs are just those that are needed (`boundary`). An output may not be among the known.
        """
        nodes, inputs = self._walk(outputs, known)
        used = {name for node in nodes for name in node.input}
        graph = onnx.helper.make_graph(
            nodes,
            "slice",
            [self._typed(name) for name in inputs],
            [self._typed(name) for name in outputs],
            [self.initializers[name] for name in sorted(used & set(self.initializers))],
            value_info=[self.info[o] for node in nodes for o in node.output if o in self.info and o not in outputs],
        )
        return onnx.helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)

    def leads_with_batch(self, name: str) -> bool:
        """Whether a value's first axis counts samples, as far as its shape is known."""
        info = self.info.get(name)
        sizes = info.type.tensor_type.shape.dim if info is not None else []
        if len(sizes) == 0 or sizes[0].dim_param:
            return len(sizes) == 0 or bool(sizes[0].dim_param.isidentifier())
        return bool(sizes[0].dim_value <= 1 and not any(size.dim_param for size in sizes))

    def _walk(self, outputs: Sequence[str], known: Collection[str]) -> tuple[list[onnx.NodeProto], list[str]]:
        stop = set(known)
        nodes: dict[int, onnx.NodeProto] = {}
        inputs: dict[str, None] = {}
        pending = list(outputs)
        while pending:
            name = pending.pop()
            if not name or name in self.initializers:
                continue
            if name in stop or name in self.inputs:
                inputs[name] = None
                continue
            node = self.producer[name]
            if self.position[id(node)] not in nodes:
                nodes[self.position[id(node)]] = node
                pending.extend(node.input)
        return [nodes[i] for i in sorted(nodes)], sorted(inputs)

    def _typed(self, name: str) -> onnx.ValueInfoProto:
        if name in self.info and self.info[name].type.tensor_type.elem_type:
            return self.info[name]
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)


@dataclass(frozen=True)
class OperatorSlice:
    """One integer operator (with its fused activation) between its Q/DQ pairs, as a model of its own."""

    layer: str
    operator: str
    model: onnx.ModelProto
    inputs: tuple[str, ...]
    """Values of the hub that it reads: dequantized, so feeding them reproduces the same integers."""
    output: str
    tensor: str
    """The name of the output in the float graph."""
    scale: float
    """Of the output: one least significant bit."""


def operator_slices(hub: Hub) -> Iterator[OperatorSlice]:
    """Every operator of the hub that reads and writes integers, cut out with its own quantization.

    Operators that only read integers (`linear_inputs` placement) have no integer output to compare and are left out.
    So are those between tensors that do not have the batch in front (inside attention, sequences turned for a recurrent
    layer): files are run with the batch in front.
    """
    slicer = Slicer(onnx.load_model_from_string(hub.bytes))
    integer = {d.layer: d for d in hub.decisions if d.quantized}
    floats = slicer.renamed
    reads: dict[str, list[onnx.NodeProto]] = {}
    for node in slicer.model.graph.node:
        for name in node.input:
            reads.setdefault(name, []).append(node)
    for node in slicer.model.graph.node:
        if node.name not in integer:
            continue
        quantizer = _quantizer_after(node, reads, slicer)
        if quantizer is None:
            continue
        (output,) = (r.output[0] for r in reads[quantizer.output[0]] if r.op_type == "DequantizeLinear")
        known = [slicer.producer[s].input[0] for s in _integer_sources(node, slicer)]
        model = slicer.cut([output], known)
        inputs = slicer.boundary([output], known)
        if not all(slicer.leads_with_batch(name) for name in (quantizer.input[0], *inputs)):
            continue
        yield OperatorSlice(
            node.name, node.op_type, model, tuple(inputs), output, floats.get(quantizer.input[0], quantizer.input[0]),
            float(slicer.array(quantizer.input[1])),
        )  # fmt: skip


def _quantizer_after(
    node: onnx.NodeProto, reads: Mapping[str, list[onnx.NodeProto]], slicer: Slicer
) -> onnx.NodeProto | None:
    """The QuantizeLinear behind a node, directly or behind its bias and activation."""
    readers = reads.get(node.output[0], [])
    for reader in readers:
        if reader.op_type == "QuantizeLinear":
            return reader
    if len(readers) == 1 and (readers[0].op_type in ("Relu", "Clip") or _adds_bias(readers[0], node, slicer)):
        return _quantizer_after(readers[0], reads, slicer)
    return None


def _adds_bias(add: onnx.NodeProto, product: onnx.NodeProto, slicer: Slicer) -> bool:
    """Whether a node adds a constant, quantized or not, to a product of matrices."""
    if (product.op_type, add.op_type) != ("MatMul", "Add"):
        return False
    (other,) = [name for name in add.input if name != product.output[0]] or [""]
    dequantizer = slicer.producer.get(other)
    return other in slicer.initializers or (dequantizer is not None and dequantizer.input[0] in slicer.initializers)


def _integer_sources(node: onnx.NodeProto, slicer: Slicer) -> list[str]:
    """The QuantizeLinear outputs a node reads through DequantizeLinear."""
    found = []
    for name in node.input:
        dequantizer = slicer.producer.get(name)
        if dequantizer is None or dequantizer.op_type != "DequantizeLinear":
            continue
        source = slicer.producer.get(dequantizer.input[0])
        if source is not None and source.op_type == "QuantizeLinear":
            found.append(source.output[0])
    return found
