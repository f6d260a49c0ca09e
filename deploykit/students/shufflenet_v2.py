"""ShuffleNetV2: half of the channels pass by, the other half is worked on, then both are shuffled.

Ma et al. 2018, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", table 5 and figure 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deploykit.students.parts import NormConv, pooled, refuse_sizes, scaled, started

STEM = 24
BLOCKS = (4, 8, 4)
"""Of stages 2, 3 and 4: table 5, column "Repeat"."""
CHANNELS = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}
"""Table 5: by width, of stages 2 to 4 and of the last convolution. Not in proportion, and the first convolution has 24
at every width."""


class Block(nn.Module):
    """Figure 3 (c): a half passes by, the other goes through 1 x 1, depthwise 3 x 3, 1 x 1."""

    def __init__(self, channels: int) -> None:
        """As wide as it is."""
        super().__init__()
        self.right = branch(channels // 2, channels // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, c, h, w]`` -> the same."""
        left, right = x.chunk(2, dim=1)
        return shuffled(torch.cat([left, self.right(right)], 1))


class Down(nn.Module):
    """Figure 3 (d): all channels go through both branches, which halve the image."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Each branch makes half of the outputs."""
        super().__init__()
        self.left = nn.Sequential(
            NormConv(inputs, inputs, 3, 2, groups=inputs, activation=None), NormConv(inputs, outputs // 2)
        )
        self.right = branch(inputs, outputs // 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, inputs, h, w]`` -> ``[n, outputs, h/2, w/2]``."""
        return shuffled(torch.cat([self.left(x), self.right(x)], 1))


class ShuffleNetV2(nn.Module):
    """``[n, 3, 224, 224]`` (or 32 x 32, if small) -> logits ``[n, classes]``. 2.3 million parameters at width 1."""

    def __init__(self, classes: int = 1000, width: float = 1.0, small: bool = False, inputs: int = 3) -> None:
        """Untrained.

        Args:
            classes: how many to tell apart.
            width: 0.5, 1, 1.5 and 2 are those of table 5; others are in proportion to 1, multiples of 4, and below it
                the last convolution keeps its channels.
            small: for small images: the first convolution has stride 1, and the max pool is left out.
            inputs: channels of the image.

        Raises:
            DeploykitError: sizes that no network can have.
        """
        super().__init__()
        refuse_sizes(classes, width, inputs)
        *stages, last = CHANNELS.get(width) or proportional(width)
        self.stem = NormConv(inputs, STEM, 3, 1 if small else 2)
        self.pool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.stages = nn.Sequential()
        channels = STEM
        for outputs, blocks in zip(stages, BLOCKS, strict=True):
            same = (Block(outputs) for _ in range(blocks - 1))
            self.stages.append(nn.Sequential(Down(channels, outputs), *same))
            channels = outputs
        self.last = NormConv(channels, last)
        self.head = nn.Linear(last, classes)
        started(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images -> logits."""
        logits: Tensor = self.head(pooled(self.last(self.stages(self.pool(self.stem(x))))))
        return logits


def proportional(width: float) -> tuple[int, ...]:
    """Channels at a width that table 5 does not have; halves of them are even."""
    *stages, last = CHANNELS[1.0]
    return *(scaled(c, width, 4) for c in stages), scaled(last, max(1.0, width))


def branch(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """1 x 1, depthwise 3 x 3 without an activation, 1 x 1."""
    return nn.Sequential(
        NormConv(inputs, outputs),
        NormConv(outputs, outputs, 3, stride, groups=outputs, activation=None),
        NormConv(outputs, outputs),
    )


def shuffled(x: Tensor) -> Tensor:
    """Channels of the two halves in turns, ``[n, c, h, w]`` -> the same (Zhang et al. 2017, figure 1)."""
    n, c, h, w = x.shape
    return x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
