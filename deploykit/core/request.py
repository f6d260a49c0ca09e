"""`Request`: what an export was asked for, as a value that a manifest keeps: enough to ask again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from deploykit.core.context import Role
from deploykit.core.data import Preprocess
from deploykit.core.errors import DeploykitError
from deploykit.core.precision import Precision
from deploykit.core.recipe import Recipe


@dataclass(frozen=True)
class Settings:
    """What an export may be told; see the options of ``deploykit export``."""

    recipe: Recipe = field(default_factory=Recipe)
    thresholds: str = "minmax"
    precisions: tuple[Precision, ...] = ()
    """Empty: those of the target."""
    correction: bool = True
    keep_float: tuple[str, ...] = ()
    """Layers that stay in float, by name or by pattern (`deploykit.core.patterns`)."""
    seed: int = 0
    force: bool = False
    """Run steps the target cannot profit from."""
    overwrite: bool = False
    benchmark: bool = True
    threads: int = 1
    uint8_input: bool = False
    """The files take raw pixels, uint8 ``[n, h, w, c]``, and scale and normalise themselves."""
    pack: bool = False
    """A .dkz beside every file. Then sparse and shared weights make files smaller, whatever the target."""


MAX_DROP = 2.0
"""Points of accuracy that a file may lose unless something else is asked for."""


@dataclass(frozen=True)
class Gate:
    """The bounds an artifact must meet. Percent and percentage points throughout.

    Bounds on shares of samples are relaxed by one standard error, so that one answer among twenty decides nothing.
    """

    max_drop: float | None = None
    """Largest loss of the metric against the float model, in points; None: `MAX_DROP`, where there are labels."""
    min_agreement: float = 90.0
    """Smallest top-1 agreement of an integer file with the float model."""
    min_file_agreement: float = 96.0
    """Smallest top-1 agreement of an integer file with the hub it was written from."""
    max_lsb: float = 1.0
    """Largest difference of one operator's output with forced inputs, in least significant bits."""
    max_mismatch: float = 0.5
    """Largest share of one operator's outputs that differ although they are no ties, for products (kernels that round
    twice exist for the rest, where only ``max_lsb`` binds)."""

    def __post_init__(self) -> None:
        """Refuses a bound that no file could meet.

        Raises:
            DeploykitError: ``max_drop`` is negative or no number.
        """
        if self.max_drop is not None and not self.max_drop >= 0:
            raise DeploykitError(f"--max-drop {self.max_drop:g}: a loss of accuracy is bounded by 0 points or more")


@dataclass(frozen=True)
class Request:
    """One target's export as it was asked for.

    Paths stand as they were typed; relative ones are meant from the working directory of the export.
    """

    model: str
    """The MODEL argument."""
    target: str
    """A name, or the path of a .toml."""
    weights: str | None = None
    data: Mapping[Role, str] = field(default_factory=dict)
    """``--calib``, ``--train`` and ``--eval`` by role."""
    preprocess: Preprocess | None = None
    """As declared; None: nothing was."""
    inputs: tuple[str, ...] = ()
    """``--input``, e.g. ``"x=1x3x224x224"``."""
    metric: str | None = None
    ranges: str | None = None
    settings: Settings = field(default_factory=Settings)
    gate: Gate = field(default_factory=Gate)
    read: Mapping[str, str] = field(default_factory=dict)
    """The files that were read, the user's Python among them, with the first 16 digits of their SHA-256. Samples are
    not: the manifest has a hash of what came out of them."""
    objects: tuple[str, ...] = ()
    """What came as Python objects, which no file holds, so that it cannot be asked for again; one phrase each."""
