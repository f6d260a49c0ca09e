"""Rounds of pruning: what is rewound to what, the lottery's control, and what a step of rounds is refused for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_retraining import here, net
from torch import Tensor, nn

from deploykit import passes, targets
from deploykit.core.errors import DeploykitError
from deploykit.core.recipe import Step
from deploykit.layerwise.products import products
from deploykit.passes.iterate import Iterate, rewind
from deploykit.passes.sparsify import Sparsify
from deploykit.planning import refusal
from deploykit.training.trainer import Trainer

pytest.importorskip("accelerate")


def shaken(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    return other


def test_layers_with_weight_norm_are_rewound_too() -> None:
    model: Any = net()
    nn.utils.parametrizations.weight_norm(model[0])
    found: Any = shaken(model)
    rewind(found, model, "weights", 0)
    assert all(torch.equal(found.state_dict()[name], t) for name, t in model.state_dict().items())
    rewind(found, model, "random", 0)
    assert found[0].weight.isfinite().all() and not torch.allclose(found[0].weight, model[0].weight)


def test_masks_of_a_model_that_came_with_some_stay_and_so_do_later_ones() -> None:
    model = Sparsify(0.3, "l1")(net(), here())
    sparser = Sparsify(0.6, "l1")(model, here())
    found: Any = shaken(sparser)
    rewind(found, model, "weights", 0)
    for ours, expected in zip(products(found).values(), products(sparser).values(), strict=True):
        torch.testing.assert_close(ours.weight, expected.weight)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)
        self.place = nn.Parameter(torch.ones(1, 1, 8))

    def forward(self, input: Tensor) -> Tensor:
        x = input[:, None] + self.place
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))  # type: ignore[no-any-return]


def test_random_weights_are_drawn_for_attention_too_and_bare_parameters_go_back() -> None:
    model = Attending()
    found: Any = shaken(model)
    rewind(found, model, "random", 0)
    for ours, came in ((found.attention.in_proj_weight, model.attention.in_proj_weight),
                       (found.attention.out_proj.weight, model.attention.out_proj.weight)):  # fmt: skip
        assert not torch.allclose(ours, came) and not torch.allclose(ours, came + 1.0)
    assert torch.equal(found.place, model.place) and not found.attention.in_proj_bias.any()


def test_the_control_of_a_lottery_trains_the_winning_tickets_mask_from_weights_drawn_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = net()
    starts: dict[str, list[nn.Module]] = {"weights": [], "random": []}
    fit = Trainer.fit
    for what, seen in starts.items():

        def noted(self: Any, module: nn.Module, *args: Any, seen: Any = seen, **more: Any) -> Any:
            seen.append(copy.deepcopy(module))
            return fit(self, module, *args, **more)

        monkeypatch.setattr(Trainer, "fit", noted)
        chosen: Any = what
        step = Iterate(0.7, options={"criterion": "l1"}, rounds=3, steps=5, dense=5, rewind=chosen)
        step(model, here(model, labels=True))
    ticket, control = ([m.state_dict() for m in seen] for seen in (starts["weights"], starts["random"]))
    for before, other in zip(ticket[:-1], control[:-1], strict=True):  # the dense training and all rounds but the last
        assert all(torch.equal(t, other[name]) for name, t in before.items())
    for name, tensor in ticket[-1].items():
        assert torch.equal(tensor, control[-1][name]) == name.endswith("mask")


def test_rounds_pay_where_their_step_does_and_need_what_it_needs() -> None:
    built = {name: passes.build(Step("iterate", {"amount": 0.5, "step": name})) for name in ("sparsify", "prune")}
    assert built["sparsify"].pays_if == Sparsify(0.5).pays_if and built["sparsify"].needs == ("train",)
    assert built["prune"].needs == ("train", "data")
    x86 = targets.load("x86")
    assert "cannot pay" in refusal(built["sparsify"], x86, ("train", "data"))
    assert refusal(built["prune"], x86, ("train", "data")) == "" and "--calib" in refusal(
        built["prune"], x86, ["train"]
    )


@pytest.mark.parametrize("step", ["sparsify", "prune"])
def test_a_layer_that_there_is_not_is_refused_before_any_training(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("trained before the refusal"))
    model = net()
    more = {"refit": False, "of": "channels"} if step == "prune" else {}
    rounds = Iterate(0.5, step=step, options={"skip": ["nope"], "criterion": "l1", **more}, dense=10)
    with pytest.raises(DeploykitError, match=f"^{step}: no layer 'nope'"):
        rounds.foresee(here(model))
    with pytest.raises(DeploykitError, match="no layer 'nope'"):
        rounds(model, here())
