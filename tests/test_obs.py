"""Optimal brain surgeon: what a weight costs when it goes and the others make up for it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pruned import rows

from deploykit.layerwise.covariance import Covariance, damped
from deploykit.pruning.obs import Matrix, costs

FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


# --- what a weight costs


def least_error(w: NDArray[Any], h: NDArray[Any], lives: NDArray[Any]) -> float:
    """min over v with zeros outside S of (v - w) H (v - w)ᵀ, by solving for v."""
    s = np.flatnonzero(lives)
    v = np.zeros_like(w)
    v[s] = np.linalg.solve(h[np.ix_(s, s)], (h @ w)[s])
    return float((v - w) @ h @ (v - w))


def problem(seed: int, k: int) -> tuple[NDArray[Any], NDArray[Any]]:
    random = np.random.default_rng(seed)
    mix = random.standard_normal((k, 2 * k))
    return random.standard_normal(k), mix @ mix.T + 0.1 * np.eye(k)


def row(w: NDArray[Any], h: NDArray[Any], fisher: float = 1.0) -> Matrix:
    return Matrix(torch.from_numpy(w[None, None]), torch.from_numpy(h[None]), torch.full((1, 1), fisher).double())


@FEW
@given(st.integers(0, 10**6), st.integers(2, 8))
def test_weights_go_in_the_order_of_trying_all_and_cost_what_the_error_rises_by(seed: int, k: int) -> None:
    w, h = problem(seed, k)
    lives = np.random.default_rng(seed).random(k) < 0.8
    found = costs(row(w, h, 1.5), torch.from_numpy(lives[None, None]))[0, 0].numpy()
    assert np.isneginf(found[~lives]).all()
    level = 0.0
    for _ in range(int(lives.sum())):
        before = least_error(w, h, lives)
        tries = {q: least_error(w, h, lives & (np.arange(k) != q)) - before for q in np.flatnonzero(lives)}
        q = min(tries, key=tries.__getitem__)
        level = max(level, tries[q])
        assert found[q] == pytest.approx(1.5 * level, rel=1e-6, abs=1e-9)
        lives = lives & (np.arange(k) != q)


def test_of_two_inputs_that_are_the_same_one_is_taken_before_small_weights_that_stand_alone() -> None:
    """Magnitude would take the small ones."""
    x = torch.from_numpy(rows(200, 3)).double()
    x = torch.cat([x[:, :1], x[:, :1] + 1e-3 * torch.randn(200, 1).double(), x[:, 1:]], 1)[None]
    seen = Covariance()
    seen.add(x)
    w = torch.tensor([[[1.0, 1.0, 0.5, 0.5]]]).double()
    found = costs(Matrix(w, damped(seen.centred()), torch.ones(1, 1)), torch.ones(1, 1, 4).bool())
    assert int(found.argmin()) < 2


def test_where_several_go_at_once_the_error_is_about_that_of_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = problem(5, 96)
    left = []
    for at_once in (1000, 12):
        monkeypatch.setattr("deploykit.pruning.obs.AT_ONCE", at_once)
        found = costs(row(w, h), torch.ones(1, 1, 96).bool())[0, 0].numpy()
        assert np.isfinite(found).all()
        left.append(least_error(w, h, np.argsort(np.argsort(found)) >= 48))
    assert left[1] < 1.25 * left[0]


def test_a_row_whose_output_nobody_hears_goes_first() -> None:
    w, h = problem(1, 4)
    both = Matrix(torch.from_numpy(np.stack([w, w])[None]), torch.from_numpy(h[None]), torch.tensor([[0.0, 1.0]]))
    found = costs(both, torch.ones(1, 2, 4).bool())[0]
    assert float(found[0].max()) < float(found[1].min())


def test_where_two_of_four_may_go_the_best_two_others_live() -> None:
    """Of the six pairs of each four, those that the greedy order leaves lose hardly more than the best."""
    w, h = problem(2, 8)
    room = torch.arange(8) // 4
    found = costs(row(w, h), torch.ones(1, 1, 8).bool(), room, 2)[0, 0]
    lives = torch.isinf(found)
    assert lives.reshape(2, 4).sum(1).tolist() == [2, 2]
    pairs = list(itertools.combinations(range(4), 2))
    best = min(least_error(w, h, np.isin(np.arange(8), [*a, *(4 + i for i in b)])) for a in pairs for b in pairs)
    assert least_error(w, h, lives.numpy()) < 1.3 * best
