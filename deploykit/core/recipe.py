"""`Step`, recipe and `Pass`: what is done to a model, in which order, as a value that TOML can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import tomli_w

from deploykit.core.errors import DeploykitError, unknown
from deploykit.core.tables import from_table, read_toml
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from deploykit.core.context import Context

Stage = Literal["model", "graph", "hub"]
STAGES: tuple[Stage, ...] = ("model", "graph", "hub")


@runtime_checkable
class Pass(Protocol):
    """What a step becomes: a frozen dataclass whose fields are its options and whose ``repr`` is its log line.

    ``deploykit/passes/NAME.py`` holds the class ``Name`` (``bias_correct`` -> ``BiasCorrect``).
    """

    stage: ClassVar[Stage]
    needs: ClassVar[tuple[Need, ...]]
    pays_if: ClassVar[tuple[Profit, ...]]

    def __call__(self, subject: Any, context: Any, /) -> Any:
        """Takes and returns what the stage works on (nn.Module, FloatGraph, Hub); never changes it in place."""
        ...


@runtime_checkable
class Foresees(Protocol):
    """A pass that knows by the data when it cannot run, and is asked before anything long is done."""

    def foresee(self, context: Context, /) -> None:
        """Refuses data that is not enough.

        Raises:
            DeploykitError: what is missing.
        """
        ...


@runtime_checkable
class Follows(Protocol):
    """A model-stage pass that may make the model answer as another one does, whatever it answered before."""

    @property
    def follows_another(self) -> bool:
        """Whether it does. Later steps and files are then compared with what it made."""
        ...


@runtime_checkable
class KeepsExits(Protocol):
    """A model-stage pass that may leave a network that answers more than once."""

    @property
    def keep_exits(self) -> bool:
        """Whether it does. Steps that train know a single answer, and have no place behind it."""
        ...


@runtime_checkable
class Rehearses(Protocol):
    """A hub step that knows by the operators when it cannot run, and is asked before the calibration."""

    def rehearse(self, hub: Any, /) -> None:
        """Refuses a hub for what does not hang on its scales: those of a stand-in may be any.

        Raises:
            DeploykitError: what does not fit.
        """
        ...


@dataclass(frozen=True)
class Step:
    """One line of a recipe: a pass by name, and its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False
    """Whether it is left out where what it needs was not given, or where it cannot pay."""

    def __str__(self) -> str:
        """``sparsify(sparsity=0.5)``."""
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.options.items())})"


@dataclass(frozen=True)
class TrainSettings:
    """How a step that trains, trains: the ``[train]`` table of a recipe."""

    loss: str = ""
    """``ce`` (cross-entropy with labels) or ``file.py:function(outputs, batch) -> scalar``; empty: the step's own."""
    epochs: float = 1.0
    """Passes over the training data; fractions are allowed."""
    learning_rate: float = 1e-3
    batch: int = 64
    weight_decay: float = 0.0
    augment: tuple[Literal["flip", "crop"], ...] = ()
    """Random horizontal flip; random crop after padding by an eighth with zeros. Images only."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """``sgd`` wants a learning rate some hundred times as high."""

    def __post_init__(self) -> None:
        """Refuses settings that cannot train."""
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer must be adamw or sgd, given {self.optimizer!r}")
        fits = self.epochs > 0 and self.learning_rate > 0 and self.batch >= 1 and self.weight_decay >= 0
        if not fits:  # written so that NaN does not fit either
            raise ValueError("epochs and learning_rate must be above 0, batch at least 1, weight_decay at least 0")


@dataclass(frozen=True)
class Recipe:
    """An ordered tuple of steps, with the training settings they share."""

    steps: tuple[Step, ...] = ()
    train: TrainSettings = field(default_factory=TrainSettings)


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe.

    .. code-block:: toml

        [[step]]
        name = "sparsify"
        sparsity = 0.5

        [train]
        epochs = 2

    Raises:
        DeploykitError: not TOML, an unknown key, a step without a name.
    """
    table = read_toml(path)
    for key in table:
        if key not in ("step", "train"):
            raise DeploykitError(f"{path}: {unknown('key', key, ['step', 'train'])}")
    steps = table.get("step", [])
    if not isinstance(steps, list) or not all(isinstance(entry, dict) for entry in steps):
        raise DeploykitError(f"{path}: steps are written [[step]], with two brackets")
    for number, entry in enumerate(steps, 1):
        if not isinstance(entry.get("name"), str):
            raise DeploykitError(f"{path}: step {number} has no name")
        if not isinstance(entry.get("optional", False), bool):
            raise DeploykitError(f"{path}: step {number}: optional is true or false")
    return Recipe(
        steps=tuple(_step(**entry) for entry in steps),
        train=from_table(TrainSettings, table.get("train", {}), f"{path} [train]"),
    )


def _step(name: str, optional: bool = False, **options: Any) -> Step:
    return Step(name, options, optional)


def dump_recipe(recipe: Recipe) -> str:
    """The TOML that `load_recipe` reads back into an equal recipe."""
    table: dict[str, Any] = {"train": dataclasses.asdict(recipe.train)}
    table["train"]["augment"] = list(recipe.train.augment)
    if recipe.steps:
        table["step"] = [
            {"name": s.name, **({"optional": True} if s.optional else {}), **s.options} for s in recipe.steps
        ]
    return tomli_w.dumps(table)
