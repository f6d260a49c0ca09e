"""Adaptive rounding: whether a weight goes up or down is learned, as a number between 0 and 1 that ends at either.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", section 3.3: with a variable V
behind every weight,

    W̃ = s · clip(⌊W/s⌋ + h(V), -n, n),     h(V) = clip(σ(V)(ζ - γ) + γ, 0, 1)

is fitted to what the layer should compute, while λ f_reg pushes h to 0 or 1:

    f_reg(V) = Σ 1 - |2 h(V) - 1|^β

The paper lets β fall at a fixed λ. Here β is 2 and λ grows by a factor per step: the weights whose rounding matters
least decide first, and the others, still free, make good what that costs. It ends with none undecided.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from deploykit.core.target import QuantSpec
from deploykit.hub.fitting.rounding import error, nearest, polished, searched_scale

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Matrices = NDArray[np.float64]

ZETA, GAMMA = 1.1, -0.1
"""The sigmoid is stretched to reach 0 and 1 (Louizos et al. 2018)."""
PRESSURE = 0.01, 30.0
"""λ at the first step and after the last, for a mean of f_reg, where the error at the start counts as 1."""
LEARNING_RATE = 0.1
"""Of V."""


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V): 0 is down, 1 is up."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def behind(h: Tensor) -> Tensor:
    """The V of an h between 0 and 1."""
    return torch.logit((h - GAMMA) / (ZETA - GAMMA))


def undecided(h: Tensor) -> Tensor:
    """1 - |2h - 1|²: 0 where h is 0 or 1."""
    return 1 - (2 * h - 1).square()


def pressure(step: int, steps: int) -> float:
    """λ."""
    first, last = PRESSURE
    return float(first * (last / first) ** (step / steps))


def adaround(w: Matrices, h: Matrices, least: Matrices, spec: QuantSpec, steps: int) -> tuple[Matrices, Matrices]:
    """Whole rounding of a layer (as `deploykit.hub.fitting.refit` takes it): each weight down or up, then polished.

    ‖Wx - W̃x‖² over all x is tr (W̃ - W) H (W̃ - W)ᵀ, so no x is needed. Of every row the better of what was learned and
    of rounding to nearest goes on.

    Args:
        w: what is rounded ``[g, o, k]``.
        h: second moments of the inputs ``[g, k, k]``.
        least: smallest scales allowed ``[g, o]``.
        spec: bits, granularity and kind of scale.
        steps: of gradient descent.

    Returns:
        integers ``[g, o, k]`` and scales ``[g, o]``.
    """
    top = spec.weight_max
    s = searched_scale(w, h, least, spec)
    plain = nearest(w, s, top)
    cost = error(plain, s, w, h)
    learned = np.clip(np.floor(w / s[:, :, None]) + roundings(w, h, s, cost, top, steps), -top, top)
    q = np.where((error(learned, s, w, h) < cost)[:, :, None], learned, plain)
    return polished(q, s, w, h, least, spec)


def roundings(w: Matrices, h: Matrices, s: Matrices, unit: Matrices, top: int, steps: int) -> Matrices:
    """1 where a weight is to be rounded up, else 0. ``unit``: the error per row that counts as 1."""
    moments, target, scale = (torch.from_numpy(a).float() for a in (h, w, s[:, :, None]))
    position = torch.from_numpy(w / s[:, :, None])
    down, cost = position.floor().float(), torch.from_numpy(np.maximum(unit, 1e-30)).float()
    v = behind((position - position.floor()).float()).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=LEARNING_RATE)
    for step in range(steps):
        up = rectified_sigmoid(v)
        e = (down + up).clamp(-top, top) * scale - target
        loss = (2 * (e * (e.detach() @ moments)).sum(2) / cost).sum()  # the gradient of eHeᵀ, as H is symmetric
        loss = loss + pressure(step, steps) * undecided(up).mean(2).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return (rectified_sigmoid(v.detach()) >= 0.5).double().numpy()
