"""A noisy teacher: many teachers for the price of one.

Sau & Balasubramanian 2016, "Deep Model Compression: Distilling Knowledge from Noisy Teachers", section 3. Noise on the
teacher's logits acts on the student as a regularizer, as noise on its own would.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deploykit.distillation.logits import half_square
from deploykit.losses import Loss, TrainBatch, pairs

if TYPE_CHECKING:
    from torch import Tensor


def noisy(sigma: float, fraction: float) -> Loss:
    """Regression on logits, some of which were disturbed.

        L = 1/(2n) · sum over n of  ‖g - z'‖²,    z' = (1 + ξ) · z,   ξ ~ N(0, σ²)

    g ``[n, classes]`` are the student's logits, z the teacher's; ξ is drawn anew for every logit of the samples that
    are disturbed. Held-out samples (seen without gradients) are not: states are judged by what the teacher means.

    Args:
        sigma: σ, above 0.
        fraction: how probable it is for a sample to be disturbed. Draws are torch's own: a trainer seeds them, and
            notes where they are.

    Raises:
        DeploykitError: (the loss) there is no teacher, or its answers have another shape.
    """
    import torch

    def loss(outputs: Any, batch: TrainBatch) -> Tensor:
        squares = [
            half_square(g, disturbed(z, sigma, fraction) if torch.is_grad_enabled() else z)
            for g, z in pairs(outputs, batch)
        ]
        return sum(squares[1:], squares[0])

    return loss


def disturbed(z: Tensor, sigma: float, fraction: float) -> Tensor:
    """Logits ``[n, ...]`` of which a fraction of the samples was multiplied by 1 + ξ, ξ ~ N(0, σ²) for each logit.

    Args:
        z: the teacher's logits.
        sigma: σ.
        fraction: how probable it is for a sample to be disturbed. Draws are made on the CPU: devices do not differ.
    """
    import torch

    chosen = torch.rand(len(z)).to(z.device) < fraction
    xi = sigma * torch.randn(z.shape).to(z)
    return torch.where(chosen.reshape(-1, *[1] * (z.ndim - 1)), (1 + xi) * z, z)
