"""Integer weights of one layer for the least error of its output, given the second moments of its input.

Everything is for matrices side by side: W, Q ``[g, o, k]``, s ``[g, o]``, H ``[g, k, k]`` (positive definite). The
error of a rounding is tr (sQ - W) H (sQ - W)ᵀ. `to_nearest` and `gptq` are whole roundings, as `deploykit.hub.refit`
takes them; the rest are their parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deploykit.core.target import QuantSpec

BLOCK = 64
"""Columns whose effect on the others waits until the block is done: the same numbers, as one product of matrices."""
SWEEPS = 6
REFITS = 2
SHRINK = torch.linspace(1.0, 0.4, 13).tolist()
"""Scales that are tried, as shares of the one that cuts no weight."""


def to_nearest(w: Tensor, h: Tensor, least: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Each weight by itself, nothing cut.

    Args:
        w: what is rounded.
        h: of the inputs; not looked at.
        least: smallest scales allowed ``[g, o]``.
        spec: bits, granularity and kind of scale.
    """
    s = storable(widest(w, least, spec), spec)
    return nearest(w, s, spec.weight_max), s


def gptq(w: Tensor, h: Tensor, least: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Columns in order, then single integers, then scales and integers in turn.

    Args:
        w: what is rounded.
        h: of the inputs.
        least: smallest scales allowed ``[g, o]``.
        spec: bits, granularity and kind of scale.
    """
    top = spec.weight_max
    s = searched_scale(w, h, least, spec)
    q = _better(column_by_column(w, s, h, top), s, nearest(w, s, top), s, w, h)[0]
    q = descend(q, w, s, h, top)
    for _ in range(REFITS):
        other = storable(fitted_scale(q, w, h, s, spec).maximum(least), spec)
        tried = descend(q, w, other, h, top)
        if spec.weight_granularity == "channel":
            q, s = _better(q, s, tried, other, w, h)
        elif error(tried, other, w, h).sum() < error(q, s, w, h).sum():
            q, s = tried, other
    return q, s


def _better(q: Tensor, s: Tensor, tried: Tensor, other: Tensor, w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Per output those of two roundings, with their scales, that lose less."""
    gains = error(tried, other, w, h) < error(q, s, w, h)
    return torch.where(gains[:, :, None], tried, q), torch.where(gains, other, s)


def nearest(w: Tensor, s: Tensor, top: int) -> Tensor:
    """Integers nearest to W / s."""
    return (w / s[:, :, None]).round().clamp(-top, top)


def error(q: Tensor, s: Tensor, w: Tensor, h: Tensor) -> Tensor:
    """(sQ - W) H (sQ - W)ᵀ per output ``[g, o]``."""
    e = q * s[:, :, None] - w
    return ((e @ h) * e).sum(2)


def widest(w: Tensor, least: Tensor, spec: QuantSpec) -> Tensor:
    """The scale that cuts no weight: per output, or one for all."""
    s = (w.abs().amax(2) / spec.weight_max).maximum(least)
    return s.max().expand_as(s) if spec.weight_granularity == "tensor" else s


def storable(s: Tensor, spec: QuantSpec) -> Tensor:
    """The scale as a float32 (or the power of two above it), so that what is rounded to it is what is stored."""
    return 2.0 ** s.log2().ceil() if spec.scale == "power_of_two" else s.float().double()


def searched_scale(w: Tensor, h: Tensor, least: Tensor, spec: QuantSpec) -> Tensor:
    """Of scales up to the widest the one whose plain rounding has the least error."""
    whole = widest(w, least, spec)
    best, cost = whole, torch.full_like(whole, torch.inf)
    for share in SHRINK:
        s = storable((whole * share).maximum(least), spec)
        found = error(nearest(w, s, spec.weight_max), s, w, h)
        if spec.weight_granularity == "tensor":
            found = found.sum().expand_as(found)
        best, cost = torch.where(found < cost, s, best), torch.minimum(found, cost)
    return best


def fitted_scale(q: Tensor, w: Tensor, h: Tensor, s: Tensor, spec: QuantSpec) -> Tensor:
    """The best scale for given integers; the old one where there is none above 0."""
    qh = q @ h
    up, down = (qh * w).sum(2), (qh * q).sum(2)
    if spec.weight_granularity == "tensor":
        up, down = up.sum().expand_as(up), down.sum().expand_as(down)
    best = up / down.clamp_min(1e-300)
    return torch.where(best > 0, best, s)


def column_by_column(w: Tensor, s: Tensor, h: Tensor, top: int) -> Tensor:
    """GPTQ (Frantar et al. 2023, algorithm 1): each column's error is made good by the columns after it."""
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    w, q = w.clone(), torch.zeros_like(w)
    k = w.shape[2]
    for start in range(0, k, BLOCK):
        end = min(start + BLOCK, k)
        errors = torch.zeros_like(w[:, :, start:end])
        for j in range(start, end):
            q[:, :, j] = (w[:, :, j] / s).round().clamp(-top, top)
            e = (w[:, :, j] - q[:, :, j] * s) / u[:, j, j, None]
            w[:, :, j:end] -= e[:, :, None] * u[:, j, None, j:end]
            errors[:, :, j - start] = e
        w[:, :, end:] -= errors @ u[:, start:end, end:]
    return q


def descend(q: Tensor, w: Tensor, s: Tensor, h: Tensor, top: int) -> Tensor:
    """Coordinate descent: every integer in turn to its best value given the others, until none changes."""
    q = q.clone()
    residual = (q * s[:, :, None] - w) @ h
    diagonal = torch.diagonal(h, dim1=1, dim2=2)
    k = w.shape[2]
    for _ in range(SWEEPS):
        changed = False
        for start in range(0, k, BLOCK):
            end = min(start + BLOCK, k)
            r, block = residual[:, :, start:end].clone(), h[:, start:end, start:end]
            before = q[:, :, start:end].clone()
            for j in range(end - start):
                old = q[:, :, start + j]
                best = (old - r[:, :, j] / (s * diagonal[:, start + j, None])).round().clamp(-top, top)
                step = (best - old) * s
                if step.any():
                    q[:, :, start + j] = best
                    r += step[:, :, None] * block[:, j, None, :]
            moved = (q[:, :, start:end] - before) * s[:, :, None]
            if moved.any():
                changed = True
                residual += moved @ h[:, start:end]
        if not changed:
            break
    return q
