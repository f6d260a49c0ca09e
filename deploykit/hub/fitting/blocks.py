"""Blocks of a network: the stretches between tensors through which everything goes.

A residual block begins and ends at such a tensor and has none inside; in a plain chain there is one behind every layer,
and a few layers make a block (Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by Block
Reconstruction", section 3.2). What comes after the last such tensor is a block too, whatever it answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from deploykit.hub.layers import Layer, layers
from deploykit.hub.slices import Slicer


@dataclass(frozen=True)
class Block:
    """One stretch of a Q/DQ graph."""

    input: str
    """The tensor that it reads, integers if it is quantized; empty: the inputs of the network."""
    outputs: Mapping[str, str]
    """What is computed with later, as real numbers: name in the Q/DQ graph -> name in the float graph."""
    layers: tuple[Layer, ...]
    """Its products with integer inputs and weights."""


def blocks(slicer: Slicer, size: int) -> list[Block]:
    """The blocks of a Q/DQ graph in order; stretches without layers belong to the block that follows.

    Args:
        slicer: of the graph.
        size: a block ends where it can, once it has so many layers.
    """
    at = {slicer.position[id(layer.node)]: layer for layer in layers(slicer)}
    ends = _ends(slicer)
    found: list[Block] = []
    start = end = ""
    inside: list[Layer] = []
    for i in range(len(slicer.model.graph.node)):
        if i in at:
            if end and len(inside) >= size:
                found.append(Block(start, _behind(end, slicer), tuple(inside)))
                start, inside = end, []
            inside.append(at[i])
            end = ""
        end = ends.get(i, end)  # the last one before the next layer: activations belong to what they follow
    if inside:
        outputs = {o.name: o.name for o in slicer.model.graph.output}
        found.append(Block(start, outputs, tuple(inside)))
    return found


def _ends(slicer: Slicer) -> dict[int, str]:
    """After which nodes a single tensor, sample by sample, carries all that is computed later, and which: integers
    where there are any."""
    nodes = slicer.model.graph.node
    constant = set(slicer.initializers)
    readers = Counter(name for node in nodes for name in set(node.input))
    readers.update(o.name for o in slicer.model.graph.output)
    quantized = {node.input[0] for node in nodes if node.op_type == "QuantizeLinear"}
    live = {name for name in slicer.inputs if name not in constant}
    found: dict[int, str] = {}
    for i, node in enumerate(nodes):
        if all(name in constant for name in node.input if name):
            constant |= set(node.output)
            continue
        readers.subtract(set(node.input))
        live = {name for name in (*live, *node.output) if readers[name] > 0}
        if len(live) == 1 and node.op_type != "DequantizeLinear" and not live & quantized:
            (end,) = live
            if slicer.leads_with_batch(end) and all(name in slicer.producer for name in live):
                found[i] = end
    return found


def _behind(end: str, slicer: Slicer) -> dict[str, str]:
    """The real numbers behind the end of a block, and what they are called in the float graph."""
    producer = slicer.producer[end]
    if producer.op_type != "QuantizeLinear":
        return {end: end}
    value = producer.input[0]
    reader = next(n for n in slicer.model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == end)
    return {reader.output[0]: slicer.renamed.get(value, value)}
