"""Loading profiles: names, inheritance, and everything a profile can get wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from deploykit import targets
from deploykit.core.errors import DeploykitError
from deploykit.core.target import QuantSpec

BOARD = """
title = "A board"
exporter = "onnx"
precisions = ["fp32"]
profits = ["int8"]
channel_multiple = 4
opset = 20
"""


def board(tmp_path: Path, text: str) -> str:
    file = tmp_path / "my-board.toml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize("name", targets.names())
def test_every_profile_loads_and_is_complete(name: str) -> None:
    target = targets.load(name)
    assert target.name == name and target.title and target.precisions and target.exporter
    assert all(fact.source for fact in target.facts.values())


def test_a_users_own_profile_is_named_after_its_file(tmp_path: Path) -> None:
    target = targets.load(board(tmp_path, BOARD))
    assert target.name == "my-board" and target.quant == QuantSpec() and target.precisions == ("fp32",)


def test_a_profile_that_extends_another_differs_only_where_it_says_so(tmp_path: Path) -> None:
    base = targets.load("x86")
    mine = targets.load(board(tmp_path, 'extends = "x86"\nopset = 18\n[quant]\nweight_bits = 7\n'))
    assert mine == replace(base, name="my-board", opset=18, quant=replace(base.quant, weight_bits=7))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('extends = "x68"', "no target 'x68'. Did you mean 'x86'?"),
        (BOARD + "chanel_multiple = 3", "no key 'chanel_multiple'. Did you mean 'channel_multiple'?"),
        (BOARD + "[quant]\nweight_bit = 3", "no key 'weight_bit'. Did you mean 'weight_bits'?"),
        (BOARD + "[quant]\nweight_bits = 16", "must be between 2 and 8"),
        (BOARD + "[facts.ram]\nvalue = 3", "missing required field `source`"),
        (BOARD + "[facts.ram]\nvalu = 3", "no key 'valu'. Did you mean 'value'?"),
        (BOARD.replace('"int8"', '"int9"'), "int9"),
        ("", "missing required field"),
        ("a = = 1", "is not valid TOML"),
    ],
)
def test_a_wrong_profile_says_what_and_where(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(DeploykitError) as error:
        targets.load(board(tmp_path, text))
    assert expected in str(error.value) and "my-board.toml" in str(error.value)


@pytest.mark.parametrize("name", ["x68", "../targets/x86", "", "X86"])
def test_a_name_nobody_knows_is_refused(name: str) -> None:
    with pytest.raises(DeploykitError, match="no target"):
        targets.load(name)


def test_a_missing_profile_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeploykitError, match=r"no file .*none\.toml"):
        targets.load(str(tmp_path / "none.toml"))
