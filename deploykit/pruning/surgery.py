"""The network without some of its channels, and the same network with those channels zeroed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import Finding
from deploykit.hub.structure import set_parameter
from deploykit.layerwise.channels import groups_of, mixes, weight_axis, weight_of, width
from deploykit.losses import tensors
from deploykit.pruning.crop import Port, crop
from deploykit.pruning.flow import Inputs

Removed = Mapping[Port, Sequence[int]]
LEAVE_OUT = "the step prune can leave those layers out with skip"


def without(model: nn.Module, removed: Removed) -> nn.Module:
    """A smaller copy: modes and what is trainable are those of the model."""
    pruned = copy.deepcopy(model)
    crop(pruned, removed)
    return pruned


def widths(model: nn.Module, removed: Removed) -> list[tuple[str, int, int]]:
    """The layers that lose output channels: how many they have, and how many are left."""
    had = {p.layer: width(model.get_submodule(p.layer), "out") for p in removed if p.side == "out"}
    return [(p.layer, had[p.layer], had[p.layer] - len(own)) for p, own in removed.items() if p.side == "out"]


def taken_out(step: str, whole: nn.Module, pruned: nn.Module, nothing: str) -> Finding:
    """How many channels every layer lost, for the report.

    Args:
        step: that took them.
        whole: the network before.
        pruned: the network after.
        nothing: what to say where none went, and what to do about it.
    """
    layers = {name: (width(m, "out"), width(pruned.get_submodule(name), "out"))
              for name, m in whole.named_modules() if mixes(m)}  # fmt: skip
    rows = tuple((name, had, left) for name, (had, left) in layers.items() if left < had)
    every, gone = sum(had for had, _ in layers.values()), sum(had - left for _, had, left in rows)
    said = f"{gone} of {every} channels taken out ({gone / every:.1%})" if gone else nothing
    return Finding(step, "Channels taken out", ("layer", "channels", "left"), rows, summary=said)


def zeroed(model: nn.Module, removed: Removed) -> nn.Module:
    """A copy of the same size, in which the weights that read those channels are zero."""
    same = copy.deepcopy(model)
    for (name, side), channels in removed.items():
        layer = same.get_submodule(name)
        if side == "in" and mixes(layer):
            weight = weight_of(layer).detach().clone()
            weight[read_by(layer, channels)] = 0
            set_parameter(layer, "weight", weight)
    return same


def read_by(layer: nn.Module, channels: Sequence[int]) -> tuple[slice | list[int], ...]:
    """The index of a layer's weights that read some of its input channels."""
    axis = weight_axis(layer, "in")
    # where an axis counts the inputs of one group, all groups lose the same
    within = list(channels) if axis == 0 else list(channels)[: len(channels) // groups_of(layer)]
    return *[slice(None)] * axis, within


def assert_equal(model: nn.Module, pruned: nn.Module, removed: Removed, inputs: Inputs) -> None:
    """Raises if the pruned network does not compute what the network with zeroed channels does.

    Raises:
        DeploykitError: outputs differ by more than rounding, or cannot be computed (`said_by` names the step).
    """
    try:
        with torch.no_grad():
            expected, found = (tensors(copy.deepcopy(m).eval()(**inputs)) for m in (zeroed(model, removed), pruned))
    except Exception as error:  # the user's code and torch raise whatever they like
        raise DeploykitError(f"the pruned model does not run ({error}); {LEAVE_OUT}") from None
    for a, b in zip(expected, found, strict=True):
        tolerance = 1e-4 * max(1.0, float(a.abs().max()))
        if a.shape != b.shape or not torch.allclose(a.double(), b.double(), rtol=1e-3, atol=tolerance):
            raise DeploykitError(
                "the pruned model computes something else than the model with the same channels zeroed; its code must "
                f"depend on sizes that are not seen from outside; {LEAVE_OUT}"
            )
