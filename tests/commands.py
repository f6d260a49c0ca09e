"""The command line, run in this process as a user would run it."""

from __future__ import annotations

import contextlib
import io
import shlex
from dataclasses import dataclass
from pathlib import Path

from deploykit.cli import main


@dataclass(frozen=True)
class Said:
    """What a command ended with and what it printed."""

    code: int
    out: str
    err: str


def enter(command: str, *more: object) -> Said:
    """Runs ``deploykit COMMAND``. Neither output is a terminal; an exception is a bug and comes through."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([*shlex.split(command), *map(str, more)])
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int)
    return Said(code, out.getvalue(), err.getvalue())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too; folders are there as ``name/``. Python's caches do not count."""
    found = [p for p in folder.rglob("*") if "__pycache__" not in p.parts]
    return {
        p.relative_to(folder).as_posix() + ("/" if p.is_dir() else ""): b"" if p.is_dir() else p.read_bytes()
        for p in found
    }


def artifact(folder: Path) -> dict[str, bytes]:
    """An artifact's files without the manifest, which holds timings."""
    return {name: data for name, data in contents(folder).items() if name != "manifest.json"}
