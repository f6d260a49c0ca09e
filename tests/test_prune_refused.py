"""What the pass prune refuses, and what it says then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import example
from pruned import Named, context, images, plain, prune
from torch import Tensor, nn

from deploykit import passes, targets
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.recipe import Step
from deploykit.losses import cross_entropy
from deploykit.passes.prune import Prune
from deploykit.passes.sensitivity import Sensitivity
from deploykit.pruning.criteria import importance
from deploykit.pruning.criteria.evidence import Evidence
from deploykit.pruning.groups import find_groups
from deploykit.pruning.surgery import assert_equal

Inputs = Mapping[str, Tensor]
X86 = targets.load("x86")


@pytest.mark.parametrize("options", [{}, {"amount": 0.5, "at_most": 3.0}, {"at_most": 0.0}, {"amount": 1.0},
                                     {"amount": -0.1}, {"amount": float("nan")},
                                     {"amount": 0.5, "most": 1.0}, {"amount": 0.5, "multiple": -1}])  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DeploykitError, match="step 'prune'"):
        passes.build(Step("prune", options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"skip": ["body.o"]}, "no layer 'body.o'. Did you mean 'body.7'"),
        ({"amount": 0.95, "most": 0.5}, "cannot be saved; at most"),
        ({"multiple": 65}, "cannot be saved; at most 0.0%"),
    ],
)
def test_what_cannot_be_done_is_said_with_what_can(options: dict[str, Any], said: str) -> None:
    net = Named(plain()).eval()
    step = passes.build(Step("prune", {"amount": 0.5, "criterion": "l1", "refit": False} | options))
    with pytest.raises(DeploykitError, match=said):
        step(net, context(net, images()))


def test_a_criterion_that_nobody_knows_is_refused_with_the_nearest() -> None:
    with pytest.raises(DeploykitError, match=r"no criterion 'tailor'\. Did you mean 'taylor'"):
        passes.build(Step("prune", {"amount": 0.5, "criterion": "tailor"}))


def test_a_step_needs_what_its_criterion_needs() -> None:
    assert [prune(0.5, criterion=c).needs for c in ("l2", "fisher", "snip")] == [(), ("data",), ("data", "labels")]
    assert Prune(0.5, criterion="l2").needs == ("data",)  # to fit what is left


def test_a_criterion_that_lacks_data_or_labels_says_so_before_any_work() -> None:
    net = Named(plain()).eval()
    here = context(net, images(labels=False))
    with pytest.raises(DeploykitError, match="needs calibration data: give --calib"):
        prune(0.5, criterion="taylor")(net, replace(here, data={}))
    with pytest.raises(DeploykitError, match="criterion 'snip' needs labels"):
        prune(0.5, criterion="snip")(net, here)


def test_a_model_that_cannot_be_followed_names_the_operation() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            if not bool(x.isfinite().all()):
                raise ValueError("not finite")
            return self.head(x)

    data = DataSet.of({"x": np.ones((4, 4), np.float32)})
    with pytest.raises(DeploykitError, match=r'cannot be followed through `raise ValueError\("not finite"\)`'):
        prune(0.5, criterion="l1")(Picky().eval(), context(Picky(), data))


def test_a_model_without_channels_to_take_is_refused() -> None:
    made = example("lstm")
    with pytest.raises(DeploykitError, match="no channels that can be taken out"):
        prune(0.5, criterion="l1")(made.module, context(made.module, made.data))


def test_layers_that_are_called_by_keyword_are_followed() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(input=torch.relu(self.norm(input=self.conv(input=x))))
            return y.mean((2, 3))

    net = ByName().eval()
    for criterion in ("fisher", "taylor", "activation"):
        found: Any = prune(0.3, criterion=criterion, of="channels", multiple=1)(net, context(net, images()))
        assert found.conv.out_channels == found.norm.num_features == found.last.in_channels < 8


def test_labels_that_cross_entropy_has_no_use_for_are_refused() -> None:
    data, random = images(labels=False), np.random.default_rng(0)
    x = next(data.batches(32)).inputs
    one, five = (Named(nn.Sequential(*list(plain().children())[:-1], nn.LazyLinear(n))).eval() for n in (1, 5))
    for net in (one, five):
        net(torch.from_numpy(x["x"]))
    for net, labels, said in (
        (one, random.normal(size=(32, 1)).astype(np.float32), "not one tensor of class scores .*file.py:function"),
        (one, np.zeros(32, np.int64), "not one tensor of class scores"),
        (five, random.normal(size=32).astype(np.float32), r"each of the 5 classes; given float32 \[32\]"),
        (five, np.full(32, 7), "label 7 is no class of this model, which has 5 of them, 0 to 4"),
        (five, np.zeros((32, 2), np.int64), r"labels \[32, 2\] do not fit class scores \[32, 5\]"),
    ):  # fmt: skip
        for loss in (None, cross_entropy):
            with pytest.raises(DeploykitError, match=said):
                prune(0.2)(net, context(net, DataSet.of(x, labels), loss=loss))
    soft = DataSet.of(x, random.random((32, 5)).astype(np.float32))
    assert prune(0.2)(five, context(five, soft)) is not five


def test_chance_draws_one_number_for_every_channel() -> None:
    """Sums over many weights are all alike, and wide layers would lose all or nothing."""
    net = Named(plain()).eval()
    inputs = {"x": torch.zeros(1, 3, 4, 4)}
    groups = find_groups(net, inputs)
    one, same, other = (importance(net, groups, "random", Evidence(inputs, seed=s)) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True)) and not torch.equal(one[0], other[0])
    drawn = torch.cat(one)
    assert drawn.min() < 0.2 and drawn.max() > 0.8 and drawn.min() >= 0 and drawn.max() < 1


def test_weights_that_are_not_finite_are_named() -> None:
    net = Named(plain()).eval()
    with torch.no_grad():
        next(net.parameters())[0] = torch.nan
    with pytest.raises(DeploykitError, match=r"prune: the weights 'body\.0\.weight' are not all finite"):
        prune(0.2, criterion="l1")(net, context(net, images()))


def test_a_layer_that_the_original_does_not_have_is_foreseen() -> None:
    net = Named(plain()).eval()
    here = context(net, images(), original=net)
    prune(0.2, criterion="l1", skip=("body.0",)).foresee(here)
    for step in (prune(0.2, criterion="l1", skip=("body.o",)), Sensitivity(skip=("body.o",))):
        with pytest.raises(DeploykitError, match=r"(prune|sensitivity): no layer 'body\.o'\. Did you mean"):
            step.foresee(here)


def test_a_check_that_fails_leaves_it_to_the_step_to_say_its_name() -> None:
    net, inputs = Named(plain()).eval(), {"x": torch.rand(2, 3, 4, 4)}
    other = Named(plain()).eval()
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    with pytest.raises(DeploykitError, match=r"^the pruned model computes something else"):
        assert_equal(net, other, {}, inputs)
