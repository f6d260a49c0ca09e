"""Generated scenes for detectors: discs, squares, triangles and crosses that hide each other, before clutter and noise.

The same seed gives the same scenes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from deploykit.core.data import DataSet, Sample

SIDE = 96
MOST = 4
"""Objects in a scene."""
SIZES = (6.0, 40.0)
"""Half of an object's side, in pixels."""
CONTRAST = (25.0, 120.0)
"""Distance of an object's colour from what is behind its centre, of 255 levels."""
HIDDEN = 0.4
"""An object covers at most so much of another's box."""

Array = NDArray[np.float64]
Shape = Callable[[Array, Array], NDArray[np.bool_]]
SHAPES: dict[str, Shape] = {
    "disc": lambda x, y: x**2 + y**2 < 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.85,
    "triangle": lambda x, y: (y > -0.6) & (y + 1.8 * abs(x) < 1),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 1),
}
"""Inside or outside, on axes that the object's half side is the unit of."""
CLUTTER: tuple[Shape, ...] = (
    lambda x, y: (abs(y) < 0.07) & (abs(x) < 1),  # a line
    lambda x, y: abs(np.hypot(x, y) - 0.9) < 0.1,  # a ring
    lambda x, y: (x**2 + y**2 < 1) & (y > 0.2),  # a part of a disc
    lambda x, y: (abs(x) < 0.25) & (abs(y) < 1),  # a bar
)
"""Shapes that are no objects."""
Y, X = np.mgrid[:SIDE, :SIDE] + 0.5


def scenes(count: int, seed: int) -> DataSet:
    """Images ``x`` ``[3, 96, 96]``, and labels ``[count, 4, 5]`` (class and box) as `benchmarks.ssd` takes them."""
    images, labels = drawn(count, seed)
    return DataSet(lambda i: normalised(images[i]), tuple(range(count)), labels, f"{count} scenes, seed {seed}")


def normalised(image: NDArray[np.uint8]) -> Sample:
    """``[h, w, 3]`` of 0..255 -> ``[3, h, w]`` of -1..1."""
    return {"x": image.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1}


@cache
def drawn(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Images ``[count, 96, 96, 3]`` and their labels."""
    images, labels = np.empty((count, SIDE, SIDE, 3), np.uint8), np.zeros((count, MOST, 5), np.float32)
    for i, random in enumerate(np.random.default_rng(seed).spawn(count)):
        images[i], found = scene(random)
        labels[i, : len(found)] = found
    return images, labels


def scene(random: np.random.Generator) -> tuple[NDArray[np.uint8], list[list[float]]]:
    """One image and the class and box of each of its objects."""
    image = background(random)
    for _ in range(random.integers(0, 7)):
        paint(image, random, CLUTTER[random.integers(len(CLUTTER))], random.uniform(3, 16), random.uniform(0, SIDE, 2))
    found: list[list[float]] = []
    for _ in range(random.integers(1, MOST + 1)):
        kind = int(random.integers(len(SHAPES)))
        half = float(np.exp(random.uniform(*np.log(SIZES))))
        centre = random.uniform(0.6 * half, SIDE - 0.6 * half, 2)
        edges = np.clip([*(centre - half), *(centre + half)], 0, SIDE)
        if all(covered(edges, np.asarray(other[1:]) * SIDE) <= HIDDEN for other in found):
            seen = paint(image, random, list(SHAPES.values())[kind], half, centre)
            found.append([kind + 1, *(edge / SIDE for edge in extent(seen))])
    image += random.normal(0, random.uniform(2, 18), image.shape)
    return image.clip(0, 255).astype(np.uint8), found


def background(random: np.random.Generator) -> Array:
    """A plane of changing colour with waves on it."""
    slopes = random.normal(0, 0.5, (2, 3))
    waves = random.uniform(0, 14) * np.sin(X * random.uniform(-0.5, 0.5) + Y * random.uniform(-0.5, 0.5))
    plane: Array = (X - SIDE / 2)[..., None] * slopes[0] + (Y - SIDE / 2)[..., None] * slopes[1] + waves[..., None]
    return plane + random.uniform(40, 215, 3)


def paint(image: Array, random: np.random.Generator, shape: Shape, half: float, centre: Array) -> NDArray[np.bool_]:
    """Paints a shape, turned and stretched at random; returns where it is."""
    angle, stretch = random.uniform(0, 2 * np.pi), random.uniform(0.75, 1)
    dx, dy = (X - centre[0]) / half, (Y - centre[1]) / half
    x, y = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    inside = shape(x, y / stretch)
    away = random.normal(size=3)
    behind = image[tuple(centre[::-1].astype(int).clip(0, SIDE - 1))]
    colour = behind + away / np.linalg.norm(away) * random.uniform(*CONTRAST)
    shade = random.normal(0, 12) * dx[inside, None]
    image[inside] = colour + shade
    return inside


def extent(inside: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """The box around a shape, in pixels."""
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def covered(a: Array, b: Array) -> float:
    """The share of the smaller of two boxes that they have in common."""
    both = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    return float(both / min(np.prod(a[2:] - a[:2]), np.prod(b[2:] - b[:2])))
