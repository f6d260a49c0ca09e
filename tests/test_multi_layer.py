"""Multi-layer pruning after Singh et al. 2019."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_pruning_in_training import context
from test_retraining import accuracy, trained
from torch import nn

from deploykit.core.errors import DeploykitError
from deploykit.layerwise.products import products
from deploykit.passes.multi_layer import MultiLayer, emptiness, held_out_loss, largest_threshold
from deploykit.pruning.groups import find_groups

pytest.importorskip("accelerate")


def chain() -> Any:
    """Channel 0 is empty where it is written, 1 where it is read, 2 half in both, 3 nowhere."""
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
        model[0].weight[0] = 0.001
        model[2].weight[:, 1] = -0.001
        model[0].weight[2, :2] = 0.001
        model[2].weight[0, 2] = 0.001
    return model


def test_a_channel_is_as_empty_as_the_emptier_of_what_writes_and_what_reads_it() -> None:
    model = chain()
    (group,) = find_groups(model, {"input": torch.rand(1, 4)})
    found = {next(iter(channel.values()))[0]: emptiness(model, channel, 0.01) for channel in group.channels}
    assert found == {0: 1.0, 1: 1.0, 2: 0.5, 3: 0.0}


class _TwoReaders(nn.Module):
    """A feature map that a layer reads and that is detected on."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.following, self.scores = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(3, 2)
        self.last = nn.Linear(2, 2)
        with torch.no_grad():
            for p in self.parameters():
                p.fill_(1.0)
            self.following.weight[:, :2] = 0.001
            self.scores.weight[:, 1:] = 0.001

    def forward(self, x: Any) -> Any:
        features = torch.relu(self.map(x))
        return self.scores(features), self.last(torch.relu(self.following(features)))


def test_a_channel_that_one_of_several_layers_needs_is_not_empty() -> None:
    """Of three channels the next layer reads the last, what detects the first, and nobody the second."""
    model = _TwoReaders()
    group = next(g for g in find_groups(model, {"x": torch.rand(1, 4)}) if g.writers == ("map",))
    assert [emptiness(model, channel, 0.01) for channel in group.channels] == [0.0, 1.0, 0.0]


def test_the_largest_threshold_is_the_one_before_the_loss_rises() -> None:
    """Of all magnitudes, tried one by one."""
    model = trained()
    made = context(model)
    layers = products(model)
    found = largest_threshold(model, layers, made, 0.05)
    holdout = made.data["train"].pick(range(9, 512, 10))
    whole = held_out_loss(model, made, holdout)

    def loss(threshold: float) -> float:
        tried = copy.deepcopy(model)
        with torch.no_grad():
            for layer in products(tried).values():
                weight: Any = layer.weight
                weight[weight.abs() < threshold] = 0
        return held_out_loss(tried, made, holdout)

    assert loss(found) <= 1.05 * whole
    magnitudes: Any = torch.cat([layer.weight.detach().abs().flatten() for layer in layers.values()])  # type: ignore[union-attr, operator]
    assert 0.1 < float((magnitudes < found).float().mean()) < 1
    assert loss(float(magnitudes.max()) * 2) > 1.05 * whole


def test_channels_that_l1_empties_go_and_the_network_still_answers() -> None:
    original = trained()
    step = MultiLayer(l1=1e-2, steps=150, learning_rate=1e-2, tolerance=0.1, empty=0.8)
    found: Any = step(original, context(original))
    assert found[0].out_features < 32 and found[2].in_features == found[0].out_features
    assert accuracy(found) > 0.95 * accuracy(original)
    assert original[0].out_features == 32  # type: ignore[index, union-attr]


def test_only_the_layers_of_the_sets_lose_channels() -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    step = MultiLayer(sets=(("2",),), l1=0.1, steps=60, learning_rate=1e-2, tolerance=10.0, empty=0.5)
    found: Any = step(original, context(original))
    assert found[0].out_features == 16 and found[2].out_features < 16


@pytest.mark.parametrize(
    "options", [{"sets": ()}, {"sets": ((),)}, {"l1": 0.0}, {"empty": 0.0}, {"steps": 0}, {"tolerance": -1.0}]
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        MultiLayer(**options)


def test_a_layer_that_there_is_not_is_refused_with_the_nearest() -> None:
    model = trained()
    with pytest.raises(DeploykitError, match="no layer"):
        MultiLayer(sets=(("conv7",),))(model, context(model))
