"""Are these samples enough? Ranges on growing parts of the data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from graphs import conv_relu_conv, images, measured
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.calibration.growth import Growth, convergence, drawn, parts
from deploykit.core.ranges import Ranges, Stats, load_ranges


@pytest.mark.parametrize(
    ("samples", "expected"),
    [(1, (1,)), (8, (8,)), (9, (8, 9)), (16, (8, 16)), (40, (8, 16, 32, 40)), (64, (8, 16, 32, 64))],
)
def test_parts_double_up_to_all_samples(samples: int, expected: tuple[int, ...]) -> None:
    assert parts(samples) == expected


def test_parts_are_drawn_at_random_so_that_sorted_folders_do_not_matter() -> None:
    order = drawn(100)
    assert sorted(order) == list(range(100))
    assert order[:8].max() > 50  # of classes at the end, too


@given(st.integers(1, 70), st.integers(1, 4), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_every_part_has_the_extremes_of_its_own_samples(samples: int, tensors: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=(samples, tensors, 5))
    growth = Growth(samples)
    for i, sample in enumerate(values):
        growth.add(i, {f"t{t}": (sample[t].min(), sample[t].max()) for t in range(tensors)})
    for t in range(tensors):
        expected = [
            (values[drawn(samples)[:m], t].min(), values[drawn(samples)[:m], t].max()) for m in growth.parts
        ]  # fmt: skip
        assert growth.of(f"t{t}") == tuple(expected)


def test_calibration_keeps_how_ranges_grew_and_the_file_gives_it_back(tmp_path) -> None:
    ranges = measured(conv_relu_conv(), images(40))
    assert ranges.parts == (8, 16, 32, 40)
    for stats in ranges.tensors.values():
        assert stats.growth[-1] == (stats.low, stats.high)
        assert all(a[0] >= b[0] and a[1] <= b[1] for a, b in zip(stats.growth, stats.growth[1:], strict=False))
    ranges.save(tmp_path / "r.json")
    assert load_ranges(tmp_path / "r.json").to_dict() == ranges.to_dict()


def test_a_part_is_calibrated_as_if_there_were_no_other_samples() -> None:
    made, data = conv_relu_conv(), images(20)
    alone = measured(made, data.pick(drawn(20)[:16]))
    for name, stats in measured(made, data).tensors.items():
        assert stats.growth[1] == (alone.tensors[name].low, alone.tensors[name].high)


def told(*widths: tuple[float, ...]) -> Ranges:
    """Ranges [0, w] of one tensor per row, on parts of 8, 16, 32 … samples."""
    sizes = tuple(8 << i for i in range(len(widths[0])))
    tensors = {f"t{i}": Stats(0, w[-1], 0, w[-1], None, tuple((0.0, x) for x in w)) for i, w in enumerate(widths)}
    return Ranges("g", "d", sizes[-1], tensors, {}, sizes)


def test_ranges_that_stand_still_are_enough_from_the_first_part_on() -> None:
    found = convergence(told((0.9, 0.99, 0.995, 1.0), (1.0, 1.0, 1.0, 1.0)))
    assert found is not None and found.enough == 16
    assert found.sentence() == "enough samples: from 16 on no range moves by more than 2 %"


def test_one_range_that_still_grows_is_named_with_how_much() -> None:
    found = convergence(told((0.9, 0.99, 0.995, 1.0), (0.2, 0.4, 0.8, 1.0)))
    assert found is not None and found.enough is None
    assert found.sentence() == (
        "ranges still grow: between 32 and 64 samples 1 of 2 widened by more than 2 %, that of 't1' the most, "
        "by 20 % of it"
    )


def test_the_last_half_must_stand_still_to_know_anything() -> None:
    found = convergence(told((0.5, 1.0)))  # the second half moved
    assert found is not None and found.enough is None
    few = convergence(replace(told((0.9, 1.0)), parts=(8, 9)))
    assert few is not None and few.sentence() == ""


def test_older_files_without_growth_do_not_tell() -> None:
    assert convergence(Ranges("g", "d", 4, {"x": Stats(0, 1, 0, 1)})) is None


def test_negative_and_positive_ends_both_count_and_zero_belongs_to_every_range() -> None:
    stats = Stats(2.0, 4.0, 2.0, 4.0, None, ((3.0, 4.0), (2.0, 4.0)))  # above zero: only the upper end sets the scale
    found = convergence(Ranges("g", "d", 16, {"x": stats}, {}, (8, 16)))
    assert found is not None and found.missing["x"] == (0.0, 0.0)
