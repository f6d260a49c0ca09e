"""Which channels can only go together, found by marking them and looking where the marks arrive.

Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", derive the same groups from a graph with rules for every
operation. Here the operations are executed instead (`deploykit.pruning.flow`): a layer writes NaN into channel c, and
whatever reads NaN depends on c. To find all channels of a layer at once, each run marks those whose number has a
certain bit set, or not set: 2 log2(channels) runs tell every channel apart. Where several channels meet in one place,
the bits name a set that holds them all.

What was found is then tried: channels of a group are taken out, layers write random values, and every layer must read
exactly what it read before, without those channels. A group that fails (a shape that the code of the model fixes, an
embedding added to it, a normalisation over channels) is left alone, so that always

    pruned network = network in which the same channels are zeroed where they are read.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deploykit.core.errors import DeploykitError
from deploykit.layerwise.channels import Side, axis, groups_of, is_channelwise, mixes, sides, width
from deploykit.pruning.crop import Port, can_be_cropped, crop
from deploykit.pruning.flow import Flow, Inputs, follow, written

Channel = Mapping[Port, tuple[int, ...]]
"""What goes if one channel goes: numbers by port."""
Place = tuple[str | None, int]
"""Where something is read: a layer and the number of its call, or None and the number of an output of the model."""


@dataclass(frozen=True)
class Group:
    """Channels that run through the same layers: each can go alone, but only from all these layers at once."""

    channels: tuple[Channel, ...]

    @property
    def ports(self) -> tuple[Port, ...]:
        """Where the channels pass."""
        return tuple(self.channels[0])

    @property
    def writers(self) -> tuple[str, ...]:
        """The layers that write the channels."""
        return tuple(layer for layer, side in self.ports if side == "out")


def find_groups(model: nn.Module, inputs: Inputs) -> list[Group]:
    """All channels of a model that can be taken out.

    Args:
        model: not changed.
        inputs: one sample, ``[1, ...]``, by forward-argument name.

    Raises:
        DeploykitError: the model cannot be run on the sample; says which operation cannot.
    """
    model = copy.deepcopy(model).eval()
    shapes = written(model, inputs)
    random = torch.Generator().manual_seed(0)
    # above 0, so that no logarithm, root or quotient makes a NaN of its own
    values = {n: [torch.rand(shape, generator=random) + 0.5 for shape in calls] for n, calls in shapes.items()}
    before = follow(model, inputs, lambda name, call: values[name][call])
    classes = _Classes(model, before)
    _mark(model, inputs, values, classes)
    found: dict[tuple[tuple[Port, int], ...], list[Channel]] = defaultdict(list)
    for channel in classes.channels():
        found[tuple((port, len(numbers)) for port, numbers in channel.items())].append(channel)
    groups = [Group(tuple(channels)) for channels in found.values()]
    return [group for group in groups if _can_go(model, inputs, values, before, group)]


def together(channels: Iterable[Channel]) -> dict[Port, list[int]]:
    """What goes if several channels go, by port, in order."""
    numbers: dict[Port, set[int]] = defaultdict(set)
    for channel in channels:
        for port, own in channel.items():
            numbers[port].update(own)
    return {port: sorted(own) for port, own in numbers.items()}


class _Classes:
    """Sets of channels that depend on each other, by union and find."""

    def __init__(self, model: nn.Module, flow: Flow) -> None:
        self._first: dict[Port, int] = {}
        self.layers = {n: m for n, m in model.named_modules() if n in flow.read and (mixes(m) or is_channelwise(m))}
        count = 0
        for name, layer in self.layers.items():
            for side in sides(layer):
                self._first[Port(name, side)] = count
                count += width(layer, side)
        self._parent = list(range(count + 1))
        self.stays = count
        """Stands for what cannot be taken out."""
        owners: dict[int, set[str]] = defaultdict(set)
        for name, module in model.named_modules(remove_duplicate=False):
            for parameter in module.parameters(recurse=False):
                owners[id(parameter)].add(name)
        for name, layer in self.layers.items():
            shared = any(len(owners[id(p)]) > 1 for p in layer.parameters(recurse=False))
            for side in sides(layer):
                port = Port(name, side)
                if shared or not can_be_cropped(layer):
                    for c in range(width(layer, side)):
                        self.join(self.node(port, c), self.stays)
                own = width(layer, side) // groups_of(layer)
                for c in range(own, width(layer, side)):  # every group of a grouped convolution loses the same
                    self.join(self.node(port, c), self.node(port, c % own))

    def node(self, port: Port, channel: int) -> int:
        return self._first[port] + channel

    def find(self, node: int) -> int:
        while self._parent[node] != node:
            self._parent[node] = node = self._parent[self._parent[node]]
        return node

    def by_channel(self, place: Place, nan: Tensor) -> NDArray[np.bool_]:
        """``[channels]``: which of them hold a NaN anywhere; every number of an output counts as one."""
        reader, _ = place
        if reader is None:
            return nan.flatten().numpy()
        return nan.movedim(axis(self.layers[reader], nan), 0).flatten(1).any(1).numpy()

    def join(self, a: int, b: int) -> None:
        self._parent[self.find(a)] = self.find(b)

    def channels(self) -> list[Channel]:
        """The classes that can go: layers write and read them, and something is left of every layer.

        What no layer reads is an output, if one that no NaN comes out of (the most probable class).
        """
        members: dict[int, dict[Port, list[int]]] = defaultdict(lambda: defaultdict(list))
        for port, first in self._first.items():
            for c in range(width(self.layers[port.layer], port.side)):
                members[self.find(first + c)][port].append(c)
        stays = self.find(self.stays)
        return [
            {port: tuple(numbers) for port, numbers in ports.items()}
            for root, ports in members.items()
            if root != stays
            and any(port.side == "out" for port in ports)
            and any(port.side == "in" and mixes(self.layers[port.layer]) for port in ports)
            and all(len(numbers) < width(self.layers[p.layer], p.side) for p, numbers in ports.items())
        ]


def _mark(model: nn.Module, inputs: Inputs, values: Mapping[str, list[Tensor]], classes: _Classes) -> None:
    """Joins the channels that layers write with all places where they are read."""

    def run(chosen: Mapping[str, Tensor]) -> dict[Place, Tensor]:
        """Where a run in which these channels hold NaN has NaN."""
        marks = {
            name: [_with_nan(value, axis(classes.layers[name], value), channels) for value in values[name]]
            for name, channels in chosen.items()
        }
        flow = follow(model, inputs, lambda name, call: marks.get(name, values[name])[call])
        read = {(name, call): t.isnan() for name, calls in flow.read.items() for call, t in enumerate(calls)}
        return read | {(None, i): t.isnan() for i, t in enumerate(flow.outputs)}

    count = {name: width(classes.layers[name], "out") for name in values}
    reach = {
        name: {place for place, nan in run({name: torch.ones(count[name]).bool()}).items() if nan.any()}
        for name in values
    }
    for names in _apart(reach):
        has: list[list[dict[Place, NDArray[np.bool_]]]] = [[], []]
        for bit in range(max(1, *((count[name] - 1).bit_length() for name in names))):
            for wanted, seen in enumerate(has):
                found = run({name: (torch.arange(count[name]) >> bit & 1) == wanted for name in names})
                seen.append({p: classes.by_channel(p, found[p]) for name in names for p in reach[name]})
        for name in names:
            port = Port(name, "out")
            for place in reach[name]:
                unset, set_ = (np.stack([nan[place] for nan in seen]) for seen in has)
                reader, _ = place
                if reader is None:
                    both = np.unique(np.concatenate([unset, set_]), axis=1)
                    unset, set_ = both[: len(unset)], both[len(unset) :]
                for number, senders in _senders(unset, set_, count[name]):
                    other = classes.stays if reader is None else classes.node(Port(reader, "in"), number)
                    for c in senders:
                        classes.join(classes.node(port, int(c)), other)


def _apart(reach: Mapping[str, set[Place]]) -> list[list[str]]:
    """Layers by turns, in as few as a greedy choice gives: what layers of one turn write is never read together."""
    turns: list[tuple[list[str], set[Place]]] = []
    for name, places in reach.items():
        free = next((turn for turn in turns if not turn[1] & places), None)
        if free is None:
            turns.append(([name], set(places)))
        else:
            free[0].append(name)
            free[1].update(places)
    return [names for names, _ in turns]


def _with_nan(value: Tensor, axis: int, chosen: Tensor) -> Tensor:
    marked = value.clone()
    marked.movedim(axis, 0)[chosen] = torch.nan
    return marked


def _senders(unset: NDArray[np.bool_], set_: NDArray[np.bool_], count: int) -> Iterable[tuple[int, NDArray[np.intp]]]:
    """For every place that marks reach, the channels that may have sent them.

    Args:
        unset: ``[bits, places]``, reached when channels without that bit are marked.
        set_: the same for channels with it.
        count: how many channels there are.
    """
    has = (np.arange(count)[None] >> np.arange(len(set_))[:, None] & 1).astype(bool)
    for place in np.flatnonzero(set_[0] | unset[0]):
        fits = np.where(has, set_[:, place, None], unset[:, place, None]).all(0)
        yield int(place), np.flatnonzero(fits)


def _can_go(model: nn.Module, inputs: Inputs, values: Mapping[str, list[Tensor]], before: Flow, group: Group) -> bool:
    """Whether every layer reads the same as before when some channels of the group are gone, without them."""
    removed = together(group.channels[::3])  # the first, and so many that two groups of one layer differ
    if any(len(own) >= width(model.get_submodule(p.layer), p.side) for p, own in removed.items()):
        removed = together(group.channels[:1])
    pruned = copy.deepcopy(model)
    crop(pruned, removed)
    layers = dict(model.named_modules())

    def without(name: str, tensor: Tensor, side: Side) -> Tensor:
        gone = removed.get(Port(name, side))
        if gone is None:
            return tensor
        place = axis(layers[name], tensor)
        kept = sorted(set(range(tensor.shape[place])) - set(gone))
        return tensor.index_select(place, torch.tensor(kept))

    try:
        after = follow(pruned, inputs, lambda name, call: without(name, values[name][call], "out"))
    except DeploykitError:
        return False
    pairs = [
        (without(name, expected, "in"), found)
        for name, calls in before.read.items()
        for expected, found in zip(calls, after.read.get(name, []), strict=False)
    ]
    pairs += list(zip(before.outputs, after.outputs, strict=True))
    complete = all(len(calls) == len(after.read.get(name, [])) for name, calls in before.read.items())
    return complete and all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5) for a, b in pairs
    )
