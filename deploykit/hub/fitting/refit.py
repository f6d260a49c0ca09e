"""Choosing the weights of a hub anew, layer by layer, for what they have to do there: the frame that steps share.

For one layer ``y = W x`` let x be what the quantized network feeds it and y what the float network computes there, both
centred (the bias takes the means). With H = E[x xᵀ] and C = E[y xᵀ], the error of integer weights Q with scales s is,
up to a constant, that of rounding the regressed target T:

    E |y - (sQ) x|²  =  tr (sQ - T) H (sQ - T)ᵀ + const,        T = C H⁻¹

T undoes what rounding did to x in the layers before (Hubara et al. 2021, "Accurate Post Training Quantization With
Small Calibration Sets", section 3; Frantar & Alistarh 2022, "Optimal Brain Compression", section 3). Few samples do not
fix T, so a ridge draws it to W:

    T = (C + λW)(H + λI)⁻¹

with λ chosen per layer: fitted to one half of the samples, judged on the other, both ways round.

Layers come in order, each on the inputs that the layers before it now produce. Transposed convolutions, products that
are no matrix at a position, weights that several layers share and masked weights keep what they have; their biases are
corrected all the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from threadpoolctl import threadpool_limits

from deploykit.core.data import DataSet
from deploykit.core.journal import NOTHING_KEPT, Journal
from deploykit.core.progress import track
from deploykit.core.target import QuantSpec
from deploykit.hub.fitting.activations import Activations
from deploykit.hub.fitting.float_outputs import FloatOutputs
from deploykit.hub.fitting.moments import Moments, moments
from deploykit.hub.graph import Hub, constant
from deploykit.hub.layers import Layer, MatrixForm, has_form, layers, mean_output, shift_bias
from deploykit.hub.operators import channel_axis
from deploykit.hub.quantize import BIAS_LIMIT, round_bias
from deploykit.hub.slices import Slicer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Matrices = NDArray[np.float64]

RIDGES = (1e-2, 0.1, 1.0, 10.0)
"""λ as a share of the mean variance of the inputs."""
BLUR = 1e-5
DAMPING = 0.5
"""Most that is added to H where integers are chosen: what few samples say about the target may be doubtful, which
errors of it would show is less so."""
BATCH = 4
FEW = 1 / 3
"""Where fewer layers than this share are narrow enough to be refitted, the noise of the others decides, and the float
network is not run once more for them."""
JUDGED = 32
"""Outputs per group that λ is judged by; they are enough to tell shares that lie factors apart."""

Rounding = Callable[["Matrices", "Matrices", "Matrices", QuantSpec], "tuple[Matrices, Matrices]"]
"""(T [g, o, k], H + λI [g, k, k], smallest scales [g, o], spec) -> integers [g, o, k] and scales [g, o], float64."""


def refit(
    hub: Hub,
    data: DataSet,
    who: str,
    rounding: Rounding,
    *,
    samples: int | None = None,
    positions: int = 1,
    widest: int | None = None,
    only: Collection[str] | None = None,
    seed: int = 0,
    journal: Journal = NOTHING_KEPT,
) -> Hub:
    """The hub with weights, scales and biases chosen by the data.

    Args:
        hub: quantized; not changed.
        data: calibration samples.
        who: the step's name, for the progress bar.
        rounding: how a target becomes integers.
        samples: how many of the data, evenly spread, weights and biases are chosen by; None: all.
        positions: output positions that H and C are averaged over, per input of a layer, of all samples together.
        widest: layers with more inputs per output than this keep their integers; None: none do. Where less than a third
            of the layers is left (`FEW`), they keep theirs too. Biases are corrected in any case.
        only: names of the layers that may change, biases included; None: all.
        seed: which positions.
        journal: integers and scales by layer, of a run that was cut.
    """
    slicer = Slicer(onnx.load_model_from_string(hub.bytes))
    everyone = layers(slicer)
    found = [layer for layer in everyone if only is None or layer.name in only]
    weights = {layer.y: weight for layer in found if (weight := _free_weight(layer, everyone, hub)) is not None}
    forms = {layer.y: MatrixForm.of(layer, weights[layer.y].shape) for layer in found if layer.y in weights}
    if widest is not None:
        forms = {y: form for y, form in forms.items() if form.inputs_per_output <= widest}
        forms = forms if len(forms) >= FEW * len(found) else {}
    given, data = data, data.spread(samples or len(data))
    # what calibration measured on these very samples need not be computed again
    there = hub.ranges is not None and (hub.ranges.samples, hub.ranges.averaged) == (len(given), len(data))
    means = hub.ranges.means if there and hub.ranges is not None else {}
    measured = [layer for layer in found if layer.y in forms or (layer.bias and layer.y not in means)]
    batch = hub.graph.batch or (BATCH if len(data) >= 2 * BATCH else 1)  # at least two: they are compared
    # sums that are split among threads would differ in their last bits with their number
    with threadpool_limits(1, user_api="blas"), contextlib.ExitStack() as stack:
        outputs = FloatOutputs(hub.graph, measured, forms, data, batch, positions, seed, means)
        stack.callback(outputs.close)
        read = [layer for layer in found if layer.y in forms or layer.bias]
        images = {layer.x for layer in read if channel_axis(layer.node.op_type) == 1}
        inputs = Activations(slicer, [layer.x for layer in read], data, batch, images)
        stack.callback(inputs.close)

        def choose(layer: Layer) -> dict[str, Matrices]:
            form = forms[layer.y]
            whole, halves = moments(layer, form, inputs, outputs)
            w = form.matrix(weights[layer.y]).astype(np.float64)
            ridge = best_ridge(halves, w)
            least = _least_scale(slicer, layer, hub.spec, inputs).reshape(w.shape[:2])
            h = damped(whole, min(ridge, DAMPING))[0]
            q, s = rounding(regressed(whole, w, ridge), h, least, hub.spec_of(layer.weight))
            return {"q": q, "s": s}

        for layer in track(found, f"{who}: layers"):
            if layer.y in forms:
                chosen = journal.once(layer.name, partial(choose, layer))
                _store(slicer, layer, forms[layer.y].weight(chosen["q"]), chosen["s"].reshape(-1), inputs)
            if layer.bias:
                shift_bias(slicer, layer, outputs.mean(layer.y) - mean_output(slicer, layer, inputs.mean(layer.x)))
    return replace(hub, quantized=ir.from_proto(slicer.model))


def damped(found: Moments, ridge: float) -> tuple[Matrices, Matrices]:
    """H + λI ``[g, k, k]`` and λ ``[g, 1, 1]``.

    λ is ``ridge`` times the mean variance and no less than what float32 products blur of H. Where that does not make it
    positive definite (inputs that repeat each other on few positions), it grows until it does.
    """
    variance = np.maximum(np.diagonal(found.h, axis1=1, axis2=2).mean(1), 0.0)
    share = np.maximum(ridge * variance + BLUR * found.power, 1e-12)[:, None, None]
    one = np.eye(found.h.shape[1])
    while True:
        h = found.h + share * one
        try:
            np.linalg.cholesky(h)
        except np.linalg.LinAlgError:
            share = share * 10
        else:
            return h, share


def regressed(found: Moments, w: Matrices, ridge: float) -> Matrices:
    """T = (C + λW)(H + λI)⁻¹, ``[g, o, k]``."""
    h, share = damped(found, ridge)
    return np.asarray(np.linalg.solve(h, (found.c + share * w).swapaxes(1, 2)).swapaxes(1, 2), np.float64)


def best_ridge(halves: Sequence[Moments], w: Matrices) -> float:
    """The λ whose target, fitted to one half of the samples, answers the other half best; the largest for a single
    sample."""
    if len(halves) < 2:
        return RIDGES[-1]
    rows = np.linspace(0, w.shape[1] - 1, min(JUDGED, w.shape[1])).astype(np.int64)
    (first, second), some = (half.outputs(rows) for half in halves), w[:, rows]

    def cost(ridge: float) -> float:
        on_second, on_first = regressed(first, some, ridge), regressed(second, some, ridge)
        return float(second.error(on_second).sum() + first.error(on_first).sum())

    return min(RIDGES, key=cost)


def _free_weight(layer: Layer, found: Sequence[Layer], hub: Hub) -> NDArray[np.float32] | None:
    """The float weight of a layer whose integers may be chosen; None where they may not."""
    origin = hub.weights.get(layer.weight, "")
    readers = sum(other.weight == layer.weight for other in found)
    if layer.node.op_type == "ConvTranspose" or readers > 1 or not origin or origin in hub.graph.masks:
        return None
    weight = constant(hub.graph.model.graph.initializers[origin])
    return weight if weight is not None and has_form(layer.node, weight.shape) else None


def _least_scale(slicer: Slicer, layer: Layer, spec: QuantSpec, inputs: Activations) -> NDArray[np.float64]:
    """The smallest scale per output channel at which the bias keeps its room and fp16 its precision."""
    least = np.full(slicer.array(layer.weight_scale).size, spec.weight_scale_floor)
    if not layer.bias_scale:
        return least
    input_scale, _ = inputs.parameters(layer.x)
    bias = slicer.array(layer.bias) * slicer.array(layer.bias_scale).astype(np.float64)
    return np.asarray(np.maximum(least, np.abs(bias) / (input_scale * BIAS_LIMIT)))


def _store(
    slicer: Slicer, layer: Layer, integers: NDArray[Any], scale: NDArray[np.float64], inputs: Activations
) -> None:
    """Writes integers and scales, and the bias again in its new steps."""
    slicer.set_array(layer.weight, integers.astype(np.int8))
    scales = scale.astype(np.float32)
    slicer.set_array(layer.weight_scale, scales)
    if layer.bias_scale:
        bias = slicer.array(layer.bias) * slicer.array(layer.bias_scale).astype(np.float64)
        input_scale, _ = inputs.parameters(layer.x)
        steps = np.float32(input_scale) * scales
        slicer.set_array(layer.bias, round_bias(bias, steps))
        slicer.set_array(layer.bias_scale, steps)
