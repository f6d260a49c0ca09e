"""Low rank: accuracy without training at a share of the parameters removed, on weights alone and on data; ablations.

ResNet-20 on JPEG CIFAR-10: 512 training images, without labels, choose and fit. CR-P is the share of the parameters
that is removed, CR-F that of the multiply-accumulates. Bars are what a prototype reached; without data it was run again
on the same 10,000 images. It counted the weights of convolutions and linear layers alone, which is a little less to
remove: the paper's algorithm, which it is, is run on its count.

    python -m benchmarks.low_rank
"""

from __future__ import annotations

import copy
import resource
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import data, road, transformers
from benchmarks.choices import in_memory
from benchmarks.nets import Encoder, resnet18
from benchmarks.prune import accuracy, context, lenet, mnist, run, seeded
from benchmarks.rows import Row, main
from deploykit import targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.recipe import Step, TrainSettings
from deploykit.cost import cost
from deploykit.layerwise.products import products
from deploykit.losses import cross_entropy
from deploykit.low_rank import channel, methods, select
from deploykit.low_rank.factored import Ranks
from deploykit.low_rank.search import ranks_of
from deploykit.low_rank.tables import Table, table
from deploykit.training.trainer import Trainer

COMMAND = "python -m benchmarks.low_rank"
ALL = "ResNet-20, no data chooses, all 10,000 JPEG test images evaluate"
ABOUT = "ResNet-20, 512 JPEG CIFAR-10 training images choose and fit, the first 2,000 test images evaluate"
BASELINES = ("weights", "equal_error", "constant", "energy", "l_rank")
PROTOTYPE = {0.3: 84.39, 0.5: 72.65, 0.65: 32.03}


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


def share_of_weights(net: nn.Module) -> float:
    """The share of the parameters that are weights of convolutions and linear layers."""
    counted = sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    return counted / sum(p.numel() for p in net.parameters())


def weights() -> list[Row]:
    """On weights alone, beside the paper's own choice (three seeds) and the baselines."""
    net, evaluation = data.resnet20(), in_memory(data.cifar("test", 10_000))
    here, rows, seconds = context(net), [], {}
    for amount, bar in PROTOTYPE.items():
        values: dict[str, float] = {}
        for method in BASELINES:
            started = time.process_time()
            one, five = tops(run(net, here, low_rank(amount, method=method)), evaluation)
            seconds[f"{method}, {amount:.0%}"] = time.process_time() - started
            values |= {f"{method}: top-1 (%)": one, f"{method}: top-5 (%)": five}
        alds = low_rank(amount * share_of_weights(net), method="alds")
        found = [tops(run(net, replace(here, seed=seed), alds), evaluation) for seed in range(3)]
        for i, what in enumerate(("top-1", "top-5")):
            own = [each[i] for each in found]
            values[f"alds: {what} (%)"] = statistics.mean(own)
            values[f"alds: {what}, standard deviation"] = statistics.stdev(own)
        renewed = run(net, here, low_rank(amount, method="weights"), Step("reestimate_bn"))
        values["weights, batch normalisation re-estimated: top-1 (%)"] = accuracy(renewed, evaluation)
        print(amount, values, flush=True)
        rows += [
            Row(f"ResNet-20, {amount:.0%} of the parameters removed without data, no training: top-1 (%)",
                values["weights: top-1 (%)"], bar, "higher", ALL, f"{COMMAND} weights", [0], values,
                "the prototype of ALDS on these images"),
            Row(f"ResNet-20, {amount:.0%} of the weights removed by alds, no training: top-1 (%, mean of 3 seeds)",
                values["alds: top-1 (%)"], bar, "higher", ALL, f"{COMMAND} weights", [0, 1, 2], values,
                "the prototype of ALDS on these images"),
        ]  # fmt: skip
    return [*rows, _selection(net)]


def _selection(net: nn.Module) -> Row:
    """Tables and choice, by every method without data."""
    params, seconds = attrgetter("params"), {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for method in ("weights", "alds", "equal_error"):
        for amount in PROTOTYPE:
            started = time.process_time()
            tables = select.saving(tables_of(net), params)
            budget = (1 - amount) * sum(t.whole.params for t in tables.values())
            methods.choose(method, params, 15, 0, tables, budget)
            seconds[f"{method}, {amount:.0%}"] = time.process_time() - started
    torch.set_num_threads(threads)
    return Row("ResNet-20, tables of all ranks and choosing: CPU seconds on one core, most", max(seconds.values()), 2.0,
               "lower", "ResNet-20", f"{COMMAND} weights", [0], seconds)  # fmt: skip


def tables_of(net: nn.Module) -> dict[str, Table]:
    """Of all layers, where each runs once."""
    return {name: table(layer, "channel", {"in": 1, "mid": 1, "out": 1}, 1) for name, layer in products(net).items()}


def on_data() -> list[Row]:
    """On 512 unlabelled images."""
    net, evaluation = data.resnet20(), in_memory(data.cifar("test", 2000))
    here, rows = context(net), []
    for amount, bar in ((0.3, 85.5), (0.5, 84.5), (0.65, 78.0)):
        started = time.process_time()
        values = {"data": accuracy(run(net, here, low_rank(amount)), evaluation)}
        values["CPU seconds"] = time.process_time() - started
        values["pca"] = accuracy(run(net, here, low_rank(amount, method="pca")), evaluation)
        weights_alone = run(net, here, low_rank(amount, method="weights"), Step("reestimate_bn"))
        values["weights, batch normalisation re-estimated"] = accuracy(weights_alone, evaluation)
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
    for method in ("equal_error", "alds", "constant"):
        values[f"k = chosen, {method}"] = accuracy(run(net, here, low_rank(0.5, method=method)), evaluation)
    params, tables = attrgetter("params"), select.saving(tables_of(net), attrgetter("params"))
    half = methods.choose("weights", params, 15, 0, tables, sum(t.whole.params for t in tables.values()) / 2)
    values["k = chosen, weights, similar channels together"] = accuracy(alike_together(net, ranks_of(half)), evaluation)
    for what, options in ways.items():
        for method in ("weights", "data"):
            values[f"{what}, {method}"] = accuracy(run(net, here, low_rank(0.5, method=method, **options)), evaluation)
            print(what, method, values[f"{what}, {method}"], flush=True)
    best = max(value for what, value in values.items() if "data" in what and "chosen" not in what)
    return [
        Row("ResNet-20, 50% of the parameters removed on data: k chosen layer by layer above the next best (points)",
            values["k = chosen, data"] - best, 0.0, "higher", ABOUT, f"{COMMAND} ablations", [0], values)
    ]  # fmt: skip


def alike_together(net: nn.Module, form: Mapping[str, Ranks]) -> nn.Module:
    """A copy with the weights that slices would make if input channels that resemble each other shared one.

    Channels are in the order of their part in the leading principal component of the layer's weight.
    """
    made: Any = copy.deepcopy(net)
    for name, ranks in form.items():
        layer = made.get_submodule(name)
        w = layer.weight.detach().double()
        order = torch.linalg.svd(w.transpose(0, 1).flatten(1), full_matrices=False)[0][:, 0].argsort()
        factors = channel.split(w[:, order], 1, ranks)
        layer.weight.data.copy_(channel.merge(factors, 1, ranks)[:, order.argsort()])
    return made  # type: ignore[no-any-return]


def trained() -> list[Row]:
    """One epoch of training behind it, beside the same epoch on the whole network."""
    net, evaluation = data.resnet20(), in_memory(data.cifar("test", 2000))
    images = in_memory(data.cifar("train", 30_000))
    here, rows = context(net, images, batch=128, augment=("flip", "crop")), []
    rate = 2e-4  # what is fitted already is near its best; at 1e-3 the first steps undo more than the rest mends
    epoch = Step("finetune", {"steps": 234, "learning_rate": rate})
    whole = accuracy(run(net, here, epoch), evaluation)
    for amount in (0.5, 0.65):
        made = run(net, here, low_rank(amount))
        values = {"before": accuracy(made, evaluation), "whole network, same epoch": whole}
        values["after"] = accuracy(run(made, here, epoch), evaluation)
        turns = {
            "amount": amount,
            "step": "low_rank",
            "schedule": "geometric",
            "rounds": 3,
            "steps": 78,
            "learning_rate": rate,
        }
        values["decomposed and trained in three turns, same epoch"] = accuracy(
            run(net, here, Step("iterate", turns)), evaluation
        )
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
    made = {
        m: run(net, here, low_rank(0.3, of="macs", method=m)) for m in ("data", "weights", "equal_error", "constant")
    }
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
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    started = time.process_time()
    params = attrgetter("params")
    tables = tables_of(net)
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


def files() -> list[Row]:
    """Integers behind low rank, in the files of three runtimes."""
    images, (digits, more) = data.resnet20(), transformers.digits()
    train, test = mnist()
    lenet300 = seeded(lenet, 0)
    Trainer(TrainSettings(batch=128)).fit(lenet300, train, cross_entropy, steps=900, learning_rate=1e-3)
    cases = {
        "ResNet-20": (images, 0.5, data.cifar("train", 512), data.cifar("test", 2000)),
        "LeNet-300-100": (lenet300, 0.8, train.take(slice(512)), test),
        "a transformer on digits": (transformers.trained(digits), 0.3, digits.take(slice(512)), more),
    }
    rows = []
    for name, (net, amount, calibration, evaluation) in cases.items():
        calibration, evaluation = in_memory(calibration), in_memory(evaluation)
        example = next(calibration.batches(2)).inputs
        here = Context(
            replace(targets.load("mobile-arm"), channel_multiple=1), {"calibration": replace(calibration, labels=None)},
            example, original=net, cost=partial(cost, example=example),
        )  # fmt: skip
        made = run(net.eval(), here, low_rank(amount))
        with tempfile.TemporaryDirectory() as folder:
            found = road.export(made, calibration, evaluation, ["x86", "mobile-arm", "x86-openvino"], Path(folder))
            values = {"decomposed": road.accuracy(found["x86"], "original")}
            values |= {f"int8, {target}": road.accuracy(manifest, "int8") for target, manifest in found.items()}
            whole = road.export(net, calibration, evaluation, ["x86"], Path(folder) / "whole")["x86"]
            values |= {"whole": road.accuracy(whole, "original"), "whole, int8, x86": road.accuracy(whole, "int8")}
        print(name, values, flush=True)
        worst = max(values["decomposed"] - values[f"int8, {target}"] for target in found)
        rows.append(
            Row(f"{name}, {amount:.0%} of the parameters removed: top-1 lost to integers in the worst of three "
                "runtimes (points)", worst, 1.0, "lower", f"{len(evaluation):,} test samples", f"{COMMAND} files", [0],
                values)
        )  # fmt: skip
    return rows


def encoder() -> list[Row]:
    """An encoder of texts, nearly all linear layers: it decomposes, and three runtimes answer as PyTorch does.

    Its weights are random, so that low rank costs more than it would after training: shapes are what is tested.
    """
    net = seeded(Encoder, 0).eval()
    ids = np.random.default_rng(0).integers(0, 2000, (192, 64))
    calibration, evaluation = (DataSet.of({"ids": part}, None, "random tokens") for part in (ids[:64], ids[64:]))
    example = next(calibration.batches(2)).inputs
    here = Context(
        targets.load("mobile-arm"), {"calibration": calibration}, example, original=net,
        cost=partial(cost, example=example),
    )  # fmt: skip
    made = run(net, here, low_rank(0.3))
    before, after = cost(net, example), cost(made, example)
    values = {"parameters removed (%)": 100 * (1 - after.params / before.params),
              "multiply-accumulates removed (%)": 100 * (1 - after.macs / before.macs)}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        found = road.export(made, calibration, evaluation, ["x86", "mobile-arm", "x86-openvino"], Path(folder))
        for target, manifest in found.items():
            for score in manifest.scores:
                values[f"{target}, {score.precision}"] = min(score.sqnr_db.values())
    print(values, flush=True)
    return [
        Row("An encoder with the shapes of BERT-mini, 30% of the parameters removed: the worst fp32 file of three "
            "runtimes against PyTorch (dB)", min(value for key, value in values.items() if key.endswith("fp32")), 80.0,
            "higher", "random weights, 64 random texts choose and fit, 128 evaluate", f"{COMMAND} encoder", [0],
            values)
    ]  # fmt: skip


if __name__ == "__main__":
    main(__doc__, "low_rank", [large, weights, on_data, ablations, trained, mobilenet, files, encoder])
