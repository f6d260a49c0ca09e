"""Criteria score what their papers say, on networks small enough to work out by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from deploykit import targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.passes.sparsify import Sparsify
from deploykit.pruning.criteria import CRITERIA, comparable, importance
from deploykit.pruning.criteria.activation import activation
from deploykit.pruning.criteria.bn_scale import bn_scale
from deploykit.pruning.criteria.chance import chance
from deploykit.pruning.criteria.evidence import Evidence
from deploykit.pruning.criteria.fisher import fisher
from deploykit.pruning.criteria.fpgm import fpgm
from deploykit.pruning.criteria.hessian import hessian
from deploykit.pruning.criteria.magnitude import l1, l2
from deploykit.pruning.criteria.oracle import oracle
from deploykit.pruning.criteria.snip import snip
from deploykit.pruning.criteria.synflow import synflow
from deploykit.pruning.criteria.taylor import taylor
from deploykit.pruning.crop import Port
from deploykit.pruning.groups import Group, find_groups


def linear(weight: Sequence[Sequence[float]]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight = nn.Parameter(torch.tensor(weight))
    return layer


def evidence(x: object, labels: object = None, **more: object) -> Evidence:
    array = np.asarray(x, np.float32)
    data = DataSet.of({"input": array}, None if labels is None else np.asarray(labels))
    return Evidence({"input": torch.from_numpy(array[:1])}, data, **more)  # type: ignore[arg-type]


def total(outputs: Tensor, _batch: object) -> Tensor:
    """A cost whose slopes are easily seen: the mean over examples of the sum of the outputs."""
    return outputs.flatten(1).sum(1).mean()


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


def pictures(n: int = 12) -> Evidence:
    random = np.random.default_rng(1)
    return evidence(random.normal(size=(n, 3, 6, 6)), random.integers(0, 4, n), batch=5)


# ------------------------------------------------------------------ one by one


def test_magnitude_is_that_of_the_weights() -> None:
    net, any_ = nn.Sequential(linear([[-2.0, 3.0]])), evidence([[0.0, 0.0]])
    assert l1(net, ["0"], any_)["0"].tolist() == [[2.0, 3.0]]
    assert l2(net, ["0"], any_)["0"].tolist() == [[4.0, 9.0]]


def test_bn_scale_is_the_size_of_gamma() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3))
    net[1].weight = nn.Parameter(torch.tensor([-0.5, 2.0, 0.0]))
    assert bn_scale(net, ["0", "1"], evidence([[0.0]])).keys() == {Port("1", "in")}
    assert bn_scale(net, ["1"], evidence([[0.0]]))[Port("1", "in")].tolist() == [0.5, 2.0, 0.0]


def test_taylor_is_molchanovs_formula() -> None:
    """Two maps of two positions; C = sum of w_km z_km, so dC/dz is the weight that reads the place."""
    net = nn.Sequential(
        nn.Unflatten(1, (1, 1, 2)), nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), linear([[1.0, 2.0, 3.0, -1.0]])
    )
    net[1].weight = nn.Parameter(torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))
    x = [[1.0, 1.0], [4.0, -1.0]]
    # map 0 is x, map 1 is 2 x; the linear layer reads both, flattened: every place is a channel of one position
    found = taylor(net, ["3"], evidence(x, loss=total))[Port("3", "in")]
    theta = np.abs(np.array([[1, 2, 6, -2], [4, -2, 24, 2]])).sum(0)
    np.testing.assert_allclose(found, theta / np.linalg.norm(theta), rtol=1e-6)


def test_taylor_averages_over_positions_before_the_absolute_value_and_over_examples_after_it() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False))
    net[0].weight, net[1].weight = (nn.Parameter(torch.tensor(w).view(s)) for w, s in
                                    (([1.0, 2.0], (2, 1, 1, 1)), ([3.0, 1.0], (1, 2, 1, 1))))  # fmt: skip
    x = np.array([[1.0, -3.0], [2.0, 2.0]]).reshape(2, 1, 1, 2)
    found = taylor(net, ["1"], evidence(x, loss=total))[Port("1", "in")]
    # z_0 = x, z_1 = 2x, slopes 3 and 1: |mean(3, -9)| + |mean(6, 6)| = 9 and |mean(2, -6)| + |mean(4, 4)| = 6
    np.testing.assert_allclose(found, np.array([9.0, 6.0]) / np.hypot(9.0, 6.0), rtol=1e-6)


def test_fisher_squares_what_a_whole_map_changes_for_one_example() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False))
    net[0].weight, net[1].weight = (nn.Parameter(torch.tensor(w).view(s)) for w, s in
                                    (([1.0, 2.0], (2, 1, 1, 1)), ([3.0, 1.0], (1, 2, 1, 1))))  # fmt: skip
    group = Group(tuple({Port("0", "out"): (c,), Port("1", "in"): (c,)} for c in range(2)))
    x = np.array([[1.0, -3.0], [2.0, 2.0]]).reshape(2, 1, 1, 2)
    for batch in (1, 2, 64):
        (found,) = fisher(net, [group], evidence(x, loss=total, batch=batch))
        # sums of slope times z by example: -6 and 12 of map 0, -4 and 8 of map 1
        np.testing.assert_allclose(found, [(36 + 144) / 4, (16 + 64) / 4], rtol=1e-6)


def test_hessian_is_the_mean_over_all_samples_of_squared_slopes() -> None:
    """One weight w = 2 and C = w x: slopes are 1, 2, 4, so h = 21 / 3 and the score is h w² / 2 = 14."""
    net = nn.Sequential(linear([[2.0]]))
    for batch in (1, 2, 3):
        found = hessian(net, ["0"], evidence([[1.0], [2.0], [4.0]], loss=total, batch=batch))
        np.testing.assert_allclose(found["0"], [[14.0]], rtol=1e-6)


def test_snip_is_weight_times_mean_slope() -> None:
    net = nn.Sequential(linear([[2.0, -1.0]]))
    found = snip(net, ["0"], evidence([[1.0, 1.0], [3.0, -5.0]], loss=total))["0"]
    np.testing.assert_allclose(found / found.sum(), np.array([[4.0, 2.0]]) / 6.0, rtol=1e-6)


def test_activation_weighs_weights_by_the_norm_of_what_they_read() -> None:
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(7, 4, 3, 3)).astype(np.float32)
    norms = np.sqrt(np.square(x).sum((0, 2, 3)))
    given = Evidence({}, DataSet.of({"input": x}), batch=3)
    for layer in (nn.Conv2d(4, 6, 2), nn.Conv2d(4, 6, 2, groups=2), nn.ConvTranspose2d(4, 6, 2, groups=2)):
        weight = layer.weight.detach().abs().numpy()
        expected = weight.copy()
        for c in range(4):
            if layer.transposed:
                expected[c] *= norms[c]
            else:
                inside = 4 // layer.groups
                rows = slice(c // inside * (6 // layer.groups), (c // inside + 1) * (6 // layer.groups))
                expected[rows, c % inside] *= norms[c]
        np.testing.assert_allclose(activation(nn.Sequential(layer), ["0"], given)["0"], expected, rtol=1e-5)


def test_fpgm_is_the_sum_of_distances_from_all_filters() -> None:
    net = nn.Sequential(linear([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]]))
    found = fpgm(net, ["0"], evidence([[0.0, 0.0]]))[Port("0", "out")]
    np.testing.assert_allclose(found, [5 + 1, 5 + np.hypot(3, 3), 1 + np.hypot(3, 3)], rtol=1e-6)


def test_chance_is_the_seeds() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    one, same, other = (chance(net, ["0"], evidence([[0.0] * 4], seed=s))["0"] for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_oracle_is_the_true_change_of_the_cost() -> None:
    net = nn.Sequential(linear([[1.0], [2.0]]), linear([[3.0, -1.0]]))
    (group,) = find_groups(net.eval(), {"input": torch.ones(1, 1)})
    (found,) = oracle(net, [group], evidence([[1.0], [2.0], [3.0]], loss=total, batch=2))
    np.testing.assert_allclose(found, [6.0, 4.0], rtol=1e-6)  # |3 x| and |-2 x| with x = 2 in the mean


# ------------------------------------------------------------------ SynFlow


def test_the_same_synaptic_flow_runs_through_every_layer() -> None:
    net = convolutional()
    layers = ["0", "3", "7"]
    flows = [float(s.sum()) for s in synflow(net, layers, pictures()).values()]
    np.testing.assert_allclose(flows, flows[0], rtol=1e-9)


def test_synflow_needs_no_data_and_does_not_overflow_in_deep_networks() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*[layer for _ in range(40) for layer in (nn.Linear(64, 64), nn.ReLU())])
    for layer in net[::2]:
        nn.init.normal_(layer.weight, std=1.0)
    scores = synflow(net, ["0", "78"], Evidence({"input": torch.zeros(1, 64)}))
    assert all(s.dtype == torch.float64 and bool(s.isfinite().all()) for s in scores.values())


def test_at_one_percent_synflow_empties_no_layer_and_magnitude_does() -> None:
    torch.manual_seed(0)
    widths = (32, 256, 256, 256, 16, 256, 10)
    net = nn.Sequential(*[m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())])
    layers, given = [str(2 * i) for i in range(len(widths) - 1)], Evidence({"input": torch.zeros(1, 32)})
    context = Context(targets.load("mobile-arm"), example={"input": np.zeros((2, 32), np.float32)})
    sparse = Sparsify(0.99, "synflow")(net, context)
    masks = {name: sparse.state_dict()[f"{name}.parametrizations.weight.0.mask"] for name in layers}
    assert all(bool(mask.any()) for mask in masks.values())
    left, whole = (sum(int(f(m)) for m in masks.values()) for f in (torch.sum, torch.numel))
    assert left == round(0.01 * whole)
    magnitudes = torch.cat([s.flatten() for s in l1(net, layers, given).values()])
    bar = magnitudes.sort(descending=True).values[left]
    assert any(not bool((s > bar).any()) for s in l1(net, layers, given).values())
    assert float(net[0].weight.detach().abs().min()) > 0  # the network is as it was


# ------------------------------------------------------------------ together


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_ranks_every_channel_and_leaves_the_model_alone(name: str) -> None:
    net, given = convolutional(), pictures()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    groups = find_groups(net, given.sample)
    if name == "bn_scale":
        groups = groups[:1]
    scores = importance(net, groups, name, given)
    assert [len(s) for s in scores] == [len(g.channels) for g in groups]
    assert all(s.dtype == torch.float64 and bool((s >= 0).all() and s.isfinite().all()) for s in scores)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_a_channel_is_worth_the_weights_that_write_it_in_all_layers() -> None:
    net = convolutional()
    first, second = find_groups(net, pictures().sample)
    scores = importance(net, [first, second], "l1", pictures())
    rows = net[0].weight.detach().abs().sum((1, 2, 3)).double()
    torch.testing.assert_close(scores[0], torch.stack([rows[list(c[Port("0", "out")])].sum() for c in first.channels]))


def test_where_normalisation_is_missing_its_scale_cannot_rank() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    groups = find_groups(net, {"input": torch.zeros(1, 4)})
    with pytest.raises(DeploykitError, match="'bn_scale' cannot rank the channels of 0"):
        importance(net, groups, "bn_scale", evidence([[0.0] * 4]))


def test_a_cost_without_labels_needs_class_scores() -> None:
    with pytest.raises(DeploykitError, match="not one tensor of class scores"):
        hessian(nn.Sequential(linear([[1.0]])), ["0"], evidence([[1.0]]))


def test_scores_in_units_of_the_cost_are_divided_by_what_a_channel_saves_and_others_by_their_mean() -> None:
    scores = [torch.tensor([1.0, 3.0]), torch.tensor([10.0, 10.0])]
    assert [s.tolist() for s in comparable(scores, [0.5, 2.0], True)] == [[2.0, 6.0], [5.0, 5.0]]
    assert [s.tolist() for s in comparable(scores, [0.5, 2.0], False)] == [[0.5, 1.5], [1.0, 1.0]]


def test_second_order_agrees_with_the_oracle_better_than_chance_does() -> None:
    torch.manual_seed(0)
    net, random = convolutional(), np.random.default_rng(0)
    x = random.normal(size=(64, 3, 6, 6)).astype(np.float32)
    given = evidence(x, net(torch.from_numpy(x)).argmax(1).numpy())
    groups = find_groups(net, given.sample)
    truth = torch.cat(importance(net, groups, "oracle", given)).numpy()
    agreement = {n: spearmanr(torch.cat(importance(net, groups, n, given)).numpy(), truth).statistic
                 for n in ("fisher", "taylor", "random")}  # fmt: skip
    assert min(agreement["fisher"], agreement["taylor"]) > max(0.4, agreement["random"])


class Block(nn.Module):
    """Of ResNet-18 (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


def test_resnet_18_loses_channels_of_its_stages_and_inside_its_blocks() -> None:
    blocks = [
        (64, 64, 1),
        (64, 64, 1),
        (64, 128, 2),
        (128, 128, 1),
        (128, 256, 2),
        (256, 256, 1),
        (256, 512, 2),
        (512, 512, 1),
    ]
    net = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        *[Block(*b) for b in blocks], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10),
    ).eval()  # fmt: skip
    sample = {"input": torch.zeros(1, 3, 32, 32)}
    groups = find_groups(net, sample)
    assert sum(len(g.channels) for g in groups) == 64 * 3 + 128 * 3 + 256 * 3 + 512 * 3
