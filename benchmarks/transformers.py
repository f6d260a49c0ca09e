"""Transformers in int8: what the step `smooth` is worth, with channels that stick out and without.

A small vision transformer is trained here on the 8 x 8 digits of scikit-learn (a minute). Large transformers grow a few
channels of activations 20 to 100 times the others; a small one does not, so they are planted: channels of every
LayerNormalization are multiplied and the weights that read them divided, which changes no answer in float. Figures are
those of int8 files in ONNX Runtime and LiteRT, against fp32.

    python -m benchmarks.transformers
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.quantize import exported, score
from benchmarks.rows import Row, record
from deploykit.core.data import DataSet
from deploykit.core.recipe import Recipe, Step

COMMAND = "python -m benchmarks.transformers"
DATA = "vision transformer trained on scikit-learn digits; 256 training images calibrate, 540 others evaluate"
FACTORS = (1, 20, 100)
"""How far the planted channels stick out; 1: none is planted."""
OUTLIERS = 3
"""Planted channels of every LayerNormalization."""
TRAIN = 1257
WIDTH, DEPTH, HEADS, EPOCHS = 64, 3, 4, 25


class _Block(nn.Module):
    """A block normalised before its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, c))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))


class _Transformer(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2020) on 16 patches of 2 x 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.positions = nn.Conv2d(1, WIDTH, 2, stride=2), nn.Parameter(0.02 * torch.randn(1, 16, WIDTH))
        self.blocks = nn.Sequential(*(_Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def digits() -> tuple[DataSet, DataSet]:
    """Training and evaluation images ``[1, 8, 8]`` in about [-1, 1], in an order drawn once."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = (pixels[order].reshape(-1, 1, 8, 8) / 8 - 1).astype(np.float32)
    both = DataSet.of({"x": images}, labels[order].astype(np.int64), "scikit-learn digits")
    return both.take(slice(0, TRAIN)), both.take(slice(TRAIN, None))


def trained(data: DataSet) -> _Transformer:
    """Fitted to the data; the same for the same machine and versions."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # small products: threads would only wait for each other
    net = _Transformer()
    batch = next(data.batches(len(data)))
    x, y = torch.from_numpy(batch.inputs["x"]), torch.from_numpy(data.labels)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.05)
    steps = EPOCHS * (len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(x))[: len(x) // 64 * 64].split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[chosen]), y[chosen], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def planted(net: _Transformer, factor: float) -> _Transformer:
    """The same function with channels that stick out in front of every product that reads a LayerNormalization."""
    made, random = copy.deepcopy(net), np.random.default_rng(0)
    pairs = [pair for block in made.blocks for pair in ((block.norm1, block.qkv), (block.norm2, block.wide))]
    with torch.no_grad():
        for norm, reader in [*pairs, (made.norm, made.head)]:
            for channel in random.choice(WIDTH, OUTLIERS, replace=False):
                norm.weight[channel] *= factor
                norm.bias[channel] *= factor
                reader.weight[:, channel] /= factor
    return made


def rows() -> list[Row]:
    """One row per factor and figure; the worse runtime counts."""
    train, evaluation = digits()
    net = trained(train)
    made = []
    for factor in FACTORS:
        module = planted(net, factor)
        found = {}
        for name, steps in (("without", ()), ("with smooth", (Step("smooth"),))):
            made_of = exported(module, train.spread(256), evaluation, ["x86", "mobile-arm"], recipe=Recipe(steps))
            found[name] = {runtime: score(manifest) for runtime, manifest in made_of.items()}
        values = {
            f"{name}, {runtime}, {figure}": round(read, 2)
            for name, by_runtime in found.items()
            for runtime, scored in by_runtime.items()
            for figure, read in (("dB", min(scored.sqnr_db.values())), ("agreement %", float(scored.agreement or 0)))
        }
        gained = min(values[f"with smooth, {r}, dB"] - values[f"without, {r}, dB"] for r in found["without"])
        what = f"3 channels of every LayerNormalization times {factor}" if factor > 1 else "as trained"
        made.append(
            Row(f"vision transformer int8, {what}: decibels gained by smooth", round(gained, 2), 0.0, "higher", DATA,
                COMMAND, [0], values)
        )  # fmt: skip
    return made


if __name__ == "__main__":
    record("quantize", rows())
