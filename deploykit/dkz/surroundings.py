"""Which weights are coded with contexts: those that get smaller by it, for decoding takes several times as long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.coding import contexts, fitting, rans
from deploykit.coding.contexts import Layer, Model
from deploykit.coding.symbols import Symbols
from deploykit.dkz.front import CONTEXTS, LARGEST, MOST_VALUES
from deploykit.dkz.weights import Around, Chosen, File

WORTH = 0.98
"""Of what a weight takes otherwise: it has to take less than that."""
LOOK = 1 << 14
"""Weights that are looked at first."""
COEFFICIENT = 10
"""Bits of one, in a front."""


@dataclass(frozen=True)
class Tried:
    """Weights that could be coded with contexts."""

    number: int
    """Among all."""
    symbols: Symbols
    layer: Layer
    codes: NDArray[Any]
    """``[rows, columns]``"""


def with_contexts(files: Sequence[File], chosen: Sequence[Chosen]) -> list[Chosen]:
    """What was chosen, with contexts where they are worth it."""
    found, kinds = list(chosen), dict[tuple[int, int], list[Tried]]()
    homes = [file for file in files for _ in file.extents]
    for number, (file, own) in enumerate(zip(homes, chosen, strict=True)):
        tried = _tried(file, own, number)
        if tried is not None and own.extent.shape is not None:
            kernel = own.extent.shape.kernel
            kinds.setdefault((kernel, number if kernel == 1 else 0), []).append(tried)  # matrices have little in common
    for (kernel, _), members in kinds.items():
        model, words = _best(kernel, members)
        better = [
            replace(chosen[t.number], coder=CONTEXTS, symbols=t.symbols, words=bits, around=Around(model, t.layer))
            for t, bits in zip(members, words + _states(members), strict=True)
        ]
        pairs = [(t.number, own) for t, own in zip(members, better, strict=True)]
        pairs = [(i, own) for i, own in pairs if own.bits < WORTH * chosen[i].bits]
        if sum(chosen[i].bits - own.bits for i, own in pairs) > _bits(model):
            for i, own in pairs:
                found[i] = own
    return found


def _tried(file: File, own: Chosen, number: int) -> Tried | None:
    """None: there is no codebook, or nothing is known of shape and values."""
    shape = own.extent.shape
    if shape is None or own.extent.count > MOST_VALUES:
        return None
    elements = file.elements(own.extent)
    if len(np.unique(elements[:LOOK])) > LARGEST:  # which spares sorting ordinary weights
        return None
    book, codes = np.unique(elements, return_inverse=True)
    values = own.extent.values(book)
    if not 1 < len(book) <= LARGEST or not np.isfinite(values).all():
        return None
    rising = np.argsort(values, kind="stable")  # values that are next to each other have codes that are
    laid = shape.together(np.argsort(rising).astype(np.uint16)[codes])
    table = rans.table(np.bincount(laid.reshape(-1)))
    layer = Layer(len(laid), laid.shape[1], table, fitting.levels(values[rising], laid))
    return Tried(number, Symbols(book[rising], (laid.reshape(-1),)), layer, laid)


def _best(kernel: int, members: Sequence[Tried]) -> tuple[Model, NDArray[np.float64]]:
    """The model that needs least for some weights, and the bits that each of them needs."""
    layers, codes = [t.layer for t in members], [t.codes for t in members]
    found = [(model, contexts.sizes((model, layers), codes)) for model in fitting.fits(kernel, layers, codes)]
    return min(found, key=lambda own: float(own[1].sum()) + _bits(own[0]))


def _states(members: Sequence[Tried]) -> NDArray[np.float64]:
    """Bits that the lanes of each take at least."""
    return np.asarray([32.0 * contexts.fewest(t.codes.size) for t in members])


def _bits(model: Model) -> int:
    return COEFFICIENT * (model.mean.size + model.spread.size + len(model.distances) + 4)
