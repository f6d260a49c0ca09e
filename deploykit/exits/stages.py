"""Where a network can be left early: the ends of its stages, found by running it, or named."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deploykit.core.errors import DeploykitError, some, unknown
from deploykit.exits.places import Stage
from deploykit.layerwise.watching import evaluating, hooked

FEWEST = 2
"""Stages: one to leave behind, and the one that is the deepest."""


@dataclass(frozen=True)
class _Call:
    """A module that ran, in the order in which they ended."""

    path: str
    shape: tuple[int, ...] | None
    """None: what it returns is no tensor ``[n, channels, height, width]`` or ``[n, channels]``."""
    inner: bool
    """Whether it is made of modules."""


def found(network: nn.Module, example: Mapping[str, Tensor]) -> tuple[Stage, ...]:
    """The stages of a network of convolutions, first to last.

    A stage ends where maps become smaller and stay so: at the last module that writes maps of a resolution, and of
    those that end there together the outermost. Averages to a single position are no maps. Where at least two of these
    ends are modules made of modules (blocks, layers), only those count: the last activation of a stem is no stage.

    Args:
        network: run in evaluation mode, and left as it was.
        example: two samples or more, ``[n, ...]`` by forward-argument name.

    Raises:
        DeploykitError: there are fewer than two.
    """
    calls = [c for c in _once(_calls(network, example)) if c.shape is not None and len(c.shape) == 3]
    maps = [(c, shape[1] * shape[2]) for c in calls if (shape := c.shape) is not None and shape[1] * shape[2] > 1]
    ends: list[_Call] = []
    largest = 0  # of the maps that come behind
    for call, size in reversed(maps):
        if size > largest:
            ends.insert(0, call)
            largest = size
    blocks = [c for c in ends if c.inner]
    ends = blocks if len(blocks) >= FEWEST else ends
    if len(ends) < FEWEST:
        raise DeploykitError(
            f"no stages found: a stage ends where maps become smaller for good, and {len(ends)} such end is there. "
            f"Name them, first to last: stages = [...]. Modules: {some([p for p, _ in network.named_children()])}"
        )
    return tuple(_stage(c) for c in ends)


def named(network: nn.Module, example: Mapping[str, Tensor], paths: Sequence[str]) -> tuple[Stage, ...]:
    """The stages that end with the modules of these paths, first to last; the last one is the deepest.

    Args:
        network: run in evaluation mode, and left as it was.
        example: two samples or more, ``[n, ...]`` by forward-argument name.
        paths: as in ``named_modules``.

    Raises:
        DeploykitError: fewer than two; a path of no module; a module that does not run exactly once, that does not
            write maps or vectors, or that runs before the one named in front of it.
    """
    if len(paths) < FEWEST:
        raise DeploykitError(f"stages are two or more, first to last; given: {', '.join(paths) or 'none'}")
    known = [path for path, _ in network.named_modules() if path]
    for path in paths:
        if path not in known:
            raise unknown("stage", path, known)
    calls = _calls(network, example)
    order = [call.path for call in calls]
    for path in paths:
        if order.count(path) != 1:
            raise DeploykitError(f"stage '{path}' runs {order.count(path)} times in the network; a stage runs once")
    for before, behind in itertools.pairwise(paths):
        if order.index(before) >= order.index(behind):
            raise DeploykitError(f"stages are named first to last: '{behind}' does not end behind '{before}'")
    return tuple(_stage(calls[order.index(path)]) for path in paths)


def _stage(call: _Call) -> Stage:
    if call.shape is None:
        raise DeploykitError(
            f"stage '{call.path}' writes neither maps [n, channels, height, width] nor vectors [n, channels]"
        )
    return Stage(call.path, call.shape)


def _once(calls: Sequence[_Call]) -> list[_Call]:
    order = [call.path for call in calls]
    return [call for call in calls if order.count(call.path) == 1]


def _calls(network: nn.Module, example: Mapping[str, Tensor]) -> list[_Call]:
    """What ran, by the order in which it ended; the network as a whole is left out."""
    seen: list[_Call] = []

    def watch(path: str, module: nn.Module) -> Any:
        def note(_module: nn.Module, _given: Any, y: Any) -> None:
            fits = isinstance(y, Tensor) and y.ndim in (2, 4)
            seen.append(_Call(path, tuple(y.shape[1:]) if fits else None, any(True for _ in module.children())))

        return module.register_forward_hook(note)

    with evaluating(network), hooked(watch(p, m) for p, m in network.named_modules() if p), torch.no_grad():
        network(**example)
    return seen
