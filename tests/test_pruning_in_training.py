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
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import Finding
from deploykit.core.recipe import TrainSettings
from deploykit.hub.structure import mask_of
from deploykit.passes.l0 import BETA, GAMMA, L0, ZETA, _absorb, _attach, _gates
from deploykit.passes.soft_prune import SoftPrune, silence
from deploykit.passes.sparsify import Sparsify
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
    notes: list[Finding] = []
    original = trained()
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


# --- behind a step that masked weights, and where nothing would come of the step


def masked(model: nn.Module) -> Any:
    return Sparsify(0.3, "l1")(model, context(model))


def test_a_masked_layers_channel_is_silenced_too() -> None:
    model = masked(net())
    channel = find_groups(model, {"input": torch.rand(1, 8)})[0].channels[3]
    silence(model, [channel])
    assert not model[0].weight[3].any() and float(model[0].bias[3].detach()) == 0
    assert model[0].weight[2].any() and mask_of(model[0], "weight") is not None


def test_gates_go_into_masked_weights_too() -> None:
    model, x = masked(net()), torch.randn(5, 8)
    groups = find_groups(model, {"input": x[:1]})
    gates = _gates(groups)
    with torch.no_grad():
        gates.hundredths[0].copy_(torch.linspace(-0.02, 0.02, 32))
    hooks = _attach(model, groups, gates.eval())
    gated = model(x)
    for hook in hooks:
        hook.remove()
    _absorb(model, groups, gates)
    torch.testing.assert_close(model(x), gated)


@pytest.mark.parametrize("step", [SoftPrune(0.5, steps=8, every=3), L0(penalty=5.0, steps=80, learning_rate=1e-2)])
def test_behind_a_step_that_masked_channels_go_and_zeros_stay(step: Any) -> None:
    notes: list[Finding] = []
    sparse = masked(trained())
    found: Any = step(sparse, replace(context(sparse), note=notes.append))
    left = found[0].out_features
    assert left < 32 and notes[0].summary == f"{32 - left} of 36 channels taken out ({(32 - left) / 36:.1%})"
    held = mask_of(found[2], "weight")
    assert held is not None and not found[2].weight[~held.mask].any()


def test_a_share_that_multiples_do_not_allow_is_refused_before_any_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("trained before the refusal"))
    model = net()
    with pytest.raises(DeploykitError, match="soft_prune: no layer can lose channels and keep a multiple of 32"):
        SoftPrune(0.5)(model, context(model, multiple=32))
    with pytest.raises(DeploykitError, match="multiple of 8 of them where at most 20% of one goes"):
        SoftPrune(0.2)(model, context(model, multiple=8))
    for step in (SoftPrune(0.5), L0()):
        with pytest.raises(DeploykitError, match=r"(soft_prune|l0): the context has no example"):
            step(model, replace(context(model), example={}))


def test_gates_that_multiples_do_not_let_shut_are_said_before_and_after(capsys: pytest.CaptureFixture[str]) -> None:
    notes: list[Finding] = []
    model = net()
    L0(steps=1)(model, replace(context(model, multiple=32), note=notes.append))
    assert "l0: no layer can lose channels and keep a multiple of 32" in capsys.readouterr().err
    assert notes[0].rows == () and "the target's multiple" in notes[0].summary


def test_gates_that_stay_open_are_said() -> None:
    notes: list[Finding] = []
    model = net()
    L0(penalty=1e-6, steps=1)(model, replace(context(model), note=notes.append))
    assert notes[0].rows == () and "raise penalty or steps" in notes[0].summary


class Attending(nn.Module):
    """Attention reads the weight of its last projection and never calls it; the others are called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.wide, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, input: Tensor) -> Tensor:
        x = input.reshape(len(input), 1, 8)
        x = (x + self.attention(x, x, x, need_weights=False)[0]).mean(1)
        return self.head(input=torch.relu(self.wide(input=x)))  # type: ignore[no-any-return]


def test_a_layer_that_is_never_called_bears_no_noise() -> None:
    torch.manual_seed(0)
    notes: list[Finding] = []
    model = Attending()
    step = VariationalDropout(steps=200, learning_rate=1e-2, penalty=3.0)
    found: Any = step(model, replace(context(model), note=notes.append))
    assert mask_of(found.attention.out_proj, "weight") is None and mask_of(found.head, "weight") is not None
    (told,) = notes
    assert told.columns == ("layer", "weights", "left", "zeros %") and "192 weights of other kinds" in told.summary
    assert told.summary.startswith(told.title.lower())


def test_layers_that_are_called_by_keyword_have_gates() -> None:
    torch.manual_seed(0)
    model = Attending()
    found: Any = L0(penalty=5.0, steps=60, learning_rate=1e-2)(model, context(model))
    assert found.head.in_features == found.wide.out_features < 16
