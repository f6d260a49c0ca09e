"""Quantize and dequantize as one differentiable operation, for numbers whose scale is learned with them.

Esser et al. 2020, "Learned Step Size Quantization": with step size s, integers from -Q_N to Q_P, v̄ the rounded value,

    v̄ = ⌊clip(v/s, -Q_N, Q_P)⌉,     v̂ = v̄ s

gradients pass rounding straight through (Bengio et al. 2013) and stop where v was cut; so for the step (equation 3)

    ∂v̂/∂s = -v/s + ⌊v/s⌉   if -Q_N < v/s < Q_P,   else -Q_N or Q_P

times g = 1/√(N Q_P), N being how many numbers share the step (section 2.2). A zero point z moves the integers that are
stored, and so the ends: -Q_N = lowest - z, Q_P = highest - z.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def nearest(x: Tensor) -> Tensor:
    """Nearest integer, halves to even."""
    return x.round()


def gradient_scale(count: int, low: float, high: float) -> float:
    """g: with it a step moves relative to its size about as fast as the weights do relative to theirs."""
    return 1 / math.sqrt(count * max(high, -low))


class _FakeQuantize(torch.autograd.Function):
    """What autograd would do with the lines above, in fewer passes over memory."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, s: Tensor, low: float, high: float, g: float) -> Tensor:
        steps = v / s
        cut = steps.clamp(low, high)
        inside = cut == steps
        cut = nearest(cut)
        ctx.g = g if s.requires_grad else 0.0
        ctx.save_for_backward(inside, cut - steps.mul_(inside) if s.requires_grad else s, s)
        return cut.mul_(s)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        inside, by_step, s = ctx.saved_tensors
        of_step = (gradient * by_step).sum_to_size(s.shape).mul_(ctx.g) if ctx.g else None
        return gradient * inside, of_step, None, None, None


def fake_quantize(v: Tensor, s: Tensor, low: float, high: float, count: int) -> Tensor:
    """v̂: the nearest multiples of the step that can be stored.

    Args:
        v: real numbers.
        s: steps, of a shape that broadcasts to ``v``'s.
        low: fewest steps, -Q_N.
        high: most steps, Q_P.
        count: N, how many of the numbers (of one sample) share a step.
    """
    found: Tensor = _FakeQuantize.apply(v, s, low, high, gradient_scale(count, low, high))  # type: ignore[no-untyped-call]
    return found
