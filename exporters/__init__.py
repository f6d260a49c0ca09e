"""Exporters: `to_NAME.py` is the exporter NAME the moment it exists.

Every exporter module has the same three functions and nothing is inherited:

* ``export(hub, target, out_dir, precisions) -> tuple[File, ...]`` writes one file per precision into ``out_dir``;
  ``int8`` comes from ``hub.quantized``, the float precisions from ``hub.graph``. All operators it cannot write are
  named in one `DeploykitError`.
* ``load(path, threads) -> Runner`` opens a file in its real runtime: float arrays in, float arrays out.
* ``runtime() -> Runtime`` names that runtime, and says so where times taken in it mean nothing for the device.

A module may also have

* ``checks(hub, target, folder, file) -> tuple[Check, ...]``: what only it can compare;
* ``max_mismatch(target) -> float``: how many percent of a product's outputs may be one step off the hub because its
  kernels round otherwise by design;
* ``rehearse(hub, target, precisions, final)``: refuses what ``export`` would refuse, where that can be had for less
  than an export; ``final``: the model will be exported as large as it is here.

Heavy tools are imported inside the functions; a missing one raises `MissingExtra`.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Protocol, cast

from deploykit.core.artifact import Artifact, Check, File, Runner, Runtime
from deploykit.core.errors import unknown
from deploykit.core.manifest import load_intact
from deploykit.core.target import Precision, Target
from deploykit.hub.graph import Hub


class Exporter(Protocol):
    """What an exporter module offers."""

    def export(self, hub: Hub, target: Target, out_dir: Path, precisions: Sequence[Precision]) -> tuple[File, ...]:
        """Writes the files, the baseline first."""
        ...

    def load(self, path: Path, threads: int = 1) -> Runner:
        """Opens a file in its runtime."""
        ...

    def runtime(self) -> Runtime:
        """The runtime that `load` uses; imports it."""
        ...


def names() -> list[str]:
    """Every exporter's name, sorted."""
    folder = Path(str(resources.files("deploykit.exporters")))
    return sorted(p.stem.removeprefix("to_") for p in folder.glob("to_*.py"))


def load(name: str) -> Exporter:
    """The exporter module of that name.

    Raises:
        DeploykitError: there is none.
    """
    if name not in names():
        raise unknown("exporter", name, names())
    return cast(Exporter, importlib.import_module(f"deploykit.exporters.to_{name}"))


def own_checks(exporter: Exporter, hub: Hub, target: Target, folder: Path, file: File) -> tuple[Check, ...]:
    """What only this exporter can compare about a file it wrote; most have nothing of their own."""
    checks = getattr(exporter, "checks", None)
    return tuple(checks(hub, target, folder, file)) if checks is not None else ()


def max_mismatch(exporter: Exporter, target: Target) -> float:
    """Percent of a product's outputs that may be one step off the hub by design; 0 for most exporters."""
    found = getattr(exporter, "max_mismatch", None)
    return float(found(target)) if found is not None else 0.0


def rehearse(exporter: Exporter, hub: Hub, target: Target, precisions: Sequence[Precision], final: bool) -> None:
    """Refuses what an export would refuse, and leaves nothing behind.

    Args:
        exporter: of the target.
        hub: of the model as it came in.
        target: its options are validated too.
        precisions: what would be written.
        final: no step will make the model smaller, so that a budget it exceeds now is exceeded for good.
    """
    own = getattr(exporter, "rehearse", None)
    if own is not None:
        own(hub, target, precisions, final)
        return
    with tempfile.TemporaryDirectory() as folder:
        exporter.export(hub, target, Path(folder), precisions)


def open_artifact(folder: str | Path) -> Artifact:
    """The artifact in a folder that `deploykit export` wrote, ready to be called.

    Raises:
        DeploykitError: not an artifact, or one whose files were truncated or altered.
    """
    manifest = load_intact(Path(folder))
    run = load(manifest.exporter).load
    return Artifact(
        Path(folder), manifest.target, manifest.exporter, manifest.files, manifest.inputs, manifest.outputs, run
    )  # fmt: skip
