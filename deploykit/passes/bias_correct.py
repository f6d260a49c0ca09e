"""Bias correction: shift every channel back to the mean it had in float.

Rounding weights and activations changes the mean of each output channel; the shift is known from calibration data and
is removed by the bias (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
section 4.2, empirical form). Layers are corrected in order, each on the outputs of the layers corrected before it:

    b_c  +=  E[y_c]  -  E[ (W_q x_q + b)_c ]

E[y_c] was measured on the float network (`Ranges`). A layer is linear, so E[W_q x_q + b] = W_q E[x_q] + b: the layer
runs once, on the mean of its integer inputs. Those are needed sample by sample, and the network produces them once, in
stretches from one layer to the next (`deploykit.hub.activations`).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import ClassVar

import onnx
import onnx_ir as ir

from deploykit.core.context import Context
from deploykit.core.progress import track
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit
from deploykit.hub.activations import IntegerActivations
from deploykit.hub.graph import Hub
from deploykit.hub.layers import layers, mean_output, shift_bias
from deploykit.hub.slices import Slicer

BATCH = 4


@dataclass(frozen=True)
class BiasCorrect:
    """Empirical, sequential bias correction on all calibration samples. Weights and scales do not change."""

    stage: ClassVar[Stage] = "hub"
    needs: ClassVar[tuple[Need, ...]] = ("data",)
    pays_if: ClassVar[tuple[Profit, ...]] = ("int8",)

    def __call__(self, hub: Hub, context: Context) -> Hub:
        """The hub with corrected biases."""
        data = context.need("calibration", "bias_correct")
        assert hub.quantized is not None and hub.ranges is not None
        slicer = Slicer(onnx.load_model_from_string(hub.bytes))
        means = hub.ranges.means
        corrected = [layer for layer in layers(slicer) if layer.bias and layer.y in means]
        inputs = IntegerActivations(slicer, [layer.x for layer in corrected], data, hub.graph.batch or BATCH)
        with contextlib.closing(inputs):
            for layer in track(corrected, "correcting biases"):
                shift_bias(slicer, layer, means[layer.y] - mean_output(slicer, layer, inputs.mean(layer.x)))
        return replace(hub, quantized=ir.from_proto(slicer.model))
