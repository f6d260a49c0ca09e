"""Hardware profiles: `NAME.toml` in this folder is the target NAME the moment it exists."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from deploykit.core.errors import DeploykitError, unknown
from deploykit.core.tables import from_table, read_toml
from deploykit.core.target import Target


def names() -> list[str]:
    """Every target's name, sorted."""
    return sorted(path.name.removesuffix(".toml") for path in _folder().iterdir() if path.name.endswith(".toml"))


def load(name: str) -> Target:
    """The target of that name, or the one in a TOML file of the user's (``my-board.toml``).

    Its own numbers are integers.

    Raises:
        DeploykitError: no such target (with the nearest name), or the profile is not valid.
    """
    path = _path(name)
    table = _merged(path, seen=())
    target = from_table(Target, {"name": path.stem, **table}, f"target {path.name}")
    if target.quant.grid != "integer":
        raise DeploykitError(
            f'target {path.name} [quant]: grid = "{target.quant.grid}" is that of the precision fp8, which is named in '
            "on_request"
        )
    return target


def base(name: str) -> Target | None:
    """The target that a target extends; None where its profile says everything itself.

    Raises:
        DeploykitError: as `load`.
    """
    extended = read_toml(_path(name)).get("extends")
    return None if extended is None else load(extended)


def _path(name: str) -> Path:
    if name.endswith(".toml"):
        return Path(name)
    if name not in names():
        if Path(f"{name}.toml").is_file():
            raise DeploykitError(f"no target '{name}', but there is a file: --target {name}.toml")
        raise unknown("target", name, names())
    return _folder() / f"{name}.toml"


def _folder() -> Path:
    return Path(str(resources.files("deploykit.targets")))


def _merged(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The table of a profile laid over the one it ``extends``: tables key by key, a fact as a whole."""
    if path in seen:
        raise DeploykitError(f"target {path.name} extends itself: {' -> '.join(p.stem for p in (*seen, path))}")
    table = read_toml(path)
    base = table.pop("extends", None)
    if base is None:
        return table
    if base not in names():
        raise DeploykitError(f"target {path.name}, extends: {unknown('target', str(base), names())}")
    return _overlay(_merged(_folder() / f"{base}.toml", (*seen, path)), table)


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        # a fact's figure must not keep the source of the figure it replaces
        is_fact = isinstance(value, dict) and "source" in value
        both_tables = isinstance(value, dict) and isinstance(merged.get(key), dict) and not is_fact
        merged[key] = _overlay(merged[key], value) if both_tables else value
    return merged
