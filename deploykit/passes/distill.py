"""Distillation: the model (the student) learns from what teachers answer. With a large teacher it comes near to it.

What is compared of the answers: softened probabilities (``soft``: Hinton et al. 2015), logits (``logits``: Ba &
Caruana 2014), logits under noise (``noisy``: Sau & Balasubramanian 2016) or nothing (``none``); and, where ``layers``
are named, what these write: through a regressor (``hints``: Romero et al. 2015) or as attention maps (``attention``:
Zagoruyko & Komodakis 2017). The losses are in `deploykit.distillation`, one a file. Without a teacher the model as it
came in teaches: then a step in front has made the student smaller.

Only ``soft`` with ``alpha`` below 1 looks at labels. Samples may be made up as well (``munge``: Bucila et al. 2006).
Zeros stay zero. Held-out samples decide which state is kept.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.progress import say
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from torch import nn

    from deploykit.distillation.features import Watched
    from deploykit.distillation.teachers import Ensemble
    from deploykit.losses import Loss


@dataclass(frozen=True)
class Distill:
    """Trains the model for a number of optimizer steps to answer as its teachers do."""

    teacher: str | tuple[str, ...] = ()
    """``file.py:factory`` or ``.onnx``; several answer as one. Empty: the model as it came in."""
    loss: Literal["soft", "logits", "noisy", "none"] = "soft"
    temperature: float = 4.0
    """Of ``soft``."""
    alpha: float = 1.0
    """Weight of the teacher in ``soft``; the labels have the rest."""
    sigma: float = 0.5
    """Standard deviation of the factor that ``noisy`` disturbs a logit by."""
    fraction: float = 0.5
    """Of the samples, that ``noisy`` disturbs."""
    layers: Mapping[str, str] = field(default_factory=dict)
    """The student's layers, and which of the teacher's each follows."""
    features: Literal["hints", "attention"] = "hints"
    """How they follow."""
    beta: float = 1.0
    """Weight of the features."""
    munge: int = 0
    """Samples that are made up for every one there is."""
    munge_p: float = 0.5
    """Probability for an attribute to be traded with the nearest sample's."""
    munge_s: float = 1.0
    """Local variance: the larger, the closer to what was traded."""
    cache: str = ""
    """Folder where the teacher's answers are kept for other runs; empty: for this one."""
    steps: int = 500
    learning_rate: float = 1e-3

    stage: ClassVar[Stage] = "model"
    needs: ClassVar[tuple[Need, ...]] = ("train",)
    pays_if: ClassVar[tuple[Profit, ...]] = (
        "structured", "2:4", "unstructured", "codebook", "low_rank", "fp16", "int8", "int4", "small_file",
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Refuses settings that cannot train."""
        if self.steps < 1 or not (self.learning_rate > 0 and self.temperature > 0 and self.beta > 0):
            raise ValueError("steps, learning_rate, temperature and beta must be above 0")
        if not 0.0 <= self.alpha <= 1.0 or not 0.0 < self.fraction <= 1.0 or not 0.0 < self.munge_p <= 1.0:
            raise ValueError("alpha must lie between 0 and 1; fraction and munge_p, too, and above 0")
        if self.munge < 0 or not (self.munge_s > 0 and self.sigma > 0):
            raise ValueError("munge must be 0 or more, munge_s and sigma above 0")
        if self.loss == "none" and not self.layers:
            raise ValueError("loss = 'none' leaves nothing to learn; name layers")
        if self.alpha < 1.0 and self.loss != "soft":
            raise ValueError("alpha is for loss = 'soft'; the other losses see no labels")
        if self.alpha < 1.0 and self.munge:
            raise ValueError("samples that munge makes up have no labels: alpha must be 1")
        if self.cache and self.layers:
            raise ValueError("what layers write is not kept: leave out cache")

    @property
    def follows_another(self) -> bool:
        """Whether somebody else teaches than the model as it came in."""
        return bool(self.teacher)

    def foresee(self, context: Context) -> None:
        """Refuses teachers, layers and data that do not go with the model or the loss."""
        if context.original is not None:
            self._teachers(context.original, context)

    def __call__(self, model: nn.Module, context: Context) -> nn.Module:
        """A trained copy of the model.

        Raises:
            DeploykitError: as `foresee`; or the loss becomes NaN and there is no good state to go back to.
        """
        from deploykit.distillation.munge import munge
        from deploykit.losses import cross_entropy
        from deploykit.retraining import split

        if context.loss is cross_entropy and not self.layers:
            say("note: loss = 'ce' in [train] takes the place of distill's own, and labels alone teach then")
        teacher = self._teachers(model, context)
        data, holdout = split(context.need("train", "distill"), context.data.get("holdout"))
        if self.munge:
            data = munge(data, self.munge, self.munge_p, self.munge_s, context.seed)
        trained = copy.deepcopy(model)
        if self.layers:
            self._fit_watched(trained, teacher, context, data, holdout)
        elif self._asks_once(context, data):
            self._fit_kept(trained, teacher, context, data, holdout)
        else:
            self._fit(trained, context, data, holdout, self._loss(context), teacher)
        return trained

    def _teachers(self, student: nn.Module, context: Context) -> Ensemble:
        """The teachers as one, if they and the data go with the student and the loss."""
        from deploykit.distillation.teachers import ask, examined, load_teacher, refuse_unlike
        from deploykit.layerwise.watching import evaluating
        from deploykit.losses import as_tensors, cross_entropy

        data = context.need("train", "distill")
        if context.loss is cross_entropy or (context.loss is None and self.alpha < 1.0):
            which = "'ce'" if context.loss else f"'soft' with alpha = {self.alpha:g}"
            if data.labels is None or self.munge:
                why = "munge makes up samples without" if self.munge else f"{data.origin} has none"
                raise DeploykitError(f"distill: loss {which} needs labels, and {why}; 'soft' with alpha = 1 needs none")
        specs = (self.teacher,) if isinstance(self.teacher, str) else self.teacher
        if not specs and context.original is None:
            raise DeploykitError("distill needs a teacher: there is no original model")
        few = as_tensors(next(data.batches(2)).inputs)
        teacher = examined([load_teacher(spec) for spec in specs] or [context.original], few)
        if context.loss is None and self.loss != "none":
            with evaluating(student):
                refuse_unlike(ask(student, few, "the student"), teacher(**few), classes=self.loss == "soft")
        if self.layers:
            self._watched(student, teacher, context)
        return teacher

    def _asks_once(self, context: Context, data: DataSet) -> bool:
        """Whether the teacher is asked once about every sample, or with every batch.

        Once, where samples are the same every time, and each comes up at least once or the answers are wanted later.
        """
        settings = getattr(context.trainer, "settings", None)
        if settings is None or settings.augment:  # a trainer of the user's may do anything with the samples
            if self.cache:
                say(f"note: {self.cache} is not used: samples are augmented, so the teacher is asked anew every time")
            return False
        return bool(self.cache) or self.steps * settings.batch >= len(data)

    def _fit_kept(
        self, student: nn.Module, teacher: Ensemble, context: Context, data: DataSet, holdout: DataSet | None
    ) -> None:
        """With a teacher that is asked once about every sample."""
        from accelerate import Accelerator

        from deploykit.distillation.answers import answers, looked_up, numbered
        from deploykit.distillation.teachers import fingerprint

        sets = [data] if holdout is None else [data, holdout]
        known = fingerprint(teacher) if self.cache else None
        if self.cache and known is None:
            say(f"note: {self.cache} is not used: a teacher that is no module and no .onnx cannot be told from others")
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) if known is None else Path(self.cache)
            tables = [answers(teacher, each, folder, known, Accelerator().device) for each in sets]
            loss = looked_up(self._loss(context), sets, tables)
            data, *rest = numbered(sets)
            self._fit(student, context, data, rest[0] if rest else None, loss, None)

    def _fit_watched(
        self, student: nn.Module, teacher: Ensemble, context: Context, data: DataSet, holdout: DataSet | None
    ) -> None:
        """With layers that follow the teacher's; regressors are trained with the student and left behind."""
        from deploykit.distillation.attention import attention
        from deploykit.distillation.features import followed
        from deploykit.distillation.hints import hints

        own, theirs = self._watched(student, teacher, context)
        answered = self._loss(context) if context.loss or self.loss != "none" else None
        features = attention if self.features == "attention" else hints
        self._fit(own, context, data, holdout, followed(answered, features, self.beta), theirs)

    def _fit(
        self, student: nn.Module, context: Context, data: DataSet, holdout: DataSet | None, loss: Loss,
        teacher: nn.Module | None,
    ) -> None:  # fmt: skip
        if context.trainer is None:
            raise DeploykitError("distill needs a trainer")
        context.trainer.fit(
            student, data, loss, teacher=teacher, holdout=holdout, steps=self.steps, learning_rate=self.learning_rate
        )

    def _watched(self, student: nn.Module, teacher: Ensemble, context: Context) -> tuple[Watched, Watched]:
        """Student and teacher with the layers that are compared, and what has to be between these."""
        from deploykit.distillation.features import watched_pair
        from deploykit.losses import as_tensors

        few = as_tensors(next(context.need("train", "distill").batches(2)).inputs)
        return watched_pair(student, teacher, self.layers, self.features == "hints", few, context.seed)

    def _loss(self, context: Context) -> Loss:
        """On the answers: what the recipe's ``[train]`` table names, or the step's own."""
        from deploykit.distillation.logits import logits
        from deploykit.distillation.noisy import noisy
        from deploykit.distillation.soft import soft

        if context.loss is not None:
            return context.loss
        if self.loss == "noisy":
            return noisy(self.sigma, self.fraction)
        return logits if self.loss == "logits" else soft(self.temperature, self.alpha)
