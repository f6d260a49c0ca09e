"""Pruning: accuracy without training and with a little, by channels and by single weights; tickets; dense-sparse-dense.

ResNet-20 on JPEG CIFAR-10: 512 training images, without labels, choose and refit; the first 2,000 test images evaluate,
as they did for the figures of torch-pruning 1.6.1 that stand beside (`neighbour`).

    python -m benchmarks.prune
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import data
from benchmarks.choices import in_memory
from benchmarks.rows import Row, main
from deploykit import exporters, passes, pipeline, targets
from deploykit.bench.timing import in_turns
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import GateFailed
from deploykit.core.manifest import load_manifest
from deploykit.core.recipe import Step, TrainSettings
from deploykit.core.request import Gate
from deploykit.cost import cost
from deploykit.losses import cross_entropy
from deploykit.models import accept_module
from deploykit.training.trainer import Trainer

COMMAND = "python -m benchmarks.prune"
ABOUT = "ResNet-20, 512 JPEG CIFAR-10 training images choose and refit, the first 2,000 test images evaluate"
AMOUNTS = (0.2, 0.3, 0.4, 0.5, 0.6)
BARS = {0.3: 79.3, 0.5: 59.2}
TORCH_PRUNING = "best criterion of torch-pruning 1.6.1"
CRITERIA = ("fisher", "taylor", "hessian", "l1", "l2", "bn_scale", "fpgm", "activation", "synflow", "random")


def context(net: nn.Module, train: DataSet | None = None, **settings: Any) -> Context:
    """What the passes may ask for; channels may go one by one."""
    calibration = in_memory(data.cifar("train", 512))
    calibration = replace(calibration, labels=None)
    roles = {"calibration": calibration} | ({"train": train} if train is not None else {})
    example = next(calibration.batches(2)).inputs
    return Context(
        replace(targets.load("mobile-arm"), channel_multiple=1), roles, example, original=net,
        trainer=Trainer(TrainSettings(**settings)), cost=lambda module: cost(module, example),
    )  # fmt: skip


def accuracy(model: nn.Module, evaluation: DataSet) -> float:
    """Top-1 in percent."""
    right = 0
    model.eval()
    with torch.no_grad():
        for batch in evaluation.batches(250):
            assert batch.labels is not None
            right += int((model(torch.from_numpy(batch.inputs["x"])).argmax(1).numpy() == batch.labels).sum())
    return 100 * right / len(evaluation)


def run(net: nn.Module, here: Context, *steps: Step) -> nn.Module:
    """A recipe on a module."""
    for step in steps:
        net = passes.build(step)(net, here)
    return net


def channels() -> list[Row]:
    """A share of the multiply-accumulates, without training, by every criterion."""
    net, evaluation = data.resnet20(), in_memory(data.cifar("test", 2000))
    here, rows, every = context(net), [], {}
    for amount in AMOUNTS:
        plain, fitted = {}, {}
        for criterion in CRITERIA:
            options = {"amount": amount, "criterion": criterion}
            narrow = run(net, here, Step("prune", {**options, "refit": False}), Step("reestimate_bn"))
            plain[criterion] = accuracy(narrow, evaluation)
            fitted[criterion] = accuracy(run(net, here, Step("prune", options)), evaluation)
            print(amount, criterion, plain[criterion], fitted[criterion], flush=True)
        every |= {f"{criterion}: {amount:.0%}": value for criterion, value in fitted.items()}
        if amount not in BARS:
            continue
        bar = BARS[amount]
        what = f"ResNet-20, {amount:.0%} of the MACs removed, no training"
        rows += [
            Row(f"{what}, batch normalisation re-estimated: top-1 (%)", plain["fisher"], bar, "higher", ABOUT,
                f"{COMMAND} channels", [0], plain, f"{TORCH_PRUNING}: {bar}"),
            Row(f"{what}, refitted (default): top-1 (%)", fitted["fisher"], bar, "higher", ABOUT,
                f"{COMMAND} channels", [0], fitted, f"{TORCH_PRUNING}, batch normalisation re-estimated: {bar}"),
        ]  # fmt: skip
    mean = {c: statistics.mean(every[f"{c}: {amount:.0%}"] for amount in AMOUNTS) for c in CRITERIA}
    best = max(value for criterion, value in mean.items() if criterion != "fisher")
    return [
        *rows,
        Row("ResNet-20, accuracy over the MACs removed, refitted: mean of the default criterion above the next best "
            "(points)", mean["fisher"] - best, 0.0, "higher", ABOUT, f"{COMMAND} channels", [0], every),
    ]  # fmt: skip


def held_out() -> list[Row]:
    """By which criterion channels go unless told otherwise: judged on training images that no step sees."""
    net, images = data.resnet20(), in_memory(data.cifar("train", 22_000))
    here, held = context(net), images.pick(np.arange(20_000, 22_000))
    values: dict[str, float] = {}
    for criterion, amount in itertools.product(CRITERIA, BARS):
        made = run(net, here, Step("prune", {"amount": amount, "criterion": criterion}))
        values[f"{criterion}: {amount:.0%}"] = accuracy(made, held)
        print(criterion, amount, values[f"{criterion}: {amount:.0%}"], flush=True)
    mean = {c: statistics.mean(values[f"{c}: {amount:.0%}"] for amount in BARS) for c in CRITERIA}
    best = max(value for criterion, value in mean.items() if criterion != "fisher")
    return [
        Row("ResNet-20, 30% and 50% of the MACs removed, refitted: the default criterion above the next best on "
            "held-out training images (points, mean)", mean["fisher"] - best, 0.0, "higher",
            "512 JPEG CIFAR-10 training images choose and refit, 2,000 others evaluate", f"{COMMAND} held_out", [0],
            values)
    ]  # fmt: skip


def trained() -> list[Row]:
    """A share of the multiply-accumulates, and 150 steps of training, which the whole network gets too."""
    net, evaluation = data.resnet20(), in_memory(data.cifar("test", 2000))
    images = in_memory(data.cifar("train", 20_000))
    here, rows = context(net, images, batch=128, augment=("flip", "crop")), []
    steps = Step("finetune", {"steps": 150, "learning_rate": 1e-3})
    control = accuracy(run(net, here, steps), evaluation)
    for amount, bar, neighbour in (
        (0.3, 79.3, f"{TORCH_PRUNING}, batch normalisation re-estimated, not trained: 79.3"),
        (0.5, 78.7, f"{TORCH_PRUNING} and the same steps: 78.7"),
    ):
        narrow = run(net, here, Step("prune", {"amount": amount}))
        tuned = run(narrow, here, steps)
        values = {"before": accuracy(narrow, evaluation), "after": accuracy(tuned, evaluation),
                  "the whole network, same steps": control}  # fmt: skip
        rows.append(
            Row(f"ResNet-20, {amount:.0%} of the MACs removed, 150 steps of 128: top-1 (%)", values["after"], bar,
                "higher", ABOUT, f"{COMMAND} trained", [0], values, neighbour)
        )  # fmt: skip
    return rows


def half(net: nn.Module, here: Context, **options: Any) -> nn.Module:
    """The network whose files are timed: layer by layer, multiples of 8 channels, half of the MACs."""
    return run(net, here, Step("prune", {"amount": 0.5, "multiple": 8, "scope": "layer", **options}))


def timed_net() -> list[Row]:
    """How well the network answers whose files `latency` times: without training, and after 150 steps."""
    net, evaluation = data.resnet20(), in_memory(data.cifar("test", 2000))
    here = context(net, in_memory(data.cifar("train", 20_000)), batch=128, augment=("flip", "crop"))
    refitted = half(net, here)
    tuned = run(refitted, here, Step("finetune", {"steps": 150, "learning_rate": 1e-3}))
    plain = run(half(net, here, refit=False), here, Step("reestimate_bn"))
    values = {
        "batch normalisation re-estimated": accuracy(plain, evaluation), "refitted": accuracy(refitted, evaluation),
        "refitted, 150 steps": accuracy(tuned, evaluation),
    }  # fmt: skip
    what, command = "ResNet-20, the network with 50% of the MACs whose files are timed", f"{COMMAND} timed_net"
    return [
        Row(f"{what}: top-1 after batch normalisation was re-estimated (%)", values["batch normalisation re-estimated"],
            59.2, "higher", ABOUT, command, [0], values, f"{TORCH_PRUNING}: 59.2"),
        Row(f"{what}: top-1 after 150 steps of 128 (%)", values["refitted, 150 steps"], 78.7, "higher", ABOUT, command,
            [0], values, f"{TORCH_PRUNING} and the same steps: 78.7"),
    ]  # fmt: skip


def latency() -> list[Row]:
    """The int8 files of a half network beside those of the whole, by runtime, in turns."""
    net = data.resnet20()
    here, evaluation = context(net), in_memory(data.cifar("test", 2000))
    nets = {"whole": net, "half": half(net, here)}
    calibration = in_memory(data.cifar("train", 512))
    sample, values = next(calibration.batches(1)).inputs, {"half: top-1 (%)": accuracy(nets["half"], evaluation)}
    for target, runtime in (("mobile-arm", "LiteRT"), ("x86", "ONNX Runtime"), ("x86-openvino", "OpenVINO")):
        calls = []
        with tempfile.TemporaryDirectory() as folder:
            for what, module in nets.items():
                out = Path(folder) / what
                prepared = pipeline.prepare(accept_module(module), {"calibration": calibration}, None)
                settings = pipeline.Settings(precisions=("int8",), benchmark=False, threads=1)
                with contextlib.suppress(GateFailed):
                    pipeline.export(prepared, [targets.load(target)], [out], settings, Gate())
                path = next(f.path for f in load_manifest(out).files)
                exporter = exporters.load(targets.load(target).exporter)
                calls.append(functools.partial(exporter.load(out / path, 1), sample))
            times = [float(np.median(t)) for t in in_turns(calls, 2000, 60.0)]
        values |= {f"{what}, {runtime}: ms": t for what, t in zip(nets, times, strict=True)}
    ratio = values["half, LiteRT: ms"] / values["whole, LiteRT: ms"]
    return [
        Row("ResNet-20, 50% of the MACs removed: latency of the int8 file in LiteRT, pruned / whole", ratio, 0.8,
            "lower", ABOUT, f"{COMMAND} latency", [0], values,
            note=". Layer by layer, multiples of 8. ONNX Runtime computes 16 channels at once and gains nothing here.")
    ]  # fmt: skip


ROUNDS = 3


def gradually(sparsity: float) -> list[Step]:
    """The same share of what is left in each round, the weights fitted after every one."""
    shares = [*(1 - (1 - sparsity) ** (k / ROUNDS) for k in range(1, ROUNDS)), sparsity]
    return [step for share in shares for step in (Step("sparsify", {"sparsity": share}), Step("refit"))]


def weights() -> list[Row]:
    """Single weights, without training."""
    net, evaluation = data.resnet20(), in_memory(data.cifar("test", 2000))
    here, rows = context(net), []
    for sparsity, bar, magnitude in ((0.5, 86.3, 83.5), (0.7, 85.3, 79.5), (0.8, 82.0, 69.3), (0.9, 74.0, 42.0)):
        started = time.process_time()
        values = {f"obs and refit in {ROUNDS} rounds": accuracy(run(net, here, *gradually(sparsity)), evaluation)}
        values["CPU seconds"] = time.process_time() - started
        once = run(net, here, Step("sparsify", {"sparsity": sparsity}), Step("refit"))
        values["obs and refit once"] = accuracy(once, evaluation)
        small = Step("sparsify", {"sparsity": sparsity, "criterion": "l1"})
        values["l1, batch normalisation re-estimated"] = accuracy(
            run(net, here, small, Step("reestimate_bn")), evaluation
        )
        print(sparsity, values, flush=True)
        rows.append(
            Row(f"ResNet-20, {sparsity:.0%} of the weights zero, no training: top-1 (%)",
                values[f"obs and refit in {ROUNDS} rounds"], bar, "higher", ABOUT, f"{COMMAND} weights", [0], values,
                f"global magnitude, batch normalisation re-estimated: {magnitude}")
        )  # fmt: skip
    return rows


def synflow() -> list[Row]:
    """1 % of the weights left before any training."""
    torch.manual_seed(0)
    net = data.resnet20()
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    here, left = context(net), {}
    for criterion in ("synflow", "l1"):
        sparse = passes.build(Step("sparsify", {"sparsity": 0.99, "criterion": criterion}))(net, here)
        lives = [int((m.weight != 0).sum()) for m in sparse.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        left[f"{criterion}: emptiest layer"] = min(lives)
    return [
        Row("ResNet-20 untrained, 1% of the weights left by synflow: weights of the emptiest layer",
            left["synflow: emptiest layer"], 1, "higher", "no data", f"{COMMAND} synflow", [0], left)
    ]  # fmt: skip


# ------------------------------------------------------------------ MNIST


def mnist() -> tuple[DataSet, DataSet]:
    """Training and test images ``[784]``."""
    raw = np.load(data.ROOT / "mnist.npz")

    def split(name: str) -> DataSet:
        x = ((raw[f"x_{name}"].reshape(-1, 784) / 255.0 - 0.1307) / 0.3081).astype(np.float32)
        return DataSet.of({"input": x}, raw[f"y_{name}"].astype(np.int64), "MNIST")

    return split("train"), split("test")


def lenet() -> nn.Module:
    """LeNet-300-100, as it is initialised."""
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


class LeNet5(nn.Module):
    """LeCun et al. 1998, with ReLU and max pooling as Caffe has it."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.classifier = nn.Sequential(nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))

    def forward(self, input: Tensor) -> Tensor:
        """``[n, 784]`` -> ``[n, 10]``."""
        scores: Tensor = self.classifier(self.features(input.reshape(-1, 1, 28, 28)).flatten(1))
        return scores


class RowByRow(nn.Module):
    """An LSTM that reads an image row by row."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.lstm, self.classifier = nn.LSTM(28, 96, batch_first=True), nn.Linear(96, 10)

    def forward(self, input: Tensor) -> Tensor:
        """``[n, 784]`` -> ``[n, 10]``."""
        states, _ = self.lstm(input.reshape(-1, 28, 28))
        scores: Tensor = self.classifier(states[:, -1])
        return scores


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def correct(model: nn.Module, test: DataSet) -> float:
    batch = next(test.batches(len(test)))
    with torch.no_grad():
        return 100 * float(
            (model.eval()(torch.from_numpy(batch.inputs["input"])).argmax(1).numpy() == batch.labels).mean()
        )


def lottery(seeds: Sequence[int] = (0, 1, 2)) -> list[Row]:
    """Frankle & Carbin 2019: 15 rounds of 20 %, weights rewound to where they began, or drawn anew."""
    train, test = mnist()
    values: dict[str, float] = {}
    for seed in seeds:
        net = seeded(lenet, seed)
        for what in ("weights", "random"):
            here = Context(
                targets.load("mobile-arm"), {"train": train}, {"input": np.zeros((2, 784), np.float32)}, original=net,
                trainer=Trainer(TrainSettings(batch=60), seed=seed), loss=cross_entropy, seed=seed,
            )  # fmt: skip
            step = Step("iterate", {
                "amount": 1 - 0.8**15, "rounds": 15, "steps": 800, "dense": 800, "schedule": "geometric",
                "rewind": what, "learning_rate": 1.2e-3, "options": {"criterion": "l1"},
            })  # fmt: skip
            values[f"seed {seed}, {'ticket' if what == 'weights' else 'drawn anew'}"] = correct(
                run(net, here, step), test
            )
            print(values, flush=True)
    tickets = [v for k, v in values.items() if "ticket" in k]
    controls = [v for k, v in values.items() if "anew" in k]
    gain = statistics.mean(tickets) - statistics.mean(controls)
    return [
        Row("LeNet-300-100, 3.5% of the weights: winning ticket above new random weights (points, mean of 3 seeds)",
            gain, 0.0, "higher", "MNIST, 60,000 train, 10,000 test", f"{COMMAND} lottery", list(seeds), values)
    ]  # fmt: skip


def dsd() -> list[Row]:
    """Dense-sparse-dense beside as many steps without zeros."""
    return [flow("LeNet-5", LeNet5), flow("LSTM over 28 rows", RowByRow)]


def flow(name: str, build: Callable[[], nn.Module], seeds: Sequence[int] = (0, 1, 2)) -> Row:
    train, test = mnist()
    values: dict[str, float] = {}
    for seed in seeds:
        net = seeded(build, seed)
        here = Context(
            targets.load("mobile-arm"), {"train": train}, {"input": np.zeros((2, 784), np.float32)}, original=net,
            trainer=Trainer(TrainSettings(batch=60), seed=seed), loss=cross_entropy, seed=seed,
        )  # fmt: skip
        dense = run(net, here, Step("finetune", {"steps": 1500, "learning_rate": 1.2e-3}))
        again = Step("finetune", {"steps": 1000, "learning_rate": 1.2e-3}), Step("finetune", {"steps": 1000,
                     "learning_rate": 1.2e-4})  # fmt: skip
        values[f"seed {seed}, dsd"] = correct(
            run(dense, here, Step("dsd", {"steps": 1000, "learning_rate": 1.2e-3})), test
        )
        values[f"seed {seed}, control"] = correct(run(dense, here, *again), test)
        print(name, values, flush=True)
    mean = {w: statistics.mean(v for k, v in values.items() if w in k) for w in ("dsd", "control")}
    return Row(
        f"{name}, dense-sparse-dense above as many steps without zeros (points, mean of 3 seeds)",
        mean["dsd"] - mean["control"], None, "higher", "MNIST, 60,000 train, 10,000 test", f"{COMMAND} dsd",
        list(seeds), values,
    )  # fmt: skip


if __name__ == "__main__":
    main(__doc__, "prune", [channels, held_out, trained, latency, timed_net, weights, synflow, lottery, dsd])
