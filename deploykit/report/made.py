"""`Made`: an artifact as the report reads it, found in the folders that were given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import NAME, Manifest, load_intact
from deploykit.core.ranges import Ranges, load_ranges

RANGES = "ranges.json"


@dataclass(frozen=True)
class Made:
    """One artifact."""

    folder: Path
    label: str
    """The target; the folder's name, or its path, where several artifacts have that target."""
    manifest: Manifest
    ranges: Ranges | None
    """What its scales were chosen from; None: nothing was calibrated."""


def find(folders: Sequence[Path]) -> tuple[Made, ...]:
    """The artifacts in these folders: each is one, or has some right below it. None is taken twice.

    Raises:
        DeploykitError: a folder is no artifact and has none below it; or files that were truncated or altered.
    """
    chosen: dict[Path, Path] = {}
    for folder in folders:
        below = [] if (folder / NAME).is_file() else sorted(p.parent for p in folder.glob(f"*/{NAME}"))
        for found in below or [folder]:
            chosen.setdefault(found.resolve(), found)
    opened = [(folder, load_intact(folder)) for folder in chosen.values()]
    labels = _labels(opened)
    return tuple(
        Made(folder, label, manifest, _ranges(folder, manifest))
        for label, (folder, manifest) in zip(labels, opened, strict=True)
    )


def _labels(opened: Sequence[tuple[Path, Manifest]]) -> list[str]:
    for names in (
        [manifest.target for _, manifest in opened],
        [folder.resolve().name for folder, _ in opened],
        [folder.as_posix() for folder, _ in opened],
    ):
        if len(set(names)) == len(names):
            return names
    raise DeploykitError(f"these folders have one name: {', '.join(str(f) for f, _ in opened)}")


def _ranges(folder: Path, manifest: Manifest) -> Ranges | None:
    return load_ranges(folder / RANGES) if any(s.path == RANGES for s in manifest.stored) else None
