"""What batch normalisation kept of the training data, beside what it reads on other samples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from deploykit.calibration.lint import SILENT, Normed

if TYPE_CHECKING:
    from numpy.typing import NDArray

LIVE = 1e-3
"""Channels whose variance in training was a smaller share of the layer's largest are dead and tell nothing."""


class _Enough(Exception):
    """The rest of the network is not needed."""


def norms(module: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """The batch normalisations that kept statistics of the training data, by name."""
    kind = nn.modules.batchnorm._BatchNorm
    return {name: m for name, m in module.named_modules() if isinstance(m, kind) and m.running_var is not None}


@contextlib.contextmanager
def reading(module: nn.Module, see: Any) -> Iterator[None]:
    """Calls ``see(name, norm, x)`` with what every batch normalisation reads, while the block runs the module."""
    handles = [
        norm.register_forward_pre_hook(
            lambda norm, given, named, name=name: see(name, norm, given[0] if given else next(iter(named.values()))),
            with_kwargs=True,
        )
        for name, norm in norms(module).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_norm(module: nn.Module, inputs: Mapping[str, NDArray[Any]]) -> Normed | None:
    """What the first batch normalisation that runs reads on some samples; what lies behind it is not run.

    None: there is none, or its statistics are still those it began with.
    """
    found: list[Normed] = []

    def see(name: str, norm: nn.modules.batchnorm._BatchNorm, x: Tensor) -> None:
        made = _normed(name, norm, x)
        if made is not None:
            found.append(made)
        raise _Enough

    if norms(module):
        with torch.no_grad(), reading(module, see), contextlib.suppress(_Enough):
            module(**{n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in inputs.items()})
    return found[0] if found else None


def _normed(name: str, norm: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Normed | None:
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    if not mean.any() and bool((variance == 1).all()):
        return None
    axes = [i for i in range(x.ndim) if i != 1]
    here, spread = x.double().mean(axes), x.double().var(axes, unbiased=False)
    live = variance >= LIVE * variance.max()
    ratio = (spread / variance.double().clamp_min(1e-30))[live]
    shift = ((here - mean) / (variance.double() + norm.eps).sqrt())[live]
    return Normed(
        name, float(ratio.median()), float(shift.square().mean().sqrt()), float((ratio < SILENT).double().mean())
    )


def shifts(
    module: nn.Module, example: Mapping[str, NDArray[Any]], means: Mapping[str, NDArray[np.float64]]
) -> dict[str, float]:
    """How far channel means are off those of training, in its standard deviations, root mean square over channels.

    With its batch normalisation folded in, a layer's output has the mean β and the standard deviation |γ| on the
    training data. Which normalisation follows which layer is seen when the module runs.

    Args:
        module: as it was lowered.
        example: inputs by name; one sample is run.
        means: by layer, E[output] per channel, normalisation included (`deploykit.core.ranges.Ranges.means`).
    """
    names = {m: name for name, m in module.named_modules()}
    wrote: dict[int, tuple[str, Tensor]] = {}  # holds the tensors too, so that no id is given twice
    followed: dict[str, nn.modules.batchnorm._BatchNorm] = {}

    def see(name: str, norm: nn.modules.batchnorm._BatchNorm, x: Tensor) -> None:
        if id(x) in wrote and not (norm.running_mean == 0).all():  # type: ignore[union-attr]
            followed[wrote[id(x)][0]] = norm

    handles = [
        layer.register_forward_hook(lambda layer, args, out: wrote.__setitem__(id(out), (names[layer], out)))
        for layer in names
        if names[layer] in means
    ]
    try:
        with torch.no_grad(), reading(module, see):
            module(**{n: torch.from_numpy(np.ascontiguousarray(a[:1])) for n, a in example.items()})
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, norm in followed.items():
        if norm.affine and len(means[name]) == norm.num_features:
            beta, gamma = (p.detach().double().numpy() for p in (norm.bias, norm.weight))
            spread = np.maximum(np.abs(gamma), 0.1 * np.median(np.abs(gamma)))
            found[name] = float(np.sqrt(np.mean(np.square((means[name] - beta) / np.maximum(spread, 1e-12)))))
    return found
