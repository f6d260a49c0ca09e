"""Names by pattern, as users type them: ``layer3.*.conv?``."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from deploykit.core.errors import unknown


def matching(kind: str, patterns: Iterable[str], known: Iterable[str]) -> set[str]:
    """The names that are given, or match one of the patterns (``*``, ``?``, ``[abc]``).

    Args:
        kind: what the names are of, for the message, e.g. ``"layer"``.
        patterns: a name as it stands is one too, whatever characters it has.
        known: all names there are.

    Raises:
        DeploykitError: a pattern that matches nothing, with the name nearest to it.
    """
    names = set(known)
    found: set[str] = set()
    for pattern in patterns:
        own = {pattern} & names or {name for name in names if fnmatchcase(name, pattern)}
        if not own:
            raise unknown(kind, pattern, names)
        found |= own
    return found
