"""`Chain`: what ``chain.json`` says, and how the segments run one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from deploykit import exporters
from deploykit.core.artifact import Arrays, Runner
from deploykit.core.errors import DeploykitError, unknown
from deploykit.core.manifest import load_intact
from deploykit.exits import thresholds as rules

if TYPE_CHECKING:
    from numpy.typing import NDArray

NAME = "chain.json"
FORMAT = "deploykit-chain-1"
WHOLE = "whole"
"""The folder of the network in one file, with all answers and cuts for outputs: to look at, not to deploy."""


@dataclass(frozen=True)
class Segment:
    """One piece of the network."""

    folder: str
    """An artifact beside ``chain.json``."""
    answer: str
    """The output that holds the logits of its exit."""
    macs: int
    """Multiply-accumulates of one sample."""


@dataclass(frozen=True)
class Point:
    """What other thresholds would come to, on the samples that all figures are of."""

    thresholds: tuple[float, ...]
    accuracy: float
    """Percent."""
    macs: float
    """Mean over samples."""
    ms: float | None
    """Mean over samples on the machine that wrote it; None: not measured."""


@dataclass(frozen=True)
class Variant:
    """The chain in one precision: when samples leave, and what that came to."""

    thresholds: tuple[float, ...]
    """Of all segments but the last: a sample leaves where the largest probability is above it."""
    chosen_on: int
    """Samples that thresholds were chosen on; 0: they were given."""
    scored_on: int
    """Other samples, which all figures below are of."""
    accuracy: float
    """Percent; where there are no labels, percent of answers that are the last exit's."""
    last_accuracy: float
    """When nobody leaves early."""
    exits: tuple[float, ...]
    """Percent of right answers of each exit on all samples."""
    shares: tuple[float, ...]
    """Of the samples, that leave by each exit."""
    macs: float
    """Mean over samples."""
    whole: float
    """Largest difference between an answer of the chain and that of the file in ``whole``."""
    ms: tuple[float, ...] = ()
    """Of each segment alone, medians on the machine that wrote it; empty: not measured."""
    frontier: tuple[Point, ...] = ()
    """The most accurate thresholds for mean costs from the first exit's to the last's, on the samples that thresholds
    are chosen on; on those that figures are of, a dearer one may do worse."""

    @property
    def mean_ms(self) -> float | None:
        """Mean over samples; None: not measured."""
        return mean_ms(self.ms, self.shares)


def mean_ms(ms: Sequence[float], shares: Sequence[float]) -> float | None:
    """Of samples that leave by each exit in these shares, with milliseconds of every segment; None without these."""
    return float(np.cumsum(ms) @ np.asarray(shares)) if ms else None


@dataclass(frozen=True)
class Chain:
    """``chain.json``."""

    target: str
    exporter: str
    model: str
    segments: tuple[Segment, ...]
    variants: Mapping[str, Variant]
    """By precision."""
    ensemble: bool = False
    """Every exit answers the mean of the probabilities up to it."""
    labels: bool = True
    """Whether accuracy is against labels."""
    format: str = FORMAT

    def save(self, folder: Path) -> None:
        """Writes ``chain.json``."""
        (folder / NAME).write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

    def variant(self, precision: str | None) -> tuple[str, Variant]:
        """That of a precision; without one, the last, which is the most compressed."""
        if precision is None:
            precision = list(self.variants)[-1]
        if precision not in self.variants:
            raise unknown("precision", precision, self.variants)
        return precision, self.variants[precision]


def load_chain(folder: str | Path) -> Chain:
    """Reads ``chain.json``, and makes sure that the files of all segments are there as they were written.

    Raises:
        DeploykitError: no chain, or segments that are missing or altered (all of them named).
    """
    folder = Path(folder)
    path = folder / NAME
    if not path.is_file():
        raise DeploykitError(f"{folder} is not a folder that `deploykit exits` wrote: no {NAME}")
    try:
        chain = msgspec.json.decode(path.read_bytes(), type=Chain)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise DeploykitError(f"{path} is not what `deploykit exits` wrote: {error}") from None
    if chain.format != FORMAT:
        raise DeploykitError(f"{path} has format '{chain.format}'; this deploykit reads '{FORMAT}': write it again")
    problems = []
    for segment in chain.segments:
        try:
            load_intact(folder / segment.folder)
        except DeploykitError as error:
            problems.append(str(error))
    if problems:
        raise DeploykitError(f"the chain in {folder} is not whole: {' '.join(problems)}")
    for variant in chain.variants.values():
        rules.check(variant.thresholds, len(chain.segments))
    return chain


@dataclass(frozen=True)
class Running:
    """A chain whose files are open. Call it with arrays ``[n, ...]`` by input name."""

    runners: tuple[Runner, ...]
    answers: tuple[str, ...]
    """The output of each that holds its logits."""
    thresholds: tuple[float, ...]
    ensemble: bool = False

    def __call__(self, inputs: Arrays) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Probabilities ``[n, classes]``, and by which exit ``[n]`` each sample left, counted from 0."""
        count = len(next(iter(inputs.values())))
        singles = [self._one({name: a[i : i + 1] for name, a in inputs.items()}) for i in range(count)]
        return np.stack([p for p, _ in singles]), np.asarray([k for _, k in singles], np.int64)

    def every_exit(self, inputs: Arrays) -> NDArray[Any]:
        """The logits of all exits, ``[exits, n, classes]``: nobody leaves."""
        found: list[NDArray[Any]] = []
        for run, answer in zip(self.runners, self.answers, strict=True):
            outputs = run(inputs)
            found.append(outputs[answer])
            inputs = {name: x for name, x in outputs.items() if name != answer}
        return np.stack(found)

    def _one(self, inputs: Arrays) -> tuple[NDArray[np.float64], int]:
        """One sample; every call of NumPy counts here, so this is `probabilities` for a single row."""
        total: NDArray[np.float64] | float = 0.0
        last = len(self.runners) - 1
        for k, (run, answer) in enumerate(zip(self.runners, self.answers, strict=True)):
            outputs = run(inputs)
            z = outputs.pop(answer)[0].astype(np.float64)
            e = np.exp(z - z.max())
            p: NDArray[np.float64] = e / e.sum()
            if self.ensemble:
                total = total + p
                p = total / (k + 1)
            if k == last or p.max() > self.thresholds[k]:
                return p, k
            inputs = outputs
        raise AssertionError("the last exit takes everybody")


def open_chain(
    folder: str | Path, precision: str | None = None, thresholds: Sequence[float] | None = None, threads: int = 1
) -> Running:
    """Opens a chain in its runtime.

    Args:
        folder: that `deploykit exits` wrote.
        precision: without one, the most compressed.
        thresholds: in place of those of the chain.
        threads: of the runtime.

    Raises:
        DeploykitError: as `load_chain`; thresholds outside [0, 1] or not one per exit in front of the last.
    """
    chain = load_chain(folder)
    name, variant = chain.variant(precision)
    chosen = variant.thresholds if thresholds is None else tuple(thresholds)
    rules.check(chosen, len(chain.segments))
    runners = tuple(exporters.open_artifact(Path(folder) / s.folder).runner(name, threads) for s in chain.segments)
    return Running(runners, tuple(s.answer for s in chain.segments), chosen, chain.ensemble)
