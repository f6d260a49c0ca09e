from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploykit.core import errors
from deploykit.core.errors import DeploykitError, GateFailed, MissingExtra, some, unknown


def test_the_examples_in_the_docstrings_are_true() -> None:
    result = doctest.testmod(errors)
    assert result.attempted >= 2 and result.failed == 0


def test_exit_codes_tell_input_from_gate() -> None:
    assert (DeploykitError("").exit_code, MissingExtra("a", "b").exit_code, GateFailed("").exit_code) == (2, 2, 3)


def test_a_missing_extra_says_what_needs_it_and_how_to_install_it() -> None:
    assert (
        str(MissingExtra("writing x", "tflite"))
        == "writing x needs the extra 'tflite': pip install 'deploykit[tflite]'"
    )


@pytest.mark.parametrize(
    ("given_name", "known", "message"),
    [
        ("x68", ["x86", "jetson"], "no target 'x68'. Did you mean 'x86'? Known: jetson, x86."),
        ("zzz", ["x86", "jetson"], "no target 'zzz'. Known: jetson, x86."),
        ("x86", [], "no target 'x86'. There are none."),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(given_name: str, known: list[str], message: str) -> None:
    assert str(unknown("target", given_name, known)) == message


@given(st.lists(st.text("abc", min_size=1), max_size=50), st.integers(1, 20))
def test_no_name_is_lost_in_a_listing(names: list[str], limit: int) -> None:
    shown, _, rest = some(names, limit).partition(" and ")
    listed = shown.split(", ") if shown else []
    assert listed == names[:limit]
    assert int(rest.removesuffix(" more") or 0) == len(names) - len(listed)
