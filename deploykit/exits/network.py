"""`WithExits`: a network and its exits as one module, which can be trained, written to a folder and exported."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deploykit.core.errors import DeploykitError
from deploykit.exits.heads import Exit, pooled
from deploykit.exits.places import OUTPUT, Places, cut_name, exit_name
from deploykit.layerwise.watching import evaluating, hooked
from deploykit.losses import tensors


@dataclass(frozen=True)
class Seen:
    """What a network with exits computes, first to last; the network's own is the last."""

    logits: tuple[Tensor, ...]
    """``[n, classes]`` each."""
    features: tuple[Tensor, ...]
    """``[n, channels of the deepest]`` each."""
    maps: tuple[Tensor, ...]
    """What the stages write."""


class WithExits(nn.Module):
    """A network with exits; made by `attach`. It answers by name: the network's own answer, then ``exit_1`` ….

    The network's own comes first, so that whoever reads one answer reads that one.
    """

    def __init__(self, network: nn.Module, places: Places) -> None:
        """Exits get random weights; the network is shared, not copied."""
        super().__init__()
        self.network, self.places = network, places
        *early, deepest = places.stages
        self.exits = nn.ModuleList(Exit(stage.shape, deepest.shape, places.classes) for stage in early)

    def look(self, *given: Tensor, **named: Tensor) -> Seen:
        """All that it computes; inputs as the network takes them.

        Raises:
            DeploykitError: a stage did not run.
        """
        seen: dict[str, Tensor] = {}

        def watch(path: str) -> Any:
            def note(_stage: nn.Module, _given: Any, y: Tensor) -> None:
                seen[path] = y.clone()  # what comes behind may write in place

            return self.network.get_submodule(path).register_forward_hook(note)

        with hooked(watch(stage.path) for stage in self.places.stages):
            (answer,) = tensors(self.network(*given, **named))
        missing = [stage.path for stage in self.places.stages if stage.path not in seen]
        if missing:
            raise DeploykitError(f"stage '{missing[0]}' does not run any more: its exit has nothing to read")
        *early, deepest = (seen[stage.path] for stage in self.places.stages)
        left = [leave(x) for leave, x in zip(self.exits, early, strict=True)]
        return Seen(
            (*(logits for _, logits in left), answer),
            (*(features for features, _ in left), pooled(deepest)),
            (*early, deepest),
        )

    def by_name(self, seen: Seen) -> dict[str, Tensor]:
        """The answers as a file names them."""
        *early, own = seen.logits
        return {self.places.output: own} | {exit_name(k): z for k, z in enumerate(early, 1)}


def attach(network: nn.Module, places: Places) -> WithExits:
    """The network with exits at these places; their weights are random.

    The module takes what the network takes, under the same names, so it has a class of its own, as modules with
    parametrizations have in torch.
    """

    def forward(self: WithExits, *given: Tensor, **named: Tensor) -> dict[str, Tensor]:
        return self.by_name(self.look(*given, **named))

    made: WithExits = _like(network, forward, WithExits)(network, places)
    return made


class WithCuts(nn.Module):
    """Made by `with_cuts`."""

    def __init__(self, inner: WithExits) -> None:
        """Shares it."""
        super().__init__()
        self.inner = inner


def with_cuts(inner: WithExits) -> nn.Module:
    """The module that also answers what stages with an exit hand on, as ``cut_1`` …: where it can be taken apart."""

    def forward(self: WithCuts, *given: Tensor, **named: Tensor) -> dict[str, Tensor]:
        seen = self.inner.look(*given, **named)
        return self.inner.by_name(seen) | {cut_name(k): x for k, x in enumerate(seen.maps[:-1], 1)}

    made: nn.Module = _like(inner.network, forward, WithCuts)(inner)
    made.training = inner.training
    return made


def _like(network: nn.Module, forward: Any, kind: type) -> Any:
    """A subclass whose forward has the signature of the network's."""
    forward.__signature__ = inspect.signature(type(network).forward)
    return type(kind.__name__, (kind,), {"forward": forward, "__doc__": kind.__doc__, "__module__": kind.__module__})


class InTraining(nn.Module):
    """A network with exits as its losses want it: ``(logits, features)``, each first to last."""

    def __init__(self, inner: WithExits) -> None:
        """Shares it."""
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Inputs by name."""
        seen = self.inner.look(**inputs)
        return seen.logits, seen.features


def classes_of(network: nn.Module, example: Mapping[str, Tensor]) -> tuple[int, str]:
    """How many classes a network tells apart, and what its answer is called in a file.

    Args:
        network: run in evaluation mode, and left as it was.
        example: two samples or more, by forward-argument name.

    Raises:
        DeploykitError: it does not answer one ``[n, classes]``.
    """
    with evaluating(network), torch.no_grad():
        answered = network(**example)
    logits = tensors(answered)
    if len(logits) != 1 or logits[0].ndim != 2:
        shapes = ", ".join(str(list(z.shape)) for z in logits) or "no tensors"
        raise DeploykitError(f"exits are for networks that answer one [n, classes]; this one answers {shapes}")
    return int(logits[0].shape[1]), next(iter(answered)) if isinstance(answered, Mapping) else OUTPUT
