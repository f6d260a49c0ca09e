"""What the network's answers lose when one of its weights gets fewer bits, measured weight by weight.

All else stays in float: integer activations round anew behind every change, and that noise hides what a single weight
does. With z the outputs of the float network and z_lb those with weight l in b bits,

    d_lb  =  E |z_lb - z|² / E |z|²

(or another of `deploykit.hub.analysis.measures`). Errors of different layers hardly know of each other, so the d_lb of
an assignment add up to what it loses.

The integers are those that GPTQ (or another rounding) chooses where the weight stands in the quantized network: what
they miss there of the target (`deploykit.hub.fitting.refit`) is added to the float weight, and the bias takes the mean
of what that changes, as every correction sees to. Outputs are compared on other samples than integers are chosen by:
layers with few positions fit those too well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from deploykit.core.data import DataSet
from deploykit.core.progress import track
from deploykit.core.target import QuantSpec
from deploykit.hub.analysis.measures import MEASURES, Measure
from deploykit.hub.analysis.tail import Tail
from deploykit.hub.bits import Held, held_weights, with_bits
from deploykit.hub.fitting.refit import Rounding, refit
from deploykit.hub.fitting.rounding import gptq
from deploykit.hub.graph import Hub, constant
from deploykit.hub.layers import MatrixForm, has_form
from deploykit.hub.slices import Slicer

if TYPE_CHECKING:
    from numpy.typing import NDArray

POSITIONS = 32
"""Fewer than gptq takes: these integers are only compared, never kept."""
Errors = Mapping[int, "NDArray[np.float32]"]
"""Bits -> what rounding adds to a weight."""


def sensitivities(
    hub: Hub,
    fitted: DataSet,
    judged: DataSet,
    bits: Sequence[int],
    measure: Measure = "squared",
    rounding: Rounding = gptq,
    seed: int = 0,
) -> dict[str, dict[int, float]]:
    """d_lb, by the name of the first product that reads weight l, and by b.

    Args:
        hub: quantized; not changed.
        fitted: samples that integers are chosen by.
        judged: samples that outputs are compared on.
        bits: candidates. Integers are chosen in a network whose weights all have the most of them.
        measure: how it is told how far outputs moved.
        rounding: how integers will be chosen.
        seed: of the output positions that statistics are taken over.

    Raises:
        DeploykitError: a measure that these outputs or samples do not allow.
    """
    held = held_weights(Slicer(onnx.load_model_from_string(hub.bytes)))
    errors = _chosen_errors(hub, held, fitted, bits, rounding, seed) | _nearest_errors(hub, held, bits)
    with contextlib.closing(Tail(hub.graph, judged)) as tail:
        return {
            each.name: {
                b: MEASURES[measure](
                    tail.moved(each.name, each.layers[0].y, hub.weights[each.weight], error), judged.labels
                )
                for b, error in errors[each.name].items()
            }
            for each in track(held, "mixed: sensitivities")
        }


def _chosen_errors(
    hub: Hub, held: Sequence[Held], data: DataSet, bits: Sequence[int], rounding: Rounding, seed: int
) -> dict[str, Errors]:
    """Of the weights that integers are chosen for."""
    found: list[dict[int, Any]] = []

    def every_width(t: Any, h: Any, least: Any, spec: QuantSpec) -> tuple[Any, Any]:
        """The network goes on with the most bits."""
        every = {b: rounding(t, h, least, replace(spec, weight_bits=b)) for b in bits}
        found.append({b: (q * s[:, :, None] - t).astype(np.float32) for b, (q, s) in every.items()})
        return every[max(bits)]

    whole = with_bits(hub, {each.name: max(bits) for each in held})
    refit(whole, data, "mixed", every_width, positions=POSITIONS, seed=seed)
    free = [each for each in held if _is_free(each, hub)]
    return {
        each.name: {b: MatrixForm.of(each.layers[0], _weight(hub, each).shape).weight(e) for b, e in errors.items()}
        for each, errors in zip(free, found, strict=True)
    }


def _nearest_errors(hub: Hub, held: Sequence[Held], bits: Sequence[int]) -> dict[str, Errors]:
    """Of the weights that are rounded to nearest in any case."""
    found: dict[str, dict[int, NDArray[np.float32]]] = {e.name: {} for e in held if not _is_free(e, hub)}
    for b in bits if found else ():
        slicer = Slicer(onnx.load_model_from_string(with_bits(hub, dict.fromkeys(found, b)).bytes))
        for each in held_weights(slicer):
            if each.name in found:
                found[each.name][b] = each.real(slicer) - _weight(hub, each)
    return dict(found)


def _is_free(held: Held, hub: Hub) -> bool:
    """Whether `refit` chooses the integers of a weight."""
    masked = hub.weights[held.weight] in hub.graph.masks
    if len(held.layers) > 1 or masked or held.layers[0].node.op_type == "ConvTranspose":
        return False
    return has_form(held.layers[0].node, _weight(hub, held).shape)


def _weight(hub: Hub, held: Held) -> NDArray[np.float32]:
    """What stands in the float network."""
    weight = constant(hub.graph.model.graph.initializers[hub.weights[held.weight]])
    assert weight is not None
    return weight
