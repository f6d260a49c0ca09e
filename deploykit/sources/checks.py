"""What data must be, checked once before any long work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.artifact import TensorSpec
from deploykit.core.context import Role
from deploykit.core.data import DataSet, Preprocess, Sample
from deploykit.core.errors import DeploykitError
from deploykit.core.progress import say

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOOKED_AT = 16
"""So many samples tell in which range values lie."""
MANY = 8.0
"""Values that differ by this factor were prepared differently (0..255 against normalised: some sixty-fold)."""


def check_labels(data: DataSet, classes: int) -> None:
    """Refuses labels that are no class numbers of a model with that many classes; data without labels passes.

    Raises:
        DeploykitError: labels that are no integers ``[n]``, or outside 0..classes-1, or from another set of class
            folders.
    """
    if data.labels is None:
        return
    if data.labels.ndim != 1 or data.labels.dtype.kind != "i":
        given = f"{data.labels.dtype} {list(data.labels.shape)}"
        raise DeploykitError(
            f"{data.origin}: labels must be class numbers, int64 [{len(data)}]; given {given}. "
            "Labels of another kind need a metric that reads them."
        )
    wrong = np.flatnonzero((data.labels < 0) | (data.labels >= classes))
    if len(wrong):
        label = int(data.labels[wrong[0]])
        shifted = int(data.labels.min()) == 1 and int(data.labels.max()) == classes
        hint = " They seem to start at 1: subtract 1." if shifted else ""
        raise DeploykitError(
            f"{data.origin}: sample {data.index[wrong[0]]} has label {label}; the model has {classes} classes, "
            f"0..{classes - 1}.{hint}"
        )
    if data.classes and len(data.classes) != classes:
        raise DeploykitError(
            f"{data.origin}: {len(data.classes)} class folders, the model has {classes} classes. Labels are positions "
            f"in the sorted folder names, so every class needs its folder (it may be empty)."
        )


def checked(data: DataSet, inputs: Sequence[TensorSpec], role: Role, looked_at: bool = False) -> DataSet:
    """The data set, if every sample can be fed to the model; ``looked_at``: its values are known to be good."""
    if len(data) < 2:
        raise DeploykitError(f"{data.origin}: {len(data)} sample; at least 2 are needed")
    first = data.sample(data.index[0])
    for spec in inputs:
        if spec.name not in first:
            raise DeploykitError(f"{data.origin}: no data for {spec.name}; it has {', '.join(first)}")
        _check_dtype(spec, first[spec.name], data)
        _check_shape(spec, first[spec.name].shape, data)
    if data.preprocess is None and not looked_at:  # pixels are finite, their sizes known from the headers
        for number, i in enumerate(data.index):
            check_values(data.sample(i), first, f"{data.origin}: sample {number}")
    for spec in inputs:  # what a factory's module takes is not known; most likely one image without the first axis
        if not spec.shape and first[spec.name].ndim == 2 and len(data) in (1, 3):
            given = " x ".join(map(str, first[spec.name].shape))
            say(
                f"note: {data.origin}: {len(data)} samples of '{spec.name}', each {given}. If that is one image, the "
                "axis of the samples is missing: [n, channels, height, width]"
            )
    if role == "calibration" and all(_equal(data.sample(i), first) for i in data.index[1:]):
        raise DeploykitError(f"{data.origin}: all {len(data)} samples are identical; nothing can be learned from them")
    return data


def check_magnitudes(data: Sequence[DataSet]) -> None:
    """Warns of data sets whose values differ many-fold: ranges learned from one would not hold for the other."""
    known: dict[str, tuple[float, float, str]] = {}
    for found in data if len(data) > 1 else ():
        batch = next(found.spread(LOOKED_AT).batches(LOOKED_AT)).inputs
        for name, array in batch.items():
            if array.dtype.kind != "f":
                continue
            here = (float(array.min()), float(array.max()), found.origin)
            low, high, origin = known.setdefault(name, here)
            largest = sorted(max(abs(a), abs(b)) for a, b in ((low, high), here[:2]))
            if largest[1] > MANY * largest[0]:
                say(
                    f"warning: '{name}' lies between {low:.4g} and {high:.4g} in {origin}, but between {here[0]:.4g} "
                    f"and {here[1]:.4g} in {found.origin}: prepare both as in training"
                )


def _check_dtype(spec: TensorSpec, array: NDArray[Any], data: DataSet) -> None:
    expected = spec.dtype or ("float32" if array.dtype.kind == "f" else array.dtype)
    if array.dtype == np.dtype(expected):
        return
    if array.dtype == np.uint8 and data.preprocess is None:
        hint = "If these are images [n, height, width, channels], declare [preprocess]."
    else:
        hint = f"Save it as {np.dtype(expected)}: array.astype('{np.dtype(expected)}')."
    raise DeploykitError(f"{data.origin}: '{spec.name}' is {array.dtype}, the model takes {expected}. {hint}")


def _check_shape(spec: TensorSpec, given: tuple[int, ...], data: DataSet) -> None:
    if not spec.shape:
        return
    expected = spec.shape[1:]
    if len(given) == len(expected) and all(isinstance(e, str) or e == g for e, g in zip(expected, given, strict=True)):
        return
    wanted = "[" + ", ".join(str(e) for e in expected) + "]"
    hint = _shape_hint(expected, given, data.preprocess)
    raise DeploykitError(
        f"{data.origin}: '{spec.name}' has samples {list(given)}, the model takes {wanted}. {hint}".rstrip()
    )


def _shape_hint(expected: tuple[int | str, ...], given: tuple[int, ...], p: Preprocess | None) -> str:
    """What to change so that the shapes agree."""
    if len(expected) != 3 or len(given) != 3:
        return ""
    moved_first, moved_last = (given[2], given[0], given[1]), (given[1], given[2], given[0])
    if p is None:
        if given[0] == 1 and given[1:] == expected[1:]:
            return f"These are grey: repeat the channel, array.repeat({expected[0]}, axis=1)."
        if moved_first == expected:
            return "Put the channels first: array.transpose(0, 3, 1, 2)."
        return "Put the channels last: array.transpose(0, 2, 3, 1)." if moved_last == expected else ""
    if (moved_first if p.layout == "NHWC" else moved_last) == expected:
        return f"Set layout = '{'NCHW' if p.layout == 'NHWC' else 'NHWC'}' in [preprocess]."
    depth, *size = expected if p.layout == "NCHW" else (expected[2], *expected[:2])
    if depth != p.depth and depth in (1, 3):
        return f"Set channels = '{'L' if depth == 1 else 'RGB'}' in [preprocess]."
    if all(isinstance(s, int) for s in size):
        crop = size[0] if size[0] == size[1] else size
        return f"Set crop = {crop} (and resize, if the images are smaller) in [preprocess]."
    return ""


def check_values(sample: Sample, first: Sample, where: str) -> None:
    """One sample has the shapes and dtypes of the first one, and finite numbers."""
    for name, array in sample.items():
        if array.shape != first[name].shape or array.dtype != first[name].dtype:
            raise DeploykitError(
                f"{where}: '{name}' is {array.dtype} {list(array.shape)}, "
                f"the first sample {first[name].dtype} {list(first[name].shape)}"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            what = "NaN" if np.isnan(array).any() else "inf"
            raise DeploykitError(f"{where}: '{name}' holds {what}")


def _equal(a: Sample, b: Sample) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in b)
