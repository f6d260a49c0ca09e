"""Soft targets: the student follows what the teacher thinks of the wrong classes, too.

Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network", section 2. A high temperature makes small
probabilities visible: that a 2 looks more like a 3 than like a 7 is what a label cannot say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deploykit.losses import Loss, TrainBatch, cross_entropy, distill_kl

if TYPE_CHECKING:
    from torch import Tensor


def soft(temperature: float = 4.0, alpha: float = 1.0) -> Loss:
    """Soft targets at temperature T, and the labels with the rest of the weight.

        L = α T² · KL(p_T ‖ q_T)  +  (1 - α) · CE(q_1, label)

    p_T = softmax(v/T) of the teacher's logits, q_T = softmax(z/T) of the student's, both ``[n, classes]``;
    `deploykit.losses.distill_kl` is the first term. At α = 1 no labels are needed.

    Raises:
        DeploykitError: (the loss) there is no teacher, its answers have another shape, or labels are missing.
    """
    follow = distill_kl(temperature)

    def loss(outputs: Any, batch: TrainBatch) -> Tensor:
        if alpha == 1.0:
            return follow(outputs, batch)
        return alpha * follow(outputs, batch) + (1 - alpha) * cross_entropy(outputs, batch)

    return loss
