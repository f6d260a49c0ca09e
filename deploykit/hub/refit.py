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

Layers come in order, each on the inputs that the layers before it now produce. Transposed convolutions, weights that
several layers share and masked weights keep what they have; their biases are corrected all the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from deploykit.core.data import DataSet
from deploykit.core.progress import track
from deploykit.core.target import QuantSpec
from deploykit.hub.activations import IntegerActivations
from deploykit.hub.float_outputs import FloatOutputs
from deploykit.hub.graph import Hub, constant
from deploykit.hub.layers import Layer, MatrixForm, layers, mean_output, shift_bias
from deploykit.hub.moments import Moments, moments, one_thread
from deploykit.hub.quantize import BIAS_LIMIT, round_bias
from deploykit.hub.slices import Slicer

if TYPE_CHECKING:
    from numpy.typing import NDArray

RIDGES = (1e-2, 0.1, 1.0, 10.0)
"""λ as a share of the mean variance of the inputs."""
BLUR = 1e-5
DAMPING = 0.1
"""Most that is added to H where integers are chosen: what few samples say about the target may be doubtful, which
errors of it would show is less so."""
JUDGED = 32
"""Outputs per group that λ is judged by; they are enough to tell shares that lie factors apart."""

Rounding = Callable[[Tensor, Tensor, Tensor, QuantSpec], tuple[Tensor, Tensor]]
"""(T [g, o, k], H + λI [g, k, k], smallest scales [g, o], spec) -> integers [g, o, k] and scales [g, o], float64."""


def refit(hub: Hub, data: DataSet, who: str, rounding: Rounding, positions: int, seed: int) -> Hub:
    """The hub with weights, scales and biases chosen by the data.

    Args:
        hub: quantized; not changed.
        data: calibration samples.
        who: the step's name, for the progress bar.
        rounding: how a target becomes integers.
        positions: output positions that H and C are averaged over, of all samples together.
        seed: which positions.
    """
    slicer = Slicer(onnx.load_model_from_string(hub.bytes))
    found = layers(slicer)
    free = {layer.name: weight for layer in found if (weight := _free_weight(layer, found, hub)) is not None}
    forms = {layer.y: MatrixForm.of(layer, free[layer.name].shape) for layer in found if layer.name in free}
    with one_thread(), torch.no_grad(), contextlib.ExitStack() as stack:
        outputs = FloatOutputs(hub.graph, found, forms, data, positions, seed)
        stack.callback(outputs.close)
        inputs = IntegerActivations(slicer, [layer.x for layer in found], data)
        stack.callback(inputs.close)
        for layer in track(found, f"{who}: layers"):
            if layer.name in free:
                form = forms[layer.y]
                whole, halves = moments(layer, form, inputs, outputs)
                w = torch.tensor(form.matrix(free[layer.name]), dtype=torch.float64)
                ridge = best_ridge(halves, w)
                least = torch.tensor(_least_scale(slicer, layer, hub.spec, inputs)).reshape(w.shape[:2])
                h = damped(whole, min(ridge, DAMPING)).h
                q, s = rounding(regressed(whole, w, ridge), h, least, hub.spec_of(layer.weight))
                _store(slicer, layer, form.weight(q.numpy()), s.numpy().reshape(-1), inputs)
            if layer.bias:
                shift_bias(slicer, layer, outputs.mean(layer.y) - mean_output(slicer, layer, inputs.mean(layer.x)))
    return replace(hub, quantized=ir.from_proto(slicer.model))


@dataclass(frozen=True)
class Damped:
    """H + λI."""

    share: Tensor
    """λ, [g, 1, 1]."""
    h: Tensor
    """[g, k, k]"""
    factor: Tensor
    """Its lower Cholesky factor."""


def damped(found: Moments, ridge: float) -> Damped:
    """H + λI, with λ = ``ridge`` times the mean variance and no less than what float32 products blur of H.

    Where that is not enough for a factor (inputs that repeat each other on few positions), it grows until there is one.
    """
    variance = torch.diagonal(found.h, dim1=1, dim2=2).mean(1).clamp_min(0.0)
    share = (ridge * variance + BLUR * found.power).clamp_min(1e-12)[:, None, None]
    one = torch.eye(found.h.shape[1], dtype=torch.float64)
    while True:
        h = found.h + share * one
        factor, failed = torch.linalg.cholesky_ex(h)
        if not failed.any():
            return Damped(share, h, factor)
        share = share * 10


def regressed(found: Moments, w: Tensor, ridge: float) -> Tensor:
    """T = (C + λW)(H + λI)⁻¹, ``[g, o, k]``."""
    d = damped(found, ridge)
    return torch.cholesky_solve((found.c + d.share * w).mT, d.factor).mT


def best_ridge(halves: Sequence[Moments], w: Tensor) -> float:
    """The λ whose target, fitted to one half of the samples, answers the other half best; the largest for a single
    sample."""
    if len(halves) < 2:
        return RIDGES[-1]
    rows = torch.linspace(0, w.shape[1] - 1, min(JUDGED, w.shape[1])).long()
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
    return constant(hub.graph.model.graph.initializers[origin])


def _least_scale(slicer: Slicer, layer: Layer, spec: QuantSpec, inputs: IntegerActivations) -> NDArray[np.float64]:
    """The smallest scale per output channel at which the bias keeps its room and fp16 its precision."""
    least = np.full(slicer.array(layer.weight_scale).size, spec.weight_scale_floor)
    if not layer.bias_scale:
        return least
    input_scale, _ = inputs.parameters(layer.x)
    bias = slicer.array(layer.bias) * slicer.array(layer.bias_scale).astype(np.float64)
    return np.asarray(np.maximum(least, np.abs(bias) / (input_scale * BIAS_LIMIT)))


def _store(
    slicer: Slicer, layer: Layer, integers: NDArray[Any], scale: NDArray[np.float64], inputs: IntegerActivations
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
