"""The step `self_distill`: where stages end, what exits learn, what is left of them, and the paper's explanations."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deploykit import passes, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.recipe import Step, TrainSettings
from deploykit.cost import cost
from deploykit.exits import explanations
from deploykit.exits.heads import Exit
from deploykit.exits.losses import self_distillation
from deploykit.exits.network import InTraining, WithExits, attach, with_cuts
from deploykit.exits.places import Places, Stage
from deploykit.exits.stages import found, named
from deploykit.hub.lower import lower
from deploykit.losses import TrainBatch, cross_entropy
from deploykit.models import load_model, save_compressed
from deploykit.passes.self_distill import SelfDistill
from deploykit.passes.sparsify import Sparsify
from deploykit.pipeline.steps import refuse_behind_exits
from deploykit.training.trainer import Trainer

pytest.importorskip("accelerate")


class Block(nn.Module):
    """Residual; with ``gate`` its maps are weighted by their means, squeezed to one position on the way."""

    def __init__(self, inputs: int, outputs: int, stride: int, gate: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(outputs, outputs, 1)) if gate else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate(y))
        return torch.relu(y + self.short(x))


class Net(nn.Module):
    """``image [n, 3, 16, 16]`` -> logits ``[n, 4]``; three stages of 16 x 16, 8 x 8 and 4 x 4."""

    def __init__(self, gate: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU())
        self.layer1 = nn.Sequential(Block(4, 4, 1, gate))
        self.layer2 = nn.Sequential(Block(4, 8, 2, gate), Block(8, 8, 1))
        self.layer3 = nn.Sequential(Block(8, 12, 2, gate))
        self.fc = nn.Linear(12, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(image))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def build() -> nn.Module:
    torch.manual_seed(0)
    return Net()


PLACES = Places((Stage("layer1", (4, 16, 16)), Stage("layer2", (8, 8, 8)), Stage("layer3", (12, 4, 4))), 4)


def corners(count: int = 192, seed: int = 0, labels: bool = True) -> DataSet:
    """Noise with a bright corner: which one is the class."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 4, count)
    x = 0.5 * random.standard_normal((count, 3, 16, 16))
    for i, c in enumerate(y):
        x[i, :, 8 * (c // 2) : 8 * (c // 2) + 8, 8 * (c % 2) : 8 * (c % 2) + 8] += 1
    return DataSet.of({"image": x.astype(np.float32)}, y if labels else None, "corners")


def context(original: nn.Module | None, data: DataSet | None = None, **more: Any) -> Context:
    settings = more.pop("settings", TrainSettings(batch=32))
    given = {"train": data or corners()}
    return Context(targets.load("x86"), given, original=original, trainer=Trainer(settings), **more)  # type: ignore[arg-type]


def few(count: int = 4) -> dict[str, Tensor]:
    return {"image": torch.from_numpy(next(corners(count).batches(count)).inputs["image"])}


def paths(stages: tuple[Stage, ...]) -> list[str]:
    return [stage.path for stage in stages]


# ------------------------------------------------------------------ stages


def test_stages_end_where_maps_become_smaller() -> None:
    assert found(Net(), few()) == PLACES.stages


def test_maps_that_are_squeezed_on_the_way_end_no_stage() -> None:
    assert paths(found(Net(gate=True), few())) == ["layer1", "layer2", "layer3"]


def test_in_a_network_without_blocks_single_layers_end_stages() -> None:
    flat = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    assert found(flat, {"input": few()["image"]}) == (Stage("1", (4, 16, 16)), Stage("4", (8, 8, 8)))


def test_a_network_in_which_nothing_becomes_smaller_has_no_stages() -> None:
    level = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten())
    with pytest.raises(DeploykitError, match=r"no stages found: .* 1 such end .* stages = \[...\]. Modules: 0, 1, 2"):
        found(level, {"input": few()["image"]})


def test_a_stage_that_is_not_there_is_refused_with_the_nearest() -> None:
    with pytest.raises(DeploykitError, match=r"no stage 'layer4'\. Did you mean 'layer[123]'"):
        named(Net(), few(), ("layer1", "layer4"))


def test_stages_are_two_or_more_in_order_and_run_once() -> None:
    with pytest.raises(DeploykitError, match="two or more, first to last; given: layer1"):
        named(Net(), few(), ("layer1",))
    with pytest.raises(DeploykitError, match="'layer1' does not end behind 'layer2'"):
        named(Net(), few(), ("layer2", "layer1"))
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    net[2] = net[0]
    with pytest.raises(DeploykitError, match="stage '0' runs 2 times"):
        named(net, {"input": few()["image"]}, ("0", "1"))


def test_stages_may_write_vectors() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
    x = {"input": torch.randn(4, 6)}
    with_exits = attach(net, Places(named(net, x, ("1", "3")), 2))
    assert {name: tuple(z.shape) for name, z in with_exits(**x).items()} == {"output": (4, 2), "exit_1": (4, 2)}


def test_finding_stages_leaves_the_network_as_it_was() -> None:
    net = Net().train()
    before = copy.deepcopy(net.state_dict())
    found(net, few())
    assert net.training and net.layer1.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())


# ------------------------------------------------------------------ exits


@pytest.mark.parametrize(("stage", "halvings"), [((4, 16, 16), 2), ((8, 8, 8), 1), ((8, 4, 4), 0)])
def test_an_exit_halves_as_often_as_the_network_still_does(stage: tuple[int, ...], halvings: int) -> None:
    head = Exit(stage, (12, 4, 4), 10)
    strides = [m.stride[0] for m in head.bottleneck.modules() if isinstance(m, nn.Conv2d)]
    assert math.prod(strides) == 2**halvings
    features, logits = head(torch.randn(2, *stage))
    assert features.shape == (2, 12) and logits.shape == (2, 10)


def test_exits_do_not_change_what_the_network_answers() -> None:
    net = build().eval()
    with_exits = attach(net, PLACES).eval()
    answers = with_exits(**few())
    assert list(answers) == ["output", "exit_1", "exit_2"]
    assert torch.equal(answers["output"], net(**few()))


def test_a_stage_is_read_before_something_behind_it_writes_in_place() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1, 2), nn.Flatten(), nn.Linear(256, 4)
    )
    whole = attach(net, Places((Stage("0", (4, 16, 16)), Stage("2", (4, 8, 8))), 4)).eval()
    x = few()["image"]
    assert torch.equal(whole.look(x).maps[0], net[0](x))
    assert (whole.look(x).maps[0] < 0).any()


def test_a_network_with_exits_takes_what_the_network_takes_and_can_be_copied() -> None:
    whole = copy.deepcopy(attach(build(), PLACES)).eval()
    assert list(inspect.signature(whole.forward).parameters) == ["image"]
    graph = lower(with_cuts(whole), next(corners(2).batches(2)).inputs).model.graph
    assert [i.name for i in graph.inputs] == ["image"]
    assert [o.name for o in graph.outputs] == ["output", "exit_1", "exit_2", "cut_1", "cut_2"]


# ------------------------------------------------------------------ losses


def test_the_loss_is_that_of_the_paper_by_hand() -> None:
    """Two classifiers, one sample, T = 1: p = (3/4, 1/4) is the deepest's answer, q = (1/2, 1/2) the exit's."""
    logits = (torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]]))
    features = (torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.0]]))
    batch = TrainBatch({}, torch.tensor([0]))
    loss = self_distillation(0.25, 1.0, 0.5, cross_entropy)((logits, features), batch)
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    expected = -math.log(0.75) + 0.75 * math.log(2.0) + 0.25 * divergence + 0.5 * 4.0
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_the_temperature_divides_logits_and_its_square_multiplies() -> None:
    logits = (torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * math.log(3.0), 0.0]]))
    features = (torch.zeros(1, 1), torch.zeros(1, 1))
    batch = TrainBatch({}, torch.tensor([0]))
    loss = self_distillation(1.0, 2.0, 0.0, cross_entropy)((logits, features), batch)
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(loss) == pytest.approx(-math.log(0.9) + 4 * divergence, rel=1e-6)


def test_the_deepest_teaches_and_is_not_taught() -> None:
    torch.manual_seed(0)
    logits = tuple(torch.randn(3, 4, requires_grad=True) for _ in range(3))
    features = tuple(torch.randn(3, 5, requires_grad=True) for _ in range(3))
    batch = TrainBatch({}, torch.tensor([0, 1, 2]))
    self_distillation(0.5, 3.0, 0.1, cross_entropy)((logits, features), batch).backward()
    alone = logits[-1].detach().requires_grad_()
    cross_entropy(alone, batch).backward()
    assert alone.grad is not None and logits[-1].grad is not None
    assert torch.equal(logits[-1].grad, alone.grad)
    assert features[-1].grad is None and all(f.grad is not None for f in features[:-1])


def test_without_teacher_and_hint_it_is_deep_supervision() -> None:
    logits = tuple(torch.randn(3, 4) for _ in range(3))
    batch = TrainBatch({}, torch.tensor([0, 1, 2]))
    loss = self_distillation(0.0, 3.0, 0.0, cross_entropy)((logits, (torch.zeros(3, 1),) * 3), batch)
    assert float(loss) == pytest.approx(sum(float(cross_entropy(z, batch)) for z in logits), rel=1e-6)


# ------------------------------------------------------------------ the step


def test_what_comes_back_is_the_network_as_it_was_but_trained() -> None:
    net = build().eval()
    trained = SelfDistill(steps=20, learning_rate=1e-2)(net, context(net))
    assert type(trained) is Net
    assert cost(trained, next(corners(2).batches(2)).inputs) == cost(net, next(corners(2).batches(2)).inputs)
    same = [torch.equal(a, b) for a, b in zip(net.parameters(), trained.parameters(), strict=True)]
    assert not any(same)


def test_kept_exits_are_there_and_have_learned() -> None:
    net = build().eval()
    whole = SelfDistill(keep_exits=True, steps=60, learning_rate=1e-2)(net, context(net))
    assert isinstance(whole, WithExits) and not whole.training
    assert paths(whole.places.stages) == ["layer1", "layer2", "layer3"]
    test = corners(200, seed=1)
    seen = whole.look(**{"image": torch.from_numpy(next(test.batches(200)).inputs["image"])})
    assert test.labels is not None
    right = [float((z.argmax(1).numpy() == test.labels).mean()) for z in seen.logits]
    assert min(right) > 0.9


def test_named_stages_get_the_exits() -> None:
    net = build().eval()
    whole = SelfDistill(stages=("layer2", "layer3"), keep_exits=True, steps=1)(net, context(net))
    assert isinstance(whole, WithExits)
    assert paths(whole.places.stages) == ["layer2", "layer3"] and len(whole.exits) == 1


def test_the_same_seed_gives_the_same_weights() -> None:
    net = build().eval()
    first, second = (SelfDistill(keep_exits=True, steps=20, learning_rate=1e-2)(net, context(net)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_plain_is_training_without_exits() -> None:
    net = build().eval()
    given = context(net, settings=TrainSettings(batch=16))
    trained = SelfDistill(method="plain", steps=20, learning_rate=1e-2)(net, given)
    by_hand = copy.deepcopy(net)
    data = corners()
    kept = np.arange(len(data)) % 10 == 9
    Trainer(TrainSettings(batch=16)).fit(
        by_hand, data.pick(np.flatnonzero(~kept)), cross_entropy, holdout=data.pick(np.flatnonzero(kept)), steps=20,
        learning_rate=1e-2,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), by_hand.parameters(), strict=True))


def test_deep_supervision_is_the_step_without_teacher_and_hint() -> None:
    net = build().eval()
    one = SelfDistill(method="dsn", steps=20, learning_rate=1e-2)(net, context(net))
    other = SelfDistill(alpha=0.0, hint=0.0, steps=20, learning_rate=1e-2)(net, context(net))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_zeros_stay_zero() -> None:
    net = build().eval()
    sparse = Sparsify(sparsity=0.5)(net, context(net))
    trained = SelfDistill(steps=20, learning_rate=1e-2)(sparse, context(net))
    before, after = sparse.get_submodule("layer2.0.conv"), trained.get_submodule("layer2.0.conv")
    assert (before.weight == 0).any() and not torch.equal(before.weight, after.weight)
    assert torch.equal(before.weight == 0, after.weight == 0)


def test_a_loss_of_the_recipe_takes_the_place_of_the_labels() -> None:
    net = build().eval()
    seen: list[tuple[int, ...]] = []

    def loss(outputs: Any, batch: TrainBatch) -> Tensor:
        seen.append(tuple(outputs.shape))
        return cross_entropy(outputs, batch)

    SelfDistill(steps=1)(net, context(net, loss=loss))
    assert len(seen) % 3 == 0 and set(shape[1:] for shape in seen) == {(4,)}


def test_a_network_with_exits_is_written_to_a_folder_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = build().eval()
    sparse = Sparsify(sparsity=0.5)(net, context(net))
    whole = SelfDistill(keep_exits=True, steps=2)(sparse, context(net))
    save_compressed(whole, tmp_path, "test_self_distill:build")
    read = load_model(str(tmp_path)).module
    assert isinstance(read, WithExits) and isinstance(whole, WithExits) and read.places == whole.places
    ours, theirs = whole(**few()), read(**few())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ------------------------------------------------------------------ what does not fit


def test_data_without_labels_is_refused_before_anything_runs() -> None:
    with pytest.raises(DeploykitError, match="learns from labels, and corners has none"):
        SelfDistill().foresee(context(build(), corners(labels=False)))


def test_unknown_stages_are_refused_before_anything_runs() -> None:
    with pytest.raises(DeploykitError, match=r"self_distill: no stage 'layr2'\. Did you mean 'layer2'"):
        SelfDistill(stages=("layr2", "layer3")).foresee(context(build()))


def test_networks_with_several_answers_or_exits_are_refused() -> None:
    class Two(nn.Module):
        def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
            return image.mean((2, 3)), image.mean((1, 2))

    with pytest.raises(DeploykitError, match=r"that answer one \[n, classes\]; this one answers \[2, 3\], \[2, 16\]"):
        SelfDistill().foresee(context(Two()))
    with pytest.raises(DeploykitError, match="has exits already"):
        SelfDistill().foresee(context(attach(build(), PLACES)))


@pytest.mark.parametrize(
    "options",
    [{"steps": 0}, {"alpha": 1.5}, {"temperature": 0.0}, {"hint": -1.0}, {"method": "plain", "keep_exits": True}],
)
def test_settings_that_cannot_train_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DeploykitError):
        passes.build(Step("self_distill", options))


# ------------------------------------------------------------------ the paper's explanations


def test_the_spread_of_features_by_hand() -> None:
    features = np.array([[0.0], [2.0], [5.0], [5.0]])
    found = explanations.spread(features, np.array([0, 0, 1, 1]))
    assert (found.sse, found.ssb, found.ratio) == (2.0, 16.0, 0.125)  # means 1, 5 and 3


def test_all_squares_are_within_or_between_classes() -> None:
    random = np.random.default_rng(0)
    features, labels = random.standard_normal((50, 7)), random.integers(0, 3, 50)
    found = explanations.spread(features, labels)
    assert found.sse + found.ssb == pytest.approx(float(np.square(features - features.mean(0)).sum()))


def test_without_noise_the_accuracy_is_the_networks_and_with_much_it_is_chance() -> None:
    net = SelfDistill(steps=60, learning_rate=1e-2)(build().eval(), context(None))
    test = corners(200, seed=1)
    found = explanations.under_noise(net, test, (0.0, 0.1, 10.0))
    assert found[0.0] == explanations.accuracy(net, test) > 90
    assert found[0.0] >= found[0.1] > found[10.0]
    with pytest.raises(DeploykitError, match="no labels"):
        explanations.accuracy(net, corners(labels=False))


def test_gradient_sizes_by_hand() -> None:
    """y = w2 w1 x, L = y: dL/dw1 = w2 x, dL/dw2 = w1 x."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        net[0].weight.fill_(2.0)
        net[1].weight.fill_(5.0)
    data = DataSet.of({"input": np.array([[3.0]], np.float32)})
    found = explanations.gradient_sizes(net, lambda y, _: y.mean(), data, ("0", "1"))
    assert found == {"0": 15.0, "1": 6.0}
    assert net[0].weight.grad is None


def test_features_are_those_of_every_exit() -> None:
    whole = attach(build(), PLACES).eval()
    features = explanations.features_of(InTraining(whole), corners(40))
    assert [f.shape for f in features] == [(40, 12)] * 3
    expected = whole.look(**few(40)).features
    assert all(np.allclose(a, b.detach(), atol=1e-6) for a, b in itertools.zip_longest(features, expected))


def test_steps_that_train_do_not_stand_behind_exits_that_stay() -> None:
    kept, tuned = SelfDistill(keep_exits=True), passes.build(Step("finetune", {"steps": 1}))
    with pytest.raises(DeploykitError, match=r"Finetune\(.* cannot train a network with exits"):
        refuse_behind_exits([kept, tuned])
    refuse_behind_exits([tuned, kept, passes.build(Step("bias_correct", {}))])
    refuse_behind_exits([SelfDistill(), tuned])
