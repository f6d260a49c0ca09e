"""Models' files packed and unpacked on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePath

from deploykit.core.errors import DeploykitError
from deploykit.core.files import folder_in_place, no_such_file, write_in_place
from deploykit.dkz.container import LIMIT, pack, unpack
from deploykit.dkz.extents import files_of


@dataclass(frozen=True)
class Packed:
    """What was written."""

    path: Path
    names: tuple[str, ...]
    """Of the files within."""
    stored: int
    """Bytes of the container, all of them."""
    whole: int
    """Bytes of the files within."""

    def line(self) -> str:
        """For people."""
        times = self.whole / max(1, self.stored)
        names = ", ".join(self.names)
        return f"{self.path}: {names}, {self.stored:,} of {self.whole:,} bytes ({times:.2f} times smaller)"


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
    data = pack(files, coder)
    write_in_place(out, data)
    return Packed(out, tuple(file.name for file in files), len(data), sum(len(file.data) for file in files))


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
    data = container.read_bytes()
    names, whole = [], 0
    with folder_in_place(out, overwrite) as work:
        for name, pieces in unpack(data, limit):
            if PurePath(name).name != name or name in ("", ".", ".."):
                raise DeploykitError(f"{container} has a file named {name!r}, which could land anywhere: not unpacked")
            with (work / name).open("xb") as file:
                whole += sum(file.write(piece) for piece in pieces)
            names.append(name)
    return Packed(container, tuple(names), len(data), whole)
