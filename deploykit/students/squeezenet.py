"""SqueezeNet 1.1: a few 1 x 1 filters in front of many, and no dense layer.

Iandola et al. 2016, "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size", table 1 and
figure 1; the numbers are those of the authors' version 1.1, which computes 2.4 times less. It has no batch norm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deploykit.students.parts import pooled, refuse_sizes, scaled, started

STEM = 64
FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
"""fire2 to fire9: filters that squeeze, and as many 1 x 1 as 3 x 3 filters that expand."""
POOLS = (0, 2, 4)
"""In front of which of them a max pool halves the map."""
DROPOUT = 0.5
"""Behind fire9 (section 3.3)."""
SMALL = 0.01
"""Standard deviation of the last convolution's first weights, as in the authors' files."""


class Fire(nn.Module):
    """Figure 1: squeeze to a few channels, expand by 1 x 1 and by 3 x 3 side by side."""

    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        """Makes twice ``expanded`` channels."""
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.left, self.right = nn.Conv2d(squeezed, expanded, 1), nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, inputs, h, w]`` -> ``[n, 2 * expanded, h, w]``."""
        x = torch.relu(self.squeeze(x))
        return torch.relu(torch.cat([self.left(x), self.right(x)], 1))


class SqueezeNet(nn.Module):
    """``[n, 3, 224, 224]`` (or 32 x 32, if small) -> logits ``[n, classes]``. 1.24 million parameters at width 1.

    The authors' files have a ReLU behind the last convolution as well. It is left out: logits of a teacher may be
    negative.
    """

    def __init__(self, classes: int = 1000, width: float = 1.0, small: bool = False, inputs: int = 3) -> None:
        """Untrained.

        Args:
            classes: how many to tell apart.
            width: on the channels of all layers.
            small: for small images: the first convolution has stride 1, and the first max pool is left out.
            inputs: channels of the image.

        Raises:
            DeploykitError: sizes that no network can have.
        """
        super().__init__()
        refuse_sizes(classes, width, inputs)
        channels = scaled(STEM, width)
        self.stem = nn.Conv2d(inputs, channels, 3, 1 if small else 2)
        self.body = nn.Sequential()
        for number, (s, e) in enumerate(FIRES):
            if number in POOLS and not (small and number == POOLS[0]):
                self.body.append(nn.MaxPool2d(3, 2))
            self.body.append(Fire(channels, scaled(s, width), scaled(e, width)))
            channels = 2 * scaled(e, width)
        self.dropout = nn.Dropout(DROPOUT)
        self.head = nn.Conv2d(channels, classes, 1)
        started(self)
        nn.init.normal_(self.head.weight, std=SMALL)  # no batch norm keeps the first answers apart from the extremes

    def forward(self, x: Tensor) -> Tensor:
        """Images -> logits."""
        x = self.body(torch.relu(self.stem(x)))
        return pooled(self.head(self.dropout(x)))
