from __future__ import annotations

import numpy as np
import pytest

from deploykit.calibration.observe import StreamingHistogram
from deploykit.calibration.thresholds import METHODS, threshold
from deploykit.core.errors import DeploykitError
from deploykit.core.ranges import Histogram, Stats


def stats_of(values: np.ndarray) -> Stats:
    histogram = StreamingHistogram(2048)
    histogram.add(values.astype(np.float32), float(values.min()), float(values.max()))
    return Stats(
        float(values.min()), float(values.max()), float(values.min()), float(values.max()),
        Histogram(histogram.limit, histogram.counts),
    )  # fmt: skip


def squared_error(values: np.ndarray, low: float, high: float, steps: int) -> float:
    """Of rounding to the grid that (low, high) gives: computed on the values themselves, not on a histogram."""
    scale = (high - low) / steps
    zero = round(-low / scale)
    rounded = (np.clip(np.rint(values / scale) + zero, 0, steps) - zero) * scale
    return float(((values - rounded) ** 2).mean())


NORMAL = np.random.default_rng(0).normal(size=20_000)
WITH_OUTLIER = np.concatenate([NORMAL, [60.0]])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_stays_within_what_was_seen(method) -> None:
    low, high = threshold(stats_of(WITH_OUTLIER), method, 255, False)
    assert WITH_OUTLIER.min() - 1e-6 <= low < 0 < high <= 60.0


def test_minmax_covers_everything() -> None:
    assert threshold(stats_of(WITH_OUTLIER), "minmax", 255, False) == (WITH_OUTLIER.min(), 60.0)


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_one_outlier_does_not_set_the_range(method) -> None:
    _, high = threshold(stats_of(WITH_OUTLIER), method, 15, False)
    assert high < 40


@pytest.mark.parametrize("steps", [15, 255])
def test_mse_is_no_worse_than_minmax_on_the_values_themselves(steps) -> None:
    chosen = threshold(stats_of(WITH_OUTLIER), "mse", steps, True)
    everything = (-60.0, 60.0)
    assert squared_error(WITH_OUTLIER, *chosen, steps) <= squared_error(WITH_OUTLIER, *everything, steps) * 1.02


def test_mse_finds_the_known_optimum_for_a_normal_distribution_at_four_bits() -> None:
    """Uniform 16-level quantizer of a unit normal: step 0.3352 (Max 1960, table II), so the range is about +-2.5."""
    low, high = threshold(stats_of(np.random.default_rng(1).normal(size=200_000)), "mse", 15, True)
    assert (high - low) / 15 == pytest.approx(0.3352, rel=0.07)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_entropy_is_not_led_astray_by_the_peak_that_a_relu_leaves_at_zero(share) -> None:
    values = np.clip(np.random.default_rng(3).exponential(1.5, 200_000), 0, 6)
    values[: int(share * len(values))] = 0.0
    low, high = threshold(stats_of(values), "entropy", 255, False)
    assert low == 0.0
    assert high > 4.8


def test_percentile_cuts_the_given_share_on_each_side() -> None:
    values = np.random.default_rng(2).uniform(-1, 1, 100_000)
    values[:3] = 8.0
    _, high = threshold(stats_of(values), "percentile", 255, False)
    assert high == pytest.approx(1.0, abs=0.01)


def test_symmetric_ranges_are_symmetric() -> None:
    low, high = threshold(stats_of(WITH_OUTLIER), "mse", 255, True)
    assert low == -high


def test_a_histogram_method_without_histograms_says_so() -> None:
    with pytest.raises(DeploykitError, match="no histograms"):
        threshold(Stats(0.0, 1.0, 0.0, 1.0), "mse", 255, False)


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(DeploykitError, match="Did you mean 'minmax'"):
        threshold(Stats(0.0, 1.0, 0.0, 1.0), "minmx", 255, False)


def test_entropy_keeps_values_that_lie_far_from_zero() -> None:
    values = np.concatenate([np.zeros(5000), np.random.default_rng(4).uniform(0.6, 1.0, 5000)])
    assert threshold(stats_of(values), "entropy", 255, False)[1] > 0.9
