"""A small single shot detector.

Liu et al. 2016, "SSD: Single Shot MultiBox Detector": a VGG-style backbone, and on feature maps of several sizes two
convolutions each, which give every default box class scores and offsets. Boxes are corners ``xmin, ymin, xmax, ymax``
as shares of the image's side. Labels are ``[n, most, 5]``: class (from 1; 0 fills up) and box of what is in the image.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from deploykit.losses import TrainBatch

SIDE = 96
"""Of the images, in pixels."""
MAPS = (12, 6, 3)
"""Sides of the feature maps that detect."""
SCALES = (0.18, 0.36, 0.6, 0.9)
"""s_k: sides of the square default boxes of each map, and of one map more."""
RATIOS = (1.0, 2.0, 0.5)
"""Of width and height. For 1 there is a second box, between this scale and the next."""
EACH = len(RATIOS) + 1
"""Default boxes at a place."""
VARIANCES = (0.1, 0.2)
"""Of the offsets of centres and of sizes: they are divided by them."""
OVERLAP = 0.5
"""Jaccard overlap from which a default box is matched to a ground truth box."""
NEGATIVES = 3
"""As many negatives for one positive at most."""


def default_boxes() -> Tensor:
    """``[boxes, 4]``: centre and size, map by map, row by row."""
    boxes = []
    for side, scale, following in zip(MAPS, SCALES[:-1], SCALES[1:], strict=True):
        sizes = [(scale * math.sqrt(r), scale / math.sqrt(r)) for r in RATIOS] + [(math.sqrt(scale * following),) * 2]
        boxes += [((x + 0.5) / side, (y + 0.5) / side, *s) for y in range(side) for x in range(side) for s in sizes]
    return torch.tensor(boxes)


DEFAULTS = default_boxes()


class SSD(nn.Module):
    """Six convolutions up to the first map that detects, two more to each of the others.

    The first convolution strides: at the images' own size it would cost as much as all the rest.
    """

    def __init__(self, classes: int) -> None:
        """Random weights; ``classes`` without the background."""
        super().__init__()
        self.conv1 = convolutions(3, 16, stride=2)
        self.conv2 = convolutions(16, 16)
        self.conv3 = convolutions(16, 32)
        self.conv4 = convolutions(32, 64, 96)
        self.conv5 = convolutions(96, 128, 128)
        self.conv6 = convolutions(128, 128, 128)
        self.scores = nn.ModuleList(nn.Conv2d(w, EACH * (classes + 1), 3, padding=1) for w in (96, 128, 128))
        self.offsets = nn.ModuleList(nn.Conv2d(w, EACH * 4, 3, padding=1) for w in (96, 128, 128))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[n, 3, 96, 96]`` -> class scores ``[n, boxes, classes + 1]``, offsets ``[n, boxes, 4]``."""
        x = F.max_pool2d(self.conv2(self.conv1(x)), 2)
        x = F.max_pool2d(self.conv3(x), 2)
        first = self.conv4(x)
        second = self.conv5(F.max_pool2d(first, 2))
        third = self.conv6(F.max_pool2d(second, 2))
        maps = (first, second, third)
        scores = [by_box(layer(m)) for layer, m in zip(self.scores, maps, strict=True)]
        offsets = [by_box(layer(m)) for layer, m in zip(self.offsets, maps, strict=True)]
        return torch.cat(scores, 1), torch.cat(offsets, 1)


def convolutions(*widths: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolutions, each with batch normalisation and ReLU."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def by_box(x: Tensor) -> Tensor:
    """``[n, EACH · numbers, h, w]`` -> ``[n, boxes, numbers]``."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1] // EACH)


# ------------------------------------------------------------------ training


def multibox_loss(outputs: tuple[Tensor, Tensor], batch: TrainBatch) -> Tensor:
    """L = (L_conf + L_loc) / N, with N matched default boxes (equation 1).

    Confidence is judged on them and on the negatives that are hardest to tell from objects; places on them alone.
    """
    scores, offsets = outputs
    assert batch.labels is not None
    classes, boxes = match(batch.labels)
    positive = classes > 0
    confidence = F.cross_entropy(scores.transpose(1, 2), classes, reduction="none")
    rank = confidence.detach().masked_fill(positive, -1.0).argsort(1, descending=True).argsort(1)
    hard = rank < NEGATIVES * positive.sum(1, keepdim=True)
    place = F.smooth_l1_loss(offsets[positive], encode(boxes)[positive], reduction="sum")
    return (confidence[positive | hard].sum() + place) / positive.sum().clamp(min=1)


def match(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The class (0: background) and the ground truth box of every default box.

    Every ground truth box gets the default box that overlaps it most, and all others that overlap it enough.
    """
    real = labels[..., 0] > 0
    overlap = jaccard(labels[..., 1:], corners(DEFAULTS)).masked_fill(~real[..., None], -1.0)
    best = overlap.argmax(2, keepdim=True)
    overlap = overlap.scatter(2, best, torch.where(real, 2.0, -1.0)[..., None])
    most, truth = overlap.max(1)
    matched = labels.gather(1, truth[..., None].expand(-1, -1, 5))
    return torch.where(most > OVERLAP, matched[..., 0], 0.0).long(), matched[..., 1:]


def jaccard(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of all boxes ``[..., a, 4]`` with all boxes ``[b, 4]``: ``[..., a, b]``."""
    a = a[..., :, None, :]
    size = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    both = size.prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b)]
    return both / (areas[0] + areas[1] - both).clamp(min=1e-9)


def corners(boxes: Tensor) -> Tensor:
    """Corners of boxes given by centre and size."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def encode(boxes: Tensor) -> Tensor:
    """Offsets of ``[n, boxes, 4]`` from the default boxes (equation 2)."""
    centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-6)
    moved = (centre - DEFAULTS[:, :2]) / DEFAULTS[:, 2:] / VARIANCES[0]
    return torch.cat([moved, (size / DEFAULTS[:, 2:]).log() / VARIANCES[1]], -1)


def decode(offsets: Tensor) -> Tensor:
    """The boxes that offsets stand for; undoes `encode`."""
    centre = DEFAULTS[:, :2] + offsets[..., :2] * VARIANCES[0] * DEFAULTS[:, 2:]
    return corners(torch.cat([centre, DEFAULTS[:, 2:] * (offsets[..., 2:] * VARIANCES[1]).exp()], -1))


# ------------------------------------------------------------------ detection


@dataclass(frozen=True)
class Detections:
    """What was found in one image, the surest first within a class."""

    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]
    scores: NDArray[np.float32]


def detections(
    scores: Tensor, offsets: Tensor, least: float = 0.02, most: int = 50, overlap: float = 0.45
) -> list[Detections]:
    """Decodes and keeps, of boxes of one class that overlap, the surest (section 2.2, inference).

    Args:
        scores: ``[n, boxes, classes + 1]``, not yet probabilities.
        offsets: ``[n, boxes, 4]``.
        least: probability below which a box is not looked at.
        most: boxes of a class that are looked at.
        overlap: Jaccard overlap above which two boxes are the same object.
    """
    found = []
    for probability, boxes in zip(scores.softmax(2), decode(offsets).clamp(0, 1), strict=True):
        own: list[tuple[Tensor, Tensor, int]] = []
        for c in range(1, probability.shape[1]):
            sure, at = probability[:, c].topk(min(most, len(boxes)))
            at = at[sure >= least]
            kept = suppress(boxes[at], overlap)
            own.append((boxes[at][kept], sure[kept], c))
        found.append(
            Detections(
                torch.cat([b for b, _, _ in own]).numpy(),
                np.repeat([c for _, _, c in own], [len(b) for b, _, _ in own]),
                torch.cat([s for _, s, _ in own]).numpy(),
            )
        )
    return found


def suppress(boxes: Tensor, overlap: float) -> list[int]:
    """Non-maximum suppression of boxes that are in order: which stay."""
    same = (jaccard(boxes, boxes) > overlap).numpy()
    kept: list[int] = []
    for i in range(len(boxes)):
        if not same[i, kept].any():
            kept.append(i)
    return kept
