"""Runs a data set through files on a device, chunk by chunk; what a chunk answered stays there under its content hash.

So a run that was cut off goes on where it stopped, and the same question is not computed twice.
"""

from __future__ import annotations

import hashlib
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.data import DataSet
from deploykit.core.device import Facts
from deploykit.core.errors import DeploykitError
from deploykit.core.progress import track
from deploykit.devices.device import Device
from deploykit.devices.kinds import Arrays, Task, kind
from deploykit.devices.work import Work

if TYPE_CHECKING:
    from numpy.typing import NDArray

SAMPLES = 256
BYTES = 8_000_000
"""A chunk is at most this many samples and bytes (but one sample at least)."""


def answers(
    device: Device, facts: Facts, work: Work, data: DataSet, threads: int = 1
) -> dict[str, dict[str, NDArray[Any]]]:
    """Outputs ``[n, ...]`` of every file on all samples, by precision and output name.

    Raises:
        DeploykitError: a file cannot be run there, or nothing can be written.
        Lost: the connection ended; run again, finished chunks are not computed again.
    """
    how = kind(work.manifest.exporter)
    by = f"{how.computed_by(device, facts, work)} on {facts.machine} {facts.cpu}"  # homes may be shared
    folder = work.path("answers")
    done = _listed(device, folder)
    parts: dict[str, list[dict[str, NDArray[Any]]]] = {f.precision: [] for f in work.manifest.files}
    with tempfile.TemporaryDirectory() as here:
        fetched = Path(here) / "outputs"
        for arrays in track(chunks(data), f"answering on {facts.name}"):
            key = _key(arrays, by)
            tasks = [Task(work, f, f"{folder}/{key}.{f.precision}") for f in work.manifest.files]
            open_tasks = [t for t in tasks if t.outputs.rpartition("/")[2] not in done]
            if open_tasks:
                how.answer(device, facts, open_tasks, arrays, key, threads)
            for task in tasks:
                device.get(task.outputs, fetched)
                parts[task.file.precision].append(how.read(fetched, work))
    return {
        precision: {name: np.concatenate([p[name] for p in found]) for name in found[0]}
        for precision, found in parts.items()
    }


def chunks(data: DataSet) -> Iterator[dict[str, NDArray[Any]]]:
    """The samples in pieces, the same ones every time."""
    count, _ = _chunk(data)
    for batch in data.batches(count):
        yield batch.inputs


def room(data: DataSet) -> int:
    """Bytes that samples take on the device at a time: one chunk is there until it is answered."""
    count, size = _chunk(data)
    return min(count, len(data)) * size


def _chunk(data: DataSet) -> tuple[int, int]:
    """How many samples go there at a time, and the bytes of one."""
    size = sum(a.nbytes for a in next(data.batches(1)).inputs.values())
    return max(1, min(SAMPLES, BYTES // max(1, size))), size


def _listed(device: Device, folder: str) -> set[str]:
    ran = device.run(f"mkdir -p {shlex.quote(folder)} && ls {shlex.quote(folder)}")
    if ran.code:
        raise DeploykitError(f"{device.address.text}: {ran.err.strip()}")
    return set(ran.out.split())


def _key(arrays: Arrays, by: str) -> str:
    """Of the samples and of what computes the answers: another version of it may answer otherwise."""
    digest = hashlib.sha256(by.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]
