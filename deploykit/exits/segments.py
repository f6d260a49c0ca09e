"""A network with exits in pieces: each takes what the one before hands on, and gives an answer and what it hands on.

The pieces are cut out of one hub, in which every cut has one scale: behind a cut's DequantizeLinear one piece ends, and
with the same QuantizeLinear the next begins. What a piece hands on are numbers of that grid, so the integers that leave
one are those that enter the next, and all pieces together compute what the whole does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import onnx
import onnx_ir as ir

from deploykit.core.errors import DeploykitError
from deploykit.exits.places import cut_name, exit_name
from deploykit.hub.analysis.sizes import positions
from deploykit.hub.graph import FloatGraph, Hub, constant
from deploykit.hub.operators import role
from deploykit.hub.slices import Slicer


@dataclass(frozen=True)
class Port:
    """What a segment takes and gives, by name."""

    takes: tuple[str, ...]
    """Of the network for the first segment, then the cut in front."""
    answer: str
    hands_on: str
    """Empty for the last."""

    @property
    def gives(self) -> tuple[str, ...]:
        """All outputs, the answer first."""
        return (self.answer, self.hands_on) if self.hands_on else (self.answer,)


def ports(inputs: Sequence[str], exits: int, output: str) -> tuple[Port, ...]:
    """The segments of a network.

    Args:
        inputs: of the network.
        exits: in front of its own answer.
        output: that answer's name.
    """
    takes = [tuple(inputs), *((cut_name(k),) for k in range(1, exits + 1))]
    return tuple(
        Port(takes[k - 1], *((exit_name(k), cut_name(k)) if k <= exits else (output, ""))) for k in range(1, exits + 2)
    )


def segment(hub: Hub, port: Port) -> Hub:
    """The piece of a hub between two cuts, as a hub of its own: every exporter can write it.

    Args:
        hub: of a network with exits whose cuts are outputs too (`deploykit.exits.network.with_cuts`).
        port: which piece.

    Raises:
        DeploykitError: what lies behind a cut reads something from in front of it that is not the cut.
    """
    graph = FloatGraph(ir.from_proto(_piece(onnx.load_model_from_string(hub.graph.bytes), port)))
    weights = set(graph.model.graph.initializers)
    graph = replace(graph, masks={name: mask for name, mask in hub.graph.masks.items() if name in weights})
    if hub.quantized is None:
        return replace(hub, graph=graph, samples={})
    quantized = ir.from_proto(_piece(onnx.load_model_from_string(hub.bytes), port))
    held, nodes = set(quantized.graph.initializers), {node.name for node in graph.model.graph}
    return replace(
        hub, graph=graph, quantized=quantized, samples={}, findings=(),
        decisions=tuple(d for d in hub.decisions if d.layer in nodes),
        weights={q: name for q, name in hub.weights.items() if q in held},
        bits={q: bits for q, bits in hub.bits.items() if q in held},
    )  # fmt: skip


def _piece(model: onnx.ModelProto, port: Port) -> onnx.ModelProto:
    """The model between ``port.takes`` and ``port.gives``; a quantized input comes in through its QuantizeLinear."""
    slicer = Slicer(model)
    quantizers = {name: pair for name in port.takes if (pair := _quantizer(slicer, name)) is not None}
    known = [quantizers[name].output[0] if name in quantizers else name for name in port.takes]
    read = slicer.boundary(port.gives, known)
    foreign = [name for name in read if name not in known]
    if foreign:
        raise DeploykitError(
            f"stage {port.takes[0].removeprefix('cut_')} does not cut the network in two: what lies behind it also "
            f"reads '{foreign[0]}'. Name stages whose output is all that is read behind them: stages = [...]"
        )
    piece = slicer.cut(port.gives, known)
    for name, quantizer in quantizers.items():
        _enter(piece, name, quantizer, slicer)
    return piece


def _enter(piece: onnx.ModelProto, name: str, quantizer: onnx.NodeProto, slicer: Slicer) -> None:
    """Puts a cut's QuantizeLinear in front of a piece that begins with its integers."""
    graph, integers = piece.graph, quantizer.output[0]
    inside = f"{name}_dq"  # the dequantized value has the cut's name, which the input gets
    for node in graph.node:
        node.input[:] = [inside if value == name else value for value in node.input]
        node.output[:] = [inside if value == name else value for value in node.output]
    infos = [info for info in graph.value_info if info.name != name]
    dequantized = onnx.ValueInfoProto()
    dequantized.CopyFrom(slicer.info[name])
    dequantized.name = inside
    (entered,) = (info for info in graph.input if info.name == integers)
    stored = onnx.ValueInfoProto()
    stored.CopyFrom(entered)
    entered.CopyFrom(slicer.info[name])
    del graph.value_info[:]
    graph.value_info.extend([*infos, dequantized, stored])
    graph.node.insert(0, quantizer)
    graph.node[0].input[0] = name
    held = {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(slicer.initializers[n] for n in quantizer.input[1:] if n not in held)


def _quantizer(slicer: Slicer, name: str) -> onnx.NodeProto | None:
    """The QuantizeLinear of an activation that is an output of the hub: its value is the DequantizeLinear behind it."""
    dequantizer = slicer.producer.get(name)
    if dequantizer is None or dequantizer.op_type != "DequantizeLinear":
        return None
    quantizer = slicer.producer.get(dequantizer.input[0])
    return quantizer if quantizer is not None and quantizer.op_type == "QuantizeLinear" else None


def macs(graph: FloatGraph) -> int:
    """Multiply-accumulates of one sample in convolutions and products with constant weights, free axes counted once."""
    total = 0
    for node in graph.model.graph:
        weight = constant(node.inputs[1]) if role(node) == "linear" else None
        if weight is not None:
            total += int(weight.size) * prod(count or 1 for count in positions(node))
    return total
