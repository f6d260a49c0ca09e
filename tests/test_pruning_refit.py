"""Weights and statistics fitted anew behind a step that pruned, where layers are not what they seem."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pruned import context, images, relative_error
from torch import Tensor, nn

from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.hub.structure import attach_mask, mask_of, set_parameter
from deploykit.passes.prune import Prune
from deploykit.passes.reestimate_bn import ReestimateBn
from deploykit.passes.refit import Refit
from deploykit.passes.sparsify import Sparsify


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.c(torch.relu(self.b(torch.relu(self.a(x))))).mean((2, 3))
        return logits


@pytest.mark.parametrize("made", ["plain", "masked", "weight norm"])
def test_what_a_parameter_is_set_to_it_has(made: str) -> None:
    layer, values = nn.Linear(4, 3), torch.arange(1.0, 13.0).reshape(3, 4)
    held = layer.weight
    if made == "masked":
        attach_mask(layer, "weight", torch.eye(3, 4) == 0)
    if made == "weight norm":
        nn.utils.parametrizations.weight_norm(layer)
    set_parameter(layer, "weight", values)
    torch.testing.assert_close(layer.weight, values * (torch.eye(3, 4) == 0) if made == "masked" else values)
    assert made != "plain" or layer.weight is held


def test_behind_narrower_layers_refit_says_that_widths_changed_and_what_to_do() -> None:
    net, data = Net().eval(), images(40)
    here = replace(context(net, data), original=net)
    pruned = Prune(0.3, criterion="l2", refit=False, multiple=1)(net, here)
    with pytest.raises(DeploykitError, match=r"refit: layer 'a' has other channels .*refit = true"):
        Refit()(pruned, here)


def test_a_layer_with_weight_norm_stays_and_the_others_are_fitted() -> None:
    net, data = Net().eval(), images(40)
    nn.utils.parametrizations.weight_norm(net.a)
    here = replace(context(net, data), original=net)
    sparse = Sparsify(0.5, "l1", skip=("a",))(net, here)
    found: Any = Refit()(sparse, here)
    assert torch.equal(found.a.weight, net.a.weight) and mask_of(found.b, "weight") is not None
    assert relative_error(found, net, data) < relative_error(sparse, net, data)
    narrow: Any = Prune(0.2, criterion="l2", multiple=1)(net, here)
    assert narrow.b.out_channels < 16 and torch.equal(narrow.a.weight, net.a.weight)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)
        self.two.weight = self.one.weight
        self.between, self.head = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.between(torch.relu(self.one(x))))
        return self.head(torch.relu(self.two(x)))  # type: ignore[no-any-return]


def test_weights_that_two_layers_share_stay_shared() -> None:
    net = Tied().eval()
    data = DataSet.of({"x": np.random.default_rng(0).standard_normal((256, 12)).astype(np.float32)})
    here = replace(context(net, data), original=net)
    sparse = Sparsify(0.2, "l1", skip=("one", "two"))(net, here)
    found: Any = Refit()(sparse, here)
    assert found.one.weight is found.two.weight and torch.equal(found.one.weight, net.one.weight)
    assert relative_error(found, net, data) < relative_error(sparse, net, data)


def test_a_frozen_layer_is_fitted_and_stays_frozen() -> None:
    net, data = Net().eval().requires_grad_(False), images(40)
    here = replace(context(net, data), original=net)
    found: Any = Refit()(Sparsify(0.5, "l1", skip=("b",))(net, here), here)
    assert not torch.equal(found.b.weight, net.b.weight) and not found.b.weight.requires_grad


class Aside(nn.Module):
    """A norm that runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.aside = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        if self.training:
            x = x + 0 * self.aside(x)
        return x.mean((2, 3))


def test_norms_that_do_not_run_keep_their_statistics() -> None:
    net = Aside()
    nn.init.constant_(net.aside.running_mean, 5.0)  # type: ignore[arg-type]
    before = copy.deepcopy(net.aside.state_dict())
    found: Any = ReestimateBn()(net.eval(), context(net, images(40)))
    assert all(torch.equal(t, before[name]) for name, t in found.aside.state_dict().items())
    assert not torch.equal(found.norm.running_mean, net.norm.running_mean)  # type: ignore[arg-type]
