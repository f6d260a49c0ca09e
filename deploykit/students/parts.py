"""What the students are built of."""

from __future__ import annotations

from torch import Tensor, nn

from deploykit.core.errors import DeploykitError

MULTIPLE = 8
"""Channels are a multiple of this, as Sandler et al. 2018 have them: kernels are fastest so."""


def scaled(channels: int, width: float, multiple: int = MULTIPLE) -> int:
    """A number of channels times the width multiplier: the nearest multiple, and never less than nine tenths of it.

    >>> scaled(32, 0.35), scaled(24, 0.5), scaled(64, 0.75)
    (16, 16, 48)
    """
    wanted = channels * width
    found = max(multiple, int(wanted + multiple / 2) // multiple * multiple)
    return found if found >= 0.9 * wanted else found + multiple


def refuse_sizes(classes: int, width: float, inputs: int) -> None:
    """Raises a DeploykitError for sizes that no network can have."""
    if classes < 2 or inputs < 1 or not width > 0:
        raise DeploykitError(
            f"a student has 2 classes or more, a width above 0 and 1 input channel or more; given classes = {classes}, "
            f"width = {width:g}, inputs = {inputs}"
        )


class NormConv(nn.Sequential):
    """Convolution, batch norm and, unless it is linear, an activation: ``[n, inputs, h, w]`` -> ``[n, outputs, ...]``.

    The image keeps its size but for the stride.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1,
        activation: type[nn.Module] | None = nn.ReLU,
    ) -> None:  # fmt: skip
        """Without a bias: batch norm has one."""
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), *([] if activation is None else [activation()]))


def started(network: nn.Module) -> None:
    """Gives convolutions the first weights of He et al. 2015, with which signals keep their size under ReLU."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def pooled(x: Tensor) -> Tensor:
    """The mean of every channel, ``[n, c, h, w]`` -> ``[n, c]``."""
    return x.mean((2, 3))
