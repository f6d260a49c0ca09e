"""A small network for 8 x 8 grey images. deploykit calls ``build``; nothing in here knows about deploykit."""

from __future__ import annotations

import torch
from torch import nn


class DigitsNet(nn.Module):
    """``[n, 1, 8, 8]`` -> logits ``[n, 10]``."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The argument's name is the input's name, here and in every file that is written."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = torch.relu(self.bn3(self.conv3(x)) + x)
        logits: torch.Tensor = self.fc(x.mean((2, 3)))
        return logits


def build() -> nn.Module:
    """The factory: no arguments, returns the module. Its weights come with ``--weights``."""
    return DigitsNet()
