"""What pruning asks of a network on data: covariances of what layers multiply, and how much their outputs matter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deploykit.core.data import DataSet
from deploykit.core.progress import track
from deploykit.losses import as_tensors, tensors
from deploykit.pruning.patches import inputs, outputs

BATCH = 32


class Covariance:
    """Of numbers ``[g, n, k]`` that come batch by batch, and their mean."""

    def __init__(self) -> None:
        """Nothing seen."""
        self.count = 0
        self.sum: Any = 0.0
        self.products: Any = 0.0

    def add(self, x: Tensor) -> None:
        """The next positions."""
        self.count += x.shape[1]
        self.sum = self.sum + x.sum(1, dtype=torch.float64)
        self.products = self.products + (x.transpose(1, 2) @ x).double()  # one batch in float32, their sum not

    @property
    def mean(self) -> Tensor:
        """``[g, k]``."""
        return torch.as_tensor(self.sum / self.count)

    def centred(self) -> Tensor:
        """``[g, k, k]``."""
        return torch.as_tensor(self.products / self.count - self.mean[:, :, None] * self.mean[:, None, :])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and as it was afterwards, module by module."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def covariances(model: nn.Module, layers: Mapping[str, nn.Module], data: DataSet) -> dict[str, Covariance]:
    """Of what the layers multiply, in one pass. Memory holds one batch and ``[g, k, k]`` per layer."""
    found = {name: Covariance() for name in layers}

    def note(name: str) -> Any:
        return lambda layer, given, _: found[name].add(inputs(layer, given[0].detach()))

    with (
        evaluating(model),
        torch.no_grad(),
        _hooks(layer.register_forward_hook(note(n)) for n, layer in layers.items()),
    ):
        for batch in track(data.batches(BATCH), "covariances", total=-(-len(data) // BATCH)):
            model(**as_tensors(batch.inputs))
    return found


def fisher(model: nn.Module, layers: Mapping[str, nn.Module], data: DataSet, seed: int) -> dict[str, Tensor]:
    """E[Σ (∂L/∂y)²] over samples, summed over positions, by layer ``[g, o]``, with L the loss on answers drawn from the
    model. Times half the variance of an error that all positions have, it is what that error adds to L.

    Class scores ``[n, c]`` draw a class from their softmax; everything else draws y + N(0, 1), so that L is the
    squared error.
    """
    random = torch.Generator().manual_seed(seed)
    sums: dict[str, Any] = dict.fromkeys(layers, 0.0)

    def note(name: str, layer: nn.Module, y: Tensor) -> None:
        def square(gradient: Tensor) -> None:
            g = outputs(layer, gradient).double()
            sums[name] = sums[name] + g.square().sum(1)

        if y.requires_grad:
            y.register_hook(square)  # type: ignore[no-untyped-call]

    hooks = (layer.register_forward_hook(lambda m, _, y, name=n: note(name, m, y)) for n, layer in layers.items())
    with evaluating(model), torch.enable_grad(), _hooks(hooks):
        for batch in track(data.batches(BATCH), "gradients", total=-(-len(data) // BATCH)):
            given = {n: x.requires_grad_() if x.is_floating_point() else x for n, x in as_tensors(batch.inputs).items()}
            loss = torch.stack([_drawn(z, random) for z in tensors(model(**given))]).sum()
            torch.autograd.grad(loss, [x for x in given.values() if x.requires_grad] or list(model.parameters()),
                                allow_unused=True)  # fmt: skip
    return {name: torch.as_tensor(sums[name] / len(data)) for name in layers}


def _drawn(z: Tensor, random: torch.Generator) -> Tensor:
    """The loss, summed over samples, on answers that are drawn from the model's own."""
    if z.ndim == 2 and z.shape[1] > 1:
        classes = torch.multinomial(z.detach().softmax(1), 1, generator=random)[:, 0]
        return torch.nn.functional.cross_entropy(z, classes, reduction="sum")
    return (z * torch.randn(z.shape, generator=random)).sum()


@contextmanager
def _hooks(handles: Iterable[Any]) -> Iterator[None]:
    held = list(handles)
    try:
        yield
    finally:
        for handle in held:
            handle.remove()
