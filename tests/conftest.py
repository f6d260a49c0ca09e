"""What most tests need: small networks with something to get wrong in them, fixed seeds, one thread."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn


class TinyCNN(nn.Module):
    """``[n, 3, 16, 16]`` -> logits ``[n, 10]``: convolutions with batch norm, a residual add, a mean, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.norm2(self.conv(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class TinyMLP(nn.Module):
    """``[n, 4]`` -> logits ``[n, 3]``."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(torch.relu(self.hidden(x)))
        return logits


@pytest.fixture(autouse=True)
def _same_every_time() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def tiny_cnn() -> TinyCNN:
    """In eval mode, with batch statistics that are not the initial ones."""
    net = TinyCNN()
    for norm in (net.norm, net.norm2):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    return net.eval()


@pytest.fixture
def tiny_mlp() -> TinyMLP:
    """In eval mode."""
    return TinyMLP().eval()


@pytest.fixture(scope="session")
def measuring_data() -> Path:
    """The folder with trained weights and real data; tests that use it are marked `data`."""
    folder = Path(os.environ.get("DEPLOYKIT_DATA", Path(__file__).parents[1] / ".." / "shared" / "data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no measuring data in {folder}; set DEPLOYKIT_DATA")
    return folder


@pytest.fixture
def here(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory: the `desk` that a module lays once. What a refused command wrote all the same is swept."""
    monkeypatch.chdir(desk)
    yield desk
    for written in ("out", "full"):
        shutil.rmtree(desk / written, ignore_errors=True)
