"""Multi-layer pruning of a small SSD on generated scenes: parameters it takes out, and the precision they cost.

For every seed an SSD is trained, pruned and trained on; beside it the same SSD is trained as many steps more. Average
precision is that of 1,000 test scenes at a Jaccard overlap of 0.5, as on PASCAL VOC, in the paper of the pass; and over
overlaps from 0.5 to 0.95, as on COCO. Photographs of raccoons follow: 112 images train, too few for more than a look.

    python -m benchmarks.detector
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.precision import average_precision
from benchmarks.raccoons import raccoons
from benchmarks.rows import Row, record
from benchmarks.scenes import SHAPES, scenes
from benchmarks.ssd import SSD, detections, multibox_loss
from deploykit import exporters, passes, pipeline, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import GateFailed
from deploykit.core.progress import say
from deploykit.core.recipe import Step, TrainSettings
from deploykit.core.request import Gate
from deploykit.models import accept_module
from deploykit.training.trainer import Trainer

COMMAND = "python -m benchmarks.detector"
ABOUT = "10,000 generated scenes train, 256 more hold out, 1,000 more test"
TRAINING = Step("finetune", {"steps": 3000, "learning_rate": 3e-3})
"""From random weights."""
SETS = (
    (("conv[1-4].*",), 0.03, 0.7),
    (("conv5.*",), 0.02, 0.82),
    (("conv6.*", "scores.*", "offsets.*"), 0.02, 0.92),
)
"""Layers, by what share the loss may rise, and from what share of zeros on a channel goes: the deeper, the more zeros
L1 leaves in all of a layer's channels alike."""
STEPS, LAST = 100, 1000
PRUNING = (
    *(Step("multi_layer", {"sets": [names], "l1": 3e-3, "steps": STEPS, "learning_rate": 3e-3, "tolerance": tolerance,
                           "empty": empty}) for names, tolerance, empty in SETS),
    Step("finetune", {"steps": LAST, "learning_rate": 3e-3}),
)  # fmt: skip
CONTROL = Step("finetune", {"steps": 2 * STEPS * len(SETS) + LAST, "learning_rate": 3e-3})
"""As many steps as `PRUNING` trains."""
RACCOONS = Step("finetune", {"steps": 200, "learning_rate": 1e-3})
"""From the scenes' weights."""

Detector = Callable[[NDArray[np.float32]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """What detectors are trained for, pruned for and judged by."""

    train: DataSet
    holdout: DataSet
    test: DataSet
    classes: int

    def after(self, net: nn.Module, seed: int, *steps: Step) -> nn.Module:
        """The net after the steps of a recipe."""
        here = Context(
            replace(targets.load("mobile-arm"), channel_multiple=1), {"train": self.train, "holdout": self.holdout},
            next(self.train.batches(2)).inputs, original=net, trainer=Trainer(TrainSettings(batch=32), seed),
            loss=multibox_loss,
        )  # fmt: skip
        for step in steps:
            net = passes.build(step)(net, here)
        return net

    def precision(self, detector: Detector) -> dict[str, float]:
        """Average precision on the test images."""
        assert self.test.labels is not None
        found = [d for batch in self.test.batches(100) for d in detections(*detector(batch.inputs["x"]))]
        at_half, over_all = average_precision(found, self.test.labels, self.classes)
        return {"AP at 0.5": at_half, "AP": over_all}


def module(net: nn.Module) -> Detector:
    """A net as a detector."""

    def run(x: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            scores, offsets = net(torch.from_numpy(x))
        return scores, offsets

    return run


def file(path: Path) -> Detector:
    """A file in ONNX Runtime as a detector."""
    runner = exporters.load("onnx").load(path, 1)

    def run(x: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
        scores, offsets = (torch.from_numpy(y) for y in runner({"x": x}).values())
        return scores, offsets

    return run


def figures_of(task: Task, net: nn.Module) -> dict[str, float]:
    return {**task.precision(module(net)), "parameters": parameters(net)}


def untrained(classes: int) -> SSD:
    """Random weights, laid out as a CPU trains them fastest."""
    return SSD(classes).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def files(task: Task, net: nn.Module) -> dict[str, dict[str, float]]:
    """The net's files in ONNX Runtime."""
    calibration = replace(task.train.take(slice(0, 256)), labels=None)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        prepared = pipeline.prepare(accept_module(net), {"calibration": calibration}, None)
        settings = pipeline.Settings(precisions=("fp32", "int8"), benchmark=False, threads=1)
        with contextlib.suppress(GateFailed):  # its average precision is reported, whatever it is
            pipeline.export(prepared, [targets.load("x86")], [out], settings, Gate())
        for precision in ("fp32", "int8"):
            path = out / f"model.{precision}.onnx"
            found[f"{precision} file"] = {**task.precision(file(path)), "bytes": path.stat().st_size}
    return found


def on_scenes(seeds: Sequence[int]) -> tuple[list[Row], nn.Module]:
    """The acceptance line; and the unpruned net of the first seed."""
    task = Task(scenes(10_000, 0), scenes(256, 1), scenes(1_000, 2), len(SHAPES))
    figures: dict[str, dict[str, float]] = {}
    nets = []
    for seed in seeds:
        started = time.process_time()
        torch.manual_seed(seed)
        nets.append(task.after(untrained(task.classes), seed, TRAINING))
        for what, steps in {"trained": (), "pruned": PRUNING, "trained on": (CONTROL,)}.items():
            net = task.after(nets[-1], seed, *steps)
            found = {what: figures_of(task, net)} | (files(task, net) if what == "pruned" else {})
            figures |= {f"seed {seed}, {name}": own for name, own in found.items()}
            say(f"seed {seed}, after {time.process_time() - started:.0f} s of CPU: {found}")
    lost = {what: [figures[f"seed {s}, {what}"]["AP at 0.5"] - figures[f"seed {s}, pruned"]["AP at 0.5"] for s in seeds]
            for what in ("trained", "trained on")}  # fmt: skip
    for what, points in lost.items():
        spread = statistics.stdev(points) if len(points) > 1 else 0.0
        figures[f"lost beside {what}, mean"] = {"AP at 0.5": statistics.mean(points)}
        figures[f"lost beside {what}, standard deviation"] = {"AP at 0.5": spread}
    fewer = [figures[f"seed {s}, trained"]["parameters"] / figures[f"seed {s}, pruned"]["parameters"] for s in seeds]
    return [
        Row(f"SSD on scenes, pruned by multi_layer: AP at 0.5 lost (points, mean of {len(seeds)} seeds)",
            max(statistics.mean(points) for points in lost.values()), 2.0, "lower", ABOUT, COMMAND, list(seeds),
            flat(figures), note=". The more of what is lost beside the trained net and beside the same trained on."),
        Row(f"SSD on scenes, pruned by multi_layer: parameters, times fewer (mean of {len(seeds)} seeds)",
            statistics.mean(fewer), 5.0, "higher", ABOUT, COMMAND, list(seeds),
            {f"seed {s}": times for s, times in zip(seeds, fewer, strict=True)}
            | {"standard deviation": statistics.stdev(fewer) if len(fewer) > 1 else 0.0}),
    ], nets[0]  # fmt: skip


def on_raccoons(net: nn.Module, seed: int) -> list[Row]:
    """Photographs: trained and pruned on a few, from the scenes' weights."""
    train, holdout, test = raccoons()
    task = Task(train, holdout, test, 1)
    torch.manual_seed(seed)
    start = copy.deepcopy(net)
    start.scores = SSD(task.classes).scores
    trained = task.after(start, seed, RACCOONS)
    them = {"trained": trained, "pruned": task.after(trained, seed, *PRUNING)}
    figures = {what: figures_of(task, net) for what, net in them.items()}
    say(f"raccoons: {figures}")
    about = (
        f"{len(train)} photographs of raccoons (half of them mirrored) train, {len(holdout)} hold out, {len(test)} test"
    )
    return [
        Row("SSD on photographs of raccoons, pruned by multi_layer: AP at 0.5", figures["pruned"]["AP at 0.5"], None,
            "higher", about, COMMAND, [seed], flat(figures))
    ]  # fmt: skip


def flat(figures: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """As rows keep tables."""
    return {f"{line}: {column}": value for line, own in figures.items() for column, value in own.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    rows, net = on_scenes(seeds)
    record("prune", rows)
    record("prune", on_raccoons(net, seeds[0]))


if __name__ == "__main__":
    main()
