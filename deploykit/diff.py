"""``deploykit diff``: what changed between two artifacts of a model, and whether that is a step back.

Only figures of one kind are compared: accuracy on the same samples, times taken in one place. What cannot be compared
is said, and does not count as a regression.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from deploykit.core.artifact import File, Measurement
from deploykit.core.errors import GateFailed
from deploykit.core.figures import MISSING, file_size, milliseconds, number, quotient
from deploykit.core.manifest import Manifest, Score

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Limits:
    """What is still no regression."""

    max_drop: float = 0.5
    """Points of accuracy (of agreement with the original model, where there is no accuracy)."""
    max_growth: float = 1.0
    """Percent of a file's bytes."""
    max_slower: float = 20.0
    """Percent of p50. Two runs on a quiet machine differ by some percent, and are not made side by side."""
    max_float: int = 0
    """Operators that were integer and are float."""


@dataclass(frozen=True)
class Pair:
    """One figure, before and now. None: not measured, or (with a reason) not comparable."""

    old: float | None
    new: float | None
    why_not: str = ""
    """Why the two cannot be compared."""

    @property
    def change(self) -> float | None:
        """New less old."""
        return None if self.new is None or self.old is None or self.why_not else self.new - self.old

    @property
    def percent(self) -> float | None:
        """Growth in percent of the old value."""
        return 100.0 * self.change / self.old if self.change is not None and self.old else None


@dataclass(frozen=True)
class FileChange:
    """One precision, before and now."""

    precision: str
    bytes: Pair
    accuracy: Pair
    agreement: Pair
    p50_ms: Pair
    became_float: tuple[str, ...]
    """Layers that were integer: ``operator layer: why``."""
    became_integer: tuple[str, ...]
    counts: Mapping[str, tuple[int, int]]
    """Integer operators by kind, where their number changed."""


@dataclass(frozen=True)
class Difference:
    """Everything that changed between two artifacts."""

    files: tuple[FileChange, ...]
    facts: Mapping[str, tuple[str, str]]
    """Settings, inputs and versions that changed, by name."""
    not_compared: tuple[str, ...]
    regressions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; None where nothing was measured."""
        return {
            "files": msgspec.to_builtins(self.files),
            "changed": {name: list(pair) for name, pair in self.facts.items()},
            "not_compared": list(self.not_compared),
            "regressions": list(self.regressions),
        }

    def refuse_failed(self, old: Path, new: Path) -> None:
        """Raises GateFailed where the new one is worse than allowed."""
        if self.regressions:
            raise GateFailed("\n  ".join([f"{new} is a step back from {old}:", *self.regressions]))

    def table(self) -> Table:
        """One line per precision: before, now."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("precision")
        for heading in ("size", "", "accuracy %", "agreement %", "p50 ms", ""):
            table.add_column(heading, justify="right")
        for f in self.files:
            size = None if f.bytes.percent is None else 1 + f.bytes.percent / 100
            time = None if f.p50_ms.percent is None else 1 + f.p50_ms.percent / 100
            table.add_row(
                f.precision,
                _both(*(file_size(None if v is None else int(v)) for v in (f.bytes.old, f.bytes.new))),
                quotient(size) if size is not None else "",
                _both(number(f.accuracy.old), number(f.accuracy.new)),
                _both(number(f.agreement.old), number(f.agreement.new)),
                _both(milliseconds(f.p50_ms.old), milliseconds(f.p50_ms.new)),
                quotient(time) if time is not None else "",
            )
        return table

    def lines(self) -> Iterator[str]:
        """What the table does not say, one sentence each."""
        for f in self.files:
            yield from (f"{f.precision}: now float: {name}" for name in f.became_float)
            yield from (f"{f.precision}: now integer: {name}" for name in f.became_integer)
            for kind, (old, new) in f.counts.items():
                yield f"{f.precision}: {old} -> {new} integer {kind}"
        yield from (f"changed: {name}: {old} -> {new}" for name, (old, new) in self.facts.items())
        yield from (f"not compared: {sentence}" for sentence in self.not_compared)
        yield from (f"regression: {sentence}" for sentence in self.regressions)
        if not self.regressions:
            yield "no regression"


def compare(old: Manifest, new: Manifest, limits: Limits | None = None) -> Difference:
    """What changed from one artifact to another, and which of it is worse than the limits allow.

    A precision that is no longer written, inputs or outputs that look different, and a check that fails now are
    regressions whatever the limits.
    """
    limits = limits or Limits()
    precisions = list(dict.fromkeys(f.precision for m in (old, new) for f in m.files))
    files = tuple(_file(precision, old, new) for precision in precisions)
    skipped = [
        f"{what} of the {f.precision} files: {pair.why_not}"
        for f in files
        for what, pair in (("accuracy and agreement", f.accuracy), ("latency", f.p50_ms))
        if pair.why_not
    ]
    failed = {(c.name, c.precision) for c in old.checks if c.passed is False}
    regressions = [
        *_interface(old, new),
        *(sentence for f in files for sentence in _regressions(f, limits)),
        *(
            f"{c.precision}: {c.name} fails: {number(c.value)}, bound {number(c.bound)}"
            for c in new.checks
            if c.passed is False and (c.name, c.precision) not in failed
        ),
    ]
    return Difference(files, facts(old, new), tuple(dict.fromkeys(skipped)), tuple(regressions))


def facts(old: Manifest, new: Manifest) -> dict[str, tuple[str, str]]:
    """What went into the artifacts and is not the same: settings, files read, data, versions, machine."""
    before, now = (dict(_facts(manifest)) for manifest in (old, new))
    names = dict.fromkeys([*before, *now])
    return {n: (before.get(n, MISSING), now.get(n, MISSING)) for n in names if before.get(n) != now.get(n)}


def _facts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    request = msgspec.to_builtins(manifest.request)
    read, recipe = request.pop("read"), request["settings"].pop("recipe")
    for name, value in _flat({"target": manifest.target, "steps": manifest.steps, **request, **recipe}):
        yield name, value
    yield "float graph", manifest.graph
    for role, source in manifest.data.items():
        yield f"{role} data, {source.samples} samples", source.hash
    for path, digest in read.items():
        yield f"file {path}", digest
    for package, version in manifest.versions.items():
        yield f"version of {package}", version
    if manifest.machine is not None:
        for name, value in _flat({"machine": msgspec.to_builtins(manifest.machine)}):
            yield name, value


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested tables as ``a.b`` and text."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield name, ", ".join(map(str, value)) or "none"
    else:
        yield name, MISSING if value is None else str(value)


@dataclass(frozen=True)
class _Seen:
    """What a manifest says about one precision."""

    bytes: int | None
    score: Score | None
    measurement: Measurement | None
    floats: Mapping[str, str]
    counts: Mapping[str, int]

    @staticmethod
    def of(manifest: Manifest, precision: str) -> _Seen:
        file = next((f for f in manifest.files if f.precision == precision), None)
        scores = [s for s in manifest.scores if s.precision == precision]
        score = scores[-1] if scores else None  # those of a device come before those of the export
        timed = (m for m in manifest.measurements if m.precision == precision and m.p50_ms is not None)
        return _Seen(
            None if file is None else _bytes(file, manifest),
            score,
            next(timed, None),
            {f"{i.operator} {i.layer}": i.why for i in file.islands} if file else {},
            file.quantized if file else {},
        )


def _file(precision: str, old: Manifest, new: Manifest) -> FileChange:
    before, now = _Seen.of(old, precision), _Seen.of(new, precision)
    scores = [(seen.score.metric, seen.score.agreement) if seen.score else (None, None) for seen in (before, now)]
    data = _other_data(old, new, before.score, now.score)
    times = [seen.measurement.p50_ms if seen.measurement else None for seen in (before, now)]
    both = before.bytes is not None and now.bytes is not None
    kinds = sorted({*before.counts, *now.counts}) if both else []
    return FileChange(
        precision,
        Pair(before.bytes, now.bytes),
        Pair(scores[0][0], scores[1][0], data),
        Pair(scores[0][1], scores[1][1], data),
        Pair(times[0], times[1], _other_place(old, new, before.measurement, now.measurement)),
        tuple(f"{layer}: {why}" for layer, why in now.floats.items() if both and layer not in before.floats),
        tuple(layer for layer in before.floats if both and layer not in now.floats),
        {
            kind: (before.counts.get(kind, 0), now.counts.get(kind, 0))
            for kind in kinds
            if before.counts.get(kind, 0) != now.counts.get(kind, 0)
        },
    )


def _bytes(file: File, manifest: Manifest) -> int:
    """What it takes on the device; on disk, its parts included, where nothing else is known."""
    return file.bytes or sum(s.bytes for s in manifest.stored if s.path in (file.path, *file.parts))


def _other_data(old: Manifest, new: Manifest, before: Score | None, now: Score | None) -> str:
    """Why scores cannot be compared; empty where they can, or there are none."""
    if before is None or now is None:
        return ""
    first, second = (m.data.get("eval") or m.data.get("holdout") for m in (old, new))
    if first is not None and second is not None and first.hash != second.hash:
        names = f"{first.origin}, {first.samples} samples; {second.origin}, {second.samples} samples"
    elif before.samples != now.samples or (before.data != now.data and (first is None or second is None)):
        names = f"{before.data}, {before.samples} samples; {now.data}, {now.samples} samples"
    else:
        return ""
    return f"evaluated on other data ({names})"


def _other_place(old: Manifest, new: Manifest, before: Measurement | None, now: Measurement | None) -> str:
    """Why times cannot be compared; empty where they can, or there are none."""
    if before is None or now is None:
        return ""
    if _place(before, old) != _place(now, new):
        return f"timed in different places ({before.where}; {now.where})"
    if (before.batch, before.threads) != (now.batch, now.threads):
        return f"timed with batch {before.batch} and {before.threads} threads; {now.batch} and {now.threads}"
    return ""


def _place(measurement: Measurement, manifest: Manifest) -> str:
    """The machine. The runtime behind it, which may have commas of its own, may be another: that is what an update
    changes."""
    name = measurement.where.partition(": ")[0]
    known = [] if manifest.device is None else [manifest.device.text]
    known += [] if manifest.machine is None else [f"{name}: {manifest.machine.processor}"]
    cut = measurement.where.rpartition(", ")[0] or measurement.where
    return next((place for place in known if measurement.where.startswith(f"{place}, ")), cut)


def _interface(old: Manifest, new: Manifest) -> Iterator[str]:
    for what, before, now in (("inputs", old.inputs, new.inputs), ("outputs", old.outputs, new.outputs)):
        if before != now:
            listed = (", ".join(f"{s.name} {s.dtype} {list(s.shape)}" for s in specs) for specs in (before, now))
            yield f"the {what} are others: {' -> '.join(listed)}"


def _regressions(f: FileChange, limits: Limits) -> Iterator[str]:
    if f.bytes.old is not None and f.bytes.new is None:
        yield f"{f.precision}: there is no such file any more"
        return
    growth, slower = f.bytes.percent, f.p50_ms.percent
    if growth is not None and growth > limits.max_growth:
        yield f"{f.precision}: {growth:.1f} % larger (allowed: {limits.max_growth:g} %)"
    name, lost = ("accuracy", f.accuracy) if f.accuracy.change is not None else ("agreement", f.agreement)
    if lost.change is not None and -lost.change > limits.max_drop:
        yield f"{f.precision}: {-lost.change:.2f} points of {name} lost (allowed: {limits.max_drop:g})"
    if slower is not None and slower > limits.max_slower:
        yield f"{f.precision}: {slower:.0f} % slower (allowed: {limits.max_slower:g} %)"
    if len(f.became_float) > limits.max_float:
        yield f"{f.precision}: {len(f.became_float)} operators fell back to float (allowed: {limits.max_float})"


def _both(old: str, new: str) -> str:
    return old if old == new else f"{old} -> {new}"
