"""Second order by channel: what the cost rises by when a whole feature map becomes zero.

Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning", equation 8, with g the slopes of a
single example's cost and z the feature map, wherever it is read:

    Delta_k = 1/(2N) sum_n ( sum_m  g_nkm z_nkm )^2

The square is outside the sum over positions and readers: what rises here and falls there is one change. A network after
training is near a minimum, where the slopes of the mean cost vanish and this is what is left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deploykit.layerwise.channels import axis, mixes
from deploykit.pruning.criteria.evidence import Evidence
from deploykit.pruning.criteria.reads import by_example, reads
from deploykit.pruning.groups import Group


def fisher(model: nn.Module, groups: Sequence[Group], evidence: Evidence) -> list[Tensor]:
    """Delta by group, ``[channels]``. One pass over the data."""
    readers = {p.layer for g in groups for p in g.ports if p.side == "in" and mixes(model.get_submodule(p.layer))}
    total = [torch.zeros(len(group.channels), dtype=torch.float64) for group in groups]
    count = 0
    for batch in evidence.batches():
        n = len(next(iter(batch.inputs.values())))
        with reads(model, sorted(readers)) as read:
            cost = evidence.cost(model, batch)
        z = [(name, t) for name, calls in read.items() for t in calls if t.requires_grad]
        slopes = torch.autograd.grad(cost, [t for _, t in z], allow_unused=True)
        change: dict[str, Tensor] = {}  # [n, channels] that a layer reads
        for (name, t), slope in zip(z, slopes, strict=True):
            if slope is not None:
                # the cost is a mean over n examples: n times its slope is the example's own
                product = by_example(n * slope * t.detach(), axis(model.get_submodule(name), t), n).sum(2)
                change[name] = change[name] + product if name in change else product
        for own, group in zip(total, groups, strict=True):
            summed = torch.zeros(n, len(group.channels))
            for port in group.ports:
                if port.layer in change and port.side == "in":
                    numbers = torch.tensor([channel[port] for channel in group.channels])
                    summed += change[port.layer][:, numbers].sum(2)
            own += summed.double().square().sum(0)
        count += n
    return [own / (2 * count) for own in total]
