"""Recipes that ship with the project: `NAME.toml` in this folder is the recipe NAME the moment it exists."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from deploykit.core.errors import DeploykitError, unknown
from deploykit.core.recipe import Recipe, load_recipe
from deploykit.core.target import Target

DEFAULT = "default"
"""Stands for the recipe that a target names as its own."""


def names() -> list[str]:
    """Every shipped recipe's name, sorted."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def load(name: str, chosen: Sequence[Target] = ()) -> Recipe:
    """The shipped recipe of that name, or the one in a file of the user's.

    Args:
        name: of a shipped recipe, a path, or ``default``.
        chosen: the targets whose own recipe ``default`` means.

    Raises:
        DeploykitError: no such recipe (with the nearest name) or file, not a recipe, or no default for these targets.
    """
    if name == DEFAULT:
        return load(_default(chosen))
    if name in names():
        return load_recipe(_folder() / f"{name}.toml")
    path = Path(name)
    if path.exists() or path.suffix or len(path.parts) > 1:
        return load_recipe(path)
    raise unknown("recipe", name, [DEFAULT, *names()])


def _default(chosen: Sequence[Target]) -> str:
    """The recipe that all the targets name."""
    if not chosen:
        raise DeploykitError(f"every target has a default recipe of its own: give --target, or one of {_listed()}")
    for target in chosen:
        if not target.recipe:
            raise DeploykitError(f"target '{target.name}' has no default recipe. Give a file, or one of {_listed()}")
    found = {target.recipe: target.name for target in chosen}
    if len(found) > 1:
        each = ", ".join(f"{target} has {recipe}" for recipe, target in found.items())
        raise DeploykitError(f"the targets have different default recipes ({each}): name one, or export one by one")
    return next(iter(found))


def _listed() -> str:
    return ", ".join(names())


def _folder() -> Path:
    return Path(str(resources.files("deploykit.recipes")))
