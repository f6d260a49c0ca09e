"""The detector that benchmarks distill: its layers, what it learns, what its head means, and the way to a file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from benchmarks.scenes import SHAPES, scenes
from benchmarks.yolo import (
    ANCHORS,
    BOX,
    CELLS,
    Yolo,
    decode,
    detections,
    plain,
    reorganised,
    targets,
    taught,
    untrained,
)
from deploykit import pipeline
from deploykit import targets as hardware
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.recipe import TrainSettings
from deploykit.core.request import Gate
from deploykit.distillation import detection
from deploykit.losses import TrainBatch, load_loss
from deploykit.models import accept_module
from deploykit.passes.distill import Distill
from deploykit.training.trainer import Trainer

CLASSES = len(SHAPES)


def as_head(target: Tensor) -> Tensor:
    """The head that says what targets ``[n, a, 5 + c, h, w]`` say, and is sure of it."""
    sure = 20 * target[:, :, 4:] - 10
    return torch.cat([target[:, :, :2].clamp(1e-4, 1 - 1e-4).logit(), target[:, :, 2:4], sure], 2)


def labels(*objects: list[float]) -> np.ndarray:
    """Of one image: ``[1, objects, 5]``."""
    return np.asarray([objects], np.float32)


def silent() -> Tensor:
    """The head of an image without anything, for two classes."""
    head = torch.zeros(1, len(ANCHORS), BOX + 2, CELLS, CELLS)
    head[:, :, 4] = -20.0
    return head


# ------------------------------------------------------------------ layers


def test_the_head_has_a_box_an_objectness_and_classes_for_every_anchor_and_cell() -> None:
    assert untrained(CLASSES, 4, 0)(torch.zeros(2, 3, 96, 96)).shape == (2, len(ANCHORS), 5 + CLASSES, CELLS, CELLS)


def test_a_teacher_of_twice_the_width_has_nearly_four_times_the_weights() -> None:
    narrow, wide = (sum(p.numel() for p in Yolo(CLASSES, width).parameters()) for width in (6, 12))
    assert 3.5 < wide / narrow < 4


def test_nothing_is_pooled() -> None:
    assert not [part for part in Yolo(CLASSES, 4).modules() if "Pool" in type(part).__name__]


@pytest.mark.parametrize("r", [2, 4])
def test_blocks_of_pixels_become_channels(r: int) -> None:
    x = np.random.default_rng(0).random((2, 3, 3 * r, 5 * r), np.float32)
    expected = np.empty((2, 3 * r * r, 3, 5), np.float32)
    for c in range(3):
        for i in range(r):
            for j in range(r):
                expected[:, c * r * r + i * r + j] = x[:, c, i::r, j::r]
    assert np.array_equal(reorganised(torch.from_numpy(x), r).numpy(), expected)


def test_every_stage_reaches_the_head() -> None:
    net = untrained(CLASSES, 4, 0)
    net(torch.rand(1, 3, 96, 96)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters() if p.ndim == 4)


# ------------------------------------------------------------------ targets


def test_an_object_is_told_by_the_cell_of_its_centre_and_the_anchor_of_its_size() -> None:
    target = targets(labels([2, 0.40, 0.10, 0.80, 0.30], [0, 0, 0, 0, 0]), 3)  # centre 7.2, 2.4 cells
    expected = [0.2, 0.4, math.log(0.4 / 0.32), math.log(0.2 / 0.32), 1, 0, 1, 0]
    assert np.allclose(target[0, 1, :, 2, 7], expected, atol=1e-5)
    assert target[0, :, 4].sum() == 1 and np.abs(target).sum() == pytest.approx(np.abs(expected).sum(), rel=1e-5)


def test_of_two_objects_in_one_place_the_later_is_told() -> None:
    target = targets(labels([1, 0.4, 0.4, 0.6, 0.6], [2, 0.41, 0.41, 0.61, 0.61]), 2)
    assert target[0, :, 4].sum() == 1 and target[0, :, 6].sum() == 1


def test_an_object_at_the_edge_belongs_to_the_last_cell() -> None:
    assert targets(labels([1, 0.999, 0.999, 1.001, 1.001]), 1)[0, 0, 4, -1, -1] == 1


def test_boxes_that_became_targets_are_found_again() -> None:
    data = scenes(12, 3)
    assert data.labels is not None
    for image, found in zip(
        data.labels, detections(as_head(torch.from_numpy(targets(data.labels, CLASSES)))), strict=True
    ):
        objects = image[image[:, 0] > 0]
        objects = objects[np.lexsort((objects[:, 1], objects[:, 0]))]
        order = np.lexsort((found.boxes[:, 0], found.classes))
        assert np.array_equal(found.classes[order], objects[:, 0])
        assert np.allclose(found.boxes[order], objects[:, 1:], atol=1e-4)


def test_images_without_labels_have_no_part_in_plain_training() -> None:
    data = taught(scenes(4, 3), CLASSES, labelled=1)
    assert data.labels is not None and (data.labels[1:, :, 4] < 0).all() and (data.labels[0, :, 4] >= 0).all()
    target, head = torch.from_numpy(data.labels), torch.randn(4, len(ANCHORS), BOX + CLASSES, CELLS, CELLS)
    alone = plain(head[:1], TrainBatch({}, target[:1]))
    assert float(plain(head, TrainBatch({}, target))) == pytest.approx(float(alone) / 4, rel=1e-5)


# ------------------------------------------------------------------ detection


def test_a_box_by_hand() -> None:
    """In cell 6, 3: x = 0.5, y = 0.75 of a cell; twice as wide and half as high as the second anchor."""
    head = silent()
    head[0, 1, :, 3, 6] = torch.tensor([0.0, math.log(3), math.log(2), math.log(0.5), math.log(3), math.log(4), 0.0])
    probability, boxes = decode(head)
    at = CELLS * CELLS + 3 * CELLS + 6
    x, y, w, h = 6.5 / 12, 3.75 / 12, 0.64, 0.16
    torch.testing.assert_close(boxes[0, at], torch.tensor([x - w / 2, y - h / 2, x + w / 2, y + h / 2]))
    torch.testing.assert_close(probability[0, at], torch.tensor([0.75 * 0.8, 0.75 * 0.2]))


def test_of_boxes_of_one_class_that_overlap_the_surest_stays() -> None:
    head = silent()
    for column, sure, kind in ((4, 3.0, 0), (5, 4.0, 0), (5, 2.0, 1), (9, 1.0, 0)):
        a = 1 + kind  # in one cell, two anchors see one class each
        head[0, a, 4, 6, column], head[0, a, BOX + kind, 6, column] = sure, 10.0
    (found,) = detections(head, least=0.1)
    assert found.classes.tolist() == [1, 1, 2]
    assert np.allclose(found.scores, torch.tensor([4.0, 1.0, 2.0]).sigmoid(), atol=1e-3)
    assert np.allclose(found.boxes[:, [0, 2]].mean(1), [5.5 / 12, 9.5 / 12, 5.5 / 12], atol=1e-2)


def test_where_nothing_is_sure_nothing_is_found() -> None:
    (found,) = detections(silent())
    assert found.boxes.shape == (0, 4) and len(found.classes) == len(found.scores) == 0


# ------------------------------------------------------------------ training and the way to a file


def trained(net: Yolo, data: DataSet, steps: int) -> Yolo:
    Trainer(TrainSettings(batch=8)).fit(net, data, plain, steps=steps, learning_rate=5e-3)
    return net


def test_a_student_comes_nearer_to_its_teacher_also_where_images_have_no_labels(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    torch.set_num_threads(1)
    data = taught(scenes(48, 0), CLASSES, labelled=16)
    teacher, student = trained(untrained(CLASSES, 8, 0), data.take(slice(0, 16)), 20), untrained(CLASSES, 4, 1)
    (tmp_path / "our_loss.py").write_text(
        "from deploykit.distillation.detection import detection\n\nloss = detection()\n"
    )
    context = Context(
        hardware.load("x86"), {"train": data}, original=teacher, trainer=Trainer(TrainSettings(batch=8)),
        loss=load_loss(f"{tmp_path / 'our_loss.py'}:loss"),
    )  # fmt: skip
    step = Distill(steps=40, learning_rate=5e-3)
    step.foresee(context)
    found = step(student, context)
    x = torch.from_numpy(next(scenes(16, 9).batches(16)).inputs["x"])
    with torch.no_grad():
        answered = detection.decode(teacher(x))
        before, after = (float(detection.taught(detection.decode(n(x)), answered).mean()) for n in (student, found))
    assert after < before / 2


def test_it_becomes_an_int8_file_that_says_the_same(tmp_path: Path) -> None:
    from deploykit import exporters

    torch.set_num_threads(1)
    data = scenes(24, 0)
    net = trained(untrained(CLASSES, 4, 0), taught(data, CLASSES), 10)
    prepared = pipeline.prepare(accept_module(net), {"calibration": DataSet(data.sample, data.index)}, None)
    settings = pipeline.Settings(precisions=("int8",), benchmark=False, threads=1)
    pipeline.export(prepared, [hardware.load("x86")], [tmp_path / "out"], settings, Gate())
    file = tmp_path / "out" / "model.int8.onnx"
    kernels = [k for k in onnx.load(file).graph.initializer if len(k.dims) == 4]
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(kernels) == len(convolutions) and {k.data_type for k in kernels} == {onnx.TensorProto.INT8}
    x = next(data.batches(4)).inputs
    (head,) = exporters.load("onnx").load(file, 1)(x).values()
    with torch.no_grad():
        expected = net(torch.from_numpy(x["x"])).numpy()
    assert head.shape == expected.shape
    assert np.square(head - expected).mean() < 0.01 * expected.var()
