"""`DataSet`: inputs (and labels) by forward-argument name, iterated again and again, with a content hash."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.errors import DeploykitError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Sample = Mapping[str, "NDArray[Any]"]


HELD_OUT = 5
"""Where nothing else is there to be judged on, every so many samples one is: spread, because folders are sorted by
class."""


@dataclass(frozen=True)
class Preprocess:
    """What happens to an image before the network sees it: the ``[preprocess]`` table, kept in the manifest.

    Applied in this order: resize (shorter side, bilinear) -> centre crop -> x * scale -> (x - mean) / std -> layout.
    Sizes are rounded as torchvision does: the longer side is cut to a whole number, the crop's corner is rounded.
    """

    resize: int | None = None
    """Length of the shorter side after resizing, in pixels; the aspect ratio is kept."""
    crop: int | tuple[int, int] | None = None
    """Centre crop: side, or (height, width)."""
    scale: float = 1.0 / 255.0
    """Multiplies the 0..255 pixel values."""
    mean: tuple[float, ...] = ()
    """Per channel in the order of ``channels`` (or one for all), after scaling."""
    std: tuple[float, ...] = ()
    """As ``mean``."""
    layout: str = "NCHW"
    """What the network takes: NCHW or NHWC."""
    channels: str = "RGB"
    """RGB, BGR or L (grey)."""

    def __post_init__(self) -> None:
        """Refuses what cannot be applied."""
        if self.layout not in ("NCHW", "NHWC"):
            raise ValueError("layout must be NCHW or NHWC")
        if self.channels not in ("RGB", "BGR", "L"):
            raise ValueError("channels must be RGB, BGR or L")
        if not all(s > 0 for s in self.std):
            raise ValueError("std must be above 0")
        if len(self.mean) not in (0, 1, self.depth) or len(self.std) not in (0, 1, self.depth):
            raise ValueError(f"mean and std take one value, or one for each of the {self.depth} channels")
        sides = self.crop if isinstance(self.crop, tuple) else (self.crop,)
        if any(side is not None and side < 1 for side in (self.resize, *sides)):
            raise ValueError("resize and crop must be at least 1 pixel")

    @property
    def depth(self) -> int:
        """How many channels."""
        return 1 if self.channels == "L" else 3


@dataclass(frozen=True)
class Batch:
    """Some samples stacked: arrays ``[n, ...]`` by input name, and labels ``[n]`` int64 where there are any."""

    inputs: dict[str, NDArray[Any]]
    labels: NDArray[Any] | None


@dataclass(frozen=True)
class DataSet:
    """Samples that are produced one at a time, so that memory does not grow with their number.

    Args:
        sample: the preprocessed inputs of sample ``i``, each without a batch dimension.
        index: which samples belong to this set, in order.
        labels: one per entry of ``index``, or None.
        origin: where it came from, for messages and the manifest.
        preprocess: what was declared about images; None for data used as it came.
        classes: the names behind the labels, where they are known.
        pixels: the same samples before scale, mean, std and layout: images are uint8 ``[h, w, c]``, resized and
            cropped, their channels in the declared order; None for data used as it came.
        synthetic: made up, where there is no real data. Files are calibrated with it and never judged by it.
    """

    sample: Callable[[int], Sample]
    index: tuple[int, ...]
    labels: NDArray[Any] | None = None
    origin: str = "memory"
    preprocess: Preprocess | None = None
    classes: tuple[str, ...] = field(default=())
    pixels: Callable[[int], Sample] | None = None
    synthetic: bool = False

    @staticmethod
    def of(inputs: Mapping[str, NDArray[Any]], labels: NDArray[Any] | None = None, origin: str = "memory") -> DataSet:
        """A data set over whole arrays ``[n, ...]``.

        Raises:
            DeploykitError: nothing in it, or lengths that differ.
        """
        lengths = {name: len(a) for name, a in inputs.items()}
        if labels is not None:
            lengths["labels"] = len(labels)
        if not inputs or len(set(lengths.values())) != 1:
            raise DeploykitError(f"{origin}: inputs and labels must have the same length; given {lengths}")
        count = next(iter(lengths.values()))
        if count == 0:
            raise DeploykitError(f"{origin}: there is not a single sample")
        return DataSet(lambda i: {name: a[i] for name, a in inputs.items()}, tuple(range(count)), labels, origin)

    def __len__(self) -> int:
        """How many samples."""
        return len(self.index)

    def batches(self, size: int, order: NDArray[Any] | None = None) -> Iterator[Batch]:
        """Batches of up to ``size`` samples, in order or in the order of the positions given."""
        positions = np.arange(len(self)) if order is None else order
        for start in range(0, len(positions), size):
            chosen = positions[start : start + size]
            samples = [self.sample(self.index[p]) for p in chosen]
            inputs = {name: np.stack([s[name] for s in samples]) for name in samples[0]}
            yield Batch(inputs, None if self.labels is None else np.asarray(self.labels)[chosen])

    def take(self, positions: slice) -> DataSet:
        """A part of this set."""
        labels = None if self.labels is None else self.labels[positions]
        return replace(self, index=self.index[positions], labels=labels)

    def spread(self, count: int) -> DataSet:
        """At most ``count`` samples, evenly spaced over the set."""
        return self if count >= len(self) else self.pick(evenly(len(self), count))

    def pick(self, chosen: NDArray[Any]) -> DataSet:
        """The samples at the given positions."""
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, index=tuple(self.index[i] for i in chosen), labels=labels)

    def as_pixels(self) -> DataSet:
        """The same samples as raw pixels, for files that scale and normalise themselves.

        Raises:
            DeploykitError: it is not known what the pixels were.
        """
        if self.pixels is None or self.preprocess is None:
            raise DeploykitError(
                f"{self.origin}: files that take uint8 pixels need image data: a folder of images, or uint8 arrays "
                "[n, h, w, c] with a declared preprocessing (--mean, --std or --preprocess)"
            )
        left = replace(self.preprocess, scale=1.0, mean=(), std=(), layout="NHWC")
        return replace(self, sample=self.pixels, preprocess=left, pixels=None)

    @cached_property
    def hash(self) -> str:
        """SHA-256 (first 16 hex digits) over names, dtypes, shapes, values and labels, sample by sample."""
        digest = Digest()
        for batch in self.batches(1):
            digest.add(batch)
        return digest.result()


class Digest:
    """The content hash of a data set, for whoever passes over its samples anyway."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self._sha = hashlib.sha256()

    def add(self, batch: Batch) -> None:
        """The next sample, as a batch of one."""
        for name, array in sorted(batch.inputs.items()):
            self._sha.update(f"{name} {array.dtype} {array.shape[1:]}".encode())
            self._sha.update(np.ascontiguousarray(array).data)
        if batch.labels is not None:
            self._sha.update(np.ascontiguousarray(batch.labels).data)

    def result(self) -> str:
        """16 hex digits."""
        return self._sha.hexdigest()[:16]


def held_out(total: int) -> NDArray[np.bool_]:
    """Which of some samples are kept apart to be judged on ``[total]``."""
    return np.asarray(np.arange(total) % HELD_OUT == HELD_OUT - 1)


def evenly(total: int, count: int) -> NDArray[np.int64]:
    """At most ``count`` of the positions 0 .. total - 1, evenly spaced."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)
