"""`Manifest`: all that is known about an artifact, and enough to make it again; ``manifest.json`` in its folder."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import cast

import msgspec

from deploykit.core.artifact import Check, File, Measurement, TensorSpec
from deploykit.core.data import Preprocess
from deploykit.core.device import Facts
from deploykit.core.errors import DeploykitError
from deploykit.core.machine import Machine
from deploykit.core.precision import FORMATS, Precision, is_integer
from deploykit.core.recipe import dump_recipe
from deploykit.core.request import Request

FORMAT = "deploykit-artifact-2"
NAME = "manifest.json"


@dataclass(frozen=True)
class Source:
    """A data set that was used."""

    origin: str
    samples: int
    hash: str


@dataclass(frozen=True)
class Score:
    """How well one file does, against labels and against the model as it came in. None: not measured."""

    precision: str
    samples: int
    data: str
    """Which samples, e.g. ``"eval"`` or ``"every fifth calibration sample, held out"``."""
    metric: float | None
    """Top-1 accuracy in percent, or what ``--metric`` returned."""
    agreement: float | None
    """Percent of samples with the same top-1 class as the original model."""
    cross_entropy: float | None
    """With labels, in nats."""
    sqnr_db: Mapping[str, float]
    """Signal to quantization noise of each output against the original model, in dB."""
    saturated: float | None = None
    """Percent of samples whose largest output value is the largest the format can hold."""


@dataclass(frozen=True)
class OperatorError:
    """How far one integer operator of a file is from the hub, with forced inputs."""

    layer: str
    operator: str
    lsb: float
    """Largest difference, in least significant bits of the output."""
    mismatch: float
    """Percent of the outputs that differ by more than a quarter of a step although they are no ties."""
    sqnr_db: float
    """Signal to noise of this operator quantized alone, fed with what the float network feeds it."""
    precision: Precision = "int8"
    """Of the file; one that shares its hub (int8-fp16) is not looked at again."""


@dataclass(frozen=True)
class Finding:
    """What a step found out on its way: a table, and a curve where it has one."""

    step: str
    """As ``Pass(options)``."""
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]
    """None: not measured."""
    curve: tuple[str, str] | None = None
    """The columns that are drawn, y over x."""
    heat: tuple[str, str, str] | None = None
    """The columns of a map of coloured cells: what its rows, its columns and its cells are."""
    summary: str = ""
    """What whoever started it should read at once; empty: nothing."""


@dataclass(frozen=True)
class Layer:
    """One operator of the network."""

    name: str
    operator: str
    inputs: int | None = None
    """Channels that a product multiplies, of one group; None: it is no product with constant weights."""
    outputs: int | None = None
    """Channels that it gives."""
    weights: int = 0
    """How many."""


@dataclass(frozen=True)
class Stored:
    """A file on disk."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Written last, so a folder without one is not an artifact."""

    target: str
    exporter: str
    model: str
    request: Request
    """What was asked for, enough to ask again."""
    steps: tuple[str, ...]
    """What was run, as ``Pass(options)``; hub steps of all files, each of which has a list of its own."""
    graph: str
    """Hash of the float graph."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    files: tuple[File, ...]
    stored: tuple[Stored, ...]
    data: Mapping[str, Source] = field(default_factory=dict)
    preprocess: Preprocess | None = None
    classes: tuple[str, ...] = ()
    """Names of the classes the first output scores, where the data had them."""
    checks: tuple[Check, ...] = ()
    operators: tuple[OperatorError, ...] = ()
    """The integer operators one by one, precision by precision, the worst first."""
    layers: tuple[Layer, ...] = ()
    """All operators that quantizing decided about, integer or not, in the network's order."""
    findings: tuple[Finding, ...] = ()
    """Of the steps, in the order in which they ran."""
    scores: tuple[Score, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    advice: tuple[str, ...] = ()
    """What the measurements suggest, one sentence each."""
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Machine | None = None
    """Where it was made."""
    device: Facts | None = None
    """Where it was tried with ``--device``: what that device said about itself."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """CPU seconds by phase."""
    format: str = FORMAT

    @property
    def passed(self) -> bool:
        """Whether no check failed. Checks that could not run here (``passed`` None) do not count as passed."""
        return all(check.passed is not False for check in self.checks)

    def operators_of(self, precision: str) -> tuple[OperatorError, ...]:
        """The integer operators of the hub that the file of a precision was written from, the worst first."""
        numbers = FORMATS[cast(Precision, precision)].numbers if is_integer(precision) else None
        return tuple(o for o in self.operators if FORMATS[o.precision].numbers == numbers)

    @property
    def recipe(self) -> str:
        """TOML."""
        return dump_recipe(self.request.settings.recipe)

    @property
    def seed(self) -> int:
        """Of everything random."""
        return self.request.settings.seed

    @property
    def thresholds(self) -> str:
        """How ranges were chosen."""
        return self.request.settings.thresholds

    def to_json(self) -> str:
        """What ``manifest.json`` holds."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode() + "\n"

    def save(self, folder: Path) -> None:
        """Writes ``manifest.json``."""
        (folder / NAME).write_bytes(self.to_json().encode())


SOURCE = "deploykit source"
"""In ``versions``: a hash of deploykit's own files, which under development change more often than its version."""


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    names = (
        "deploykit", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "ai-edge-litert", "openvino",
        "accelerate", "numpy", "pillow",
    )  # fmt: skip
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {SOURCE: _source_hash()}


def _source_hash() -> str:
    files = {}
    for package in ("deploykit", "deploykit.exporters", "deploykit.calibration", "deploykit.targets"):
        root = Path(str(resources.files(package)))  # the last three may be links, which rglob does not follow
        for path in root.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                files[f"{package.replace('.', '/')}/{path.relative_to(root).as_posix()}"] = path
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def load_manifest(folder: Path) -> Manifest:
    """Reads an artifact's manifest.

    Raises:
        DeploykitError: no folder, no manifest in it, or one of another format.
    """
    if not folder.is_dir():
        raise DeploykitError(f"no folder {folder}; give one that `deploykit export` wrote")
    path = folder / NAME
    if not path.is_file():
        below = sorted(p.parent.name for p in folder.glob(f"*/{NAME}"))
        hint = f" There are artifacts below it: {', '.join(below)}." if below else ""
        raise DeploykitError(f"{folder} has no {NAME}: it is not an artifact of `deploykit export`.{hint}")
    return _read(path)


def open_manifest(source: Path) -> Manifest:
    """Reads a manifest, given an artifact's folder or the ``manifest.json`` alone.

    Raises:
        DeploykitError: not a manifest, or one of another format; a folder whose files are not those it tells of.
    """
    return _read(source) if source.is_file() else load_intact(source)


def _read(path: Path) -> Manifest:
    """Reads a ``manifest.json``, wherever it lies.

    Raises:
        DeploykitError: not a manifest, or one of another format.
    """
    try:
        text = path.read_bytes()
        written = msgspec.json.decode(text, type=_Format).format
        if written != FORMAT:
            raise DeploykitError(f"{path} has format '{written}'; this deploykit reads '{FORMAT}': export it again")
        return msgspec.json.decode(text, type=Manifest)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise DeploykitError(f"{path} is not a manifest that deploykit wrote: {error}") from None


@dataclass(frozen=True)
class _Format:
    format: str


def stored_files(folder: Path) -> tuple[Stored, ...]:
    """Every file in a folder but the manifest, with its size and hash, sorted by path."""
    found = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != NAME]
    return tuple(
        Stored(p.relative_to(folder).as_posix(), p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in found
    )


def changed_files(folder: Path, manifest: Manifest) -> list[str]:
    """What differs from the manifest, one sentence each: missing, truncated or altered files."""
    listed = {stored.path for stored in manifest.stored}
    problems = [f"{f.path} is not among the files that were written" for f in manifest.files if f.path not in listed]
    if not manifest.files or not manifest.inputs:
        problems.append("its manifest names no files or no inputs")
    for stored in manifest.stored:
        path = folder / stored.path
        if not path.is_file():
            problems.append(f"{stored.path} is missing")
        elif path.stat().st_size != stored.bytes:
            problems.append(f"{stored.path} has {path.stat().st_size} bytes, {stored.bytes} were written")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != stored.sha256:
            problems.append(f"{stored.path} was changed after the export")
    return problems


def load_intact(folder: Path) -> Manifest:
    """Reads an artifact's manifest and makes sure that it describes the files that are there.

    Raises:
        DeploykitError: not an artifact, or files that are missing, truncated or altered (all of them named).
    """
    manifest = load_manifest(folder)
    problems = changed_files(folder, manifest)
    if problems:
        raise DeploykitError(
            f"{folder} is not what `deploykit export` wrote: {'; '.join(problems)}. Export it again, or copy it whole."
        )
    return manifest
