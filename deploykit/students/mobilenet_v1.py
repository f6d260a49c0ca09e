"""MobileNetV1: every convolution but the first is a depthwise one and a pointwise one.

Howard et al. 2017, "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications", table 1.
"""

from __future__ import annotations

from torch import Tensor, nn

from deploykit.students.parts import NormConv, pooled, refuse_sizes, scaled, started

STEM = 32
BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip
"""Table 1, rows "Conv dw" and the "Conv" behind each: channels, stride. The last stride is printed as 2; the sizes
beside it say 1."""


class MobileNetV1(nn.Module):
    """``[n, 3, 224, 224]`` (or 32 x 32, if small) -> logits ``[n, classes]``. 4.2 million parameters at width 1."""

    def __init__(self, classes: int = 1000, width: float = 1.0, small: bool = False, inputs: int = 3) -> None:
        """Untrained.

        Args:
            classes: how many to tell apart.
            width: α of section 3.3, on the channels of all layers.
            small: for small images: the first convolution and the first block with stride 2 have stride 1.
            inputs: channels of the image.

        Raises:
            DeploykitError: sizes that no network can have.
        """
        super().__init__()
        refuse_sizes(classes, width, inputs)
        halved = 1 if small else 2
        channels = scaled(STEM, width)
        self.stem = NormConv(inputs, channels, 3, halved)
        self.blocks = nn.Sequential()
        for number, (c, stride) in enumerate(BLOCKS):
            outputs = scaled(c, width)
            self.blocks.append(separable(channels, outputs, halved if number == 1 else stride))
            channels = outputs
        self.head = nn.Linear(channels, classes)
        started(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images -> logits."""
        logits: Tensor = self.head(pooled(self.blocks(self.stem(x))))
        return logits


def separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Figure 3, right: depthwise 3 x 3, then 1 x 1, each with batch norm and ReLU."""
    return nn.Sequential(NormConv(inputs, inputs, 3, stride, groups=inputs), NormConv(inputs, outputs))
