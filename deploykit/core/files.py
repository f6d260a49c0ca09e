"""Whole folders appear at once or not at all: written beside the destination, then moved in place."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from difflib import get_close_matches
from pathlib import Path

from deploykit.core.errors import DeploykitError, some

MARKS = ("manifest.json", "chain.json", "structure.json")
"""One of these is in every folder that a command writes: of an artifact, of a chain, of a model."""


def no_such_file(path: Path) -> DeploykitError:
    """The error for a missing file, or folder if the name has no suffix, with the nearest name of its kind there."""
    what = "file" if path.suffix else "file or folder"
    if not path.parent.is_dir():
        return DeploykitError(f"no {what} {path}: there is no folder {path.parent}")
    alike = {p.stem: p.name for p in sorted(path.parent.iterdir()) if p.suffix == path.suffix}
    near = get_close_matches(path.stem, alike, n=1, cutoff=0.65)  # of the stem: every pair of .safetensors is alike
    return DeploykitError(f"no {what} {path}." + (f" Did you mean '{alike[near[0]]}'?" if near else ""))


def refuse_existing(destination: Path, overwrite: bool) -> None:
    """Raises a DeploykitError if the destination is taken and may not be replaced; call it before long work."""
    try:
        _sweep(destination.resolve())
    except OSError as error:
        raise _disk_error(destination, error) from None
    if destination.exists() and not overwrite:
        raise DeploykitError(f"{destination} already exists. Give another -o, or --overwrite to replace it.")
    above = next(p for p in destination.resolve().parents if p.exists())
    if not os.access(above, os.W_OK | os.X_OK) or not above.is_dir():
        raise DeploykitError(f"cannot write {destination}: {above} is no folder that you may write to")
    if destination.is_file():
        raise DeploykitError(f"{destination} is a file; the output is a folder.")


def refuse_taken(destination: Path, overwrite: bool, written: Collection[str] = ()) -> None:
    """`refuse_existing`, and raises for a folder with files of somebody else's, which would be gone.

    Args:
        destination: a folder that will be replaced as a whole.
        overwrite: whether it may.
        written: what the new one will have in it, by name; a folder with nothing else may be replaced.
    """
    refuse_existing(destination, overwrite)
    if not destination.is_dir() or _is_ours(destination):
        return
    foreign = [p.name for p in sorted(destination.iterdir()) if p.name not in written and not _is_ours(p)]
    if foreign:
        raise DeploykitError(
            f"{destination} has files that deploykit did not write ({some(foreign, 3)}), and --overwrite would replace "
            "the whole folder. Give another -o."
        )


def _is_ours(folder: Path) -> bool:
    return any((folder / name).is_file() for name in MARKS)


@contextlib.contextmanager
def folder_in_place(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside the destination; on success it becomes the destination in one rename.

    A process killed at any moment leaves the destination absent, old or complete (and at worst a hidden
    ``.NAME.deploykit-*`` folder beside it, which the next run removes).

    Raises:
        DeploykitError: the destination exists and ``overwrite`` is false; the disk is full or not writable.
    """
    destination = destination.resolve()  # a link is followed, so that what it points to is replaced
    refuse_existing(destination, overwrite)
    missing = [p for p in destination.parents if not p.exists()]  # the innermost first
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=_prefix(destination), suffix=f".{os.getpid()}", dir=destination.parent))
    except OSError as error:
        raise _disk_error(destination, error) from None
    try:
        yield work
        os.chmod(work, 0o755)
        refuse_existing(destination, overwrite)  # it may have appeared meanwhile
        _swap(work, destination)
    except OSError as error:
        foreign = error.filename is not None and not str(error.filename).startswith(str(destination.parent))
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS) and not foreign:
            raise _disk_error(destination, error) from None
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        with contextlib.suppress(OSError):  # the first that is not empty ends it
            for parent in missing:
                parent.rmdir()


def write_in_place(path: Path, content: str | bytes) -> None:
    """Writes a file (text as UTF-8) that is there completely or not at all.

    Raises:
        DeploykitError: the disk is full or not writable.
    """
    work = path.with_name(f".{path.name}.deploykit-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work.write_bytes(content.encode() if isinstance(content, str) else content)
        work.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            work.unlink()
        raise _disk_error(path, error) from None


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
    return f".{destination.name}.deploykit-"


def _sweep(destination: Path) -> None:
    """Cleans up after killed runs: restores an old destination that was renamed aside, removes unfinished folders."""
    ours = re.compile(re.escape(_prefix(destination)) + r"\w+\.(\d+)(\.old)?")
    leftovers = sorted(destination.parent.iterdir()) if destination.parent.is_dir() else []
    for left in leftovers:
        match = ours.fullmatch(left.name)
        if match is None or _alive(int(match[1])):
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
