"""Iterative compression: prune or decompose, train, again and again, until so much is gone.

    s_t  =  s (1 - (1 - t/n)³)        cubic: Zhu & Gupta 2018, "To prune, or not to prune", equation 1
    s_t  =  s t/n                     linear
    s_t  =  1 - (1 - s)^(t/n)         geometric: the same share of what is left in every round

What the weights are when they train again (Renda et al. 2020, "Comparing Rewinding and Fine-tuning in Neural Network
Pruning"): those they have (``nothing``: a tenth of the learning rate; ``learning_rate``: all of it again), those the
model came with (``weights``), or new random ones (``random``). With an untrained model, ``weights`` and ``dense`` steps
in front this is the lottery ticket protocol (Frankle & Carbin 2019), and ``random`` its control.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from deploykit.core.context import Context
from deploykit.core.errors import DeploykitError
from deploykit.core.recipe import Foresees, Stage, Step
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from torch import nn

TUNED = 0.1
"""Of the learning rate where nothing is rewound: training goes on as it ended."""


@dataclass(frozen=True)
class Iterate:
    """Compresses in rounds and trains after each."""

    amount: float
    """What is gone in the end, as the step counts it; 0 < amount < 1."""
    step: Literal["sparsify", "prune", "low_rank"] = "sparsify"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the step, but for how much it takes."""
    rounds: int = 5
    steps: int = 100
    """Optimizer steps after every round."""
    dense: int = 0
    """Optimizer steps before the first."""
    schedule: Literal["cubic", "linear", "geometric"] = "cubic"
    rewind: Literal["nothing", "learning_rate", "weights", "random"] = "learning_rate"
    learning_rate: float = 1e-3

    stage: ClassVar[Stage] = "model"
    needs: ClassVar[tuple[Need, ...]] = ("train",)
    pays_if: ClassVar[tuple[Profit, ...]] = ("structured", "low_rank", "unstructured", "small_file")

    def __post_init__(self) -> None:
        """Refuses settings that cannot train, and what cannot be rewound."""
        if not 0.0 < self.amount < 1.0 or self.rounds < 1 or self.steps < 1 or self.dense < 0:
            raise ValueError("amount must lie between 0 and 1, rounds and steps must be 1 or more, dense 0 or more")
        if not self.learning_rate > 0:
            raise ValueError("learning_rate must be above 0")
        if self.step != "sparsify" and self.rewind in ("weights", "random"):
            raise ValueError("weights of other shapes cannot be rewound; rewind nothing or the learning_rate")

    def foresee(self, context: Context) -> None:
        """Refuses wrong options of the step, and data that is not enough for it."""
        from deploykit import passes

        step = passes.build(Step(self.step, {**self.options, self._taken(): self.amount}))
        if isinstance(step, Foresees):
            step.foresee(context)

    def __call__(self, model: nn.Module, context: Context) -> nn.Module:
        """A compressed and trained copy of the model.

        Raises:
            DeploykitError: as the step raises them; wrong options of the step.
        """
        from deploykit import passes
        from deploykit.retraining import train

        made = copy.deepcopy(model)
        steps = [passes.build(step) for step in self.each_round(made, context)]  # refused before any work
        if self.step != "sparsify":  # so is a budget that layers cannot meet
            steps[-1](made, replace(context, note=lambda _: None))
        if self.dense:
            train(made, context, "iterate", self.dense, self.learning_rate)
        for number, step in enumerate(steps):
            made = step(made, context)
            rewind(made, model, self.rewind, context.seed + number)
            rate = self.learning_rate * (TUNED if self.rewind == "nothing" else 1.0)
            train(made, context, "iterate", self.steps, rate)
        return made

    def each_round(self, model: nn.Module, context: Context) -> list[Step]:
        """The step of every round.

        Zeros are counted of the whole. Layers become smaller from round to round, so there it is what may be left.
        """
        self._taken()
        if self.step == "sparsify":
            return [Step("sparsify", {**self.options, "sparsity": amount}) for amount in self.amounts()]
        from deploykit.layerwise.budgets import size
        from deploykit.low_rank.forms import form_of

        form = str(self.options.get("form", "channel"))
        if self.step == "low_rank" and self.rounds > 1 and form_of(form).KERNEL is None:
            raise DeploykitError(
                f"iterate: layers decomposed as {form} cannot be decomposed further; use channel or tucker"
            )

        unit = self.options.get("of", "macs" if self.step == "prune" else "params")
        whole = size(unit, context, "iterate")(model)
        return [Step(self.step, {**self.options, "at_most": whole * (1 - amount)}) for amount in self.amounts()]

    def _taken(self) -> str:
        """The option of the step that says how much it takes, which may not be among the user's."""
        key = "sparsity" if self.step == "sparsify" else "amount"
        for taken in (key, "at_most"):
            if taken in self.options:
                raise DeploykitError(f"iterate: {taken} of {self.step} is set round by round; give amount")
        return key

    def amounts(self) -> list[float]:
        """What is gone after each round."""
        done = [t / self.rounds for t in range(1, self.rounds + 1)]
        return [
            {
                "cubic": self.amount * (1 - (1 - x) ** 3),
                "linear": self.amount * x,
                "geometric": 1 - (1 - self.amount) ** x,
            }[self.schedule]
            for x in done
        ]


def rewind(pruned: nn.Module, model: nn.Module, what: str, seed: int) -> None:
    """Gives the weights of a pruned model those that it came with, or random ones, in place; zeros stay zero."""
    import torch

    from deploykit.core.seeds import seeded
    from deploykit.hub.structure import bake

    if what not in ("weights", "random"):
        return
    source, _ = bake(model)
    if what == "random":
        with seeded(seed + 1):
            for layer in source.modules():
                if callable(getattr(layer, "reset_parameters", None)):
                    layer.reset_parameters()  # type: ignore[operator]
    state = source.state_dict()
    with torch.no_grad():
        for name, tensor in pruned.state_dict(keep_vars=True).items():
            origin = name.replace("parametrizations.", "").removesuffix(".original")
            if origin in state:
                tensor.copy_(state[origin])
