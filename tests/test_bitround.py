"""Bit rounding: against fractions, and in files."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graphs import graph
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from deploykit import targets
from deploykit.core.context import Context
from deploykit.dkz.container import pack
from deploykit.dkz.weights import Extent, File
from deploykit.hub.graph import FloatGraph
from deploykit.hub.lower import lower
from deploykit.passes.bitround import Bitround, rounded


def nearest(x: float, keep: int) -> Fraction:
    """Of all numbers with 1 + keep significant bits, and the even one of two."""
    mantissa, exponent = np.frexp(np.float64(x))
    scaled = Fraction(float(mantissa)) * 2 ** (keep + 1)
    return round(scaled) * Fraction(2) ** (int(exponent) - keep - 1)


@given(st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda x: abs(x) > 2.0**-120), st.integers(1, 22))
def test_numbers_are_the_nearest_that_have_so_few_bits(x: float, keep: int) -> None:
    (found,) = rounded(np.asarray([x], np.float32), keep)
    assert Fraction(float(found)) == nearest(x, keep)


def test_zeros_infinities_and_the_largest_stay() -> None:
    x = np.asarray([0.0, -0.0, np.inf, -np.inf, np.nan, np.finfo(np.float32).max], np.float32)
    assert rounded(x, 7).tobytes() == x.tobytes()


def held(found: FloatGraph) -> dict[str, NDArray[Any]]:
    """Initializers by name."""
    model = onnx.load_model_from_string(found.bytes)
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_biases_and_weights_are_rounded_and_numbers_that_stand_alone_are_not() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardtanh(0.1, 5.9), nn.Flatten(), nn.Linear(8 * 4, 5)).eval()
    made = lower(net, {"input": np.zeros((2, 3, 4, 4), np.float32)})
    before = held(made)
    after = held(Bitround(7)(made, Context(targets.load("x86"), {})))
    floats = {name for name, own in before.items() if own.dtype == np.float32}
    arrays = {name for name in floats if before[name].size > 1}
    assert len(arrays) == 4
    for name in floats - arrays:
        assert after[name] == before[name]
    for name in arrays:
        assert np.array_equal(after[name], rounded(before[name], 7)) and not np.array_equal(after[name], before[name])
        assert np.abs(after[name] - before[name]).max() <= np.abs(before[name]).max() / 256


def test_shared_values_stay_shared_and_zeros_zero() -> None:
    book = np.random.default_rng(0).normal(size=16).astype(np.float32)
    weights = np.where(np.random.default_rng(1).random(4000) < 0.1, np.random.default_rng(2).choice(book, 4000), 0)
    found = rounded(weights.astype(np.float32), 7)
    assert len(np.unique(found)) <= 17 and np.array_equal(found == 0, weights == 0)


def test_what_was_rounded_takes_half_in_a_container() -> None:
    bias = np.random.default_rng(0).normal(size=2000).astype(np.float32)
    sizes = [len(pack([File("net", own.tobytes(), [Extent(0, own.size, 32)])])) for own in (bias, rounded(bias, 7))]
    assert sizes[1] < 0.6 * sizes[0]


def test_sizes_are_no_weights() -> None:
    found = graph(
        """(float[1,3,8,8] x) => (float[1,3,h,w] y) { y = Resize(x, nothing, scales) }""",
        nothing=np.zeros(0, np.float32), scales=np.asarray([1, 1, 2.3, 2.3], np.float32),
    )  # fmt: skip
    assert (
        held(Bitround(7)(found, Context(targets.load("x86"), {})))["scales"].tolist() == held(found)["scales"].tolist()
    )


@pytest.mark.parametrize("keep", [0, 23, -1])
def test_bits_that_there_are_not_are_refused(keep: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 22"):
        Bitround(keep)
