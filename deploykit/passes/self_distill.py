"""Self-distillation: classifiers behind the stages of a network learn from its deepest one, and the network with them.

Zhang et al. 2019, "Be Your Own Teacher": a bottleneck and a classifier stand behind every stage but the last. They
learn from the labels, from the deepest answer (Kullback-Leibler divergence, softened) and from the deepest features
(squared distance); the deepest learns from the labels alone, and all that is in front of the exits from all of them.
Afterwards the exits are taken off, and what is deployed is the network as it was, better trained. Or they stay
(``keep_exits``): then ``deploykit exits`` writes a chain that samples leave as soon as an exit is sure.

Where stages end is found by running the network, or named. `deploykit.exits` has the parts, one idea a file.

Two controls: ``dsn`` (deep supervision, Lee et al. 2015: labels alone teach the exits) and ``plain`` (no exits), at
equal steps. Zeros stay zero. Held-out samples decide which state is kept, by the same loss.

Refused: data without labels, networks with several answers, stages that are not there or run more than once.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from deploykit.core.context import Context
from deploykit.core.errors import DeploykitError
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from torch import nn

    from deploykit.exits.places import Places


@dataclass(frozen=True)
class SelfDistill:
    """Trains the model for a number of optimizer steps, with exits behind its stages."""

    stages: tuple[str, ...] = ()
    """Modules that stages end with, first to last; the last is the deepest. Empty: they are found."""
    method: Literal["self", "dsn", "plain"] = "self"
    alpha: float = 0.1
    """Weight of the deepest answer; the labels have the rest."""
    temperature: float = 3.0
    hint: float = 1e-4
    """Weight of the deepest features."""
    keep_exits: bool = False
    steps: int = 500
    learning_rate: float = 1e-3

    stage: ClassVar[Stage] = "model"
    needs: ClassVar[tuple[Need, ...]] = ("train", "labels")
    pays_if: ClassVar[tuple[Profit, ...]] = (
        "structured", "2:4", "unstructured", "codebook", "low_rank", "fp16", "int8", "int4", "small_file",
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Refuses settings that cannot train."""
        if self.steps < 1 or not (self.learning_rate > 0 and self.temperature > 0):
            raise ValueError("steps, learning_rate and temperature must be above 0")
        if not 0.0 <= self.alpha <= 1.0 or not self.hint >= 0:
            raise ValueError("alpha must lie between 0 and 1, hint must be 0 or more")
        if self.method == "plain" and (self.keep_exits or self.stages):
            raise ValueError("method = 'plain' trains without exits: leave out keep_exits and stages")

    def foresee(self, context: Context) -> None:
        """Refuses data without labels, and stages that are not there."""
        self._refuse_unlabelled(context)
        if context.original is not None and self.method != "plain":
            self._places(context.original, context)

    def __call__(self, model: nn.Module, context: Context) -> nn.Module:
        """A trained copy of the model; with ``keep_exits`` a `WithExits` around it.

        Raises:
            DeploykitError: as `foresee`; or the loss becomes NaN and there is no good state to go back to.
        """
        from deploykit.core.seeds import seeded
        from deploykit.exits.losses import self_distillation
        from deploykit.exits.network import InTraining, attach
        from deploykit.losses import cross_entropy
        from deploykit.retraining import split

        self._refuse_unlabelled(context)
        if context.trainer is None:
            raise DeploykitError("self_distill needs a trainer")
        data, holdout = split(context.need("train", "self_distill"), context.data.get("holdout"))
        labels = context.loss or cross_entropy
        trained = copy.deepcopy(model)
        if self.method == "plain":
            context.trainer.fit(
                trained, data, labels, holdout=holdout, steps=self.steps, learning_rate=self.learning_rate
            )
            return trained
        with seeded(context.seed):
            whole = attach(trained, self._places(trained, context))
        alpha, hint = (self.alpha, self.hint) if self.method == "self" else (0.0, 0.0)
        context.trainer.fit(
            InTraining(whole), data, self_distillation(alpha, self.temperature, hint, labels), holdout=holdout,
            steps=self.steps, learning_rate=self.learning_rate,
        )  # fmt: skip
        return whole.eval() if self.keep_exits else trained

    def _places(self, model: nn.Module, context: Context) -> Places:
        from deploykit.exits.network import WithExits, classes_of
        from deploykit.exits.places import Places
        from deploykit.exits.stages import found, named
        from deploykit.losses import as_tensors

        if isinstance(model, WithExits):
            raise DeploykitError("self_distill: this network has exits already; give the one without")
        few = as_tensors(next(context.need("train", "self_distill").batches(2)).inputs)
        try:
            classes, output = classes_of(model, few)
            stages = named(model, few, self.stages) if self.stages else found(model, few)
        except DeploykitError as error:
            raise DeploykitError(f"self_distill: {error}") from None
        return Places(stages, classes, output)

    def _refuse_unlabelled(self, context: Context) -> None:
        data = context.need("train", "self_distill")
        if data.labels is None:
            raise DeploykitError(f"self_distill learns from labels, and {data.origin} has none; distill needs none")
