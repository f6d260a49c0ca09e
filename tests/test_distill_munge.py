"""MUNGE: what is made of pairs of samples stays between them, as Bucila et al. 2006, figure 2, say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.distillation.munge import Attributes, munge, neighbours, traded


def table(n: int = 40, seed: int = 0) -> NDArray[np.float32]:
    """Two measured columns, a flag and a code of five."""
    random = np.random.default_rng(seed)
    measured = random.standard_normal((n, 2)) * [1, 100]
    return np.column_stack([measured, random.integers(0, 2, n), random.integers(0, 5, n)]).astype(np.float32)


def munged(x: NDArray[np.float32], **options: float) -> NDArray[np.float32]:
    given = {"k": 1, "p": 0.5, "s": 1.0, "seed": 0} | options
    found = munge(DataSet.of({"x": x}), **given)  # type: ignore[arg-type]
    return next(found.batches(len(found))).inputs["x"]


def test_the_samples_stay_and_k_times_as_many_come_along_without_labels() -> None:
    x = table()
    found = munge(DataSet.of({"x": x}, np.zeros(40, np.int64)), k=3, p=0.5, s=1.0, seed=0)
    assert len(found) == 160 and found.labels is None
    arrays = next(found.batches(160)).inputs["x"]
    np.testing.assert_array_equal(arrays[:40], x)
    assert arrays.dtype == x.dtype and not np.array_equal(arrays[40:80], arrays[80:120])


def test_the_nearest_is_the_nearest_of_scaled_columns() -> None:
    x = table(60, seed=3)
    wide = np.ptp(x[:, :2], axis=0)
    expected = []
    for i in range(60):
        distance = (((x[:, :2] - x[i, :2]) / wide) ** 2).sum(1) + (x[:, 2:] != x[i, 2:]).sum(1)
        distance[i] = np.inf
        expected.append(int(distance.argmin()))
    assert neighbours([Attributes.of(x)]).tolist() == expected


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), p=st.floats(0.05, 1.0), n=st.integers(2, 30))
def test_categories_are_traded_and_none_is_made_up(seed: int, p: float, n: int) -> None:
    x = table(n, seed)
    made = munged(x, p=p, seed=seed)[n:]
    for column in (2, 3):  # a trade moves values about: in the whole column they stay what they were
        assert sorted(made[:, column]) == sorted(x[:, column])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), p=st.floats(0.05, 1.0))
def test_with_a_large_s_continuous_values_are_traded_too(seed: int, p: float) -> None:
    x = table(20, seed)
    made = munged(x, p=p, s=1e9, seed=seed)[20:]
    for column in range(4):
        np.testing.assert_allclose(np.sort(made[:, column]), np.sort(x[:, column]), rtol=1e-4, atol=1e-5)


def test_what_both_have_neither_loses() -> None:
    x = np.random.default_rng(0).random((10, 1, 4, 4)).astype(np.float32)
    x[:, :, 0] = 0.25  # the border of an image
    assert (munged(x, k=5, p=1.0)[:, :, 0] == 0.25).all()


def test_a_continuous_value_is_drawn_around_the_neighbours() -> None:
    """e_a ~ N(e'_a, |e_a - e'_a| / s) and the other way round, for a pair traded once."""
    pair = np.repeat(np.float64([[[0.5], [2.5]]]), 20000, axis=2).reshape(2, -1)
    attributes = [Attributes(pair, np.zeros(20000, bool), np.ones(20000, np.float32))]
    (made,) = traded(attributes, np.array([1]), 1.0, 4.0, np.random.default_rng(0))  # sample 0 trades with sample 1
    for row, mean in zip(made, (2.5, 0.5), strict=True):
        assert row.mean() == pytest.approx(mean, abs=0.02) and row.std() == pytest.approx(2.0 / 4, rel=0.03)


def test_an_attribute_is_traded_with_probability_p() -> None:
    pair = np.float64([np.zeros(20000), np.ones(20000)])
    attributes = [Attributes(pair, np.ones(20000, bool), np.ones(20000, np.float32))]
    (made,) = traded(attributes, np.array([1]), 0.3, 1.0, np.random.default_rng(0))
    assert made[0].mean() == pytest.approx(0.3, abs=0.02) and (made[0] + made[1] == 1).all()


def test_integers_are_categories_whatever_their_shape() -> None:
    tokens = np.random.default_rng(0).integers(0, 9, (12, 5))
    found = next(munge(DataSet.of({"ids": tokens}), k=4, p=1.0, s=1.0, seed=0).batches(60)).inputs["ids"]
    assert found.dtype == tokens.dtype and all(set(found[:, c]) <= set(tokens[:, c]) for c in range(5))


def test_the_same_seed_makes_the_same_samples() -> None:
    x = table()
    np.testing.assert_array_equal(munged(x, seed=4), munged(x, seed=4))
    assert not np.array_equal(munged(x, seed=4), munged(x, seed=5))


def test_a_sample_alone_has_nobody_to_trade_with() -> None:
    with pytest.raises(DeploykitError, match="munge trades attributes between samples"):
        munged(table(1))
