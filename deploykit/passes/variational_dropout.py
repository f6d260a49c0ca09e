"""Sparse variational dropout: every weight learns how much noise it bears; those that bear any are not needed.

Molchanov, Ashukha & Vetrov 2017, "Variational Dropout Sparsifies Deep Neural Networks". A weight is drawn from
N(w, σ²) with α = σ²/w²; outputs are drawn instead (local reparametrization, section 4.2):

    y ~ N(x w, x² σ²)

The loss of the data (mean over its N samples) gets D_KL / N, approximated by (equation 14)

    -D_KL ≈ k1 s(k2 + k3 log α) - ½ log(1 + 1/α) - k1,     s the sigmoid

for every weight. In the end weights with log α > 3 become zeros that stay zero.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from deploykit.core.context import Context
from deploykit.core.errors import DeploykitError
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from torch import Tensor, nn

K1, K2, K3 = 0.63576, 1.87320, 1.48695
CERTAIN = -10.0
"""log σ² at the start."""
FASTER = 100.0
"""Noise learns so many times as fast as weights: it has far to go."""
NAME = "log_variance"


@dataclass(frozen=True)
class VariationalDropout:
    """Trains the noise of all weights with them, and masks those that drown in it."""

    penalty: float = 1.0
    """Of the divergence; 1 is the variational bound."""
    threshold: float = 3.0
    """log α beyond which a weight is dropped: dropout of 95 %."""
    steps: int = 300
    """Optimizer steps."""
    learning_rate: float = 1e-3

    stage: ClassVar[Stage] = "model"
    needs: ClassVar[tuple[Need, ...]] = ("train",)
    pays_if: ClassVar[tuple[Profit, ...]] = ("unstructured", "small_file")

    def __post_init__(self) -> None:
        """Refuses settings that cannot train."""
        if self.steps < 1 or not (self.learning_rate > 0 and self.penalty > 0):
            raise ValueError("penalty, steps and learning_rate must be above 0")

    def __call__(self, model: nn.Module, context: Context) -> nn.Module:
        """A trained copy of the model with masks on its weights.

        Raises:
            DeploykitError: the model has no convolution or linear layer, or calls none.
        """
        import torch
        from torch import nn

        from deploykit.hub.structure import attach_mask
        from deploykit.layerwise.watching import entered
        from deploykit.losses import as_tensors
        from deploykit.pruning.choose import kept, layers_of
        from deploykit.pruning.flow import called
        from deploykit.retraining import train

        data = context.need("train", "variational_dropout")
        trained = copy.deepcopy(model)
        every = layers_of(trained, (), "variational_dropout")
        # where forward does not run there is no noise to bear, and the price alone would decide
        layers = [every[name] for name in called(trained, every, as_tensors(next(data.batches(1)).inputs))]
        if not layers:
            raise DeploykitError("variational_dropout: the model calls none of its convolutions and linear layers")
        for layer in layers:
            layer.register_parameter(NAME, nn.Parameter(torch.full_like(layer.weight.detach(), CERTAIN / FASTER)))
        hooks = [
            layer.register_forward_hook(
                lambda m, x, named, y: noisy(m, entered(x, named), y, FASTER * getattr(m, NAME)), with_kwargs=True
            )
            for layer in layers
        ]

        def own(layer: Any) -> Tensor:
            return log_alpha(layer.weight, FASTER * getattr(layer, NAME))

        train(
            trained, context, "variational_dropout", self.steps, self.learning_rate,
            penalty=lambda: self.penalty / len(data) * sum(
                (divergence(own(layer)).sum() for layer in layers), torch.zeros(())
            ),
        )  # fmt: skip
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for layer in layers:
                lives = own(layer) <= self.threshold
                delattr(layer, NAME)
                attach_mask(layer, "weight", lives)
        told = kept(trained, repr(self))
        context.note(replace(told, summary="; ".join(filter(None, (told.title.lower(), told.summary)))))
        return trained


def log_alpha(w: Tensor, log_variance: Tensor) -> Tensor:
    """log σ² - log w²."""
    return log_variance - (w.square() + 1e-16).log()


def divergence(log_alpha: Tensor) -> Tensor:
    """D_KL of every weight, up to a constant that makes it 0 for endless noise."""
    import torch
    from torch.nn.functional import softplus

    return K1 - K1 * torch.sigmoid(K2 + K3 * log_alpha) + 0.5 * softplus(-log_alpha)


def noisy(layer: Any, x: Tensor, y: Tensor, log_variance: Tensor) -> Tensor:
    """A layer's output with the noise of its weights, while it trains."""
    import torch
    from torch.nn.functional import linear

    if not layer.training:
        return y
    if isinstance(layer, torch.nn.Linear):
        variance = linear(x.square(), log_variance.exp())
    else:
        variance = layer._conv_forward(x.square(), log_variance.exp(), None)
    return y + (variance + 1e-12).sqrt() * torch.randn_like(y)
