"""The channels that matter least are taken out of all layers that they run through: the network becomes narrower.

What can go together is found by running the network (`deploykit.pruning.groups`), what matters least by a criterion
(`deploykit.pruning.criteria`), and how many go by the budget (`deploykit.pruning.budget`). What is lost with them, the
weights that are left make good (`deploykit.pruning.compensation`). The pruned network computes what the whole one does
with the same channels zeroed; that is checked before it is handed on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from deploykit.core.context import Context, enough
from deploykit.core.errors import DeploykitError, said_by, some
from deploykit.core.manifest import Finding
from deploykit.core.patterns import matching
from deploykit.core.progress import say
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from torch import nn

    from deploykit.pruning.groups import Channel


LEAST_SAMPLES = 32
"""That weights are fitted to."""
FAR = 0.05
"""More than this share above what was asked for is worth a word."""


@dataclass(frozen=True)
class Prune:
    """Takes out the channels that matter least, until ``amount`` of the network is saved."""

    amount: float | None = None
    """Share to save, 0 <= amount < 1."""
    at_most: float | None = None
    """Instead of a share: what may be left, in the unit of ``of``."""
    of: Literal["macs", "params", "bytes", "channels", "artifact", "ms"] = "macs"
    """What is saved: multiply-accumulates, parameters, bytes of the float weights, channels, bytes of the exported
    file, or milliseconds that it takes here."""
    criterion: str = "fisher"
    """How channels are ranked; a name in `deploykit.pruning.criteria`."""
    scope: Literal["global", "layer"] = "global"
    """global: the least important channels of the whole network; layer: the same share of every group of channels."""
    skip: tuple[str, ...] = ()
    """Layers whose output channels stay: names or patterns."""
    multiple: int = 0
    """What is left of a layer that loses channels is a multiple of this; 0: of the target's ``channel_multiple``."""
    most: float = 0.9
    """Largest share of a layer's channels that may go."""

    refit: bool = True
    """Whether the weights that are left are fitted to what the layers gave with all channels, on calibration data."""

    stage: ClassVar[Stage] = "model"
    needs: ClassVar[tuple[Need, ...]] = ("data",)
    """Of the default criterion; a step has those of its own."""
    pays_if: ClassVar[tuple[Profit, ...]] = ("structured",)

    def __post_init__(self) -> None:
        """Refuses options out of range and criteria that nobody knows."""
        from deploykit.layerwise.budgets import refuse_budget

        refuse_budget(self.amount, self.at_most)
        if not 0.0 < self.most < 1.0:
            raise ValueError(f"most must lie between 0 and 1, given {self.most}")
        if self.multiple < 0:
            raise ValueError(f"multiple must be at least 0, given {self.multiple}")
        from deploykit.pruning.criteria import criterion

        needs = (*criterion(self.criterion).needs, *(("data",) if self.refit else ()))
        object.__setattr__(self, "needs", tuple(dict.fromkeys(needs)))

    def foresee(self, context: Context) -> None:
        """Refuses too few calibration samples, data without labels where the criterion needs them, and layers that the
        original does not have."""
        from deploykit.pruning.takable import foresee_layers, mixing

        self._refuse_data(context)
        foresee_layers(self.skip, context.original, mixing, "prune")

    def _refuse_data(self, context: Context) -> None:
        data = context.need("calibration", "prune") if "data" in self.needs else None
        if data is not None and data.labels is None and "labels" in self.needs:
            raise DeploykitError(f"prune: criterion '{self.criterion}' needs labels, and {data.origin} has none")
        if self.refit and data is not None:
            why = "fits the weights that are left to the data"
            enough(context, "prune", LEAST_SAMPLES, why, "With refit = false it needs fewer.")

    def __call__(self, model: nn.Module, context: Context) -> nn.Module:
        """A narrower copy of the model.

        Raises:
            DeploykitError: an unknown criterion or layer, no data where the criterion needs some, a model whose
                channels cannot be followed, or a budget that cannot be met.
        """
        import copy

        from deploykit.layerwise.budgets import COUNTED, LEVELS, WORDS, NotEnough, saving, share_to_save
        from deploykit.losses import as_tensors
        from deploykit.pruning.budget import fit, ranked
        from deploykit.pruning.compensation import compensated
        from deploykit.pruning.criteria import comparable, criterion, importance
        from deploykit.pruning.criteria.evidence import Evidence
        from deploykit.pruning.groups import together
        from deploykit.pruning.surgery import assert_equal, widths, without
        from deploykit.pruning.takable import mixing, need_example, sample, takable

        self._refuse_data(context)
        data = context.need("calibration", "prune") if "data" in self.needs else None
        need_example(context, "prune")
        whole = copy.deepcopy(model).eval().requires_grad_(True)
        matching("layer", self.skip, mixing(whole))  # a wrong name is refused before files are written and timed
        share = saving(self.of, whole, context, "prune")
        alone = saving(COUNTED[self.of], whole, context, "prune") if self.of in COUNTED else share
        unit = WORDS.get(self.of, self.of)
        amount = share_to_save(self.amount, self.at_most, self.of, whole, context, "prune")
        if self.at_most is not None and amount == 0.0:
            return copy.deepcopy(model)
        groups = takable(whole, context, "prune", self.skip)
        evidence = Evidence(sample(context), data, context.loss, context.seed)
        with said_by("prune"):
            scores = importance(whole, groups, self.criterion, evidence)
        found: dict[int, float] = {}

        def saved(channels: list[Channel]) -> float:
            """What is measured, is measured once: those choices are of one order, and their numbers tell them apart."""
            if self.of not in COUNTED:
                return share(without(whole, together(channels)))
            if len(channels) not in found:
                found[len(channels)] = share(without(whole, together(channels)))
            return found[len(channels)]

        savings = [alone(without(whole, together([g.channels[0]]))) for g in groups]
        scores = comparable(scores, savings, criterion(self.criterion).in_cost)
        multiple = self.multiple or context.target.channel_multiple
        order = ranked(whole, groups, scores, multiple, self.most)
        try:
            chosen = fit(order, amount, self.scope, saved, LEVELS if self.of in COUNTED else None)
        except NotEnough as error:
            least = ""
            if self.at_most is not None:
                least = f"; the least possible is {self.at_most * (1 - error.possible) / (1 - amount):,.6g} {unit}"
            raise DeploykitError(
                f"prune: of the {unit}, {error}{least}. Layers keep a multiple of {multiple} channels, and at most "
                f"{self.most:.0%} of one goes: a smaller `multiple` or a larger `most` allows more"
                f"{' (measured, on a machine that may be busy)' if self.of == 'ms' else ''}."
            ) from None
        removed = together(chosen)
        narrowed = widths(whole, removed)
        share_saved = saved(chosen) if chosen else 0.0
        reached = f"{share_saved:.1%} of the {unit} saved"
        if share_saved - amount > FAR:
            reached += f" where {amount:.1%} was asked for, since layers keep multiples of {multiple}"
        say(f"prune: {reached}; {some([f'{name} {had} -> {left}' for name, had, left in narrowed], 8)}")
        context.note(
            Finding(repr(self), f"Channels taken out: {reached}", ("layer", "channels", "left"), tuple(narrowed))
        )
        if self.refit and data is not None and chosen:
            model = compensated(model, removed, data)
        pruned = without(model, removed)
        with said_by("prune"):
            assert_equal(model, pruned, removed, as_tensors(context.example))
        return pruned
