"""Quantization-aware training: the hub itself is trained, with the model as it came in for a teacher.

The forward pass is what the device computes; gradients pass rounding straight through (Jacob et al. 2018, "Quantization
and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", section 3). Normalisation is folded
and so frozen. The loss is the Kullback-Leibler divergence from the original model's answers (Hinton et al. 2015), so
no labels are needed; ``loss`` in the recipe's ``[train]`` table replaces it. Scales stay as they are, zeros stay zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deploykit.core.context import Context
from deploykit.core.errors import DeploykitError
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit
from deploykit.hub.graph import Hub


@dataclass(frozen=True)
class Qat:
    """Trains weights and biases of the hub for a number of optimizer steps."""

    steps: int = 100
    learning_rate: float = 1e-4
    """Small on purpose: larger rates were measured to lose accuracy on an already calibrated hub."""
    temperature: float = 1.0
    """Of the distillation; 1 compares plain probabilities."""

    stage: ClassVar[Stage] = "hub"
    needs: ClassVar[tuple[Need, ...]] = ("train", "teacher")
    pays_if: ClassVar[tuple[Profit, ...]] = ("int8", "int4")

    def __post_init__(self) -> None:
        """Refuses settings that cannot train."""
        if self.steps < 1 or not (self.learning_rate > 0 and self.temperature > 0):
            raise ValueError("steps, learning_rate and temperature must be above 0")

    def __call__(self, hub: Hub, context: Context) -> Hub:
        """The trained hub.

        Raises:
            DeploykitError: there is no teacher (the model came as .onnx), or an operator cannot be trained.
        """
        from deploykit.hub.torch_module import HubModule
        from deploykit.losses import distill_kl

        data = context.need("train", "qat")
        if context.original is None or context.trainer is None:
            raise DeploykitError("qat needs the PyTorch model as teacher; an .onnx file has none")
        student = HubModule(hub)
        context.trainer.fit(
            student, data, context.loss or distill_kl(self.temperature), teacher=context.original, steps=self.steps,
            learning_rate=self.learning_rate,
        )  # fmt: skip
        return student.to_hub()
