"""Models' files packed and unpacked on disk."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path, PurePath

from deploykit.core.errors import DeploykitError
from deploykit.core.files import folder_in_place, no_such_file, write_in_place
from deploykit.dkz.container import packed
from deploykit.dkz.extents import files_of
from deploykit.dkz.front import LIMIT, front_of
from deploykit.dkz.reading import peak, unpack
from deploykit.dkz.stages import Stage, stages


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
        return (
            f"{self.path}: {names}, {self.stored:,} of {self.whole:,} bytes ({times:.2f} times smaller), decoded in "
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
    out = out or model.with_name(f"{model.name}.dkz")
    if out.exists() and not overwrite:
        raise DeploykitError(f"{out} already exists. Give another -o, or --overwrite to replace it.")
    files = files_of(model)
    made = packed(files, coder)
    write_in_place(out, made.data)
    whole = sum(len(file.data) for file in files)
    names = tuple(file.name for file in files)
    return Packed(out, names, len(made.data), whole, peak(front_of(made.data, whole)), stages(files, made))


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
    if not container.is_file():
        raise no_such_file(container)
    data = _mapped(container)
    names, whole, needed = [], 0, peak(front_of(data, limit))
    with folder_in_place(out, overwrite) as work:
        for name, pieces in unpack(data, limit):
            if PurePath(name).name != name or name in ("", ".", ".."):
                raise DeploykitError(f"{container} has a file named {name!r}, which could land anywhere: not unpacked")
            with (work / name).open("xb") as file:
                whole += sum(file.write(piece) for piece in pieces)
            names.append(name)
    return Packed(container, tuple(names), len(data), whole, needed)


def _mapped(path: Path) -> memoryview:
    """A file's bytes, of which the system reads those that are looked at."""
    with path.open("rb") as file:
        try:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except ValueError:  # an empty file cannot be mapped
            return memoryview(b"")
