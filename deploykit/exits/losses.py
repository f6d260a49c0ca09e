"""The losses of a network that teaches itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deploykit.losses import Loss, TrainBatch, distill_kl

if TYPE_CHECKING:
    from torch import Tensor


def self_distillation(alpha: float, temperature: float, hint: float, labels: Loss) -> Loss:
    """What exits learn from labels, from the deepest answer and from the deepest features.

    Zhang et al. 2019, "Be Your Own Teacher", equations 4 to 7. With the answers z_i and features F_i of C classifiers,
    the deepest of which is the last, and q_i = softmax(z_i/T):

        L = Σ_i (1 - α_i) · CE(z_i, y) + α_i · T² KL(q_C ‖ q_i) + λ_i · ‖F_i - F_C‖²,    α_C = λ_C = 0

    q_C and F_C teach and are not taught: no gradient flows through them there. ‖·‖² is summed over the features and
    averaged over samples; luanyunteng's code sums over its batch of 128 as well and multiplies by 1e-6, which is
    λ = 1.3e-4 here. With α = λ = 0 this is deep supervision (Lee et al. 2015, "Deeply-Supervised Nets").

    Args:
        alpha: α of all but the deepest.
        temperature: T.
        hint: λ of all but the deepest.
        labels: in the place of CE: sees the logits of one classifier.

    Returns:
        a loss on ``(logits, features)``, tuples from first to last of ``[n, classes]`` and ``[n, c]``.
    """
    softened = distill_kl(temperature)

    def loss(outputs: Any, batch: TrainBatch) -> Tensor:
        (*shallow, deepest), (*hinted, target) = outputs
        total = labels(deepest, batch)
        teacher, shown = deepest.detach(), target.detach()
        for z, f in zip(shallow, hinted, strict=True):
            total = total + (1 - alpha) * labels(z, batch)
            if alpha:
                total = total + alpha * softened(z, TrainBatch(batch.inputs, batch.labels, teacher))
            if hint:
                total = total + hint * (f - shown).square().sum(1).mean()
        return total

    return loss
