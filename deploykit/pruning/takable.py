"""What steps that take channels out have in common: which channels a model can lose, and what they refuse early."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deploykit.core.context import Context
from deploykit.core.errors import DeploykitError, said_by
from deploykit.core.patterns import matching
from deploykit.layerwise.channels import mixes
from deploykit.losses import as_tensors
from deploykit.pruning.budget import ranked
from deploykit.pruning.groups import Group, find_groups


def takable(model: nn.Module, context: Context, who: str, skip: Sequence[str] = (), least: int = 1) -> list[Group]:
    """The channels that can be taken out of a model.

    Args:
        model: not changed.
        context: its example is what the model is run on.
        who: the step's name.
        skip: layers whose output channels stay: names or patterns.
        least: groups of fewer channels are left out.

    Raises:
        DeploykitError: there are none; no example; a pattern that matches nothing; weights that are not finite; a model
            whose channels cannot be followed.
    """
    need_example(context, who)
    with said_by(who):
        refuse_not_finite(model)
        stay = matching("layer", skip, mixing(model))
        groups = find_groups(model, sample(context))
    found = [group for group in groups if not stay & set(group.writers) and len(group.channels) >= least]
    if not found:
        raise DeploykitError(f"{who}: there are no channels that can be taken out of this model")
    return found


def need_example(context: Context, who: str) -> None:
    """Raises where there is nothing to run a model on.

    Raises:
        DeploykitError: names the step.
    """
    if not context.example:
        raise DeploykitError(f"{who}: the context has no example to follow channels with")


def sample(context: Context) -> dict[str, Tensor]:
    """The first of the context's examples, ``[1, ...]``."""
    return {name: x[:1] for name, x in as_tensors(context.example).items()}


def mixing(model: nn.Module) -> list[str]:
    """The layers whose channels can go, by name."""
    return [name for name, layer in model.named_modules() if mixes(layer)]


def refuse_not_finite(model: nn.Module) -> None:
    """Raises for weights that no score and no comparison can be made of.

    Raises:
        DeploykitError: names the first.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise DeploykitError(f"the weights '{name}' are not all finite; train or load them again")


def stuck(model: nn.Module, groups: Sequence[Group], multiple: int, most: float) -> str:
    """Why no layer can lose a channel and keep the multiple, and what allows more; empty where one can."""
    order = ranked(model, groups, [torch.arange(len(group.channels)) for group in groups], multiple, most)
    if any(group.allowed[-1] for group in order):
        return ""
    at_most = f" where at most {most:.0%} of one goes" if most < 0.99 else ""
    return (
        f"no layer can lose channels and keep a multiple of {multiple} of them{at_most}. A target with a smaller "
        "channel_multiple allows more; the step prune has an option `multiple`"
    )


def foresee_layers(
    patterns: Iterable[str], original: Any, layers: Callable[[nn.Module], Iterable[str]], who: str
) -> None:
    """Refuses names of layers that the model as it came in does not have, before any long work.

    Args:
        patterns: names or patterns. Parts of layers that it has pass: a step in front may have taken them apart.
        original: that model; None: nobody knows it yet.
        layers: which of its layers count.
        who: the step's name.

    Raises:
        DeploykitError: with the nearest that there is.
    """
    if not isinstance(original, nn.Module):
        return
    known = list(layers(original))
    for pattern in patterns:
        if any(name and pattern.startswith(f"{name}.") for name in known):
            continue
        try:
            matching("layer", [pattern], known)
        except DeploykitError as error:
            raise DeploykitError(
                f"{who}: {error} If a step in front makes that layer (a student's), let `compress` run that step alone."
            ) from None
