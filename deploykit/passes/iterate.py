"""Iterative compression: prune or decompose, train, again and again, until so much is gone.

    s_t  =  s (1 - (1 - t/n)³)        cubic: Zhu & Gupta 2018, "To prune, or not to prune", equation 1
    s_t  =  s t/n                     linear
    s_t  =  1 - (1 - s)^(t/n)         geometric: the same share of what is left in every round

What the weights are when they train again (Renda et al. 2020, "Comparing Rewinding and Fine-tuning in Neural Network
Pruning"): those they have (``nothing``: a tenth of the learning rate; ``learning_rate``: all of it again), or those the
model came with (``weights``). With an untrained model, ``weights`` and ``dense`` steps in front this is the lottery
ticket protocol (Frankle & Carbin 2019, "The Lottery Ticket Hypothesis", section 2). ``random`` is its control: its
rounds are those of ``weights`` and find the same winning ticket; only in the last one weights are drawn anew, once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from deploykit.core.context import Context
from deploykit.core.errors import DeploykitError
from deploykit.core.recipe import Foresees, Pass, Stage, Step
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
    """Of all steps that it may repeat; a step of its own has those of the one it repeats, and its needs."""

    def __post_init__(self) -> None:
        """Refuses settings that cannot train, and what cannot be rewound."""
        if not 0.0 < self.amount < 1.0 or self.rounds < 1 or self.steps < 1 or self.dense < 0:
            raise ValueError("amount must lie between 0 and 1, rounds and steps must be 1 or more, dense 0 or more")
        if not self.learning_rate > 0:
            raise ValueError("learning_rate must be above 0")
        if self.step != "sparsify" and self.rewind in ("weights", "random"):
            raise ValueError("weights of other shapes cannot be rewound; rewind nothing or the learning_rate")
        step = self._repeated()
        object.__setattr__(self, "needs", tuple(dict.fromkeys(("train", *step.needs))))
        object.__setattr__(self, "pays_if", step.pays_if)

    def _repeated(self) -> Pass:
        """The step, as it takes all at once; refuses wrong options of it."""
        from deploykit import passes

        return passes.build(Step(self.step, {**self.options, self._taken(): self.amount}))

    def foresee(self, context: Context) -> None:
        """Refuses what the step refuses: data that is not enough for it, layers that there are not."""
        step = self._repeated()
        if isinstance(step, Foresees):
            step.foresee(context)

    def __call__(self, model: nn.Module, context: Context) -> nn.Module:
        """A compressed and trained copy of the model.

        Raises:
            DeploykitError: as the step raises them; wrong options of the step.
        """
        from deploykit import passes
        from deploykit.passes.sparsify import Sparsify
        from deploykit.pruning.choose import layers_of
        from deploykit.retraining import train

        made = copy.deepcopy(model)
        steps = [passes.build(step) for step in self.each_round(made, context)]  # refused before any work
        if isinstance(steps[-1], Sparsify):  # so are layers that there are not
            layers_of(made, steps[-1].skip, "sparsify")
        else:  # and a budget that layers cannot meet
            steps[-1](made, replace(context, note=lambda _: None))
        if self.dense:
            train(made, context, "iterate", self.dense, self.learning_rate)
        for number, step in enumerate(steps):
            made = step(made, context)
            drawn = self.rewind == "random" and number < len(steps) - 1
            rewind(made, model, "weights" if drawn else self.rewind, context.seed)
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
    """Gives the weights of a pruned model those that it came with, or random ones, in place; zeros stay zero.

    Random are those that layers draw for themselves; parameters that are no layer's (a position embedding) go back to
    those that the model came with.
    """
    import torch
    from torch.nn.utils.parametrize import ParametrizationList

    from deploykit.core.seeds import seeded
    from deploykit.hub.structure import bake, set_parameter

    if what not in ("weights", "random"):
        return
    source, _ = bake(model)
    if what == "random":
        with seeded(seed + 1):
            redraw(source)
    state, exact = source.state_dict(), model.state_dict() if what == "weights" else {}
    with torch.no_grad():
        for path, module in pruned.named_modules():
            own: dict[str, torch.Tensor] = dict(module.named_parameters(path, recurse=False))
            own |= module.named_buffers(path, recurse=False)
            if not isinstance(module, ParametrizationList):
                for name in own.keys() & state.keys():
                    own[name].copy_(state[name])
            elif own.keys() <= exact.keys():  # the tensors that a weight is made of (weight norm)
                for name, tensor in own.items():
                    tensor.copy_(exact[name])
            else:
                layer, _, leaf = path.rpartition(".")
                layer = layer.removesuffix("parametrizations").removesuffix(".")
                set_parameter(pruned.get_submodule(layer), leaf, state[f"{layer}.{leaf}".removeprefix(".")])


def redraw(model: nn.Module) -> None:
    """Draws the weights of all layers anew, as their classes do: parts first and what holds them last."""
    for layer in reversed(list(model.modules())):
        draw = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
        if callable(draw):
            draw()
