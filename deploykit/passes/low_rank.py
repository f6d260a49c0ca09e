"""Layers become products of smaller ones, with ranks that the network as a whole chooses.

Liebenwein et al. 2021, "Compressing Neural Networks: Towards Determining the Optimal Layer-wise Decomposition" (ALDS):
input channels in k slices, each of rank j (`deploykit.low_rank.channel`), k and j of every layer such that the network
meets a budget with the least damage. With calibration data damage is what the outputs lose, by what that costs the
network, and every layer is fitted on what the compressed ones in front feed it (`deploykit.low_rank.fitted`). Only
factors that save what is budgeted are taken; a layer that is not called by itself, is shared, frozen or pruned stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, ClassVar, Literal

from deploykit.core.context import Context
from deploykit.core.errors import DeploykitError, said_by, some
from deploykit.core.manifest import Finding
from deploykit.core.patterns import matching
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from torch import nn

    from deploykit.low_rank.factored import Ranks
    from deploykit.low_rank.methods import Method
    from deploykit.low_rank.select import Choice, Tables

LEAST_SAMPLES = 32
"""That weights are fitted to."""


@dataclass(frozen=True)
class LowRank:
    """Decomposes layers until ``amount`` of the network is saved."""

    amount: float | None = None
    """Share to save, 0 <= amount < 1."""
    at_most: float | None = None
    """Instead of a share: what may be left, in the unit of ``of``."""
    of: Literal["params", "macs", "bytes", "artifact", "ms"] = "params"
    """What is saved: parameters, multiply-accumulates, bytes of the float weights, bytes of the exported file, or
    milliseconds that it takes here."""
    method: Literal["auto", "data", "weights", "alds", "equal_error", "constant", "energy", "pca", "l_rank"] = "auto"
    """How ranks are chosen (`deploykit.low_rank.methods`). auto: data where there are 32 calibration samples or more,
    else weights."""
    form: Literal["channel", "spatial", "tucker", "cp"] = "channel"
    """What layers become."""
    slices: int = 0
    """k of the form channel; 0: chosen for every layer."""
    layers: tuple[str, ...] = ()
    """Layers that may be decomposed: names or patterns; none: all."""
    skip: tuple[str, ...] = ()
    """Layers that stay whole: names or patterns."""
    multiple: int = 0
    """Channels between factors are a multiple of this; 0: of the target's ``channel_multiple``."""
    seeds: int = 15
    """How often alds starts, each time with other k."""

    stage: ClassVar[Stage] = "model"
    needs: ClassVar[tuple[Need, ...]] = ()
    """Of the default method; a step has those of its own."""
    pays_if: ClassVar[tuple[Profit, ...]] = ("low_rank",)

    def __post_init__(self) -> None:
        """Refuses options out of range."""
        from deploykit.layerwise.budgets import refuse_budget

        refuse_budget(self.amount, self.at_most)
        if self.slices < 0 or self.multiple < 0:
            raise ValueError(f"slices and multiple must be at least 0, given {self.slices} and {self.multiple}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, given {self.seeds}")
        if self.form != "channel" and (self.slices or self.method == "alds"):
            raise ValueError(f"slices and alds are of the form channel; {self.form} has none: use weights")
        object.__setattr__(self, "needs", ("data",) if self.method in ("data", "pca") else ())

    def foresee(self, context: Context) -> None:
        """Refuses too few samples."""
        self._method(context)

    def __call__(self, model: nn.Module, context: Context) -> nn.Module:
        """A copy of the model with factors in the place of layers.

        Raises:
            DeploykitError: unknown layers, one named that cannot be decomposed, weights that are not finite, too few
                samples, a budget that cannot be met, or a model that does not run with factors.
        """
        import copy
        from functools import partial

        from deploykit.layerwise.budgets import COUNTED, NotEnough, saving, share_to_save, size
        from deploykit.losses import as_tensors
        from deploykit.low_rank import methods, select
        from deploykit.low_rank.eligible import look, obstacles, untouchable
        from deploykit.low_rank.fitted import fitted
        from deploykit.low_rank.search import counted, measured, quicker, ranks_of
        from deploykit.low_rank.surgery import assert_runs, replaced
        from deploykit.low_rank.tables import table

        if not context.example:
            raise DeploykitError("low_rank: the context has no example to run the model with")
        method, unit = self._method(context), COUNTED.get(self.of, self.of)
        given, model = model, self._whole_again(model)
        amount, at_most = self.amount, self.at_most
        if model is not given:  # a share of the network as it came, not made whole
            now = size(self.of, context, "low_rank")(given)
            at_most = (1.0 - amount) * now if amount is not None else at_most
            amount = None
            if at_most is not None and now <= at_most:  # it was made small enough before
                return copy.deepcopy(given)
        amount = share_to_save(amount, at_most, self.of, model, context, "low_rank")
        inputs = as_tensors(context.example)
        seen = look(model, inputs)
        with said_by("low_rank"):
            whys = obstacles(model, seen, self.form)
        layers = {name: model.get_submodule(name) for name in self._decomposable(whys)}
        norms = {}
        if method in methods.SEES_DATA:
            norms = methods.norms(method, model, list(layers), context.need("calibration", "low_rank"), context.seed)
        multiple, k = self.multiple or context.target.channel_multiple, self.slices or int(method in methods.ONE_SLICE)
        every = {
            name: table(layer, self.form, seen[name].runs, multiple, k, norms.get(name))
            for name, layer in layers.items()
        }
        cost = attrgetter(unit)
        tables = select.saving(every, cost)
        choose = partial(methods.choose, method, cost, self.seeds, context.seed)
        saves = saving(self.of, model, context, "low_rank")

        def saved(ranks: Mapping[str, Ranks]) -> float:
            return saves(replaced(model, self.form, ranks))

        try:
            if unit == self.of:
                choice = counted(choose, tables, cost, amount, size(unit, context, "low_rank")(model))
            else:
                tables = quicker(choose, tables, cost, saved) if self.of == "ms" else tables
                choice = measured(choose, tables, cost, amount, saved)
        except NotEnough as error:
            raise DeploykitError(f"low_rank: {error}, by what form, slices, layers, skip and multiple allow") from None
        ranks = ranks_of(choice)
        fit = model
        if method == "data" and ranks:
            matters = {name: norm.d for name, norm in norms.items()}
            data = context.need("calibration", "low_rank")
            fit = fitted(model, self.form, ranks, matters, set(untouchable(model)), data)
        made = replaced(fit, self.form, ranks)
        with said_by("low_rank"):
            assert_runs(made, inputs)
        context.note(self._ranks(choice, tables, whys, _removed(given, made, context)))
        if self.form == "channel":
            context.note(_decay(repr(self), tables, choice))
        return made

    def _whole_again(self, model: nn.Module) -> nn.Module:
        """The model, its layers that are decomposed in this form already in one piece if they may be decomposed."""
        from deploykit.low_rank.eligible import layers_of
        from deploykit.low_rank.surgery import decomposed_in, whole_again

        again = set(decomposed_in(model, self.form)) & self._wanted(layers_of(model))
        return whole_again(model, again) if again else model

    def _wanted(self, known: Iterable[str]) -> set[str]:
        """The layers that may be decomposed, of all.

        Raises:
            DeploykitError: a pattern that matches none.
        """
        wanted = matching("layer", self.layers, known) if self.layers else set(known)
        return wanted - matching("layer", self.skip, known)

    def _decomposable(self, whys: Mapping[str, str]) -> list[str]:
        """The layers that may be decomposed and can be.

        Args:
            whys: by layer why it cannot; empty: it can.

        Raises:
            DeploykitError: unknown layers, one that is named and cannot be decomposed, or none that can.
        """
        for name in self.layers:
            if whys.get(name):
                raise DeploykitError(f"low_rank: layer '{name}' cannot be decomposed: {whys[name]}")
        wanted = self._wanted(whys)
        found = [name for name, why in whys.items() if name in wanted and not why]
        if not found:
            reasons = some([f"'{name}': {whys[name] or 'left out'}" for name in whys], 4) or "it has no such layers"
            raise DeploykitError(f"low_rank: no layer of this model can be decomposed ({reasons})")
        return found

    def _method(self, context: Context) -> Method:
        """The method, where it is left open by what there is.

        Raises:
            DeploykitError: it needs samples that there are not.
        """
        from deploykit.low_rank.methods import ONE_SLICE

        if self.slices > 1 and self.method in ONE_SLICE:
            raise DeploykitError(f"low_rank: method '{self.method}' is of one slice; with slices use weights or data")
        samples = len(context.data["calibration"]) if "calibration" in context.data else 0
        if self.method == "auto":
            return "data" if samples >= LEAST_SAMPLES else "weights"
        if "data" in self.needs:
            context.need("calibration", "low_rank")
            if samples < LEAST_SAMPLES:
                raise DeploykitError(
                    f"low_rank: method '{self.method}' needs at least {LEAST_SAMPLES} calibration samples; there are "
                    f"{samples}. weights needs none."
                )
        return self.method

    def _ranks(self, choice: Choice, tables: Tables, whys: Mapping[str, str], removed: str) -> Finding:
        """The ranks of every layer, and why others stay whole."""
        rows: list[tuple[str | float | None, ...]] = []
        for name, why in whys.items():
            c = choice.get(name)
            if c is None or not c.ranks:
                why = why or ("it is left out" if c is None else "the budget is met without it")
                rows.append((name, "whole", None, None, 100.0, None, None, None, why))
                continue
            k, ranks = (c.k, c.ranks[1:]) if self.form == "channel" else (None, c.ranks)
            kept = 100.0 * c.params / tables[name].whole.params
            rows.append((name, self.form, k, ", ".join(map(str, ranks)), kept, 100.0 * c.share, c.worst, c.bound, ""))
        columns = (
            "layer", "form", "slices k", "rank j", "weights left (%)", "energy lost (%)", "error", "bound",
            "whole because",
        )  # fmt: skip
        return Finding(repr(self), f"Ranks of layers: {removed}", columns, tuple(rows), summary=removed)


def _removed(model: nn.Module, made: nn.Module, context: Context) -> str:
    """CR-P and CR-F, in words."""
    from deploykit.layerwise.budgets import size

    params, macs = size("params", context, "low_rank"), size("macs", context, "low_rank")
    return (
        f"{1 - params(made) / params(model):.1%} of the parameters removed (CR-P), "
        f"{1 - macs(made) / macs(model):.1%} of the multiply-accumulates (CR-F)"
    )


def _decay(step: str, tables: Tables, choice: Choice) -> Finding:
    """How singular values fall, as a map, and where each layer is cut."""
    rows = []
    for name, table in tables.items():
        ranks = choice[name].ranks if name in choice else ()
        cut = f"{name} (whole)"
        if ranks:
            k, j = ranks
            cut = f"{name} (k = {k}, j = {j} of {len(table.decay)})"
        for tenth in range(10):
            value = table.decay[len(table.decay) * tenth // 10]
            rows.append((cut, 10.0 * tenth, 100.0 * value))
    columns = ("layer", "of the ranks (%)", "singular value, of the largest (%)")
    return Finding(step, "How singular values fall", columns, tuple(rows), heat=columns)
