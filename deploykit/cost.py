"""What a PyTorch model costs: multiply-accumulates, live parameters, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.context import Cost

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


def cost(module: torch.nn.Module, example: Mapping[str, NDArray[Any]]) -> Cost:
    """Counts convolutions, transposed convolutions and linear layers on one forward pass.

    MACs per sample: output positions x weights per output channel x output channels; zeros held by a mask are not
    counted as parameters but still as MACs, because dense kernels multiply them.

    Args:
        module: in eval mode; not changed.
        example: arrays ``[n, ...]`` by forward-argument name.
    """
    import torch

    from deploykit.layerwise.watching import entered

    macs = 0
    samples = len(next(iter(example.values())))

    def count(layer: Any, given: Any, by_name: Any, output: torch.Tensor) -> None:
        nonlocal macs
        transposed = not isinstance(layer, torch.nn.Linear) and layer.transposed
        read = entered(given, by_name) if transposed else output
        macs += read.numel() // samples * int(np.prod(layer.weight.shape[1:]))

    kinds = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)
    layers = [layer for layer in module.modules() if isinstance(layer, kinds)]
    hooks = [layer.register_forward_hook(count, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad():
            module(**{name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in example.items()})
    finally:
        for hook in hooks:
            hook.remove()
    from deploykit.hub.structure import bake

    plain, masks = bake(module)
    params = stored = 0
    for name, parameter in plain.named_parameters():
        live = int(masks[name].sum()) if name in masks else parameter.numel()
        params += live
        stored += live * parameter.element_size()
    return Cost(macs, params, stored)
