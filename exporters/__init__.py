"""Exporters: `to_NAME.py` is the exporter NAME the moment it exists.

Every exporter module has the same table and three functions, and nothing is inherited:

* ``CARRIES``: the precisions that it writes. ``WHY_NOT``: why it does not write some of the others.
* ``export(hubs, target, out_dir) -> tuple[File, ...]`` writes one file per precision into ``out_dir``, in the order of
  ``hubs``, each from its own hub: integers from ``hub.quantized``, floats from ``hub.graph``. All operators it cannot
  write are named in one `DeploykitError`.
* ``load(path, threads) -> Runner`` opens a file in its real runtime: float arrays in, float arrays out.
* ``runtime() -> Runtime`` names that runtime, and says so where times taken in it mean nothing for the device.

A module may also have

* ``checks(hub, target, folder, file) -> tuple[Check, ...]``: what only it can compare;
* ``max_mismatch(target, hub) -> float``: how many percent of a product's outputs may be one step off the hub
  because its kernels round otherwise by design;
* ``max_lsb(target, hub) -> float``: how many steps an operator may be off, where that is more than one;
* ``unlimited(target) -> Target``: the target without the budgets that ``export`` would refuse a file by;
* ``rehearse(hubs, target, final)``: refuses what ``export`` would refuse, where that can be had for less
  than an export; ``final``: the model will be exported as large as it is here.

Tools that are extras are imported inside the functions; a missing one raises `MissingExtra`.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Protocol, cast

from deploykit.core.artifact import Artifact, Check, File, Runner, Runtime
from deploykit.core.errors import DeploykitError, unknown
from deploykit.core.manifest import load_intact
from deploykit.core.precision import Precision, nearest
from deploykit.core.target import Target
from deploykit.hub.graph import Hub


class Exporter(Protocol):
    """What an exporter module offers."""

    CARRIES: tuple[Precision, ...]
    WHY_NOT: Mapping[Precision, str]

    def export(self, hubs: Mapping[Precision, Hub], target: Target, out_dir: Path) -> tuple[File, ...]:
        """Writes the files, in the order of the hubs."""
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


def max_mismatch(exporter: Exporter, target: Target, hub: Hub) -> float:
    """Percent of a product's outputs that may be one step off the hub by design; 0 for most exporters."""
    found = getattr(exporter, "max_mismatch", None)
    return float(found(target, hub)) if found is not None else 0.0


def max_lsb(exporter: Exporter, target: Target, hub: Hub) -> float:
    """Steps that an operator may be off the hub by design; 0 for most exporters."""
    found = getattr(exporter, "max_lsb", None)
    return float(found(target, hub)) if found is not None else 0.0


def refuse_uncarried(
    target: Target, precisions: Collection[Precision], carries: Sequence[Precision], why_not: Mapping[Precision, str]
) -> None:
    """Refuses what an exporter does not write.

    Args:
        target: its name and its exporter's stand in the message.
        precisions: what is wanted.
        carries: the exporter's `CARRIES`.
        why_not: the exporter's `WHY_NOT`.

    Raises:
        DeploykitError: says why, and which precision that it writes comes nearest.
    """
    for precision in precisions:
        if precision not in carries:
            why = f" ({why_not[precision]})" if precision in why_not else ""
            raise DeploykitError(
                f"target '{target.name}': the {target.exporter} exporter does not write {precision}{why}; it writes "
                f"{', '.join(carries)}. The nearest is --precision {nearest(precision, carries)}."
            )


def rehearse(exporter: Exporter, hubs: Mapping[Precision, Hub], target: Target, final: bool) -> None:
    """Refuses what an export would refuse, and leaves nothing behind.

    Args:
        exporter: of the target.
        hubs: of the model as it came in, by what would be written.
        target: its options are validated too.
        final: no step will make the model smaller, so that a budget it exceeds now is exceeded for good.
    """
    own = getattr(exporter, "rehearse", None)
    if own is not None:
        own(hubs, target, final)
        return
    with tempfile.TemporaryDirectory() as folder:
        exporter.export(hubs, target, Path(folder))


def unlimited(exporter: Exporter, target: Target) -> Target:
    """The target without budgets, to find out what a file takes that may be too large for it."""
    own = getattr(exporter, "unlimited", None)
    return cast(Target, own(target)) if own is not None else target


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
