"""torch's own encoder attends with the time first: samples lie on another axis, in front of which the graph fixes 8."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deploykit import passes, pipeline, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.recipe import Step
from deploykit.hub.graph import Hub
from deploykit.hub.lower import lower
from deploykit.hub.quantize import quantize
from deploykit.hub.running import session

X86 = targets.load("x86")


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(8, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.enter(x)).mean(1))


@pytest.fixture(scope="module")
def data() -> DataSet:
    """42: the last batch of four is not full."""
    return DataSet.of({"x": np.random.default_rng(0).normal(size=(42, 8, 8)).astype(np.float32)})


@pytest.fixture(scope="module")
def hub(data: DataSet) -> Hub:
    graph = lower(Encoder().eval(), next(data.batches(2)).inputs)
    return quantize(graph, pipeline.calibrate(graph, data), X86.quant)


def decibels(hub: Hub, data: DataSet) -> float:
    inputs = next(data.batches(len(data))).inputs
    exact, found = (session(m).run(None, inputs)[0] for m in (hub.graph.model, hub.bytes))
    return float(10 * np.log10((exact**2).sum() / ((found - exact) ** 2).sum()))


@pytest.mark.parametrize(
    ("name", "options"),
    [("bias_correct", {}), ("weight_correct", {}), ("gptq", {}), ("adaround", {"steps": 20}), ("fit_ranges", {}),
     ("reconstruct", {"steps": 10}), ("mixed", {"bytes": 0.9})],
)  # fmt: skip
def test_every_step_of_the_hub_takes_it(name: str, options: dict[str, Any], hub: Hub, data: DataSet) -> None:
    stepped = passes.build(Step(name, options))(hub, Context(X86, {"calibration": data}))
    assert decibels(stepped, data) > (20.0 if name == "mixed" else decibels(hub, data) - 3.0)


def test_biases_are_corrected_by_the_means_over_all_places_in_time(hub: Hub, data: DataSet) -> None:
    """Against means that the whole graph gives, run at once."""
    import onnx

    from deploykit.hub.layers import layers
    from deploykit.hub.slices import Slicer

    inputs = next(data.batches(len(data))).inputs
    stepped = passes.build(Step("bias_correct"))(hub, Context(X86, {"calibration": data}))
    floats = Slicer(onnx.load_model_from_string(hub.graph.bytes))

    def off(of: Hub) -> float:
        slicer, found = Slicer(onnx.load_model_from_string(of.bytes)), []
        for layer in layers(slicer):
            output = (layer.holder or layer.node).output[0]
            (mine,) = session(slicer.cut([output], []), optimize=False).run(None, inputs)
            (exact,) = session(floats.cut([layer.y], []), optimize=False).run(None, inputs)
            found.append(np.abs((mine - exact).mean(tuple(range(mine.ndim - 1)))).max())
        return float(max(found))

    assert off(stepped) < 0.5 * off(hub)
