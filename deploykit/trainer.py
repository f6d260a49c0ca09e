"""`Trainer`: fits a module to a loss. Built on accelerate: ``accelerate launch`` spreads it over devices unchanged.

Where it is given a journal, a training that was killed goes on where it was. From time to time it notes all that
changes while it trains; whoever calls `Trainer.fit` again in the same way gets the same weights as without the kill.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.data import Batch, DataSet
from deploykit.core.errors import DeploykitError, MissingExtra
from deploykit.core.journal import NOTHING_KEPT, Journal, Pace
from deploykit.core.progress import say
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
"""Training stops where the held-out loss is this many times what it was before, in its first half the square of that: a
network that is nearly right gets worse at first, until the learning rate falls."""
SAME = 1e-5
"""Relative difference of two first losses of one training: other threads add up in another order."""


@dataclass(frozen=True)
class Trainer:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), a short warm-up and cosine decay to zero.

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

        chosen = replace(self.settings, **settings)
        accelerator = Accelerator()
        rank, world = accelerator.process_index, accelerator.num_processes
        total = steps or max(1, round(chosen.epochs * len(data) / (chosen.batch * world)))
        layout = data.preprocess.layout if data.preprocess else "NCHW"
        drawn = torch.Generator().manual_seed(self.seed + rank)
        journal = self.journal.of(next(self.number), repr(chosen), total, self.seed, world)
        before = [_State.of(m) for m in (module, teacher) if m is not None]
        with seeded(self.seed + rank):
            try:
                notes = _Notes(journal, module, accelerator)
                module.train()
                model = accelerator.prepare(module)
                if teacher is not None:
                    teacher.eval().to(accelerator.device)
                optimizer = accelerator.prepare(_optimizer(model, chosen))
                best = _Best(module, holdout, loss, teacher, chosen.batch, accelerator)
                run = _Run(module, optimizer, best, drawn, accelerator.scaler)
                batches = _shuffled(data, chosen.batch, rank, world, self.seed)
                with _shown(total, accelerator.is_main_process) as show:
                    while (step := len(run.losses)) < total:
                        inputs, labels = _to_device(next(batches), accelerator.device)
                        inputs = augment(inputs, chosen.augment, layout, drawn)
                        for group in optimizer.param_groups:
                            group["lr"] = chosen.learning_rate * schedule(step, total)
                        value = loss(model(**inputs), TrainBatch(inputs, labels, _answers(teacher, inputs)))
                        if not isinstance(value, torch.Tensor) or value.numel() != 1:
                            raise DeploykitError(f"a loss must return a scalar tensor; it returned {_kind(value)}")
                        accelerator.backward(value)
                        accelerator.clip_grad_norm_(model.parameters(), CLIP)
                        optimizer.step()
                        optimizer.zero_grad()
                        run.losses.append(float(accelerator.reduce(value.detach(), "mean")))
                        if step == 0 and (found := notes.found(run.losses[0], total)):
                            run.go_on(found)
                            batches = _shuffled(data, chosen.batch, rank, world, self.seed, done=len(run.losses))
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


def weights_hash(module: nn.Module) -> str:
    """Tells modules apart by the names, shapes and values of what they hold."""
    import torch

    digest = hashlib.sha256()
    for name, held in module.state_dict().items():
        if isinstance(held, torch.Tensor):
            digest.update(f"{name} {held.dtype} {tuple(held.shape)}".encode())
            digest.update(held.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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


class _Run:
    """All that changes while a module is trained."""

    def __init__(self, module: nn.Module, optimizer: Any, best: _Best, drawn: torch.Generator, scaler: Any) -> None:
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


class _Notes:
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

    def take(self, run: _Run) -> None:
        """Notes where it is. All processes come here together; the first one writes."""
        import torch
        from accelerate.utils import gather_object

        with self.pace.working():
            states = gather_object([run.random()])
            if self.accelerator.is_main_process:
                held = io.BytesIO()
                torch.save({**run.state(), "random": states}, held)
                self.journal.note("training", held.getvalue())


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


def _shuffled(data: DataSet, size: int, rank: int, world: int, seed: int, done: int = 0) -> Iterator[Batch]:
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


def _to_device(batch: Batch, device: torch.device) -> tuple[dict[str, Tensor], Tensor | None]:
    import torch

    inputs = {name: torch.from_numpy(array).to(device) for name, array in batch.inputs.items()}
    return inputs, None if batch.labels is None else torch.from_numpy(batch.labels).to(device)


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} {tuple(shape)}"
