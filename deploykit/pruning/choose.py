"""The masks of a model by a criterion's name: what `sparsify` and `semi_structured` have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deploykit.core.context import Context
from deploykit.core.errors import DeploykitError, said_by, some, unknown
from deploykit.core.manifest import Finding
from deploykit.core.patterns import matching
from deploykit.core.progress import track
from deploykit.hub.structure import attach_mask, mask_of
from deploykit.layerwise.covariance import covariances, damped
from deploykit.layerwise.fisher import fisher
from deploykit.layerwise.products import matrix, products, sharing
from deploykit.pruning.criteria import CRITERIA
from deploykit.pruning.criteria.evidence import Evidence
from deploykit.pruning.masks import Masks, Scores
from deploykit.pruning.obs import Matrix, costs
from deploykit.pruning.takable import refuse_not_finite, sample

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
    """Convolutions and linear layers by path, without those that a pattern names, or that share their weights.

    Raises:
        DeploykitError: there are none; a pattern matches nothing; weights that are not finite.
    """
    found = products(model)
    if not found:
        raise DeploykitError(f"{who}: the model has no convolution or linear layer")
    with said_by(who):
        refuse_not_finite(model)
    tied = sharing(model)
    if len(tied) == len(found):
        raise DeploykitError(f"{who}: all layers share their weights with others ({some(sorted(tied), 4)})")
    skipped = set(matching("layer", skip, found))
    return {name: layer for name, layer in found.items() if name not in skipped | tied}


def masked(
    model: nn.Module,
    layers: Sequence[str],
    criterion: str,
    context: Context,
    cuts: Sequence[Callable[[Scores, Masks], dict[str, Tensor]]],
    pattern: tuple[int, int] | None = None,
) -> nn.Module:
    """A copy of the model in which the weights that a criterion finds least worth are zeros that stay zero.

    Args:
        model: not changed; masks that it has already stay.
        layers: that lose weights.
        criterion: a `resolved` one.
        context: calibration data, sample, seed.
        cuts: who lives by the scores; weights are scored anew for each.
        pattern: N and M, where at most N of M inputs will live: ``obs`` wants to know.
    """
    found = copy.deepcopy(model)
    evidence = Evidence(sample(context), context.data.get("calibration"), context.loss, context.seed)
    for cut in cuts:
        lives = {name: _lives(found.get_submodule(name)) for name in layers}
        # slopes are wanted of frozen weights too, and statistics of a model in training must not move
        judged = copy.deepcopy(found).eval().requires_grad_(True)
        if criterion == OBS:
            scores = _surgeon(judged, layers, lives, context, pattern)
        else:
            scores = CRITERIA[criterion].function(judged, layers, evidence)
        for name, mask in cut(scores, {name: lives[name] for name in scores}).items():
            attach_mask(found.get_submodule(name), "weight", mask)
    return found


def kept(model: nn.Module, step: str) -> Finding:
    """How many weights of every layer live, for the report; ``step``: who masked them.

    Shares are of what can be masked, the weights of convolutions and linear layers; what else there is is said.
    """
    tied = sharing(model)
    alive = {name: _lives(layer) for name, layer in products(model).items() if name not in tied}
    rows = tuple(
        (name, mask.numel(), int(mask.sum()), 100 * float((~mask).double().mean())) for name, mask in alive.items()
    )
    gone = sum(had - left for _, had, left, _ in rows) / sum(had for _, had, _, _ in rows)
    title = f"Weights that stay: {gone:.1%} are zero"
    return Finding(step, title, ("layer", "weights", "left", "zeros %"), rows, summary=_uncounted(model))


def _uncounted(model: nn.Module) -> str:
    """The matrices that no mask is on (of recurrent layers, embeddings, attention, or shared ones), in words."""
    tied = sharing(model)
    counted = {id(p) for name, layer in products(model).items() if name not in tied for p in layer.parameters()}
    others = {name: p for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in counted}
    if not others:
        return ""
    number = sum(p.numel() for p in others.values())
    return (
        f"shares are of convolutions and linear layers; {number:,} weights of other kinds, or that layers share, stay "
        f"whole and are not counted: {some(list(others), 4)}"
    )


def rounds(criterion: str) -> int:
    """How many cuts a `resolved` criterion wants."""
    return CRITERIA[criterion].rounds if criterion in CRITERIA else 1


def _lives(layer: nn.Module) -> Tensor:
    held = mask_of(layer, "weight")
    weight: Any = layer.weight
    return held.mask if held is not None else torch.ones_like(weight, dtype=torch.bool)


def _surgeon(
    model: nn.Module, layers: Sequence[str], lives: Masks, context: Context, pattern: tuple[int, int] | None
) -> dict[str, Tensor]:
    """What weights cost by `deploykit.pruning.obs`; layers that are never called have nothing to go by."""
    data = context.need("calibration", OBS)
    them: dict[str, Any] = {name: model.get_submodule(name) for name in layers}
    seen, matters = covariances(model, them, data), fisher(model, them, data, context.seed)
    found = {}
    for name, layer in track([item for item in them.items() if seen[item[0]].count], "optimal brain surgeon"):
        w = matrix(layer, layer.weight.detach())
        whole = Matrix(w, damped(seen[name].centred()).to(w), matters[name].to(w))
        room = None
        if pattern is not None:  # inputs lie c, then position: M neighbours are M channels at one position
            c, positions = layer.weight.shape[1], w.shape[2] // layer.weight.shape[1]
            room = (torch.arange(c)[:, None] // pattern[1] * positions + torch.arange(positions)).flatten()
        most = pattern[1] - pattern[0] if pattern is not None else 0
        found[name] = costs(whole, lives[name].reshape(w.shape), room, most).reshape(layer.weight.shape)
    return found
