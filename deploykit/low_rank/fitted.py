"""Layers of chosen ranks, fitted to data one after the other: each makes good what those in front of it lost.

Every layer reads what the compressed layers in front feed it and shall give what it gives in the whole network. That is
what its regressed weight T does best (`deploykit.layerwise.refit`). In k slices of rank j, with H the covariance of the
inputs and d² how much an error of an output costs, W minimises

    Σ_o d_o² (W - T)_o H (W - T)_oᵀ

by block coordinate descent: for slice i, with the others as they are, the best weight of any rank is

    M  =  W_i + ((T - W) H)_i H_ii⁻¹,

and the best of rank j is D⁻¹ P D M, with P the projection on the j leading left singular vectors of D M L, L Lᵀ = H_ii
(Eckart & Young 1936 in the norm of the data).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deploykit.core.data import DataSet
from deploykit.layerwise.covariance import damped
from deploykit.layerwise.products import matrix
from deploykit.layerwise.refit import LeastSquares, refit, regressed
from deploykit.low_rank.factored import Ranks, shape_of
from deploykit.low_rank.forms import form_of

SWEEPS = 6


def fitted(
    model: nn.Module, form: str, ranks: Mapping[str, Ranks], d: Mapping[str, Tensor], still: set[str], data: DataSet
) -> nn.Module:
    """A copy of the network whose layers have these ranks and are not yet decomposed.

    Args:
        model: not changed.
        form: a name in `deploykit.low_rank.forms`.
        ranks: of the layers that will be decomposed; the others are fitted as well.
        d: by layer, the root of how much each output matters, ``[g, o]``.
        still: layers that stay as they are.
        data: unlabelled samples.
    """

    def solve(name: str, layer: nn.Module, given: LeastSquares) -> Tensor | None:
        if name in still:
            return None
        t = regressed(layer, given)
        if name not in ranks:
            return t
        if form == "channel":
            k, j = ranks[name]
            h = damped(given.xx)
            return torch.stack([sliced_to_rank(*each, k, j) for each in zip(t, h, d[name], strict=True)])
        made, g = form_of(form), shape_of(layer).g
        assert isinstance(layer.weight, Tensor)
        factors = made.split(t.reshape(layer.weight.shape), g, ranks[name])
        return matrix(layer, made.merge(factors, g, ranks[name]))

    return refit(model, model, data, solve)


def sliced_to_rank(t: Tensor, h: Tensor, d: Tensor, k: int, j: int) -> Tensor:
    """W of k slices with rank j each, nearest to T ``[o, n]`` in the norm of H ``[n, n]`` and d ``[o]``."""
    b = t.shape[1] // k
    places = [slice(i * b, (i + 1) * b) for i in range(k)]
    lower = [torch.linalg.cholesky(h[at, at]) for at in places]
    w = t.clone()
    gap = torch.zeros_like(t)  # (T - W) H
    for _ in range(SWEEPS if k > 1 else 1):
        for at, own in zip(places, lower, strict=True):
            m = d[:, None] * (w[:, at] + torch.cholesky_solve(gap[:, at].T, own).T)
            u = torch.linalg.svd(m @ own, full_matrices=False)[0][:, :j]
            new = (u @ (u.T @ m)) / d[:, None]
            gap -= (new - w[:, at]) @ h[at]
            w[:, at] = new
    return w
