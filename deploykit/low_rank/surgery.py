"""Networks with some layers decomposed, and what is needed to make them so again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deploykit.core.errors import DeploykitError
from deploykit.layerwise.watching import hooked
from deploykit.losses import tensors
from deploykit.low_rank.factored import Factored, Ranks
from deploykit.low_rank.forms import decomposed, empty, form_of, merged, whole_shape


def replaced(model: nn.Module, form: str, ranks: Mapping[str, Ranks]) -> nn.Module:
    """A copy of the network with factors in the place of some layers."""
    made = copy.deepcopy(model)
    for name, own in ranks.items():
        made.set_submodule(name, decomposed(made.get_submodule(name), form, own))
    return made


def decomposed_in(model: nn.Module, form: str) -> list[str]:
    """Decomposed layers that can be made whole again, to be decomposed anew in the same form.

    Not those whose factors were pruned, narrowed, frozen or made by a parametrization since.
    """
    if form_of(form).KERNEL is None:
        return []
    factored = {name: m for name, m in model.named_modules() if isinstance(m, Factored) and m.form == form}
    return [name for name, m in factored.items() if _as_made(m)]


def _as_made(factors: Factored) -> bool:
    if any(parametrize.is_parametrized(factor) for factor in factors):
        return False
    sizes = form_of(factors.form).weights(whole_shape(factors), factors.ranks)
    weights = [tensor for name, tensor in factors.named_parameters() if name.endswith(".weight")]
    return [w.numel() for w in weights] == list(sizes) and all(p.requires_grad for p in factors.parameters())


def whole_again(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A copy of the network whose decomposed layers are single ones, with the weights that their factors make."""
    made = copy.deepcopy(model)
    for name in names:
        factors = made.get_submodule(name)
        assert isinstance(factors, Factored)
        made.set_submodule(name, merged(factors))
    return made


def factors_of(model: nn.Module) -> dict[str, tuple[str, Ranks]]:
    """Form and ranks of the decomposed layers of a network, by name."""
    return {name: (m.form, m.ranks) for name, m in model.named_modules() if isinstance(m, Factored)}


def give_factors(model: nn.Module, factors: Mapping[str, tuple[str, Ranks]]) -> None:
    """Puts empty factors in the place of layers, in place; what they hold is to be loaded afterwards.

    Raises:
        DeploykitError: a layer that the model does not have, or that cannot be decomposed so.
    """
    for name, (form, ranks) in factors.items():
        try:
            model.set_submodule(name, empty(model.get_submodule(name), form, ranks))
        except AttributeError:
            raise DeploykitError(f"the model has no convolution or linear layer '{name}'") from None
        except DeploykitError as error:
            raise DeploykitError(f"layer '{name}': {error}") from None


def assert_runs(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Raises if a network with factors does not run, does not call them, or its answers are not finite.

    Raises:
        DeploykitError: says what to do.
    """
    made, called = copy.deepcopy(model).eval(), set[str]()
    factored = {name: m for name, m in made.named_modules() if isinstance(m, Factored)}
    hooks = (m.register_forward_hook(lambda *_, name=name: called.add(name)) for name, m in factored.items())
    try:
        with torch.no_grad(), hooked(hooks):
            answers = tensors(made(**inputs))
    except Exception as error:  # the user's code and torch raise whatever they like
        raise DeploykitError(
            f"the model does not run with factors in it ({error}); leave layers out with skip"
        ) from None
    idle = [name for name in factored if name not in called]
    if idle:
        raise DeploykitError(
            f"the model does not call '{idle[0]}' by that name (it keeps the layer elsewhere, too), so its "
            "factors would do nothing; leave it out with skip"
        )
    if not all(bool(torch.isfinite(y).all()) for y in answers if y.is_floating_point()):
        raise DeploykitError("the decomposed model gives numbers that are not finite; leave layers out with skip")
