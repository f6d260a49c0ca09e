"""`Artifact`: the files of one export and how to run them; `Check` and `Measurement`: what is known about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.errors import DeploykitError, unknown
from deploykit.core.precision import Precision

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
class Port:
    """An input or output as it is stored in a file; `TensorSpec` is what the model means by it."""

    name: str
    shape: tuple[int | str, ...]
    """In the file's order of axes."""
    dtype: str
    scale: float | None = None
    """Integers stand for ``scale * (integer - zero_point)``; None: values are stored as they are meant."""
    zero_point: int | None = None


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
    parts: tuple[str, ...] = ()
    """Files that belong to it and lie beside it, e.g. the weights of an OpenVINO model."""
    untimed: str = ""
    """Why times taken on this machine say nothing about the device the file is for; empty where they do."""
    bytes: int | None = None
    """What it takes on the device, where that is not its size on disk (source that is compiled there)."""
    inputs: tuple[Port, ...] = ()
    """In the file's order; empty where it takes what the model takes."""
    outputs: tuple[Port, ...] = ()
    steps: tuple[str, ...] = ()
    """The hub steps that its integers went through, as ``Pass(options)``."""
    read_instead: str = ""
    """The file the device makes this precision from, where it cannot read this one, which then shows what it costs."""

    def size(self, folder: Path) -> int:
        """Bytes on the device; on disk, its parts included, where nothing else is known."""
        if self.bytes is not None:
            return self.bytes
        return sum((folder / name).stat().st_size for name in (self.path, *self.parts))


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
    cpu_ms: float | None = None
    """Processor time per call over all threads, the median; measured on devices."""

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


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        """One line."""
        precisions = ", ".join(f.precision for f in self.files)
        sides = (", ".join(f"{s.name} {_listed(s.shape)}" for s in side) for side in (self.inputs, self.outputs))
        return f"<Artifact {self.folder} for {self.target}: {precisions}; {' -> '.join(sides)}>"

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
        for name, array in arrays.items():
            _refuse_shape(expected[name], array.shape)
        if precision not in self._open:
            self._open[precision] = self.runner(precision)
        return self._open[precision](arrays)


def _refuse_shape(spec: TensorSpec, given: tuple[int, ...]) -> None:
    """Raises unless an array fits an input; any number of samples does."""
    rest = spec.shape[1:]
    if _fits(given[1:], rest) and len(given) == len(spec.shape):
        return
    hint = ""
    if _fits(given, rest):
        hint = f" Add the batch dimension: {spec.name}[None]."
    elif len(given) == 4 and _fits((given[3], given[1], given[2]), rest):
        hint = f" These are channels-last: {spec.name}.transpose(0, 3, 1, 2)."
    elif len(given) == 3 and _fits((given[2], given[0], given[1]), rest):
        hint = f" This is one channels-last image: {spec.name}.transpose(2, 0, 1)[None]."
    raise DeploykitError(
        f"input '{spec.name}' has the shape {_listed(given)}; this artifact takes {_listed(spec.shape)}.{hint}"
    )


def _fits(given: tuple[int, ...], wanted: tuple[int | str, ...]) -> bool:
    return len(given) == len(wanted) and all(isinstance(w, str) or g == w for g, w in zip(given, wanted, strict=True))


def _listed(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
