"""Attention transfer: the student looks where the teacher looks.

Zagoruyko & Komodakis 2017, "Paying More Attention to Attention", section 3.1, equation 2. Where a layer's activations
are large it looks; how many channels it has does not matter, so nothing has to be trained in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deploykit.core.errors import DeploykitError
from deploykit.losses import TrainBatch, tensors

if TYPE_CHECKING:
    from torch import Tensor


def attention(outputs: Any, batch: TrainBatch) -> Tensor:
    """Half the squared distance of attention maps, averaged over samples, summed over layers.

        L = ½ sum over layers j of  mean over n of  ‖ Q_S^j/‖Q_S^j‖ - Q_T^j/‖Q_T^j‖ ‖²

    Q^j = `attended` of layer j, as a vector. The paper writes the distance, its authors' code the square as here. The
    paper's weight β = 10³ is divided by the number of positions: 10³/64 for maps of 8 × 8. A teacher's map of another
    size is resampled to the student's (section 3.1).

    Args:
        outputs: what the student's layers write, each ``[n, c, h, w]``.
        batch: ``batch.teacher`` is what the teacher's write, each ``[n, c', h', w']``.

    Raises:
        DeploykitError: features that are no maps.
    """
    from torch.nn import functional as F

    total = []
    for student, teacher in zip(tensors(outputs), tensors(batch.teacher), strict=True):
        q_s, q_t = attended(student), attended(teacher)
        if q_s.shape != q_t.shape:
            q_t = F.interpolate(q_t[:, None], q_s.shape[1:], mode="bilinear", align_corners=False)[:, 0]
        difference = F.normalize(q_s.flatten(1), dim=1) - F.normalize(q_t.flatten(1), dim=1)
        total.append(difference.square().sum(1).mean() / 2)
    return sum(total[1:], total[0])


def attended(a: Tensor) -> Tensor:
    """F²_sum (section 3.1): the sum over channels of the squares, ``[n, c, h, w]`` -> ``[n, h, w]``.

    Raises:
        DeploykitError: no maps.
    """
    if a.ndim != 4:
        raise DeploykitError(f"attention is for layers that write maps [n, c, h, w]; this one writes {list(a.shape)}")
    return a.square().sum(1)
