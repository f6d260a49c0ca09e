"""How many answers change: points of accuracy, or of agreement with the float network, that a smaller one loses.

Of 40 samples one answer is 2.5 points, so answers that were counted cannot tell half a point, and the smallest network
of several that changes none by luck is too small. But every sample tells how far scores move, and every sample how far
they may: what one does to its scores is therefore tried on those of the others as well, place by place from the
highest to the lowest.
"""

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
PAIRS = 50_000
"""Changes that are tried on samples, about: where samples are many, each on fewer others."""


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
        self.scores = self._scores(graph.bytes)
        self.labelled = data.labels is not None
        answers = self.scores.argmax(1)
        self.right = answers if data.labels is None else np.asarray(data.labels)
        self.most = _points(answers == self.right)

    @property
    def what(self) -> str:
        """What is counted."""
        return "accuracy" if self.labelled else "agreement with the float model"

    def lost(self, model: bytes) -> float:
        """Points that a model scores less than the float network, counted or expected, whichever is more.

        What is expected takes the change of a sample's scores for one that any other sample could have met.
        """
        scores = self._scores(model)
        return self.most - min(_points(scores.argmax(1) == self.right), self._expected(scores))

    def _expected(self, scores: NDArray[np.float64]) -> float:
        """Points, on average over changes that samples lend each other; places are those of the float network."""
        order = np.argsort(-self.scores, axis=1, kind="stable")
        before = np.take_along_axis(self.scores, order, axis=1)
        change = np.take_along_axis(scores, order, axis=1) - before
        at = order == self.right[:, None]
        place = np.where(at.any(1), at.argmax(1), -1)
        others = min(len(scores), max(1, PAIRS // len(scores)))
        return float(np.mean([_points((before + np.roll(change, k, 0)).argmax(1) == place) for k in range(others)]))

    def _scores(self, model: bytes) -> NDArray[np.float64]:
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
            found.append(scores)
        return np.concatenate(found).astype(np.float64)


def _points(right: NDArray[np.bool_]) -> float:
    return 100.0 * float(right.mean())
