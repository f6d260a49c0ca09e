"""MUNGE: samples that might have been there, made of pairs of those that are.

Bucila, Caruana & Niculescu-Mizil 2006, "Model Compression", section 2.3 and figure 2. The samples are few, a teacher
can label as many as there are. Every sample trades attributes with its nearest neighbour, so what comes out stays where
the data is, as noise or independent draws of the attributes would not. Neighbours are sought once, among the samples as
they came; figure 2 seeks them among those that have traded already.

For tables and small images: it compares every sample with every other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.progress import track

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROWS = 256
"""Samples that are compared with all at once: memory grows with the number of samples, not with its square."""


def munge(data: DataSet, k: int, p: float, s: float, seed: int) -> DataSet:
    """The samples, and k times as many new ones; none has a label.

    Integers are categorical, and so are columns of a table of floats ``[n, d]`` in which there are only whole numbers
    (flags, codes). Everything else is continuous.

    Args:
        data: held in memory with all that is made of it.
        k: passes over the data; each gives a new sample for every one.
        p: probability for an attribute to be traded.
        s: local variance: continuous attributes are drawn around the neighbour's with the standard deviation
            |e_a - e'_a| / s. The larger s, the more it is a plain swap.
        seed: of the draws.

    Raises:
        DeploykitError: fewer than 2 samples.
    """
    if len(data) < 2:
        raise DeploykitError(f"munge trades attributes between samples; {data.origin} has {len(data)}")
    arrays = next(data.batches(len(data))).inputs
    attributes = [Attributes.of(x) for x in arrays.values()]
    nearest = neighbours(attributes)
    random = np.random.default_rng(seed)
    made: list[list[NDArray[Any]]] = [[x] for x in arrays.values()]
    for _ in track(range(k), "munging", k):
        for copies, x, own in zip(made, arrays.values(), traded(attributes, nearest, p, s, random), strict=True):
            copies.append(own.reshape(x.shape).astype(x.dtype))
    inputs = {name: np.concatenate(copies) for name, copies in zip(arrays, made, strict=True)}
    return DataSet.of(inputs, origin=f"{data.origin}, munged")


@dataclass(frozen=True)
class Attributes:
    """One input as attributes of its samples."""

    values: NDArray[Any]
    """``[n, d]``"""
    categorical: NDArray[np.bool_]
    """``[d]``"""
    scale: NDArray[np.float32]
    """``[d]``, what differences are multiplied by: a table's columns are scaled to 0..1 (section 2.3)."""

    @staticmethod
    def of(x: NDArray[Any]) -> Attributes:
        """Of samples ``[n, ...]``."""
        values = x.reshape(len(x), -1)
        d = values.shape[1]
        if x.dtype.kind != "f":
            return Attributes(values, np.ones(d, bool), np.ones(d, np.float32))
        if x.ndim > 2:
            return Attributes(values, np.zeros(d, bool), np.ones(d, np.float32))
        width = np.ptp(values, axis=0)
        scale = np.where(width > 0, 1 / np.where(width > 0, width, 1), 0).astype(np.float32)
        return Attributes(values, (values == np.rint(values)).all(0), scale)


def neighbours(attributes: list[Attributes]) -> NDArray[np.int64]:
    """Of every sample the nearest other one, ``[n]``, by Euclidean distance; a category that differs counts 1."""
    n = len(attributes[0].values)
    nearest = np.zeros(n, np.int64)
    parts = [
        ((a.values * a.scale)[:, ~a.categorical].astype(np.float32), a.values[:, a.categorical]) for a in attributes
    ]
    squares = [np.square(x).sum(1) for x, _ in parts]
    for start in track(range(0, n, ROWS), "finding neighbours", -(-n // ROWS)):
        rows = slice(start, min(n, start + ROWS))
        distance = np.zeros((rows.stop - start, n), np.float32)
        for (x, categories), square in zip(parts, squares, strict=True):
            distance += square[rows, None] + square - 2 * x[rows] @ x.T
            for column in categories.T:
                distance += column[rows, None] != column
        distance[np.arange(rows.stop - start), np.arange(start, rows.stop)] = np.inf
        nearest[rows] = distance.argmin(1)
    return nearest


def traded(
    attributes: list[Attributes], nearest: NDArray[np.int64], p: float, s: float, random: np.random.Generator
) -> list[NDArray[Any]]:
    """One pass of figure 2: each sample trades with its neighbour, which keeps what it got.

    Args:
        attributes: of every input.
        nearest: ``[n]``, from `neighbours`.
        p: probability for an attribute to be traded.
        s: local variance.
        random: the draws.

    Returns:
        ``[n, d]`` for every input.
    """
    made = [a.values.copy() for a in attributes]
    for i, j in enumerate(nearest):
        for x, a in zip(made, attributes, strict=True):
            trades = random.random(x.shape[1]) < p
            e, other = x[i].copy(), x[j].copy()
            swapped = trades & a.categorical
            x[i, swapped], x[j, swapped] = other[swapped], e[swapped]
            drawn = trades & ~a.categorical
            sd = np.abs(e[drawn] - other[drawn]) / s
            x[i, drawn] = random.normal(other[drawn], sd)
            x[j, drawn] = random.normal(e[drawn], sd)
    return made
