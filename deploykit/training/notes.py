"""Where a training is, noted from time to time, so that one that was killed goes on there."""

from __future__ import annotations

import hashlib
import io
import math
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.journal import Journal, Pace
from deploykit.core.progress import say
from deploykit.training.best import Best

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn

SAME = 1e-5
"""Relative difference of two first losses of one training: other threads add up in another order."""


class Run:
    """All that changes while a module is trained."""

    def __init__(self, module: nn.Module, optimizer: Any, best: Best, drawn: torch.Generator, scaler: Any) -> None:
        """At its beginning, of a module that is not wrapped; ``drawn``: what augmentation draws from."""
        self.module, self.optimizer, self.best, self.drawn, self.scaler = module, optimizer, best, drawn, scaler
        self.losses: list[float] = []
        """Of all processes together, step by step."""

    def state(self) -> dict[str, Any]:
        """All of it."""
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "best": (self.best.step, self.best.value, self.best.state),
            "losses": self.losses,
        }

    def random(self) -> dict[str, Any]:
        """States of the generators of this process."""
        import torch

        kind, words, *rest = np.random.get_state()
        return {
            "python": random.getstate(),
            "numpy": (kind, torch.from_numpy(np.asarray(words, np.int64)), *rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "drawn": self.drawn.get_state(),
        }

    def go_on(self, noted: Mapping[str, Any]) -> None:
        """Where a run was, in place; ``noted``: `state`, with this process's `random`."""
        import torch

        self.module.load_state_dict(noted["module"])
        self.optimizer.load_state_dict(noted["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(noted["scaler"])
        self.best.step, self.best.value, self.best.state = noted["best"]
        self.losses[:] = noted["losses"]
        states = noted["random"]
        random.setstate(states["python"])
        kind, words, *rest = states["numpy"]
        np.random.set_state((kind, words.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(states["torch"])
        if states["cuda"] is not None:
            torch.cuda.set_rng_state(states["cuda"])
        self.drawn.set_state(states["drawn"])


class Notes:
    """Where a training is, in a journal: one note, which takes the place of the one before."""

    def __init__(self, journal: Journal, module: nn.Module, accelerator: Accelerator) -> None:
        """Of the training of a module that is as it came."""
        self.journal = journal if journal.folder is None else journal.of(weights_hash(module))
        self.accelerator, self.pace = accelerator, Pace()

    def found(self, first: float, total: int) -> dict[str, Any] | None:
        """The note of this training, if a run was cut.

        Args:
            first: the loss of the first step. It depends on the weights, samples, labels, on what teachers answer and
                on the loss itself: where it is another one, so is the training.
            total: optimizer steps.
        """
        import torch
        from accelerate.utils import broadcast_object_list

        noted: list[Any] = [None]
        content = self.journal.noted("training") if self.accelerator.is_main_process else None
        if content is not None:
            try:
                noted[0] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            except Exception:  # damaged; torch raises what it likes
                content = None
        if self.accelerator.num_processes > 1 and self.journal.folder is not None:
            broadcast_object_list(noted)
        if noted[0] is None or not math.isclose(noted[0]["losses"][0], first, rel_tol=SAME):
            return None
        if self.accelerator.is_main_process:
            say(f"training goes on after step {len(noted[0]['losses'])} of {total}")
        return {**noted[0], "random": noted[0]["random"][self.accelerator.process_index]}

    def due(self) -> bool:
        """Whether it is time for a note; all processes say the same."""
        if self.journal.folder is None:
            return False
        told = [self.pace.due]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(told)
        return told[0]

    def take(self, run: Run) -> None:
        """Notes where it is. All processes come here together; the first one writes."""
        import torch
        from accelerate.utils import gather_object

        with self.pace.working():
            states = gather_object([run.random()])
            if self.accelerator.is_main_process:
                held = io.BytesIO()
                torch.save({**run.state(), "random": states}, held)
                self.journal.note("training", held.getvalue())


def weights_hash(module: nn.Module) -> str:
    """Tells modules apart by the names, shapes and values of what they hold."""
    import torch

    digest = hashlib.sha256()
    for name, held in module.state_dict().items():
        if isinstance(held, torch.Tensor):
            digest.update(f"{name} {held.dtype} {tuple(held.shape)}".encode())
            digest.update(held.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
