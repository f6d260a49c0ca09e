"""Depthwise-separable rewriting: convolutions become a depthwise one and a 1 x 1, as MobileNet is made of.

Howard et al. 2017, "MobileNets", section 3.1: ``c taps + c f`` weights and multiply-accumulates per position in the
place of ``c f taps``. For a start the two are the nearest to the layer that there is. Every input channel c has a
matrix of its own, W[:, c] ``[f, taps]``, and of it the first singular pair is kept (Eckart & Young 1936):

    W[f, c, t]  ≈  Σ_m  P[f, (c, m)] D[(c, m), t]

with m up to ``multiplier``, 1 in the paper. That is the form ``channel`` of `deploykit.low_rank.channel` with a slice
for every input channel, so folders, later steps and exporters know the result.

Nothing is between the two: MobileNetV1 has batch norm and ReLU there, which would bend what the start approximates.
Without an activation such layers learn faster and better (Chollet 2017, "Xception", section 4.7, figure 10). What came
behind the convolution (its batch norm, its ReLU) comes behind the 1 x 1.

It is a start for training: answers are worth little until `distill` or `finetune` has run. Convolutions that would not
become smaller stay, and so does the one that runs first, as in MobileNetV1: few channels of an image share few kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from deploykit.core.context import Context
from deploykit.core.errors import DeploykitError, said_by, some
from deploykit.core.manifest import Finding
from deploykit.core.patterns import matching
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from torch import nn

    from deploykit.low_rank.factored import Ranks


@dataclass(frozen=True)
class Compact:
    """Makes convolutions depthwise-separable."""

    layers: tuple[str, ...] = ()
    """Convolutions to rewrite: names or patterns; none: all but the one that runs first."""
    skip: tuple[str, ...] = ()
    """Convolutions that stay whole: names or patterns."""
    multiplier: int = 1
    """Depthwise kernels per input channel: more of them start nearer to the layer, and save less."""

    stage: ClassVar[Stage] = "model"
    needs: ClassVar[tuple[Need, ...]] = ()
    pays_if: ClassVar[tuple[Profit, ...]] = ("structured",)

    def __post_init__(self) -> None:
        """Refuses a multiplier that leaves no kernels."""
        if self.multiplier < 1:
            raise ValueError(f"multiplier must be at least 1, given {self.multiplier}")

    def __call__(self, model: nn.Module, context: Context) -> nn.Module:
        """A copy of the model with depthwise-separable convolutions.

        Raises:
            DeploykitError: unknown layers, one named that cannot be rewritten, none that can, weights that are not
                finite, or a model that does not run with them.
        """
        from deploykit.losses import as_tensors
        from deploykit.low_rank.eligible import look, obstacles
        from deploykit.low_rank.surgery import assert_runs, replaced

        if not context.example:
            raise DeploykitError("compact: the context has no example to run the model with")
        inputs = as_tensors(context.example)
        seen = look(model, inputs)
        with said_by("compact"):
            whys = self._whys(model, list(seen), obstacles(model, seen, "channel"))
            made = replaced(model, "channel", self._chosen(model, whys))
            assert_runs(made, inputs)
        context.note(self._finding(model, made, whys, context))
        return made

    def _whys(self, model: nn.Module, running: list[str], obstacles: Mapping[str, str]) -> dict[str, str]:
        """By convolution with a kernel, why it stays whole; empty: it is rewritten.

        Args:
            model: not changed.
            running: layers in the order in which they run first.
            obstacles: by layer, why it cannot have the form; empty: it can.

        Raises:
            DeploykitError: a pattern that matches no layer, or a layer that is named and cannot be rewritten.
        """
        whys = {
            name: why or self._unprofitable(model.get_submodule(name))
            for name, why in obstacles.items()
            if _has_kernel(model.get_submodule(name))
        }
        for name in self.layers:
            if whys.get(name):
                raise DeploykitError(f"layer '{name}' cannot be rewritten: {whys[name]}")
        if self.layers:
            left_out = dict.fromkeys(set(whys) - matching("convolution", self.layers, whys), "it is not among layers")
        else:
            left_out = {name: "it runs first" for name in running if name in whys}
            left_out = dict(list(left_out.items())[:1])
        left_out |= dict.fromkeys(matching("convolution", self.skip, whys), "it is left out")
        return {name: why or left_out.get(name, "") for name, why in whys.items()}

    def _unprofitable(self, layer: nn.Module) -> str:
        """Why a convolution cannot be separated, or would not become smaller."""
        from deploykit.low_rank import channel
        from deploykit.low_rank.factored import shape_of

        shape = shape_of(layer)
        if shape.g > 1:
            return "it has groups"
        most = channel.largest(shape, shape.c)
        if self.multiplier > most or sum(channel.weights(shape, (shape.c, self.multiplier))) >= shape.weights:
            return "it would not become smaller"
        return ""

    def _chosen(self, model: nn.Module, whys: Mapping[str, str]) -> dict[str, Ranks]:
        """Slices and ranks of the convolutions that are rewritten.

        Raises:
            DeploykitError: there is none.
        """
        from deploykit.low_rank.factored import shape_of

        found: dict[str, Ranks] = {
            name: (shape_of(model.get_submodule(name)).c, self.multiplier) for name, why in whys.items() if not why
        }
        if not found:
            reasons = some([f"'{name}': {why}" for name, why in whys.items()], 4) or "it has none with a kernel"
            raise DeploykitError(f"no convolution of this model can become smaller ({reasons})")
        return found

    def _finding(self, model: nn.Module, made: nn.Module, whys: Mapping[str, str], context: Context) -> Finding:
        """What was saved, and how near the start is, layer by layer."""
        from deploykit.layerwise.budgets import size
        from deploykit.low_rank.forms import merged

        params, macs = size("params", context, "compact"), size("macs", context, "compact")
        saved = (
            f"{1 - params(made) / params(model):.1%} of the parameters and {1 - macs(made) / macs(model):.1%} of the "
            "multiply-accumulates saved"
        )
        rows: list[tuple[str | float | None, ...]] = []
        for name, why in whys.items():
            if why:
                rows.append((name, 100.0, None, why))
                continue
            own: Any = made.get_submodule(name)
            layers: tuple[Any, Any] = model.get_submodule(name), merged(own)
            w, found = (layer.weight.detach().double() for layer in layers)
            left = sum(factor.weight.numel() for factor in own) / w.numel()
            rows.append((name, 100.0 * left, 100.0 * float((w - found).square().sum() / w.square().sum()), ""))
        columns = ("layer", "weights left (%)", "energy lost (%)", "whole because")
        return Finding(repr(self), f"Depthwise-separable convolutions: {saved}", columns, tuple(rows), summary=saved)


def _has_kernel(layer: nn.Module) -> bool:
    """Whether it is a convolution over more than single positions."""
    from torch.nn.modules.conv import _ConvNd

    return isinstance(layer, _ConvNd) and max(layer.kernel_size) > 1
