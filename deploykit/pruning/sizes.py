"""The sizes of layers, noted and given back: how a narrowed network is made again from the code of the whole one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deploykit.core.errors import DeploykitError

SIZES = (
    "in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_parameters",
    "embedding_dim",
)  # fmt: skip
"""The attributes by which layers of torch know how many channels they have."""

Sizes = dict[str, dict[str, int]]
"""By layer, the attributes that differ from those that the code gives."""


def changed_sizes(module: nn.Module, original: nn.Module) -> Sizes:
    """What is narrower (or wider) in a module than in what its code makes."""
    layers = dict(original.named_modules())
    found: Sizes = {}
    for name, layer in module.named_modules():
        if name in layers:
            pairs = {a: (vars(layer).get(a), vars(layers[name]).get(a)) for a in SIZES}
            changed = {a: new for a, (new, old) in pairs.items() if isinstance(new, int) and new != old}
            if changed:
                found[name] = changed
    return found


def resize(module: nn.Module, sizes: Sizes, state: Mapping[str, Tensor]) -> None:
    """Gives layers these sizes, in place; what they hold is to be loaded afterwards.

    Args:
        module: changed.
        sizes: from `changed_sizes`.
        state: plain names, with the shapes that parameters and buffers are to have.

    Raises:
        DeploykitError: a layer that the module does not have, or one without such a size.
    """
    for name, attributes in sizes.items():
        try:
            layer = module.get_submodule(name)
        except AttributeError:
            raise DeploykitError(f"the model has no layer '{name}'") from None
        for attribute, value in attributes.items():
            if attribute not in SIZES or attribute not in vars(layer):
                raise DeploykitError(f"layer '{name}' has no size '{attribute}'")
            setattr(layer, attribute, value)
        for leaf, held in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            stored = state.get(f"{name}.{leaf}" if name else leaf)
            if stored is None or stored.shape == held.shape:
                continue
            empty = torch.empty(stored.shape, dtype=held.dtype, device=held.device)
            parameter = isinstance(held, nn.Parameter)
            setattr(layer, leaf, nn.Parameter(empty, held.requires_grad) if parameter else empty)
