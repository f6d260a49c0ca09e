"""Whole folders appear at once or not at all: written beside the destination, then moved in place."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from deploykit.core.errors import DeploykitError


def refuse_existing(destination: Path, overwrite: bool) -> None:
    """Raises a DeploykitError if the destination is taken and may not be replaced; call it before long work."""
    if destination.exists() and not overwrite:
        raise DeploykitError(f"{destination} already exists. Give another -o, or --overwrite to replace it.")
    if destination.is_file():
        raise DeploykitError(f"{destination} is a file; the output is a folder.")


@contextlib.contextmanager
def folder_in_place(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside the destination; on success it becomes the destination in one rename.

    A process killed at any moment leaves the destination absent, old or complete (and at worst a hidden
    ``.NAME.*`` folder beside it, which the next run removes).

    Raises:
        DeploykitError: the destination exists and ``overwrite`` is false; the disk is full or not writable.
    """
    destination = destination.absolute()
    refuse_existing(destination, overwrite)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _sweep(destination)
        work = Path(tempfile.mkdtemp(prefix=_prefix(destination), suffix=f".{os.getpid()}", dir=destination.parent))
    except OSError as error:
        raise _disk_error(destination, error) from None
    try:
        yield work
        os.chmod(work, 0o755)
        _swap(work, destination)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise _disk_error(destination, error) from None
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _swap(work: Path, destination: Path) -> None:
    """Renames the old destination aside, the new one in place; the old one comes back if that fails."""
    if not destination.exists():
        work.rename(destination)
        return
    aside = Path(f"{work}.old")
    destination.rename(aside)
    try:
        work.rename(destination)
    except OSError:
        aside.rename(destination)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _prefix(destination: Path) -> str:
    return f".{destination.name}."


def _sweep(destination: Path) -> None:
    """Cleans up after killed runs: restores an old destination that was renamed aside, removes unfinished folders."""
    for left in destination.parent.glob(f"{_prefix(destination)}*"):
        pid = left.name.removesuffix(".old").rpartition(".")[2]
        if pid.isdigit() and _alive(int(pid)):
            continue
        if left.name.endswith(".old") and not destination.exists():
            left.rename(destination)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _disk_error(destination: Path, error: OSError) -> DeploykitError:
    return DeploykitError(f"cannot write {destination}: {error.strerror or error}. Nothing was left behind.")
