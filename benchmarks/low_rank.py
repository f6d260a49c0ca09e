"""Low rank: accuracy without training at a share of the parameters removed, on weights alone and on data; ablations.

ResNet-20 on JPEG CIFAR-10: 512 training images, without labels, choose and fit. CR-P is the share of the parameters
that is removed, CR-F that of the multiply-accumulates. Bars are what a prototype reached.

    python -m benchmarks.low_rank
"""

from __future__ import annotations

import resource
import statistics
import time
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import data
from benchmarks.choices import in_memory
from benchmarks.nets import resnet18
from benchmarks.prune import accuracy, context, run
from benchmarks.rows import Row, main
from deploykit import targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.recipe import Step
from deploykit.cost import cost
from deploykit.layerwise.products import products
from deploykit.low_rank import methods, select
from deploykit.low_rank.tables import table

COMMAND = "python -m benchmarks.low_rank"
ALL = "ResNet-20, no data chooses, all 10,000 JPEG test images evaluate"
ABOUT = "ResNet-20, 512 JPEG CIFAR-10 training images choose and fit, the first 2,000 test images evaluate"
BASELINES = ("equal_error", "constant", "energy", "l_rank")


def low_rank(amount: float, **options: Any) -> Step:
    return Step("low_rank", {"amount": amount, **options})


def tops(model: nn.Module, evaluation: DataSet) -> tuple[float, float]:
    """Top-1 and top-5 in percent."""
    right = np.zeros(2)
    with torch.no_grad():
        for batch in evaluation.batches(250):
            assert batch.labels is not None
            best = model(torch.from_numpy(batch.inputs["x"])).topk(5).indices.numpy() == batch.labels[:, None]
            right += best[:, 0].sum(), best.any(1).sum()
    one, five = 100 * right / len(evaluation)
    return float(one), float(five)


def weights() -> list[Row]:
    """On weights alone, three seeds, beside the baselines."""
    net, evaluation = data.resnet20(), in_memory(data.cifar("test", 10_000))
    here, rows, seconds = context(net), [], {}
    for amount, bar in ((0.3, 84.2), (0.5, 72.8), (0.65, 31.1)):
        found: list[tuple[float, float]] = []
        values: dict[str, float] = {}
        for seed in range(3):
            started = time.process_time()
            made = run(net, replace(here, seed=seed), low_rank(amount, method="alds"))
            seconds[f"{amount:.0%}, seed {seed}"] = time.process_time() - started
            found.append(tops(made, evaluation))
        for i, what in enumerate(("top-1", "top-5")):
            own = [each[i] for each in found]
            values |= {f"{what}, mean": statistics.mean(own), f"{what}, standard deviation": statistics.stdev(own)}
        values |= {m: accuracy(run(net, here, low_rank(amount, method=m)), evaluation) for m in BASELINES}
        renewed = run(net, here, low_rank(amount, method="alds"), Step("reestimate_bn"))
        values["alds, batch normalisation re-estimated"] = accuracy(renewed, evaluation)
        print(amount, values, flush=True)
        rows.append(
            Row(f"ResNet-20, {amount:.0%} of the parameters removed by alds, no training: top-1 (%, mean of 3 seeds)",
                values["top-1, mean"], bar, "higher", ALL, f"{COMMAND} weights", [0, 1, 2], values,
                f"constant ratio SVD: {values['constant']:.1f}")
        )  # fmt: skip
    return [
        *rows,
        Row("ResNet-20, choosing ranks and decomposing: CPU seconds on one core", max(seconds.values()), 2.0, "lower",
            ALL, f"{COMMAND} weights", [0, 1, 2], seconds),
    ]  # fmt: skip


def on_data() -> list[Row]:
    """On 512 unlabelled images."""
    net, evaluation = data.resnet20(), in_memory(data.cifar("test", 2000))
    here, rows = context(net), []
    for amount, bar in ((0.3, 85.5), (0.5, 84.5), (0.65, 78.0)):
        started = time.process_time()
        values = {"data": accuracy(run(net, here, low_rank(amount)), evaluation)}
        values["CPU seconds"] = time.process_time() - started
        values["pca"] = accuracy(run(net, here, low_rank(amount, method="pca")), evaluation)
        weights_alone = run(net, here, low_rank(amount, method="alds"), Step("reestimate_bn"))
        values["alds, batch normalisation re-estimated"] = accuracy(weights_alone, evaluation)
        print(amount, values, flush=True)
        rows.append(
            Row(f"ResNet-20, {amount:.0%} of the parameters removed on data, no training: top-1 (%)", values["data"],
                bar, "higher", ABOUT, f"{COMMAND} on_data", [0], values)
        )  # fmt: skip
    return rows


def ablations() -> list[Row]:
    """Half of the parameters: k chosen for every layer or the same for all, and every form, on weights and on data."""
    net, evaluation = data.resnet20(), in_memory(data.cifar("test", 2000))
    here, values = context(net), {}
    ways: dict[str, dict[str, Any]] = {f"k = {k or 'chosen'}": {"slices": k} for k in (0, 1, 2, 4, 8, 16)}
    ways |= {form: {"form": form} for form in ("spatial", "tucker")}
    for what, options in ways.items():
        for method in ("equal_error", "data"):
            values[f"{what}, {method}"] = accuracy(run(net, here, low_rank(0.5, method=method, **options)), evaluation)
            print(what, method, values[f"{what}, {method}"], flush=True)
    best = max(value for what, value in values.items() if "data" in what and "chosen" not in what)
    return [
        Row("ResNet-20, 50% of the parameters removed on data: k chosen layer by layer above the next best (points)",
            values["k = chosen, data"] - best, 0.0, "higher", ABOUT, f"{COMMAND} ablations", [0], values)
    ]  # fmt: skip


def trained() -> list[Row]:
    """One epoch of training behind it, beside the same epoch on the whole network."""
    net, evaluation = data.resnet20(), in_memory(data.cifar("test", 2000))
    images = in_memory(data.cifar("train", 50_000))
    here, rows = context(net, images, batch=128, augment=("flip", "crop")), []
    epoch = Step("finetune", {"steps": 391, "learning_rate": 1e-3})
    whole = accuracy(run(net, here, epoch), evaluation)
    for amount in (0.5, 0.65):
        made = run(net, here, low_rank(amount))
        values = {"before": accuracy(made, evaluation), "whole network, same epoch": whole}
        values["after"] = accuracy(run(made, here, epoch), evaluation)
        print(amount, values, flush=True)
        rows.append(
            Row(f"ResNet-20, {amount:.0%} of the parameters removed on data, one epoch: top-1 after above before",
                values["after"] - values["before"], 0.0, "higher", ABOUT, f"{COMMAND} trained", [0], values)
        )  # fmt: skip
    return rows


def mobilenet() -> list[Row]:
    """30 % of the multiply-accumulates of MobileNetV1, whose 1x1 convolutions have nearly all of them."""
    net, calibration, evaluation = data.mobilenetv1(), in_memory(data.imagenet(True)), data.imagenet(False)
    example = next(calibration.batches(2)).inputs
    target = replace(targets.load("mobile-arm"), channel_multiple=1)
    here = Context(
        target, {"calibration": replace(calibration, labels=None)}, example, original=net,
        cost=lambda module: cost(module, example),
    )  # fmt: skip
    made = {m: run(net, here, low_rank(0.3, of="macs", method=m)) for m in ("data", "equal_error", "constant")}
    agree, count = dict.fromkeys(made, 0), 0
    with torch.no_grad():
        for batch in evaluation.batches(20):
            x = torch.from_numpy(batch.inputs["x"])
            expected, count = net(x).argmax(1), count + len(x)
            for method, model in made.items():
                agree[method] += int((model(x).argmax(1) == expected).sum())
    values = {method: 100 * n / count for method, n in agree.items()}
    return [
        Row("MobileNetV1-0.75, 30% of the MACs removed, no training: agreement with fp32 above constant ratio SVD "
            "(points)", values["data"] - values["constant"], 10.0, "higher",
            "200 sample images choose and fit, the other 800 evaluate", f"{COMMAND} mobilenet", [0], values)
    ]  # fmt: skip


def large() -> list[Row]:
    """Tables of all choices and the choice, ResNet-18.

    Run it alone: memory is the most that the process ever had, less what it had before.
    """
    torch.set_num_threads(1)
    net = resnet18().eval()
    layers = products(net)
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    started = time.process_time()
    params = attrgetter("params")
    tables = {name: table(layer, "channel", {"in": 1, "mid": 1, "out": 1}, 1) for name, layer in layers.items()}
    half = sum(t.whole.params for t in tables.values()) / 2
    methods.choose("alds", params, 15, 0, select.saving(tables, params), half)
    seconds = time.process_time() - started
    more = (1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / weights
    about = "ResNet-18 with random weights"
    return [
        Row("ResNet-18, tables of all ranks and choosing by alds: CPU seconds on one core", seconds, 20.0, "lower",
            about, f"{COMMAND} large", [0]),
        Row("ResNet-18, tables of all ranks and choosing by alds: memory, of the weights", more, 3.0, "lower",
            about, f"{COMMAND} large", [0]),
    ]  # fmt: skip


if __name__ == "__main__":
    main(__doc__, "low_rank", [large, weights, on_data, ablations, trained, mobilenet])
