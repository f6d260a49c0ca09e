"""Which layers can lose channels: every group of channels is pruned alone, and the answers are compared.

The model stays as it is. What was found is a table and a picture in the report, to choose ``skip`` of `prune` by, or to
see why accuracy went where it went (`deploykit.pruning.sensitivity`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deploykit.core.context import Context
from deploykit.core.errors import DeploykitError, said_by
from deploykit.core.manifest import Finding
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from torch import nn

    from deploykit.pruning.groups import Group
    from deploykit.pruning.sensitivity import Lost

NAMED = 3
"""Layers in the summary."""


@dataclass(frozen=True)
class Sensitivity:
    """Finds out what the answers lose when one group of channels alone is pruned; changes nothing."""

    shares: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Of a group's channels that go."""
    criterion: str = "fisher"
    """How channels are ranked, as in `prune`."""
    skip: tuple[str, ...] = ()
    """Layers that are not tried: names or patterns."""
    samples: int = 256
    """Calibration samples, at most, that are answered each time."""

    stage: ClassVar[Stage] = "model"
    needs: ClassVar[tuple[Need, ...]] = ("data",)
    pays_if: ClassVar[tuple[Profit, ...]] = ("structured",)

    def __post_init__(self) -> None:
        """Refuses options out of range and criteria that nobody knows."""
        if not self.shares or not all(0.0 < share < 1.0 for share in self.shares):
            raise ValueError("shares must be one or more numbers between 0 and 1")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, given {self.samples}")
        from deploykit.pruning.criteria import criterion

        object.__setattr__(self, "needs", tuple(dict.fromkeys(("data", *criterion(self.criterion).needs))))

    def foresee(self, context: Context) -> None:
        """Refuses data without labels where the criterion needs them, and layers that the original does not have."""
        from deploykit.pruning.takable import foresee_layers, mixing

        self._refuse_data(context)
        foresee_layers(self.skip, context.original, mixing, "sensitivity")

    def _refuse_data(self, context: Context) -> None:
        data = context.need("calibration", "sensitivity")
        if data.labels is None and "labels" in self.needs:
            raise DeploykitError(f"sensitivity: criterion '{self.criterion}' needs labels, and {data.origin} has none")

    def __call__(self, model: nn.Module, context: Context) -> nn.Module:
        """The same model; the findings go to ``context.note``.

        Raises:
            DeploykitError: no data, or no labels where the criterion needs some; a layer that does not exist; a model
                whose channels cannot be followed, or that has none to take out.
        """
        from deploykit.pruning.criteria import importance
        from deploykit.pruning.criteria.evidence import Evidence
        from deploykit.pruning.sensitivity import scan
        from deploykit.pruning.takable import sample, takable

        self._refuse_data(context)
        data = context.need("calibration", "sensitivity")
        whole = copy.deepcopy(model).eval().requires_grad_(True)
        groups = takable(whole, context, "sensitivity", self.skip, least=2)
        evidence = Evidence(sample(context), data, context.loss, context.seed)
        with said_by("sensitivity"):
            scores = importance(whole, groups, self.criterion, evidence)
        lost = list(scan(whole, groups, scores, sorted(set(self.shares)), data.spread(self.samples)))
        context.note(self._finding(lost, min(self.samples, len(data))))
        return model

    def _finding(self, lost: Sequence[Lost], samples: int) -> Finding:
        """All that was tried; by class where the model gives classes, else by the error of its outputs."""
        classes = all(each.points is not None for each in lost)
        measure = "% of answers changed" if classes else "error %"
        rows = tuple(
            (_named(each.group), len(each.group.channels), 100 * each.share, *([each.points] if classes else []),
             100 * each.error) for each in lost
        )  # fmt: skip
        columns = "layer", "channels", "% removed", *([measure] if classes else []), "error %"
        return Finding(
            repr(self),
            f"What answers lose when one layer alone is pruned, on {samples} samples",
            columns,
            rows,
            heat=("layer", "% removed", measure),
            summary=self._summary(lost, classes),
        )

    def _summary(self, lost: Sequence[Lost], classes: bool) -> str:
        """The layers that lose most, at the share in the middle."""
        shares = sorted(set(self.shares))
        share = shares[len(shares) // 2]
        worst = sorted((each for each in lost if each.share == share), key=lambda each: each.error, reverse=True)
        said = [f"{each.points:.1f} % of answers change" if classes else f"error {each.error:.1%}" for each in worst]
        named = ", ".join(
            f"{_named(each.group)} ({loss})" for each, loss in list(zip(worst, said, strict=True))[:NAMED]
        )
        return f"most sensitive with {share:.0%} of the channels gone: {named}"


def _named(group: Group) -> str:
    """The first layer that writes the channels, and how many do."""
    first, *more = group.writers
    return f"{first} + {len(more)}" if more else first
