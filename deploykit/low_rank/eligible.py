"""Which layers can be decomposed: what they are given is looked at while the network runs once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deploykit.core.errors import DeploykitError
from deploykit.hub.structure import mask_of
from deploykit.layerwise.products import products
from deploykit.layerwise.watching import entered, evaluating, hooked
from deploykit.low_rank.factored import Factored, Place, shape_of
from deploykit.low_rank.forms import decomposed, form_of, refusal

TOLERANCE = 1e-5
"""Of the largest output, by which a layer and its factors of full rank may differ."""


@dataclass(frozen=True)
class Seen:
    """What a layer was given when the network ran."""

    x: Tensor
    """At its first call."""
    runs: Mapping[Place, int]
    """Positions of one sample, of all calls together."""


def look(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Seen]:
    """What the convolutions and linear layers that are called are given. The model is left as it is."""
    found: dict[str, Seen] = {}
    samples = len(next(iter(inputs.values())))

    def note(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        shape = shape_of(layer)
        sizes = x.numel() // shape.c, y.numel() // shape.f
        middle = sizes[1] // y.shape[-1] * x.shape[-1] if len(shape.kernel) == 2 else sizes[1]
        runs: dict[Place, int] = {"in": sizes[0] // samples, "mid": middle // samples, "out": sizes[1] // samples}
        first = found.get(name)
        if first is not None:
            runs = {place: n + first.runs[place] for place, n in runs.items()}
        found[name] = Seen(x.detach() if first is None else first.x, runs)

    hooks = (
        layer.register_forward_hook(
            lambda m, x, named, y, name=name: note(name, m, entered(x, named), y), with_kwargs=True
        )
        for name, layer in products(model).items()
    )
    with evaluating(model), torch.no_grad(), hooked(hooks):
        model(**inputs)
    return found


def layers_of(model: nn.Module) -> list[str]:
    """Convolutions and linear layers by name, decomposed ones as one."""
    factored = [name for name, m in model.named_modules() if isinstance(m, Factored)]
    return [*factored, *(name for name in products(model) if name.rpartition(".")[0] not in factored)]


def obstacles(model: nn.Module, seen: Mapping[str, Seen], form: str) -> dict[str, str]:
    """By convolution or linear layer, why it cannot be decomposed; empty where it can.

    Raises:
        DeploykitError: weights that are not finite.
    """
    held = untouchable(model)
    found = {}
    for name in layers_of(model):
        layer = model.get_submodule(name)
        if isinstance(layer, Factored):
            found[name] = "it is decomposed already"
            continue
        if not all(bool(torch.isfinite(p).all()) for p in layer.parameters()):
            raise DeploykitError(f"the weights of layer '{name}' are not all finite; train or load them again")
        found[name] = (
            "it is the whole model" if not name
            else held[name] if name in held
            else "it is pruned: its zeros would be lost" if mask_of(layer, "weight") is not None
            else "the network does not call it, or reads its weight without calling it" if name not in seen
            else refusal(layer, form)
            or ("" if _reproduced(layer, form, seen[name].x) else "its class computes more than its weight says")
        )  # fmt: skip
    return found


def untouchable(model: nn.Module) -> dict[str, str]:
    """Layers whose weights belong to somebody else, and why: they are frozen, shared, or made by a parametrization."""
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name.rpartition(".")[0])
    found = {}
    for name, layer in products(model).items():
        weight: Any = layer.weight
        others = owners.get(id(weight), {name}) - {name}
        if others:
            found[name] = f"its weight is shared with {', '.join(sorted(others))}"
        elif parametrize.is_parametrized(layer) and mask_of(layer, "weight") is None:
            found[name] = "its weight is parametrized (weight norm or the like)"
        elif not all(p.requires_grad for p in layer.parameters()):
            found[name] = "its weight or bias is frozen"
    return found


def _reproduced(layer: nn.Module, form: str, x: Tensor) -> bool:
    """Whether factors that lose nothing compute what the layer does: its class may do more than torch's."""
    exact: Any = copy.deepcopy(layer).double().eval()
    try:
        with torch.no_grad():
            y = exact(x.double())
            found = decomposed(exact, form, form_of(form).full(shape_of(layer)))(x.double())
    except Exception:  # the user's code and torch raise whatever they like
        return False
    return y.shape == found.shape and float((found - y).abs().max()) <= TOLERANCE * float(y.abs().max())
