"""Errors a user can mend: one sentence on what was wrong, what was expected and what to do; no traceback."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches


class DeploykitError(Exception):
    """The user's input or request cannot be served. The command line prints the message and exits with 2."""

    exit_code = 2


class GateFailed(DeploykitError):
    """The files were written but did not pass their checks. The command line exits with 3."""

    exit_code = 3


class MissingExtra(DeploykitError):
    """An optional dependency is needed for what was asked.

    Args:
        what: what needs it, e.g. ``"writing .tflite files"``.
        extra: the extra that brings it, e.g. ``"tflite"``.
    """

    def __init__(self, what: str, extra: str) -> None:
        """Says what to install."""
        super().__init__(f"{what} needs the extra '{extra}': pip install 'deploykit[{extra}]'")
        self.extra = extra


@contextmanager
def said_by(who: str) -> Iterator[None]:
    """Errors of checks that several steps share begin with the name of the step.

    >>> with said_by("compact"):
    ...     raise DeploykitError("layer 'a' has groups")
    Traceback (most recent call last):
    deploykit.core.errors.DeploykitError: compact: layer 'a' has groups
    """
    try:
        yield
    except DeploykitError as error:
        raise DeploykitError(f"{who}: {error}") from None


def unknown(kind: str, given: str, known: Iterable[str]) -> DeploykitError:
    """The error for a name nobody knows, with the nearest one that exists.

    >>> str(unknown("target", "jetsn", ["jetson", "x86"]))
    "no target 'jetsn'. Did you mean 'jetson'? Known: jetson, x86."
    """
    names = sorted(known)
    near = get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    listing = f" Known: {some(names)}." if names else " There are none."
    return DeploykitError(f"no {kind} '{given}'.{hint}{listing}")


def some(names: Sequence[str], limit: int = 30) -> str:
    """The names in one line, the first ``limit`` of them when there are more.

    >>> some(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    listed = ", ".join(names[:limit])
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"
