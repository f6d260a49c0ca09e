"""What long work has found so far, so that a run that was cut goes on where it was.

A result is a file named by a hash of everything it depends on: what is not the same any more is not found.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.progress import say

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

WORTH = 0.2
"""Seconds: what is made faster is made again."""


@dataclass(frozen=True)
class Journal:
    """Results by name, in a folder; without a folder nothing is kept."""

    folder: Path | None = None
    what: str = ""
    """Hash of what all results of this journal depend on."""

    def of(self, *parts: str | bytes | int) -> Journal:
        """The journal of work that depends on these, too."""
        digest = hashlib.sha256(self.what.encode())
        for part in parts:
            own = part if isinstance(part, bytes) else str(part).encode()
            digest.update(len(own).to_bytes(8, "little") + own)
        return replace(self, what=digest.hexdigest())

    def once(self, name: str, compute: Callable[[], Arrays]) -> Arrays:
        """What was computed under that name before, or is now.

        Args:
            name: tells the results of one journal apart.
            compute: arrays by name, always the same.
        """
        if self.folder is None:
            return compute()
        path = self.folder / f"{self.of(name).what[:32]}.safetensors"
        found = _read(path)
        if found is not None:
            return found
        started = time.monotonic()
        found = compute()
        if time.monotonic() - started >= WORTH:
            _write(path, found)
        return found

    def forget(self) -> None:
        """Removes everything."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def results(self) -> int:
        """How many there are."""
        return 0 if self.folder is None else len(list(self.folder.glob("*.safetensors")))

    def announce(self) -> None:
        """Says that a run goes on where one was cut."""
        if self.results():
            say(f"going on where a run was cut: {self.results()} results are in {self.folder}")


NOTHING_KEPT = Journal()


@contextlib.contextmanager
def beside(destination: Path) -> Iterator[Journal]:
    """The journal of a run that writes a folder. It outlives the run only where that is killed or interrupted."""
    destination = destination.resolve()
    folder = destination.with_name(f".{destination.name}.deploykit-journal")
    journal = Journal(folder).of(importlib.metadata.version("deploykit"))
    journal.announce()
    try:
        yield journal
    except KeyboardInterrupt:
        if journal.results():
            say(f"what was found so far is kept in {journal.folder}: the same command goes on from there")
        raise
    except BaseException:
        journal.forget()
        raise
    journal.forget()


def _read(path: Path) -> Arrays | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError):  # not there, or damaged: it is made again
        return None


def _write(path: Path, arrays: Arrays) -> None:
    """Completely or not at all; a full disk costs nothing but the results."""
    from safetensors.numpy import save

    work = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work.write_bytes(save({name: np.array(array, order="C") for name, array in arrays.items()}))
        work.replace(path)
    except OSError:
        work.unlink(missing_ok=True)
