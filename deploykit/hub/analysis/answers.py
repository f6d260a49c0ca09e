"""How many answers change: points of accuracy, or of agreement with the float network, that a hub loses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx

from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.progress import track
from deploykit.hub.graph import Hub
from deploykit.hub.running import session

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCH = 8


class Exam:
    """Samples with the right answers: labels where there are some, else what the float network answers.

    Args:
        hub: whose float network is asked.
        data: the samples.

    Raises:
        DeploykitError: the first output is no class scores ``[n, classes]``.
    """

    def __init__(self, hub: Hub, data: DataSet) -> None:
        """Asks the float network."""
        self.data, self.batch = data, hub.graph.batch or BATCH
        answers = self._classes(hub.graph.bytes)
        self.labelled = data.labels is not None
        self.right = answers if data.labels is None else np.asarray(data.labels)
        self.most = self._points(answers)

    @property
    def what(self) -> str:
        """What is counted."""
        return "accuracy" if self.labelled else "agreement with the float model"

    def lost(self, hub: Hub) -> float:
        """Points that a hub scores less than the float network."""
        return self.most - self._points(self._classes(hub.bytes))

    def _points(self, answers: NDArray[np.int64]) -> float:
        return 100.0 * float((answers == self.right).mean())

    def _classes(self, model: bytes) -> NDArray[np.int64]:
        run, found = session(onnx.load_model_from_string(model)), []
        name = run.get_outputs()[0].name
        for batch in track(self.data.batches(self.batch), "mixed: answers", total=-(-len(self.data) // self.batch)):
            (scores,) = run.run([name], batch.inputs)
            if scores.ndim != 2 or scores.shape[1] < 2:
                raise DeploykitError(
                    f"max_drop counts answers, and output '{name}' with shape {list(scores.shape)} is no class scores; "
                    "give mixed a budget instead: bytes, macs or ms"
                )
            found.append(scores.argmax(1))
        return np.concatenate(found)
