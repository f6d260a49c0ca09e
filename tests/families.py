"""The families of networks people bring, each as small as it can be and still be one: random weights, random data.

A family is a module in eval mode with normalisation statistics of its data, and samples of its inputs. Weights and
data come from a seed of the family's own, so a family is the same whichever others were made before it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from deploykit.core.data import DataSet

SAMPLES = 128
VOCABULARY, LENGTH = 50, 12


@dataclass(frozen=True)
class Family:
    """What a family of networks is made of."""

    title: str
    """What is peculiar to it, for the reader of a table."""
    module: Callable[[], nn.Module]
    data: Callable[[np.random.Generator, int], dict[str, NDArray[Any]]]


@dataclass(frozen=True)
class Example:
    """One network of a family."""

    name: str
    module: nn.Module
    data: DataSet


def example(name: str) -> Example:
    """The network of that family and 128 samples."""
    family = FAMILIES[name]
    seed = zlib.crc32(name.encode())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = family.module()
        arrays = family.data(np.random.default_rng(seed), SAMPLES)
        _settle(module, arrays)
    return Example(name, module.eval(), DataSet.of(arrays, origin=f"random {name}"))


def _settle(module: nn.Module, arrays: dict[str, NDArray[Any]]) -> None:
    """Gives batch norms the statistics of the data, and weights of their own, as training would."""
    for layer in module.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.3, 0.3)
            layer.momentum = None  # plain average
    module.train()
    with torch.no_grad():
        for _ in range(2):
            module(**{n: torch.from_numpy(a[:16]) for n, a in arrays.items()})


def _images(random: np.random.Generator, count: int, channels: int = 3, side: int = 16) -> NDArray[np.float32]:
    """Smooth random images: neighbouring pixels are alike, as in pictures."""
    coarse = random.normal(size=(count, channels, side // 4, side // 4)).repeat(4, axis=2).repeat(4, axis=3)
    return (coarse + 0.3 * random.normal(size=coarse.shape)).astype(np.float32)


def _picture(random: np.random.Generator, count: int) -> dict[str, NDArray[Any]]:
    return {"x": _images(random, count)}


def _tokens(random: np.random.Generator, count: int) -> dict[str, NDArray[Any]]:
    return {"ids": random.integers(0, VOCABULARY, (count, LENGTH))}


def _series(random: np.random.Generator, count: int) -> dict[str, NDArray[Any]]:
    """``[n, steps, 8]``: running sums, as sensors give."""
    return {"x": (random.normal(size=(count, LENGTH, 8)).cumsum(1) / 2).astype(np.float32)}


def _norm_conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class _Residual(nn.Module):
    """ResNet (He et al. 2015): a block with a projected shortcut and one with the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _norm_conv(3, 8)
        self.first, self.second = _norm_conv(8, 16, stride=2), _norm_conv(16, 16)
        self.shortcut = _norm_conv(8, 16, 1, 2)
        self.third, self.fourth = _norm_conv(16, 16), _norm_conv(16, 16)
        self.pool, self.head = nn.MaxPool2d(3, 2, 1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.stem(x)))
        x = F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))
        x = F.relu(self.fourth(F.relu(self.third(x))) + x)
        return self.head(x.mean((2, 3)))


class _Dense(nn.Module):
    """DenseNet (Huang et al. 2016): norm and activation before each convolution, concatenation, average pools."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1, bias=False) for i in range(3))
        self.transition, self.pool = nn.Conv2d(20, 10, 1), nn.AvgPool2d(2)
        self.norm, self.head = nn.BatchNorm2d(10), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        x = F.relu(self.norm(self.pool(self.transition(x))))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class _Depthwise(nn.Module):
    """MobileNetV2 (Sandler et al. 2018): inverted residuals, ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _norm_conv(3, 8, stride=2)
        self.expand, self.depthwise, self.project = (
            _norm_conv(8, 24, 1),
            _norm_conv(24, 24, groups=24),
            _norm_conv(24, 8, 1),
        )
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        x = x + self.project(F.relu6(self.depthwise(F.relu6(self.expand(x)))))
        return self.head(x.mean((2, 3)))


class _Shuffle(nn.Module):
    """ShuffleNet V1 and V2 (Zhang et al. 2017, Ma et al. 2018): grouped convolutions, split, channel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _norm_conv(3, 16, stride=2)
        self.grouped, self.depthwise = _norm_conv(8, 8, 1, groups=2), _norm_conv(8, 8, groups=8)
        self.last, self.head = _norm_conv(16, 16, 1, groups=4), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        left, right = x.chunk(2, dim=1)
        right = F.relu(self.depthwise(F.relu(self.grouped(right))))
        x = torch.cat([left, right], 1)
        n, c, h, w = x.shape
        x = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class _SqueezeExcite(nn.Module):
    """MobileNetV3 (Howard et al. 2019): squeeze and excitation, hard-swish, hard-sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand = _norm_conv(3, 8, stride=2), _norm_conv(8, 16, 1)
        self.depthwise, self.project = _norm_conv(16, 16, 5, groups=16), _norm_conv(16, 8, 1)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        y = F.hardswish(self.depthwise(F.hardswish(self.expand(x))))
        y = y * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        x = x + self.project(y)
        return self.head(F.hardswish(self.hidden(x.mean((2, 3)))))


class _UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015): transposed convolution up, concatenated with the way down; a mask out."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = _norm_conv(3, 8), _norm_conv(8, 16)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.norm, self.join, self.mask = nn.BatchNorm2d(8), _norm_conv(16, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = F.relu(self.down(x))
        low = F.relu(self.deep(F.max_pool2d(high, 2)))
        joined = torch.cat([F.relu(self.norm(self.up(low))), high], 1)
        return self.mask(F.relu(self.join(joined)))


class _Segmentation(nn.Module):
    """DeepLab (Chen et al. 2017): dilated convolutions side by side, bilinear resizing, a softmax per pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _norm_conv(3, 8, stride=2)
        self.branches = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=d, dilation=d) for d in (1, 2, 3))
        self.join = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        y = torch.cat([F.relu(branch(y)) for branch in self.branches], 1)
        y = F.interpolate(self.join(y), size=x.shape[2:], mode="bilinear", align_corners=False)
        return y.softmax(1)


class _SSD(nn.Module):
    """SSD (Liu et al. 2015): boxes and class probabilities from feature maps of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _norm_conv(3, 16, stride=2), _norm_conv(16, 16, stride=2)
        self.boxes = nn.ModuleList(nn.Conv2d(16, 2 * 4, 3, padding=1) for _ in range(2))
        self.scores = nn.ModuleList(nn.Conv2d(16, 2 * 3, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        high = F.relu(self.first(x))
        maps = [high, F.relu(self.second(high))]
        boxes = [
            head(m).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4))
            for head, m in zip(self.boxes, maps, strict=True)
        ]
        scores = [
            head(m).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 3))
            for head, m in zip(self.scores, maps, strict=True)
        ]
        return torch.cat(boxes, 1), torch.cat(scores, 1).softmax(-1)


class _YOLO(nn.Module):
    """YOLO (Redmon et al. 2016 and what followed): SiLU, split and concat, nearest upsampling, decoded heads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _norm_conv(3, 8, stride=2), _norm_conv(8, 16, stride=2)
        self.inner, self.join = _norm_conv(8, 8), _norm_conv(24, 16, 1)
        self.lateral = _norm_conv(24, 8, 1)
        self.small, self.large = nn.Conv2d(8, 6, 1), nn.Conv2d(16, 6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        high = F.silu(self.first(x))
        deep = F.silu(self.second(high))
        one, two = deep.chunk(2, 1)
        deep = F.silu(self.join(torch.cat([one, two, F.silu(self.inner(two))], 1)))
        up = F.interpolate(deep, scale_factor=2.0, mode="nearest")
        high = F.silu(self.lateral(torch.cat([up, high], 1)))
        return self._decoded(self.small(high), 2.0), self._decoded(self.large(deep), 4.0)

    def _decoded(self, head: Tensor, stride: float) -> Tensor:
        centre, size, score = head.sigmoid().split((2, 2, 2), 1)
        return torch.cat([(centre * 2 - 0.5) * stride, (size * 2) ** 2 * stride, score], 1).flatten(2).transpose(1, 2)


class _CNN1D(nn.Module):
    """Convolutions over time, as for audio and sensors: strides, dilation, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(2, 8, 5, stride=2, padding=2, bias=False), nn.BatchNorm1d(8)
        self.second = nn.Conv1d(8, 8, 3, padding=2, dilation=2)
        self.third, self.pool = nn.Conv1d(8, 16, 3, padding=1), nn.MaxPool1d(2)
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = x + F.relu(self.second(x))
        x = self.pool(F.relu(self.third(x)))
        return self.head(x.mean(2))


class _Attention(nn.Module):
    """Multi-head self-attention with one product for query, key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(n, t, width))


class _Block(nn.Module):
    """A transformer block, normalised before (ViT) or after (BERT) its parts."""

    def __init__(self, width: int, before: bool) -> None:
        super().__init__()
        self.before = before
        self.attention = _Attention(width, 2)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.before:
            x = x + self.attention(self.norm1(x), mask)
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.mlp(x))


class _ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2020): patches, a class token, positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 17, 16))
        self.blocks = nn.Sequential(_Block(16, True), _Block(16, True))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class _BERT(nn.Module):
    """Encoder of texts (Devlin et al. 2018): token and position embeddings, blocks normalised behind their sums."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, 16), nn.Embedding(LENGTH, 16)
        self.norm = nn.LayerNorm(16)
        self.first, self.second = _Block(16, False), _Block(16, False)
        self.pool, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.tokens(ids) + self.positions(torch.arange(ids.shape[1])))
        x = self.second(self.first(x))
        return self.head(torch.tanh(self.pool(x[:, 0])))


class _Masked(nn.Module):
    """A BERT that is told which tokens count."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(VOCABULARY, 16), nn.LayerNorm(16)
        self.block, self.head = _Block(16, False), nn.Linear(16, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        away = (1.0 - mask[:, None, None, :].float()) * -1e4
        return self.head(self.block(self.norm(self.tokens(ids)), away)[:, 0])


class _GPT(nn.Module):
    """Decoder of texts (Radford et al. 2018): a causal mask, the embedding again as the last product."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, 16), nn.Parameter(torch.randn(LENGTH, 16))
        self.block, self.norm = _Block(16, True), nn.LayerNorm(16)
        self.register_buffer("mask", torch.full((LENGTH, LENGTH), -1e4).triu(1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.block(self.tokens(ids) + self.positions, self.mask))
        return x @ self.tokens.weight.T


class _LSTM(nn.Module):
    """Two layers of long short-term memory, one read in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.LSTM(8, 12, batch_first=True, bidirectional=True)
        self.last, self.head = nn.LSTM(24, 12, batch_first=True), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.both(x)
        y, _ = self.last(y)
        return self.head(y[:, -1])


class _GRU(nn.Module):
    """A gated recurrent unit between two dense layers; a label per step."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.gru, self.head = nn.Linear(8, 16), nn.GRU(16, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gru(F.relu(self.into(x)))
        return self.head(y)


class _Tabular(nn.Module):
    """A perceptron on columns of very different sizes, with a batch norm in front that no product can absorb."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.middle = nn.BatchNorm1d(6), nn.Linear(6, 32), nn.BatchNorm1d(32)
        self.second, self.head = nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.middle(self.first(self.norm(x))))
        return self.head(F.leaky_relu(self.second(x), 0.1))


class _TwoInputs(nn.Module):
    """A picture and some numbers about it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.numbers = _norm_conv(3, 8, stride=2), nn.Linear(4, 8)
        self.join, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, image: Tensor, facts: Tensor) -> Tensor:
        seen = F.relu(self.conv(image)).mean((2, 3))
        known = torch.sigmoid(self.numbers(facts))
        return self.head(F.relu(self.join(torch.cat([seen, known], 1))))


class _Outputs(nn.Module):
    """One backbone, three answers in a dict: classes, a normalised embedding, the feature map itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.deep = _norm_conv(3, 8, stride=2), _norm_conv(8, 8)
        self.classes, self.embedding = nn.Linear(8, 5), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = F.relu(self.deep(F.relu(self.conv(x))))
        pooled = features.mean((2, 3))
        return {
            "classes": self.classes(pooled),
            "embedding": F.normalize(self.embedding(pooled), dim=1),
            "features": features,
        }


class _SuperResolution(nn.Module):
    """ESPCN (Shi et al. 2016) with PReLU: pixel shuffle, added to the picture resized."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 5, padding=2), nn.Conv2d(8, 12, 3, padding=1)
        self.slope, self.shuffle = nn.PReLU(8), nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.shuffle(self.second(self.slope(self.first(x))))
        return y + F.interpolate(x, scale_factor=2.0, mode="nearest")


class _ConvNeXt(nn.Module):
    """ConvNeXt (Liu et al. 2022): 7x7 depthwise, LayerNorm and dense layers channels-last, GELU, layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm, self.wide, self.narrow = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.scale, self.last, self.head = nn.Parameter(torch.rand(8)), nn.LayerNorm(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(F.gelu(self.wide(y)))
        x = x + y.permute(0, 3, 1, 2)
        return self.head(self.last(x.mean((2, 3))))


class _Inception(nn.Module):
    """Inception (Szegedy et al. 2014): branches of convolutions and pools, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three, self.pooled = _norm_conv(3, 6, 1), _norm_conv(3, 8, 3), _norm_conv(3, 4, 1)
        self.largest, self.mean = nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1)
        self.last, self.head = _norm_conv(21, 12, 3, 2), nn.Linear(12 * 8 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        branches = [F.relu(self.one(x)), F.relu(self.three(x)), F.relu(self.pooled(self.mean(x))), self.largest(x)]
        return self.head(torch.flatten(F.relu(self.last(torch.cat(branches, 1))), 1))


class _Autoencoder(nn.Module):
    """Down to a few numbers and up again, through transposed convolutions whose padding is not even; tanh out."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = _norm_conv(3, 8, stride=2), _norm_conv(8, 8, stride=2)
        self.squeeze, self.unsqueeze = nn.Linear(8 * 16, 12), nn.Linear(12, 8 * 16)
        self.up1 = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1)
        self.up2 = nn.ConvTranspose2d(8, 3, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.down2(F.leaky_relu(self.down1(x), 0.2)), 0.2)
        y = self.unsqueeze(self.squeeze(y.flatten(1))).unflatten(1, (8, 4, 4))
        return torch.tanh(self.up2(F.elu(self.up1(y))))


class _Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al. 2021): dense layers over the patches, then over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm1, self.norm2 = nn.Conv2d(3, 12, 4, stride=4), nn.LayerNorm(12), nn.LayerNorm(12)
        self.tokens = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.channels = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.head(x.mean(1))


def _sound(random: np.random.Generator, count: int) -> dict[str, NDArray[Any]]:
    return {"x": (random.normal(size=(count, 2, 32)).cumsum(2) / 3).astype(np.float32)}


def _columns(random: np.random.Generator, count: int) -> dict[str, NDArray[Any]]:
    sizes, shifts = np.array([1, 30, 0.1, 5, 1000, 2]), np.array([0, 40, 0, -3, 2000, 10])
    return {"x": (random.normal(size=(count, 6)) * sizes + shifts).astype(np.float32)}


def _masked_tokens(random: np.random.Generator, count: int) -> dict[str, NDArray[Any]]:
    lengths = random.integers(4, LENGTH + 1, count)
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int64)
    return _tokens(random, count) | {"mask": mask}


def _picture_and_facts(random: np.random.Generator, count: int) -> dict[str, NDArray[Any]]:
    return {"image": _images(random, count), "facts": random.normal(size=(count, 4)).astype(np.float32)}


FAMILIES: dict[str, Family] = {
    "residual": Family("residual blocks, max pool", _Residual, _picture),
    "dense": Family("concatenation, norm before convolution, average pool", _Dense, _picture),
    "depthwise": Family("inverted residuals, ReLU6", _Depthwise, _picture),
    "shuffle": Family("grouped convolutions, split, channel shuffle", _Shuffle, _picture),
    "squeeze_excite": Family("squeeze and excitation, hard-swish", _SqueezeExcite, _picture),
    "inception": Family("branches of convolutions and pools", _Inception, _picture),
    "unet": Family("transposed convolution, concatenation, a mask out", _UNet, _picture),
    "autoencoder": Family("transposed convolutions with uneven padding, ELU, tanh", _Autoencoder, _picture),
    "segmentation": Family("dilated convolutions, bilinear resizing, softmax per pixel", _Segmentation, _picture),
    "super_resolution": Family("PReLU, pixel shuffle", _SuperResolution, _picture),
    "ssd": Family("boxes and scores from two feature maps", _SSD, _picture),
    "yolo": Family("SiLU, nearest upsampling, decoded heads", _YOLO, _picture),
    "convnext": Family("LayerNorm channels-last, GELU, layer scale", _ConvNeXt, _picture),
    "mixer": Family("dense layers over patches and over channels", _Mixer, _picture),
    "vit": Family("patches, class token, attention", _ViT, _picture),
    "bert": Family("embeddings of int64 tokens, attention", _BERT, _tokens),
    "bert_masked": Family("tokens and a mask as inputs", _Masked, _masked_tokens),
    "gpt": Family("causal mask, logits per token", _GPT, _tokens),
    "cnn_1d": Family("convolutions over time", _CNN1D, _sound),
    "lstm": Family("LSTM, one layer in both directions", _LSTM, _series),
    "gru": Family("GRU, a label per step", _GRU, _series),
    "tabular": Family("perceptron on columns, batch norm alone", _Tabular, _columns),
    "two_inputs": Family("a picture and numbers", _TwoInputs, _picture_and_facts),
    "outputs": Family("three outputs in a dict, L2 norm", _Outputs, _picture),
}
