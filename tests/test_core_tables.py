from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from deploykit.core.errors import DeploykitError
from deploykit.core.tables import from_table, read_toml


@dataclass(frozen=True)
class Wheel:
    size: float
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.size <= 0:
            raise ValueError("size must be above 0")


@dataclass(frozen=True)
class Car:
    name: str
    spare: Wheel | None = None
    wheels: tuple[Wheel, ...] = ()
    by_name: dict[str, Wheel] = field(default_factory=dict)
    made: int = field(init=False, default=0)


def test_nested_tables_become_nested_dataclasses() -> None:
    table = {
        "name": "a", "spare": {"size": 1}, "wheels": [{"size": 2.5, "tags": ["x"]}], "by_name": {"front": {"size": 3}},
    }  # fmt: skip
    expected = Car("a", Wheel(1.0), (Wheel(2.5, ("x",)),), {"front": Wheel(3.0)})
    assert from_table(Car, table, "here") == expected


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"nam": "a"}, "here: no key 'nam'. Did you mean 'name'?"),
        ({"name": "a", "spare": {"sise": 1}}, "here, spare: no key 'sise'. Did you mean 'size'?"),
        ({"name": "a", "wheels": [{"size": 1}, {"sise": 1}]}, "here, wheels 2: no key 'sise'"),
        ({"name": "a", "by_name": {"front": {"sise": 1}}}, "here, by_name.front: no key 'sise'"),
        ({"name": "a", "made": 3}, "no key 'made'"),
        ({}, "missing required field `name`"),
        ({"name": 3}, "Expected `str`, got `int`"),
        ({"name": "a", "spare": {"size": "big"}}, "$.spare"),
        ({"name": "a", "spare": {"size": 0}}, "size must be above 0"),
        ({"name": "a", "spare": 3}, "$.spare"),
        (3, "here: a table is expected, given 3"),
    ],
)
def test_whatever_does_not_fit_says_where_and_why(table: Any, expected: str) -> None:
    with pytest.raises(DeploykitError) as error:
        from_table(Car, table, "here")
    assert expected in str(error.value) and "here" in str(error.value)


def test_a_file_that_is_no_toml_names_line_and_column(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text("a = 1\nb = = 2\n")
    with pytest.raises(DeploykitError, match=r"r\.toml is not valid TOML: .*line 2, column 5"):
        read_toml(file)


def test_missing_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DeploykitError, match=r"no file .*none\.toml"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DeploykitError, match="is not a text file"):
        read_toml(tmp_path / "b.toml")
