"""L0 regularisation: every channel gets a gate that training opens or shuts, and the number of open gates is paid for.

Louizos, Welling & Kingma 2018, "Learning Sparse Neural Networks through L0 Regularization". A gate is a hard concrete
variable: with u uniform on (0, 1),

    s = σ((log u - log(1 - u) + log α) / β),      z = clip(s (ζ - γ) + γ, 0, 1)          (equations 10, 11)

is 0 or 1 with a probability of its own and can be differentiated by log α. The loss gets λ times the mean probability
of being open, σ(log α - β log(-γ/ζ)) (equation 12). In the end z is clip(σ(log α)(ζ - γ) + γ, 0, 1): channels with z =
0 are taken out, the others' z goes into the weights that read them.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from deploykit.core.context import Context
from deploykit.core.errors import said_by
from deploykit.core.progress import say
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from deploykit.pruning.groups import Channel, Group

BETA, ZETA, GAMMA = 2 / 3, 1.1, -0.1
OPEN = 2.0
"""log α at the start: most gates are open."""
MOST = 1 - 1e-6
"""Of a group's channels: all but one."""
NOTHING = "no channel taken out: no gate is shut, or fewer than the target's multiple; raise penalty or steps"
NAME = "l0_gate_"


@dataclass(frozen=True)
class L0:
    """Trains gates on the channels with the weights, and takes out what is shut."""

    penalty: float = 0.1
    """λ: what all channels together cost, in units of the loss."""
    steps: int = 300
    """Optimizer steps."""
    learning_rate: float = 1e-3
    """Of the weights; gates learn a hundred times as fast."""

    stage: ClassVar[Stage] = "model"
    needs: ClassVar[tuple[Need, ...]] = ("train",)
    pays_if: ClassVar[tuple[Profit, ...]] = ("structured",)

    def __post_init__(self) -> None:
        """Refuses settings that cannot train."""
        if self.steps < 1 or not (self.learning_rate > 0 and self.penalty > 0):
            raise ValueError("penalty, steps and learning_rate must be above 0")

    def __call__(self, model: nn.Module, context: Context) -> nn.Module:
        """A narrower, trained copy of the model.

        Raises:
            DeploykitError: there are no channels that can be taken out.
        """
        from deploykit.losses import as_tensors
        from deploykit.pruning.groups import together
        from deploykit.pruning.surgery import assert_equal, taken_out, without
        from deploykit.pruning.takable import stuck, takable
        from deploykit.retraining import train

        trained = copy.deepcopy(model)
        groups = takable(trained, context, "l0")
        if why := stuck(trained, groups, context.target.channel_multiple, MOST):
            say(f"l0: {why}; it trains, and takes nothing out")  # no share was asked for that could not be met
        gates = _gates(groups)
        for g, parameter in enumerate(gates.hundredths):  # not a module of its own: a Sequential would call it
            trained.register_parameter(f"{NAME}{g}", parameter)
        hooks = _attach(trained, groups, gates)
        train(trained, context, "l0", self.steps, self.learning_rate, penalty=lambda: self.penalty * gates.open())
        for hook in hooks:
            hook.remove()
        for g in range(len(groups)):
            delattr(trained, f"{NAME}{g}")
        gates.eval()
        shut = _shut(trained, groups, gates, context.target.channel_multiple)
        _absorb(trained, groups, gates)
        removed = together(shut)
        pruned = without(trained, removed)
        with said_by("l0"):
            assert_equal(trained, pruned, removed, as_tensors(context.example))
        context.note(taken_out(repr(self), trained, pruned, NOTHING))
        return pruned


def _gates(groups: Sequence[Group]) -> Any:
    """A module with one gate per channel of every group."""
    import torch
    from torch import nn

    class Gates(nn.Module):
        """z of all groups, drawn anew by `draw` while it trains."""

        def __init__(self) -> None:
            super().__init__()
            # gates count in hundredths of log α, so that one learning rate suits them and the weights
            self.hundredths = [nn.Parameter(torch.full((len(group.channels),), OPEN / 100)) for group in groups]
            self.z: list[Tensor] = []

        def log_alpha(self) -> list[Tensor]:
            return [100 * p for p in self.hundredths]

        def draw(self) -> None:
            """z for the next forward pass."""
            self.z = []
            for a in self.log_alpha():
                if self.training:
                    u = torch.rand_like(a).clamp(1e-6, 1 - 1e-6)
                    a = (u.log() - (1 - u).log() + a) / BETA
                self.z.append((torch.sigmoid(a) * (ZETA - GAMMA) + GAMMA).clamp(0, 1))

        def open(self) -> Tensor:
            """The mean probability of being open."""
            return torch.sigmoid(torch.cat(self.log_alpha()) - BETA * math.log(-GAMMA / ZETA)).mean()

    return Gates()


def _readers(model: nn.Module, groups: Sequence[Group]) -> dict[str, list[tuple[int, Tensor, Tensor]]]:
    """By layer that reads gated channels: group, which numbers it reads, and by which gate of the group."""
    import torch

    from deploykit.layerwise.channels import mixes

    found: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
    for g, group in enumerate(groups):
        for port in group.ports:
            if port.side == "in" and mixes(model.get_submodule(port.layer)):
                pairs = [(c, i) for i, channel in enumerate(group.channels) for c in channel[port]]
                numbers, gates = torch.tensor(pairs).T
                found.setdefault(port.layer, []).append((g, numbers, gates))
    return found


def _scale(width: int, parts: Sequence[tuple[int, Tensor, Tensor]], z: Sequence[Tensor]) -> Tensor:
    """What every input channel of a layer is multiplied by ``[width]``."""
    import torch

    scale = torch.ones(width, device=z[0].device)
    for g, numbers, gates in parts:
        scale = scale.index_put((numbers.to(scale.device),), z[g][gates.to(scale.device)])
    return scale


def _attach(model: nn.Module, groups: Sequence[Group], gates: Any) -> list[Any]:
    from deploykit.layerwise.channels import axis, width
    from deploykit.layerwise.watching import entered
    from deploykit.pruning.criteria.reads import instead

    hooks = [model.register_forward_pre_hook(lambda module, _: gates.train(module.training).draw())]

    def gated(parts: Sequence[tuple[int, Tensor, Tensor]]) -> Any:
        def hook(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            x = entered(given, named)
            shape = [1] * x.ndim
            shape[axis(layer, x)] = -1
            return instead(given, named, x * _scale(width(layer, "in"), parts, gates.z).view(shape))

        return hook

    for name, parts in _readers(model, groups).items():
        hooks.append(model.get_submodule(name).register_forward_pre_hook(gated(parts), with_kwargs=True))
    return hooks


def _shut(model: nn.Module, groups: Sequence[Group], gates: Any, multiple: int) -> list[Channel]:
    """Channels whose gate is shut, as far as multiples allow; one of every group stays."""
    from deploykit.pruning.budget import ranked

    gates.draw()
    found: list[Channel] = []
    for group, z in zip(groups, gates.z, strict=True):
        (order,) = ranked(model, [group], [z.detach()], multiple, MOST)
        found += order.channels[: order.at_most(int((z == 0).sum()))]
    return found


def _absorb(model: nn.Module, groups: Sequence[Group], gates: Any) -> None:
    """Multiplies the weights that read gated channels by their gates."""
    import torch

    from deploykit.hub.structure import set_parameter
    from deploykit.layerwise.channels import weight_axis, width

    with torch.no_grad():
        for name, parts in _readers(model, groups).items():
            layer: Any = model.get_submodule(name)
            across = weight_axis(layer, "in")
            shape = [1] * layer.weight.ndim
            shape[across] = -1
            scale = _scale(width(layer, "in"), parts, gates.z)[: layer.weight.shape[across]]
            set_parameter(layer, "weight", layer.weight * scale.view(shape))
