"""Criteria: which channels (and single weights) matter least. One idea a file; here they get their names.

What a criterion scores decides how its scores reach the channels of a group:

weights: in the shape of each layer's weight; a channel has the sum over the weights that write it.
ports: ``[channels]`` where layers read, write or normalise; a channel has the sum over the ports it passes.
channels: one value for every channel of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deploykit.core.errors import DeploykitError, unknown
from deploykit.core.target import Need
from deploykit.layerwise.channels import groups_of, mixes, weight_axis
from deploykit.pruning.criteria.activation import activation
from deploykit.pruning.criteria.bn_scale import bn_scale
from deploykit.pruning.criteria.chance import chance, chance_by_channel
from deploykit.pruning.criteria.evidence import Evidence
from deploykit.pruning.criteria.fisher import fisher
from deploykit.pruning.criteria.fpgm import fpgm
from deploykit.pruning.criteria.hessian import hessian
from deploykit.pruning.criteria.magnitude import l1, l2
from deploykit.pruning.criteria.oracle import oracle
from deploykit.pruning.criteria.snip import snip
from deploykit.pruning.criteria.synflow import ROUNDS, synflow
from deploykit.pruning.criteria.taylor import taylor
from deploykit.pruning.crop import Port
from deploykit.pruning.groups import Channel, Group


@dataclass(frozen=True)
class Criterion:
    """A function ``(model, layers, evidence)``, what it scores, and what it cannot do without."""

    function: Callable[[nn.Module, Any, Evidence], Any]
    scores: Literal["weights", "ports", "channels"]
    needs: tuple[Need, ...] = ()
    in_cost: bool = False
    """Whether scores are changes of the cost, which can be added and compared over the whole network."""
    rounds: int = 1
    """How often single weights are scored anew while they go."""
    by_channel: Callable[[nn.Module, Sequence[Group], Evidence], list[Tensor]] | None = None
    """What scores whole channels where sums over their weights would not do."""


CRITERIA: Mapping[str, Criterion] = {
    "l1": Criterion(l1, "weights"),
    "l2": Criterion(l2, "weights"),
    "bn_scale": Criterion(bn_scale, "ports"),
    "taylor": Criterion(taylor, "ports", ("data",), in_cost=True),
    "hessian": Criterion(hessian, "weights", ("data",), in_cost=True),
    "fisher": Criterion(fisher, "channels", ("data",), in_cost=True),
    "activation": Criterion(activation, "weights", ("data",)),
    "fpgm": Criterion(fpgm, "ports"),
    "random": Criterion(chance, "weights", by_channel=chance_by_channel),
    "synflow": Criterion(synflow, "weights", rounds=ROUNDS),
    "snip": Criterion(snip, "weights", ("data", "labels"), in_cost=True),
    "oracle": Criterion(oracle, "channels", ("data",), in_cost=True),
}


def criterion(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        DeploykitError: there is none.
    """
    if name not in CRITERIA:
        raise unknown("criterion", name, CRITERIA)
    return CRITERIA[name]


def importance(model: nn.Module, groups: Sequence[Group], name: str, evidence: Evidence) -> list[Tensor]:
    """How much each channel matters, by group, ``[channels]``, float64.

    Raises:
        DeploykitError: the criterion needs what there is not, or finds nothing to go by.
    """
    chosen = criterion(name)
    whole = chosen.by_channel or (chosen.function if chosen.scores == "channels" else None)
    if whole is not None:
        return [scores.double() for scores in whole(model, groups, evidence)]
    layers = list(dict.fromkeys(port.layer for group in groups for port in group.ports))
    if chosen.scores == "weights":
        layers = [name for name in layers if mixes(model.get_submodule(name))]
    found = chosen.function(model, layers, evidence)
    if chosen.scores == "weights":
        found = {port: total for layer, scores in found.items() for port, total in _by_channel(model, layer, scores)}
    blind = next((g for g in groups if not any(port in found for port in g.ports)), None)
    if blind is not None:
        raise DeploykitError(f"criterion '{name}' cannot rank the channels of {blind.writers[0]}")
    found = {port: scores.double() for port, scores in found.items()}
    return [torch.stack([_total(found, channel) for channel in group.channels]) for group in groups]


def _total(scores: Mapping[Port, Tensor], channel: Channel) -> Tensor:
    parts = [scores[port][list(numbers)].sum() for port, numbers in channel.items() if port in scores]
    return torch.stack(parts).sum()


def _by_channel(model: nn.Module, layer: str, scores: Tensor) -> list[tuple[Port, Tensor]]:
    """Sums over the weights of every output channel."""
    module = model.get_submodule(layer)
    axis = weight_axis(module, "out")
    if axis == 1 and groups_of(module) > 1:  # transposed: [in, out / groups, ...]
        scores = torch.cat(scores.chunk(groups_of(module)), dim=1)
    return [(Port(layer, "out"), scores.movedim(axis, 0).flatten(1).sum(1))]


def comparable(scores: Sequence[Tensor], savings: Sequence[float], in_cost: bool) -> list[Tensor]:
    """Scores that can be ranked over the whole network.

    What raises the cost least for what it saves goes first, as things are packed that are worth most for their weight.
    Scores that mean nothing beyond their layer are divided by their mean.

    Args:
        scores: by group, ``[channels]``.
        savings: by group, what one channel saves of the budget.
        in_cost: see `Criterion`.
    """
    if in_cost:
        return [own / max(saving, 1e-12) for own, saving in zip(scores, savings, strict=True)]
    return [own / own.mean().clamp_min(1e-30) for own in scores]
