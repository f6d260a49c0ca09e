"""Low rank: decompositions against torch's layers, tables and bounds against numpy, choices against brute force."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deploykit.core.errors import DeploykitError
from deploykit.cost import cost
from deploykit.low_rank.eligible import look
from deploykit.low_rank.factored import Factored, shape_of
from deploykit.low_rank.fitted import sliced_to_rank
from deploykit.low_rank.forms import FORMS, decomposed, empty, form_of, refusal
from deploykit.low_rank.methods import choose
from deploykit.low_rank.select import alternate, equal_error, equal_ratio, least, least_sum, saving, spent
from deploykit.low_rank.tables import Candidate, Norm, Table, table

FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class PadsItself(nn.Conv2d):
    """Pads on one side alone, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


class Standardized(nn.Conv2d):
    """Computes with another weight than it holds."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


@st.composite
def convolutions(draw: Any, groups: bool = True, least: int = 1, same: bool = True) -> nn.Conv2d:
    """Of any stride, dilation, padding; ``least`` taps along each side."""
    number = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    g = number(1, 2) if groups else 1
    kernel = (number(least, 3), number(least, 3))
    stride, dilation, padding = ((number(low, 2), number(low, 2)) for low in (1, 1, 0))
    torch.manual_seed(number(0, 10**6))
    mode = draw(st.sampled_from(["zeros", "reflect", "circular"]))
    pad: Any = padding
    if same and 2 not in kernel and draw(st.booleans()):
        pad, stride = "same", (1, 1)
    return nn.Conv2d(g * number(2, 6), g * number(1, 6), kernel, stride, pad, dilation, g, draw(st.booleans()), mode)


def assert_same(layer: nn.Module, factored: nn.Module, x: Tensor) -> None:
    y, found = layer(x), factored(x)
    assert y.shape == found.shape
    assert float((y - found).detach().abs().max()) <= 1e-5 * float(y.detach().abs().max())


# ------------------------------------------------------------------ decompositions


@FEW
@given(convolutions(), st.data())
def test_slices_of_full_rank_compute_what_the_convolution_does(layer: nn.Conv2d, data: Any) -> None:
    shape = shape_of(layer)
    k = data.draw(st.sampled_from([k for k in range(1, 7) if shape.c // shape.g % k == 0]))
    j = min(shape.f // shape.g, shape.c // shape.g // k * shape.taps)
    made = decomposed(layer, "channel", (k, j))
    assert_same(layer, made, torch.randn(2, shape.c, 7, 6))
    assert [type(m) for m in made] == [nn.Conv2d, nn.Conv2d] and made[0].groups == shape.g * k


@FEW
@given(st.sampled_from(["spatial", "tucker", "cp"]), convolutions(groups=False, least=2))
def test_every_other_form_of_full_rank_computes_what_the_convolution_does(form: str, layer: nn.Conv2d) -> None:
    made = decomposed(layer, form, form_of(form).full(shape_of(layer)))
    assert_same(layer, made, torch.randn(2, layer.in_channels, 7, 6))


@FEW
@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 10**6))
def test_linear_layers_of_full_rank_compute_what_they_did(ins: int, outs: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(ins, outs, bias)
    made = decomposed(layer, "channel", (1, min(ins, outs)))
    assert_same(layer, made, torch.randn(3, 2, ins))
    assert [type(m) for m in made] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("layer", [nn.Conv1d(4, 6, 3, padding=1), nn.Conv3d(4, 6, 2, stride=2)])
def test_convolutions_over_lines_and_volumes_are_sliced_too(layer: Any) -> None:
    x = torch.randn(2, 4, *[6] * len(layer.kernel_size))
    made = decomposed(layer, "channel", (2, 6))
    assert_same(layer, made, x)


def test_the_best_product_of_rank_j_is_numpys() -> None:
    layer = nn.Linear(7, 5)
    made: Any = decomposed(layer, "channel", (1, 2))
    u, s, v = np.linalg.svd(layer.weight.detach().numpy())
    np.testing.assert_allclose(
        (made[1].weight @ made[0].weight).detach().numpy(), (u[:, :2] * s[:2]) @ v[:2], atol=1e-6
    )


def test_a_class_with_a_forward_of_its_own_keeps_it_in_the_factor_with_its_kernel() -> None:
    layer = PadsItself(4, 6, 3, stride=2)
    for form, ranks in (("channel", (2, 6)), ("tucker", (4, 6))):
        made = decomposed(layer, form, ranks)
        assert_same(layer, made, torch.randn(2, 4, 8, 8))
        assert sum(isinstance(m, PadsItself) for m in made) == 1
    for form in ("spatial", "cp"):
        assert "forward of its own" in refusal(layer, form)


def test_a_kernel_that_is_a_product_is_found_again() -> None:
    random = torch.Generator().manual_seed(3)
    sides = [torch.randn(n, 2, generator=random, dtype=torch.float64) for n in (5, 4, 3, 3)]
    w = torch.einsum("fr,cr,yr,xr->fcyx", *sides)
    for form, ranks in (("cp", (2,)), ("tucker", (2, 2)), ("spatial", (2,))):
        made = form_of(form)
        torch.testing.assert_close(made.merge(made.split(w, 1, ranks), 1, ranks), w, rtol=1e-4, atol=1e-4)


def test_improved_tucker_factors_are_no_worse_than_those_they_started_from() -> None:
    w = torch.randn(8, 7, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = form_of("tucker")
    (start,) = made.approximations(w, 1, [(3, 4)])
    found = made.merge(made.split(w, 1, (3, 4)), 1, (3, 4))
    assert float((w - found).norm()) <= float((w - start).norm())


@pytest.mark.parametrize(
    ("layer", "form", "why"),
    [(nn.Conv2d(4, 8, 3, groups=4), "channel", "depthwise"), (nn.Linear(4, 4), "cp", "two dimensions"),
     (nn.Conv2d(4, 8, 3, groups=2), "tucker", "groups"), (nn.Conv2d(4, 8, 1), "spatial", "1x1")],
)  # fmt: skip
def test_layers_that_have_no_such_form_are_refused_with_the_reason(layer: nn.Module, form: str, why: str) -> None:
    assert why in refusal(layer, form)
    with pytest.raises(DeploykitError, match=why):
        empty(layer, form, (1,))


@pytest.mark.parametrize(
    ("form", "ranks"),
    [("channel", (1, 0)), ("channel", (1, 9)), ("channel", (3, 1)), ("channel", (2, 9)), ("spatial", (0,)),
     ("spatial", (13,)), ("tucker", (5, 1)), ("cp", (1, 1)), ("cp", (37,))],
)  # fmt: skip
def test_rank_zero_and_ranks_above_full_are_refused(form: str, ranks: tuple[int, ...]) -> None:
    with pytest.raises(DeploykitError, match="ranks of"):
        empty(nn.Conv2d(4, 8, 3), form, ranks)


# ------------------------------------------------------------------ tables


def whole(weight: Tensor, g: int = 1) -> np.ndarray[Any, Any]:
    """The matrix of a grouped convolution, zeros between groups."""
    f, c = weight.shape[0] // g, weight.shape[1] * weight[0, 0].numel()
    found = np.zeros((g * f, g * c))
    for i in range(g):
        found[i * f : (i + 1) * f, i * c : (i + 1) * c] = weight.detach()[i * f : (i + 1) * f].reshape(f, c)
    return found


@FEW
@given(convolutions(same=False))
def test_the_spectral_error_never_exceeds_its_certificate(layer: nn.Conv2d) -> None:
    runs: Any = {"in": 1, "mid": 1, "out": 1}
    made, shape = form_of("channel"), shape_of(layer)
    w = layer.weight.detach().double()
    for c in table(layer, "channel", runs, 1).factored:
        rest = w - made.merge(made.split(w, shape.g, c.ranks), shape.g, c.ranks)
        true = np.linalg.norm(whole(rest, shape.g), 2) / np.linalg.norm(whole(w, shape.g), 2)
        assert c.bound is not None and true <= c.bound + 1e-7
        assert c.lost == pytest.approx(float(rest.square().sum()), abs=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_what_a_table_counts_is_what_the_factors_cost(form: str) -> None:
    layer = nn.Conv2d(6, 8, (3, 2), stride=2, padding=1, bias=False)
    x = torch.randn(2, 6, 9, 12)
    runs = look(nn.Sequential(layer), {"input": x})["0"].runs
    found = table(layer, form, runs, 1)
    assert len(found.factored) >= 4
    for c in (found.whole, *found.factored):
        net = decomposed(layer, form, c.ranks) if c.ranks else layer
        counted = cost(nn.Sequential(net), {"input": x.numpy()})
        assert (c.params, c.macs, c.bytes) == (counted.params, counted.macs, counted.bytes)


def test_errors_on_data_are_those_of_the_outputs_on_that_data() -> None:
    layer = nn.Conv2d(4, 6, 3, groups=2)
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 400, 18)) @ random.normal(size=(2, 18, 18))
    d = random.uniform(0.5, 2.0, (2, 3))
    norm = Norm(torch.from_numpy(d), torch.from_numpy(x.transpose(0, 2, 1) @ x / 400))
    w = layer.weight.detach().double().numpy().reshape(2, 3, 18)
    for c in table(layer, "channel", {"in": 1, "mid": 1, "out": 1}, 1, norm=norm).factored:
        k, j = c.ranks
        expected = 0.0
        for g, i in itertools.product(range(2), range(k)):
            at = slice(i * 18 // k, (i + 1) * 18 // k)
            y = (x[g][:, at] @ w[g][:, at].T) * d[g] / 20.0  # the best of rank j: singular values of the outputs
            expected += (np.linalg.svd(y, compute_uv=False)[j:] ** 2).sum()
        assert c.lost == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert c.bound is None


@pytest.mark.parametrize("form", ["spatial", "tucker", "cp"])
def test_errors_of_other_forms_are_measured_in_the_same_norm(form: str) -> None:
    layer = nn.Conv2d(4, 5, 3)
    x = np.random.default_rng(0).normal(size=(300, 36))
    norm = Norm(torch.ones(1, 5, dtype=torch.float64), torch.from_numpy(x.T @ x / 300)[None])
    found = table(layer, form, {"in": 1, "mid": 1, "out": 1}, 1, norm=norm)
    made, w = form_of(form), layer.weight.detach().double()
    choices = [c.ranks for c in found.factored]
    for c, approximation in zip(found.factored, made.approximations(w, 1, choices), strict=True):
        rest = (w - approximation).flatten(1).numpy()
        assert c.lost == pytest.approx(float(((x @ rest.T) ** 2).sum() / 300), rel=1e-6, abs=1e-9)


def test_channels_between_factors_are_a_multiple() -> None:
    runs: Any = {"in": 1, "mid": 1, "out": 1}
    for form in FORMS:
        for c in table(nn.Conv2d(8, 12, 3), form, runs, 4).factored:
            made = empty(nn.Conv2d(8, 12, 3), form, c.ranks)
            assert all(m.out_channels % 4 == 0 for m in made)  # type: ignore[union-attr]


# ------------------------------------------------------------------ selection


def tables_of(seed: int, layers: int = 3) -> dict[str, Table]:
    """Small ones, with the error falling in cost along each k, as it does for slices."""
    random = np.random.default_rng(seed)
    found = {}
    for n in range(layers):
        made = []
        for k in (1, 2):
            errors = np.sort(random.uniform(0.1, 1.0, 4))[::-1]
            made += [
                Candidate((k, j + 1), 10 * (j + 1) + 3 * k, 0, 0, float(e), float(e), float(e))
                for j, e in enumerate(errors)
            ]
        found[f"layer{n}"] = Table(Candidate((), 60, 0, 0, 0.0, 0.0, 0.0), tuple(made))
    return found


def every(tables: dict[str, Table], budget: float) -> list[tuple[Candidate, ...]]:
    """All choices that cost at most the budget."""
    found = itertools.product(*((t.whole, *t.factored) for t in tables.values()))
    return [own for own in found if sum(c.params for c in own) <= budget]


def params(c: Candidate) -> float:
    return c.params


def worst(c: Candidate) -> float:
    return c.worst


@FEW
@given(st.integers(0, 10**6), st.floats(45.0, 180.0))
def test_equal_errors_are_the_least_largest_error_of_all_choices(seed: int, budget: float) -> None:
    tables = tables_of(seed)
    found = equal_error(tables, params, worst, budget)
    assert sum(map(params, found.values())) <= budget
    assert max(map(worst, found.values())) == min(max(map(worst, own)) for own in every(tables, budget))
    more = spent(tables, params, worst, budget, found)
    assert sum(map(params, more.values())) <= budget
    assert all(worst(more[name]) <= worst(found[name]) for name in found)


@FEW
@given(st.integers(0, 10**6), st.floats(45.0, 180.0))
def test_algorithm_1_meets_the_budget_and_never_beats_the_optimum(seed: int, budget: float) -> None:
    tables = tables_of(seed)
    found = alternate(tables, params, worst, budget, 6, 0)
    assert sum(map(params, found.values())) <= budget
    best = equal_error(tables, params, worst, budget)
    assert max(map(worst, found.values())) >= max(map(worst, best.values()))


@FEW
@given(st.integers(0, 10**6), st.floats(45.0, 180.0))
def test_the_least_sum_is_the_least_of_all_choices_that_cost_as_much(seed: int, budget: float) -> None:
    tables = tables_of(seed)
    found = least_sum(tables, params, worst, budget)
    paid = sum(map(params, found.values()))
    assert paid <= budget
    assert sum(map(worst, found.values())) == pytest.approx(min(sum(map(worst, own)) for own in every(tables, paid)))


def test_the_same_share_goes_from_every_layer() -> None:
    found = equal_ratio(tables_of(0), params, 90.0)
    assert sum(map(params, found.values())) <= 90.0
    assert {c.params for c in found.values()} <= {26, 23, 29}


def test_choices_that_save_nothing_are_left_out() -> None:
    found = saving({"a": Table(Candidate((), 15, 0, 0, 0.0, 0.0, 0.0), tables_of(0)["layer0"].factored)}, params)
    assert [c.params for c in found["a"].factored] == [13]
    assert least(found, params) == 13


@pytest.mark.parametrize("method", ["data", "weights", "alds", "equal_error", "constant", "energy", "pca", "l_rank"])
def test_every_method_meets_its_budget(method: Any) -> None:
    tables = tables_of(5)
    for budget in (45.0, 100.0, 170.0, 180.0):
        found = choose(method, params, 3, 0, tables, budget)
        assert sum(map(params, found.values())) <= budget
        assert budget < 180 or all(not c.ranks for c in found.values())


# ------------------------------------------------------------------ fitting


def distance(w: Tensor, t: Tensor, h: Tensor, d: Tensor) -> float:
    rest = d[:, None] * (w - t)
    return float(((rest @ h) * rest).sum())


def problem(seed: int, o: int = 6, n: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    draw: Callable[..., Tensor] = lambda *size: torch.randn(*size, generator=random, dtype=torch.float64)  # noqa: E731
    mix = draw(n, 2 * n)
    return draw(o, n), mix @ mix.T + 0.1 * torch.eye(n), draw(o).abs() + 0.2


def test_one_slice_is_the_best_of_its_rank_by_numpy() -> None:
    t, h, d = problem(0)
    found = sliced_to_rank(t, h, d, 1, 2)
    assert np.linalg.matrix_rank(found.numpy(), tol=1e-8) == 2
    lower = torch.linalg.cholesky(h)
    s = np.linalg.svd((d[:, None] * t @ lower).numpy(), compute_uv=False)
    assert distance(found, t, h, d) == pytest.approx((s[2:] ** 2).sum())


@pytest.mark.parametrize("k", [2, 4])
def test_slices_fitted_together_lose_less_than_each_alone_and_keep_their_rank(k: int) -> None:
    t, h, d = problem(1)
    found = sliced_to_rank(t, h, d, k, 1)
    alone = t.clone()
    for i in range(k):
        at = slice(i * 8 // k, (i + 1) * 8 // k)
        assert np.linalg.matrix_rank(found[:, at].numpy(), tol=1e-8) == 1
        alone[:, at] = sliced_to_rank(t[:, at], h[at, at], d, 1, 1)
    assert distance(found, t, h, d) < 0.95 * distance(alone, t, h, d)


def test_a_copy_of_a_decomposed_layer_remembers_its_form() -> None:
    made = copy.deepcopy(decomposed(nn.Conv2d(4, 6, 3), "channel", (2, 3)))
    assert isinstance(made, Factored) and (made.form, made.ranks, made.out_channels) == ("channel", (2, 3), 6)
