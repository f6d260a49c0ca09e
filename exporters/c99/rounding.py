"""Rescaling integers by a real factor with integers only: the two rules of this exporter, in numpy.

``tflm_double``
    TensorFlow Lite Micro's, and CMSIS-NN's by default (gemmlowp, "Building a quantization paradigm from first
    principles"): the factor is ``multiplier * 2^-31 * 2^-shift`` with a 31-bit multiplier in [1/2, 1). The product is
    rounded at bit 31 (half up), and what is left is rounded once more, at bit ``shift`` (half away from zero).

``floor_folded_half``
    The factor is ``2^-shift``: the scales are powers of two. ``2^(shift-1)`` is added to the bias beforehand, and an
    arithmetic shift drops the rest: round half up, for the price of nothing in logic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Rounding = Literal["tflm_double", "floor_folded_half"]

LARGEST_SHIFT = 31

MAX_MISMATCH: Mapping[Rounding, float] = {"tflm_double": 10.0, "floor_folded_half": 0.0}
"""Percent of a product's outputs that may be one step off the hub, ties aside.

Two roundings are off by a quarter of a step behind a shift of one or two bits, which channels with almost no weights
have: 4.2 % seen on trained networks, one dead channel of 24. It is why the files agree with TFLM bit for bit, and with
the hub to one step. One shift is exact: half up differs from half to even on ties themselves and nowhere else, and no
other difference was seen on the 23 families of networks in the tests that lower."""


@dataclass(frozen=True, eq=False)
class Rescale:
    """Factors, one per channel or one in all: ``multiplier * 2^-31 * 2^-shift``, or ``2^-shift`` without multiplier.

    Shifts go to the right; a negative one goes to the left.
    """

    multiplier: NDArray[np.int32] | None
    shift: NDArray[np.int8]


def rescaling(factors: NDArray[Any] | float, rounding: Rounding) -> Rescale:
    """The integer form of real factors (float64, any number of them).

    Raises:
        ValueError: under ``floor_folded_half`` a factor is no power of two; or it is beyond 2^31.
    """
    real = np.atleast_1d(np.asarray(factors, np.float64))
    if rounding == "floor_folded_half":
        exponents = np.log2(real)
        if not np.array_equal(exponents, np.rint(exponents)) or np.abs(exponents).max() > LARGEST_SHIFT:
            raise ValueError(f"factors must be powers of two between 2^-31 and 2^31; given {real}")
        return Rescale(None, (-exponents).astype(np.int8))
    pairs = [quantize_multiplier(float(factor)) for factor in real]
    if min(shift for _, shift in pairs) < -LARGEST_SHIFT:
        raise ValueError(f"factors must be below 2^31; given {real.max()}")
    return Rescale(np.array([m for m, _ in pairs], np.int32), np.array([s for _, s in pairs], np.int8))


def quantize_multiplier(factor: float) -> tuple[int, int]:
    """TFLM's QuantizeMultiplier: ``factor`` as (multiplier, right shift), multiplier in [2^30, 2^31); 0 if tiny."""
    fraction, exponent = math.frexp(factor)
    multiplier = math.floor(fraction * 2**31 + 0.5)
    if multiplier == 2**31:
        multiplier, exponent = 2**30, exponent + 1
    return (0, 0) if exponent < -LARGEST_SHIFT else (multiplier, -exponent)


def mean_rescaling(factor: float, count: int, rounding: Rounding) -> Rescale:
    """The integer form of ``factor / count``.

    TFLM (reduce.h, QuantizedMeanOrSum) divides the multiplier of ``factor`` by the count instead, after shifting it up
    as far as the count is long.
    """
    if rounding == "floor_folded_half":
        if count & (count - 1) == 0:
            return rescaling(factor / count, rounding)
        multiplier, shift = quantize_multiplier(factor / count)
        return Rescale(np.array([multiplier], np.int32), np.array([shift], np.int8))
    multiplier, shift = quantize_multiplier(factor)
    up = min(count.bit_length() - 1, 32, LARGEST_SHIFT - shift)
    return Rescale(np.array([(multiplier << up) // count], np.int32), np.array([shift + up], np.int8))


def folded_half(rescale: Rescale, rounding: Rounding) -> NDArray[np.int64]:
    """What has to be added before a pure shift, per factor; 0 where rescaling rounds by itself."""
    if rounding == "tflm_double" or rescale.multiplier is not None:
        return np.zeros(rescale.shift.shape, np.int64)
    shift = rescale.shift.astype(np.int64)
    return np.where(shift > 0, np.int64(1) << np.maximum(shift - 1, 0), 0)


def apply(x: NDArray[Any], rescale: Rescale, rounding: Rounding) -> NDArray[np.int64]:
    """Integers ``[..., c]`` (or any, where there is one factor), rescaled."""
    wide = np.asarray(x, np.int64)
    shift = rescale.shift.astype(np.int64)
    if rescale.multiplier is None:
        return (wide << np.maximum(-shift, 0)) >> np.maximum(shift, 0)
    if rounding == "floor_folded_half":
        down = shift + 31
        return (wide * rescale.multiplier + (np.int64(1) << (down - 1))) >> down
    left, right = np.maximum(-shift, 0), np.maximum(shift, 0)
    high = wide << left  # SaturatingRoundingDoublingHighMul
    high *= rescale.multiplier
    high += 1 << 30
    high >>= 31
    half = (np.int64(1) << right) >> 1  # RoundingDivideByPOT
    high += half - ((high < 0) & (right > 0))
    return high >> right


def divide(total: NDArray[Any], count: NDArray[Any], rounding: Rounding) -> NDArray[np.int64]:
    """total / count: halves away from zero as TFLM's pools do, or half up."""
    found: NDArray[np.int64] = (total + count // 2) // count
    if rounding == "tflm_double":
        found = np.sign(total) * ((np.abs(total) + count // 2) // count)
    return found
