"""Deep Compression of LeNet-300-100 and LeNet-5 on MNIST: pruned in rounds, values shared and trained, coded.

Every network is trained here and exported by its recipe with ``--pack``; what counts is every byte of the .dkz, and
the error of the file that comes out of it again, in ONNX Runtime, on the 10,000 test images. The reference is trained
on the 60,000 images, the compressed network on them and on copies that are turned, scaled and shifted, to follow
reference and labels alike; what that training would do for the reference itself stands beside.

    python -m benchmarks.lenets
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks import data
from benchmarks.deep_compression import xz
from benchmarks.prune import LeNet5, lenet, seeded
from benchmarks.rows import Row, main
from deploykit import exporters, passes, pipeline, recipes, targets
from deploykit.core.context import Context, Role
from deploykit.core.data import DataSet
from deploykit.core.errors import GateFailed
from deploykit.core.recipe import Recipe, Step, TrainSettings
from deploykit.core.request import Gate
from deploykit.dkz.extents import files_of
from deploykit.dkz.files import unpack_file
from deploykit.losses import TrainBatch, cross_entropy, distill_kl, tensors
from deploykit.models import accept_module
from deploykit.training.trainer import Trainer

COMMAND = "python -m benchmarks.lenets"
ABOUT = "MNIST, 60,000 images train, 10,000 test; fp32 .onnx in ONNX Runtime"
SEEDS = (0, 1, 2)
EPOCH = 600
"""Steps of 100 images, which is the 60,000 once."""
CALIBRATE = 30
"""One of so many images chooses values that are near to what layers compute."""
COPIES = 8
"""Of every image, each moved another way."""
TURN, GROW, SHIFT = 10.0, 0.1, 1.5
"""Most that an image is turned (degrees), grows or shrinks, and is shifted (pixels)."""
SMOOTHED = 0.1
"""Of the labels that the references learn."""
FOLLOWED = distill_kl(2.0)


@dataclass(frozen=True)
class Net:
    """A network and how it is compressed."""

    name: str
    build: Callable[[], nn.Module]
    error: float
    """The paper's reference, in percent."""
    times: float
    """The paper's, smaller than fp32 weights."""
    epochs: int
    """Of the reference's training."""
    zeros: float
    share: Mapping[str, object]
    """Options of the step."""
    rounds: int = 8
    each: int = 3
    """Epochs after every round of pruning."""
    after: int = 8
    """After the last."""
    values: int = 4
    """Of the shared values."""
    rate: float = 3e-3
    """At which those learn."""
    minutes: float | None = None
    """That all of it may take on two cores."""


NETS = (
    Net(
        "LeNet-300-100", lambda: nn.Sequential(nn.Flatten(), lenet()), error=1.64, times=40.0, epochs=20, zeros=0.94,
        share={"bits": 4}, after=20, minutes=20,
    ),
    Net(
        "LeNet-5", LeNet5, error=0.80, times=39.0, epochs=10, zeros=0.92, share={"near": "outputs", "bytes": 0.0163},
        each=1, after=24, values=4, rate=1e-3,
    ),
)  # fmt: skip


def images(split: str, copies: int = 0) -> DataSet:
    """``[n, 1, 28, 28]`` as they are, and after them copies that are moved."""
    raw = np.load(data.ROOT / "mnist.npz")
    x = torch.from_numpy(raw[f"x_{split}"][:, None] / np.float32(255))
    lottery = torch.Generator().manual_seed(0)
    every = torch.cat([x, *(moved(x, lottery) for _ in range(copies))])
    labels = np.tile(raw[f"y_{split}"].astype(np.int64), 1 + copies)
    return DataSet.of({"input": ((every - 0.1307) / 0.3081).numpy()}, labels, "MNIST")


def moved(x: Tensor, lottery: torch.Generator) -> Tensor:
    """Images ``[n, 1, 28, 28]``, each turned, scaled and shifted by amounts drawn evenly."""
    turn, grow, right, down = (2 * torch.rand(4, len(x), generator=lottery) - 1).unbind()
    angle, size = torch.deg2rad(TURN * turn), 1 + GROW * grow
    cos, sin = size * angle.cos(), size * angle.sin()
    half = x.shape[-1] / 2  # pixels of the unit that grids are in
    rows = [torch.stack([cos, -sin, SHIFT / half * right], 1), torch.stack([sin, cos, SHIFT / half * down], 1)]
    grid = nn.functional.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return nn.functional.grid_sample(x, grid, align_corners=False)


def smoothed(outputs: Tensor, batch: TrainBatch) -> Tensor:
    """What the references are trained by."""
    assert batch.labels is not None
    return nn.functional.cross_entropy(outputs, batch.labels, label_smoothing=SMOOTHED)


def taught(outputs: object, batch: TrainBatch) -> Tensor:
    """What the compressed networks are trained by: half the reference's answers, half the labels."""
    (scores,) = tensors(outputs)
    return 0.5 * FOLLOWED(scores, batch) + 0.5 * cross_entropy(scores, batch)


def error(answer: Callable[[NDArray[np.float32]], NDArray[np.float32]], test: DataSet) -> float:
    """In percent."""
    assert test.labels is not None
    found = [answer(batch.inputs["input"]).argmax(1) for batch in test.batches(500)]
    return 100 * float((np.concatenate(found) != test.labels).mean())


def torch_error(net: nn.Module, test: DataSet) -> float:
    net.eval()
    with torch.no_grad():
        return error(lambda x: net(torch.from_numpy(x)).numpy(), test)


def reference(net: Net, seed: int, train: DataSet) -> nn.Module:
    made = seeded(net.build, seed)
    trainer = Trainer(TrainSettings(batch=100, weight_decay=0.01), seed=seed)
    trainer.fit(made, train, smoothed, steps=net.epochs * EPOCH, learning_rate=2e-3)
    return made.eval()


def recipe(net: Net) -> Recipe:
    steps = (
        Step("iterate", {
            "amount": net.zeros, "rounds": net.rounds, "steps": net.each * EPOCH, "schedule": "geometric",
            "options": {"criterion": "l1"},
        }),
        Step("finetune", {"steps": net.after * EPOCH, "learning_rate": 1e-3}),
        Step("share", net.share),
        Step("tune_codebooks", {"steps": net.values * EPOCH, "learning_rate": net.rate}),
        Step("bitround"),
    )  # fmt: skip
    return Recipe(steps, TrainSettings(loss="benchmarks.lenets:taught", batch=100))


def compressed(
    steps: Recipe, made: nn.Module, seed: int, roles: Mapping[Role, DataSet], test: DataSet
) -> tuple[int, int, float]:
    """Bytes of the .dkz and of xz of the same file, and the error of what comes out again."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        prepared = pipeline.prepare(accept_module(made), {**roles, "eval": test}, None)
        settings = pipeline.Settings(steps, precisions=("fp32",), benchmark=False, seed=seed, pack=True)
        with contextlib.suppress(GateFailed):
            pipeline.export(prepared, [targets.load("x86")], [out / "x86"], settings, Gate())
        packed = out / "x86" / "model.fp32.onnx.dkz"
        unpack_file(packed, out / "again")
        file = out / "again" / "model.fp32.onnx"
        run = exporters.load("onnx").load(file)
        return packed.stat().st_size, xz(files_of(file)), error(lambda x: next(iter(run({"input": x}).values())), test)


def control(net: Net, made: nn.Module, seed: int, train: DataSet, test: DataSet) -> float:
    """The error of the whole network after as much of the same training."""
    steps = (net.rounds * net.each + net.after + net.values) * EPOCH
    here = Context(
        targets.load("x86"), {"train": train}, original=made, loss=taught, seed=seed,
        trainer=Trainer(TrainSettings(batch=100), seed=seed),
    )  # fmt: skip
    return torch_error(passes.build(Step("finetune", {"steps": steps, "learning_rate": 1e-3}))(made, here), test)


def measured(net: Net) -> list[Row]:
    started = time.perf_counter()
    train, wide, test = images("train"), images("train", COPIES), images("test")
    roles: dict[Role, DataSet] = {"train": wide}
    if "near" in net.share:
        roles["calibration"] = train.pick(np.arange(0, len(train), CALIBRATE))
    values, of_xz = dict[str, float](), dict[str, float]()
    for seed in SEEDS:
        made = reference(net, seed, train)
        whole = 4 * sum(p.numel() for p in made.parameters())
        values[f"seed {seed}: reference error"] = torch_error(made, test)
        size, beside, wrong = compressed(recipe(net), made, seed, roles, test)
        values |= {f"seed {seed}: bytes": size, f"seed {seed}: error": wrong, f"seed {seed}: times": whole / size}
        of_xz[f"seed {seed}"] = size / beside
        print(net.name, values, f"{time.perf_counter() - started:.0f} s", flush=True)
        if seed == SEEDS[-1]:
            values[f"seed {seed}: reference trained on like that"] = control(net, made, seed, wide, test)

    def each(what: str) -> list[float]:
        return [values[f"seed {seed}: {what}"] for seed in SEEDS]

    lost = [after - before for after, before in zip(each("error"), each("reference error"), strict=True)]
    minutes = (time.perf_counter() - started) / 60
    values |= {"mean: times": statistics.mean(each("times")), "worst: times": min(each("times"))}
    command = f"{COMMAND} {net.name.lower().replace('-', '_')}"
    return [
        Row(f"{net.name}: reference error (%, worst of 3 seeds)", max(each("reference error")), net.error, "lower",
            ABOUT, command, list(SEEDS), {}, f"Han et al. 2016: {net.error}"),
        Row(f"{net.name}, pruned, shared and coded: times smaller than fp32 weights (worst of 3 seeds, every byte)",
            min(each("times")), net.times, "higher", ABOUT, command, list(SEEDS), values,
            f"Han et al. 2016: {net.times:g}"),
        Row(f"{net.name}, pruned, shared and coded: error above the reference's own (points, mean of 3 seeds)",
            statistics.mean(lost), 0.0, "lower", ABOUT, command, list(SEEDS),
            {f"seed {seed}": points for seed, points in zip(SEEDS, lost, strict=True)}, "Han et al. 2016: -0.06"),
        Row(f"{net.name}, pruned, shared and coded: error above the reference's own (points, worst of 3 seeds)",
            max(lost), None, "lower", ABOUT, command, list(SEEDS), {}),
        Row(f"{net.name}: minutes that the whole benchmark takes on 2 cores", minutes, net.minutes, "lower", ABOUT,
            command, list(SEEDS), {}),
        Row(f"{net.name}, pruned, shared and coded: container / xz of the same file (worst of 3 seeds)",
            max(of_xz.values()), 0.85, "lower", ABOUT, command, list(SEEDS), of_xz, "xz -9e"),
    ]  # fmt: skip


def lenet_300_100() -> list[Row]:
    return measured(NETS[0])


def lenet_5() -> list[Row]:
    return measured(NETS[1])


def shipped() -> list[Row]:
    """The recipe as it ships, with the training images as they are and without their labels."""
    net, x86 = NETS[1], targets.load("x86")
    train, test = images("train"), images("test")
    unlabelled = replace(train, labels=None)
    values = dict[str, float]()
    for seed in SEEDS:
        made = reference(net, seed, train)
        whole = 4 * sum(p.numel() for p in made.parameters())
        steps = recipes.load("deep_compression", [x86])
        size, _, wrong = compressed(steps, made, seed, {"train": unlabelled}, test)
        values |= {f"seed {seed}: reference error": torch_error(made, test), f"seed {seed}: bytes": size,
                   f"seed {seed}: error": wrong, f"seed {seed}: times": whole / size}  # fmt: skip
        print(net.name, values, flush=True)
    lost = [values[f"seed {seed}: error"] - values[f"seed {seed}: reference error"] for seed in SEEDS]
    command = f"{COMMAND} shipped"
    return [
        Row(f"{net.name}, recipe deep_compression as it ships: times smaller than fp32 weights (worst of 3 seeds)",
            min(values[f"seed {seed}: times"] for seed in SEEDS), None, "higher", ABOUT, command, list(SEEDS), values),
        Row(f"{net.name}, recipe deep_compression as it ships: error above the reference's own (points, mean)",
            statistics.mean(lost), None, "lower", ABOUT, command, list(SEEDS), {}),
    ]  # fmt: skip


if __name__ == "__main__":
    main(__doc__, "deep_compression", [lenet_300_100, lenet_5, shipped])
