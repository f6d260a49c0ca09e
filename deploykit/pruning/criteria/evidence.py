"""What a criterion may look at besides the weights: a sample, data, the cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.losses import Loss, TrainBatch, as_tensors, cross_entropy, refuse_labels, tensors
from deploykit.pruning.flow import Inputs

OWN_LOSS = "[train] loss = 'file.py:function', or take a criterion without a cost (l2)"


@dataclass(frozen=True)
class Evidence:
    """Data is read in batches and never held, so memory does not grow with it."""

    sample: Inputs
    """``[1, ...]`` by forward-argument name."""
    data: DataSet | None = None
    loss: Loss | None = None
    """The cost C that a criterion speaks of; None: cross-entropy with the labels, or with the model's own answers."""
    seed: int = 0
    batch: int = 64

    def batches(self, size: int | None = None) -> Iterator[TrainBatch]:
        """All data in order.

        Raises:
            DeploykitError: there is none.
        """
        if self.data is None:
            raise DeploykitError("the criterion needs sample data: give --calib")
        for batch in self.data.batches(size or self.batch):
            inputs = as_tensors(batch.inputs)
            yield TrainBatch(inputs, None if batch.labels is None else torch.from_numpy(batch.labels))

    def cost(self, model: nn.Module, batch: TrainBatch) -> Tensor:
        """C: the mean cost of a batch, with gradients.

        Raises:
            DeploykitError: no loss is given, and the outputs are not one tensor of class scores, or the labels are not
                classes of theirs.
        """
        outputs: Any = model(**batch.inputs)
        if self.loss is not None and self.loss is not cross_entropy:
            return self.loss(outputs, batch)
        if self.loss is None and batch.labels is None:
            batch = TrainBatch(batch.inputs, own_answers(outputs))
        if batch.labels is not None:
            refuse_labels(class_scores(outputs), batch.labels, "the criterion's cost", OWN_LOSS)
        return cross_entropy(outputs, batch)


def class_scores(outputs: Any) -> Tensor:
    """The one output ``[n, classes, ...]``.

    Raises:
        DeploykitError: it is not one, or of one class: its cross-entropy is zero whatever it says.
    """
    scores = tensors(outputs)
    if len(scores) != 1 or scores[0].ndim < 2 or scores[0].shape[1] < 2:
        raise DeploykitError(
            "the criterion needs a cost, and the outputs are not one tensor of class scores (two or more): give "
            f"{OWN_LOSS}"
        )
    return scores[0]


def own_answers(outputs: Any) -> Tensor:
    """What stands for labels where there are none: the most probable classes.

    Not the probabilities, since the divergence from them has no slope where it starts.

    Raises:
        DeploykitError: the outputs are not one tensor of class scores.
    """
    return class_scores(outputs).detach().argmax(1)
