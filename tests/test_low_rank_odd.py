"""The pass low_rank on networks that call, keep and feed their layers in unusual ways."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pruned import relative_error
from torch import Tensor, nn

from deploykit import passes, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.recipe import Step
from deploykit.cost import cost
from deploykit.layerwise.budgets import NotEnough
from deploykit.layerwise.covariance import Covariance
from deploykit.layerwise.refit import Moments
from deploykit.low_rank.factored import Factored


def run(model: nn.Module, data: DataSet, name: str = "low_rank", **options: Any) -> Any:
    example = next(data.batches(2)).inputs
    here = Context(
        targets.load("mobile-arm"), {"calibration": data}, example, original=model, cost=lambda m: cost(m, example)
    )
    options = {"multiple": 1, **options} if name in ("low_rank", "prune") else options
    return passes.build(Step(name, options))(model, here)


def rows(mean: float = 0.0, spread: float = 1.0, n: int = 64, width: int = 12) -> DataSet:
    random = np.random.default_rng(0)
    x = mean + spread * random.standard_normal((n, 4)) @ random.standard_normal((4, width))
    return DataSet.of({"x": x.astype(np.float32)})


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(12, 24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Any:
        return self.b(torch.relu(self.a(x)))


class ByName(Two):
    def forward(self, x: Tensor) -> Any:
        return self.b(input=torch.relu(self.a(input=x)))


class Elsewhere(Two):
    def __init__(self) -> None:
        super().__init__()
        self.order = [self.a, self.b]

    def forward(self, x: Tensor) -> Any:
        for layer in self.order:
            x = torch.relu(layer(x))
        return x


class Aside(Two):
    """A branch that nobody reads, a layer fed by a parameter, and a second answer in integers."""

    def __init__(self) -> None:
        super().__init__()
        self.aux, self.fed, self.query = nn.Linear(12, 12), nn.Linear(12, 10), nn.Parameter(torch.randn(1, 12))

    def forward(self, x: Tensor) -> Any:
        self.aux(x)
        y = super().forward(x) + self.fed(self.query)
        return y, y.topk(2).indices


class Alone(nn.Linear):
    def __init__(self) -> None:
        super().__init__(12, 10)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x)


class NoGradients(Two):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)


@pytest.mark.parametrize("method", ["data", "weights"])
@pytest.mark.parametrize("kind", [ByName, Aside])
def test_layers_called_by_name_or_aside_are_decomposed(kind: Any, method: str) -> None:
    made = run(kind().eval(), rows(), amount=0.2, method=method)
    assert any(isinstance(m, Factored) for m in made.modules())


def test_a_layer_that_the_model_keeps_elsewhere_too_is_refused_by_name() -> None:
    with pytest.raises(DeploykitError, match=r"does not call '[ab]' by that name"):
        run(Elsewhere().eval(), rows(), amount=0.3, method="weights")


def test_a_model_that_is_one_layer_is_refused() -> None:
    with pytest.raises(DeploykitError, match="it is the whole model"):
        run(Alone().eval(), rows(), amount=0.3, method="weights")


def test_a_forward_without_gradients_is_refused_where_they_are_needed() -> None:
    with pytest.raises(DeploykitError, match="switches gradients off"):
        run(NoGradients().eval(), rows(), amount=0.3, method="data")


@pytest.mark.parametrize(("mean", "spread"), [(300.0, 0.1), (1e4, 10.0), (0.0, 0.0)])
def test_inputs_far_from_zero_or_always_the_same_are_fitted(mean: float, spread: float) -> None:
    model, data = Two().eval(), rows(mean, spread)
    made = run(model, data, amount=0.3, method="data")
    assert relative_error(made, model, data) < 1e-3


def test_covariances_about_a_large_mean_are_numpys() -> None:
    x = rows(300.0, 0.01)
    arrays = [b.inputs["x"] for b in x.batches(16)]
    y = [a[:, :3] * 2 + 500 for a in arrays]
    seen, both = Covariance(), Moments()
    for a, b in zip(arrays, y, strict=True):
        seen.add(torch.from_numpy(a)[None])
        both.add(torch.from_numpy(a)[None], torch.from_numpy(b)[None])
    whole, answers = np.concatenate(arrays).astype(float), np.concatenate(y).astype(float)
    np.testing.assert_allclose(seen.centred()[0], np.cov(whole.T, bias=True), rtol=1e-3, atol=1e-9)
    found = both.least_squares(centred=False)
    np.testing.assert_allclose(found.xx[0], whole.T @ whole / len(whole), rtol=1e-6)
    np.testing.assert_allclose(found.yx[0], answers.T @ whole / len(whole), rtol=1e-6)
    np.testing.assert_allclose(found.variance[0], (answers**2).mean(0), rtol=1e-6)


@pytest.mark.parametrize("between", [("sparsify", {"sparsity": 0.3}), ("prune", {"amount": 0.2, "criterion": "l1"})])
def test_factors_that_were_pruned_since_stay_as_they_are(between: tuple[str, dict[str, Any]]) -> None:
    data = rows()
    first = run(Two().eval(), data, amount=0.3, method="weights", layers=("b",))
    name, options = between
    pruned = run(first, data, name, **options)
    with pytest.raises(DeploykitError, match="it is decomposed already"):
        run(pruned, data, amount=0.01, method="weights", layers=("b",))


def test_what_another_form_decomposed_can_be_left_out_by_name() -> None:
    random = np.random.default_rng(0)
    data = DataSet.of({"input": random.standard_normal((32, 3, 8, 8)).astype(np.float32)})
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 3)).eval()
    first = run(model, data, amount=0.1, form="tucker", method="weights", layers=("1",))
    again = run(first, data, amount=0.02, method="weights", skip=("1",))
    assert again[1].ranks == first[1].ranks and isinstance(again[0], Factored)


def test_methods_of_one_slice_refuse_slices() -> None:
    with pytest.raises(DeploykitError, match="of one slice"):
        run(Two().eval(), rows(), amount=0.1, method="l_rank", slices=4)


@pytest.mark.parametrize("step", ["low_rank", "prune"])
def test_a_budget_that_rounds_cannot_reach_is_refused_before_anything_trains(step: str) -> None:
    options = {"method": "weights"} if step == "low_rank" else {"criterion": "l1"}
    with pytest.raises(DeploykitError, match="cannot be saved"):  # there is no trainer, and none is missed
        run(Two().eval(), rows(), "iterate", amount=0.999, step=step, options=options, dense=5)


def test_a_frozen_bias_is_not_fitted() -> None:
    model = Two().eval()
    model.b.bias.requires_grad_(False)
    made = run(model, rows(), amount=0.1)
    assert torch.equal(made.b.bias, model.b.bias)


@pytest.mark.parametrize("form", ["spatial", "cp"])
def test_iterating_a_form_that_cannot_be_taken_up_again_is_refused_before_training(form: str) -> None:
    with pytest.raises(DeploykitError, match="cannot be decomposed further"):
        run(Two().eval(), rows(), "iterate", amount=0.3, step="low_rank", options={"form": form})


def test_what_is_small_enough_already_is_not_made_whole_again() -> None:
    data = rows()
    small = run(Two().eval(), data, amount=0.4)
    count = sum(p.numel() for p in small.parameters())
    again = run(small, data, at_most=count + 10)
    assert sum(p.numel() for p in again.parameters()) == count and again is not small
    assert torch.equal(again(torch.ones(1, 12)), small(torch.ones(1, 12)))


def test_a_budget_that_no_factors_meet_never_says_that_less_than_nothing_can_be_saved() -> None:
    assert "at most 0.0% can" in str(NotEnough(0.3, -0.1))
