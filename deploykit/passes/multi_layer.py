"""Multi-layer pruning: weights are driven to zero in a set of layers at once, and the channels they leave empty go.

Singh et al. 2019, "Multi-Layer Pruning Framework for Compressing Single Shot MultiBox Detector". For one set of layers
after another:

    train with  L + λ Σ|w|  over the set
    t = the largest threshold, one for the set, below which weights can be zero without the loss on held-out data rising
    take out every channel that is empty in the layers that write it *or* in the slices of all layers that read it
    train with L alone

Channels are taken out of the network as the first step leaves it, without the threshold: it only tells which.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from deploykit.core.context import Context
from deploykit.core.errors import DeploykitError, said_by, some
from deploykit.core.patterns import matching
from deploykit.core.progress import say
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from deploykit.core.data import DataSet
    from deploykit.layerwise.channels import Side
    from deploykit.pruning.groups import Channel, Group

HALVINGS = 10
"""Of the share of weights below the threshold."""
MOST = 1 - 1e-6
"""Of a group's channels: all but one."""
ROUNDING = 1e-9
"""Nine of ten weights are 0.9 of them."""
NOTHING = "no channel taken out: none is empty, or fewer than the target's multiple; raise l1, steps or tolerance"


@dataclass(frozen=True)
class MultiLayer:
    """Prunes channels of sets of layers, found by L1 regularisation and one threshold per set."""

    sets: tuple[tuple[str, ...], ...] = (("*",),)
    """Layers by name or pattern, one set after another."""
    l1: float = 1e-4
    """λ."""
    tolerance: float = 0.02
    """By what share the loss on held-out data may rise when weights below the threshold are zero."""
    empty: float = 0.9
    """A channel is empty where this share of its weights is below the threshold."""
    steps: int = 300
    """Optimizer steps, with L1 and again without."""
    learning_rate: float = 1e-3

    stage: ClassVar[Stage] = "model"
    needs: ClassVar[tuple[Need, ...]] = ("train",)
    pays_if: ClassVar[tuple[Profit, ...]] = ("structured",)

    def __post_init__(self) -> None:
        """Refuses settings that cannot train, and sets of nothing."""
        if self.steps < 1 or not (self.learning_rate > 0 and self.l1 > 0 and self.tolerance >= 0):
            raise ValueError("l1, steps and learning_rate must be above 0, tolerance must not be below")
        if not 0.0 < self.empty <= 1.0 or not all(self.sets) or not self.sets:
            raise ValueError("empty must lie between 0 and 1, and sets must name layers")

    def foresee(self, context: Context) -> None:
        """Refuses layers that the original does not have."""
        from deploykit.layerwise.products import products
        from deploykit.pruning.takable import foresee_layers

        foresee_layers([name for names in self.sets for name in names], context.original, products, "multi_layer")

    def __call__(self, model: nn.Module, context: Context) -> nn.Module:
        """A narrower, trained copy of the model.

        Raises:
            DeploykitError: a pattern matches nothing; the layers of the sets have no channels that can be taken out, or
                none as the target's multiple is.
        """
        from deploykit.layerwise.products import products
        from deploykit.losses import as_tensors
        from deploykit.pruning.groups import find_groups, together
        from deploykit.pruning.surgery import assert_equal, taken_out, without
        from deploykit.pruning.takable import sample, stuck, takable
        from deploykit.retraining import train

        pruned = copy.deepcopy(model)
        chosen = [matching("layer", patterns, products(pruned)) for patterns in self.sets]
        inputs, multiple = as_tensors(context.example), context.target.channel_multiple
        every = takable(pruned, context, "multi_layer")
        possible = [group for group in every if any(set(group.writers) <= names for names in chosen)]
        if not possible:
            raise DeploykitError(
                "multi_layer: no set holds all layers that write some channels, so none can be taken out. Such layers, "
                f"together: {some([' + '.join(group.writers) for group in every], 8)}"
            )
        if why := stuck(pruned, possible, multiple, MOST):
            raise DeploykitError(f"multi_layer: {why}")
        for number, names in enumerate(chosen, 1):
            layers: dict[str, Any] = {name: pruned.get_submodule(name) for name in names}
            size = partial(self._size, layers)
            train(pruned, context, "multi_layer", self.steps, self.learning_rate, penalty=size)
            threshold = largest_threshold(pruned, layers, context, self.tolerance)
            groups = [group for group in find_groups(pruned, sample(context)) if set(group.writers) <= names]
            gone = self._gone(pruned, groups, threshold, multiple)
            say(f"multi_layer: set {number} of {len(chosen)}: threshold {threshold:.3g}, {len(gone)} channels go")
            removed = together(gone)
            narrower = without(pruned, removed)
            with said_by("multi_layer"):
                assert_equal(pruned, narrower, removed, inputs)
            pruned = narrower
            train(pruned, context, "multi_layer", self.steps, self.learning_rate)
        context.note(taken_out(repr(self), model, pruned, NOTHING))
        return pruned

    def _size(self, layers: Mapping[str, Any]) -> Tensor:
        """λ Σ|w|."""
        import torch

        return self.l1 * torch.stack([layer.weight.abs().sum() for layer in layers.values()]).sum()

    def _gone(self, model: nn.Module, groups: list[Group], threshold: float, multiple: int) -> list[Channel]:
        """The empty channels, the emptiest first, as far as multiples allow."""
        import torch

        from deploykit.pruning.budget import ranked

        found: list[Channel] = []
        for group in groups:
            empty = torch.tensor([emptiness(model, c, threshold) for c in group.channels], dtype=torch.float64)
            (order,) = ranked(model, [group], [-empty], multiple, MOST)
            found += order.channels[: order.at_most(int((empty >= self.empty - ROUNDING).sum()))]
        return found


def emptiness(model: nn.Module, channel: Channel, threshold: float) -> float:
    """The share of weights below a threshold, of what writes a channel or of what reads it, whichever is larger.

    Where several layers read it (a detector's feature map: the next layer and what detects there), the fullest counts:
    a channel that one of them needs is not empty. So it is where several layers write it.
    """
    from deploykit.layerwise.channels import mixes, weight_axis

    shares: dict[Side, list[float]] = {"out": [], "in": []}
    for (name, side), numbers in channel.items():
        layer: Any = model.get_submodule(name)
        if mixes(layer):
            axis = weight_axis(layer, side)
            own = layer.weight.detach().movedim(axis, 0)
            shares[side].append(float((own[[c % len(own) for c in numbers]].abs() < threshold).double().mean()))
    return max(min(own, default=0.0) for own in shares.values())


def largest_threshold(model: nn.Module, layers: Mapping[str, Any], context: Context, tolerance: float) -> float:
    """The largest of the layers' magnitudes below which weights can be zero and the held-out loss rises by no more than
    ``tolerance`` of itself."""
    import torch

    from deploykit.hub.structure import bake, set_parameter
    from deploykit.retraining import split

    data, holdout = split(context.need("train", "multi_layer"), context.data.get("holdout"))
    judged = holdout if holdout is not None else data
    magnitudes = torch.cat([m.weight.detach().abs().flatten() for m in layers.values()]).sort()[0]
    whole = held_out_loss(model, context, judged)

    def rise(share: float) -> float:
        tried, _ = bake(model)  # a weight that is made of others would not keep what is written into it
        limit = magnitudes[min(len(magnitudes) - 1, round(share * len(magnitudes)))]
        for name in layers:
            layer: Any = tried.get_submodule(name)
            weight = layer.weight.detach()
            set_parameter(layer, "weight", weight.masked_fill(weight.abs() < limit, 0.0))
        return held_out_loss(tried, context, judged) - whole

    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if rise(middle) <= tolerance * abs(whole) else (low, middle)
    return float(magnitudes[min(len(magnitudes) - 1, round(low * len(magnitudes)))])


def held_out_loss(model: nn.Module, context: Context, data: DataSet) -> float:
    """The mean loss that the step trains with."""
    import torch

    from deploykit.layerwise.watching import BATCH, evaluating
    from deploykit.losses import TrainBatch, as_tensors, distill_kl

    loss = context.loss or distill_kl()
    total = 0.0
    teacher = context.original if context.original is not None else model
    with evaluating(model), evaluating(teacher), torch.no_grad():
        for batch in data.batches(BATCH):
            inputs = as_tensors(batch.inputs)
            labels = None if batch.labels is None else torch.from_numpy(batch.labels)
            total += float(loss(model(**inputs), TrainBatch(inputs, labels, teacher(**inputs)))) * len(
                next(iter(inputs.values()))
            )
    return total / len(data)
