"""MobileNetV2: wide inside a block, narrow between blocks, where nothing is bent.

Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", tables 1 and 2.
"""

from __future__ import annotations

from torch import Tensor, nn

from deploykit.students.parts import NormConv, pooled, refuse_sizes, scaled, started

STEM, LAST = 32, 1280
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Table 2: t (how much wider inside), c (channels), n (blocks), s (stride of the first of them)."""


class Bottleneck(nn.Module):
    """Table 1: 1 x 1 to t times the channels, depthwise 3 x 3, linear 1 x 1; with a residual where sizes are equal."""

    def __init__(self, inputs: int, outputs: int, stride: int, t: int) -> None:
        """With t = 1 there is nothing to widen."""
        super().__init__()
        inner = t * inputs
        widened = [] if t == 1 else [NormConv(inputs, inner, activation=nn.ReLU6)]
        self.body = nn.Sequential(
            *widened,
            NormConv(inner, inner, 3, stride, groups=inner, activation=nn.ReLU6),
            NormConv(inner, outputs, activation=None),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """``[n, inputs, h, w]`` -> ``[n, outputs, h / stride, w / stride]``."""
        y: Tensor = self.body(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """``[n, 3, 224, 224]`` (or 32 x 32, if small) -> logits ``[n, classes]``. 3.5 million parameters at width 1."""

    def __init__(self, classes: int = 1000, width: float = 1.0, small: bool = False, inputs: int = 3) -> None:
        """Untrained.

        Args:
            classes: how many to tell apart.
            width: on the channels of all layers; below 1 the last convolution keeps its own (section 6.1).
            small: for small images: the first convolution and the first stage with stride 2 have stride 1.
            inputs: channels of the image.

        Raises:
            DeploykitError: sizes that no network can have.
        """
        super().__init__()
        refuse_sizes(classes, width, inputs)
        halved = 1 if small else 2
        channels, last = scaled(STEM, width), scaled(LAST, max(1.0, width))
        self.stem = NormConv(inputs, channels, 3, halved, activation=nn.ReLU6)
        self.stages = nn.Sequential()
        for number, (t, c, n, s) in enumerate(STAGES):
            outputs = scaled(c, width)
            strides = [halved if number == 1 else s, *[1] * (n - 1)]
            widths = [channels, *[outputs] * (n - 1)]
            self.stages.append(
                nn.Sequential(*(Bottleneck(i, outputs, stride, t) for i, stride in zip(widths, strides, strict=True)))
            )
            channels = outputs
        self.last = NormConv(channels, last, activation=nn.ReLU6)
        self.head = nn.Linear(last, classes)
        started(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images -> logits."""
        logits: Tensor = self.head(pooled(self.last(self.stages(self.stem(x)))))
        return logits
