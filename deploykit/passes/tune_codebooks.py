"""Training of the values that weights share, with the codes as they are.

Han et al. 2016, "Deep Compression", section 3.3: the gradient of a shared value is the sum of the gradients of its
weights (`deploykit.hub.sharing.module`). Biases are trained along. The loss is the Kullback-Leibler divergence from the
original model's answers (Hinton et al. 2015), so no labels are needed; ``loss`` in the recipe's ``[train]`` table
replaces it. Held-out samples decide which state is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deploykit.core.context import Context
from deploykit.core.errors import DeploykitError, some
from deploykit.core.progress import say
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from deploykit.hub.graph import FloatGraph


@dataclass(frozen=True)
class TuneCodebooks:
    """Trains the values of shared weights, for a number of optimizer steps."""

    steps: int = 300
    learning_rate: float = 1e-3
    """What one step changes at most, as a share of what the weights of a layer are on average."""
    temperature: float = 1.0
    """Of the distillation; 1 compares plain probabilities."""

    stage: ClassVar[Stage] = "graph"
    needs: ClassVar[tuple[Need, ...]] = ("train",)
    pays_if: ClassVar[tuple[Profit, ...]] = ("codebook", "small_file")

    def __post_init__(self) -> None:
        """Refuses settings that cannot train."""
        if self.steps < 1 or not (0 < self.learning_rate < float("inf") and 0 < self.temperature < float("inf")):
            raise ValueError("steps, learning_rate and temperature must be above 0, and finite")

    def __call__(self, graph: FloatGraph, context: Context) -> FloatGraph:
        """The graph in the trained state that does best on held-out samples; as it came, if training made it no better.

        Raises:
            DeploykitError: no weight shares values, there is neither a teacher nor a loss, or an operator cannot be
                trained.
        """
        from deploykit.hub.sharing.codebooks import MOST_BITS, codebook, weights
        from deploykit.hub.sharing.module import SharedModule
        from deploykit.retraining import train

        context.need("train", "tune_codebooks")
        if context.original is None and context.loss is None:
            raise DeploykitError(
                "tune_codebooks needs the PyTorch model as teacher, and an .onnx file has none; give [train] loss"
            )
        found = {own.name: codebook(own.values, min(2**MOST_BITS, own.values.size // 2)) for own in weights(graph)}
        books = {name: own for name, own in found.items() if own is not None}
        if not books:
            raise DeploykitError("tune_codebooks trains values that weights share, and none does; put share before it")
        alone = [name for name in found if name not in books]
        if alone:
            say(f"tune_codebooks: {some(alone, 4)} share no values and stay as they are")
        student = SharedModule(graph, books)
        train(student, context, "tune_codebooks", self.steps, self.learning_rate, self.temperature)
        return student.to_graph()
