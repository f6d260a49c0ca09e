"""How many answers change: points of accuracy, or of agreement with the float network, that a smaller one loses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx

from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.progress import track
from deploykit.hub.graph import FloatGraph
from deploykit.hub.running import session

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCH = 8


class Exam:
    """Samples with the right answers: labels where there are some, else what the float network answers.

    Args:
        graph: the float network.
        data: the samples.
        who: the step that asks.

    Raises:
        DeploykitError: the first output is no class scores ``[n, classes]``.
    """

    def __init__(self, graph: FloatGraph, data: DataSet, who: str) -> None:
        """Asks the float network."""
        self.data, self.batch, self.who = data, graph.batch or BATCH, who
        answers = self._classes(graph.bytes)
        self.labelled = data.labels is not None
        self.right = answers if data.labels is None else np.asarray(data.labels)
        self.most = self._points(answers)

    @property
    def what(self) -> str:
        """What is counted."""
        return "accuracy" if self.labelled else "agreement with the float model"

    def lost(self, model: bytes) -> float:
        """Points that a model scores less than the float network."""
        return self.most - self._points(self._classes(model))

    def _points(self, answers: NDArray[np.int64]) -> float:
        return 100.0 * float((answers == self.right).mean())

    def _classes(self, model: bytes) -> NDArray[np.int64]:
        run, found = session(onnx.load_model_from_string(model)), []
        name = run.get_outputs()[0].name
        for batch in track(
            self.data.batches(self.batch), f"{self.who}: answers", total=-(-len(self.data) // self.batch)
        ):
            (scores,) = run.run([name], batch.inputs)
            if scores.ndim != 2 or scores.shape[1] < 2:
                raise DeploykitError(
                    f"max_drop counts answers, and output '{name}' with shape {list(scores.shape)} is no class scores; "
                    f"give {self.who} a budget instead"
                )
            found.append(scores.argmax(1))
        return np.concatenate(found)
