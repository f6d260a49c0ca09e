"""What a step of a training is given: samples in a random order, on the device, and what a teacher answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.data import Batch, DataSet

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def shuffled(data: DataSet, size: int, rank: int, world: int, seed: int, done: int = 0) -> Iterator[Batch]:
    """This process's share of full batches, epoch after epoch; all processes draw the same order.

    ``done``: how many are passed over; their samples are not asked for.
    """
    orders = np.random.default_rng(seed)
    together = min(size * world, len(data) - len(data) % world)
    while True:
        order = orders.permutation(len(data))
        for start in range(0, len(data) - together + 1, together):
            if done > 0:
                done -= 1
                continue
            mine = order[start : start + together][rank::world]
            yield from data.batches(len(mine), mine)


def to_device(batch: Batch, device: torch.device) -> tuple[dict[str, Tensor], Tensor | None]:
    """Inputs by name, and labels where there are some."""
    import torch

    inputs = {name: torch.from_numpy(array).to(device) for name, array in batch.inputs.items()}
    return inputs, None if batch.labels is None else torch.from_numpy(batch.labels).to(device)


def answers(teacher: nn.Module | None, inputs: dict[str, Tensor]) -> Any:
    """What a teacher says, which learns nothing by it; None: there is none."""
    import torch

    with torch.no_grad():
        return None if teacher is None else teacher(**inputs)
