"""Self-distillation on CIFAR-10: every exit against plain training and deep supervision, why, and what exits save.

A ResNet-8 (32, 64 and 128 channels, one block a stage, an exit behind the first two stages) on JPEG CIFAR-10 for a few
epochs, the same number with every method; on a tenth of the images for more epochs; with half the channels on images
augmented, which it cannot learn by heart. What the paper claims for ResNet-18 and 200 epochs is the part ``paper``,
which wants a GPU.

    python -m benchmarks.self_distillation accuracy rate few augmented reasons chain
    python -m benchmarks.self_distillation paper
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import data
from benchmarks.choices import in_memory
from benchmarks.nets import BasicBlock
from benchmarks.rows import Row, main
from deploykit import exporters, pipeline, targets
from deploykit.chain.chain import load_chain, open_chain
from deploykit.chain.write import Wanted, write_chain
from deploykit.core.artifact import Arrays
from deploykit.core.context import Context, Role
from deploykit.core.data import DataSet
from deploykit.core.errors import GateFailed
from deploykit.core.recipe import TrainSettings
from deploykit.core.request import Gate, Settings
from deploykit.exits.explanations import accuracy as top1
from deploykit.exits.explanations import features_of, gradient_sizes, spread, under_noise
from deploykit.exits.losses import self_distillation
from deploykit.exits.network import InTraining, WithExits
from deploykit.losses import Loss, cross_entropy
from deploykit.models import Model, accept_module
from deploykit.passes.self_distill import SelfDistill
from deploykit.training.trainer import Trainer

COMMAND = "python -m benchmarks.self_distillation"
SEEDS = (0, 1, 2)
TRAIN, TEST, CALIBRATION = 20_000, 10_000, 256
EPOCHS, BATCH = 8, 128
FEW, FEW_EPOCHS = 2_000, 40
NOISE = (0.0, 0.05, 0.1, 0.2)
"""Of the standard deviation of each weight tensor."""
DROP = 0.5
"""Points that leaving early may cost."""
TIMED = 500
"""Test images that chains answer one by one, in turns with the network without exits."""
PRECISION = "int8"
PAPER_EPOCHS, PAPER_TRAIN = 200, 50_000
AUGMENTED = TrainSettings(batch=BATCH, learning_rate=4e-3, weight_decay=5e-4, augment=("flip", "crop"))
SGD = TrainSettings(batch=BATCH, learning_rate=0.1, weight_decay=5e-4, optimizer="sgd")

Method = Literal["self", "dsn", "plain"]
METHODS: tuple[Method, ...] = ("plain", "dsn", "self")


class ResNet(nn.Module):
    """He et al. 2015, section 4.2, for 32 x 32 images, with a layer per stage."""

    def __init__(self, widths: Sequence[int], blocks: int, stride: int = 1) -> None:
        """Random weights; the stride of the first convolution."""
        super().__init__()
        first = nn.Conv2d(3, widths[0], 3, stride, 1, bias=False)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(widths[0]), nn.ReLU())
        inputs = [widths[0], *widths]
        for k, width in enumerate(widths, 1):
            block = BasicBlock(inputs[k - 1], width, 1 if k == 1 else 2)
            stage = nn.Sequential(block, *[BasicBlock(width, width, 1) for _ in range(blocks - 1)])
            self.add_module(f"layer{k}", stage)
        self.stages = [f"layer{k}" for k in range(1, len(widths) + 1)]
        self.fc = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, 3, 32, 32]`` -> logits ``[n, 10]``."""
        x = self.stem(x)
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def resnet8(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return ResNet((16, 32, 64), 1).eval()


def wide_resnet8(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return ResNet((32, 64, 128), 1, 2).eval()


def resnet18(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return ResNet((64, 128, 256, 512), 2).eval()


@dataclass(frozen=True)
class Setting:
    """A network and how it learns."""

    name: str
    build: Callable[[int], nn.Module]
    """From a seed."""
    count: int
    """Of training images, the first ones."""
    epochs: int
    train: TrainSettings

    @property
    def about(self) -> str:
        """Its data."""
        return f"{self.count:,} JPEG CIFAR-10 training images, {self.epochs} epochs; {TEST:,} test images"


PLAIN_IMAGES = Setting("ResNet-8 of twice the channels, images as they are", wide_resnet8, TRAIN, EPOCHS, SGD)
FEW_IMAGES = Setting(f"ResNet-8 of twice the channels on {FEW:,} images", wide_resnet8, FEW, FEW_EPOCHS, AUGMENTED)
NARROW = Setting("ResNet-8", resnet8, TRAIN, EPOCHS, AUGMENTED)
WIDE = Setting("ResNet-8 of twice the channels", wide_resnet8, TRAIN, EPOCHS, AUGMENTED)
PAPER = Setting("ResNet-18", resnet18, PAPER_TRAIN, PAPER_EPOCHS, replace(SGD, augment=("flip", "crop")))


@functools.cache
def images(split: str, count: int) -> DataSet:
    return in_memory(data.cifar(split, count))


@functools.cache
def trained(method: Method, seed: int, setting: Setting) -> nn.Module:
    """A network trained by a method; with its exits, where there are some."""
    steps = max(1, setting.epochs * setting.count // BATCH)
    step = SelfDistill(
        method=method, keep_exits=method != "plain", steps=steps, learning_rate=setting.train.learning_rate
    )
    train = images("train", setting.count)
    context = Context(
        targets.load("x86"), {"train": train}, next(train.batches(2)).inputs, trainer=Trainer(setting.train, seed),
        seed=seed,
    )  # fmt: skip
    started = time.perf_counter()
    made = step(setting.build(seed), context).eval().cpu()
    print(f"{method}, seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    return made


def every_exit(net: nn.Module, test: DataSet) -> list[float]:
    """Top-1 of every exit, first to last, and of the mean of their probabilities."""
    assert test.labels is not None
    right = np.zeros(0)
    with torch.no_grad():
        for batch in test.batches(250):
            x = torch.from_numpy(batch.inputs["x"])
            logits = net.look(x).logits if isinstance(net, WithExits) else (net(x),)
            together = torch.stack([z.softmax(1) for z in logits]).mean(0)
            found = [int((z.argmax(1).numpy() == batch.labels).sum()) for z in (*logits, together)]
            right = np.asarray(found) if not len(right) else right + found
    return [100 * float(r) / len(test) for r in right]


def compared(part: str, setting: Setting, bar: float | None, note: str = "") -> list[Row]:
    """Every exit of every method, means over seeds; the deepest against plain training."""
    test = images("test", TEST)
    scores: dict[Method, list[list[float]]] = {
        method: [every_exit(trained(method, seed, setting), test) for seed in SEEDS] for method in METHODS
    }
    gain = [s[-2] - p[-2] for s, p in zip(scores["self"], scores["plain"], strict=True)]
    values = {f"{m}, seed {seed}": s[-2] for m in METHODS for seed, s in zip(SEEDS, scores[m], strict=True)}
    last = len(scores["self"][0]) - 1
    for method in reversed(METHODS):  # those with all exits name the columns of the table
        *exits, together = zip(*scores[method], strict=True)
        named = {f"exit {last - len(exits) + k} of {last}": each for k, each in enumerate(exits, 1)}
        for what, each in (named if method == "plain" else named | {"ensemble": together}).items():
            values |= {f"{method}: {what}": statistics.mean(each), f"{method}: {what}, ±": statistics.stdev(each)}
    control = [d[-2] - p[-2] for d, p in zip(scores["dsn"], scores["plain"], strict=True)]
    return [
        Row(
            f"{setting.name}, self-distilled: the deepest exit against plain training, points (mean)",
            statistics.mean(gain), bar, "higher", setting.about, f"{COMMAND} {part}", list(SEEDS), values,
            f"deep supervision (labels alone teach the exits) gains {statistics.mean(control):.2f}", note,
        )
    ]  # fmt: skip


def accuracy() -> list[Row]:
    """Few epochs, images as they are: they are learnt by heart."""
    return compared("accuracy", PLAIN_IMAGES, 0.0)


def rate() -> list[Row]:
    """The same at three times the learning rate: whether exits help more than a higher rate does."""
    higher = replace(SGD, learning_rate=3 * SGD.learning_rate)
    setting = replace(PLAIN_IMAGES, name=f"{PLAIN_IMAGES.name}, three times the rate", train=higher)
    return compared("rate", setting, None)


def few() -> list[Row]:
    """Half as many steps on a tenth of the images."""
    return compared("few", FEW_IMAGES, 0.0)


def augmented() -> list[Row]:
    """Few epochs, in which half the channels do not fit images that are mirrored and moved."""
    return compared("augmented", NARROW, None, "no bar: 0 was missed here, and is asked of the part `accuracy` instead")


def paper() -> list[Row]:
    """The paper's network and length, by SGD."""
    if not torch.cuda.is_available():
        print("the part 'paper' trains a ResNet-18 for 200 epochs nine times: run it where there is a GPU", flush=True)
        return []
    return compared("paper", PAPER, 0.0)


def reasons() -> list[Row]:
    """The paper's three explanations, on the networks of ``augmented``: self-distilled against plain."""
    test, few = images("test", TEST), images("train", TRAIN)
    about = f"ResNet-8, {TRAIN:,} JPEG CIFAR-10 training images, {EPOCHS} epochs"
    noise: list[dict[Method, dict[float, float]]] = []
    gradients: list[dict[Method, dict[str, float]]] = []
    spreads: list[list[float]] = []
    labels: Mapping[Method, Loss] = {"plain": cross_entropy, "self": self_distillation(0.1, 3.0, 1e-4, cross_entropy)}
    for seed in SEEDS:
        nets = {m: trained(m, seed, NARROW) for m in labels}
        whole = nets["self"]
        assert isinstance(whole, WithExits)
        noise.append(
            {m: under_noise(n, test, NOISE, seed=seed) for m, n in (("plain", nets["plain"]), ("self", whole.network))}
        )
        stages = [stage.path for stage in whole.places.stages]
        inside = [f"inner.network.{path}" for path in stages]
        own = gradient_sizes(InTraining(whole), labels["self"], few, inside)
        gradients.append(
            {
                "plain": gradient_sizes(nets["plain"], labels["plain"], few, stages),
                "self": dict(zip(stages, own.values(), strict=True)),
            }
        )
        assert test.labels is not None
        spreads.append([spread(f, test.labels).ratio for f in features_of(InTraining(whole), test)])
    worst = max(NOISE)
    lost = {m: statistics.mean(n[m][0.0] - n[m][worst] for n in noise) for m in labels}
    first = next(iter(gradients[0]["plain"]))
    grown = statistics.mean(g["self"][first] / g["plain"][first] for g in gradients)
    ratios = [statistics.mean(each) for each in zip(*spreads, strict=True)]
    command = f"{COMMAND} reasons"
    return [
        Row(
            f"noise of {worst:g} deviations on all weights: points lost, self-distilled less plain (mean)",
            lost["self"] - lost["plain"], None, "lower", about, command, list(SEEDS),
            {f"{m} at {s:g}": statistics.mean(n[m][s] for n in noise) for m in labels for s in NOISE},
        ),
        Row(
            "gradients of the first stage, self-distilled / plain (mean)", grown, None, "higher", about, command,
            list(SEEDS),
            {f"{m} {p}": statistics.mean(g[m][p] for g in gradients) for m in labels for p in gradients[0]["plain"]},
        ),
        Row(
            "SSE/SSB of the features, the deepest exit / the first (mean)", ratios[-1] / ratios[0], None, "lower",
            about, command, list(SEEDS), {f"exit {k}": r for k, r in enumerate(ratios, 1)},
        ),
    ]  # fmt: skip


def chain() -> list[Row]:
    """What leaving early saves, in ONNX Runtime and LiteRT: the files themselves, image by image."""
    rows = []
    command = f"{COMMAND} chain"
    about = (
        f"ResNet-8 of twice the channels, {PRECISION}; {TEST // 2:,} JPEG CIFAR-10 test images choose thresholds, "
        "the others score"
    )
    for target, runtime in (("x86", "ONNX Runtime"), ("mobile-arm", "LiteRT")):
        found = {f"seed {seed}": timed(trained("self", seed, WIDE), target) for seed in SEEDS}
        rows += [
            Row(
                f"early exits in {runtime}: mean time / network without exits (mean)",
                statistics.mean(t.time for t in found.values()), None, "lower", about, command, list(SEEDS),
                {f"{seed}: {name}": value for seed, t in found.items() for name, value in t.values.items()},
                note=f"{TIMED} images one by one, one thread",
            ),
            Row(
                f"early exits in {runtime}: points lost (mean)", statistics.mean(t.lost for t in found.values()), DROP,
                "lower", about, command, list(SEEDS), {seed: t.lost for seed, t in found.items()},
            ),
            Row(
                f"early exits in {runtime}, accuracy over time: points lost in the time of the network without exits "
                "(mean)", statistics.mean(t.lost_at(1.0) for t in found.values()), None, "lower", about, command,
                list(SEEDS),
                {
                    f"{runtime}, {seed}: {100 * p.time:.1f}%": p.accuracy for seed, t in found.items()
                    for p in t.frontier
                } | {f"{runtime}, without exits: 100%": statistics.mean(t.without for t in found.values())},
                note="% of the time of the network without exits",
            ),
        ]  # fmt: skip
    return rows


@dataclass(frozen=True)
class Reached:
    """What thresholds come to."""

    time: float
    """Of the network without exits."""
    accuracy: float


@dataclass(frozen=True)
class Timed:
    """A chain beside the network without exits."""

    time: float
    """Of the network without exits."""
    lost: float
    """Points, against its own last exit."""
    without: float
    """Accuracy of the network without exits, as a file, on the samples that thresholds were not chosen on."""
    frontier: tuple[Reached, ...]
    values: dict[str, float]

    def lost_at(self, time: float) -> float:
        """Points, against the file without exits, by those thresholds that take no longer and were best where they were
        chosen: the frontier rises there. 100, all, where none is as fast."""
        return self.without - next((p.accuracy for p in reversed(self.frontier) if p.time <= time), 0.0)


def timed(net: nn.Module, target: str) -> Timed:
    """A chain and the network without exits, written, and run in turns image by image."""
    assert isinstance(net, WithExits)
    device, test = targets.load(target), images("test", TEST)
    roles: dict[Role, DataSet] = {"calibration": images("train", CALIBRATION), "eval": test}
    settings = Settings(precisions=(PRECISION,), benchmark=False)
    scored = test.pick(np.arange(1, len(test), 2))
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder)
        whole = pipeline.prepare(Model("ResNet-8", module=net), roles, None)
        alone = pipeline.prepare(accept_module(net.network), roles, None)
        with contextlib.suppress(GateFailed):  # the files are there all the same, and the rows tell
            write_chain(whole, device, to / "chain", settings, Wanted(max_drop=DROP))
        with contextlib.suppress(GateFailed):
            pipeline.export(alone, [device], [to / "alone"], settings, Gate())
        variant = load_chain(to / "chain").variants[PRECISION]
        without = exporters.open_artifact(to / "alone").runner(PRECISION)
        chains = [open_chain(to / "chain", thresholds=t) for t in (None, *(p.thresholds for p in variant.frontier))]
        runs: list[Callable[[Arrays], object]] = [without, *chains]
        spent = [0.0] * len(runs)
        singles = [b.inputs for b in scored.spread(TIMED).batches(1)]
        for run in runs:  # warm
            run(singles[0])
        for x in singles:
            for i, run in enumerate(runs):
                started = time.perf_counter()
                run(x)
                spent[i] += 1000 * (time.perf_counter() - started) / len(singles)
        right = [
            (next(iter(without(b.inputs).values())).argmax(1) == b.labels).mean() for b in scored.batches(1)
        ]  # fmt: skip
    base, chosen, *others = spent
    shares = {f"% leave by exit {k}": 100 * share for k, share in enumerate(variant.shares, 1)}
    values = {
        "ms": chosen, "ms without exits": base, "lost": variant.last_accuracy - variant.accuracy,
        "accuracy": variant.accuracy, "accuracy in float, without exits": top1(net.network, test), **shares,
    }  # fmt: skip
    frontier = tuple(Reached(ms / base, p.accuracy) for ms, p in zip(others, variant.frontier, strict=True))
    return Timed(chosen / base, values["lost"], 100 * float(np.mean(right)), frontier, values)


if __name__ == "__main__":
    main(__doc__ or "", "distill", [accuracy, rate, few, augmented, reasons, chain, paper])
