"""What long work has found so far, so that a run that was cut goes on where it was.

A result is a file named by a hash of everything it depends on: what is not the same any more is not found. Where work
is one piece (training), the state that it is in takes the place of results: `Journal.note` and `Journal.noted`.
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
EVERY = 30.0
"""Seconds between two notes of the state that work is in."""
SHARE = 0.02
"""Of the time, that taking them may cost: large states are noted less often."""
SUFFIX = ".kept"


@dataclass(frozen=True)
class Journal:
    """Results by name, in a folder; without a folder nothing is kept."""

    folder: Path | None = None
    what: str = ""
    """Hash of what all results of this journal depend on."""
    later: tuple[Callable[[], str], ...] = ()
    """What they depend on, too, and takes long to tell: asked only where a result is looked for."""

    def of(self, *parts: str | bytes | int | Callable[[], str]) -> Journal:
        """The journal of work that depends on these, too.

        Args:
            parts: functions among them are asked later, and should remember what they answer.
        """
        digest = hashlib.sha256(self.what.encode())
        later = [part for part in parts if callable(part)]
        for part in parts:
            if not callable(part):
                own = part if isinstance(part, bytes) else str(part).encode()
                digest.update(len(own).to_bytes(8, "little") + own)
        return replace(self, what=digest.hexdigest(), later=(*self.later, *later))

    def once(self, name: str, compute: Callable[[], Arrays]) -> Arrays:
        """What was computed under that name before, or is now.

        Args:
            name: tells the results of one journal apart.
            compute: arrays by name, always the same.
        """
        if self.folder is None:
            return compute()
        path = self._path(name)
        found = _read(path)
        if found is not None:
            return found
        started = time.monotonic()
        found = compute()
        if time.monotonic() - started >= WORTH:
            from safetensors.numpy import save

            _write(path, save({name: np.array(array, order="C") for name, array in found.items()}))
        return found

    def note(self, name: str, state: bytes) -> None:
        """Keeps the state that a piece of work is in, in the place of the last one."""
        if self.folder is not None:
            _write(self._path(name), state)

    def noted(self, name: str) -> bytes | None:
        """The state that was kept last under that name."""
        with contextlib.suppress(OSError):
            return None if self.folder is None or not self.results() else self._path(name).read_bytes()
        return None

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        whole = self.of(name, *[f"{ask()}" for ask in self.later])
        return self.folder / f"{whole.what[:32]}{SUFFIX}"

    def forget(self) -> None:
        """Removes everything."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def results(self) -> int:
        """How many there are."""
        return 0 if self.folder is None else len(list(self.folder.glob(f"*{SUFFIX}")))

    def announce(self) -> None:
        """Says that a run goes on where one was cut."""
        if self.results():
            say(f"going on where a run was cut: {self.results()} results are in {self.folder}")


NOTHING_KEPT = Journal()


class Pace:
    """When the state that work is in is worth a note, and the next: work of seconds is not worth one."""

    def __init__(self) -> None:
        """Work begins."""
        self._next = time.monotonic() + EVERY

    @property
    def due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() >= self._next

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """While a note is taken."""
        started = time.monotonic()
        yield
        ended = time.monotonic()
        self._next = ended + max(EVERY, (ended - started) / SHARE)


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


def _write(path: Path, content: bytes) -> None:
    """Completely or not at all; a full disk costs nothing but the results."""
    work = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work.write_bytes(content)
        work.replace(path)
    except OSError:
        work.unlink(missing_ok=True)
