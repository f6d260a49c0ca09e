"""`Row`: all that is known about one file in one place, and how shapes and preprocessing are put into words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deploykit.core.artifact import File, Measurement
from deploykit.core.data import Preprocess
from deploykit.core.manifest import Manifest, Score

ORIGINAL = "original"
"""Precision of the score of the model as it came in, which is no file."""


@dataclass(frozen=True)
class Row:
    """One line of a result table. None: not measured."""

    target: str
    precision: str
    file: File | None
    """None: the model as it came in."""
    bytes: int | None
    size: float | None
    """Bytes over those of the first file, the baseline."""
    score: Score | None
    measurement: Measurement | None


def rows(manifest: Manifest) -> tuple[Row, ...]:
    """The model as it came in, if it was scored, then every file in order."""
    scores = {s.precision: s for s in reversed(manifest.scores)}
    measured = {m.precision: m for m in reversed(manifest.measurements)}
    sizes = {s.path: s.bytes for s in manifest.stored}
    base = sizes.get(manifest.files[0].path) if manifest.files else None
    found = [Row(manifest.target, ORIGINAL, None, None, None, scores[ORIGINAL], None)] if ORIGINAL in scores else []
    for file in manifest.files:
        size = sizes.get(file.path)
        found.append(
            Row(
                manifest.target,
                file.precision,
                file,
                size,
                size / base if size is not None and base else None,
                scores.get(file.precision),
                measured.get(file.precision),
            )
        )
    return tuple(found)


def shape(dimensions: Iterable[int | str]) -> str:
    """``batch × 3 × 32 × 32``."""
    return " × ".join(str(d) for d in dimensions)


def preprocessing(steps: Preprocess) -> tuple[str, ...]:
    """What happens to an image before the network, one step each, in order."""
    said = [f"read as {'grey' if steps.channels == 'L' else steps.channels}, values 0 to 255"]
    if steps.resize is not None:
        said.append(f"resize the shorter side to {steps.resize} pixels, bilinear")
    if steps.crop is not None:
        height, width = steps.crop if isinstance(steps.crop, tuple) else (steps.crop, steps.crop)
        said.append(f"cut the centre, {height} × {width} (height × width)")
    if steps.scale != 1.0:
        said.append(f"multiply by {_scale(steps.scale)}")
    if steps.mean:
        said.append(f"subtract {_per_channel(steps.mean)}")
    if steps.std:
        said.append(f"divide by {_per_channel(steps.std)}")
    said.append(f"float32, {steps.layout}")
    return tuple(said)


def _scale(value: float) -> str:
    inverse = 1.0 / value
    return f"1/{inverse:.6g}" if abs(inverse - round(inverse, 1)) < 1e-9 * abs(inverse) else f"{value:.8g}"


def _per_channel(values: tuple[float, ...]) -> str:
    return f"{values[0]:.6g}" if len(values) == 1 else f"({', '.join(f'{v:.6g}' for v in values)}) per channel"
