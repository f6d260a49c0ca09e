"""A small one-stage detector: narrow and deep, with the maps of its earlier stages stacked onto the last.

After section 3 of Mehta & Ozturk 2018, "Object detection at 200 Frames Per Second": nothing is pooled. Where a map has
to become smaller, a convolution strides, or its pixels move into channels (`reorganised`); and 1x1 convolutions keep
the maps narrow in between. Boxes are told as Redmon & Farhadi 2017, "YOLO9000", section 2, tell them: by anchors, from
the cell that holds the centre. The head is laid out as `deploykit.distillation.detection` says.

Boxes are corners ``xmin, ymin, xmax, ymax`` as shares of the image's side. Labels of data are ``[n, most, 5]``: class
(from 1; 0 fills up) and box. What the network learns are `targets` made of them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ssd import Detections, corners, suppress
from deploykit.core.data import DataSet
from deploykit.distillation import detection
from deploykit.losses import TrainBatch

CELLS = 12
"""Rows and columns of cells in an image of 96 x 96 pixels."""
ANCHORS = ((0.16, 0.16), (0.32, 0.32), (0.62, 0.62))
"""Width and height. Objects of scenes are 0.1 to 0.8 wide, in equal shares by the logarithm."""
BOX = 5
"""Numbers of an anchor in front of its classes: t_x, t_y, t_w, t_h, objectness."""
UNKNOWN = -1.0
"""Objectness in the targets of an image without labels."""


class Yolo(nn.Module):
    """Three stages that halve the map's sides; their maps stacked; two more layers on these. A teacher is wider."""

    def __init__(self, classes: int, width: int) -> None:
        """Random weights; ``classes`` without the background, ``width``: channels of the first map."""
        super().__init__()
        w = width
        self.stage1 = convolution(3, w, 3, stride=2)
        self.stage2 = convolution(w, 2 * w, 3, stride=2)
        self.stage3 = nn.Sequential(convolution(2 * w, 4 * w, 3, stride=2), *narrow(w), *narrow(w))
        self.from1 = convolution(w, w // 2, 1)
        self.from2 = convolution(2 * w, w, 1)
        stacked = 16 * (w // 2) + 4 * w + 4 * w
        self.last = nn.Sequential(convolution(stacked, 2 * w, 1), convolution(2 * w, 4 * w, 3), *narrow(w))
        self.head = nn.Conv2d(4 * w, len(ANCHORS) * (BOX + classes), 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, 3, 96, 96]`` -> ``[n, anchors, 5 + classes, 12, 12]``."""
        first = self.stage1(x)
        second = self.stage2(first)
        third = self.stage3(second)
        x = torch.cat([reorganised(self.from1(first), 4), reorganised(self.from2(second), 2), third], 1)
        z: Tensor = self.head(self.last(x))
        return z.unflatten(1, (len(ANCHORS), -1))


def convolution(inputs: int, outputs: int, side: int, stride: int = 1) -> nn.Sequential:
    """A convolution with batch normalisation and ReLU."""
    layer = nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def narrow(w: int) -> tuple[nn.Module, nn.Module]:
    """To half of the ``4 w`` channels at every pixel, and back with what is around it."""
    return convolution(4 * w, 2 * w, 1), convolution(2 * w, 4 * w, 3)


def reorganised(x: Tensor, r: int) -> Tensor:
    """Space to depth: ``[n, c, r h, r w]`` -> ``[n, c r r, h, w]``. Blocks of r x r pixels become channels."""
    return F.pixel_unshuffle(x, r)


def untrained(classes: int, width: int, seed: int) -> Yolo:
    """The same random weights for the same seed, laid out as a CPU trains them fastest."""
    torch.manual_seed(seed)
    return Yolo(classes, width).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


# ------------------------------------------------------------------ training


def targets(labels: NDArray[np.float32], classes: int) -> NDArray[np.float32]:
    """What the head is to say: ``[n, anchors, 5 + classes, 12, 12]``, decoded, as the detection loss takes it.

    An object is told by the cell that holds its centre and the anchor whose size fits best. Of two that meet there,
    the later one is.
    """
    found = np.zeros((len(labels), len(ANCHORS), BOX + classes, CELLS, CELLS), np.float32)
    anchors = np.asarray(ANCHORS, np.float32)
    for objects in labels.transpose(1, 0, 2):  # the first of every image, the second …
        n = np.flatnonzero(objects[:, 0] > 0)
        kind, box = objects[n, 0].astype(int) - 1, objects[n, 1:]
        centre, size = (box[:, :2] + box[:, 2:]) / 2 * CELLS, box[:, 2:] - box[:, :2]
        cell, a = centre.astype(int).clip(0, CELLS - 1), fitting(size, anchors)
        numbers = [centre - cell, np.log(size / anchors[a]), np.ones((len(n), 1)), np.eye(classes)[kind]]
        found[n, a, :, cell[:, 1], cell[:, 0]] = np.concatenate(numbers, 1)
    return found


def fitting(size: NDArray[np.float32], anchors: NDArray[np.float32]) -> NDArray[np.int64]:
    """The anchor ``[a, 2]`` that has the largest Jaccard overlap with boxes ``[n, 2]`` around the same centre."""
    both = np.minimum(size[:, None], anchors).prod(2)
    best: NDArray[np.int64] = (both / (size.prod(1)[:, None] + anchors.prod(1) - both)).argmax(1)
    return best


def taught(data: DataSet, classes: int, labelled: int | None = None) -> DataSet:
    """Data with `targets` for labels; from number ``labelled`` on, images count as without."""
    assert data.labels is not None
    found = targets(data.labels, classes)
    if labelled is not None:
        found[labelled:] = 0.0
        found[labelled:, :, BOX - 1] = UNKNOWN
    return replace(data, labels=found)


def plain(outputs: Tensor, batch: TrainBatch) -> Tensor:
    """The loss of the labels alone, for a network without a teacher."""
    assert batch.labels is not None
    return detection.labelled(detection.decode(outputs), batch.labels).mean()


# ------------------------------------------------------------------ detection


def decode(head: Tensor) -> tuple[Tensor, Tensor]:
    """Head ``[n, a, 5 + c, h, w]`` -> probabilities of every class ``[n, boxes, c]``, and boxes ``[n, boxes, 4]``.

    Pr(class) = Pr(class | object) Pr(object), as in YOLO9000.
    """
    cells = detection.decode(head)
    h, w = head.shape[3:]
    corner = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(h), indexing="xy"))  # [2, h, w]: x, y
    centre = (cells.box[:, :, :2] + corner) / torch.tensor([w, h])[:, None, None]
    size = torch.tensor(ANCHORS)[:, :, None, None] * cells.box[:, :, 2:].exp()
    probability = cells.classes * cells.objectness[:, :, None]
    return by_box(probability), corners(by_box(torch.cat([centre, size], 2)))


def by_box(x: Tensor) -> Tensor:
    """``[n, a, numbers, h, w]`` -> ``[n, a h w, numbers]``."""
    return x.movedim(2, -1).flatten(1, 3)


def detections(head: Tensor, least: float = 0.02, most: int = 50, overlap: float = 0.45) -> list[Detections]:
    """What a head says is in its images: of boxes of one class that overlap, the surest.

    Args:
        head: ``[n, a, 5 + c, h, w]``.
        least: probability below which a box is not looked at.
        most: boxes of a class that are looked at.
        overlap: Jaccard overlap above which two boxes are the same object.
    """
    found = []
    for probability, boxes in zip(*(x.clamp(0, 1) for x in decode(head)), strict=True):
        at, kinds = [], []
        for c, own in enumerate(probability.T, 1):
            sure, order = own.topk(min(most, len(own)))
            order = order[sure >= least]
            kept = order[suppress(boxes[order], overlap)]
            at.append(kept)
            kinds += [c] * len(kept)
        where, kind = torch.cat(at), np.asarray(kinds, np.int64)
        scores = probability[where, torch.from_numpy(kind) - 1]
        found.append(Detections(boxes[where].numpy(), kind, scores.numpy()))
    return found
