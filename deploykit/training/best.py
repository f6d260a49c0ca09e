"""Which state of a module did best on held-out samples, and whether a training goes wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deploykit.core.data import DataSet
from deploykit.losses import Loss, TrainBatch
from deploykit.training.batches import answers, to_device

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn

DIVERGED = 10.0
"""Training stops where the held-out loss is this many times what it was before, in its first half the square of that: a
network that is nearly right gets worse at first, until the learning rate falls."""


@dataclass(frozen=True)
class State:
    """Device and modes of a module, to be put back."""

    module: nn.Module
    device: torch.device | None
    training: tuple[bool, ...]

    @staticmethod
    def of(module: nn.Module) -> State:
        """As it is now."""
        first = next(module.parameters(), None)
        return State(module, None if first is None else first.device, tuple(m.training for m in module.modules()))

    def restore(self) -> None:
        """Device and modes."""
        if self.device is not None:
            self.module.to(self.device)
        self.restore_modes()

    def restore_modes(self) -> None:
        """Training or evaluation, of every part."""
        for module, training in zip(self.module.modules(), self.training, strict=True):
            module.training = training


class Best:
    """The state of a module that did best on held-out data so far."""

    def __init__(
        self,
        module: nn.Module,
        data: DataSet | None,
        loss: Loss,
        teacher: nn.Module | None,
        batch: int,
        accelerator: Accelerator,
    ) -> None:
        """Judges the module as it is."""
        self.module, self.data, self.loss, self.teacher = module, data, loss, teacher
        self.batch, self.accelerator = batch, accelerator
        self.step, self.start, self.value = 0, math.inf, math.inf
        self.state: dict[str, Any] = {}
        if data is not None:
            self.start = self._judge()
            self._keep_if_better(0, self.start)

    @property
    def is_good(self) -> bool:
        """Whether there is a state with a finite loss."""
        return math.isfinite(self.value)

    @property
    def said(self) -> str:
        """Which it is, for the user."""
        when = f"after step {self.step}" if self.step else "before training"
        return f"The state {when} is kept: it did best on held-out samples."

    def went_wrong(self, step: int, total: int, loss: float, judged: bool) -> str:
        """What is wrong with the training, if anything; at a step that is to be judged, judges it."""
        if not math.isfinite(loss):
            return f"the loss became {loss}"
        if self.data is None or not judged:
            return ""
        found = self._judge()
        self._keep_if_better(step, found)
        late = 2 * step > total
        grew = 0 < self.start * DIVERGED * (1 if late else DIVERGED) < found
        return f"the held-out loss went from {self.start:.4g} to {found:.4g}" if grew or math.isnan(found) else ""

    def restore(self) -> None:
        """Puts the best state back."""
        if self.is_good:
            self.module.load_state_dict(self.state)

    def _keep_if_better(self, step: int, value: float) -> None:
        if value < self.value:
            self.step, self.value = step, value
            self.state = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}

    def _judge(self) -> float:
        """Mean loss on the held-out samples, all parts in evaluation mode."""
        import torch

        assert self.data is not None
        before = State.of(self.module)
        total = torch.zeros((), device=self.accelerator.device)
        with torch.no_grad():
            self.module.eval()
            for arrays in self.data.batches(self.batch):
                inputs, labels = to_device(arrays, self.accelerator.device)
                batch = TrainBatch(inputs, labels, answers(self.teacher, inputs))
                total += self.loss(self.module(**inputs), batch) * len(next(iter(inputs.values())))
        before.restore_modes()
        return float(self.accelerator.reduce(total, "mean")) / len(self.data)
