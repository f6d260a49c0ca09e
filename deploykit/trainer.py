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
from deploykit.core.progress import say, track
from deploykit.core.recipe import TrainSettings
from deploykit.core.seeds import seeded
from deploykit.losses import Loss, TrainBatch

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor, nn

WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""
CLIP = 1.0
"""Largest norm of the gradients of all parameters together."""
EVALUATIONS = 10
"""How often a state is judged on held-out data, in equal intervals; the last time after the last step."""
DIVERGED = 10.0
"""Training stops where the held-out loss is this many times what it was before."""


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
        holdout: DataSet | None = None,
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
            holdout: the state that does best on it by the same loss is kept, the one before training counted. If the
                loss grows beyond all bounds, training stops with a line on stderr and that state is kept too.
            steps: optimizer steps; without it, what ``epochs`` comes to.
            on_step: called after every step with its number (from 0) and loss.
            settings: fields of `TrainSettings` that differ from the trainer's for this run, e.g. ``learning_rate``.

        Returns:
            the loss of every step.

        Raises:
            MissingExtra: accelerate is not installed.
            DeploykitError: the loss is no scalar, or the augmentation needs images and there are none; or the loss is
                not finite, and there is no state that does well on held-out data.
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
                best = _Best(module, holdout, loss, teacher, chosen.batch, accelerator)
                losses: list[float] = []
                batches = islice(_shuffled(data, chosen.batch, rank, world, self.seed), total)
                for step, arrays in enumerate(track(batches, "training", total)):
                    inputs, labels = _to_device(arrays, accelerator.device)
                    inputs = augment(inputs, chosen.augment, layout, random)
                    for group in optimizer.param_groups:
                        group["lr"] = chosen.learning_rate * schedule(step, total)
                    value = loss(model(**inputs), TrainBatch(inputs, labels, _answers(teacher, inputs)))
                    if not isinstance(value, torch.Tensor) or value.numel() != 1:
                        raise DeploykitError(f"a loss must return a scalar tensor; it returned {_kind(value)}")
                    accelerator.backward(value)
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                    optimizer.step()
                    optimizer.zero_grad()
                    losses.append(float(accelerator.reduce(value.detach(), "mean")))
                    if on_step is not None:
                        on_step(step, losses[-1])
                    judged = (step + 1) % max(1, total // EVALUATIONS) == 0 or step + 1 == total
                    went_wrong = best.went_wrong(step + 1, losses[-1], judged)
                    if went_wrong:
                        hint = f"{went_wrong} at step {step + 1} of {total}; try a learning_rate below "
                        hint += f"{chosen.learning_rate:g}"
                        if not best.is_good:
                            raise DeploykitError(hint)
                        say(f"training stopped: {hint}. {best.said}")
                        break
                best.restore()
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


class _Best:
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

    def went_wrong(self, step: int, loss: float, judged: bool) -> str:
        """What is wrong with the training, if anything; at a step that is to be judged, judges it."""
        if not math.isfinite(loss):
            return f"the loss became {loss}"
        if self.data is None or not judged:
            return ""
        found = self._judge()
        self._keep_if_better(step, found)
        grew = 0 < self.start * DIVERGED < found
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
        before = _State.of(self.module)
        total = torch.zeros((), device=self.accelerator.device)
        with torch.no_grad():
            self.module.eval()
            for arrays in self.data.batches(self.batch):
                inputs, labels = _to_device(arrays, self.accelerator.device)
                batch = TrainBatch(inputs, labels, _answers(self.teacher, inputs))
                total += self.loss(self.module(**inputs), batch) * len(next(iter(inputs.values())))
        before.restore_modes()
        return float(self.accelerator.reduce(total, "mean")) / len(self.data)


def _answers(teacher: nn.Module | None, inputs: dict[str, Tensor]) -> Any:
    import torch

    with torch.no_grad():
        return None if teacher is None else teacher(**inputs)


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
        self.restore_modes()

    def restore_modes(self) -> None:
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
