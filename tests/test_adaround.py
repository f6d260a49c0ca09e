"""Adaptive rounding: its formulae, its objective, and the pass."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from graphs import images, residual
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_refit import context, hub_of, noise, none, problems, stored

from deploykit.core.errors import DeploykitError
from deploykit.core.target import QuantSpec
from deploykit.hub.fitting.rounding import error, nearest, searched_scale, widest
from deploykit.hub.fitting.soft_rounding import (
    adaround,
    behind,
    pressure,
    rectified_sigmoid,
    roundings,
    undecided,
)
from deploykit.passes.adaround import Adaround
from deploykit.passes.bias_correct import BiasCorrect

SPEC = QuantSpec()
FEW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def loss(q: NDArray[Any], s: NDArray[Any], w: NDArray[Any], h: NDArray[Any]) -> float:
    """E|Wx - W̃x|² as the paper writes it, one output after another."""
    d = q * s[:, :, None] - w
    return float(sum(row @ h[g] @ row for g in range(len(d)) for row in d[g]))


def test_a_soft_rounding_reaches_zero_and_one_and_can_be_set() -> None:
    """Nagel et al. 2020, equation 23: clip(sigmoid(V) (1.1 - -0.1) - 0.1, 0, 1)."""
    v = torch.tensor([-30.0, 0.0, 1.0, 30.0])
    by_hand = [0.0, 0.5, 1.2 / (1 + np.exp(-1)) - 0.1, 1.0]
    np.testing.assert_allclose(rectified_sigmoid(v), by_hand, atol=1e-6)
    h = torch.linspace(0, 1, 9)
    np.testing.assert_allclose(rectified_sigmoid(behind(h)), h, atol=1e-6)


def test_the_penalty_is_greatest_half_way_and_its_weight_grows_to_its_last_value() -> None:
    np.testing.assert_allclose(undecided(torch.tensor([0.0, 0.25, 0.5, 1.0])), [0, 0.75, 1, 0])
    assert pressure(0, 10) == pytest.approx(0.01) and pressure(10, 10) == pytest.approx(30)
    assert all(pressure(i, 10) < pressure(i + 1, 10) for i in range(10))


@FEW
@given(problems(), st.sampled_from([2, 3, 4, 8]), st.sampled_from(["channel", "tensor"]))
def test_it_never_loses_more_than_rounding_to_nearest_on_its_own_objective(
    problem: tuple[NDArray[Any], NDArray[Any]], bits: int, granularity: Any
) -> None:
    w, h = problem
    spec = QuantSpec(weight_bits=bits, weight_granularity=granularity)
    q, s = adaround(w, h, none(w), spec, steps=40)
    start = searched_scale(w, h, none(w), spec)
    assert loss(q, s, w, h) <= loss(nearest(w, start, spec.weight_max), start, w, h) + 1e-9
    assert np.abs(q).max() <= spec.weight_max and np.array_equal(q, np.rint(q))
    assert granularity == "channel" or len(np.unique(s)) == 1


def test_where_inputs_go_together_what_is_learned_is_often_the_best_of_all_roundings() -> None:
    """Of 256 ways to round eight weights, all tried. Rounding to nearest lets errors of one sign add up."""
    ups = np.array(list(itertools.product((0.0, 1.0), repeat=8)))[None]
    found, plain, best = [], [], []
    for seed in range(8):
        random = np.random.default_rng(seed)
        w, mix, together = (random.standard_normal(shape) for shape in ((1, 1, 8), (1, 8, 32), (1, 8, 1)))
        together = 1 + 0.3 * together
        h = mix @ mix.swapaxes(1, 2) / 32 + 4 * together @ together.swapaxes(1, 2)
        s = widest(w, none(w), QuantSpec(weight_bits=4))
        cost = error(nearest(w, s, 7), s, w, h)
        up = roundings(w, h, s, cost, 7, 300)
        assert set(np.unique(up)) <= {0.0, 1.0}
        down = np.floor(w / s[:, :, None])
        best.append(error(np.clip(down + ups, -7, 7), np.full((1, 256), s.item()), w, h).min())
        found.append(error(np.clip(down + up, -7, 7), s, w, h).item())
        plain.append(cost.item())
    assert sum(f <= b * 1.001 for f, b in zip(found, best, strict=True)) >= 3
    assert sum(found) < 0.4 * sum(plain)


# --- the pass


def test_on_data_never_seen_it_answers_better_than_corrected_biases() -> None:
    made, data = residual(), images(64)
    hub, unseen = hub_of(made, data, replace(SPEC, weight_bits=3)), images(64, seed=77)
    assert noise(Adaround()(hub, context(data)), unseen) < 0.8 * noise(BiasCorrect()(hub, context(data)), unseen)


def test_the_same_seed_gives_the_same_integers() -> None:
    made, data = residual(), images(16)
    hub = hub_of(made, data, replace(SPEC, weight_bits=4))
    first, second = (stored(Adaround(steps=20)(hub, context(data))) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_too_few_samples_and_steps_that_learn_nothing_are_refused() -> None:
    made, data = residual(), images(7)
    with pytest.raises(DeploykitError, match="at least 8 calibration samples; there are 7"):
        Adaround()(hub_of(made, data), context(data))
    with pytest.raises(ValueError, match="1 or more"):
        Adaround(steps=0)
