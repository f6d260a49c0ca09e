"""Multi-layer pruning after Singh et al. 2019."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_pruning_in_training import context
from test_retraining import accuracy, net, trained
from torch import nn

from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import Finding
from deploykit.hub.structure import attach_mask
from deploykit.layerwise.products import products
from deploykit.passes.multi_layer import MultiLayer, emptiness, held_out_loss, largest_threshold
from deploykit.pruning.groups import find_groups
from deploykit.training.trainer import Trainer

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


def test_the_threshold_of_masked_layers_is_that_of_plain_ones() -> None:
    """What is tried on a weight that a mask makes must reach the weight."""
    plain = trained()
    masked = copy.deepcopy(plain)
    for layer in products(masked).values():
        attach_mask(layer, "weight", torch.ones_like(layer.weight).bool())  # type: ignore[arg-type]
    found = [largest_threshold(model, products(model), context(plain), 0.05) for model in (plain, masked)]
    assert found[0] == found[1] < max(float(p.detach().abs().max()) for p in plain.parameters())


def test_nine_of_ten_weights_are_a_share_of_nine_tenths() -> None:
    model: Any = nn.Sequential(nn.Linear(10, 4, bias=False), nn.ReLU(), nn.Linear(4, 5))
    with torch.no_grad():
        model[0].weight.fill_(0.0)
        model[0].weight[:, 0] = 1
        model[2].weight.fill_(1.0)
    groups = find_groups(model, {"input": torch.zeros(1, 10)})
    assert len(MultiLayer(empty=0.9)._gone(model, groups, 0.5, 1)) == 3  # one of four stays
    assert not MultiLayer(empty=0.91)._gone(model, groups, 0.5, 1)


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("trained before the refusal"))


def test_where_no_channel_can_go_nothing_is_trained(untrained: None) -> None:
    alone = nn.Sequential(nn.Flatten(), nn.Linear(8, 4))
    with pytest.raises(DeploykitError, match="multi_layer: there are no channels that can be taken out"):
        MultiLayer()(alone, context(alone))
    model = net()
    with pytest.raises(DeploykitError, match=r"no set holds all layers that write some channels.* together: 0"):
        MultiLayer(sets=(("2",),))(model, context(model))
    with pytest.raises(DeploykitError, match="multi_layer: no layer can lose channels and keep a multiple of 32"):
        MultiLayer()(model, context(model, multiple=32))
    with pytest.raises(DeploykitError, match="multi_layer: the context has no example"):
        MultiLayer()(model, replace(context(model), example={}))
    with pytest.raises(DeploykitError, match="multi_layer: no layer 'conv7'"):
        MultiLayer(sets=(("conv7",),)).foresee(context(model))


def test_the_report_says_what_went_and_what_to_do_where_nothing_did() -> None:
    notes: list[Finding] = []
    original = trained()
    step = MultiLayer(l1=1e-2, steps=150, learning_rate=1e-2, tolerance=0.1, empty=0.8)
    found: Any = step(original, replace(context(original), note=notes.append))
    left = found[0].out_features
    assert notes[0].rows == (("0", 32, left),)
    assert notes[0].summary == f"{32 - left} of 36 channels taken out ({(32 - left) / 36:.1%})"
    MultiLayer(l1=1e-9, steps=1, empty=1.0)(original, replace(context(original), note=notes.append))
    assert notes[1].rows == () and "no channel taken out" in notes[1].summary
