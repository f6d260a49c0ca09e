"""Networks the benchmarks bring themselves; those with trained weights come from the measuring data."""

from __future__ import annotations

import torch
from torch import nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, figure 5 left)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """A 1x1 convolution takes the shortcut where the shape changes."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, inputs, h, w]`` -> ``[n, outputs, h/stride, w/stride]``."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for 224 x 224 images (He et al. 2015, table 1)."""

    def __init__(self, classes: int = 1000) -> None:
        """Random weights."""
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        widths = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
        self.stages = nn.Sequential(*[b for i, o, s in widths for b in (BasicBlock(i, o, s), BasicBlock(o, o, 1))])
        self.fc = nn.Linear(512, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, 3, 224, 224]`` -> logits ``[n, classes]``."""
        logits: torch.Tensor = self.fc(self.stages(self.stem(x)).mean((2, 3)))
        return logits


def resnet18() -> nn.Module:
    """Seeded random weights, normalisation statistics from random images; in eval mode."""
    torch.manual_seed(0)
    net = ResNet18()
    net.train()
    with torch.no_grad():
        for _ in range(4):
            net(torch.randn(8, 3, 224, 224))
    return net.eval()
