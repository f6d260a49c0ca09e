"""A network, its data and a target to explain artifacts of."""

from __future__ import annotations

import re
from pathlib import Path

from commands import Said, enter

from deploykit.explain.explanation import Measured, Part, Quality

NET = """
import numpy as np
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x) + x)
        return self.head(x.mean((2, 3)))


def build():
    torch.manual_seed(0)
    return Net()


def uneven():
    \"\"\"A dead output channel of the first layer has weights a hundred times as large as the others.\"\"\"
    net = build()
    with torch.no_grad():
        net.first.weight[0] *= 100
        net.first.bias[0] = -1000
    return net


def samples(count=40):
    return np.random.default_rng(0).normal(size=(count, 3, 8, 8)).astype(np.float32)


def calib():
    return samples()


def one_spike():
    x = samples(400)
    x[7, 0, 3, 3] = 200
    return x


def test():
    return samples(64), np.arange(64) % 10
"""
TENSOR = """
extends = "x86"
title = "one scale per weight tensor"
[quant]
weight_granularity = "tensor"
"""


def lay_desk(folder: Path) -> Path:
    """Fills a folder with the module `explained` and a target of one scale per tensor."""
    (folder / "explained.py").write_text(NET)
    (folder / "tensor.toml").write_text(TENSOR)
    return folder


def exported(here: Path, name: str, arguments: str) -> Path:
    folder = here / name
    if not folder.exists():
        said = enter(f"export explained.py:{arguments} --no-benchmark -o {name}")
        assert said.code == 0, said.err
    return folder


def plain(here: Path) -> Path:
    return exported(here, "plain", "build --calib explained.py:calib --eval explained.py:test --target x86")


def refused(command: str, expected: str) -> Said:
    said = enter(command)
    assert said.code == 2, said.out + said.err
    assert re.search(expected, said.err), said.err
    assert "Traceback" not in said.err
    return said


def told(*decibels: float) -> Measured:
    parts = tuple(Part(8 << i, Quality(d, None, None)) for i, d in enumerate(decibels))
    return Measured("data", 8, parts[-1].quality, 30.0, 0.0, (), parts, 1.0)
