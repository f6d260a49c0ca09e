"""Networks the benchmarks bring themselves; those with trained weights come from the measuring data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class EncoderBlock(nn.Module):
    """Attention and a wide layer, normalised behind their sums (Devlin et al. 2018)."""

    def __init__(self, width: int, heads: int) -> None:
        """Random weights."""
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, tokens, width]`` -> the same."""
        q, k, v = (self.parted(made(x)) for made in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = self.norm1(x + self.out(y))
        made: Tensor = self.norm2(x + self.narrow(F.gelu(self.wide(x))))
        return made

    def parted(self, x: Tensor) -> Tensor:
        """``[n, tokens, width]`` -> ``[n, heads, tokens, width / heads]``."""
        n, tokens, width = x.shape
        return x.reshape(n, tokens, self.heads, width // self.heads).transpose(1, 2)


class Encoder(nn.Module):
    """An encoder of texts with the shapes of BERT-mini: 4 blocks of 256 and 4 heads."""

    def __init__(self, vocabulary: int = 2000, tokens: int = 64, width: int = 256, blocks: int = 4) -> None:
        """Random weights."""
        super().__init__()
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(tokens, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(EncoderBlock(width, width // 64) for _ in range(blocks)))
        self.pool, self.head = nn.Linear(width, width), nn.Linear(width, 10)

    def forward(self, ids: Tensor) -> Tensor:
        """``[n, tokens]``, int64 -> logits ``[n, 10]``."""
        x = self.norm(self.words(ids) + self.positions(torch.arange(ids.shape[1])))
        logits: Tensor = self.head(torch.tanh(self.pool(self.blocks(x)[:, 0])))
        return logits
