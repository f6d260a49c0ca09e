"""`Trainer`: fits a module to a loss. Built on accelerate: ``accelerate launch`` spreads it over devices unchanged."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.data import Batch, DataSet
from deploykit.core.errors import DeploykitError, MissingExtra
from deploykit.core.progress import track
from deploykit.core.recipe import TrainSettings
from deploykit.core.seeds import seeded
from deploykit.losses import Loss, TrainBatch

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""
CLIP = 1.0
"""Largest norm of the gradients of all parameters together."""


@dataclass(frozen=True)
class Trainer:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), a short warm-up and cosine decay to zero.

    The same seed, data and settings give the same weights (on a GPU: up to the order of its sums), as long as torch
    runs with as many threads: its sums are split among them. A manifest keeps that number, and ``reproduce`` sets it.
    """

    settings: TrainSettings = field(default_factory=TrainSettings)
    seed: int = 0

    def fit(
        self,
        module: nn.Module,
        data: DataSet,
        loss: Loss,
        *,
        teacher: nn.Module | None = None,
        steps: int | None = None,
        on_step: Callable[[int, float], None] | None = None,
        **settings: Any,
    ) -> list[float]:
        """Trains in place; the module comes back on its device and in the mode it had.

        Args:
            module: called with the inputs by forward-argument name.
            data: shuffled anew in every epoch; an incomplete last batch is left out.
            loss: ``loss(outputs, batch) -> scalar``.
            teacher: its outputs for the same (augmented) inputs are ``batch.teacher``.
            steps: optimizer steps; without it, what ``epochs`` comes to.
            on_step: called after every step with its number (from 0) and loss.
            settings: fields of `TrainSettings` that differ from the trainer's for this run, e.g. ``learning_rate``.

        Returns:
            the loss of every step.

        Raises:
            MissingExtra: accelerate is not installed.
            DeploykitError: the loss is no scalar or not finite, or the augmentation needs images and there are none.
        """
        require_accelerate()
        import torch
        from accelerate import Accelerator

        chosen = replace(self.settings, **settings)
        accelerator = Accelerator()
        rank, world = accelerator.process_index, accelerator.num_processes
        total = steps or max(1, round(chosen.epochs * len(data) / (chosen.batch * world)))
        layout = data.preprocess.layout if data.preprocess else "NCHW"
        random = torch.Generator().manual_seed(self.seed + rank)
        before = [_State.of(m) for m in (module, teacher) if m is not None]
        with seeded(self.seed + rank):
            try:
                module.train()
                model = accelerator.prepare(module)
                if teacher is not None:
                    teacher.eval().to(accelerator.device)
                optimizer = accelerator.prepare(_optimizer(model, chosen))
                losses = []
                batches = islice(_shuffled(data, chosen.batch, rank, world, self.seed), total)
                for step, arrays in enumerate(track(batches, "training", total)):
                    inputs, labels = _to_device(arrays, accelerator.device)
                    inputs = augment(inputs, chosen.augment, layout, random)
                    with torch.no_grad():
                        answers = None if teacher is None else teacher(**inputs)
                    for group in optimizer.param_groups:
                        group["lr"] = chosen.learning_rate * schedule(step, total)
                    value = loss(model(**inputs), TrainBatch(inputs, labels, answers))
                    if not isinstance(value, torch.Tensor) or value.numel() != 1:
                        raise DeploykitError(f"a loss must return a scalar tensor; it returned {_kind(value)}")
                    accelerator.backward(value)
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                    optimizer.step()
                    optimizer.zero_grad()
                    losses.append(float(accelerator.reduce(value.detach(), "mean")))
                    if not math.isfinite(losses[-1]):
                        raise DeploykitError(
                            f"the loss became {losses[-1]} at step {step + 1} of {total}; "
                            f"try a learning_rate below {chosen.learning_rate:g}"
                        )
                    if on_step is not None:
                        on_step(step, losses[-1])
            finally:
                accelerator.unwrap_model(module, keep_fp32_wrapper=False)
                accelerator.free_memory()
                for state in before:
                    state.restore()
        return losses


def require_accelerate() -> None:
    """Raises MissingExtra where nothing can be trained; called before any long work."""
    if importlib.util.find_spec("accelerate") is None:
        raise MissingExtra("training", "train")


def schedule(step: int, total: int) -> float:
    """What the learning rate is multiplied by: a linear rise, then half a cosine down to zero after the last step."""
    rise = max(1, round(WARM_UP * total))
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def augment(
    inputs: dict[str, Tensor], kinds: tuple[str, ...], layout: str, random: torch.Generator
) -> dict[str, Tensor]:
    """Flips and crops at random, each sample by itself.

    Args:
        inputs: with one image input ``[n, c, h, w]`` (or ``[n, h, w, c]`` in layout NHWC); the others stay.
        kinds: ``flip`` mirrors half of the samples left to right; ``crop`` pads each side by an eighth with zeros and
            cuts a window of the old size out of it.
        layout: NCHW or NHWC.
        random: a generator on the CPU, so that devices do not differ.

    Raises:
        DeploykitError: there is not exactly one image input.
    """
    import torch

    if not kinds:
        return inputs
    images = [name for name, x in inputs.items() if x.ndim == 4 and x.is_floating_point()]
    if len(images) != 1:
        given = ", ".join(f"{name} {list(x.shape)}" for name, x in inputs.items())
        raise DeploykitError(f"augment is for models with one image input; the inputs are {given}")
    x = inputs[images[0]]
    x = x if layout == "NHWC" else x.permute(0, 2, 3, 1)
    n, h, w, _ = x.shape
    if "flip" in kinds:
        flipped = torch.rand(n, generator=random) < 0.5
        x = torch.where(flipped.to(x.device)[:, None, None, None], x.flip(2), x)
    if "crop" in kinds:
        rows = torch.randint(0, 2 * (h // 8) + 1, (n, 1), generator=random) + torch.arange(h)
        columns = torch.randint(0, 2 * (w // 8) + 1, (n, 1), generator=random) + torch.arange(w)
        padded = torch.nn.functional.pad(x, (0, 0, w // 8, w // 8, h // 8, h // 8))
        x = padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return {**inputs, images[0]: (x if layout == "NHWC" else x.permute(0, 3, 1, 2)).contiguous()}


@dataclass(frozen=True)
class _State:
    """Device and modes of a module, to be put back."""

    module: nn.Module
    device: torch.device | None
    training: tuple[bool, ...]

    @staticmethod
    def of(module: nn.Module) -> _State:
        first = next(module.parameters(), None)
        return _State(module, None if first is None else first.device, tuple(m.training for m in module.modules()))

    def restore(self) -> None:
        if self.device is not None:
            self.module.to(self.device)
        for module, training in zip(self.module.modules(), self.training, strict=True):
            module.training = training


def _optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Weight decay acts on matrices and kernels; biases and normalisation are left alone."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.learning_rate)


def _shuffled(data: DataSet, size: int, rank: int, world: int, seed: int) -> Iterator[Batch]:
    """This process's share of full batches, epoch after epoch; all processes draw the same order."""
    random = np.random.default_rng(seed)
    together = min(size * world, len(data) - len(data) % world)
    while True:
        order = random.permutation(len(data))
        for start in range(0, len(data) - together + 1, together):
            mine = order[start : start + together][rank::world]
            yield from data.batches(len(mine), mine)


def _to_device(batch: Batch, device: torch.device) -> tuple[dict[str, Tensor], Tensor | None]:
    import torch

    inputs = {name: torch.from_numpy(array).to(device) for name, array in batch.inputs.items()}
    return inputs, None if batch.labels is None else torch.from_numpy(batch.labels).to(device)


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} {tuple(shape)}"
