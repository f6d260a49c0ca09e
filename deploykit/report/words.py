"""Names, shapes and preprocessing in words."""

from __future__ import annotations

from collections.abc import Sequence

from deploykit.core.data import Preprocess
from deploykit.core.figures import number


def shape(dimensions: Sequence[int | str]) -> str:
    """``batch × 3 × 32 × 32``."""
    return " × ".join(str(d) for d in named(dimensions))


def named(dimensions: Sequence[int | str]) -> tuple[int | str, ...]:
    """The dimensions with a free first one called batch, whatever the graph calls it."""
    return tuple("batch" if i == 0 and isinstance(d, str) else d for i, d in enumerate(dimensions))


def title(model: str) -> str:
    """A model's origin without the folders it lay in."""
    return model.replace("\\", "/").rpartition("/")[2] or model


EQUAL_DB = 200.0
"""What stands for no noise at all."""


def decibels(value: float | None) -> str:
    """``41.3 dB``, or ``equal``."""
    return "equal" if value is not None and value >= EQUAL_DB else f"{number(value, 1)} dB"


def preprocessing(steps: Preprocess, dtype: str) -> tuple[str, ...]:
    """What happens to an image before the network takes it as a ``dtype``, one step each, in order."""
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
    said.append(f"{dtype}, {steps.layout}")
    return tuple(said)


def _scale(value: float) -> str:
    inverse = 1.0 / value
    return f"1/{inverse:.6g}" if abs(inverse - round(inverse, 1)) < 1e-9 * abs(inverse) else f"{value:.8g}"


def _per_channel(values: tuple[float, ...]) -> str:
    return f"{values[0]:.6g}" if len(values) == 1 else f"({', '.join(f'{v:.6g}' for v in values)}) per channel"
