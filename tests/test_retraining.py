"""Steps that prune and train: fine-tuning, rounds of pruning with rewinding, dense-sparse-dense."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deploykit import targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.recipe import TrainSettings
from deploykit.cost import cost
from deploykit.layerwise.products import products
from deploykit.layerwise.refit import refit
from deploykit.losses import cross_entropy
from deploykit.low_rank.surgery import factors_of
from deploykit.passes.dsd import Dsd, smallest
from deploykit.passes.finetune import Finetune
from deploykit.passes.iterate import Iterate, rewind
from deploykit.passes.low_rank import LowRank
from deploykit.passes.sparsify import Sparsify
from deploykit.training.trainer import Trainer

pytest.importorskip("accelerate")


def blobs(count: int, seed: int = 0) -> DataSet:
    """Four classes about four centres in eight dimensions."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, count)
    centres = np.random.default_rng(99).standard_normal((4, 8)) * 1.5
    return DataSet.of({"input": (centres[labels] + random.standard_normal((count, 8))).astype(np.float32)}, labels)


def here(original: nn.Module | None = None, labels: bool = False) -> Context:
    return Context(
        targets.load("mobile-arm"), {"train": blobs(512)}, {"input": next(blobs(2).batches(2)).inputs["input"]},
        original=original, trainer=Trainer(TrainSettings(batch=32)), loss=cross_entropy if labels else None,
    )  # fmt: skip


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))


def accuracy(model: nn.Module) -> float:
    batch = next(blobs(1000, seed=5).batches(1000))
    with torch.no_grad():
        return float((model(torch.from_numpy(batch.inputs["input"])).argmax(1).numpy() == batch.labels).mean())


def trained() -> nn.Module:
    model = net()
    Trainer(TrainSettings(batch=32)).fit(model, blobs(512), cross_entropy, steps=150, learning_rate=1e-2)
    return model


def dead(model: nn.Module) -> float:
    weights: list[Any] = [layer.weight for layer in products(model).values()]
    return float(sum((w == 0).sum() for w in weights) / sum(w.numel() for w in weights))


def test_fine_tuning_brings_accuracy_back_and_leaves_zeros_and_the_model_alone() -> None:
    original = trained()
    sparse = Sparsify(0.8, "random")(original, here())
    before = copy.deepcopy(sparse.state_dict())
    found = Finetune(steps=60, learning_rate=1e-2)(sparse, here(original))
    assert accuracy(found) > accuracy(sparse) + 0.1
    assert all(torch.equal(v, before[k]) for k, v in sparse.state_dict().items())
    assert dead(found) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(
    ("schedule", "by_hand"), [("cubic", [0.5625, 0.7875, 0.9]), ("linear", [0.3, 0.6, 0.9])], ids=["cubic", "linear"]
)
def test_amounts_grow_as_the_schedule_says(schedule: Any, by_hand: list[float]) -> None:
    if schedule == "cubic":
        by_hand = [0.9 * (1 - (1 - t / 3) ** 3) for t in (1, 2, 3)]
    assert Iterate(0.9, rounds=3, schedule=schedule).amounts() == pytest.approx(by_hand)


def test_the_same_share_of_what_is_left_goes_in_every_round() -> None:
    assert Iterate(1 - 0.8**4, rounds=4, schedule="geometric").amounts() == pytest.approx([0.2, 0.36, 0.488, 0.5904])


@pytest.mark.parametrize("what", ["nothing", "learning_rate", "weights", "random"])
def test_rounds_end_with_the_share_asked_for(what: Any) -> None:
    original = trained()
    step = Iterate(0.7, options={"criterion": "l1"}, rounds=2, steps=20, rewind=what, learning_rate=1e-2)
    found = step(original, here(original))
    assert dead(found) == pytest.approx(0.7, abs=0.01)
    assert accuracy(found) > 0.5


def test_weights_are_rewound_to_those_the_model_came_with_where_they_live() -> None:
    model = net()
    sparse: Any = Sparsify(0.5, "l1")(model, here())
    with torch.no_grad():
        for p in sparse.parameters():
            p.add_(1.0)
    rewind(sparse, model, "weights", 0)
    for (name, layer), (_, came) in zip(products(sparse).items(), products(model).items(), strict=True):
        lives = sparse.state_dict()[f"{name}.parametrizations.weight.0.mask"]
        torch.testing.assert_close(layer.weight, came.weight * lives)
        torch.testing.assert_close(layer.bias, came.bias)
    rewind(sparse, model, "random", 0)
    assert not torch.equal(sparse[0].weight, model[0].weight * (sparse[0].weight != 0))  # type: ignore[index]
    assert dead(sparse) == pytest.approx(0.5, abs=0.01)


def test_an_untrained_model_is_trained_first_where_a_ticket_is_drawn() -> None:
    """Ranked by what training made of the weights, not by the weights it came with."""
    model = net()
    ticket = Iterate(
        0.5, options={"criterion": "l1"}, rounds=1, steps=1, dense=100, rewind="weights", learning_rate=1e-2
    )
    drawn = ticket(model, here(model, labels=True))
    plain = Sparsify(0.5, "l1")(model, here())
    masks = [m.state_dict()["0.parametrizations.weight.0.mask"] for m in (drawn, plain)]
    assert not torch.equal(*masks)


@pytest.mark.parametrize(
    "options", [{"amount": 1.0}, {"amount": 0.5, "rounds": 0}, {"amount": 0.5, "step": "prune", "rewind": "weights"}]
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must|cannot"):
        Iterate(**options)


def test_layers_are_decomposed_to_lower_ranks_round_by_round() -> None:
    original, context = trained(), here(labels=True)
    counted = replace(context, cost=lambda module: cost(module, context.example))
    found = Iterate(0.3, step="low_rank", options={"multiple": 1}, rounds=2, steps=60, learning_rate=1e-2)(
        original, counted
    )
    numbers = [sum(p.numel() for p in network.parameters()) for network in (original, found)]
    assert numbers[1] <= 0.7 * numbers[0] and factors_of(found)
    alone = LowRank(0.3, multiple=1)(original, counted)
    assert accuracy(found) > accuracy(alone)


def test_behind_low_rank_refit_leaves_factors_as_they_are() -> None:
    original, data = trained(), blobs(64)
    counted = replace(here(original), cost=lambda module: cost(module, {"input": torch.zeros(2, 8).numpy()}))
    made = LowRank(0.2, multiple=1, layers=("0",))(original, counted)
    fitted = refit(made, original, data)
    own = {name for name in made.state_dict() if name.startswith("0.")}
    assert all(torch.equal(fitted.state_dict()[name], made.state_dict()[name]) for name in own)
    assert not torch.equal(fitted.state_dict()["2.weight"], made.state_dict()["2.weight"])


def test_the_share_of_the_step_itself_cannot_be_set() -> None:
    with pytest.raises(DeploykitError, match="round by round"):
        Iterate(0.5, options={"sparsity": 0.5})(net(), here())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.lstm(input.reshape(-1, 4, 2))[0][:, -1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("made", [net, Recurrent])
def test_a_share_of_every_layer_is_held_at_zero_and_given_back(made: Any) -> None:
    torch.manual_seed(0)
    model = made()
    seen: list[list[float]] = []

    class Watching(Trainer):
        def fit(self, module: Any, *args: Any, **settings: Any) -> list[float]:
            losses = super().fit(module, *args, **settings)
            seen.append([float((p == 0).float().mean()) for p in module.parameters() if p.ndim > 1])
            return losses

    context = here(model, labels=True)
    found = Dsd(0.25, steps=12, learning_rate=1e-2)(
        model, Context(context.target, context.data, context.example, model, Watching(TrainSettings(batch=32)),
                       cross_entropy)
    )  # fmt: skip
    assert seen[0] == pytest.approx([0.25] * len(seen[0]), abs=0.02) and max(seen[1]) < 0.05
    assert accuracy(found) > accuracy(model)


def test_the_smallest_are_held() -> None:
    layer = nn.Linear(4, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, -1.0, 0.5, -2.0]]))
    ((_, taken),) = smallest(layer, 0.5)
    assert taken.tolist() == [[False, True, True, False]]
