"""Distillation of one-stage detectors: what the teacher is sure of counts, and one cell speaks for an object.

Mehta & Ozturk 2018, "Object detection at 200 Frames Per Second", section 3. A detector's head answers for every cell,
and nearly all of them are background. So what the teacher says of class and box counts by its objectness o_T:

    objectness   f_obj(o_gt, o)        +        λ_D f_obj(o_T, o)
    class        o_gt f_cl(p_gt, p)    +   o_T  λ_D f_cl(p_T, p)
    box          o_gt f_bb(b_gt, b)    +   o_T  λ_D f_bb(b_T, b)

And where neighbouring cells answer for one object, only the surest keeps its objectness before the student sees it
(feature-map NMS, section 3.2). An image without labels has the right column alone (section 3.3).

**Layout of a head**: ``[n, a, 5 + c, h, w]``, for a anchors and c classes in h × w cells. Along the third axis: t_x,
t_y (the centre within the cell, before a sigmoid), t_w, t_h (log of the size over the anchor's), objectness (before a
sigmoid), c logits of classes.

**Layout of labels**: the same shape, decoded: x and y in 0..1, w and h as t_w and t_h, objectness 1 where a cell and an
anchor answer for an object and 0 elsewhere, a one-hot class. An image whose objectness is negative has no labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from deploykit.core.errors import DeploykitError
from deploykit.losses import Loss, TrainBatch, pairs

if TYPE_CHECKING:
    from torch import Tensor

COORD, NOOBJ = 5.0, 0.5
"""λ_coord and λ_noobj of Redmon et al. 2016, "You Only Look Once", equation 3: boxes count more, background less."""
AROUND = 3
"""Side of the window of cells of which one stays (section 3.2)."""


class Cells(NamedTuple):
    """What a head says of every cell and anchor."""

    box: Tensor
    """``[n, a, 4, h, w]``: x, y within the cell, t_w, t_h."""
    objectness: Tensor
    """``[n, a, h, w]``, 0..1."""
    classes: Tensor
    """``[n, a, c, h, w]``, probabilities."""


def decode(head: Tensor) -> Cells:
    """Splits a head ``[n, a, 5 + c, h, w]``.

    Raises:
        DeploykitError: no head.
    """
    import torch

    if head.ndim != 5 or head.shape[2] < 6:
        raise DeploykitError(f"a detector's head is [n, anchors, 5 + classes, h, w]; given {list(head.shape)}")
    box = torch.cat([head[:, :, :2].sigmoid(), head[:, :, 2:4]], dim=2)
    return Cells(box, head[:, :, 4].sigmoid(), head[:, :, 5:].softmax(2))


def detection(weight: float = 1.0, scaled: bool = True, nms: bool = True) -> Loss:
    """The loss of a detector with a teacher, summed over cells and anchors, averaged over images.

    Args:
        weight: λ_D.
        scaled: class and box count by the teacher's objectness; False: in every cell alike (plain distillation).
        nms: feature-map NMS on the teacher's answers.

    Raises:
        DeploykitError: (the loss) no head, or heads or labels of another shape.
    """

    def loss(outputs: Any, batch: TrainBatch) -> Tensor:
        found = pairs(outputs, batch)
        if len(found) != 1:
            raise DeploykitError(f"the detection loss is for one head, the student has {len(found)}")
        z, v = found[0]
        student = decode(z)
        total = weight * taught(student, decode(v), scaled, nms).sum()
        if batch.labels is not None:
            if batch.labels.shape != z.shape:
                raise DeploykitError(f"labels are {list(batch.labels.shape)}, the head is {list(z.shape)}")
            total = total + labelled(student, batch.labels).sum()
        return total / len(z)

    return loss


def taught(student: Cells, teacher: Cells, scaled: bool = True, nms: bool = True) -> Tensor:
    """The teacher's part of the loss of every image, ``[n]``, without λ_D."""
    o_t = suppressed(teacher) if nms else teacher.objectness
    sure = o_t if scaled else o_t.new_ones(())
    terms = f_obj(o_t, student.objectness) + sure * (
        f_cl(teacher.classes, student.classes) + f_bb(teacher.box, student.box)
    )
    return terms.sum((1, 2, 3))


def labelled(student: Cells, target: Tensor) -> Tensor:
    """The labels' part of the loss of every image, ``[n]``; 0 for images without.

    Args:
        student: what the head says.
        target: ``[n, a, 5 + c, h, w]``, decoded (see above).
    """
    b, o, p = target[:, :, :4], target[:, :, 4], target[:, :, 5:]
    has = (o >= 0).all(3).all(2).all(1)
    terms = f_obj(o, student.objectness) + o * (f_cl(p, student.classes) + f_bb(b, student.box))
    return terms.sum((1, 2, 3)) * has


def suppressed(teacher: Cells) -> Tensor:
    """Objectness ``[n, a, h, w]`` after feature-map NMS: 0 but in the surest of the 3 × 3 cells that see one class.

    Around every cell, over all anchors, the highest objectness of those with the same most probable class stays. Of
    equal ones all stay.
    """
    from torch.nn import functional as F

    objectness, classes = teacher.objectness, teacher.classes
    seen = classes.argmax(2, keepdim=True)  # [n, a, 1, h, w]
    by_class = classes.new_zeros(classes.shape).scatter(2, seen, objectness[:, :, None])
    best = F.max_pool2d(by_class.amax(1), AROUND, stride=1, padding=AROUND // 2)  # [n, c, h, w]
    of_own = best[:, None].expand_as(classes).gather(2, seen)[:, :, 0]
    return objectness * (objectness >= of_own)


def f_obj(target: Tensor, o: Tensor) -> Tensor:
    """Squared error of the objectness ``[n, a, h, w]``; background (target 0) has the weight λ_noobj, objects 1."""
    return (NOOBJ + (1 - NOOBJ) * target) * (target - o).square()


def f_cl(target: Tensor, p: Tensor) -> Tensor:
    """Squared error of the class probabilities ``[n, a, c, h, w]``, summed over classes."""
    return (target - p).square().sum(2)


def f_bb(target: Tensor, b: Tensor) -> Tensor:
    """λ_coord times the squared error of the box ``[n, a, 4, h, w]``, summed over its numbers."""
    return COORD * (target - b).square().sum(2)
