"""`Golden`: a few inputs and what was answered to them, so that files can be tried again on any machine, without torch
and without the data."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.errors import DeploykitError
from deploykit.core.precision import FORMATS, Precision

if TYPE_CHECKING:
    from numpy.typing import NDArray

NAME = "golden.npz"
SAMPLES = 8
BYTES = 2_000_000
"""Inputs take no more, so that an artifact with large images does not grow by all of them; one is always kept."""
VALUES = 4096
"""Of each output of each sample, evenly spaced: class scores are kept whole, maps and boxes are not."""
INPUT = "input"
ORIGINAL = "original"
"""The model as it came in."""
HUB = "hub"


@dataclass(frozen=True)
class Golden:
    """Inputs, and outputs by who gave them."""

    inputs: Mapping[str, NDArray[Any]]
    """``[n, ...]`` by name, as files take them."""
    answers: Mapping[str, Mapping[str, NDArray[Any]]]
    """By `ORIGINAL`, `hub_of` integer files and the precision of each file: ``[n, values]`` by output name."""

    def save(self, folder: Path) -> None:
        """Writes ``golden.npz``; equal values give equal bytes."""
        arrays = {f"{INPUT}/{name}": array for name, array in self.inputs.items()}
        arrays |= {f"{who}/{name}": array for who, given in self.answers.items() for name, array in given.items()}
        written = io.BytesIO()  # a full disk is then an OSError like any other
        np.savez(written, **arrays)  # type: ignore[arg-type]
        (folder / NAME).write_bytes(written.getvalue())


def hub_of(precision: Precision) -> str:
    """Who answers as the hub that integer files of a precision were written from: those with the target's own numbers
    share one."""
    return f"{HUB} {precision}" if FORMATS[precision].numbers else HUB


def load_golden(folder: Path) -> Golden | None:
    """What `Golden.save` wrote; None where there is none.

    Raises:
        DeploykitError: the file is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    parts: dict[str, dict[str, NDArray[Any]]] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for key in file.files:
                who, _, name = key.partition("/")
                parts.setdefault(who, {})[name] = file[key]
    except Exception as error:  # zipfile, zlib, EOF and ValueError all mean the same
        raise DeploykitError(f"{path} is damaged ({error})") from None
    return Golden(parts.pop(INPUT, {}), parts)


def some_samples(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The first samples, as many as `SAMPLES` and `BYTES` allow."""
    each = sum(a[:1].nbytes for a in inputs.values())
    count = max(1, min(SAMPLES, BYTES // max(1, each)))
    return {name: array[:count] for name, array in inputs.items()}


def some_values(outputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """At most `VALUES` values of each sample ``[n, values]``, the same ones every time."""
    found = {}
    for name, array in outputs.items():
        flat = array.reshape(len(array), -1)
        kept = np.linspace(0, flat.shape[1] - 1, min(VALUES, flat.shape[1])).round().astype(int)
        found[name] = np.ascontiguousarray(flat[:, kept])
    return found
