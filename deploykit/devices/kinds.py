"""How artifacts are run on a device, by exporter: ``run_NAME.py``, or the artifact's own ``infer.py``.

Every such module has the same functions:

* ``lacks(facts, exporter) -> str``: what is missing there to time the files and how to get it; empty: nothing.
* ``mute(facts, exporter) -> str``: why the files cannot answer samples there; empty: they can.
* ``send(device, facts, folder, manifest, room) -> Work`` copies the artifact where ``room`` more bytes stay free.
* ``measure(device, facts, works, asked, feeds) -> Found`` times all files of all the artifacts in turns.
* ``computed_by(device, facts, work) -> str``: what computes the answers there, with its version.
* ``answer(device, facts, tasks, arrays, key, threads)`` runs a chunk of samples and leaves every task's outputs in its
  file there, whole or not at all; ``read(path, work) -> arrays`` reads such a file, once fetched.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from deploykit.core.artifact import File
from deploykit.core.device import Facts
from deploykit.core.manifest import Manifest
from deploykit.devices.device import Device
from deploykit.devices.work import Asked, Found, Work

if TYPE_CHECKING:
    from numpy.typing import NDArray

Arrays = Mapping[str, "NDArray[Any]"]


@dataclass(frozen=True)
class Task:
    """One file that shall answer a chunk of samples, and where its outputs go."""

    work: Work
    file: File
    outputs: str
    """Path there."""


class Kind(Protocol):
    """What a ``run_NAME`` module offers."""

    def lacks(self, facts: Facts, exporter: str) -> str:
        """What is missing there to time the files."""
        ...

    def mute(self, facts: Facts, exporter: str) -> str:
        """Why the files cannot answer samples there."""
        ...

    def send(self, device: Device, facts: Facts, folder: Path, manifest: Manifest, room: int = 0) -> Work:
        """Copies the artifact."""
        ...

    def measure(
        self, device: Device, facts: Facts, works: Sequence[Work], asked: Asked, feeds: Sequence[Arrays]
    ) -> Found:
        """Times the files."""
        ...

    def computed_by(self, device: Device, facts: Facts, work: Work) -> str:
        """What computes the answers there, with its version."""
        ...

    def answer(
        self, device: Device, facts: Facts, tasks: Sequence[Task], arrays: Arrays, key: str, threads: int
    ) -> None:
        """Runs a chunk of samples."""
        ...

    def read(self, path: Path, work: Work) -> dict[str, NDArray[Any]]:
        """The outputs in a fetched file."""
        ...


def kind(exporter: str) -> Kind:
    """The module for an exporter's artifacts."""
    name = f"deploykit.devices.run_{exporter}"
    return cast(Kind, importlib.import_module(name if find_spec(name) else "deploykit.devices.run_infer"))
