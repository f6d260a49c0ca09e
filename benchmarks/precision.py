"""Average precision of detections, by pycocotools (``pip install pycocotools``), the code that COCO is judged with."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.ssd import SIDE, Detections


def average_precision(found: Sequence[Detections], labels: NDArray[np.float32], classes: int) -> tuple[float, float]:
    """Mean over classes, in percent: at a Jaccard overlap of 0.5, and over overlaps from 0.5 to 0.95.

    Args:
        found: by image.
        labels: ``[images, most, 5]``, as `ssd` has them.
        classes: how many there are besides the background.
    """
    from pycocotools.coco import COCO  # type: ignore[import-untyped]
    from pycocotools.cocoeval import COCOeval  # type: ignore[import-untyped]

    truth = [
        {"image_id": i, "category_id": int(c), "bbox": (bbox := sides(box)), "area": bbox[2] * bbox[3], "iscrowd": 0}
        for i, objects in enumerate(labels)
        for c, *box in objects
        if c > 0
    ]
    guesses = [
        {"image_id": i, "category_id": int(c), "bbox": sides(box), "score": float(score)}
        for i, own in enumerate(found)
        for box, c, score in zip(own.boxes, own.classes, own.scores, strict=True)
    ]
    if not guesses:
        return 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO()
        dataset.dataset = {
            "images": [{"id": i} for i in range(len(labels))],
            "categories": [{"id": c} for c in range(1, classes + 1)],
            "annotations": [{"id": number, **one} for number, one in enumerate(truth, 1)],
        }
        dataset.createIndex()
        judged = COCOeval(dataset, dataset.loadRes(guesses), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return 100 * float(judged.stats[1]), 100 * float(judged.stats[0])


def sides(box: Sequence[float] | NDArray[np.float32]) -> list[float]:
    """Left, top, width and height in pixels."""
    left, top, right, bottom = (SIDE * float(edge) for edge in box)
    return [left, top, right - left, bottom - top]
