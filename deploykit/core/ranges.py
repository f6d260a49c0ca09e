"""`Ranges`: raw statistics of a float graph's tensors on calibration data. Plain numbers, kept as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from deploykit.core.errors import DeploykitError
from deploykit.core.files import no_such_file, write_in_place

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = "deploykit-ranges-1"
AVERAGED = 64
"""Samples, evenly spread, that means are taken over: they settle long before the ends of a range do."""


@dataclass(frozen=True)
class Histogram:
    """Counts over equal bins of ``[-limit, limit)``."""

    limit: float
    counts: NDArray[np.int64]


@dataclass(frozen=True)
class Stats:
    """What is known about one tensor."""

    low: float
    high: float
    average_low: float
    """Mean over samples of each sample's minimum; `average_high` likewise (for moving-average ranges)."""
    average_high: float
    histogram: Histogram | None = None
    growth: tuple[tuple[float, float], ...] = ()
    """(low, high) on the parts of the data that `Ranges.parts` names, each within the next."""


@dataclass(frozen=True)
class Ranges:
    """Statistics by tensor name, with the hashes of the graph and the data they were measured on."""

    graph: str
    data: str
    samples: int
    tensors: Mapping[str, Stats] = field(default_factory=dict)
    means: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    """Mean per channel, over samples and positions, of the outputs of products (before their activation)."""
    parts: tuple[int, ...] = ()
    """Sizes of growing parts of the data, the last is all of it; empty: not kept (`deploykit.calibration.growth`)."""
    notes: tuple[str, ...] = ()
    """What is to be said about the samples, one sentence each (`deploykit.calibration.lint`)."""
    averaged: int = 0
    """How many samples, evenly spread, the means are over."""

    @property
    def has_histograms(self) -> bool:
        """Whether thresholds other than min-max can be chosen."""
        return all(s.histogram is not None for s in self.tensors.values())

    def save(self, path: Path) -> None:
        """Writes JSON that `load_ranges` reads back exactly.

        Raises:
            DeploykitError: the file cannot be written.
        """
        write_in_place(path, self.to_json())

    def to_json(self) -> str:
        """What `save` writes."""
        return json.dumps(self.to_dict(), indent=1)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        tensors: dict[str, Any] = {}
        for name, s in self.tensors.items():
            entry: dict[str, Any] = {
                "low": s.low, "high": s.high, "average_low": s.average_low, "average_high": s.average_high
            }  # fmt: skip
            if s.histogram is not None:
                entry["histogram"] = {"limit": s.histogram.limit, "counts": s.histogram.counts.tolist()}
            if s.growth:
                entry["growth"] = [list(pair) for pair in s.growth]
            tensors[name] = entry
        return {
            "format": FORMAT, "graph": self.graph, "data": self.data, "samples": self.samples,
            "parts": list(self.parts), "notes": list(self.notes), "tensors": tensors,
            "means": {name: mean.tolist() for name, mean in self.means.items()}, "averaged": self.averaged,
        }  # fmt: skip


@dataclass(frozen=True)
class _HistogramFile:
    limit: float
    counts: list[int]


@dataclass(frozen=True)
class _StatsFile:
    low: float
    high: float
    average_low: float
    average_high: float
    histogram: _HistogramFile | None = None
    growth: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class _RangesFile:
    format: str
    graph: str
    data: str
    samples: int
    tensors: dict[str, _StatsFile]
    means: dict[str, list[float]]
    parts: tuple[int, ...] = ()
    """This and what follows is not in older files of the format."""
    notes: tuple[str, ...] = ()
    averaged: int | None = None
    """Older files: all samples."""


def load_ranges(path: Path) -> Ranges:
    """Reads what `Ranges.save` wrote.

    Raises:
        DeploykitError: missing file, not JSON, or not ranges of this format.
    """
    try:
        raw = msgspec.json.decode(path.read_bytes(), type=_RangesFile)
    except FileNotFoundError:
        raise no_such_file(path) from None
    except OSError as error:
        raise DeploykitError(f"cannot read {path}: {error.strerror or error}") from None
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise DeploykitError(f"{path} is not a ranges file that `deploykit calibrate` wrote: {error}") from None
    if raw.format != FORMAT:
        raise DeploykitError(f"{path}: ranges format '{raw.format}' is not known; calibrate again")

    def stats(s: _StatsFile) -> Stats:
        histogram = None
        if s.histogram is not None:
            histogram = Histogram(s.histogram.limit, np.asarray(s.histogram.counts, np.int64))
        return Stats(s.low, s.high, s.average_low, s.average_high, histogram, s.growth)

    tensors = {name: stats(s) for name, s in raw.tensors.items()}
    means = {name: np.asarray(m, np.float64) for name, m in raw.means.items()}
    if any(len(s.growth) != len(raw.parts) for s in tensors.values()):
        raise DeploykitError(f"{path}: some tensors have no 'growth' for each of the 'parts'; calibrate again")
    averaged = raw.samples if raw.averaged is None else raw.averaged
    return Ranges(raw.graph, raw.data, raw.samples, tensors, means, raw.parts, raw.notes, averaged)
