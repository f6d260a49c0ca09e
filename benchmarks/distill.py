"""Distillation on MNIST and on the digits of scikit-learn: students beside the same students without a teacher.

The teacher has two layers of 1,200 units, dropout, and images shifted by a pixel; the students see the images
as they are. Temperature and the teacher's share are chosen on the last 10,000 training images, which students train on
only afterwards.

    python -m benchmarks.distill
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from benchmarks.lenets import images, torch_error
from benchmarks.prune import seeded
from benchmarks.rows import Row, main
from deploykit import passes, pipeline, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.manifest import load_manifest
from deploykit.core.recipe import Recipe, Step, TrainSettings
from deploykit.core.request import Gate, Settings
from deploykit.losses import cross_entropy
from deploykit.models import accept_module
from deploykit.training.trainer import Trainer

COMMAND = "python -m benchmarks.distill"
ABOUT = "MNIST, 60,000 images train, 10,000 test"
SEEDS = (0, 1, 2)
SHIFTS = list(itertools.product((-1, 0, 1), (-1, 0, 1)))
BATCH = 100
EPOCHS = 20
"""Of every student but those of ``small``."""
SMALL_EPOCHS = 100
"""They are quick."""
TRIED = [(t, a) for t in (2.0, 4.0, 8.0, 20.0) for a in (0.5, 0.9, 1.0)]
"""Temperatures and shares of the teacher."""
THREE = 3


def layers(units: int, dropped: float = 0.0) -> nn.Module:
    """784 - units - units - 10."""
    dropout = [nn.Dropout(dropped)] if dropped else []
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, units), nn.ReLU(), *dropout, nn.Linear(units, units), nn.ReLU(), *dropout,
        nn.Linear(units, 10),
    )  # fmt: skip


def context(
    train: DataSet, seed: int, teacher: nn.Module | None = None, loss: Any = None, batch: int = BATCH
) -> Context:
    """What steps may ask for."""
    return Context(
        targets.load("mobile-arm"), {"train": train}, original=teacher, loss=loss, seed=seed,
        trainer=Trainer(TrainSettings(batch=batch), seed=seed),
    )  # fmt: skip


def plain(student: nn.Module, train: DataSet, seed: int, steps: int, batch: int = BATCH) -> nn.Module:
    """From labels alone."""
    here = context(train, seed, student, cross_entropy, batch)
    made: nn.Module = passes.build(Step("finetune", {"steps": steps, "learning_rate": 2e-3}))(student, here)
    return made


def distilled(
    student: nn.Module, teacher: nn.Module, train: DataSet, seed: int, steps: int, batch: int = BATCH, **options: Any
) -> nn.Module:
    """From a teacher."""
    step = passes.build(Step("distill", {"steps": steps, "learning_rate": 2e-3, **options}))
    made: nn.Module = step(student, context(train, seed, teacher, batch=batch))
    return made


@cache
def teacher(count: int = 60_000) -> nn.Module:
    """2 x 1200, for twenty passes over the first ``count`` images, shifted."""
    net, wide = seeded(lambda: layers(1200, 0.5), 0), images("train", SHIFTS)
    every = np.arange(len(wide)).reshape(len(SHIFTS), -1)[:, :count].reshape(-1)
    Trainer(TrainSettings(batch=200), seed=0).fit(net, wide.pick(every), cross_entropy, steps=6000, learning_rate=1e-3)
    return net.eval()


@cache
def chosen() -> tuple[float, float]:
    """Temperature and share of the teacher with the fewest errors on held-out training images.

    The teacher has not seen them either: one that knows them by heart answers better there than it will on others, and
    sharper.
    """
    train = images("train")
    seen, held = train.pick(np.arange(50_000)), train.pick(np.arange(50_000, 60_000))
    errors = {}
    for t, a in TRIED:
        student = seeded(lambda: layers(30), 7)
        made = distilled(student, teacher(50_000), seen, 7, 10 * 500, temperature=t, alpha=a)
        errors[t, a] = torch_error(made, held)
        print("T, alpha", t, a, errors[t, a], flush=True)
    return min(errors, key=lambda key: errors[key])


def steps(train: DataSet, epochs: int = EPOCHS) -> int:
    return epochs * len(train) // BATCH


def beside(units: int, epochs: int) -> dict[str, float]:
    """Errors on the test images of students with and without the teacher, seed by seed."""
    train, test = images("train"), images("test")
    t, a = chosen()
    count = steps(train, epochs)
    values = {"teacher: errors": 100 * torch_error(teacher(), test), "chosen: T": t, "chosen: alpha": a}
    for seed in SEEDS:
        net = seeded(lambda: layers(units), seed)
        made = {
            "plain": plain(net, train, seed, count),
            "distilled": distilled(net, teacher(), train, seed, count, temperature=t, alpha=a),
        }
        values |= {f"seed {seed}: {what}": 100 * torch_error(own, test) for what, own in made.items()}
        print(units, values, flush=True)
    for what in ("plain", "distilled"):
        values[f"mean: {what}"] = statistics.mean(values[f"seed {seed}: {what}"] for seed in SEEDS)
    return values


def small() -> list[Row]:
    """2 x 30 units, which labels alone bend to the training images after a while."""
    values = beside(30, SMALL_EPOCHS)
    return [
        Row("MNIST, student of 2 x 30 units: errors that distillation saves at equal epochs (share, mean of 3 seeds)",
            1 - values["mean: distilled"] / values["mean: plain"], 0.2, "higher", f"{ABOUT}; {SMALL_EPOCHS} epochs",
            f"{COMMAND} small", list(SEEDS), values)
    ]  # fmt: skip


def wide() -> list[Row]:
    """2 x 800 units."""
    values = beside(800, EPOCHS)
    return [
        Row("MNIST, student of 2 x 800 units: errors of 10,000, distilled (mean of 3 seeds)",
            values["mean: distilled"], values["mean: plain"], "lower", f"{ABOUT}; {EPOCHS} epochs", f"{COMMAND} wide",
            list(SEEDS), values,
            f"without a teacher {values['mean: plain']:.0f}; Hinton et al. 2015: 146 without, 74 distilled")
    ]  # fmt: skip


def no_threes() -> list[Row]:
    """A transfer set without a single 3."""
    train, test = images("train"), images("test")
    assert train.labels is not None and test.labels is not None
    some, threes = train.pick(np.flatnonzero(train.labels != THREE)), test.pick(np.flatnonzero(test.labels == THREE))
    held = train.pick(np.arange(50_000, 60_000))
    values = {}
    for seed in SEEDS:
        made = distilled(seeded(lambda: layers(800), seed), teacher(), some, seed, 10 * 600, temperature=8.0)
        values[f"seed {seed}: as trained"] = 100 - torch_error(made, threes)
        last: Any = made[-1]
        found = {}
        for shift in np.arange(0.0, 8.0, 0.25):
            with torch.no_grad():
                last.bias[THREE] += float(shift)
                found[float(shift)] = torch_error(made, held)
                last.bias[THREE] -= float(shift)
        best = min(found, key=lambda key: found[key])
        with torch.no_grad():
            last.bias[THREE] += best
        values |= {f"seed {seed}: 3s right (%)": 100 - torch_error(made, threes), f"seed {seed}: bias": best,
                   f"seed {seed}: all right (%)": 100 - torch_error(made, test)}  # fmt: skip
        print(values, flush=True)
    return [
        Row("MNIST, no 3 in the transfer set: 3s that the student knows after its bias was corrected (%, worst of 3)",
            min(value for key, value in values.items() if "3s right" in key), 90.0, "higher",
            f"{ABOUT}; the bias is chosen on 10,000 training images", f"{COMMAND} no_threes", list(SEEDS), values,
            "Hinton et al. 2015: 98.6")
    ]  # fmt: skip


def losses() -> list[Row]:
    """What a student of 2 x 30 units makes of other losses."""
    train, test = images("train"), images("test")
    ways: dict[str, dict[str, Any]] = {
        "logits": {"loss": "logits"}, "noisy logits": {"loss": "noisy", "sigma": 0.3, "fraction": 0.5}
    }  # fmt: skip
    values = {}
    for seed in SEEDS:
        net = seeded(lambda: layers(30), seed)
        values[f"seed {seed}: plain"] = 100 * torch_error(plain(net, train, seed, steps(train)), test)
        for what, options in ways.items():
            made = distilled(net, teacher(), train, seed, steps(train), **options)
            values[f"seed {seed}: {what}"] = 100 * torch_error(made, test)
        print(values, flush=True)
    return [
        _against("losses", "plain", "logits", "MNIST, 2 x 30 units: errors of 10,000 that regression on logits saves",
                 ABOUT, values),
        _against("losses", "logits", "noisy logits",
                 "MNIST, 2 x 30 units: errors of 10,000 that noise on the teacher's logits saves", ABOUT, values),
    ]  # fmt: skip


def munge() -> list[Row]:
    """Few unlabelled digits, and ten times as many that were made of them."""
    raw = load_digits()
    x, y = (raw.data / 16).astype(np.float32), raw.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(x))
    train, few, test = order[:900], order[900:1050], order[1050:]
    labelled = DataSet.of({"input": x[train]}, y[train], "digits")
    held = DataSet.of({"input": x[test]}, y[test], "digits")

    def net(units: int) -> nn.Module:
        return nn.Sequential(nn.Linear(64, units), nn.ReLU(), nn.Linear(units, 10))

    wide = plain(seeded(lambda: net(256), 0), labelled, 0, 2000, batch=64)
    values = {"teacher: errors (%)": torch_error(wide, held)}
    for seed, k in itertools.product(SEEDS, (0, 10)):
        made = distilled(
            seeded(lambda: net(32), seed), wide, DataSet.of({"input": x[few]}), seed, 2000, batch=64, munge=k
        )  # fmt: skip
        values[f"seed {seed}: {'munged' if k else 'as they are'}"] = torch_error(made, held)
    return [_against("munge", "as they are", "munged", "Digits, 150 unlabelled samples: error (%) that MUNGE saves",
                     "scikit-learn's digits: 900 train the teacher, 150 the student, 747 test", values)]  # fmt: skip


def device() -> list[Row]:
    """A recipe that distils a student and ends in an int8 file for ARM, checked and timed on its way."""
    train, test = images("train"), images("test")
    calibration = replace(train.take(slice(0, 512)), labels=None)
    with tempfile.TemporaryDirectory() as folder:
        whole, small = Path(folder) / "teacher", Path(folder) / "student"
        example = DataSet.of({"input": np.zeros((2, 1, 28, 28), np.float32)})
        floats = Settings(precisions=("fp32",), benchmark=False)
        prepared = pipeline.prepare(accept_module(teacher()), {"calibration": example}, None)
        pipeline.export(prepared, [targets.load("x86")], [whole], floats, Gate())
        step = Step("distill", {
            "teacher": str(whole / "model.fp32.onnx"), "temperature": 4.0, "alpha": 0.9, "steps": 10 * 600,
            "learning_rate": 2e-3,
        })  # fmt: skip
        asked = Settings(Recipe((step,), TrainSettings(batch=BATCH)))
        student = pipeline.prepare(
            accept_module(seeded(lambda: layers(30), 0).eval()),
            {"train": train, "calibration": calibration, "eval": test}, None,
        )  # fmt: skip
        pipeline.export(student, [targets.load("mobile-arm")], [small], asked, Gate())
        manifest = load_manifest(small)
    found = {score.precision: score.metric for score in manifest.scores if score.metric is not None}
    values = {f"{precision}: top-1 (%)": metric for precision, metric in found.items()}
    for m in manifest.measurements:
        values |= {f"{m.precision}: bytes": m.bytes} | ({f"{m.precision}: ms": m.p50_ms} if m.p50_ms else {})
    values["operators off by more than a step"] = sum(o.lsb > 1 for o in manifest.operators)
    return [
        Row("MNIST, a recipe that distils from an .onnx and exports for mobile-arm: top-1 lost to integers (points)",
            found["fp32"] - found["int8"], 0.5, "lower", f"{ABOUT}; 2 x 30 units, .tflite in LiteRT",
            f"{COMMAND} device", [0], values)
    ]  # fmt: skip


def _against(part: str, control: str, what: str, claim: str, about: str, values: dict[str, float]) -> Row:
    """A method beside its control, reported as measured."""
    saved = statistics.mean(values[f"seed {s}: {control}"] - values[f"seed {s}: {what}"] for s in SEEDS)
    return Row(f"{claim} (mean of 3 seeds)", saved, None, "higher", about, f"{COMMAND} {part}", list(SEEDS), values)


if __name__ == "__main__":
    main(__doc__, "distill", [small, wide, no_threes, losses, munge, device])
