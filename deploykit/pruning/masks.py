"""Which single weights live: those with the highest scores, of the whole network, of every layer, or N of every M."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Masks = Mapping[str, Tensor]
"""Layer -> bool in the shape of its weight, True where it lives."""
Scores = Mapping[str, Tensor]
"""Layer -> what each weight is worth, in the shape of its weight."""


def network_wide(scores: Scores, lives: Masks, sparsity: float) -> dict[str, Tensor]:
    """One threshold for all layers: exactly that share of all weights is dead, the dead ones counted.

    Args:
        scores: of the living; those of the dead are not looked at.
        lives: who lives now. Nobody comes back to life, so more may be dead already.
        sparsity: share, 0 to 1.
    """
    every = torch.cat([scores[name].flatten().double() for name in lives])
    living = torch.cat([mask.flatten() for mask in lives.values()])
    every[~living] = -torch.inf  # the dead come first; those that must live come last
    kept = torch.ones_like(living)
    kept[every.argsort(stable=True)[: round(sparsity * len(every))]] = False
    parts = torch.split(kept & living, [mask.numel() for mask in lives.values()])
    return {name: part.reshape(mask.shape) for (name, mask), part in zip(lives.items(), parts, strict=True)}


def layer_by_layer(scores: Scores, lives: Masks, sparsity: float) -> dict[str, Tensor]:
    """The same share of every layer."""
    return {name: network_wide({name: scores[name]}, {name: mask}, sparsity)[name] for name, mask in lives.items()}


def n_of_m(scores: Scores, lives: Masks, n: int, m: int) -> dict[str, Tensor]:
    """At most n of m neighbours along the input axis live, at every output and position of the kernel.

    That is how NVIDIA's sparse tensor cores want it (Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks",
    section 3). Layers whose inputs m does not divide keep all their weights.

    Args:
        scores: of the living.
        lives: who lives now.
        n: how many may live.
        m: of how many.
    """
    found = dict(lives)
    for name, mask in lives.items():
        if fits(mask, m):
            last = torch.where(mask, scores[name].double(), -torch.inf).movedim(1, -1)
            groups = last.reshape(-1, m)
            kept = torch.zeros_like(groups, dtype=torch.bool)
            kept.scatter_(1, groups.argsort(dim=1, descending=True, stable=True)[:, :n], True)
            found[name] = kept.reshape(last.shape).movedim(-1, 1) & mask
    return found


def fits(weight: Tensor, m: int) -> bool:
    """Whether the inputs of a weight ``[outputs, inputs, ...]`` can be taken m at a time."""
    return weight.shape[1] % m == 0
