"""`Benchmark`: what one run measured, file over file, and what to conclude."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from deploykit.core.artifact import Artifact, File, Measurement
from deploykit.core.figures import file_size, milliseconds, number, quotient

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.table import Table

    from deploykit.bench.drift import Drift
    from deploykit.core.device import Facts

CLEAR = 0.75
"""A file is called faster than another if it was in this share of the rounds (of 50, by chance: below 1 in 1000)."""
MATTERS = 1.05
"""Nobody is advised to take another file for less than 5 %."""
BUSY = 1.5
"""Above this p90 / p50, something else was using the machine."""


@dataclass(frozen=True)
class Timing:
    """One file's measurement, and the time of each of its calls so that files of one run can be compared."""

    artifact: Artifact
    file: File
    measurement: Measurement
    milliseconds: NDArray[np.float64]
    """[rounds]; empty: not run here."""


@dataclass(frozen=True)
class Ratio:
    """One file over another of the same run; below 1 is faster, or smaller. None: not measured."""

    of: Timing
    over: Timing
    time: float | None
    """Median over the rounds of the quotient of the two times in that round."""
    faster: float | None
    """Share of the rounds in which ``of`` was the faster one."""
    bytes: float
    memory: float | None

    @property
    def verdict(self) -> str:
        """``faster``, ``slower`` or ``as fast``, as the rounds agree on; empty where nothing was timed."""
        if self.faster is None:
            return ""
        return "faster" if self.faster >= CLEAR else "slower" if self.faster <= 1.0 - CLEAR else "as fast"


def ratio(of: Timing, over: Timing) -> Ratio:
    """Two files of one run side by side."""
    time = faster = memory = None
    mine, theirs = of.measurement, over.measurement
    if len(of.milliseconds) and len(of.milliseconds) == len(over.milliseconds):
        quotients = of.milliseconds / over.milliseconds
        time, faster = float(np.median(quotients)), float((quotients < 1).mean())
    elif mine.p50_ms is not None and theirs.p50_ms:  # not taken in turns: nothing is said about who is faster
        time = mine.p50_ms / theirs.p50_ms
    if mine.peak_mb is not None and theirs.peak_mb:
        memory = mine.peak_mb / theirs.peak_mb
    return Ratio(of, over, time, faster, mine.bytes / theirs.bytes, memory)


def short(folder: Path, folders: Sequence[Path]) -> str:
    """A folder's name where that tells it from the others, else its whole path."""
    return folder.name if len({f.name for f in folders}) == len(folders) else str(folder)


@dataclass(frozen=True)
class Benchmark:
    """One run: a timing per file."""

    timings: tuple[Timing, ...]
    drifts: tuple[Drift, ...] = ()
    """One per file of a sustained run."""
    device: Facts | None = None
    """None: this machine, in this process."""

    @cached_property
    def groups(self) -> tuple[tuple[Timing, ...], ...]:
        """The timings of each artifact."""
        artifacts = {id(t.artifact): t.artifact for t in self.timings}
        return tuple(tuple(t for t in self.timings if t.artifact is a) for a in artifacts.values())

    @property
    def ratios(self) -> tuple[Ratio, ...]:
        """Every file over its artifact's first, the baseline; then each precision of the first artifact over the same
        precision of the others."""
        first, *others = self.groups
        inside = [ratio(t, group[0]) for group in self.groups for t in group[1:]]
        pairs = [(a, b) for group in others for a in first for b in group if a.file.precision == b.file.precision]
        return (*inside, *(ratio(a, b) for a, b in pairs))

    @property
    def advice(self) -> tuple[str, ...]:
        """What the user should do or know, one sentence each; nothing where all is as hoped."""
        sentences = []
        for group in self.groups:
            smallest = group[-1]
            beaten_by = [r for r in (ratio(smallest, other) for other in group[:-1]) if _is_beaten(r)]
            if beaten_by:
                worst = max(beaten_by, key=lambda r: r.time or 0.0)
                instead = worst.over
                sentences.append(
                    f"{self.name(smallest)} is slower than {self.name(instead)} here "
                    f"({number(worst.time)} times): use {instead.file.path}"
                )
        spread = max((s for t in self.timings if (s := t.measurement.spread) is not None), default=1.0)
        sentences += [sentence for d in self.drifts if (sentence := d.advice(self.name(d.timing)))]
        if spread > BUSY:
            machine = "this machine" if self.device is None else self.device.name
            sentences.append(
                f"{machine} was busy (p90 is up to {spread:.1f} times p50): trust the ratios, which compare calls "
                "made side by side, more than the milliseconds"
            )
        return tuple(sentences)

    def name(self, timing: Timing) -> str:
        """``int8``, or ``out int8`` where there are several artifacts (with the whole path if ``out`` is no name)."""
        if len(self.groups) == 1:
            return timing.file.precision
        folders = [group[0].artifact.folder for group in self.groups]
        return f"{short(timing.artifact.folder, folders)} {timing.file.precision}"

    def table(self) -> Table:
        """One line per file, then one line per comparison, for the terminal."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, caption_justify="left", caption_style="")
        table.add_column("file")
        for heading in ("p50 ms", "p90 ms", "p99 ms", "p90/p50", "per second", "peak MB", "size"):
            table.add_column(heading, justify="right")
        places: dict[str, list[str]] = {}
        for timing in self.timings:
            m = timing.measurement
            places.setdefault(_how(m), []).append(self.name(timing))
            times = (milliseconds(t) for t in (m.p50_ms, m.p90_ms, m.p99_ms))
            figures = (number(m.spread), number(m.per_second, 0), number(m.peak_mb, 1), file_size(m.bytes))
            table.add_row(self.name(timing), *times, *figures)
        for i, found in enumerate(self.ratios):
            if i == 0:
                table.add_section()
            label = f"{self.name(found.of)} / {self.name(found.over)}"
            time = (quotient(found.time), f"({found.verdict})" if found.verdict else "")
            table.add_row(label, *time, "", "", "", quotient(found.memory), quotient(found.bytes))
        for i, drift in enumerate(self.drifts):
            if i == 0:
                table.add_section()
            label = f"{self.name(drift.timing)} after {drift.windows[-1].seconds / 60:.1f} minutes"
            table.add_row(label, milliseconds(drift.sustained_ms), quotient(drift.factor))
        table.caption = "\n".join(f"{', '.join(names)}: {place}" for place, names in places.items())
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; None where nothing was measured."""
        return {
            "files": [
                {
                    "artifact": str(t.artifact.folder),
                    "path": t.file.path,
                    **msgspec.to_builtins(t.measurement),
                    "spread": t.measurement.spread,
                }
                for t in self.timings
            ],
            "ratios": [
                {
                    "of": self.name(r.of), "over": self.name(r.over), "time": r.time, "faster_in": r.faster,
                    "verdict": r.verdict, "bytes": r.bytes, "memory": r.memory,
                }
                for r in self.ratios
            ],
            "advice": list(self.advice),
            "drift": [d.to_dict() for d in self.drifts],
            "device": msgspec.to_builtins(self.device),
        }  # fmt: skip


def _how(m: Measurement) -> str:
    if not m.runs:
        return m.where
    return f"{m.where}; batch {m.batch}, {m.threads} thread{'s' if m.threads > 1 else ''}, {m.runs} rounds"


def _is_beaten(found: Ratio) -> bool:
    return found.verdict == "slower" and found.time is not None and found.time >= MATTERS
