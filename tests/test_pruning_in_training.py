"""Steps that prune while they train: soft filters, gates, noise."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_retraining import accuracy, blobs, dead, here, net, trained
from torch import Tensor, nn

from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.recipe import TrainSettings
from deploykit.passes.l0 import BETA, GAMMA, L0, ZETA, _absorb, _attach, _gates
from deploykit.passes.soft_prune import SoftPrune, silence
from deploykit.passes.variational_dropout import K1, VariationalDropout, divergence, log_alpha, noisy
from deploykit.pruning.groups import find_groups
from deploykit.training.trainer import Trainer

pytest.importorskip("accelerate")


def context(original: nn.Module, labels: bool = True, multiple: int = 1) -> Context:
    made = here(original, labels)
    return replace(made, target=replace(made.target, channel_multiple=multiple))


# --- soft filter pruning


def test_the_weakest_channels_are_gone_and_the_others_still_answer() -> None:
    original = trained()
    found: Any = SoftPrune(0.5, steps=40, every=10, learning_rate=1e-2)(original, context(original))
    assert found[0].out_features == found[2].in_features == 16
    assert accuracy(found) > 0.9 * accuracy(original)
    assert original[0].out_features == 32  # type: ignore[index, union-attr]


def test_what_is_left_is_a_multiple_that_the_target_likes() -> None:
    original = trained()
    found: Any = SoftPrune(0.3, steps=4, every=2)(original, context(original, multiple=8))
    assert found[0].out_features == 24


def test_the_report_says_how_many_channels_of_every_layer_are_left() -> None:
    original, notes = trained(), []
    step = SoftPrune(0.3, steps=4, every=2)
    found: Any = step(original, replace(context(original, multiple=8), note=notes.append))
    (told,) = notes
    assert told.step == repr(step) and told.columns == ("layer", "channels", "left")
    was, now = (
        {name: layer.out_features for name, layer in m.named_modules() if isinstance(layer, nn.Linear)}
        for m in (original, found)
    )
    assert {row[0]: row[1:] for row in told.rows} == {n: (was[n], now[n]) for n in was if was[n] != now[n]} != {}


def test_a_silenced_channel_writes_nothing_and_can_grow_back() -> None:
    model: Any = net()
    groups = find_groups(model, {"input": torch.rand(1, 8)})
    channel = groups[0].channels[3]
    silence(model, [channel])
    ((layer, side), (number,)) = next((p, n) for p, n in channel.items() if p.side == "out")
    assert (layer, side) == ("0", "out")
    assert not model[0].weight[number].any() and float(model[0].bias[number].detach()) == 0
    assert model[0].weight.requires_grad and int((model[0].weight == 0).all(1).sum()) == 1


# --- gates


def test_a_gates_value_and_its_price_are_those_of_the_paper() -> None:
    groups = find_groups(net(), {"input": torch.rand(1, 8)})
    gates = _gates(groups)
    with torch.no_grad():
        gates.hundredths[0].copy_(torch.linspace(-0.06, 0.06, 32))
    a = np.linspace(-6, 6, 32)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    np.testing.assert_allclose(gates.open().item(), sigmoid(a - BETA * math.log(-GAMMA / ZETA)).mean(), rtol=1e-5)
    gates.eval().draw()
    np.testing.assert_allclose(gates.z[0].detach(), np.clip(sigmoid(a) * (ZETA - GAMMA) + GAMMA, 0, 1), atol=1e-6)
    gates.train()
    drawn = []
    for _ in range(300):
        gates.draw()
        drawn.append(gates.z[0].detach())
    by_hand = sigmoid(a - BETA * math.log(-GAMMA / ZETA))  # P(z > 0)
    np.testing.assert_allclose((torch.stack(drawn) > 0).float().mean(0), by_hand, atol=0.1)


def test_gates_in_the_weights_compute_what_gates_in_the_activations_do() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.Flatten(),
                          nn.Linear(64, 3)).eval()  # fmt: skip
    x = torch.randn(5, 2, 8, 8)
    groups = find_groups(model, {"input": x[:1]})
    gates = _gates(groups)
    with torch.no_grad():
        for p in gates.hundredths:
            p.copy_(torch.linspace(-0.02, 0.02, len(p)))
    gates.eval()
    hooks = _attach(model, groups, gates)
    gated = model(x)
    for hook in hooks:
        hook.remove()
    plain = model(x)
    _absorb(model, groups, gates)
    torch.testing.assert_close(model(x), gated)
    assert not torch.allclose(plain, gated)


def test_channels_that_are_not_needed_are_shut_and_taken_out() -> None:
    original = trained()
    found: Any = L0(penalty=0.5, steps=200, learning_rate=1e-2)(original, context(original))
    assert found[0].out_features < 24
    assert accuracy(found) > 0.9 * accuracy(original)
    assert set(found.state_dict()) == set(original.state_dict())


# --- variational dropout


def test_the_divergence_is_that_of_the_paper() -> None:
    a = np.array([-8.0, -1.0, 0.0, 3.0, 50.0])
    by_hand = -(K1 / (1 + np.exp(-(1.87320 + 1.48695 * a))) - 0.5 * np.log(1 + np.exp(-a)) - K1)
    np.testing.assert_allclose(divergence(torch.from_numpy(a)), by_hand, rtol=1e-6, atol=1e-9)
    assert float(divergence(torch.tensor(50.0))) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(log_alpha(torch.tensor(0.5), torch.tensor(-2.0)), torch.tensor(-2.0 - math.log(0.25)))


@pytest.mark.parametrize("made", ["linear", "convolution"])
def test_outputs_have_the_noise_of_weights_that_are_drawn(made: str) -> None:
    torch.manual_seed(0)
    layer: Any = nn.Linear(6, 3) if made == "linear" else nn.Conv2d(4, 4, 3, padding=1, stride=2, groups=2)
    x = torch.randn(1, 6) if made == "linear" else torch.randn(1, 4, 6, 6)
    log_variance = torch.randn_like(layer.weight) - 3
    y = layer(x).detach()
    ours = torch.stack([noisy(layer, x, y, log_variance) for _ in range(4000)])
    other = copy.deepcopy(layer)
    drawn = []
    with torch.no_grad():
        for _ in range(4000):
            other.weight.copy_(layer.weight + (log_variance / 2).exp() * torch.randn_like(layer.weight))
            drawn.append(other(x))
    torch.testing.assert_close(ours.mean(0), torch.stack(drawn).mean(0), atol=0.1, rtol=0.1)
    torch.testing.assert_close(ours.std(0), torch.stack(drawn).std(0), atol=0.1, rtol=0.1)
    assert torch.equal(noisy(layer.eval(), x, y, log_variance), y)


def test_weights_of_inputs_that_say_nothing_are_dropped() -> None:
    """Eight inputs tell the class, eight are noise."""
    random, batch = np.random.default_rng(0), next(blobs(512).batches(512))
    wide = np.concatenate([batch.inputs["input"], random.standard_normal((512, 8)).astype(np.float32)], 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 4))
    data = DataSet.of({"input": wide}, batch.labels)
    made = context(model)
    step = VariationalDropout(steps=600, learning_rate=1e-2)
    found: Any = step(model, replace(made, data={"train": data}, trainer=Trainer(TrainSettings(batch=64))))
    lives = (found[0].weight != 0).float()
    assert float(lives[:, 8:].mean()) < 0.2 < 0.4 < float(lives[:, :8].mean())
    weight: Tensor = found.state_dict()["0.parametrizations.weight.original"]
    assert weight.shape == (4, 16) and dead(found) > 0.3


@pytest.mark.parametrize(
    "made",
    [
        lambda: SoftPrune(1.0),
        lambda: SoftPrune(0.5, every=0),
        lambda: L0(penalty=0),
        lambda: VariationalDropout(steps=0),
    ],
)
def test_settings_that_cannot_train_are_refused(made: Any) -> None:
    with pytest.raises(ValueError, match="must"):
        made()
