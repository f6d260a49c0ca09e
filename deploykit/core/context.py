"""`Context`: all a pass may ask for; `Cost`: what a model costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from deploykit.core.data import DataSet, held_out
from deploykit.core.errors import DeploykitError
from deploykit.core.journal import NOTHING_KEPT, Journal
from deploykit.core.target import Target

if TYPE_CHECKING:
    from deploykit.core.manifest import Finding

LEAST_APART = 16
Role = Literal["train", "calibration", "holdout", "eval"]


@dataclass(frozen=True)
class Cost:
    """What a model costs to keep and to run. None means not measured."""

    macs: int
    """Multiply-accumulates for one sample."""
    params: int
    """Weights that are not masked out."""
    bytes: int
    """Of the float weights as stored."""
    ms: float | None = None


class Trainer(Protocol):
    """Fits a module with a loss; see `deploykit.training.trainer`."""

    def fit(self, module: Any, data: DataSet, loss: Callable[[Any, Any], Any], **settings: Any) -> list[float]:
        """Trains in place; returns the loss of every optimizer step."""
        ...


def _forget(_: Finding) -> None:
    """Where nobody wants to know."""


@dataclass(frozen=True)
class Context:
    """Handed to every pass of a recipe."""

    target: Target
    """Of several targets in one run the first. A hub step reads ``hub.spec`` instead: it serves all targets with it."""
    data: Mapping[Role, DataSet] = field(default_factory=dict)
    example: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    """Two or more samples, stacked."""
    original: Any = None
    """The model as it came in: the teacher."""
    trainer: Trainer | None = None
    loss: Callable[[Any, Any], Any] | None = None
    """What the recipe's ``[train]`` table names; None: each step has its own."""
    cost: Callable[[Any], Cost] | None = None
    file_bytes: Callable[[Any], int] | None = None
    """What the target's most compressed file of a module takes."""
    times: Callable[[Sequence[Any]], list[float]] | None = None
    """Milliseconds that such files of some modules take for one sample, medians of calls that take turns; None: times
    taken here are not those of the target."""
    note: Callable[[Finding], None] = _forget
    """Takes what a step in front of the hub found out, for the report; a hub has findings of its own."""
    journal: Journal = NOTHING_KEPT
    """What this step found before a run like this one was cut."""
    seed: int = 0

    def need(self, role: Role, who: str) -> DataSet:
        """The data of that role.

        Raises:
            DeploykitError: there is none; names the option that brings it.
        """
        if role not in self.data:
            option = {"train": "--train", "calibration": "--calib", "holdout": "--calib", "eval": "--eval"}[role]
            raise DeploykitError(f"step '{who}' needs {role} data: give {option}")
        return self.data[role]


def enough(context: Context, who: str, least: int, why: str, instead: str = "") -> DataSet:
    """The calibration data, which a step needs so many samples of.

    Args:
        context: has the data.
        who: the step, as users write it.
        least: samples.
        why: what it does with them, behind its name.
        instead: what works with fewer, a sentence.

    Raises:
        DeploykitError: there are fewer.
    """
    data = context.need("calibration", who)
    if len(data) < least:
        raise DeploykitError(
            f"{who} {why} and needs at least {least} calibration samples; there are {len(data)}. {instead}".rstrip()
        )
    return data


def apart(context: Context, who: str) -> tuple[DataSet, DataSet]:
    """Samples that weights are chosen by, and others that answers are judged on.

    Raises:
        DeploykitError: too few.
    """
    data = enough(context, who, LEAST_APART, "measures what smaller weights lose")
    if "holdout" in context.data:
        return data, context.data["holdout"]
    judged = held_out(len(data))
    return data.pick(np.flatnonzero(~judged)), data.pick(np.flatnonzero(judged))
