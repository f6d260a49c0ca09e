"""The steps that mask single weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deploykit import targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import Finding
from deploykit.hub.structure import mask_of
from deploykit.layerwise.products import products
from deploykit.passes.semi_structured import SemiStructured
from deploykit.passes.sparsify import Sparsify


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)
    )


def here(count: int = 0, labels: bool = False) -> Context:
    random = np.random.default_rng(0)
    pictures = random.standard_normal((max(count, 2), 3, 8, 8)).astype(np.float32)
    data = DataSet.of({"input": pictures}, random.integers(0, 5, len(pictures)) if labels else None)
    example = {"input": pictures[:2]}
    return Context(targets.load("mobile-arm"), {"calibration": data} if count else {}, example)


def zeros(model: nn.Module) -> dict[str, float]:
    found: dict[str, Any] = {name: layer.weight for name, layer in products(model).items()}
    return {name: float((w == 0).float().mean()) for name, w in found.items()}


@pytest.mark.parametrize("criterion", ["auto", "l1", "l2", "obs", "hessian", "activation", "synflow", "random", "snip"])
def test_by_every_criterion_the_share_asked_for_goes_and_the_model_itself_is_left_alone(criterion: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    sparse = Sparsify(0.5, criterion)(model, here(32, labels=True))
    dead = sum(int((~mask_of(layer, "weight").mask).sum()) for layer in products(sparse).values())  # type: ignore[union-attr]
    assert dead == round(0.5 * (216 + 288 + 320))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert sparse.training == model.training


def test_with_few_samples_or_none_magnitude_decides_and_with_enough_optimal_brain_surgeon() -> None:
    model = net()
    masks = {n: Sparsify(0.5)(model, here(n)).state_dict()["0.parametrizations.weight.0.mask"] for n in (0, 31, 32)}
    by_hand = torch.cat([p.detach().abs().flatten() for n, p in model.named_parameters() if p.ndim > 1]).sort()[0]
    lives = model[0].weight.abs() > by_hand[round(0.5 * len(by_hand)) - 1]  # type: ignore[index, union-attr]
    assert torch.equal(masks[0], lives) and torch.equal(masks[31], lives) and not torch.equal(masks[32], lives)


def test_layer_by_layer_all_lose_the_same_share_and_those_skipped_nothing() -> None:
    found = zeros(Sparsify(0.25, "l1", "layer", skip=("5",))(net(), here()))
    assert found == {"0": 0.25, "3": 0.25, "5": 0.0}


def test_a_second_step_counts_the_zeros_of_the_first() -> None:
    sparse = Sparsify(0.5, "l1", "layer")(Sparsify(0.25, "l1", "layer")(net(), here()), here())
    assert set(zeros(sparse).values()) == {0.5}


@pytest.mark.parametrize("count", [0, 32])
def test_of_four_inputs_two_keep_their_weights(count: int) -> None:
    sparse = SemiStructured()(net(), here(count))
    for name, layer in products(sparse).items():
        weight: Any = layer.weight.detach()
        if weight.shape[1] % 4:
            assert name == "0" and bool((weight != 0).all())
        else:
            alive = (weight != 0).movedim(1, -1).reshape(-1, 4).sum(1)
            assert bool((alive == 2).all())


@pytest.mark.parametrize("step", [SemiStructured(), Sparsify(0.4, "l1", skip=("5",))])
def test_the_report_says_how_many_weights_of_every_layer_stayed(step: Any) -> None:
    notes: list[Finding] = []
    sparse = step(net(), replace(here(), note=notes.append))
    (found,) = notes
    assert (found.step, found.columns) == (repr(step), ("layer", "weights", "left", "zeros %"))
    by_hand = {name: np.asarray(layer.weight.detach()) for name, layer in products(sparse).items()}
    assert [row[0] for row in found.rows] == ["0", "3", "5"]
    for name, had, left, share in found.rows:
        w = by_hand[str(name)]
        assert (had, left) == (w.size, np.count_nonzero(w)) and share == pytest.approx(100 * (w == 0).mean())
    gone = sum((w == 0).sum() for w in by_hand.values()) / sum(w.size for w in by_hand.values())
    assert found.title == f"Weights that stay: {gone:.1%} are zero"


def test_one_of_three_is_a_pattern_too() -> None:
    weight: Any = SemiStructured("1:3")(net(), here())[0].weight  # type: ignore[index]
    assert bool(((weight != 0).sum(1) == 1).all())


@pytest.mark.parametrize(
    ("step", "count", "said"),
    [
        (Sparsify(0.5, "magnitude"), 32, "no criterion 'magnitude'"),
        (Sparsify(0.5, "taylor"), 32, "scores whole channels"),
        (Sparsify(0.5, "obs"), 31, "at least 32 calibration samples; there are 31"),
        (Sparsify(0.5, "obs"), 0, "needs calibration data: give --calib"),
        (Sparsify(0.5, "hessian"), 0, "needs calibration data: give --calib"),
        (Sparsify(0.5, "snip"), 32, "needs labels"),
        (Sparsify(0.5, skip=("6",)), 0, "no layer"),
        (SemiStructured("2:5"), 0, "multiples of 5"),
    ],
)
def test_what_cannot_be_done_is_refused(step: Any, count: int, said: str) -> None:
    with pytest.raises(DeploykitError, match=said):
        step(net(), here(count))


@pytest.mark.parametrize("pattern", ["4:2", "2", "0:4", "4:4", "two of four"])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="N:M"):
        SemiStructured(pattern)


def test_a_model_without_products_has_nothing_to_lose() -> None:
    with pytest.raises(DeploykitError, match="no convolution or linear layer"):
        Sparsify(0.5)(nn.ReLU(), here())


@pytest.mark.parametrize("criterion", ["obs", "hessian", "activation", "synflow", "snip"])
def test_frozen_weights_have_slopes_and_a_model_in_training_keeps_its_statistics(criterion: str) -> None:
    model, context = net(), here(32, labels=True)
    expected = Sparsify(0.5, criterion)(copy.deepcopy(model).eval(), context)
    found: Any = Sparsify(0.5, criterion)(model.train().requires_grad_(False), context)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert found.training and not any(p.requires_grad for p in found.parameters())


def test_what_is_not_counted_is_said() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 5)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(input)[0][:, -1])  # type: ignore[no-any-return]

    notes: list[Finding] = []
    sparse: Any = Sparsify(0.5, "l1")(Recurrent(), replace(here(), note=notes.append))
    assert zeros(sparse) == {"head": 0.5} and bool(sparse.lstm.weight_hh_l0.all())
    assert (
        "768 weights of other kinds, or that layers share, stay whole and are not counted: lstm.weight_ih_l0"
        in notes[0].summary
    )
    Sparsify(0.5, "l1")(net(), replace(here(), note=notes.append))
    assert notes[1].summary == ""


def test_a_layer_that_the_original_does_not_have_is_foreseen() -> None:
    context = replace(here(), original=net())
    Sparsify(0.5, skip=("3", "0.1")).foresee(context)  # a step in front may take 0 apart
    with pytest.raises(DeploykitError, match="sparsify: no layer '6'"):
        Sparsify(0.5, skip=("6",)).foresee(context)


def test_weights_that_are_not_finite_are_named() -> None:
    model: Any = net()
    with torch.no_grad():
        model[3].weight[0] = torch.nan
    with pytest.raises(DeploykitError, match=r"sparsify: the weights '3\.weight' are not all finite"):
        Sparsify(0.5, "l1")(model, here())


class Tied(nn.Module):
    """A language model in small: what words are read by is what they are told apart by."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.middle, self.head = nn.Embedding(12, 16), nn.Linear(16, 16), nn.Linear(16, 12, bias=False)
        self.head.weight = self.words.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.words(input)))  # type: ignore[no-any-return]


def test_weights_that_layers_share_stay_whole_and_shared() -> None:
    notes: list[Finding] = []
    sparse: Any = Sparsify(0.5, "l1")(Tied(), replace(here(), note=notes.append))
    assert sparse.head.weight is sparse.words.weight and bool(sparse.head.weight.all())
    assert zeros(sparse)["middle"] == 0.5 and "192 weights of other kinds, or that layers share" in notes[0].summary
    alike = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    alike[1].weight = alike[0].weight
    with pytest.raises(DeploykitError, match=r"sparsify: all layers share their weights with others \(0, 1\)"):
        Sparsify(0.5, "l1")(alike, here())
