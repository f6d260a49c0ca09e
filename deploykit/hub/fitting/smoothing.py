"""Which channels of activations can be scaled where they are made, and who reads them.

A source makes channels that can each be divided by a number: a LayerNormalization (its scale and bias), a product with
constant weights (its columns and bias), a Mul by one constant per channel. From there channels are moved, cut, passed
through a Relu, averaged over positions (by a mean, or by attention: a product with a Softmax mixes rows, not channels),
until products with constant weights read them, which can multiply the number again.

Which channel of the source stands behind which input of a reader is found out by running the graph once with the number
of every channel in place of its values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from deploykit.hub.graph import FloatGraph, add_initializer, attribute, constant, drop_unused, fresh_name
from deploykit.hub.operators import bias_of, role
from deploykit.hub.plan import name_of
from deploykit.hub.running import session

if TYPE_CHECKING:
    from numpy.typing import NDArray

Edge = tuple[ir.Node, int]
"""A node and the position of one of its inputs."""


@dataclass(frozen=True)
class Reader:
    """A product with constant weights that reads channels of a source."""

    node: str
    channels: NDArray[np.int64]
    """``[k]``: the source's channel behind each of its inputs."""


@dataclass(frozen=True)
class Group:
    """A source and all who read it. Nodes are named, so that a group holds for copies of its graph."""

    source: str
    parameters: tuple[tuple[str, int, int], ...]
    """Node, input position and channel axis of the constants that make its channels."""
    readers: tuple[Reader, ...]
    free: NDArray[np.bool_]
    """``[c]``: the channels that nobody else reads."""


def groups(graph: FloatGraph, example: Mapping[str, NDArray[Any]]) -> list[Group]:
    """All groups with a free channel, in the order of the graph.

    Args:
        graph: not changed.
        example: inputs of the graph, of any values.
    """
    model = graph.copy()
    for value in model.graph.outputs:  # who reads an output is a reader like others
        model.graph.append(ir.Node("deploykit", "Caller", [value]))
    ways = [(source, way) for source in _sources(model.graph) if (way := _walk(source)).readers]
    ids = _ids(model, [source for source, _ in ways], [edge for _, way in ways for edge in way.all()], example)
    found = (_group(source, way, ids) for source, way in ways)
    return [group for group in found if group is not None]


@dataclass(frozen=True)
class _Source:
    output: ir.Value
    channels: int
    parameters: tuple[tuple[ir.Node, int, int], ...]


def _sources(graph: ir.Graph) -> Iterator[_Source]:
    for node in graph:
        if node.op_type == "LayerNormalization":
            places = [(node, 1), (node, 2)] if len(node.inputs) > 2 and node.inputs[2] is not None else [(node, 1)]
            output = node.outputs[0]
        elif node.op_type == "Mul" and (fixed := [i for i in (0, 1) if constant(node.inputs[i]) is not None]):
            places, output = [(node, fixed[0])], node.outputs[0]
        elif scalable(node):
            holder, position = bias_of(node)
            has_bias = len(holder.inputs) > position and holder.inputs[position] is not None
            places, output = [(holder, position)] if has_bias else [], holder.outputs[0]
        else:
            continue
        shape = output.shape
        channels = shape[-1] if shape is not None and len(shape) > 0 else None
        vectors = [constant(n.inputs[i]) for n, i in places]
        if not isinstance(channels, int) or any(v is None or v.size != channels for v in vectors):
            continue
        if any(v is not None and v.shape[-1] != channels for v in vectors):
            continue
        parameters = [(n, i, -1) for n, i in places]
        if scalable(node):
            parameters.append((node, 1, 1 - input_axis(node)))
        yield _Source(output, channels, tuple(parameters))


def scalable(node: ir.Node) -> bool:
    """Whether a node is a product with a matrix of its own."""
    if node.op_type not in ("MatMul", "Gemm") or role(node) != "linear" or attribute(node, "transA", 0):
        return False
    weight = node.inputs[1]
    held = constant(weight)
    return weight is not None and held is not None and held.ndim == 2 and len(list(weight.uses())) == 1


def input_axis(node: ir.Node) -> int:
    """The axis of a MatMul's or Gemm's weight that runs over its inputs."""
    return 1 if node.op_type == "Gemm" and attribute(node, "transB", 0) else 0


@dataclass(frozen=True)
class _Way:
    """Where the channels of a source end up."""

    readers: list[Edge] = field(default_factory=list)
    """Products that can be scaled."""
    averaged: list[Edge] = field(default_factory=list)
    """Operators that average them over positions and hand them on."""
    others: list[Edge] = field(default_factory=list)

    def all(self) -> list[Edge]:
        return [*self.readers, *self.averaged, *self.others]


def _walk(source: _Source) -> _Way:
    way = _Way()
    waiting = [source.output]
    while waiting:
        value = waiting.pop()
        for node, position in value.uses():
            if position == 0 and scalable(node):
                way.readers.append((node, 0))
            elif position == 0 and (role(node) == "moves" or node.op_type == "Relu"):
                waiting.extend(node.outputs)
            elif _averaged_axes(node, position):
                way.averaged.append((node, position))
                waiting.extend(node.outputs)
            else:
                way.others.append((node, position))
    return way


def _averaged_axes(node: ir.Node, position: int) -> tuple[int, ...]:
    """The axes of an input that an operator averages over: those of ReduceMean; the rows of V in Softmax(.) V, as its
    weights add up to 1. Empty where it does something else."""
    if node.op_type == "ReduceMean" and position == 0:
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        return () if axes is None else tuple(axes.tolist())
    left = node.inputs[0].producer() if node.op_type == "MatMul" and node.inputs[0] is not None else None
    if position != 1 or left is None or left.op_type != "Softmax":
        return ()
    shape = left.outputs[0].shape
    return (-2,) if attribute(left, "axis", -1) in (-1, len(shape) - 1 if shape is not None else -1) else ()


def _ids(
    model: ir.Model, sources: Sequence[_Source], edges: Sequence[Edge], example: Mapping[str, NDArray[Any]]
) -> dict[Edge, NDArray[np.float32]]:
    """What comes along the edges when every source puts out the number of each channel, 0 to c - 1. Changes the
    model."""
    graph = model.graph
    zero = add_initializer(graph, "none", np.zeros((), np.float32))
    for source in sources:
        users, maker = list(source.output.uses()), source.output.producer()
        assert maker is not None
        numbers = add_initializer(graph, "numbers", np.arange(source.channels, dtype=np.float32))
        silent = ir.Node("", "Mul", [source.output, zero])  # of the same shape
        numbered = ir.Node("", "Add", [silent.outputs[0], numbers])
        numbered.outputs[0].name = fresh_name(graph, f"{name_of(source.output)}_numbered")
        graph.insert_after(maker, [silent, numbered])
        for node, position in users:
            node.replace_input_with(position, numbered.outputs[0])
    values = {edge: value for edge in edges if (value := edge[0].inputs[edge[1]]) is not None}
    names = {edge: name_of(value) for edge, value in values.items()}
    graph.outputs[:] = list({name_of(value): value for value in values.values()}.values())
    drop_unused(graph)
    wanted = [name_of(value) for value in graph.outputs]
    found = dict(zip(wanted, session(ir.to_proto(model)).run(wanted, dict(example)), strict=True)) if wanted else {}
    return {edge: found[name] for edge, name in names.items()}


def _group(source: _Source, way: _Way, ids: Mapping[Edge, NDArray[Any]]) -> Group | None:
    """The group of a source, or None where no channel is free."""
    if any(np.ptp(ids[edge], axis=_averaged_axes(*edge)).any() for edge in way.averaged):
        return None  # what is averaged are different channels
    behind = {node: _constant_rows(ids[node, position]) for node, position in way.readers}
    free = np.ones(source.channels, np.bool_)
    for edge in [*way.others, *((node, 0) for node, channels in behind.items() if channels is None)]:
        for rounded in (np.floor, np.ceil):  # averages lie beside whole numbers
            free[np.unique(rounded(ids[edge])).astype(np.int64).clip(0, source.channels - 1)] = False
    kept = tuple(Reader(name_of(n), c) for n, c in behind.items() if c is not None and free[c].any())
    if not kept:
        return None
    parameters = tuple((name_of(node), position, axis) for node, position, axis in source.parameters)
    reached = np.zeros_like(free)
    for reader in kept:
        reached[reader.channels] = True
    return Group(name_of(source.parameters[-1][0]), parameters, kept, free & reached)


def _constant_rows(ids: NDArray[Any]) -> NDArray[np.int64] | None:
    """``[k]`` whole numbers that all rows ``[..., k]`` are, or None."""
    rows = ids.reshape(-1, ids.shape[-1])
    whole = np.rint(rows[0])
    return whole.astype(np.int64) if np.abs(rows - whole).max() < 0.25 else None
