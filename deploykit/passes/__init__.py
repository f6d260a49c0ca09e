"""Passes: `NAME.py` holds the pass NAME, as the frozen dataclass ``Name``, the moment it exists."""

from __future__ import annotations

import dataclasses
import importlib
from importlib import resources
from pathlib import Path
from typing import cast

from deploykit.core.errors import unknown
from deploykit.core.recipe import Pass, Step
from deploykit.core.tables import from_table


def names() -> list[str]:
    """Every pass's name, sorted."""
    folder = Path(str(resources.files("deploykit.passes")))
    return sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__")


def load(name: str) -> type[Pass]:
    """The class of a pass.

    Raises:
        DeploykitError: there is none of that name.
    """
    if name not in names():
        raise unknown("pass", name, names())
    module = importlib.import_module(f"deploykit.passes.{name}")
    return cast("type[Pass]", getattr(module, "".join(part.capitalize() for part in name.split("_"))))


def build(step: Step) -> Pass:
    """The pass a step asks for, with its options checked.

    Raises:
        DeploykitError: unknown pass or option, or an option out of range.
    """
    return from_table(load(step.name), step.options, f"step '{step.name}'")


def options(name: str) -> dict[str, object]:
    """A pass's options and their defaults."""
    fields = dataclasses.fields(load(name))  # type: ignore[arg-type]
    return {f.name: None if f.default is dataclasses.MISSING else f.default for f in fields}
