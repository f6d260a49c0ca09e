"""How much of a network's answers is lost when one group of channels alone is pruned.

Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", figure 6, and Li et al. 2017,
"Pruning Filters for Efficient ConvNets", figure 2: one layer at a time, the others whole, nothing retrained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deploykit.core.data import DataSet
from deploykit.core.progress import track
from deploykit.layerwise.watching import evaluating
from deploykit.losses import as_tensors, tensors
from deploykit.pruning.groups import Group, together
from deploykit.pruning.surgery import without

BATCH = 64


@dataclass(frozen=True)
class Lost:
    """What the answers lose without some channels of one group."""

    group: Group
    share: float
    """Of the group's channels, as asked for."""
    error: float
    """Squared error of the outputs, as a share of their squares."""
    points: float | None
    """Percent of the answers whose most probable class is another; None: the outputs are no class scores."""


def scan(
    model: nn.Module, groups: Sequence[Group], scores: Sequence[Tensor], shares: Sequence[float], data: DataSet
) -> Iterator[Lost]:
    """Each group at each share: the least important channels go, and the rest of the network stays whole.

    Args:
        model: not changed.
        groups: of its channels.
        scores: importance by group, ``[channels]``.
        shares: between 0 and 1; at least one channel goes and at least one stays.
        data: what is answered; memory holds the answers.
    """
    whole = list(_answers(model, data))
    tries = [(group, own.argsort(stable=True).tolist(), share) for group, own in zip(groups, scores, strict=True)
             for share in shares if len(group.channels) > 1]  # fmt: skip
    for group, order, share in track(tries, "sensitivity"):
        count = min(max(1, round(share * len(order))), len(order) - 1)
        pruned = without(model, together(group.channels[c] for c in order[:count]))
        yield Lost(group, share, *_difference(whole, list(_answers(pruned, data))))


def _answers(model: nn.Module, data: DataSet) -> Iterator[list[Tensor]]:
    """Outputs by batch."""
    with evaluating(model), torch.no_grad():
        for batch in data.batches(BATCH):
            yield [t.double() for t in tensors(model(**as_tensors(batch.inputs)))]


def _difference(expected: Sequence[list[Tensor]], found: Sequence[list[Tensor]]) -> tuple[float, float | None]:
    """Relative squared error, and the percentage of classes that differ."""
    pairs = [pair for a, b in zip(expected, found, strict=True) for pair in zip(a, b, strict=True)]
    wrong = sum(float((a - b).square().sum()) for a, b in pairs)
    error = wrong / max(sum(float(a.square().sum()) for a, _ in pairs), 1e-30)
    if any(len(outputs) != 1 or outputs[0].ndim < 2 or outputs[0].shape[1] < 2 for outputs in expected):
        return error, None
    differ = torch.cat([(a.argmax(1) != b.argmax(1)).flatten() for a, b in pairs])
    return error, 100.0 * float(differ.double().mean())
