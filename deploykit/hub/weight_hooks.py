"""Weights that torch's old ``weight_norm`` and ``spectral_norm`` compute in a hook before every call.

Such a weight is no parameter: torch can neither copy the module nor see what steps change. In eval mode it is always
the same, so that a plain parameter means the same.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn.utils import remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def without_weight_hooks(module: nn.Module) -> nn.Module:
    """A copy with parameters for the weights that hooks compute; the module itself, where there are none.

    Args:
        module: in eval mode; not changed.
    """
    if not any(_hooks(layer) for layer in module.modules()):
        return module
    computed = [value for layer in module.modules() for value in vars(layer).values() if isinstance(value, Tensor)]
    made = copy.deepcopy(module, {id(value): value.detach().clone() for value in computed})  # which torch cannot copy
    for layer in made.modules():
        for hook in _hooks(layer):
            remove = remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm
            remove(layer, hook.name)
    return made


def _hooks(layer: nn.Module) -> list[WeightNorm | SpectralNorm]:
    return [hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, (WeightNorm, SpectralNorm))]
