"""Running statistics become those of the data, and nothing else changes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from deploykit import passes, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.recipe import Step
from deploykit.passes.reestimate_bn import ReestimateBn


def data(n: int = 24) -> DataSet:
    x = np.random.default_rng(0).normal(1.0, 2.0, size=(n, 2, 4, 4)).astype(np.float32)
    return DataSet.of({"x": x})


def context(given: DataSet) -> Context:
    return Context(targets.load("x86"), {"calibration": given})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bn1, self.conv, self.bn2 = nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, momentum=0.3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.bn2(self.conv(self.drop(self.bn1(x)))))


def test_statistics_are_the_plain_average_of_those_of_all_full_batches() -> None:
    given = data(28)
    found = ReestimateBn(batch=8)(Net().eval(), context(given))
    x = next(given.batches(28)).inputs["x"][:24].reshape(3, 8, 2, 4, 4)  # the last 4 samples are no full batch
    np.testing.assert_allclose(found.bn1.running_mean, x.mean((1, 3, 4)).mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.bn1.running_var, x.var((1, 3, 4), ddof=1).mean(0), rtol=1e-5)


def test_a_single_small_batch_gives_its_own_statistics_also_behind_another_norm() -> None:
    given = data(12)
    net = ReestimateBn(batch=64)(Net().eval(), context(given))
    x = torch.from_numpy(next(given.batches(12)).inputs["x"])
    normed = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
    y = net.conv(normed).detach()
    torch.testing.assert_close(net.bn2.running_mean, y.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.bn2.running_var, y.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_weights_modes_and_momenta_stay_and_the_model_that_came_in_is_not_touched(training: bool) -> None:
    net = Net().train(training)
    before = copy.deepcopy(net.state_dict())
    found = ReestimateBn(batch=4)(net, context(data()))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), found.parameters(), strict=True))
    assert {m.training for m in found.modules()} == {training}
    assert (found.bn1.momentum, found.bn2.momentum) == (0.1, 0.3)


def test_the_same_data_give_the_same_statistics() -> None:
    one, two = (ReestimateBn()(Net().eval(), context(data())) for _ in range(2))
    assert torch.equal(one.bn2.running_var, two.bn2.running_var)


def test_a_network_whose_statistics_are_those_of_the_data_stays_as_it_is() -> None:
    given = data()
    once = ReestimateBn(batch=24)(Net().eval(), context(given))
    twice = ReestimateBn(batch=24)(once, context(given))
    torch.testing.assert_close(once.bn2.running_mean, twice.bn2.running_mean)


def test_what_has_no_statistics_or_no_variance_is_refused() -> None:
    with pytest.raises(DeploykitError, match="no batch normalisation"):
        ReestimateBn()(nn.Linear(2, 2), context(data()))
    with pytest.raises(DeploykitError, match="at least 2 samples, memory has 1"):
        ReestimateBn()(Net(), context(data(1)))
    with pytest.raises(DeploykitError, match="batch must be at least 2"):
        passes.build(Step("reestimate_bn", {"batch": 1}))
    with pytest.raises(DeploykitError, match="needs calibration data"):
        ReestimateBn()(Net(), Context(targets.load("x86")))
