"""Views: reshaping and transposing change how a stored tensor is read, checked against NumPy doing it for real."""

from __future__ import annotations

from math import prod
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("ai_edge_litert", reason="the extra 'tflite' is not installed")

from deploykit.exporters import layout
from deploykit.exporters.layout import NHWC, View, identity, stored
from deploykit.exporters.tflite.windows import litert_mode, same_padding, used_padding
from deploykit.exporters.tflite.writer import Tensor


def image(*shape: int) -> tuple[View, NDArray[np.int64]]:
    """A view of an image stored channels-last, and the stored elements (their values are ONNX's positions)."""
    elements = np.arange(prod(shape)).reshape(shape)
    held = elements.transpose(NHWC)
    return stored(Tensor(0, "x", held.shape, "float32"), shape, NHWC), held


def through(view: View, held: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ONNX tensor that a view shows of stored elements."""
    sizes = [view.factors[f] for f in view.order]
    return held.reshape(sizes).transpose(np.argsort(view.order)).reshape(view.shape)


def divisions(size: int) -> list[tuple[int, ...]]:
    """Shapes of a size, with 1 to 4 axes."""
    found = {(size,)}
    for a in range(1, size + 1):
        if size % a == 0:
            found.add((a, size // a))
            found.update((a, b, size // a // b) for b in range(1, size // a + 1) if (size // a) % b == 0)
    return sorted(found | {(*s, 1) for s in found})


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_chain_of_reshapes_and_transposes_shows_what_numpy_computes(data: Any) -> None:
    shape = (1, data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6)))
    view, held = image(*shape)
    expected = through(view, held)
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            axes = tuple(data.draw(st.permutations(range(len(view.shape)))))
            view, expected = layout.transpose(view, axes), expected.transpose(axes)
        else:
            wanted = data.draw(st.sampled_from(divisions(prod(view.shape))))
            found = layout.reshape(view, wanted)
            if found is None:
                continue
            view, expected = found, expected.reshape(wanted)
        np.testing.assert_array_equal(through(view, held), expected)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_the_movement_brings_the_elements_into_the_order_that_is_asked_for(data: Any) -> None:
    shape = (1, *(data.draw(st.integers(1, 4)) for _ in range(3)))
    view, held = image(*shape)
    found = layout.reshape(view, data.draw(st.sampled_from(divisions(prod(shape)))))
    view = found or view
    order = tuple(data.draw(st.permutations(range(len(view.shape)))))
    taken, axes = layout.movement(view, order)
    expected = through(view, held).transpose(order)
    np.testing.assert_array_equal(held.reshape(taken).transpose(axes).reshape(expected.shape), expected)


def test_a_flattened_image_keeps_its_elements_where_they_are() -> None:
    view, held = image(1, 3, 4, 5)
    flat = layout.reshape(view, (1, 60))
    assert flat is not None
    assert layout.natural(flat) is None  # no order of [1, 60] fits: the weights that read it have to be permuted
    positions = layout.element_order(flat)
    assert positions is not None
    np.testing.assert_array_equal(positions, held.ravel())


def test_a_reshape_that_cuts_through_an_axis_has_no_view() -> None:
    view, _ = image(1, 2, 1, 3)
    assert layout.reshape(view, (1, 3, 2)) is None


def test_splitting_channels_into_groups_keeps_an_image_in_place() -> None:
    view, _ = image(1, 6, 4, 5)
    grouped = layout.reshape(view, (1, 2, 3, 4, 5))
    assert grouped is not None
    assert layout.natural(grouped) == (0, 3, 4, 1, 2)
    swapped = layout.transpose(grouped, (0, 2, 1, 3, 4))
    assert layout.natural(swapped) == (0, 3, 4, 2, 1)


def test_axes_of_size_one_do_not_count_as_moved() -> None:
    view = stored(cast(Tensor, Tensor(0, "x", (1, 8), "float32")), (1, 8), identity(2))
    as_image = layout.reshape(view, (1, 8, 1, 1))
    assert as_image is not None
    assert layout.natural(as_image) == NHWC


def test_same_puts_the_odd_row_behind() -> None:
    assert same_padding(224, 112, kernel=3, stride=2, dilation=1) == (0, 1)
    assert same_padding(7, 7, kernel=3, stride=1, dilation=2) == (2, 2)
    assert same_padding(7, 6, kernel=2, stride=1, dilation=1) is None


def test_padding_behind_the_last_window_is_not_used() -> None:
    # 224 rows, kernel 3, stride 2, one row of padding on either side: the windows end on the last row of the image
    assert used_padding([224], [112], [3], [2], [1], [1]) == [(1, 0)]


@pytest.mark.parametrize(
    ("coordinate", "rounding", "scale", "expected"),
    [
        ("half_pixel", None, 2.0, (False, True)),
        ("align_corners", None, 2.0, (True, False)),
        ("asymmetric", None, 2.0, (False, False)),
        ("asymmetric", "floor", 2.0, (False, False)),
        ("asymmetric", "ceil", 2.0, None),
        ("half_pixel", None, 1.9, None),  # torch keeps the factor it was given; LiteRT knows only the sizes
    ],
)
def test_a_resize_is_written_only_where_litert_reads_the_same_places(
    coordinate: str, rounding: str | None, scale: float, expected: tuple[bool, bool] | None
) -> None:
    axes = [(5, int(5 * scale), scale), (4, int(4 * scale), scale)]
    assert litert_mode(axes, coordinate, rounding) == expected
