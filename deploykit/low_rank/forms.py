"""The decompositions by name, and layers made into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deploykit.core.errors import DeploykitError, unknown
from deploykit.low_rank import channel, cp, spatial, tucker
from deploykit.low_rank.factored import Factored, Place, Ranks, Shape, carrier, shape_of


class Form(Protocol):
    """What the file of a decomposition has. Factors are in the order in which they run."""

    @property
    def RUNS_AT(self) -> tuple[Place, ...]:
        """Where each factor runs."""
        ...

    @property
    def KERNEL(self) -> int | None:
        """Which factor has the layer's kernel as a whole; None: none, and what its class does in forward is lost."""
        ...

    def full(self, shape: Shape, /) -> Ranks:
        """Ranks with which nothing is lost."""
        ...

    def choices(self, shape: Shape, multiple: int, /) -> Iterator[Ranks]:
        """Ranks worth a look."""
        ...

    def weights(self, shape: Shape, ranks: Ranks, /) -> tuple[int, ...]:
        """How many each factor has."""
        ...

    def split(self, w: Tensor, g: int, ranks: Ranks, /) -> tuple[Tensor, ...]:
        """Factors of a weight ``[f, c/g, *kernel]``."""
        ...

    def approximations(self, w: Tensor, g: int, choices: Sequence[Ranks], /) -> Iterator[Tensor]:
        """The weights that its factors would make, for each of the choices; what they share is computed once."""
        ...

    def merge(self, factors: Sequence[Tensor], g: int, ranks: Ranks, /) -> Tensor:
        """The weight that factors make."""
        ...

    def modules(self, layer: Any, ranks: Ranks, /) -> list[nn.Module]:
        """The factors' modules, not filled."""
        ...


FORMS: Mapping[str, Form] = {"channel": channel, "spatial": spatial, "tucker": tucker, "cp": cp}


def form_of(name: str) -> Form:
    """The decomposition of that name.

    Raises:
        DeploykitError: there is none.
    """
    if name not in FORMS:
        raise unknown("form", name, FORMS)
    return FORMS[name]


def refusal(layer: Any, form: str) -> str:
    """Why a layer cannot have a form; empty: it can."""
    shape = shape_of(layer)
    if shape.depthwise:
        return "it is depthwise: every channel has one small kernel, which shares nothing with the others"
    if form == "channel":
        return ""
    if len(shape.kernel) != 2:
        return f"it is no convolution in two dimensions, which {form} needs"
    if shape.g > 1:
        return f"it has groups, which {form} does not"
    if shape.taps == 1:
        return f"it is 1x1: {form} has nothing to separate"
    if form_of(form).KERNEL is None and type(layer).forward is not nn.Conv2d.forward:
        return f"its class has a forward of its own, which {form} would lose"
    return ""


def empty(layer: nn.Module, form: str, ranks: Ranks) -> Factored:
    """A layer's factors, which are to be filled.

    Raises:
        DeploykitError: no such form, a layer that cannot have it, or ranks below 1 or above what loses nothing.
    """
    made, why = form_of(form), refusal(layer, form)
    if why:
        raise DeploykitError(f"the layer cannot be decomposed: {why}")
    shape = shape_of(layer)
    most = made.full(shape)
    if form == "channel" and len(ranks) == 2 and ranks[0] in channel.slices(shape):
        most = ranks[0], channel.largest(shape, ranks[0])
    if len(ranks) != len(most) or not all(1 <= r <= m for r, m in zip(ranks, most, strict=True)):
        raise DeploykitError(f"ranks of {form} must lie between 1 and {most} for this layer, given {ranks}")
    return Factored(layer, form, ranks, made.modules(layer, ranks))


def decomposed(layer: Any, form: str, ranks: Ranks) -> Factored:
    """A layer's factors, the best that the form finds for its weight.

    Raises:
        DeploykitError: as `empty`.
    """
    made = empty(layer, form, ranks)
    with torch.no_grad():
        factors = form_of(form).split(layer.weight.detach().double(), shape_of(layer).g, ranks)
        for module, factor in zip(made, factors, strict=True):
            assert isinstance(module.weight, Tensor)
            module.weight.copy_(factor)
        if layer.bias is not None:
            made[-1].bias.copy_(layer.bias)  # type: ignore[operator]
    return made


def whole_shape(factors: Factored) -> Shape:
    """Of the layer that factors stand for, where one of them has its kernel."""
    own, kernel = vars(factors), form_of(factors.form).KERNEL
    if "in_channels" not in own:
        return Shape(own["out_features"], own["in_features"], (), 1)
    carries: Any = factors[kernel or 0]
    return Shape(own["out_channels"], own["in_channels"], tuple(carries.kernel_size), own["groups"])


def merged(factors: Factored) -> nn.Module:
    """The layer that factors stand for, with the weight that they make.

    Raises:
        DeploykitError: no factor has the layer's kernel.
    """
    form, shape = form_of(factors.form), whole_shape(factors)
    if form.KERNEL is None:
        raise DeploykitError(f"factors of the form {factors.form} cannot be made one layer again")
    made: Any = factors
    layer: Any = carrier(made[form.KERNEL], shape.c, shape.f, shape.g)
    with torch.no_grad():
        layer.weight.copy_(form.merge([factor.weight.double() for factor in made], shape.g, factors.ranks))
    layer.bias = made[-1].bias
    return layer  # type: ignore[no-any-return]
