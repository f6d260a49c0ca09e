"""The masks of a model by a criterion's name: what `sparsify` and `semi_structured` have in common."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deploykit.core.context import Context
from deploykit.core.errors import DeploykitError, unknown
from deploykit.core.patterns import matching
from deploykit.hub.structure import attach_mask, mask_of
from deploykit.pruning.criteria import CRITERIA
from deploykit.pruning.criteria.evidence import Evidence
from deploykit.pruning.obs import Matrix, Portion, damped, surgeon
from deploykit.pruning.patches import matrix, products
from deploykit.pruning.statistics import covariances, fisher

OBS = "obs"
LEAST_SAMPLES = 32
"""For covariances."""


def resolved(criterion: str, context: Context, who: str) -> str:
    """The criterion that is meant, refused where it lacks something.

    Args:
        criterion: a name, or ``auto``: optimal brain surgeon where there are samples enough, else magnitude.
        context: its calibration data.
        who: the step's name.

    Raises:
        DeploykitError: no such criterion; it scores no single weights; data or labels are missing, or too few.
    """
    data = context.data.get("calibration")
    enough = data is not None and len(data) >= LEAST_SAMPLES
    if criterion == "auto":
        return OBS if enough else "l1"
    names = [OBS, *(name for name, c in CRITERIA.items() if c.scores == "weights")]
    if criterion not in names:
        if criterion in CRITERIA:
            raise DeploykitError(
                f"{who}: criterion '{criterion}' scores whole channels (step prune); for single weights there are "
                f"{', '.join(names)}"
            )
        raise unknown("criterion", criterion, ["auto", *names])
    if criterion == OBS and not enough:
        have = context.need("calibration", who)
        raise DeploykitError(
            f"{who}: criterion 'obs' needs at least {LEAST_SAMPLES} calibration samples; there are {len(have)}. "
            "'hessian' works with fewer."
        )
    needs = () if criterion == OBS else CRITERIA[criterion].needs
    if "data" in needs and context.need("calibration", who).labels is None and "labels" in needs:
        raise DeploykitError(f"{who}: criterion '{criterion}' needs labels, and the calibration data has none")
    return criterion


def layers_of(model: nn.Module, skip: Sequence[str], who: str) -> dict[str, Any]:
    """Convolutions and linear layers by path, without those that a pattern names.

    Raises:
        DeploykitError: there are none; a pattern matches nothing.
    """
    found = products(model)
    if not found:
        raise DeploykitError(f"{who}: the model has no convolution or linear layer")
    skipped = set(matching("layer", skip, found))
    return {name: layer for name, layer in found.items() if name not in skipped}


def masked(
    model: nn.Module, layers: Sequence[str], criterion: str, context: Context, portions: Sequence[Portion]
) -> nn.Module:
    """A copy of the model in which the weights that a criterion finds least worth are zeros that stay zero.

    Args:
        model: not changed; masks that it has already stay.
        layers: that lose weights.
        criterion: a `resolved` one.
        context: calibration data, sample, seed.
        portions: who lives by the scores; ``obs`` takes all one after another, the others the last alone.
    """
    found = copy.deepcopy(model)
    lives = {name: _lives(found.get_submodule(name)) for name in layers}
    if criterion == OBS:
        matrices = _matrices(found, layers, context)
        lives = surgeon(matrices, {name: lives[name] for name in matrices}, portions)
    else:
        sample = {name: torch.from_numpy(x[:1]) for name, x in context.example.items()}
        evidence = Evidence(sample, context.data.get("calibration"), context.loss, context.seed)
        lives = portions[-1](CRITERIA[criterion].function(found, layers, evidence), lives)
    for name, mask in lives.items():
        attach_mask(found.get_submodule(name), "weight", mask)
    return found


def _lives(layer: nn.Module) -> Tensor:
    held = mask_of(layer, "weight")
    weight: Any = layer.weight
    return held.mask if held is not None else torch.ones_like(weight, dtype=torch.bool)


def _matrices(model: nn.Module, layers: Sequence[str], context: Context) -> Mapping[str, Matrix]:
    data = context.need("calibration", OBS)
    them: dict[str, Any] = {name: model.get_submodule(name) for name in layers}
    seen, matters = covariances(model, them, data), fisher(model, them, data, context.seed)
    return {
        name: Matrix(matrix(layer, layer.weight.detach()).double(), damped(seen[name].centred()), matters[name])
        for name, layer in them.items()
        if seen[name].count  # a layer that is never called has nothing to go by
    }


def in_portions(choose: Any, sparsity: float, count: int) -> list[Portion]:
    """Portions up to a sparsity, equally large."""
    return [partial(choose, sparsity=sparsity * (i + 1) / count) for i in range(count)]
