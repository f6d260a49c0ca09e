"""How much the outputs of layers matter: the Fisher information of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.progress import track
from deploykit.layerwise.products import matrix, outputs
from deploykit.layerwise.watching import BATCH, evaluating, hooked
from deploykit.losses import as_tensors, tensors


def fisher(model: nn.Module, layers: Mapping[str, nn.Module], data: DataSet, seed: int) -> dict[str, Tensor]:
    """E[Σ (∂L/∂y)²] over samples, summed over positions, by layer ``[g, o]``, with L the loss on answers drawn from the
    model. Times half the variance of an error that all positions have, it is what that error adds to L.

    Class scores ``[n, c]`` draw a class from their softmax; everything else draws y + N(0, 1), so that L is the
    squared error.
    """
    random = torch.Generator().manual_seed(seed)
    weights: dict[str, Any] = {name: layer.weight for name, layer in layers.items()}
    sums = {n: torch.zeros(matrix(layers[n], w).shape[:2], dtype=torch.float64) for n, w in weights.items()}
    # nought, added to every output: whatever the loss depends on, it depends on this
    probe = torch.zeros((), requires_grad=True)

    def note(name: str, layer: nn.Module, y: Tensor) -> Tensor:
        def square(gradient: Tensor) -> None:
            g = outputs(layer, gradient).double()
            sums[name] = sums[name] + g.square().sum(1)

        y = y + probe.to(y)
        if y.requires_grad:
            y.register_hook(square)  # type: ignore[no-untyped-call]
        return y

    hooks = (layer.register_forward_hook(lambda m, _, y, name=n: note(name, m, y)) for n, layer in layers.items())
    with evaluating(model), torch.enable_grad(), hooked(hooks):
        for batch in track(data.batches(BATCH), "gradients", total=-(-len(data) // BATCH)):
            answers = [z for z in tensors(model(**as_tensors(batch.inputs))) if z.is_floating_point()]
            if not all(bool(torch.isfinite(z).all()) for z in answers):
                raise DeploykitError("the model gives numbers that are not finite on the calibration data")
            if not any(z.requires_grad for z in answers):
                raise DeploykitError("the model's forward switches gradients off, and what matters is seen by them")
            loss = torch.stack([_drawn(z, random).float() for z in answers]).sum()
            torch.autograd.grad(loss, probe, allow_unused=True)
    return {name: torch.as_tensor(sums[name] / len(data)) for name in layers}


def _drawn(z: Tensor, random: torch.Generator) -> Tensor:
    """The loss, summed over samples, on answers that are drawn from the model's own."""
    if z.ndim == 2 and z.shape[1] > 1:
        classes = torch.multinomial(z.detach().softmax(1), 1, generator=random)[:, 0]
        return torch.nn.functional.cross_entropy(z, classes, reduction="sum")
    return (z * torch.randn(z.shape, generator=random).to(z)).sum()
