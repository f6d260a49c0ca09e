"""What tests of pruning share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deploykit import targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.cost import cost
from deploykit.layerwise.channels import axis, mixes
from deploykit.layerwise.watching import BATCH, evaluating
from deploykit.losses import as_tensors, tensors
from deploykit.passes.prune import Prune
from deploykit.pruning.crop import Port
from deploykit.pruning.groups import Group, find_groups, together
from deploykit.pruning.surgery import without, zeroed

Inputs = Mapping[str, Tensor]
X86 = targets.load("x86")


def context(model: nn.Module, data: DataSet, **more: Any) -> Context:
    sample = next(data.batches(2)).inputs
    return Context(X86, {"calibration": data}, sample, cost=lambda m: cost(m, sample), **more)


def images(n: int = 32, channels: int = 3, side: int = 4, labels: bool = True) -> DataSet:
    random = np.random.default_rng(0)
    x = random.normal(size=(n, channels, side, side)).astype(np.float32)
    return DataSet.of({"x": x}, random.integers(0, 5, n) if labels else None)


def rows(count: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    """Numbers that go together, about a mean."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((width, width))
    return (random.standard_normal((count, width)) @ mix + random.standard_normal(width)).astype(np.float32)


def settled(net: nn.Module, seed: int = 0) -> nn.Module:
    """With norms that are not the identity."""
    random = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (layer.weight, 0.5, 1.5), (layer.bias, -0.5, 0.5),
                (layer.running_mean, -0.3, 0.3), (layer.running_var, 0.5, 2.0),
            ):  # fmt: skip
                tensor.data = torch.rand(tensor.shape, generator=random) * (high - low) + low
    return net.eval()


def silenced(model: nn.Module, removed: Mapping[Port, Any], inputs: Inputs) -> list[Tensor]:
    """What the whole model answers when nothing that reads the removed channels sees them: by hooks."""
    model = copy.deepcopy(model)
    hooks = []
    for port, numbers in removed.items():
        layer = model.get_submodule(port.layer)
        if port.side == "in" and mixes(layer):

            def hook(layer: nn.Module, given: tuple[Any, ...], numbers: Any = numbers) -> tuple[Any, ...]:
                x = given[0].clone()
                x.movedim(axis(layer, x), 0)[list(numbers)] = 0
                return x, *given[1:]

            hooks.append(layer.register_forward_pre_hook(hook))
    with torch.no_grad():
        return tensors(model(**inputs))


def answers(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return tensors(model(**inputs))


def assert_pruned_is_zeroed(model: nn.Module, inputs: Inputs, choose: Callable[[Group], list[int]]) -> int:
    """Takes the chosen channels of every group; returns how many went."""
    groups = find_groups(model, {name: t[:1] for name, t in inputs.items()})
    gone = [group.channels[i] for group in groups for i in choose(group)]
    removed = together(gone)
    found, expected = answers(without(model, removed), inputs), silenced(model, removed, inputs)
    for a, b, c in zip(found, expected, answers(zeroed(model, removed), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(c, b, rtol=1e-4, atol=1e-5)
    return len(gone)


def some_of(seed: int) -> Callable[[Group], list[int]]:
    random = np.random.default_rng(seed)

    def choose(group: Group) -> list[int]:
        n = len(group.channels)
        return sorted(random.permutation(n)[: random.integers(min(1, n - 1), n)].tolist())

    return choose


def writers(model: nn.Module, inputs: Inputs) -> list[tuple[int, tuple[str, ...]]]:
    """(channels, layers that write them) of every group."""
    return [(len(g.channels), g.writers) for g in find_groups(model, inputs)]


def relative_error(model: nn.Module, original: nn.Module, data: DataSet) -> float:
    """E |z' - z|² / E |z|², summed over the outputs."""
    noise, power = 0.0, 0.0
    with evaluating(model), evaluating(original), torch.no_grad():
        for batch in data.batches(BATCH):
            given = as_tensors(batch.inputs)
            for ours, z in zip(tensors(model(**given)), tensors(original(**given)), strict=True):
                noise += float((ours - z).double().square().sum())
                power += float(z.double().square().sum())
    return noise / max(power, 1e-300)


def plain(width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential()
    for i, (a, b) in enumerate([(3, width), (width, 2 * width), (2 * width, 2 * width)]):
        net.append(nn.Conv2d(a, b, 3, padding=1, bias=False)).append(nn.BatchNorm2d(b)).append(nn.ReLU())
        if i == 0:
            net.append(nn.Dropout(0.1))
    return settled(net.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(2 * width, 5)))


def prune(amount: float, **options: Any) -> Prune:
    """Takes channels out and leaves the other weights as they are."""
    return Prune(amount, refit=False, **options)


class Named(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)
