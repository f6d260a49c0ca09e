"""Why a network is better for having taught itself: the three explanations of the paper, as measurements.

Zhang et al. 2019, "Be Your Own Teacher", section 5: flatter minima (5.1), gradients that do not vanish (5.2), features
that tell classes apart (5.3). Each is for a network trained with exits and one trained without, side by side.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.layerwise.watching import BATCH, evaluating
from deploykit.losses import Loss, TrainBatch, as_tensors, tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray


def under_noise(
    network: nn.Module, data: DataSet, sigmas: Sequence[float], draws: int = 3, seed: int = 0
) -> dict[float, float]:
    """Accuracy when the weights are disturbed: a flat minimum loses little.

        w' = w + σ · std(w) · ξ,    ξ ~ N(0, 1)

    The paper adds noise of one size to all weights; here it is relative to the standard deviation of each weight
    tensor, so that networks with other scales can be compared. Biases and normalisation are left alone.

    Args:
        network: answers ``[n, classes]``; not changed.
        data: with labels.
        sigmas: σ.
        draws: of ξ, averaged.
        seed: of ξ; the same draws at every σ.

    Returns:
        percent of right answers by σ.

    Raises:
        DeploykitError: no labels.
    """
    found = {}
    for sigma in sigmas:
        scores = []
        for draw in range(draws if sigma else 1):
            disturbed = copy.deepcopy(network)
            random = torch.Generator().manual_seed(seed + draw)
            with torch.no_grad():
                for weight in disturbed.parameters():
                    if weight.ndim > 1:
                        xi = torch.randn(weight.shape, generator=random)
                        weight.add_(xi.to(weight) * weight.std(), alpha=sigma)
            scores.append(accuracy(disturbed, data))
        found[float(sigma)] = float(np.mean(scores))
    return found


def accuracy(network: nn.Module, data: DataSet) -> float:
    """Percent of right answers; of several the first counts.

    Raises:
        DeploykitError: no labels.
    """
    if data.labels is None:
        raise DeploykitError(f"{data.origin} has no labels, so there is no accuracy")
    right = 0
    with evaluating(network), torch.no_grad():
        for batch in data.batches(BATCH):
            answered = tensors(network(**as_tensors(batch.inputs)))[0].argmax(1).numpy()
            right += int((answered == batch.labels).sum())
    return 100.0 * right / len(data)


def gradient_sizes(
    network: nn.Module, loss: Loss, data: DataSet, stages: Sequence[str], samples: int = 128
) -> dict[str, float]:
    """Mean size of the gradients of the weights, stage by stage: where it is tiny, a stage hardly learns.

    Args:
        network: as it is trained (`deploykit.exits.network.InTraining` for one with exits); its gradients are left as
            they were, and it runs in evaluation mode, so that its normalisation is not changed.
        loss: what it is trained with.
        data: the first ``samples`` make one batch.
        stages: paths of modules; a stage's weights are all matrices and kernels in its module that are in no stage
            before.
        samples: how many.

    Returns:
        mean of |∂L/∂w| by path.
    """
    modules = dict(network.named_modules())
    batch = next(data.batches(samples))
    inputs = as_tensors(batch.inputs)
    labels = None if batch.labels is None else torch.from_numpy(batch.labels)
    with _own_gradients(network), evaluating(network):
        torch.autograd.backward(loss(network(**inputs), TrainBatch(inputs, labels)))
        counted: set[int] = set()
        found = {}
        for path in stages:
            own = [p for p in modules[path].parameters() if p.ndim > 1 and id(p) not in counted]
            counted |= {id(p) for p in own}
            sizes = [p.grad.abs().flatten() for p in own if p.grad is not None]
            found[path] = float(torch.cat(sizes).mean()) if sizes else 0.0
    return found


@contextmanager
def _own_gradients(network: nn.Module) -> Iterator[None]:
    """Gradients that were there before are put back."""
    before = {p: p.grad for p in network.parameters()}
    try:
        for p in before:
            p.grad = None
        yield
    finally:
        for p, gradient in before.items():
            p.grad = gradient


@dataclass(frozen=True)
class Spread:
    """How features of classes lie."""

    sse: float
    """Sum of squares within classes: Σ over samples of ‖f - mean of its class‖²."""
    ssb: float
    """Sum of squares between classes: Σ over classes of their number of samples · ‖mean of class - mean of all‖²."""

    @property
    def ratio(self) -> float:
        """SSE / SSB, which is smaller the better features tell classes apart; 0/0 is NaN."""
        return self.sse / self.ssb if self.ssb else float("nan") if not self.sse else float("inf")


def spread(features: NDArray[np.floating], labels: NDArray[np.integer]) -> Spread:
    """SSE and SSB of features ``[n, c]`` with labels ``[n]``.

    Raises:
        DeploykitError: another number of labels.
    """
    if len(features) != len(labels):
        raise DeploykitError(f"{len(features)} features and {len(labels)} labels")
    f = np.asarray(features, np.float64)
    mean, sse, ssb = f.mean(axis=0), 0.0, 0.0
    for c in np.unique(labels):
        own = f[labels == c]
        sse += float(np.square(own - own.mean(axis=0)).sum())
        ssb += len(own) * float(np.square(own.mean(axis=0) - mean).sum())
    return Spread(sse, ssb)


def features_of(network: nn.Module, data: DataSet) -> tuple[NDArray[np.float32], ...]:
    """The features ``[n, c]`` of every exit, first to last, the deepest's behind them.

    Args:
        network: `deploykit.exits.network.InTraining`.
        data: labels do not matter.
    """
    parts: list[Sequence[NDArray[np.float32]]] = []
    with evaluating(network), torch.no_grad():
        for batch in data.batches(BATCH):
            _, features = network(**as_tensors(batch.inputs))
            parts.append([f.numpy() for f in features])
    return tuple(np.concatenate(each) for each in zip(*parts, strict=True))
