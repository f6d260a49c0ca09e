"""TOML tables become frozen dataclasses; an unknown key or a wrong type is an error that says where."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from deploykit.core.errors import DeploykitError, unknown
from deploykit.core.files import no_such_file

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
    except FileNotFoundError:
        raise no_such_file(path) from None
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
    if not isinstance(table, Mapping):
        raise DeploykitError(f"{where}: a table is expected, given {table!r}")
    _refuse_unknown_keys(cls, table, where)
    try:
        return msgspec.convert(dict(table), cls)
    except msgspec.ValidationError as error:
        raise DeploykitError(f"{where}: {error}") from None


def _refuse_unknown_keys(hint: Any, value: Any, where: str) -> None:
    """Keys and choices; follows the type hint down into tables, tables of tables and lists of tables."""
    inner = typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        hints = typing.get_type_hints(hint)
        known = [f.name for f in dataclasses.fields(hint) if f.init]
        for key, entry in value.items():
            if key not in known:
                raise DeploykitError(f"{where}: {unknown('key', key, known)}")
            _refuse_unknown_keys(hints[key], entry, f"{where}, {key}")
    elif typing.get_origin(hint) in (dict, Mapping) and isinstance(value, Mapping):
        for key, entry in value.items():
            _refuse_unknown_keys(inner[1], entry, f"{where}.{key}")
    elif typing.get_origin(hint) in (tuple, list) and isinstance(value, (tuple, list)):
        for number, entry in enumerate(value, 1):
            _refuse_unknown_keys(inner[0], entry, f"{where} {number}")
    elif typing.get_origin(hint) is Literal and isinstance(value, str) and value not in inner:
        raise DeploykitError(f"{where}: {unknown('choice', value, map(str, inner))}")
    elif typing.get_origin(hint) in (typing.Union, types.UnionType):
        for choice in inner:
            if typing.get_origin(choice) is not Literal or str not in inner:
                _refuse_unknown_keys(choice, value, where)
