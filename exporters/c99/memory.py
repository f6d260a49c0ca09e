"""Where every tensor lies in the arena: tensors whose lifetimes overlap get places that do not.

Greedy by size, as in Pisarchyk and Lee, "Efficient memory management for deep neural net inference" (2020, section
5.2): the largest tensor first, each at the lowest gap that is free while it lives. Elementwise results take the place
of an operand that nobody reads afterwards. Coded weights get a place that lives as long as their operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deploykit.exporters.c99.program import (
    Add,
    Multiply,
    Operation,
    Product,
    Program,
    Softmax,
    Table,
    Tensor,
    reads,
)


@dataclass(frozen=True)
class Plan:
    """The arena of a program."""

    offsets: Mapping[Tensor | Operation, int]
    """Of tensors, and of the decoded weights of operations."""
    bytes: int
    lower_bound: int
    """What is alive at once at the fullest moment; no plan can be smaller."""
    fullest: Operation
    """The operation during which that is."""


@dataclass
class _Room:
    """A place that one tensor after the other uses, and when: the indices of the first and the last operation."""

    size: int
    first: int
    last: int


def plan(program: Program) -> Plan:
    """Offsets of all tensors in bytes. Inputs are alive from the start until they are read last, outputs to the end."""
    operations = program.operations
    end = len(operations)
    last = {tensor: i for i, operation in enumerate(operations) for tensor in reads(operation)}
    last |= {port.tensor: end for port in program.outputs}
    rooms: dict[Tensor | Operation, _Room] = {}
    for port in program.inputs:
        rooms[port.tensor] = _Room(port.tensor.size, -1, last.get(port.tensor, 0))
    for i, operation in enumerate(operations):
        if isinstance(operation, Product) and operation in program.coded:
            rooms[operation] = _Room(operation.weights.nbytes, i, i)
        y = operation.y
        reused = next((x for x in _in_place(operation) if last[x] == i and x.size == y.size), None)
        if reused is not None:
            rooms[y] = rooms[reused]
            rooms[y].last = last.get(y, i)
        else:
            rooms[y] = _Room(y.size, i, last.get(y, i))
    separate = list({id(room): room for room in rooms.values()}.values())
    places = _pack(separate)
    alive = [sum(r.size for r in separate if r.first <= i <= r.last) for i in range(end)]
    return Plan(
        {held: places[id(room)] for held, room in rooms.items()},
        max(places[id(room)] + room.size for room in separate),
        max(alive),
        operations[alive.index(max(alive))],
    )


def _in_place(operation: Operation) -> list[Tensor]:
    """The operands in whose place the result may be written: element i is read before element i is written."""
    if isinstance(operation, (Table, Softmax)):
        return [operation.x]
    if isinstance(operation, (Add, Multiply)):
        pairs = ((operation.a, operation.a_shape), (operation.b, operation.b_shape))
        return [t for t, shape in pairs if shape == operation.y_shape and t.data is None]
    return []


def _pack(rooms: list[_Room]) -> dict[int, int]:
    places: dict[int, int] = {}
    placed: list[_Room] = []
    for room in sorted(rooms, key=lambda r: (-r.size, r.first)):
        busy = sorted(
            (places[id(other)], places[id(other)] + other.size)
            for other in placed
            if other.first <= room.last and room.first <= other.last
        )
        offset = 0
        for start, stop in busy:
            if offset + room.size <= start:
                break
            offset = max(offset, stop)
        places[id(room)] = offset
        placed.append(room)
    return places
