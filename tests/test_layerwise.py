"""Layers as matrices, what they multiply and what their outputs matter, and weights fitted anew layer by layer."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pruned import relative_error, rows
from torch import Tensor, nn

from deploykit import targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.hub.structure import attach_mask
from deploykit.layerwise.covariance import DAMPING, Covariance, covariances, damped
from deploykit.layerwise.fisher import fisher
from deploykit.layerwise.products import inputs, matrix, outputs, products
from deploykit.layerwise.refit import refit
from deploykit.passes.refit import Refit

FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def pictures(count: int, channels: int = 3, side: int = 8, seed: int = 0) -> DataSet:
    random = np.random.default_rng(seed)
    return DataSet.of({"x": random.standard_normal((count, channels, side, side)).astype(np.float32)})


# --- layers as matrices


@FEW
@given(st.data())
def test_a_layers_output_is_its_matrix_times_its_inputs(data: Any) -> None:
    draw = data.draw
    rank = draw(st.integers(1, 3))
    groups, wide, out = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    settings_ = {
        "kernel_size": draw(st.integers(1, 3)), "stride": draw(st.integers(1, 2)), "dilation": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 2)), "padding_mode": draw(st.sampled_from(["zeros", "circular", "replicate"])),
        "groups": groups, "bias": False,
    }  # fmt: skip
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    layer = kind(groups * wide, groups * out, **settings_)
    x = torch.randn(2, groups * wide, *[7] * rank)
    with torch.no_grad():
        by_matrix = torch.einsum("gok,gnk->gno", matrix(layer, layer.weight), inputs(layer, x))
        torch.testing.assert_close(by_matrix, outputs(layer, layer(x)), atol=1e-4, rtol=1e-4)


def test_same_padding_and_linear_layers_are_matrices_too() -> None:
    for layer, x in (
        (nn.Conv2d(2, 3, (1, 3), dilation=2, padding="same", bias=False), torch.randn(2, 2, 5, 5)),
        (nn.Linear(4, 3, bias=False), torch.randn(2, 5, 4)),
    ):
        with torch.no_grad():
            found = torch.einsum("gok,gnk->gno", matrix(layer, layer.weight), inputs(layer, x))
            torch.testing.assert_close(found, outputs(layer, layer(x)))


def test_transposed_convolutions_are_left_out() -> None:
    assert list(products(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1), nn.Linear(1, 1)))) == ["0", "2"]


# --- statistics


def test_covariances_are_those_of_numpy_over_all_batches() -> None:
    x = rows(100, 4)
    found = Covariance()
    for part in np.array_split(x, 7):
        found.add(torch.from_numpy(part)[None])
    np.testing.assert_allclose(found.centred()[0], np.cov(x.T, bias=True), rtol=1e-4)
    np.testing.assert_allclose(found.mean[0], x.mean(0), rtol=1e-4)
    net, data = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), DataSet.of({"input": x})
    by_layer = covariances(net, products(net), data)
    np.testing.assert_allclose(by_layer["0"].centred()[0], np.cov(x.T, bias=True), rtol=1e-3)


def test_the_fisher_information_of_class_scores_is_that_of_the_softmax() -> None:
    """E over classes drawn from p of (p_c - [c = drawn])² is p_c (1 - p_c)."""
    net, x = nn.Sequential(nn.Linear(4, 3)), rows(4000, 4) / 4
    p = torch.softmax(net(torch.from_numpy(x)), 1).detach().numpy()
    found = fisher(net, products(net), DataSet.of({"input": x}), seed=0)
    np.testing.assert_allclose(found["0"][0], (p * (1 - p)).mean(0), rtol=0.1)


def test_outputs_that_are_no_class_scores_matter_by_their_squared_error() -> None:
    """y = 2 a + 3 b: an error of a counts four times, of b nine times."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.layer(x).unbind(1)
            return (2 * a + 3 * b)[:, None]

    net = Net()
    found = fisher(net, products(net), DataSet.of({"x": rows(4000, 4)}), seed=0)
    np.testing.assert_allclose(found["layer"][0], [4, 9], rtol=0.1)


def test_an_output_matters_once_at_every_position() -> None:
    """The same sum over 4 x 4 positions, taken by a convolution at every position or by a linear layer at once."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.everywhere, self.once = nn.Conv2d(3, 2, 1), nn.Linear(48, 2)

        def forward(self, x: Tensor) -> Tensor:
            return (self.everywhere(x).sum((2, 3)) + self.once(x.flatten(1))).sum(1, keepdim=True)

    net = Net()
    found = fisher(net, products(net), DataSet.of({"x": rows(2000, 48).reshape(-1, 3, 4, 4)}), seed=0)
    np.testing.assert_allclose(found["once"][0], [1, 1], rtol=0.1)
    np.testing.assert_allclose(found["everywhere"][0], 16 * found["once"][0], rtol=1e-6)


def test_statistics_leave_the_model_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    before = copy.deepcopy(net.state_dict())
    data = DataSet.of({"input": next(pictures(8).batches(8)).inputs["x"]})
    covariances(net, products(net), data)
    fisher(net, products(net), data, 0)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(m.training for m in net.modules()) and all(p.grad is None for p in net.parameters())


def test_damping_adds_a_share_of_the_mean_variance() -> None:
    h = torch.diag(torch.tensor([1.0, 3.0])).double()[None]
    torch.testing.assert_close(damped(h)[0], torch.diag(torch.tensor([1.0, 3.0]).double() + DAMPING * 2))


# --- what the others make good


class Net(nn.Module):
    """Convolutions with a normalisation, with a bias, with neither; a linear layer at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.c = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 1, bias=False)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.a(x)))
        return self.head(torch.relu(self.c(torch.relu(self.b(x)))).mean((2, 3)))  # type: ignore[no-any-return]


def net() -> Net:
    torch.manual_seed(0)
    made = Net()
    made.norm.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr]
    return made.eval()


def masked(model: nn.Module, share: float = 0.5) -> nn.Module:
    pruned = copy.deepcopy(model)
    random = torch.Generator().manual_seed(1)
    for layer in products(pruned).values():
        attach_mask(layer, "weight", torch.rand(layer.weight.shape, generator=random) >= share)
    return pruned


def test_refitted_networks_answer_more_like_the_original_on_data_never_seen() -> None:
    original = net()
    pruned = masked(original)
    found = refit(pruned, original, pictures(64))
    unseen = pictures(64, seed=9)
    assert relative_error(found, original, unseen) < 0.5 * relative_error(pruned, original, unseen)


def test_zeros_stay_zero_and_neither_model_is_changed() -> None:
    original = net()
    pruned = masked(original)
    before = [copy.deepcopy(m.state_dict()) for m in (original, pruned)]
    found = refit(pruned, original, pictures(32))
    for model, state in zip((original, pruned), before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    for name, layer in products(found).items():
        torch.testing.assert_close(layer.weight == 0, pruned.get_submodule(name).weight == 0)


def test_the_first_layer_gives_its_means_and_variances_back() -> None:
    original, data = net(), pictures(32)
    x = torch.from_numpy(next(data.batches(32)).inputs["x"])
    wanted = original.norm(original.a(x))
    found: Any = refit(masked(original), original, data)
    given = found.norm(found.a(x))
    torch.testing.assert_close(given.mean((0, 2, 3)), wanted.mean((0, 2, 3)), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(given.var((0, 2, 3)), wanted.var((0, 2, 3)), atol=0.0, rtol=0.02)


def test_least_squares_are_those_of_numpy() -> None:
    x = rows(300, 5)
    original = nn.Sequential(nn.Linear(5, 1))
    pruned = copy.deepcopy(original)
    attach_mask(pruned[0], "weight", torch.tensor([[True, False, True, True, False]]))
    found: Any = refit(pruned, original, DataSet.of({"input": x}))[0]
    y = original(torch.from_numpy(x)).detach().numpy()[:, 0]
    s = [0, 2, 3]
    centred = x - x.mean(0)
    lam = DAMPING * centred.var(0).mean() * len(x)
    w = original[0].weight.detach().numpy()[0]
    by_hand = np.linalg.solve(
        centred[:, s].T @ centred[:, s] + lam * np.eye(3), centred[:, s].T @ (y - y.mean()) + lam * w[s]
    )
    by_hand *= y.std() / (centred[:, s] @ by_hand).std()  # the variance that the output had
    np.testing.assert_allclose(found.weight.detach().numpy()[0, s], by_hand, rtol=1e-3)
    assert float(found(torch.from_numpy(x)).detach().mean()) == pytest.approx(y.mean(), abs=1e-4)


def test_inputs_that_are_always_nought_leave_finite_weights() -> None:
    x = rows(100, 4) * np.array([0, 1, 0, 1], np.float32)
    original = nn.Sequential(nn.Linear(4, 2))
    pruned = copy.deepcopy(original)
    attach_mask(pruned[0], "weight", torch.tensor([[True, True, True, False]] * 2))
    found = refit(pruned, original, DataSet.of({"input": x}))
    assert all(bool(torch.isfinite(v).all()) for v in found.state_dict().values())
    dead = refit(pruned, original, DataSet.of({"input": np.zeros_like(x)}))
    assert all(bool(torch.isfinite(v).all()) for v in dead.state_dict().values())


class Padded(nn.Conv2d):
    """Pads in forward, as MobileNets converted from TensorFlow do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


def test_a_class_that_does_more_than_multiply_stays_as_it_is() -> None:
    original = nn.Sequential(Padded(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    pruned = masked(original)
    x = next(pictures(32).batches(32)).inputs["x"]
    found: Any = refit(pruned, original, DataSet.of({"input": x}))
    torch.testing.assert_close(found[0].weight, pruned.get_submodule("0").weight)
    assert not torch.equal(found[2].weight, pruned.get_submodule("2").weight)


def test_too_few_samples_are_refused() -> None:
    here = Context(targets.load("x86"), {"calibration": pictures(31)}, original=net())
    with pytest.raises(DeploykitError, match="at least 32 calibration samples; there are 31"):
        Refit()(masked(net()), here)
