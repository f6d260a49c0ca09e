"""`Artifact`: the files of one export and how to run them; `Check` and `Measurement`: what is known about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.errors import DeploykitError, unknown
from deploykit.core.target import Precision

if TYPE_CHECKING:
    from numpy.typing import NDArray

Arrays = Mapping[str, "NDArray[Any]"]
Runner = Callable[[Arrays], dict[str, "NDArray[Any]"]]
"""Runs one file in its own runtime: float (or index) arrays by input name in, float arrays by output name out.
Quantizing inputs, dequantizing outputs and splitting a batch for a fixed-batch file are the runner's business."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: its name, its shape (a name stands for a free dimension), its numpy dtype."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class Island:
    """An operator that stayed in float in an integer file, and why."""

    operator: str
    layer: str
    why: str


@dataclass(frozen=True)
class File:
    """One runnable file of an artifact."""

    path: str
    """Relative to the artifact's folder."""
    precision: Precision
    quantized: Mapping[str, int] = field(default_factory=dict)
    """How many operators of each kind are integer."""
    islands: tuple[Island, ...] = ()
    notes: tuple[str, ...] = ()
    """What the user should know about this file, one sentence each."""


@dataclass(frozen=True)
class Check:
    """One thing that was compared, with the bound it had to meet. ``passed`` is None where it could not run here."""

    name: str
    precision: str
    value: float | None
    bound: float | None
    passed: bool | None
    detail: str = ""


@dataclass(frozen=True)
class Measurement:
    """Speed and size of one file. None means not measured, never 0. Times are milliseconds per call."""

    precision: str
    batch: int
    threads: int
    runs: int
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    per_second: float | None
    peak_mb: float | None
    """Growth of the process's peak resident memory while loading and running the file, in MB (10^6 bytes)."""
    bytes: int
    where: str
    """Machine and runtime, e.g. ``"this machine: AMD EPYC 7B13, onnxruntime 1.31.1"``."""

    @property
    def spread(self) -> float | None:
        """p90 / p50: near 1 on a quiet machine. None where nothing was timed."""
        return self.p90_ms / self.p50_ms if self.p50_ms and self.p90_ms is not None else None


@dataclass(frozen=True)
class Runtime:
    """What an exporter's ``load`` runs files with on this machine."""

    name: str
    """With its version, e.g. ``"onnxruntime 1.31.1"``."""
    untimed: str = ""
    """Why times taken in it say nothing about the device, e.g. ``"needs TensorRT on the device (run build.sh
    there)"``; empty where they may be taken."""


@dataclass(frozen=True)
class Artifact:
    """What an export wrote. Call it with arrays (or torch tensors) to run a file through its real runtime."""

    folder: Path
    target: str
    exporter: str
    files: tuple[File, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    load: Callable[[Path, int], Runner]
    """The exporter's ``load(path, threads)``."""
    _open: dict[str | None, Runner] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Runners of files that were called already."""

    def file(self, precision: str | None = None) -> File:
        """The file of that precision; without one, the last, which is the most compressed.

        Raises:
            DeploykitError: there is no file of that precision.
        """
        if precision is None:
            return self.files[-1]
        for file in self.files:
            if file.precision == precision:
                return file
        raise unknown("precision", precision, [f.precision for f in self.files])

    def runner(self, precision: str | None = None, threads: int = 1) -> Runner:
        """Opens a file in its runtime."""
        return self.load(self.folder / self.file(precision).path, threads)

    def __call__(self, *args: Any, precision: str | None = None, **named: Any) -> dict[str, NDArray[Any]]:
        """Runs the artifact on inputs given in order or by name, with a leading batch dimension.

        Raises:
            DeploykitError: inputs that do not fit the artifact's.
        """
        inputs = {spec.name: value for spec, value in zip(self.inputs, args, strict=False)} | named
        expected = {spec.name: spec for spec in self.inputs}
        if len(args) > len(expected) or set(inputs) != set(expected):
            raise DeploykitError(f"this artifact takes the inputs {', '.join(expected)}; given: {', '.join(inputs)}")
        arrays = {
            n: np.asarray(v.detach().cpu() if hasattr(v, "detach") else v, dtype=expected[n].dtype)
            for n, v in inputs.items()
        }
        if precision not in self._open:
            self._open[precision] = self.runner(precision)
        return self._open[precision](arrays)
