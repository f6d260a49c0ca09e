"""What pruning took, the weights that are left make good: layer by layer, on unlabelled data.

Each layer of the pruned network reads what the pruned layers in front of it feed it, x, and shall give what the same
layer gives in the original network, y. Under the mask S of a row, with Σ covariances and w the weights as they came,

    w_S  =  (Σ_SS + λ)⁻¹ (Σ_xy + λ w)_S        b = E[y] - w E[x]

(the reconstruction of He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", section 3.1, for
any mask, and on inputs as they have become). What is fitted varies less than what it is fitted to: only the explained
part is there, and layer upon layer the signal would fade. So every output gets the variance back that it had,
w ← w sd(y) / sd(w x). Whoever shapes weights in another way brings a solution of its own.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.progress import track
from deploykit.hub.structure import is_own, mask_of, set_parameter
from deploykit.layerwise.channels import weight_of
from deploykit.layerwise.covariance import DAMPING, Covariance, precise
from deploykit.layerwise.products import inputs, matrix, multiplies, outputs, products, sharing
from deploykit.layerwise.watching import BATCH, Stop, entered, evaluating, hooked, watch
from deploykit.losses import as_tensors

MOST = 4.0
"""By how much variances are stretched at most."""


@dataclass(frozen=True)
class LeastSquares:
    """What a layer's weights ``[g, o, k]`` are fitted to."""

    xx: Tensor
    """Second moments of what it multiplies, ``[g, k, k]``; around the mean where something takes the mean."""
    yx: Tensor
    """With what it shall give, ``[g, o, k]``."""
    variance: Tensor
    """Of what it shall give, ``[g, o]``."""


Solve = Callable[[str, nn.Module, LeastSquares], Tensor | None]
"""The weights ``[g, o, k]`` of a layer, by its name; None: it stays as it is."""


def regressed(layer: Any, given: LeastSquares) -> Tensor:
    """The weights that answer best, ``[g, o, k]``; zeros of a mask stay."""
    held = mask_of(layer, "weight")
    w = matrix(layer, layer.weight).double()
    lives = matrix(layer, held.mask) if held is not None else torch.ones_like(w, dtype=torch.bool)
    lam = DAMPING * given.xx.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)[:, None, None]  # inputs may be dead
    found = torch.zeros_like(w)
    for g in range(len(w)):
        masks, which = torch.unique(lives[g], dim=0, return_inverse=True)
        for k, s in enumerate(masks):  # rows with the same mask (all, where channels went) are solved together
            rows = (which == k).nonzero()
            places = s.nonzero()[:, 0]
            system = given.xx[g][places][:, places] + lam[g] * torch.eye(len(places), dtype=w.dtype)
            right = given.yx[g][rows, places] + lam[g] * w[g][rows, places]
            found[g][rows, places] = torch.linalg.solve(system, right.T).T
    return found


def stretched(name: str, layer: nn.Module, given: LeastSquares) -> Tensor:
    """The same, with the variance that every output had."""
    found = regressed(layer, given)
    explained = ((found @ given.xx) * found).sum(2)
    return found * (given.variance / explained.clamp_min(1e-12)).clamp(0, MOST).sqrt()[:, :, None]


def refit(pruned: nn.Module, original: nn.Module, data: DataSet, solve: Solve = stretched) -> nn.Module:
    """A copy of the pruned network whose layers do what is left to them as well as they can.

    Layers whose classes do more than multiply (pad in forward, scale weights) stay as they are, and so do those that
    the original does not have (factors), that share weights with others, or whose weights another parametrization
    makes (weight norm).

    Args:
        pruned: with the layers of the original, some weights masked; not changed.
        original: what it was made of; not changed.
        data: unlabelled samples.
        solve: what becomes of a layer's weights.

    Raises:
        DeploykitError: a layer has other channels than the original's.
    """
    model = copy.deepcopy(pruned)
    theirs = products(original)
    _refuse_other_widths(products(model), theirs)
    with evaluating(model), evaluating(original), torch.no_grad():
        calls, shifts = _look(model, data)
        for name, layer in track(list(products(model).items()), "refit: layers"):
            if calls[name] and name in theirs:  # a decomposed layer has no counterpart
                moments = Moments()
                for (x, _), (_, y) in _both(model, layer, original, theirs[name], data, calls[name]):
                    moments.add(inputs(layer, x), outputs(layer, y))
                _settle(name, layer, shifts.get(name), moments, solve)
    return model


class Moments:
    """Of what a layer multiplies, x ``[g, n, k]``, and of what it should give, y ``[g, n, o]``."""

    def __init__(self) -> None:
        """Nothing seen."""
        self.x = Covariance()
        self.about: Any = None
        self.y_sum: Any = 0.0
        self.y_squares: Any = 0.0
        self.yx: Any = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """The next positions."""
        x, y = precise(x), precise(y)
        self.x.add(x)
        if self.about is None:
            self.about = y.mean(1, keepdim=True)
        self.y_sum = self.y_sum + y.sum(1, dtype=torch.float64)
        y = y - self.about
        self.y_squares = self.y_squares + y.square().sum(1, dtype=torch.float64)
        self.yx = self.yx + (y.transpose(1, 2) @ (x - self.x.about)).double()

    @property
    def y_mean(self) -> Tensor:
        """``[g, o]``."""
        return torch.as_tensor(self.y_sum / self.x.count)

    def least_squares(self, centred: bool) -> LeastSquares:
        """Around the means, or around zero."""
        n, x_mean, y_mean = self.x.count, self.x.mean, self.y_mean
        x_off, y_off = x_mean - self.x.about[:, 0].double(), y_mean - self.about[:, 0].double()
        xx, yx = self.x.centred(), self.yx / n - y_off[:, :, None] * x_off[:, None, :]
        variance = self.y_squares / n - y_off.square()
        if centred:
            return LeastSquares(xx, yx, variance)
        return LeastSquares(
            xx + x_mean[:, :, None] * x_mean[:, None, :], yx + y_mean[:, :, None] * x_mean[:, None, :],
            variance + y_mean.square(),
        )  # fmt: skip


def _settle(name: str, layer: Any, norm: Any, moments: Moments, solve: Solve) -> None:
    """Writes the weights, and the shift of the mean where it can be: in the layer's bias, or in what normalises it."""
    shifted = layer.bias is not None or norm is not None  # else a product alone: nothing takes a mean
    found = solve(name, layer, moments.least_squares(shifted))
    if found is None:
        return
    set_parameter(layer, "weight", found.reshape(layer.weight.shape).to(layer.weight))
    if not shifted:
        return
    b = (moments.y_mean - (found @ moments.x.mean[:, :, None])[:, :, 0]).flatten()
    if layer.bias is not None:
        set_parameter(layer, "bias", b)
    else:
        norm.running_mean.sub_(b)


def _look(model: nn.Module, data: DataSet) -> tuple[dict[str, int], dict[str, nn.Module]]:
    """How often each product is called for a batch, 0 where it has to stay as it is; and which normalisation reads
    nothing but what it gives."""
    calls = dict.fromkeys(products(model), 0)
    others = {name for name, layer in products(model).items() if not is_own(layer, "weight")} | sharing(model)
    given: dict[int, tuple[str, Tensor]] = {}
    norms: dict[str, list[nn.Module]] = {}

    def called(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        calls[name] += 1
        given[id(y)] = (name, y)
        if not multiplies(layer, x, y):
            others.add(name)

    def read(norm: nn.Module, x: Tensor) -> None:
        if id(x) in given:
            norms.setdefault(given[id(x)][0], []).append(norm)

    hooks = [
        m.register_forward_hook(lambda m, x, named, y, n=n: called(n, m, entered(x, named), y), with_kwargs=True)
        for n, m in products(model).items()
    ]
    hooks += [
        m.register_forward_pre_hook(lambda m, x, named: read(m, entered(x, named)), with_kwargs=True)
        for m in model.modules()
        if getattr(m, "running_mean", None) is not None
    ]
    with hooked(hooks):
        model(**as_tensors(next(data.batches(1)).inputs))
    calls |= dict.fromkeys(others, 0)
    return calls, {name: found[0] for name, found in norms.items() if len(found) == calls[name] == 1}


def _refuse_other_widths(ours: Mapping[str, nn.Module], theirs: Mapping[str, nn.Module]) -> None:
    """Raises where channels were taken out: there is no telling which of the original's a layer still has."""
    for name in [name for name in ours if name in theirs]:
        left, had = (weight_of(layers[name]).shape for layers in (ours, theirs))
        if left != had:
            raise DeploykitError(
                f"layer '{name}' has other channels than in the original ({list(left)} weights, {list(had)} before), "
                "and weights can be fitted between layers of one size only. prune fits what is left by itself (refit = "
                "true); behind other steps that take channels out, reestimate_bn or training makes good what is lost"
            )


def _both(
    model: nn.Module, layer: nn.Module, original: nn.Module, theirs: nn.Module, data: DataSet, calls: int
) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Input and output of a layer in both networks, call by call."""
    for batch in data.batches(BATCH):
        given = as_tensors(batch.inputs)
        pairs = []
        for network, place in ((model, layer), (original, theirs)):
            seen: list[tuple[Tensor, Tensor]] = []
            hook = watch(place, seen, calls)
            with contextlib.suppress(Stop):
                network(**given)
            hook.remove()
            pairs.append(seen)
        yield from zip(*pairs, strict=True)
