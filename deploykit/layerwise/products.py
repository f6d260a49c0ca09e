"""Layers as products of matrices: convolutions and linear layers of a module, and what they multiply.

A layer with weight W ``[g, o, k]`` (groups, outputs and inputs of one group) computes ``y = W x`` for every position of
every sample; ``x`` are the k numbers that one output looks at.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

TOLERANCE = 1e-3
"""Of the largest output, by which two ways of multiplying may differ."""


def is_product(module: nn.Module) -> bool:
    """Whether a module is a convolution or a linear layer. Transposed convolutions are not among them."""
    return isinstance(module, (nn.Linear, _ConvNd)) and not isinstance(module, _ConvTransposeNd)


def products(model: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and linear layers by path."""
    return {name: module for name, module in model.named_modules() if is_product(module)}


def matrix(layer: Any, weight: Tensor) -> Tensor:
    """A weight (or anything of its shape) as ``[g, o, k]``."""
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def inputs(layer: Any, x: Tensor) -> Tensor:
    """What a layer multiplies, ``[g, n, k]``: n positions of all samples in the order of `outputs`.

    Args:
        layer: convolution (of any dimension) or linear layer.
        x: its input ``[batch, channels, ...]``; of a linear layer ``[..., features]``.
    """
    if not isinstance(layer, _ConvNd):
        return x.reshape(1, -1, x.shape[-1])
    sizes = list(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True))
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, padding(layer), mode=mode)
    for i, (size, stride, dilation) in enumerate(sizes):
        x = x.unfold(2 + i, dilation * (size - 1) + 1, stride)[..., ::dilation]
    rank = len(sizes)
    x = x.reshape(len(x), layer.groups, x.shape[1] // layer.groups, *x.shape[2:])
    order = (1, 0, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank))
    return x.permute(order).reshape(layer.groups, -1, layer.weight[0].numel())


def padding(conv: Any) -> list[int]:
    """As `torch.nn.functional.pad` wants it: pairs, the last dimension first."""
    pairs = []
    for i in reversed(range(len(conv.kernel_size))):
        if conv.padding == "same":
            total = conv.dilation[i] * (conv.kernel_size[i] - 1)
            pairs += [total // 2, total - total // 2]
        else:
            pairs += [0, 0] if conv.padding == "valid" else [conv.padding[i]] * 2
    return pairs


def outputs(layer: Any, y: Tensor) -> Tensor:
    """What a layer gives, ``[g, n, o]``, from its output ``[batch, channels, ...]`` or ``[..., features]``."""
    if not isinstance(layer, _ConvNd):
        return y.reshape(1, -1, y.shape[-1])
    grouped = y.reshape(y.shape[0], layer.groups, y.shape[1] // layer.groups, -1)
    return grouped.permute(1, 0, 3, 2).reshape(layer.groups, -1, y.shape[1] // layer.groups)


def multiplies(layer: Any, x: Tensor, y: Tensor) -> bool:
    """Whether a layer did nothing but multiply x with its weight to get y: a class may pad, or scale weights."""
    given, expected = inputs(layer, x), outputs(layer, y)
    if given.shape[1] != expected.shape[1]:
        return False
    w = matrix(layer, layer.weight)
    found = given @ w.transpose(1, 2)
    if layer.bias is not None:
        found = found + layer.bias.reshape(len(w), 1, -1)
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def sharing(model: nn.Module) -> set[str]:
    """The products that share parameters with other modules: what is good for one would change the other."""
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    return {name for name, layer in products(model).items() if any(owners[id(p)] > 1 for p in layer.parameters())}
