"""Models' files packed and unpacked on disk."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deploykit.core.errors import DeploykitError, said_by
from deploykit.core.files import folder_in_place, no_such_file, refuse_taken, write_in_place
from deploykit.core.progress import say
from deploykit.dkz.container import packed
from deploykit.dkz.extents import files_of
from deploykit.dkz.front import CONTEXTS, LIMIT, front_of
from deploykit.dkz.reading import peak, unpack
from deploykit.dkz.stages import Stage, stages

NONE_CODED = {CONTEXTS: "that takes weights that share few values, have a known shape and get smaller by it"}
LONGEST = 255
"""Bytes of a name, on every common file system."""


@dataclass(frozen=True)
class Packed:
    """What was packed or unpacked, and what it takes."""

    path: Path
    names: tuple[str, ...]
    """Of the files within."""
    stored: int
    """Bytes of the container, all of them."""
    whole: int
    """Bytes of the files within."""
    peak: int
    """Bytes of memory that decoding takes, at most; see `deploykit.dkz.reading.peak`."""
    layers: tuple[Stage, ...] = ()
    """Of what was packed; a container does not tell."""

    def line(self) -> str:
        """For people."""
        names, times = ", ".join(self.names), self.whole / max(1, self.stored)
        smaller = f"{times:.2f} times smaller" if times >= 1 else "not smaller: there is nothing to be saved"
        return (
            f"{self.path}: {names}, {self.stored:,} of {self.whole:,} bytes ({smaller}), decoded in "
            f"{self.peak:,} bytes of memory at most"
        )


def pack_file(model: Path, out: Path | None = None, overwrite: bool = False, coder: str | None = None) -> Packed:
    """Packs a model's file and those that belong to it.

    Args:
        model: see `deploykit.dkz.extents.files_of`.
        out: the container; None: the model's name with ``.dkz`` behind it.
        overwrite: whether a container that is there may be replaced.
        coder: of the streams; None: whichever is shorter.

    Raises:
        DeploykitError: no such file, one that cannot be read, or a container that is there already, no such coder.
    """
    _refuse_folder(model)
    out = out or model.with_name(f"{model.name}.dkz")
    with _telling():
        _refuse_folder(out)
        if out.exists() and not overwrite:
            raise DeploykitError(f"{out} already exists. Give another -o, or --overwrite to replace it.")
        files = files_of(model)
        for file in files:
            if not _stays_inside(file.name):
                raise DeploykitError(
                    f"{model} has its data in {file.name!r}, which is not below its folder: not packed, "
                    "for nobody could unpack it"
                )
            if (model.parent / file.name).resolve() == out.resolve():
                raise DeploykitError(f"{out} is packed itself; give another -o")
        made = packed(files, coder)
        write_in_place(out, made.data)
    whole = sum(len(file.data) for file in files)
    names = tuple(file.name for file in files)
    found = Packed(out, names, len(made.data), whole, peak(front_of(made.data, whole)), stages(files, made))
    if coder is not None and coder not in {stage.coder for stage in found.layers}:
        say(f"note: {coder} codes none of the weights of {model.name}: {NONE_CODED.get(coder, 'none is known')}")
    return found


def unpack_file(container: Path, out: Path, overwrite: bool = False, limit: int = LIMIT) -> Packed:
    """Writes the files of a container into a folder, which appears complete or not at all.

    Args:
        container: a ``.dkz``.
        out: the folder.
        overwrite: whether a folder that is there may be replaced.
        limit: bytes that may come out.

    Raises:
        DeploykitError: no such file, none of ours, damaged, larger than the limit; a folder that is there already.
    """
    _refuse_folder(container)
    if not container.is_file():
        raise no_such_file(container)
    if container.resolve().is_relative_to(out.resolve()):
        raise DeploykitError(f"{container} lies in {out}, which would be replaced as a whole; give another -o")
    with _telling():
        data = _mapped(container)
        with said_by(str(container)):
            front = front_of(data, limit)
        names, whole, needed = [told.name for told in front.files], 0, peak(front)
        for name in names:
            if not _stays_inside(name):
                raise DeploykitError(f"{container} has a file named {name!r}, which could land anywhere: not unpacked")
        if len({name.casefold() for name in names}) < len(names):
            raise DeploykitError(f"{container} is damaged: two of its files have one name")
        refuse_taken(out, overwrite, {name.split("/")[0] for name in names})
        with folder_in_place(out, overwrite) as work, said_by(str(container)):
            try:
                for name, pieces in unpack(data, limit):
                    (work / name).parent.mkdir(parents=True, exist_ok=True)
                    with (work / name).open("xb") as file:
                        whole += sum(file.write(piece) for piece in pieces)
            except MemoryError:
                raise DeploykitError(f"decoding takes up to {needed:,} bytes of memory, more than there are") from None
    return Packed(container, tuple(names), len(data), whole, needed)


def _stays_inside(name: str) -> bool:
    """Whether a file of that name lies below the folder it is written to, whatever the system."""
    parts = name.split("/")
    odd = any(part in ("", ".", "..") or len(part.encode()) > LONGEST for part in parts)
    return not odd and name.isprintable() and not set(name) & set("\\:")


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise DeploykitError(f"{path} is a folder; give a file")


@contextlib.contextmanager
def _telling() -> Iterator[None]:
    """What the system refuses is said in a line."""
    try:
        yield
    except OSError as error:
        raise DeploykitError(f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")) from None


def _mapped(path: Path) -> memoryview:
    """A file's bytes, of which the system reads those that are looked at."""
    with path.open("rb") as file:
        try:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except ValueError:  # an empty file cannot be mapped
            return memoryview(b"")
