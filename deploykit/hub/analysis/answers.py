"""How many answers change: points of accuracy, or of agreement with the float network, that a smaller one loses.

Of 40 samples one answer is 2.5 points, so answers that were counted cannot tell half a point, and the smallest network
of several that changes none by luck is too small. But every judged sample tells how far scores move, and every sample,
judged or not, how far they may: what happens to the scores of one is therefore tried on those of the others as well,
place by place from the highest to the lowest.
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
        data: the samples that are judged.
        who: the step that asks.
        others: samples that changes are tried on as well. The float network alone is asked about them, so a smaller
            one may have been fitted to them. They are left out where they are made up, or have labels and those that
            are judged have none, or the other way round.

    Raises:
        DeploykitError: the first output is no class scores ``[n, classes]``.
    """

    def __init__(self, graph: FloatGraph, data: DataSet, who: str, others: DataSet | None = None) -> None:
        """Asks the float network."""
        self.data, self.batch, self.who = data, graph.batch or BATCH, who
        self.labelled = data.labels is not None
        self.scores, self.right = self._asked(graph, data)
        met, right = self.scores, self.right
        if others is not None and not others.synthetic and (others.labels is not None) == self.labelled:
            further, answers = self._asked(graph, others)
            met, right = np.concatenate([met, further]), np.concatenate([right, answers])
        order = np.argsort(-met, axis=1, kind="stable")
        self.order = order[: len(self.scores)]
        self.met = np.take_along_axis(met, order, axis=1)
        at = order == right[:, None]
        self.place = np.where(at.any(1), at.argmax(1), -1)

    @property
    def what(self) -> str:
        """What is counted."""
        return "accuracy" if self.labelled else "agreement with the float model"

    def lost(self, model: bytes) -> float:
        """Points that a model scores less than the float network, counted or expected, whichever is more.

        What is expected takes the change of a sample's scores for one that any other sample could have met.
        """
        scores = self._scores(model, self.data)
        counted = _points(self.scores.argmax(1) == self.right) - _points(scores.argmax(1) == self.right)
        return max(counted, self._expected(scores))

    def _expected(self, scores: NDArray[np.float64]) -> float:
        """Points, on average over changes that samples lend each other; places are those of the float network."""
        change = np.take_along_axis(scores - self.scores, self.order, axis=1)
        count = len(self.met)
        tries = min(count, max(1, PAIRS // len(change)))
        lost = []
        for k in range(tries):
            at = (np.arange(len(change)) + k * count // tries) % count
            after = (self.met[at] + change).argmax(1)
            lost.append(_points(self.place[at] == 0) - _points(self.place[at] == after))
        return float(np.mean(lost))

    def _asked(self, graph: FloatGraph, data: DataSet) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Scores of the float network, and the right answers."""
        scores = self._scores(graph.bytes, data)
        return scores, scores.argmax(1) if data.labels is None else np.asarray(data.labels)

    def _scores(self, model: bytes, data: DataSet) -> NDArray[np.float64]:
        run, found = session(onnx.load_model_from_string(model)), []
        name = run.get_outputs()[0].name
        for batch in track(data.batches(self.batch), f"{self.who}: answers", total=-(-len(data) // self.batch)):
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
