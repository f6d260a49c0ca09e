from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploykit.core.data import DataSet, Preprocess
from deploykit.core.errors import DeploykitError

X = np.arange(30, dtype=np.float32).reshape(10, 3)


def numbered() -> DataSet:
    return DataSet.of({"x": X}, np.arange(10))


@given(st.integers(1, 12), st.permutations(range(10)))
def test_batches_hold_every_sample_once_in_the_order_asked_for(size: int, order: list[int]) -> None:
    batches = list(numbered().batches(size, np.asarray(order)))
    assert all(len(b.inputs["x"]) == size for b in batches[:-1])
    np.testing.assert_array_equal(np.concatenate([b.inputs["x"] for b in batches]), X[order])
    assert np.concatenate([b.labels for b in batches if b.labels is not None]).tolist() == order


@given(st.integers(0, 10), st.integers(0, 10))
def test_a_part_has_its_own_samples_and_labels(start: int, stop: int) -> None:
    part = numbered().take(slice(start, stop))
    assert list(part.index) == list(range(10))[start:stop]
    assert part.labels is not None and part.labels.tolist() == list(part.index)


@given(st.integers(1, 20))
def test_a_spread_is_ordered_distinct_and_reaches_both_ends(count: int) -> None:
    chosen = numbered().spread(count)
    assert len(chosen) == min(count, 10) == len(set(chosen.index)) and list(chosen.index) == sorted(chosen.index)
    assert chosen.index[0] == 0 and (count == 1 or chosen.index[-1] == 9)
    assert chosen.labels is not None and chosen.labels.tolist() == list(chosen.index)


def test_samples_are_made_when_they_are_asked_for() -> None:
    made: list[int] = []

    def sample(i: int) -> dict[str, Any]:
        made.append(i)
        return {"x": X[i]}

    batches = DataSet(sample, tuple(range(10))).batches(4)
    next(batches)
    assert made == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "other",
    [
        DataSet.of({"x": X + 1}, np.arange(10)),
        DataSet.of({"y": X}, np.arange(10)),
        DataSet.of({"x": X.astype(np.float64)}, np.arange(10)),
        DataSet.of({"x": X.reshape(10, 3, 1)}, np.arange(10)),
        DataSet.of({"x": X}, np.arange(10)[::-1]),
        DataSet.of({"x": X}),
        DataSet.of({"x": X, "z": X}, np.arange(10)),
        numbered().take(slice(1, None)),
    ],
)
def test_whatever_differs_changes_the_hash(other: DataSet) -> None:
    assert other.hash != numbered().hash and len(other.hash) == 16


def test_equal_content_has_an_equal_hash_however_it_lies_in_memory() -> None:
    assert DataSet.of({"x": np.asfortranarray(X)}, np.arange(10), "elsewhere").hash == numbered().hash
    both = DataSet.of({"a": X, "b": X})
    assert both.hash == DataSet.of({"b": X, "a": X}).hash


@pytest.mark.parametrize(
    ("inputs", "labels", "expected"),
    [
        ({}, None, "same length"),
        ({"x": X, "z": X[:3]}, None, "given {'x': 10, 'z': 3}"),
        ({"x": X}, np.arange(9), "'labels': 9"),
        ({"x": X[:0]}, None, "not a single sample"),
    ],
)
def test_arrays_that_make_no_data_set_are_refused(inputs: Any, labels: Any, expected: str) -> None:
    with pytest.raises(DeploykitError) as error:
        DataSet.of(inputs, labels, "here")
    assert expected in str(error.value) and "here" in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "CHW"}, {"channels": "RGBA"}, {"std": (1.0, 0.0, 1.0)}, {"std": (float("nan"),)},
        {"mean": (1.0, 2.0)}, {"channels": "L", "mean": (1.0, 2.0, 3.0)}, {"resize": 0}, {"crop": (3, -1)},
    ],
)  # fmt: skip
def test_preprocessing_that_cannot_be_applied_is_refused(options: Any) -> None:
    with pytest.raises(ValueError):
        Preprocess(**options)
