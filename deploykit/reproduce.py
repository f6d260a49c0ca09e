"""``deploykit reproduce``: the export a manifest tells of, made again, and every file compared with its hash.

Only ``manifest.json`` is needed, not the files beside it. Paths in it are meant from the working directory of the
export, so that is where to run this. Timings are not made again.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from deploykit import asked
from deploykit.core.errors import DeploykitError, GateFailed
from deploykit.core.files import refuse_taken
from deploykit.core.manifest import NAME, Manifest, load_manifest, open_manifest
from deploykit.core.progress import say
from deploykit.diff import facts

MEASURED = ("measurements", "advice", "seconds", "device", "request", "versions", "machine", "stored")
"""Of a manifest: what may differ between two runs, or is told apart on its own."""


@dataclass(frozen=True)
class Reproduction:
    """What came out the second time."""

    same: tuple[str, ...]
    """Files that are byte-identical."""
    differing: tuple[str, ...]
    """Files that are not, and parts of the manifest; one phrase each."""
    changed: dict[str, tuple[str, str]]
    """What went in and is not what it was: by name, before and now."""

    @property
    def identical(self) -> bool:
        """Whether nothing differs."""
        return not self.differing

    def refuse_failed(self, source: Path) -> None:
        """Raises GateFailed where something differs."""
        if not self.identical:
            why = "" if self.changed else "; nothing that the manifest keeps track of was changed"
            raise GateFailed(f"{source}: {len(self.differing)} differences{why}")

    def lines(self) -> Iterator[str]:
        """For people: file by file, then what went in and is not what it was."""
        yield from (f"identical  {name}" for name in self.same)
        yield from (f"DIFFERS    {phrase}" for phrase in self.differing)
        yield from (f"changed    {name}: {before} -> {now}" for name, (before, now) in self.changed.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "identical": self.identical,
            "same": list(self.same),
            "differing": list(self.differing),
            "changed": {name: list(pair) for name, pair in self.changed.items()},
        }


def reproduce(source: Path, out: Path | None = None, overwrite: bool = False) -> Reproduction:
    """Exports again what a manifest tells of.

    Args:
        source: an artifact's folder, or a ``manifest.json``.
        out: keeps the second artifact there.
        overwrite: replaces ``out``.

    Raises:
        DeploykitError: not a manifest, an export from Python objects, or files that are not here any more.
    """
    manifest = open_manifest(source)
    request = manifest.request
    if request.objects:
        raise DeploykitError(
            f"{source} cannot be made again: what it was exported from were Python objects, which no file holds: "
            f"{', '.join(request.objects)}. Give `export` a MODEL argument (file.py:factory) and paths instead."
        )
    if out is not None:
        refuse_taken(out, overwrite)
    settings = replace(request.settings, benchmark=False, overwrite=overwrite)
    with tempfile.TemporaryDirectory() as temporary, _torch_threads(manifest):
        folder = out if out is not None else Path(temporary) / "again"
        try:
            for path in [p for p, digest in asked.files_read(request).items() if request.read.get(p, digest) != digest]:
                say(f"note: {path} was changed since")
            asked.export([replace(request, settings=settings)], [folder])
        except GateFailed:
            pass  # the files are there, and the checks are compared as well
        except DeploykitError as error:
            raise DeploykitError(
                f"{source} cannot be made again here: {error}\n"
                "Paths are meant from the folder that the export was started in: run `deploykit reproduce` there."
            ) from None
        again = load_manifest(folder)
    return compared(manifest, again)


def compared(first: Manifest, second: Manifest) -> Reproduction:
    """Two manifests of one request side by side."""
    before, now = ({s.path: s for s in m.stored} for m in (first, second))
    same = [path for path, stored in before.items() if now.get(path) == stored]
    differing = []
    for path in sorted({*before, *now} - {*same}):
        if path not in now:
            differing.append(f"{path} was not written again")
        elif path not in before:
            differing.append(f"{path} was not there")
        elif before[path].bytes != now[path].bytes:
            differing.append(f"{path} has {now[path].bytes} bytes, {before[path].bytes} the first time")
        else:
            differing.append(f"{path} has other bytes")
    here = replace(  # a device's scores and checks, which are not made again, stand beside these
        first,
        scores=tuple(s for s in first.scores if s in second.scores or first.device is None),
        checks=tuple(c for c in first.checks if c in second.checks or first.device is None),
    )
    told = (msgspec.to_builtins(m) for m in (here, second))
    one, other = ({k: v for k, v in table.items() if k not in MEASURED} for table in told)
    differing += [f"{NAME}: {key}" for key in one if one[key] != other[key]]
    changed = {k: v for k, v in facts(first, second).items() if not k.startswith("settings.benchmark")}
    return Reproduction(tuple(same), tuple(differing), changed)


@contextlib.contextmanager
def _torch_threads(manifest: Manifest) -> Iterator[None]:
    """The number of threads that torch had: the sums of training depend on it."""
    import torch

    before = torch.get_num_threads()
    wanted = manifest.machine.threads if manifest.machine is not None else before
    if wanted != before:
        say(f"note: torch runs with {wanted} threads, as it did ({os.cpu_count()} cores here)")
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
