"""Shared values chosen layer by layer for what the network computes with them, not to be near to the weights.

For a layer let x be what the network with shared values in front of it feeds it, and y what the original computes
there. The weight is then the solution of a least squares problem with H = E[x xᵀ] and a target T that makes good what
was lost in front (`deploykit.hub.fitting.refit` has both), and values and codes are chosen for it
(`deploykit.hub.sharing.codes`). Biases take the means; where there is none, the weights have to. Zeros stay zero.

Weights of transposed convolutions and recurrent layers, of layers with very many inputs (`WIDEST`), and those that
several layers read, are shared by their values alone.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
from threadpoolctl import threadpool_limits

from deploykit.core.data import DataSet
from deploykit.core.progress import track
from deploykit.hub.fitting.activations import Activations
from deploykit.hub.fitting.float_outputs import FloatOutputs
from deploykit.hub.fitting.moments import moments
from deploykit.hub.fitting.refit import BATCH, DAMPING, best_ridge, damped, regressed
from deploykit.hub.graph import FloatGraph
from deploykit.hub.layers import MatrixForm, float_layers, mean_output, shift_bias
from deploykit.hub.operators import channel_axis
from deploykit.hub.sharing.codebooks import Weight
from deploykit.hub.slices import Slicer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

POSITIONS = 128
"""Output positions per input of a layer that H is averaged over, of all samples together."""

WIDEST = 8192
"""Inputs of an output: H would take more than half a gigabyte, and what works on it several times that."""

Pick = Callable[[Weight, "Floats", "Floats", "NDArray[np.bool_]"], "NDArray[np.float32]"]
"""(a weight, T ``[g, o, k]``, H ``[g, k, k]``, where it is not zero ``[g, o, k]``) -> what stands there instead
``[g, o, k]``."""


def by_outputs(
    original: FloatGraph,
    current: FloatGraph,
    shared: Sequence[Weight],
    data: DataSet,
    pick: Pick,
    *,
    who: str,
    positions: int = POSITIONS,
    seed: int = 0,
) -> FloatGraph:
    """The current graph with other weights, and biases that go with them.

    Args:
        original: whose outputs are aimed at.
        current: the same, but that some weights may have been shared already.
        shared: weights that change, as they are in the original; each can be (`forms`).
        data: calibration samples.
        pick: what becomes of a weight.
        who: for the progress bar.
        positions: see `POSITIONS`.
        seed: which of them.
    """
    slicer = Slicer(onnx.load_model_from_string(current.bytes))
    own = {each.name: each for each in shared}
    layers = [layer for layer in float_layers(slicer) if layer.weight in own or layer.bias]
    of_output = {
        layer.y: MatrixForm.of(layer, own[layer.weight].values.shape) for layer in layers if layer.weight in own
    }
    batch = original.batch or (BATCH if len(data) >= 2 * BATCH else 1)
    with threadpool_limits(1, user_api="blas"), contextlib.ExitStack() as stack:
        outputs = FloatOutputs(original, layers, of_output, data, batch, positions, seed)
        stack.callback(outputs.close)
        images = {layer.x for layer in layers if channel_axis(layer.node.op_type) == 1}
        inputs = Activations(slicer, [layer.x for layer in layers], data, batch, images)
        stack.callback(inputs.close)
        for layer in track(layers, who):
            if layer.weight in own:
                form, weight = of_output[layer.y], own[layer.weight]
                whole, halves = moments(layer, form, inputs, outputs, centred=bool(layer.bias))
                w = form.matrix(weight.values).astype(np.float64)
                ridge = best_ridge(halves, w)
                del halves  # as large as H twice
                h = damped(whole, min(ridge, DAMPING))[0]
                slicer.set_array(weight.name, form.weight(pick(weight, regressed(whole, w, ridge), h, w != 0)))
            if layer.bias:
                shift_bias(slicer, layer, outputs.mean(layer.y) - mean_output(slicer, layer, inputs.mean(layer.x)))
    return FloatGraph(ir.from_proto(slicer.model), current.masks, current.notes)


def forms(graph: FloatGraph, shared: Sequence[Weight]) -> dict[str, MatrixForm]:
    """Those of the weights that can be chosen for the outputs of the one layer that reads them, by initializer."""
    slicer = Slicer(onnx.load_model_from_string(graph.bytes))
    reads = Counter(name for node in slicer.model.graph.node for name in node.input)
    owners = {layer.weight: layer for layer in float_layers(slicer) if layer.node.op_type != "ConvTranspose"}
    found = {
        own.name: MatrixForm.of(owners[own.name], own.values.shape)
        for own in shared
        if own.name in owners and reads[own.name] == 1 and own.values.any()
    }
    return {name: form for name, form in found.items() if form.inputs_per_output <= WIDEST}
