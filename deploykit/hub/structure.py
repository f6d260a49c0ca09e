"""Structure on a module's weights: zeros that stay zero, held by torch parametrizations until lowering bakes them in.

torch shares the class of a parametrized layer with its deep copies; whoever changes one copy changes the class of all.
The functions here give a layer a class of its own first, so that a teacher is safe from what is done to its copy.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deploykit.core.errors import DeploykitError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Mask(nn.Module):
    """``w = mask * v``: the zeros of the mask stay zero while v is trained.

    Args:
        mask: bool, shape of the weight; True where the weight lives.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        """Holds the mask as a buffer."""
        super().__init__()
        self.register_buffer("mask", mask.detach().to(torch.bool).clone())

    def forward(self, v: Tensor) -> Tensor:
        """The weight the layer computes with."""
        return self.mask * v

    def right_inverse(self, w: Tensor) -> Tensor:
        """What is trained after ``layer.weight = w``."""
        return w

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        """A state dict without masks is refused, also where ``strict`` is not asked for: the zeros would be lost."""
        if f"{prefix}mask" not in state_dict:
            where = prefix.replace("parametrizations.", "").rsplit(".", 2)[0]
            errors.append(
                f"the zeros of {where} are held by a mask, and the state dict has none. Load weights before pruning, "
                "or a state dict of the pruned model."
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


def attach_mask(layer: nn.Module, name: str, mask: Tensor) -> None:
    """Makes the zeros of a parameter permanent. A second mask is added to the first: no zero comes back to life.

    Args:
        layer: the module that owns the parameter; changed in place.
        name: the parameter's name in it, e.g. ``"weight"``.
        mask: bool, shape of the parameter.
    """
    weight = getattr(layer, name)
    if mask.shape != weight.shape:
        raise ValueError(f"mask {tuple(mask.shape)} does not fit {name} {tuple(weight.shape)}")
    held = mask_of(layer, name)
    if held is not None:
        held.mask = held.mask & mask.to(held.mask)
        return
    if parametrize.is_parametrized(layer):
        own = {k: v for k, v in vars(type(layer)).items() if k not in ("__dict__", "__weakref__")}
        layer.__class__ = type(type(layer).__name__, type(layer).__bases__, own)
    parametrize.register_parametrization(layer, name, Mask(mask.to(weight.device)))
    layer.parametrizations.train(layer.training)  # type: ignore[union-attr]


def mask_of(layer: nn.Module, name: str) -> Mask | None:
    """The mask on a parameter of a layer, if there is one."""
    if not parametrize.is_parametrized(layer, name):
        return None
    chains: Any = layer.parametrizations
    last = chains[name][-1]
    return last if isinstance(last, Mask) else None


def is_own(layer: nn.Module, name: str) -> bool:
    """Whether a parameter is the layer's own, at most masked: weight norm and the like make it of other tensors."""
    if not parametrize.is_parametrized(layer, name):
        return True
    chains: Any = layer.parametrizations
    return mask_of(layer, name) is not None and len(chains[name]) == 1


def set_parameter(layer: nn.Module, name: str, values: Tensor) -> None:
    """Gives a parameter of a layer other values, in place; zeros of a mask stay zero.

    ``layer.weight`` of a parametrized layer is computed anew at every look: what is written into it is lost.

    Raises:
        DeploykitError: a parametrization that is not ours and takes no values.
    """
    with torch.no_grad():
        if not parametrize.is_parametrized(layer, name):
            getattr(layer, name).copy_(values)
            return
        try:
            setattr(layer, name, values.detach().clone().to(getattr(layer, name)))  # by way of every right_inverse
        except (RuntimeError, ValueError) as error:
            raise DeploykitError(
                f"the {name} of a {type(layer).__name__} is made by a parametrization that takes no values ({error}); "
                "remove it with torch.nn.utils.parametrize.remove_parametrizations"
            ) from None


def bake(module: nn.Module) -> tuple[nn.Module, dict[str, NDArray[np.bool_]]]:
    """A copy whose parametrized weights are plain parameters again, and the masks that were on them.

    Parametrizations that are not ours (weight norm ...) are baked in as well.

    Returns:
        the copy, and per masked parameter (``"layer1.conv.weight"``) a bool array, True where the weight lives.
    """
    plain = copy.deepcopy(module)
    masks: dict[str, NDArray[np.bool_]] = {}
    for path, layer in list(plain.named_modules()):
        if not parametrize.is_parametrized(layer):
            continue
        chains = dict(layer.parametrizations.items())
        weights = {name: getattr(layer, name).detach().clone() for name in chains}
        for name in chains:
            held = mask_of(layer, name)
            if held is not None:
                masks[f"{path}.{name}" if path else name] = held.mask.cpu().numpy()
        # torch's own remove_parametrizations would also strip the class that the original shares with this copy
        layer.__class__ = type(layer).__bases__[0]
        del layer.parametrizations
        for name, chain in chains.items():
            trained = list(chain.parameters(recurse=False))
            if trained:
                gradient = any(p.requires_grad for p in trained)
                layer.register_parameter(name, nn.Parameter(weights[name], requires_grad=gradient))
            else:
                layer.register_buffer(name, weights[name])
    return plain, masks
