"""Where the error of the network's answers comes from: every weight and every tensor quantized alone.

The float network z runs with one thing rounded as the hub rounds it, and nothing else:

    d  =  E |z' - z|² / E |z|²        over the samples, summed over the outputs

Errors of different places hardly know of each other, so these d add up to about what the hub as a whole loses. A tensor
belongs to the operator that writes it. Where a weight is rounded the output keeps its mean in every channel, as every
correction sees to; weights that a step moved on purpose count with that move.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx

from deploykit.core.data import DataSet
from deploykit.core.progress import track
from deploykit.hub.analysis.measures import squared
from deploykit.hub.analysis.tail import BATCH, Tail
from deploykit.hub.bits import held_weights
from deploykit.hub.graph import FloatGraph, Hub, constant
from deploykit.hub.operators import fused
from deploykit.hub.plan import name_of
from deploykit.hub.running import session
from deploykit.hub.slices import Slicer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Answers = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Contribution:
    """One thing rounded alone."""

    layer: str
    """The product that reads the weight, or the operator that writes the tensor; of an input its name."""
    part: Literal["weights", "values"]
    tensor: str
    """The weight or the tensor, as the float graph calls it."""
    noise: float
    """d."""


def contributions(hub: Hub, data: DataSet) -> list[Contribution]:
    """Of all integer weights of products and all tensors that are written as integers, in the network's order."""
    slicer = Slicer(onnx.load_model_from_string(hub.bytes))
    place = {name_of(node): i for i, node in enumerate(hub.graph.model.graph)}
    owner, written = owners(hub.graph), {name_of(v): i for i, n in enumerate(hub.graph.model.graph) for v in n.outputs}
    found: list[tuple[int, Contribution, Any]] = []
    for held in held_weights(slicer):
        weight = hub.weights[held.weight]
        exact = constant(hub.graph.model.graph.initializers[weight])
        found.append((place[held.name], Contribution(held.name, "weights", weight, 0.0), (held, exact)))
    for tensor, pair in _rounded(slicer).items():
        position = written.get(tensor, -1) + 1
        found.append((position, Contribution(owner.get(tensor, tensor), "values", tensor, 0.0), pair))
    found.sort(key=lambda item: item[0])
    result = []
    with contextlib.closing(Tail(hub.graph, data)) as network:
        for _, what, how in track(found, "contributions", total=len(found)):
            if what.part == "weights":
                held, exact = how
                answers = network.moved(held.name, held.layers[0].y, what.tensor, held.real(slicer) - exact)
            else:
                answers = network.replaced(what.tensor, _rounding(slicer, *how))
            result.append(Contribution(what.layer, what.part, what.tensor, squared(answers)))
    return result


def whole(hub: Hub, data: DataSet) -> float:
    """d of the hub as it is: everything rounded, all biases corrected as they are."""
    float_run, run = session(hub.graph.bytes), session(hub.bytes, optimize=False)
    names = [o.name for o in run.get_outputs()]

    def answers() -> Iterator[tuple[Answers, Answers]]:
        for batch in track(data.batches(hub.graph.batch or BATCH), "the hub as a whole"):
            moved, exact = (r.run(names, batch.inputs) for r in (run, float_run))
            yield dict(zip(names, moved, strict=True)), dict(zip(names, exact, strict=True))

    return squared(answers())


def owners(graph: FloatGraph) -> dict[str, str]:
    """Tensor -> the operator that writes it: the first of those that run together."""
    found: dict[str, str] = {}
    for node in graph.model.graph:
        for each in (node, *fused(node)):
            for value in each.outputs:
                found.setdefault(name_of(value), name_of(node))
    return found


def _rounded(slicer: Slicer) -> dict[str, tuple[str, str]]:
    """Tensor of the float graph -> what its QuantizeLinear reads and what its DequantizeLinear writes.

    A second pair behind the first, where an operator wants another scale, rounds what is rounded already.
    """
    found: dict[str, tuple[str, str]] = {}
    for node in slicer.model.graph.node:
        quantizer = slicer.producer.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if quantizer is None or quantizer.op_type != "QuantizeLinear":
            continue
        source = slicer.producer.get(quantizer.input[0])
        if source is None or source.op_type != "DequantizeLinear":
            tensor = slicer.renamed.get(quantizer.input[0], quantizer.input[0])
            found.setdefault(tensor, (quantizer.input[0], node.output[0]))
    return found


def _rounding(slicer: Slicer, before: str, after: str) -> Any:
    """From a tensor to what stands for it in the hub."""
    run = session(slicer.cut([after], [before]), optimize=False)

    def rounded(values: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(run.run([after], {before: values})[0])

    return rounded
