"""What a teacher answered, kept: it is asked once about every sample, not once an epoch, nor again in the next run.

That needs samples that are the same every time, so it is done where training does not augment them. The losses look up
answers by the number of a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.files import folder_in_place
from deploykit.core.progress import track
from deploykit.losses import Loss, TrainBatch, as_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from deploykit.distillation.teachers import Ensemble

BATCH = 64
"""Samples that a teacher is asked about together, whatever the training does: its answers hang on that, by rounding."""
FEW = 8
"""Samples that a teacher is asked about in any case: it may have changed where its fingerprint does not look."""
FORMAT = "deploykit-answers-2"

Table = tuple["NDArray[Any]", ...]
"""By output ``[samples, ...]`` float32, read from a file as far as it is needed."""


def answers(teacher: Ensemble, data: DataSet, folder: Path, known: str | None, device: torch.device) -> Table:
    """What the teacher answers to all samples: read from a folder, or asked and written there.

    Args:
        teacher: asked in batches of `BATCH`.
        data: as they come, not augmented. Labels do not matter.
        folder: gets a folder for this teacher and these samples, named by a hash of both and of the first answers.
        known: the teacher's fingerprint; None: it is asked in any case, and the folder (which is there) gets the next
            number for a name.
        device: where it is asked.

    Raises:
        DeploykitError: an answer is not finite; the disk is full.
    """
    if known is None:
        place = folder / str(len(list(folder.iterdir())))
    else:
        first = hashlib.sha256()
        for outputs in _asked(teacher, data.take(slice(0, FEW)), device):
            for y in outputs:
                first.update(np.ascontiguousarray(y, np.float32).tobytes())
        key = f"{FORMAT} {known} {first.hexdigest()} {replace(data, labels=None).hash}"
        place = folder / hashlib.sha256(key.encode()).hexdigest()[:32]
        found = _read(place, len(data))
        if found is not None:
            return found
    with folder_in_place(place, overwrite=True) as work:
        files: list[IO[bytes]] = []
        try:
            for outputs in track(_asked(teacher, data, device), "asking the teacher", -(-len(data) // BATCH)):
                if not files:
                    files = [_opened(work / f"{i}.npy", (len(data), *y.shape[1:])) for i, y in enumerate(outputs)]
                for file, y in zip(files, outputs, strict=True):
                    file.write(np.ascontiguousarray(y, np.float32).tobytes())
        finally:
            for file in files:
                file.close()
    found = _read(place, len(data))
    assert found is not None
    return found


def numbered(sets: Sequence[DataSet]) -> list[DataSet]:
    """The sets with the numbers of their samples for labels, counted through all of them."""
    starts = np.cumsum([0, *map(len, sets)])
    return [replace(d, labels=np.arange(start, start + len(d))) for d, start in zip(sets, starts, strict=False)]


def looked_up(loss: Loss, sets: Sequence[DataSet], tables: Sequence[Table]) -> Loss:
    """A loss for `numbered` sets that sees their labels, and what the teacher answered.

    Args:
        loss: sees labels where all the sets have some.
        sets: as they were before they got numbers.
        tables: the answers to each.
    """
    starts = np.cumsum([0, *map(len, sets)])
    labels = [d.labels for d in sets if d.labels is not None]
    own = np.concatenate(labels) if len(labels) == len(sets) else None

    def rows(column: int, numbers: NDArray[Any]) -> Tensor:
        owners = np.searchsorted(starts, numbers, side="right") - 1
        found = [tables[s][column][i - starts[s]] for s, i in zip(owners, numbers, strict=True)]
        return torch.from_numpy(np.stack(found))

    def seeing(outputs: Any, batch: TrainBatch) -> Tensor:
        assert batch.labels is not None
        numbers, device = batch.labels.cpu().numpy(), batch.labels.device
        teacher = tuple(rows(column, numbers).to(device) for column in range(len(tables[0])))
        true = None if own is None else torch.from_numpy(own[numbers]).to(device)
        return loss(outputs, TrainBatch(batch.inputs, true, teacher))

    return seeing


def _asked(teacher: Ensemble, data: DataSet, device: torch.device) -> Iterator[list[NDArray[Any]]]:
    """Outputs of batch after batch; the teacher is back on the CPU afterwards."""
    teacher.to(device)
    try:
        for number, batch in enumerate(data.batches(BATCH)):
            inputs = {name: x.to(device) for name, x in as_tensors(batch.inputs).items()}
            outputs = [y.cpu().numpy() for y in teacher(**inputs)]
            for y in outputs:
                wrong = np.flatnonzero(~np.isfinite(y.reshape(len(y), -1)).all(1))
                if len(wrong):
                    sample = number * BATCH + wrong[0]
                    raise DeploykitError(f"the teacher's answer to sample {sample} of {data.origin} is not finite")
            yield outputs
    finally:
        teacher.to("cpu")


def _opened(path: Path, shape: tuple[int, ...]) -> IO[bytes]:
    """A ``.npy`` file behind its header. Not mapped: a disk that is full would kill the process."""
    file = path.open("wb")
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file


def _read(place: Path, count: int) -> Table | None:
    """The table in a folder, mapped; None where there is none, or a damaged one."""
    try:
        files = sorted(place.glob("*.npy"), key=lambda p: int(p.stem))
        found = tuple(np.load(file, mmap_mode="r") for file in files)
    except (OSError, ValueError, EOFError):  # the last one: a file without a byte
        return None
    return found if found and all(len(table) == count for table in found) else None
