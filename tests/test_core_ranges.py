from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploykit.core.errors import DeploykitError
from deploykit.core.ranges import Histogram, Ranges, Stats, load_ranges

numbers = st.floats(allow_nan=False, allow_infinity=False)
counts = st.lists(st.integers(0, 2**62), max_size=4).map(lambda c: np.asarray(c, np.int64))
stats = st.builds(
    Stats, numbers, numbers, numbers, numbers,
    st.none() | st.builds(Histogram, numbers, counts),
)  # fmt: skip


means = st.dictionaries(st.text(), st.lists(numbers, max_size=4).map(lambda m: np.asarray(m, np.float64)), max_size=3)
named = st.dictionaries(st.text(), stats, max_size=3)


@given(st.builds(Ranges, st.text(), st.text(), st.integers(0, 10**9), named, means))
def test_ranges_come_back_exactly(tmp_path_factory: pytest.TempPathFactory, ranges: Ranges) -> None:
    file = tmp_path_factory.mktemp("r") / "ranges.json"
    ranges.save(file)
    again = load_ranges(file)
    assert again.to_dict() == ranges.to_dict() and again.has_histograms == ranges.has_histograms
    for s in again.tensors.values():
        assert s.histogram is None or s.histogram.counts.dtype == np.int64


def one(histogram: bool) -> Stats:
    return Stats(-1, 1, -1, 1, Histogram(1.0, np.ones(4, np.int64)) if histogram else None)


def test_thresholds_need_a_histogram_of_every_tensor() -> None:
    assert Ranges("g", "d", 1, {"a": one(True), "b": one(True)}).has_histograms
    assert not Ranges("g", "d", 1, {"a": one(True), "b": one(False)}).has_histograms


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is not a ranges file"),
        ("{", "is not a ranges file"),
        ("[]", "is not a ranges file"),
        ('{"graph": "g"}', "is not a ranges file"),
        (json.dumps({**Ranges("g", "d", 1).to_dict(), "format": "deploykit-ranges-9"}), "deploykit-ranges-9"),
        (json.dumps(Ranges("g", "d", 1, {"a": one(True)}).to_dict())[:-20], "is not a ranges file"),
    ],
)
def test_files_that_are_no_ranges_are_named(tmp_path: Path, content: str, expected: str) -> None:
    file = tmp_path / "r.json"
    file.write_text(content)
    with pytest.raises(DeploykitError) as error:
        load_ranges(file)
    assert expected in str(error.value) and "r.json" in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeploykitError, match=r"no file .*r\.json"):
        load_ranges(tmp_path / "r.json")
