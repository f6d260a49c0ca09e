"""`Trainer`: fits a module to a loss. Built on accelerate: ``accelerate launch`` spreads it over devices unchanged.

Where it is given a journal, a training that was killed goes on where it was. From time to time it notes all that
changes while it trains; whoever calls `Trainer.fit` again in the same way gets the same weights as without the kill.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError, MissingExtra
from deploykit.core.journal import NOTHING_KEPT, Journal
from deploykit.core.progress import say
from deploykit.core.recipe import TrainSettings
from deploykit.core.seeds import seeded
from deploykit.losses import Loss, TrainBatch
from deploykit.training.augmentation import augment
from deploykit.training.batches import answers, shuffled, to_device
from deploykit.training.best import Best, State
from deploykit.training.notes import Notes, Run

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""
CLIP = 1.0
"""Largest norm of the gradients of all parameters together, for AdamW."""
MOMENTUM = 0.9
"""Of SGD."""
EVALUATIONS = 10
"""How often a state is judged on held-out data, in equal intervals; the last time after the last step."""


@dataclass(frozen=True)
class Trainer:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), a short warm-up and cosine decay to zero.

    Or stochastic gradient descent with Nesterov's momentum (Sutskever et al. 2013, as torch has it): gradients are not
    clipped, and weight decay is a part of them.

    The same seed, data and settings give the same weights (on a GPU: up to the order of its sums), as long as torch
    runs with as many threads: its sums are split among them. A manifest keeps that number, and ``reproduce`` sets it.
    """

    settings: TrainSettings = field(default_factory=TrainSettings)
    seed: int = 0
    journal: Journal = NOTHING_KEPT
    """Of the step that trains: where its trainings are, one after the other."""
    number: Iterator[int] = field(default_factory=count, init=False, repr=False, compare=False)
    """Of the next training in this journal."""

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
            loss: ``loss(outputs, batch) -> scalar``. Random numbers that it draws are to come from torch's, NumPy's or
                Python's own generators, whose states are noted.
            teacher: its outputs for the same (augmented) inputs are ``batch.teacher``.
            holdout: the state that does best on it by the same loss is kept, the one before training counted. If the
                loss grows beyond all bounds, training stops with a line on stderr and that state is kept too.
            steps: optimizer steps; without it, what ``epochs`` comes to.
            on_step: called after every step with its number (from 0) and loss. What it may remember is not noted.
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
        from accelerate.utils import DistributedDataParallelKwargs

        chosen = replace(self.settings, **settings)
        # a loss need not reach every parameter: hints reach those in front of the layers that follow the teacher's
        accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
        rank, world = accelerator.process_index, accelerator.num_processes
        total = steps or max(1, round(chosen.epochs * len(data) / (chosen.batch * world)))
        layout = data.preprocess.layout if data.preprocess else "NCHW"
        drawn = torch.Generator().manual_seed(self.seed + rank)
        journal = self.journal.of(next(self.number), repr(chosen), total, self.seed, world)
        before = [State.of(m) for m in (module, teacher) if m is not None]
        with seeded(self.seed + rank):
            try:
                notes = Notes(journal, module, accelerator)
                module.train()
                model = accelerator.prepare(module)
                if teacher is not None:
                    teacher.eval().to(accelerator.device)
                optimizer = accelerator.prepare(_optimizer(model, chosen))
                best = Best(module, holdout, loss, teacher, chosen.batch, accelerator)
                run = Run(module, optimizer, best, drawn, accelerator.scaler)
                batches = shuffled(data, chosen.batch, rank, world, self.seed)
                with _shown(total, accelerator.is_main_process) as show:
                    while (step := len(run.losses)) < total:
                        inputs, labels = to_device(next(batches), accelerator.device)
                        inputs = augment(inputs, chosen.augment, layout, drawn)
                        for group in optimizer.param_groups:
                            group["lr"] = chosen.learning_rate * schedule(step, total)
                        value = loss(_called(model, inputs), TrainBatch(inputs, labels, answers(teacher, inputs)))
                        if not isinstance(value, torch.Tensor) or value.numel() != 1:
                            raise DeploykitError(f"a loss must return a scalar tensor; it returned {_kind(value)}")
                        accelerator.backward(value)
                        if chosen.optimizer == "adamw":
                            accelerator.clip_grad_norm_(model.parameters(), CLIP)
                        optimizer.step()
                        optimizer.zero_grad()
                        run.losses.append(float(accelerator.reduce(value.detach(), "mean")))
                        if step == 0 and (found := notes.found(run.losses[0], total)):
                            run.go_on(found)
                            batches = shuffled(data, chosen.batch, rank, world, self.seed, done=len(run.losses))
                            show(len(run.losses), run.losses[-1])
                            continue
                        show(step + 1, run.losses[-1])
                        if on_step is not None:
                            on_step(step, run.losses[-1])
                        judged = (step + 1) % max(1, total // EVALUATIONS) == 0 or step + 1 == total
                        went_wrong = best.went_wrong(step + 1, total, run.losses[-1], judged)
                        if went_wrong:
                            hint = f"{went_wrong} at step {step + 1} of {total}; try a learning_rate below "
                            hint += f"{chosen.learning_rate:g}"
                            if not best.is_good:
                                raise DeploykitError(hint)
                            say(f"training stopped: {hint}. {best.said}")
                            break
                        if notes.due():
                            notes.take(run)
                best.restore()
            finally:
                accelerator.unwrap_model(module, keep_fp32_wrapper=False)
                accelerator.free_memory()
                for state in before:
                    state.restore()
        return run.losses


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


def _called(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """What it answers in training mode."""
    try:
        return model(**inputs)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise DeploykitError(
            "batch normalisation cannot learn from one value a channel; give a larger batch in [train]"
        ) from None


def _optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Weight decay acts on matrices and kernels; biases and normalisation are left alone."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    used = [g for g in groups if g["params"]]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(used, lr=settings.learning_rate, momentum=MOMENTUM, nesterov=True)
    return torch.optim.AdamW(used, lr=settings.learning_rate)


@contextmanager
def _shown(total: int, visible: bool) -> Iterator[Callable[[int, float], None]]:
    """Shows on stderr how far training is, its loss and how long it will take; nothing where that is no terminal.

    Yields:
        what is to be called with the number of steps done and the last loss.
    """
    if not visible or not sys.stderr.isatty():
        yield lambda done, loss: None
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    columns = (*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.4g}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training", total=total, loss=math.nan)
        yield lambda done, loss: bar.update(task, completed=done, loss=loss)


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} {tuple(shape)}"
