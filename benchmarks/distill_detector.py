"""Distillation of a narrow detector by a wide one: what each idea of Mehta & Ozturk 2018, section 3, is worth.

For every seed a wide `benchmarks.yolo` is trained on scenes with labels, and five narrow ones of the same random
weights, for as many steps each: by the labels alone, and with the wide one for a teacher, one idea more at a time.
Average precision is that of 1,000 test scenes. Photographs of raccoons follow, from the scenes' weights: 112 images
train, too few for more than a look.

    python -m benchmarks.distill_detector [generated | photographs]
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.precision import average_precision
from benchmarks.raccoons import raccoons
from benchmarks.rows import Row, main
from benchmarks.scenes import SHAPES, scenes
from benchmarks.yolo import detections, plain, taught, untrained
from deploykit import exporters, pipeline, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import GateFailed
from deploykit.core.progress import say
from deploykit.core.recipe import TrainSettings
from deploykit.core.request import Gate
from deploykit.distillation.detection import detection
from deploykit.losses import Loss
from deploykit.models import accept_module
from deploykit.passes.distill import Distill
from deploykit.training.trainer import Trainer

COMMAND = "python -m benchmarks.distill_detector"
SEEDS = (0, 1, 2)
WIDE, NARROW = 20, 6
"""Channels of the first map, of the teacher and of its students."""
LABELLED, UNLABELLED, HOLDOUT, TEST = 2_000, 6_000, 256, 1_000
"""Scenes."""
TEACHER_STEPS, STEPS, RACCOON_STEPS = 1_500, 1_500, 200
BATCH, RATE, RACCOON_RATE = 32, 5e-3, 1e-3
FULL = "with unlabelled images"
IDEAS: dict[str, Loss] = {
    "with plain distillation": detection(scaled=False, nms=False),
    "with objectness scaling": detection(nms=False),
    "with FM-NMS": detection(),
    FULL: detection(),
}
"""Each has what those before it have."""

Detector = Callable[[NDArray[np.float32]], Tensor]


@dataclass(frozen=True)
class Task:
    """What detectors are trained for and judged by."""

    train: DataSet
    """With `benchmarks.yolo.targets` for labels; so is ``holdout``."""
    holdout: DataSet
    test: DataSet
    """With boxes for labels."""
    classes: int
    rate: float

    def trained(self, net: nn.Module, steps: int, seed: int) -> nn.Module:
        """A copy that learned from the labels alone."""
        found = copy.deepcopy(net)
        trainer = Trainer(TrainSettings(batch=BATCH), seed)
        trainer.fit(found, self.train, plain, holdout=self.holdout, steps=steps, learning_rate=self.rate)
        return found.eval()

    def distilled(self, net: nn.Module, teacher: nn.Module, loss: Loss, steps: int, seed: int) -> nn.Module:
        """A copy that learned from a teacher as well."""
        here = Context(
            targets.load("x86"), {"train": self.train, "holdout": self.holdout}, next(self.train.batches(2)).inputs,
            original=teacher, trainer=Trainer(TrainSettings(batch=BATCH), seed), loss=loss, seed=seed,
        )  # fmt: skip
        return Distill(steps=steps, learning_rate=self.rate)(net, here).eval()

    def precision(self, detector: Detector) -> float:
        """Average precision on the test images at a Jaccard overlap of 0.5, as on PASCAL VOC, in percent."""
        assert self.test.labels is not None
        found = [d for batch in self.test.batches(100) for d in detections(detector(batch.inputs["x"]))]
        return average_precision(found, self.test.labels, self.classes)[0]


def module(net: nn.Module) -> Detector:
    """A net as a detector."""

    def run(x: NDArray[np.float32]) -> Tensor:
        with torch.no_grad():
            head: Tensor = net(torch.from_numpy(x))
        return head

    return run


def int8_precision(task: Task, net: nn.Module) -> float:
    """Average precision of the net's int8 file in ONNX Runtime."""
    calibration = replace(task.train.take(slice(0, 256)), labels=None)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        prepared = pipeline.prepare(accept_module(net), {"calibration": calibration}, None)
        settings = pipeline.Settings(precisions=("int8",), benchmark=False, threads=1)
        with contextlib.suppress(GateFailed):  # its average precision is reported, whatever it is
            pipeline.export(prepared, [targets.load("x86")], [out], settings, Gate())
        runner = exporters.load("onnx").load(out / "model.int8.onnx", 1)
        return task.precision(lambda x: torch.from_numpy(next(iter(runner({"x": x}).values()))))


# ------------------------------------------------------------------ scenes


@cache
def on_scenes(with_unlabelled: bool = False) -> Task:
    """The scenes with labels, and behind them those without, if they are wanted."""
    count, classes = LABELLED + UNLABELLED * with_unlabelled, len(SHAPES)
    train, holdout = taught(scenes(count, 0), classes, LABELLED), taught(scenes(HOLDOUT, 1), classes)
    return Task(train, holdout, scenes(TEST, 2), classes, RATE)


@cache
def of_scenes(width: int, steps: int, seed: int) -> nn.Module:
    """A net that learned from the scenes' labels alone."""
    task = on_scenes()
    return task.trained(untrained(task.classes, width, seed), steps, seed)


def compared(seed: int) -> dict[str, float]:
    """Average precision of the teacher, of its students, and of the last one's int8 file."""
    started, task = time.process_time(), on_scenes()
    teacher, student = of_scenes(WIDE, TEACHER_STEPS, seed), of_scenes(NARROW, STEPS, seed)
    found = {"teacher": task.precision(module(teacher)), "plain": task.precision(module(student))}
    for name, loss in IDEAS.items():
        own = on_scenes(with_unlabelled=name == FULL)
        student = own.distilled(untrained(task.classes, NARROW, seed), teacher, loss, STEPS, seed)
        found[name] = task.precision(module(student))
    found["that as an int8 file"] = int8_precision(task, student)
    say(f"seed {seed}, after {time.process_time() - started:.0f} s of CPU: {found}")
    return found


def generated() -> list[Row]:
    """All six on scenes: means over seeds; the best equipped student beside the plain one."""
    torch.set_num_threads(1)
    figures = [compared(seed) for seed in SEEDS]
    gained = [own[FULL] - own["plain"] for own in figures]
    about = f"generated scenes: {LABELLED:,} with labels, {UNLABELLED:,} without; {HOLDOUT} hold out, {TEST:,} test"
    return [
        Row("YOLO on scenes, distilled with objectness scaling, FM-NMS and unlabelled images: AP at 0.5 gained over "
            f"plain training (points, mean of {len(SEEDS)} seeds)", statistics.mean(gained), 0.0, "higher", about,
            COMMAND, list(SEEDS), summed_up(figures, SEEDS),
            note=f". Width {NARROW}, its teacher's {WIDE}; {STEPS:,} steps each. Paper: 14 points on PASCAL VOC.")
    ]  # fmt: skip


# ------------------------------------------------------------------ raccoons


def photographs() -> list[Row]:
    """Teacher, plain and distilled student, all from their weights of the scenes."""
    torch.set_num_threads(1)
    train, holdout, test = raccoons()
    task = Task(taught(train, 1), taught(holdout, 1), test, 1, RACCOON_RATE)
    figures = []
    for seed in SEEDS:
        teacher, student = (
            with_head(of_scenes(width, steps, seed), width, seed)
            for width, steps in ((WIDE, TEACHER_STEPS), (NARROW, STEPS))
        )
        teacher = task.trained(teacher, RACCOON_STEPS, seed)
        nets = {
            "teacher": teacher,
            "plain": task.trained(student, RACCOON_STEPS, seed),
            "with FM-NMS": task.distilled(student, teacher, IDEAS["with FM-NMS"], RACCOON_STEPS, seed),
        }
        figures.append({name: task.precision(module(net)) for name, net in nets.items()})
        say(f"raccoons, seed {seed}: {figures[-1]}")
    gained = [own["with FM-NMS"] - own["plain"] for own in figures]
    about = (
        f"{len(train)} photographs of raccoons (half of them mirrored) train, {len(holdout)} hold out, {len(test)} test"
    )
    return [
        Row("YOLO on photographs of raccoons, distilled with objectness scaling and FM-NMS: AP at 0.5 gained over "
            f"plain training (points, mean of {len(SEEDS)} seeds)", statistics.mean(gained), None, "higher", about,
            COMMAND, list(SEEDS), summed_up(figures, SEEDS), note=". Too few images for a bar.")
    ]  # fmt: skip


def with_head(net: nn.Module, width: int, seed: int) -> nn.Module:
    """A copy with a new last layer, for one class."""
    found = copy.deepcopy(net)
    found.head = untrained(1, width, seed).head
    return found


def summed_up(figures: Sequence[dict[str, float]], seeds: Sequence[int]) -> dict[str, float]:
    """Mean and standard deviation by detector, and what every seed has."""
    found: dict[str, float] = {}
    for name in figures[0]:
        each = [own[name] for own in figures]
        found[f"{name}: mean"] = statistics.mean(each)
        found[f"{name}: standard deviation"] = statistics.stdev(each) if len(each) > 1 else 0.0
        found |= {f"{name}: seed {s}": ap for s, ap in zip(seeds, each, strict=True)}
    return found


if __name__ == "__main__":
    main(__doc__ or "", "distill", [generated, photographs])
