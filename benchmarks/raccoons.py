"""160 photographs of raccoons with boxes (datitran/raccoon_dataset), of the measuring data.

112 train, 16 hold out, 32 test.
"""

from __future__ import annotations

import json
import tarfile

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from benchmarks.data import ROOT
from benchmarks.scenes import SIDE, normalised
from deploykit.core.data import DataSet

TRAIN, HOLDOUT = 112, 16
MOST = 3
"""Boxes in an image."""


def raccoons() -> tuple[DataSet, DataSet, DataSet]:
    """Training images, each also mirrored, held-out and test images; labels as `benchmarks.ssd` takes them."""
    images, labels = [], []
    with tarfile.open(ROOT / "raccoon160.tar") as tar:
        annotations = tar.extractfile("annotations.json")
        assert annotations is not None
        for name, about in sorted(json.load(annotations).items()):
            photograph = tar.extractfile(name)
            assert photograph is not None
            image, boxes = letterboxed(Image.open(photograph), np.asarray(about["boxes_xyxy"]))
            images.append(image)
            labels.append(np.zeros((MOST, 5), np.float32))
            labels[-1][: len(boxes)] = np.insert(boxes, 0, 1, axis=1)
    order = np.random.default_rng(0).permutation(len(images))
    x, y = np.stack(images)[order], np.stack(labels)[order]
    mirrored = y[:TRAIN].copy()
    mirrored[..., [1, 3]] = np.where(mirrored[..., :1] > 0, 1 - mirrored[..., [3, 1]], 0)
    held = slice(TRAIN, TRAIN + HOLDOUT)
    return (
        as_data(np.concatenate([x[:TRAIN], x[:TRAIN, :, ::-1]]), np.concatenate([y[:TRAIN], mirrored])),
        as_data(x[held], y[held]),
        as_data(x[held.stop :], y[held.stop :]),
    )


def as_data(images: NDArray[np.uint8], labels: NDArray[np.float32]) -> DataSet:
    """A data set over images ``[n, 96, 96, 3]``."""
    return DataSet(lambda i: normalised(images[i]), tuple(range(len(images))), labels, "raccoons")


def letterboxed(image: Image.Image, boxes: NDArray[np.float64]) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """The image scaled into a grey square, and its boxes as shares of that."""
    scale = SIDE / max(image.size)
    left, top = ((SIDE - round(side * scale)) // 2 for side in image.size)
    square = ImageOps.pad(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.BILINEAR, color=(128, 128, 128))
    return np.asarray(square), (boxes * scale + [left, top, left, top]) / SIDE
