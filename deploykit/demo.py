"""The built-in example: a small CNN trained on scikit-learn's digits, exported for a target of every family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from deploykit import asked
from deploykit.core.data import DataSet
from deploykit.core.errors import MissingExtra
from deploykit.core.manifest import Manifest, load_manifest
from deploykit.core.progress import say
from deploykit.core.recipe import TrainSettings
from deploykit.core.request import Request, Settings
from deploykit.core.seeds import seeded
from deploykit.losses import cross_entropy
from deploykit.training.trainer import Trainer
from deploykit.trial import runnable

TARGETS = ("x86", "x86-openvino", "mobile-arm", "jetson", "cortex-m4", "fpga-int8")
CALIBRATION = 200


class Block(nn.Module):
    """Depthwise and pointwise convolution with a residual connection: what mobile networks are made of."""

    def __init__(self, channels: int) -> None:
        """Keeps the number of channels."""
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, c, h, w]`` -> the same."""
        y = torch.relu(self.bn1(self.depthwise(x)))
        return torch.relu(x + self.bn2(self.pointwise(y)))


class DigitsNet(nn.Module):
    """A CNN for 8 x 8 grey images, 10 classes."""

    def __init__(self, channels: int = 64) -> None:
        """``channels`` of the first stage; the second has twice as many."""
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(), Block(channels)
        )  # fmt: skip
        self.body = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(2 * channels),
            nn.ReLU(), Block(2 * channels), Block(2 * channels),
        )  # fmt: skip
        self.head = nn.Linear(2 * channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, 1, 8, 8]`` -> logits ``[n, 10]``."""
        logits: torch.Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return logits


def digits() -> tuple[DataSet, DataSet]:
    """scikit-learn's digits as (train, test), pixels scaled to 0..1, every fifth image in the test set.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtra("the demo's data", "demo") from None
    raw = load_digits()
    x = (raw.images[:, None] / 16.0).astype(np.float32)
    y = raw.target.astype(np.int64)
    test = np.arange(len(x)) % 5 == 0
    return (
        DataSet.of({"x": x[~test]}, y[~test], "scikit-learn digits, train"),
        DataSet.of({"x": x[test]}, y[test], "scikit-learn digits, test"),
    )


def train(data: DataSet, seed: int = 0, epochs: float = 3) -> DigitsNet:
    """A trained network in eval mode, the same for the same seed."""
    with seeded(seed):
        net = DigitsNet()
    settings = TrainSettings(epochs=epochs, learning_rate=3e-3, batch=64, weight_decay=1e-4)
    net.train()
    Trainer(settings, seed).fit(net, data, cross_entropy)
    return net.eval()


def build() -> DigitsNet:
    """The demo's MODEL, ``deploykit.demo:build``: trains, the same way every time."""
    training, _ = digits()
    say(f"training a small CNN on {len(training)} digits")
    return train(training)


def calibration() -> DataSet:
    """The demo's ``--calib``."""
    return digits()[0].spread(CALIBRATION)


def test() -> DataSet:
    """The demo's ``--eval``."""
    return digits()[1]


def run(out: Path, overwrite: bool = False, device: str | None = None) -> list[tuple[Path, Manifest]]:
    """Trains, exports for `TARGETS`, writes reports; returns each artifact's folder and manifest.

    With a device, only for those of them whose files it can run; they are timed and scored there.

    Raises:
        DeploykitError: a folder is there already; the device cannot be reached, or can run none of them.
    """
    names = TARGETS if device is None else runnable(device, TARGETS)
    folders = [out / name for name in names]
    here = "deploykit.demo"
    request = Request(
        f"{here}:build", "", data={"calibration": f"{here}:calibration", "eval": f"{here}:test"},
        settings=Settings(overwrite=overwrite),
    )  # fmt: skip
    asked.export([replace(request, target=name) for name in names], folders, device)
    finished = [(folder, load_manifest(folder)) for folder in folders]
    for folder in folders:
        _report(folder)
    if len(folders) > 1:
        _report(*folders, out=out / "report.html")
    return finished


def _report(*folders: Path, out: Path | None = None) -> None:
    from deploykit.report import write_report

    try:
        say(f"report: {write_report(*folders, out=out)}")
    except MissingExtra as error:
        say(f"no report for {', '.join(map(str, folders))}: {error}")
