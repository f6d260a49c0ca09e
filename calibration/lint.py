"""What is wrong with calibration data, in sentences: copies, blank and grey images, mixed or wrong preparation, skew.

Samples are looked at while they pass by, a few thousand values of each. Whether they are prepared as in training is
judged against the statistics that batch normalisation kept of the training data (`Normed`), where the network has some.
Every bound was set between what clean data of real networks gives and what planted faults give; tests hold both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.data import Batch, DataSet
from deploykit.core.errors import some

if TYPE_CHECKING:
    from numpy.typing import NDArray

START = "calibration data: "
"""Every finding begins so."""
VALUES = 4096
"""Looked at of every input of a sample, evenly spaced."""
COPIES, GREY = 0.05, 0.2
"""Shares of the samples: below, copies do no harm, and grey pictures are part of a natural set (1 to 2 % of
ImageNet)."""
COLOURLESS = 1e-4
"""Share of a channel's variance that another channel does not explain: grey images 0 (JPEG 2e-5), colours 1e-3 up."""
LOUD = 16.0
"""Spread of one sample over that of the median sample: 0..255 among normalised images is 60, natural ones up to 3."""
VARIANCE, SHIFT = (0.3, 2.0), 0.5
"""What the first normalisation reads, against training. 8 images of CIFAR-10 and ImageNet: variance 0.5 to 1.2 times
that of training, means up to 0.4 standard deviations off. Images in 0..1 where ±1 or standardised ones are expected:
variance 0.07 to 0.19; standardised in place of ±1: 2.7."""
SILENT = 0.05
"""A channel that varies less than this share of what it did in training."""
FAR, FARTHEST = 0.3, 0.8
"""Channel means of all layers off those of training, in standard deviations, root mean square. The median layer on
clean data: up to 0.13; noise instead of images: 0.6. The worst layer on clean data: up to 0.35; on noise: 1.2."""
SKEW = 4.0
"""The largest class over the average class, with five samples per class and more: by chance at most 2.6."""


@dataclass(frozen=True)
class Normed:
    """What a batch normalisation reads on some samples, against what it read in training."""

    name: str
    variance: float
    """Over that of training, the median channel."""
    shift: float
    """Of the channels' means, in standard deviations, root mean square."""
    silent: float
    """Share of the channels whose variance is less than `SILENT` of that in training."""


class Lint:
    """Looks at samples one by one (`add`), then says what it found.

    Args:
        data: what the samples are of; its labels are looked at, its samples only where two look alike.
        classes: how many classes the network tells apart; None: not known.
    """

    def __init__(self, data: DataSet, classes: int | None = None) -> None:
        """Nothing seen yet."""
        self._data, self._classes = data, classes
        self._first: dict[bytes, int] = {}
        self._copies: list[tuple[int, int]] = []
        self._blank: list[int] = []
        self._grey: list[int] = []
        self._colour = 0
        self._spread: list[float] = []
        self._low, self._high, self._whole = np.inf, -np.inf, True
        self._count = 0

    def add(self, batch: Batch) -> None:
        """The next sample, as a batch of one."""
        number, self._count = self._count, self._count + 1
        digest = hashlib.blake2b(digest_size=16)
        for name, array in sorted(batch.inputs.items()):
            flat = array.reshape(-1)
            some_values = np.ascontiguousarray(flat[:: max(1, flat.size // VALUES)])
            digest.update(name.encode() + some_values.tobytes())
            if array.ndim > 2 and array.dtype.kind in "fu":  # images, sound, series: not columns, tokens or masks
                self._look(number, array[0], some_values)
        earlier = self._first.setdefault(digest.digest(), number)
        if earlier != number:
            self._copies.append((earlier, number))

    def _look(self, number: int, array: NDArray[Any], values: NDArray[Any]) -> None:
        low, high = float(values.min()), float(values.max())
        self._low, self._high = min(self._low, low), max(self._high, high)
        self._whole = self._whole and bool((values == np.rint(values)).all())
        self._spread.append(float(values.std(dtype=np.float64)))
        if low == high and (array == low).all():
            self._blank.append(number)
            return
        channels = _three_channels(array)
        if channels is not None:
            self._colour += 1
            if _is_grey(channels):
                self._grey.append(number)

    def findings(self, first: Normed | None = None, shifts: Mapping[str, float] | None = None) -> tuple[str, ...]:
        """One sentence each, with what to do.

        Args:
            first: what the first batch normalisation reads; None: the network has none, or it is not known.
            shifts: by layer, how far the means of its channels are off those of training (as `Normed.shift`).
        """
        prepared = self._prepared(first)
        found = [
            *prepared,
            *([] if prepared else self._strange(shifts or {})),
            *self._alike(),
            *self._blanks(),
            *self._greys(first),
            *self._loud(),
            *self._skew(),
        ]
        return tuple(f"{START}{sentence}" for sentence in found)

    def _prepared(self, first: Normed | None) -> list[str]:
        """Whether the samples are prepared as in training."""
        between = f"Inputs lie between {self._low:.4g} and {self._high:.4g}"
        if first is None:
            raw = self._whole and self._low >= 0 and 128 < self._high <= 255
            ask = "right only if the network was trained on such; otherwise give --scale, --mean and --std"
            return [f"inputs are whole numbers between 0 and {self._high:.0f}, raw pixels: {ask}"] if raw else []
        low, high = VARIANCE
        if low <= first.variance <= high and first.shift <= SHIFT:
            return []
        return [
            f"prepared otherwise than in training? The variance that '{first.name}', the first batch normalisation, "
            f"reads is {_figure(first.variance)} times that of training, its mean {_figure(first.shift)} standard "
            f"deviations off. {between}; give the --scale, --mean and --std of training (or --preprocess)"
        ]

    def _strange(self, shifts: Mapping[str, float]) -> list[str]:
        """Whether they are like the training data for the layers behind."""
        if not shifts:
            return []
        worst, middle = max(shifts, key=lambda name: shifts[name]), float(np.median(list(shifts.values())))
        if middle <= FAR and shifts[worst] <= FARTHEST:
            return []
        return [
            f"unlike the training data: channel means are {middle:.2f} standard deviations off those that batch "
            f"normalisation kept of it in the median layer, and {shifts[worst]:.2f} in '{worst}'; take samples like "
            "those the network was trained on, prepared in the same way"
        ]

    def _alike(self) -> list[str]:
        if len(self._copies) <= COPIES * self._count:
            return []
        if not all(_equal(self._data, *pair) for pair in self._copies[:4]):  # alike in the values looked at only
            return []
        left = self._count - len(self._copies)
        one, other = self._copies[0]
        return [
            f"{len(self._copies)} of {self._count} samples are copies of others (sample {other} of {one}), so ranges "
            f"rest on {left}; give samples that differ"
        ]

    def _blanks(self) -> list[str]:
        if not self._blank:
            return []
        which = some([str(i) for i in self._blank], 5)
        count = f"{len(self._blank)} of {self._count}"
        return [f"{count} samples are blank, one value everywhere ({which}); leave them out"]

    def _greys(self, first: Normed | None) -> list[str]:
        share = len(self._grey) / max(self._colour, 1)
        if share < GREY:
            return []
        if share == 1.0:  # of a network trained on grey images all channels are alive
            if first is None or not first.silent:
                return []
            return [
                f"all {self._colour} images are grey, and the network was trained on colours: {100 * first.silent:.0f} "
                f"% of the channels that '{first.name}' reads hardly vary on them; give colour images"
            ]
        which = some([str(i) for i in self._grey], 5)
        return [
            f"{len(self._grey)} of {self._colour} images are grey (samples {which}), which says little about the "
            "network's colour channels; give more colour images"
        ]

    def _loud(self) -> list[str]:
        usual = float(np.median(self._spread)) if self._spread else 0.0
        loud = [i for i, spread in enumerate(self._spread) if usual > 0 and spread > LOUD * usual]
        if not loud:
            return []
        most = max(self._spread) / usual
        which = some([str(i) for i in loud], 5)
        return [
            f"{len(loud)} of {len(self._spread)} samples vary up to {most:.0f} times as much as the others ({which}), "
            "and they alone set the ranges; prepare all samples in the same way"
        ]

    def _skew(self) -> list[str]:
        labels = self._data.labels
        if labels is None or labels.ndim != 1 or labels.dtype.kind != "i" or labels.min() < 0:
            return []
        classes = self._classes or int(labels.max()) + 1
        counts = np.bincount(labels, minlength=classes)
        if classes < 2 or len(counts) > classes:
            return []
        seen, samples = int((counts > 0).sum()), len(labels)
        expected = classes * (1 - (1 - 1 / classes) ** samples)
        if seen <= expected / 2:
            return [
                f"{samples} samples of {seen} of the {classes} classes, where a random choice has {expected:.0f}; take "
                "samples of all classes"
            ]
        if samples < 5 * classes:
            return []
        missing = [self._named(i) for i in np.flatnonzero(counts == 0)]
        if missing:
            return [f"no samples of {len(missing)} of the {classes} classes ({some(missing, 5)}); add some of each"]
        largest = int(counts.argmax())
        if counts[largest] > SKEW * samples / classes:
            share = 100 * counts[largest] / samples
            return [
                f"{share:.0f} % of the samples are of one class of {classes}, {self._named(largest)}; take about as "
                "many of each, unless the device will see them so"
            ]
        return []

    def _named(self, label: Any) -> str:
        names = self._data.classes
        return f"'{names[label]}'" if len(names) > label else str(label)


def _three_channels(array: NDArray[Any]) -> NDArray[np.float64] | None:
    """Some pixels ``[3, n]`` of an image ``[3, h, w]`` or ``[h, w, 3]``; None: it is no colour image."""
    if array.ndim != 3 or 3 not in (array.shape[0], array.shape[2]):
        return None
    flat = array.reshape(3, -1) if array.shape[0] == 3 else array.reshape(-1, 3).T
    return flat[:, :: max(1, flat.shape[1] // (VALUES // 4))].astype(np.float64)


def _is_grey(channels: NDArray[np.float64]) -> bool:
    """Whether every channel follows from the first: c = a g + b, where normalising by channel set a and b."""
    centred = channels - channels.mean(axis=1, keepdims=True)
    power = (centred**2).sum(axis=1)
    if not power.all():
        return False
    unexplained = 1.0 - (centred[1:] @ centred[0]) ** 2 / (power[1:] * power[0])
    return bool((unexplained < COLOURLESS).all())


def _figure(value: float) -> str:
    """Two digits, and none behind the point of large values."""
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"


def _equal(data: DataSet, one: int, other: int) -> bool:
    a, b = data.sample(data.index[one]), data.sample(data.index[other])
    return all(np.array_equal(a[name], b[name]) for name in a)


def classes_of(outputs: Sequence[Any]) -> int | None:
    """How many classes a network tells apart, by the shape of its first output; None: it gives no class scores."""
    shape = outputs[0].shape if outputs else None
    if shape is None or len(shape) != 2 or not isinstance(shape[1], int) or shape[1] < 2:
        return None
    return int(shape[1])
