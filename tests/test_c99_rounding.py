"""The two rounding rules: worked by hand, against exact arithmetic with Python's integers, and C against numpy."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.exporters.c99.rounding import (
    Rescale,
    Rounding,
    apply,
    divide,
    folded_half,
    mean_rescaling,
    quantize_multiplier,
    rescaling,
)

DEVICE = Path(__file__).parents[1] / "exporters" / "c99" / "device"
few = settings(max_examples=200, deadline=None, derandomize=True, database=None)
sums = st.integers(-(2**24), 2**24)
factors = st.floats(2.0**-20, 4.0)


def test_a_factor_of_three_quarters_is_three_times_two_to_the_29() -> None:
    assert quantize_multiplier(0.75) == (3 * 2**29, 0)
    assert quantize_multiplier(0.375) == (3 * 2**29, 1)
    assert quantize_multiplier(1.5) == (3 * 2**29, -1)
    assert quantize_multiplier(2.0**-40) == (0, 0)


@pytest.mark.parametrize(
    ("total", "factor", "expected"),
    [
        (100, 0.75, 75),
        (3, 0.5, 2),  # 1.5: shift 0, rounded at bit 31, half up
        (-3, 0.5, -1),  # -1.5, half up
        (6, 0.25, 2),  # 6 * 0.5 = 3 exactly, then 3 / 2 = 1.5, away from zero
        (-6, 0.25, -2),  # -1.5, away from zero
        (5, 0.25, 2),  # 1.25: 5 * 0.5 = 2.5 becomes 3, and 3 / 2 = 1.5 becomes 2. Rounded twice, as TFLM does
    ],
)
def test_double_rounding_by_hand(total: int, factor: float, expected: int) -> None:
    assert apply(np.array([total]), rescaling(factor, "tflm_double"), "tflm_double") == expected


def gemmlowp(x: int, multiplier: int, shift: int) -> int:
    """SaturatingRoundingDoublingHighMul and RoundingDivideByPOT as gemmlowp's fixedpoint.h spells them."""
    product = (x << max(-shift, 0)) * multiplier
    nudge = 2**30 if product >= 0 else 1 - 2**30
    high = abs(product + nudge) // 2**31 * (1 if product + nudge >= 0 else -1)  # C's division truncates
    exponent = max(shift, 0)
    mask = 2**exponent - 1
    remainder, threshold = high & mask, (mask >> 1) + (1 if high < 0 else 0)
    return (high >> exponent) + (1 if remainder > threshold else 0)


@few
@given(x=sums, factor=factors)
def test_double_rounding_is_gemmlowp_s(x: int, factor: float) -> None:
    made = rescaling(factor, "tflm_double")
    assert made.multiplier is not None
    expected = gemmlowp(x, int(made.multiplier[0]), int(made.shift[0]))
    assert apply(np.array([x]), made, "tflm_double") == expected
    assert abs(expected - x * factor) <= 1.0 + abs(x * factor) * 2**-30


@few
@given(x=sums, shift=st.integers(-3, 16))
def test_a_folded_half_and_a_floor_round_half_up(x: int, shift: int) -> None:
    made = rescaling(2.0**-shift, "floor_folded_half")
    half = int(folded_half(made, "floor_folded_half")[0])
    found = apply(np.array([x + half]), made, "floor_folded_half")
    assert found == math.floor(Fraction(x) / Fraction(2) ** shift + Fraction(1, 2))


def test_only_powers_of_two_can_be_shifted() -> None:
    with pytest.raises(ValueError, match="powers of two"):
        rescaling(0.3, "floor_folded_half")


@few
@given(count=st.integers(1, 5000), share=st.floats(-1, 1), exponent=st.integers(-3, 3))
def test_a_power_of_two_mean_is_rounded_half_up_for_any_count(count: int, share: float, exponent: int) -> None:
    made = mean_rescaling(2.0**exponent, count, "floor_folded_half")
    total = round(share * 255 * count)
    half = int(folded_half(made, "floor_folded_half")[0])
    found = int(apply(np.array([total + half]), made, "floor_folded_half")[0])
    exact = Fraction(total) * Fraction(2) ** exponent / count
    # the multiplier has 31 bits: only what lies within 2^-20 of a tie may go the other way
    assert abs(found - exact) <= Fraction(1, 2) + Fraction(1, 2**20)


@pytest.mark.parametrize(("count", "factor"), [(49, 1.0), (49, 0.37), (64, 0.37), (7, 1.9)])
def test_tflm_folds_the_count_of_a_mean_into_the_multiplier(count: int, factor: float) -> None:
    made, whole = mean_rescaling(factor, count, "tflm_double"), rescaling(factor, "tflm_double")
    assert made.multiplier is not None and whole.multiplier is not None
    up = int(made.shift[0]) - int(whole.shift[0])
    assert up == count.bit_length() - 1
    assert int(made.multiplier[0]) == int(whole.multiplier[0]) * 2**up // count


def test_pools_divide_halves_away_from_zero_or_up() -> None:
    total, count = np.array([5, -5, 7, -7, 6]), np.array([2, 2, 4, 4, 4])
    assert divide(total, count, "tflm_double").tolist() == [3, -3, 2, -2, 2]
    assert divide(total, count, "floor_folded_half").tolist() == [3, -2, 2, -2, 2]


HARNESS = """
#include "dk_rescale.h"
void rescale(int32_t n, const int32_t *x, const int32_t *m, const int8_t *s, int32_t *y);
void rescale(int32_t n, const int32_t *x, const int32_t *m, const int8_t *s, int32_t *y)
{
    const dk_rescale_t r = {m, s};
    for (int32_t i = 0; i < n; i++) y[i] = dk_rescale(x[i], &r, i);
}
void divide(int32_t n, const int32_t *x, const int32_t *c, int32_t *y);
void divide(int32_t n, const int32_t *x, const int32_t *c, int32_t *y)
{
    for (int32_t i = 0; i < n; i++) y[i] = dk_divide(x[i], c[i]);
}
"""


@pytest.mark.parametrize("rule", ["tflm_double", "floor_folded_half"])
def test_c_rounds_as_numpy_does(rule: Rounding, tmp_path: Path) -> None:
    cc = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if cc is None:
        pytest.skip("no C compiler: the C side of the rounding rules is not run here")
    shutil.copy(DEVICE / f"dk_rescale_{rule}.h", tmp_path / "dk_rescale.h")
    (tmp_path / "harness.c").write_text(HARNESS)
    library = tmp_path / "harness.so"
    command = [cc, "-std=c99", "-O2", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-fPIC", "-shared"]
    subprocess.run([*command, f"-I{DEVICE}", "-o", library, tmp_path / "harness.c"], check=True)
    c = ctypes.CDLL(str(library))
    random = np.random.default_rng(0)
    n = 20_000
    x = random.integers(-(2**24), 2**24, n).astype(np.int32)
    x[:2000] = random.integers(-64, 64, 2000)  # ties
    if rule == "tflm_double":
        made = rescaling(2.0 ** random.uniform(-20, 4, n), rule)
    else:
        made = rescaling(2.0 ** random.integers(-20, 4, n).astype(float), rule)
    y = np.empty(n, np.int32)

    def pointer(array: np.ndarray) -> ctypes.c_void_p | None:
        return None if array is None else array.ctypes.data_as(ctypes.c_void_p)

    c.rescale(n, pointer(x), pointer(made.multiplier), pointer(made.shift), pointer(y))
    np.testing.assert_array_equal(y, apply(x, made, rule))
    counts = random.integers(1, 65, n).astype(np.int32)
    c.divide(n, pointer(x), pointer(counts), pointer(y))
    np.testing.assert_array_equal(y, divide(x.astype(np.int64), counts.astype(np.int64), rule))
    means = Rescale(np.full(n, 2**30 + 12345, np.int32), random.integers(1, 8, n).astype(np.int8))
    c.rescale(n, pointer(x), pointer(means.multiplier), pointer(means.shift), pointer(y))
    np.testing.assert_array_equal(y, apply(x, means, rule))
