"""The small detector that benchmarks prune."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.scenes import MOST, SHAPES, drawn, scenes
from benchmarks.ssd import DEFAULTS, SSD, Detections, corners, decode, detections, encode, jaccard, match, multibox_loss
from deploykit.losses import TrainBatch


def test_every_default_box_has_scores_and_offsets() -> None:
    scores, offsets = SSD(4)(torch.zeros(2, 3, 96, 96))
    assert scores.shape == (2, len(DEFAULTS), 5) and offsets.shape == (2, len(DEFAULTS), 4)


def test_boxes_that_were_encoded_are_decoded() -> None:
    boxes = corners(torch.rand(3, len(DEFAULTS), 4) + 0.1)
    assert torch.allclose(decode(encode(boxes)), boxes, atol=1e-5)


def test_the_jaccard_overlap_of_boxes_that_share_a_third() -> None:
    overlap = jaccard(torch.tensor([[0.0, 0.0, 1.0, 2.0]]), torch.tensor([[0.0, 1.0, 1.0, 3.0]]))
    assert np.isclose(overlap.item(), 1 / 3)


def test_an_object_gets_the_default_box_that_fits_best_even_where_none_fits_well() -> None:
    labels = torch.tensor([[[2.0, 0.5, 0.5, 0.52, 0.99], [0.0, 0.0, 0.0, 0.0, 0.0]]])
    classes, boxes = match(labels)
    assert classes[classes > 0].tolist() == [2]
    assert torch.equal(boxes[classes > 0], labels[0, :1, 1:])


def test_what_is_filled_up_with_zeros_is_no_object() -> None:
    classes, _ = match(torch.zeros(2, 3, 5))
    assert not classes.any()


def test_the_loss_counts_three_negatives_for_a_positive() -> None:
    """All classes equally probable and offsets right: (1 + 3) log 2."""
    labels = torch.cat([torch.ones(1, 1), corners(DEFAULTS[:1])], 1)[None]
    scores, offsets = torch.zeros(1, len(DEFAULTS), 2), encode(labels[:, :, 1:].expand(-1, len(DEFAULTS), -1))
    positives = int((match(labels)[0] > 0).sum())
    loss = multibox_loss((scores, offsets), TrainBatch({}, labels))
    assert positives >= 1 and np.isclose(float(loss), 4 * np.log(2))


def test_of_boxes_of_one_class_that_overlap_the_surest_is_kept() -> None:
    truth = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.12, 0.1, 0.52, 0.5], [0.6, 0.6, 0.9, 0.9]])
    boxes = truth[torch.tensor([0, 1, 2] + [2] * (len(DEFAULTS) - 3))][None]
    scores = torch.full((1, len(DEFAULTS), 3), -20.0)
    scores[..., 0] = 0.0
    scores[0, :3, 1] = torch.tensor([2.0, 3.0, 1.0])
    (found,) = detections(scores, encode(boxes))
    assert found.classes.tolist() == [1, 1]
    assert np.allclose(found.boxes, truth[[1, 2]], atol=1e-5)


def test_average_precision_where_one_of_two_objects_is_found() -> None:
    """Precision is 1 up to a recall of 0.5 and 0 beyond, read at 101 recalls; a miss after the hit costs nothing."""
    pytest.importorskip("pycocotools")
    from benchmarks.precision import average_precision

    labels = np.array([[[1, 0.1, 0.1, 0.5, 0.5], [0] * 5], [[1, 0.2, 0.2, 0.6, 0.6], [0] * 5]], np.float32)
    hit_and_miss = Detections(
        np.array([[0.1, 0.1, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9]], np.float32),
        np.array([1, 1]),
        np.array([0.9, 0.8], np.float32),
    )
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32))
    at_half, over_all = average_precision([hit_and_miss, nothing], labels, 1)
    assert np.isclose(at_half, 100 * 51 / 101) and np.isclose(over_all, 100 * 51 / 101)


def test_the_same_seed_gives_the_same_scenes() -> None:
    images, labels = drawn(3, 7)
    drawn.cache_clear()
    again, again_labels = drawn(3, 7)
    assert np.array_equal(images, again) and np.array_equal(labels, again_labels)
    assert not np.array_equal(images, drawn(3, 8)[0])


def test_boxes_of_scenes_lie_in_the_image_and_hold_an_object() -> None:
    labels = scenes(50, 0).labels
    assert labels is not None and labels.shape == (50, MOST, 5)
    objects = labels[labels[..., 0] > 0]
    assert (labels[:, 0, 0] > 0).all() and objects[:, 0].max() <= len(SHAPES)
    assert objects[:, 1:].min() >= 0 and objects[:, 1:].max() <= 1
    assert (objects[:, 3:] - objects[:, 1:3]).min() > 4 / 96
