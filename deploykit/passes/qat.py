"""Quantization-aware training: the hub itself is trained, with the model as it came in for a teacher.

The forward pass is what the device computes; gradients pass rounding straight through (Jacob et al. 2018, "Quantization
and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", section 3). Scales of activations and
weights are learned with the weights (Esser et al. 2020, "Learned Step Size Quantization";
`deploykit.hub.training.fake_quant`), zero points stay. Normalisation is folded and so frozen. The loss is the
Kullback-Leibler divergence from the original model's answers (Hinton et al. 2015), so no labels are needed; ``loss`` in
the recipe's ``[train]`` table replaces it. Held-out samples decide which state is kept. Zeros stay zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from deploykit.core.context import Context
from deploykit.core.errors import DeploykitError
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit
from deploykit.hub.graph import Hub


@dataclass(frozen=True)
class Qat:
    """Trains weights, biases and scales of the hub for a number of optimizer steps."""

    steps: int = 100
    learning_rate: float = 1e-3
    """What one step changes at most: of a weight the share of what its channel can hold, of a scale its share."""
    temperature: float = 1.0
    """Of the distillation; 1 compares plain probabilities."""
    scales: Literal["learned", "fixed"] = "learned"

    stage: ClassVar[Stage] = "hub"
    needs: ClassVar[tuple[Need, ...]] = ("train", "teacher")
    pays_if: ClassVar[tuple[Profit, ...]] = ("int8", "int4")

    def __post_init__(self) -> None:
        """Refuses settings that cannot train."""
        if self.steps < 1 or not (self.learning_rate > 0 and self.temperature > 0):
            raise ValueError("steps, learning_rate and temperature must be above 0")

    def rehearse(self, hub: Hub) -> None:
        """Refuses operators that cannot be trained."""
        from deploykit.hub.training.module import HubModule

        HubModule(hub)

    def __call__(self, hub: Hub, context: Context) -> Hub:
        """The hub in the trained state that does best on held-out samples; as it came, if training made it no better.

        Raises:
            DeploykitError: there is no teacher (the model came as .onnx), or an operator cannot be trained.
        """
        from deploykit.hub.training.module import HubModule
        from deploykit.retraining import train

        context.need("train", "qat")
        if context.original is None:
            raise DeploykitError("qat needs the PyTorch model as teacher; an .onnx file has none")
        student = HubModule(hub, learn_scales=self.scales == "learned")
        train(student, context, "qat", self.steps, self.learning_rate, self.temperature)
        return student.to_hub()
