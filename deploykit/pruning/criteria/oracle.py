"""The oracle: the true change of the cost if one channel is removed. Molchanov et al. 2017, section 2.2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from deploykit.pruning.criteria.evidence import Evidence, own_answers
from deploykit.pruning.groups import Group, together
from deploykit.pruning.surgery import without


def oracle(model: nn.Module, groups: Sequence[Group], evidence: Evidence) -> list[Tensor]:
    """|C without the channel - C| by group, ``[channels]``. One pass over the data for every channel."""
    with torch.no_grad():
        # where there are no labels, the answers of the whole model: a pruned one must not agree with itself
        labels = [
            own_answers(model(**b.inputs)) if b.labels is None and evidence.loss is None else b.labels
            for b in evidence.batches()
        ]

        def cost(pruned: nn.Module) -> float:
            total = count = 0.0
            for batch, own in zip(evidence.batches(), labels, strict=True):
                n = len(next(iter(batch.inputs.values())))
                total += n * float(evidence.cost(pruned, replace(batch, labels=own)))
                count += n
            return total / count

        before = cost(model)
        return [
            torch.tensor([abs(cost(without(model, together([c]))) - before) for c in group.channels])
            for group in groups
        ]
