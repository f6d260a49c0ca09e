"""TOML tables become frozen dataclasses; an unknown key or a wrong type is an error that says where."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from deploykit.core.errors import DeploykitError, unknown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file.

    Raises:
        DeploykitError: the file is missing, unreadable or not TOML (with line and column).
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DeploykitError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DeploykitError(f"{path} is not a text file (UTF-8)") from None
    except tomllib.TOMLDecodeError as error:
        raise DeploykitError(f"{path} is not valid TOML: {error}") from None


def from_table(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """Builds the dataclass ``cls`` from a table, strictly.

    Args:
        cls: a dataclass; nested dataclasses are built from nested tables.
        table: keys and values as TOML or the command line gave them.
        where: named in errors, e.g. ``"targets/x86.toml"``.

    Raises:
        DeploykitError: an unknown key (with the nearest known one), a missing key, a wrong type or value.
    """
    _refuse_unknown_keys(cls, table, where)
    try:
        return msgspec.convert(dict(table), cls)
    except msgspec.ValidationError as error:
        raise DeploykitError(f"{where}: {error}") from None


def _refuse_unknown_keys(cls: type[Any], table: Mapping[str, Any], where: str) -> None:
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    for key, value in table.items():
        if key not in known:
            raise DeploykitError(f"{where}: {unknown('key', key, known)}")
        for inner in _dataclasses_in(hints[key]):
            if isinstance(value, Mapping):
                # either one table, or a table of tables (dict[str, Fact])
                if typing.get_origin(hints[key]) in (dict, Mapping):
                    for name, entry in value.items():
                        if isinstance(entry, Mapping):
                            _refuse_unknown_keys(inner, entry, f"{where} [{key}.{name}]")
                else:
                    _refuse_unknown_keys(inner, value, f"{where} [{key}]")


def _dataclasses_in(hint: Any) -> list[type[Any]]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return [hint]
    if typing.get_origin(hint) in (dict, tuple, list, typing.Union, types.UnionType, Mapping):
        return [found for argument in typing.get_args(hint) for found in _dataclasses_in(argument)]
    return []
