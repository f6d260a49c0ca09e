"""`Places`: where the exits of a network stand, as a value that a folder keeps. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

OUTPUT = "output"
"""What the answer of a network that returns one tensor is called in a file."""


@dataclass(frozen=True)
class Stage:
    """A module whose output is everything that what lies behind it reads."""

    path: str
    shape: tuple[int, ...]
    """Of what it writes for one sample: ``(channels, height, width)`` or ``(channels,)``."""


@dataclass(frozen=True)
class Places:
    """Where the exits of a network stand: enough to attach them again."""

    stages: tuple[Stage, ...]
    """First to last. All but the last have an exit; the last one's features are the deepest."""
    classes: int
    output: str = OUTPUT
    """What the network's own answer is called."""


def exit_name(k: int) -> str:
    """What the answer of exit k, from 1, is called."""
    return f"exit_{k}"


def cut_name(k: int) -> str:
    """What stage k, from 1, hands on."""
    return f"cut_{k}"
