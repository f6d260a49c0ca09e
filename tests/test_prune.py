"""Channels go from everywhere they run through, and the pruned network is the whole one with those channels zeroed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import deploykit as dk
from deploykit import passes, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import Finding
from deploykit.core.recipe import Step
from deploykit.core.request import Gate
from deploykit.cost import cost
from deploykit.hub.structure import attach_mask
from deploykit.losses import tensors
from deploykit.passes.prune import Prune
from deploykit.pruning.compensation import compensated
from deploykit.pruning.groups import Group, find_groups, together
from deploykit.pruning.layers import Port, axis, mixes, width
from deploykit.pruning.surgery import without, zeroed
from tests.families import FAMILIES, example

Inputs = Mapping[str, Tensor]
X86 = targets.load("x86")


def context(model: nn.Module, data: DataSet, **more: Any) -> Context:
    sample = next(data.batches(2)).inputs
    return Context(X86, {"calibration": data}, sample, cost=lambda m: cost(m, sample), **more)


def images(n: int = 32, channels: int = 3, side: int = 4, labels: bool = True) -> DataSet:
    random = np.random.default_rng(0)
    x = random.normal(size=(n, channels, side, side)).astype(np.float32)
    return DataSet.of({"x": x}, random.integers(0, 5, n) if labels else None)


def settled(net: nn.Module, seed: int = 0) -> nn.Module:
    """With norms that are not the identity."""
    random = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (layer.weight, 0.5, 1.5), (layer.bias, -0.5, 0.5),
                (layer.running_mean, -0.3, 0.3), (layer.running_var, 0.5, 2.0),
            ):  # fmt: skip
                tensor.data = torch.rand(tensor.shape, generator=random) * (high - low) + low
    return net.eval()


def silenced(model: nn.Module, removed: Mapping[Port, Any], inputs: Inputs) -> list[Tensor]:
    """What the whole model answers when nothing that reads the removed channels sees them: by hooks."""
    model = copy.deepcopy(model)
    hooks = []
    for port, numbers in removed.items():
        layer = model.get_submodule(port.layer)
        if port.side == "in" and mixes(layer):

            def hook(layer: nn.Module, given: tuple[Any, ...], numbers: Any = numbers) -> tuple[Any, ...]:
                x = given[0].clone()
                x.movedim(axis(layer, x), 0)[list(numbers)] = 0
                return x, *given[1:]

            hooks.append(layer.register_forward_pre_hook(hook))
    with torch.no_grad():
        return tensors(model(**inputs))


def answers(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return tensors(model(**inputs))


def assert_pruned_is_zeroed(model: nn.Module, inputs: Inputs, choose: Callable[[Group], list[int]]) -> int:
    """Takes the chosen channels of every group; returns how many went."""
    groups = find_groups(model, {name: t[:1] for name, t in inputs.items()})
    gone = [group.channels[i] for group in groups for i in choose(group)]
    removed = together(gone)
    found, expected = answers(without(model, removed), inputs), silenced(model, removed, inputs)
    for a, b, c in zip(found, expected, answers(zeroed(model, removed), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(c, b, rtol=1e-4, atol=1e-5)
    return len(gone)


def some_of(seed: int) -> Callable[[Group], list[int]]:
    random = np.random.default_rng(seed)

    def choose(group: Group) -> list[int]:
        n = len(group.channels)
        return sorted(random.permutation(n)[: random.integers(min(1, n - 1), n)].tolist())

    return choose


def writers(model: nn.Module, inputs: Inputs) -> list[tuple[int, tuple[str, ...]]]:
    """(channels, layers that write them) of every group."""
    return [(len(g.channels), g.writers) for g in find_groups(model, inputs)]


# ------------------------------------------------------------------ every family


NOTHING_TO_PRUNE = {"lstm", "gru"}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pruned_family_is_the_family_with_the_same_channels_zeroed(name: str) -> None:
    made = example(name)
    inputs = {n: torch.from_numpy(a) for n, a in next(made.data.batches(4)).inputs.items()}
    for seed in range(3):
        gone = assert_pruned_is_zeroed(made.module, inputs, some_of(seed))
        assert (gone == 0) == (name in NOTHING_TO_PRUNE)


@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["onnx", "openvino", "tflite", "c99", "tensorrt"])
@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in NOTHING_TO_PRUNE])
def test_a_pruned_family_goes_through_every_exporter_that_took_it_whole(name: str, exporter: str) -> None:
    from benchmarks.support import cell
    from deploykit.models import accept_module

    made = example(name)
    sample = {n: torch.from_numpy(a) for n, a in next(made.data.batches(1)).inputs.items()}
    gone = [c for group in find_groups(made.module, sample) for c in group.channels[::2][: len(group.channels) // 2]]
    pruned = replace(made, module=without(made.module, together(gone)))
    whole = cell(accept_module(made.module), made, exporter)
    assert cell(accept_module(pruned.module), pruned, exporter).state == whole.state


def test_a_residual_stream_goes_from_every_layer_that_writes_into_it() -> None:
    made = example("residual")
    sample = {"x": torch.zeros(1, 3, 16, 16)}
    found = dict((names, count) for count, names in writers(made.module, sample))
    assert found[("second.0", "shortcut.0", "fourth.0")] == 16


def test_the_stream_of_a_transformer_stays_because_its_normalisation_sees_all_channels() -> None:
    made = example("vit")
    sample = {"x": torch.zeros(1, 3, 16, 16)}
    assert {names for _, names in writers(made.module, sample)} == {("blocks.0.mlp.0",), ("blocks.1.mlp.0",)}


# ------------------------------------------------------------------ what code between layers does to channels


class OptionA(nn.Module):
    """He et al. 2016, the CIFAR networks: the shortcut takes every second pixel and pads channels with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.conv2 = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = self.conv2(F.relu(self.conv1(x)))
        x = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        return self.head(x.mean((2, 3)))


def test_channels_behind_a_padded_shortcut_have_moved_and_padding_itself_stays() -> None:
    torch.manual_seed(0)
    net = settled(OptionA())
    groups = find_groups(net, {"x": torch.zeros(1, 3, 8, 8)})
    (stream,) = [g for g in groups if "stem" in g.writers]
    assert len(stream.channels) == 8  # of the 16 behind the pad; zeros at 0..3 and 12..15 are code, not weights
    for channel in stream.channels:
        (c,) = channel[Port("stem", "out")]
        assert channel[Port("norm", "in")] == channel[Port("conv1", "in")] == (c,)
        assert channel[Port("conv2", "out")] == channel[Port("head", "in")] == (c + 4,)
    inputs = {"x": torch.randn(4, 3, 8, 8)}
    assert assert_pruned_is_zeroed(net, inputs, lambda g: [0, 2, 5]) == 6


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12)
        self.grouped, self.last = nn.Conv2d(12, 18, 3, groups=3), nn.ConvTranspose2d(18, 6, 2, groups=2)
        self.multiplied = nn.Conv2d(6, 12, 3, groups=6)
        self.head = nn.Linear(12 * 3 * 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(self.multiplied(F.relu(self.last(F.relu(self.grouped(x))))))
        return self.head(x.flatten(1))


def test_every_group_of_a_grouped_convolution_loses_as_many_channels() -> None:
    torch.manual_seed(0)
    net = settled(Grouped())
    first, grouped, last = find_groups(net, {"x": torch.zeros(1, 3, 8, 8)})
    assert [c[Port("first", "out")] for c in first.channels] == [(0, 4, 8), (1, 5, 9), (2, 6, 10), (3, 7, 11)]
    assert {len(c[Port("grouped", "out")]) for c in grouped.channels} == {18 // len(grouped.channels)}
    assert last.channels[0][Port("head", "in")][:18] == tuple(range(18))  # two maps of 3 x 3 for one channel of six
    pruned = without(net, together([first.channels[1], grouped.channels[0], last.channels[2]]))
    assert (pruned.grouped.in_channels, pruned.grouped.groups, pruned.multiplied.groups) == (9, 3, 4)
    for seed in range(4):
        assert assert_pruned_is_zeroed(net, {"x": torch.randn(2, 3, 8, 8)}, some_of(seed)) >= 0


class Attention(nn.Module):
    """Heads of a fixed size, as many as the projections are wide."""

    def __init__(self, width: int = 12, size: int = 4) -> None:
        super().__init__()
        self.size = size
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_whole_heads_of_attention_go() -> None:
    torch.manual_seed(0)
    net = Attention().eval()
    inputs = {"x": torch.randn(2, 5, 12)}
    (heads,) = find_groups(net, {"x": inputs["x"][:1]})
    assert sorted(heads.writers) == ["k", "q", "v"]
    assert [c[Port("out", "in")] for c in heads.channels] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]
    assert_pruned_is_zeroed(net, inputs, lambda g: [1])


def test_the_hidden_layer_of_torchs_own_encoder_goes() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    inputs = {"input": torch.randn(2, 5, 8)}
    assert writers(net, {"input": inputs["input"][:1]}) == [(16, ("0.linear1",))]
    pruned = without(net, together(find_groups(net, {"input": inputs["input"][:1]})[0].channels[3:9]))
    assert pruned(inputs["input"]).shape == (2, 5, 8)


def test_a_split_into_halves_stays_since_one_half_alone_would_shift_the_other() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.stem(x).chunk(2, 1)
            return torch.cat([self.left(a), self.right(b)], 1)

    assert find_groups(Halves().eval(), {"x": torch.zeros(1, 3, 4, 4)}) == []


def test_a_layer_called_twice_loses_one_channel_wherever_it_is_called() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.again(torch.relu(self.again(torch.relu(self.first(x))))))

    torch.manual_seed(0)
    net = Twice().eval()
    (group,) = find_groups(net, {"x": torch.zeros(1, 4)})
    assert sorted(group.writers) == ["again", "first"]
    assert_pruned_is_zeroed(net, {"x": torch.randn(3, 4)}, lambda g: [0, 4])


def test_weights_that_two_layers_share_or_somebody_else_parametrized_stay() -> None:
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(4, 2))
    tied[1].weight = tied[0].weight
    assert writers(tied.eval(), {"input": torch.zeros(1, 6)}) == [(4, ("2",))]
    normed = nn.Sequential(
        torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 6)), nn.Linear(6, 4), nn.Linear(4, 2)
    )
    assert writers(normed.eval(), {"input": torch.zeros(1, 3)}) == [(4, ("1",))]


def test_what_leaves_the_network_stays() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    assert writers(net.eval(), {"input": torch.zeros(1, 3)}) == [(6, ("0",))]


def test_what_leaves_as_a_class_number_stays_too() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(3, 6), nn.Linear(6, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.first(x))).argmax(-1)

    assert writers(Chosen().eval(), {"x": torch.zeros(1, 3)}) == [(6, ("first",))]


# ------------------------------------------------------------------ random graphs


class Program(nn.Module):
    """Runs a list of (operation, its layers, number) over a list of values; the last is pooled and classified."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self.steps: list[tuple[str, str, int, int]] = []
        widths = [4]
        self.layers["stem"] = nn.Conv2d(3, 4, 3, padding=1)
        for number, (kind, source, size) in enumerate(steps):
            a, b = source % len(widths), size % len(widths)
            count, name = widths[a], f"n{number}"
            if kind == "conv":
                self.layers[name] = nn.Conv2d(count, size, 3, padding=1)
                count = size
            elif kind == "grouped":
                groups = 2 if count % 2 == 0 else 1
                self.layers[name] = nn.Conv2d(count, 4, 1, groups=groups)
                count = 4
            elif kind == "depthwise":
                self.layers[name] = nn.Conv2d(count, count, 3, padding=1, groups=count)
            elif kind == "norm":
                self.layers[name] = nn.BatchNorm2d(count)
            elif kind == "transposed":
                self.layers[name] = nn.ConvTranspose2d(count, size, 1)
                count = size
            elif kind == "project":
                self.layers[name] = nn.Conv2d(count, widths[b], 1)
                count = widths[b]
            elif kind == "concat":
                count += widths[b]
            elif kind == "pad":
                count += 3
            elif kind == "gate":
                self.layers[name] = nn.Linear(count, count)
            widths.append(count)
            self.steps.append((kind, name, a, b))
        self.head = nn.Linear(widths[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        values = [self.layers["stem"](x)]
        for kind, name, a, b in self.steps:
            x = values[a]
            if kind == "project":
                x = self.layers[name](x) + values[b]
            elif kind == "concat":
                x = torch.cat([x, values[b]], 1)
            elif kind == "pad":
                x = F.pad(x, (0, 0, 0, 0, 1, 2))
            elif kind == "gate":
                x = x * torch.sigmoid(self.layers[name](x.mean((2, 3))))[:, :, None, None]
            else:
                x = torch.relu(self.layers[name](x))
            values.append(x)
        return self.head(values[-1].mean((2, 3)))


STEP = st.tuples(
    st.sampled_from(["conv", "grouped", "depthwise", "norm", "transposed", "project", "concat", "pad", "gate"]),
    st.integers(0, 9), st.integers(2, 6),
)  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(STEP, min_size=1, max_size=7), st.integers(0, 2**16))
def test_a_random_graph_pruned_is_the_graph_with_the_same_channels_zeroed(steps: Any, seed: int) -> None:
    torch.manual_seed(seed)
    net = settled(Program(steps), seed)
    assert_pruned_is_zeroed(net, {"x": torch.randn(2, 3, 4, 4)}, some_of(seed))


def test_random_graphs_have_channels_to_prune() -> None:
    torch.manual_seed(0)
    net = settled(Program([("conv", 0, 6), ("project", 0, 2), ("concat", 2, 4), ("norm", 3, 2), ("pad", 4, 2)]))
    assert assert_pruned_is_zeroed(net, {"x": torch.randn(2, 3, 4, 4)}, lambda g: [0]) >= 2


# ------------------------------------------------------------------ the pass


def plain(width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential()
    for i, (a, b) in enumerate([(3, width), (width, 2 * width), (2 * width, 2 * width)]):
        net.append(nn.Conv2d(a, b, 3, padding=1, bias=False)).append(nn.BatchNorm2d(b)).append(nn.ReLU())
        if i == 0:
            net.append(nn.Dropout(0.1))
    return settled(net.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(2 * width, 5)))


def prune(amount: float, **options: Any) -> Prune:
    """Takes channels out and leaves the other weights as they are."""
    return Prune(amount, refit=False, **options)


class Named(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("of", ["macs", "params", "bytes", "channels"])
@pytest.mark.parametrize("amount", [0.3, 0.5])
def test_a_budget_is_met_within_a_point(of: str, amount: float) -> None:
    net, data = Named(plain(64)).eval(), images()
    here = context(net, data)
    pruned = prune(amount, of=of, criterion="l2", multiple=1)(net, here)
    if of == "channels":
        left, whole = (sum(width(m, "out") for m in n.modules() if mixes(m)) for n in (pruned, net))
    else:
        left, whole = (getattr(cost(n, here.example), of) for n in (pruned, net))
    assert amount <= 1 - left / whole <= amount + 0.01 + 0.005 * (of == "channels")


def prepared_for(target: str, net: nn.Module, data: DataSet, **settings: Any) -> Context:
    """The context that the pipeline makes."""
    from deploykit import pipeline
    from deploykit.core.request import Settings
    from deploykit.models import accept_module
    from deploykit.pipeline.steps import step_context

    prepared = pipeline.prepare(accept_module(net), {"calibration": data}, None)
    return step_context(prepared, Settings(**settings), targets.load(target))


@pytest.mark.parametrize("target", ["x86", "cortex-m7"])
def test_a_draft_takes_the_bytes_of_the_file_that_an_export_writes(target: str, tmp_path: Path) -> None:
    net, data = Named(plain()).eval(), images(40)
    here = prepared_for(target, net, data)
    assert here.file_bytes is not None
    assert here.file_bytes(net) == pytest.approx(exported(net, target, data, tmp_path), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["x86", "cortex-m7"])
def test_the_file_of_a_pruned_network_takes_at_most_the_bytes_that_were_asked_for(target: str, tmp_path: Path) -> None:
    net, data = Named(plain(64)).eval(), images(40)
    here = prepared_for(target, net, data)
    assert here.file_bytes is not None
    bound = 0.6 * here.file_bytes(net)
    step = Prune(at_most=bound, of="artifact", criterion="l2", multiple=1, refit=False)
    assert 0.9 * bound < exported(step(net, here), target, data, tmp_path) <= 1.01 * bound


@pytest.mark.slow
def test_a_network_that_is_too_large_for_a_board_is_pruned_until_it_fits() -> None:
    net, data = Named(plain(64)).eval(), images(40)
    here = prepared_for("cortex-m4", net, data)
    tight = replace(here.target, options={**here.target.options, "flash_bytes": 60_000})
    small = prepared_for("cortex-m4", net, data)
    assert small.file_bytes is not None
    assert small.file_bytes(net) > 60_000  # a draft is written all the same
    step = Prune(at_most=60_000, of="artifact", criterion="l2", multiple=1, refit=False)
    pruned = step(net, replace(here, target=tight))
    assert small.file_bytes(pruned) <= 60_000


def test_a_budget_of_milliseconds_is_met_with_few_and_noisy_measurements() -> None:
    """A device whose time is 1 ms and what its MACs take, known to five percent."""
    net, data = Named(plain(64)).eval(), images()
    here = context(net, data)
    random, looks = np.random.default_rng(0), []

    def times(modules: Any) -> list[float]:
        looks.append(len(modules))
        return [(1.0 + cost(m, here.example).macs / 1e5) * random.uniform(0.975, 1.025) for m in modules]

    whole = 1.0 + cost(net, here.example).macs / 1e5
    step = Prune(0.4, of="ms", criterion="l2", multiple=1, refit=False)
    left = 1.0 + cost(step(net, replace(here, times=times)), here.example).macs / 1e5
    assert 1 - left / whole == pytest.approx(0.4, abs=0.06)
    assert len(looks) <= 9 and set(looks) == {2}
    looks.clear()
    step = Prune(at_most=0.7 * whole, of="ms", criterion="l2", multiple=1, refit=False)
    left = 1.0 + cost(step(net, replace(here, times=times)), here.example).macs / 1e5
    assert left == pytest.approx(0.7 * whole, rel=0.1)


def exported(model: nn.Module, target: str, data: DataSet, folder: Path) -> int:
    """Bytes of the int8 file."""
    x = next(data.batches(len(data))).inputs["x"]
    made = dk.export(model, target, x, out=folder / "out", benchmark=False, gate=Gate(min_agreement=0.0))
    return made.file("int8").size(made.folder)


def test_files_of_networks_are_timed_in_turns_where_times_here_are_the_targets() -> None:
    net, data = Named(plain(64)).eval(), images(40)
    here = prepared_for("x86", net, data)
    narrow = prune(0.7, criterion="l2", multiple=16)(net, here)
    assert here.times is not None
    before, after = here.times([net, narrow])
    assert 0 < after < before


def test_milliseconds_of_a_target_that_is_not_timed_here_are_refused_before_any_work() -> None:
    net, data = Named(plain()).eval(), images()
    with pytest.raises(DeploykitError, match=r"'jetson'.*not timed on this machine\. The nearest is of = 'macs'"):
        Prune(0.3, of="ms")(net, prepared_for("jetson", net, images(64)))
    with pytest.raises(DeploykitError, match="the context writes no files"):
        prune(0.3, of="artifact", criterion="l2")(net, context(net, data))


@pytest.mark.parametrize("of", ["macs", "params", "channels"])
def test_a_budget_may_be_absolute(of: str) -> None:
    net, data = Named(plain(64)).eval(), images()
    here = context(net, data)

    def size(model: nn.Module) -> float:
        if of == "channels":
            return sum(width(m, "out") for m in model.modules() if mixes(m))
        return float(getattr(cost(model, here.example), of))

    bound = 0.62 * size(net)
    pruned = Prune(at_most=bound, of=of, criterion="l2", multiple=1, refit=False)(net, here)  # type: ignore[arg-type]
    assert 0.97 * bound < size(pruned) <= bound
    roomy = Prune(at_most=2 * size(net), of=of, criterion="l2", refit=False)(net, here)  # type: ignore[arg-type]
    assert size(roomy) == size(net)


def test_what_went_from_where_is_noted_for_the_report() -> None:
    net, data = Named(plain(64)).eval(), images()
    found: list[Finding] = []
    pruned = prune(0.5, criterion="l2", multiple=1)(net, replace(context(net, data), note=found.append))
    (finding,) = found
    assert finding.columns == ("layer", "channels", "left")
    for name, before, left in finding.rows:
        assert before == width(net.get_submodule(str(name)), "out")
        assert left == width(pruned.get_submodule(str(name)), "out")
    assert "of the macs saved" in finding.title


def test_the_least_important_channels_go() -> None:
    """Weights of channel c are c + 1 times as large, so that of 8 channels the first three go."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(1.0, 9.0)[:, None].expand(8, 4))
    data = DataSet.of({"input": np.ones((4, 4), np.float32)})
    pruned = prune(0.3, of="params", criterion="l2", multiple=1)(net, context(net, data))
    assert pruned[0].weight[:, 0].tolist() == [4.0, 5.0, 6.0, 7.0, 8.0]


def test_what_is_left_of_a_layer_is_a_multiple_of_what_the_target_wants() -> None:
    net, data = Named(plain()).eval(), images()
    here = context(net, data)
    for multiple, wanted in ((0, 16), (8, 8)):
        pruned = prune(0.3, criterion="l1", multiple=multiple)(net, here)
        assert {m.out_channels % wanted for m in pruned.modules() if isinstance(m, nn.Conv2d)} == {0}
    assert X86.channel_multiple == 16


def test_scope_layer_takes_the_same_share_of_every_layer() -> None:
    net, data = Named(plain()).eval(), images()
    pruned = prune(0.5, of="channels", criterion="l1", scope="layer", multiple=1)(net, context(net, data))
    shares = [m.out_channels / w for m, w in zip([m for m in pruned.modules() if isinstance(m, nn.Conv2d)],
                                                 (32, 64, 64), strict=True)]  # fmt: skip
    assert max(shares) - min(shares) < 0.04


def test_layers_that_are_skipped_keep_their_channels_and_no_layer_loses_more_than_most() -> None:
    net, data = Named(plain()).eval(), images()
    pruned = prune(0.5, criterion="l1", multiple=1, skip=("body.0",), most=0.75)(net, context(net, data))
    widths = [m.out_channels for m in pruned.modules() if isinstance(m, nn.Conv2d)]
    assert widths[0] == 32 and min(widths[1:]) >= 16


def test_nothing_to_save_is_nothing_removed() -> None:
    net, data = Named(plain()).eval(), images()
    pruned = prune(0.0, criterion="l1")(net, context(net, data))
    assert cost(pruned, context(net, data).example) == cost(net, context(net, data).example)


@pytest.mark.parametrize("training", [False, True])
def test_the_users_model_is_left_as_it_is_and_the_copy_is_in_its_mode(training: bool) -> None:
    net, data = Named(plain()).train(training), images()
    net.body[0].weight.requires_grad_(False)
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    pruned = prune(0.4, criterion="taylor", multiple=1)(net, context(net, data))
    assert [m.training for m in net.modules()] == modes == [m.training for m in pruned.modules()]
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.values(), strict=True))
    assert not pruned.body[0].weight.requires_grad and pruned.body[4].weight.requires_grad


def test_zeros_of_an_earlier_step_stay_zero() -> None:
    net, data = Named(plain()).eval(), images()
    here = context(net, data)
    sparse = copy.deepcopy(net)
    attach_mask(sparse.body[4], "weight", sparse.body[4].weight > 0)
    pruned = prune(0.4, criterion="l1", multiple=1)(sparse, here)
    weight = pruned.body[4].weight
    assert weight.shape[1] == pruned.body[0].out_channels < 32
    held = weight == 0
    assert 0.1 < held.float().mean() < 0.9
    with torch.no_grad():
        pruned.body[4].weight = torch.ones_like(weight)
    assert torch.equal(pruned.body[4].weight == 0, held)


class Redundant(nn.Module):
    """Every hidden unit is there twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 5)
        with torch.no_grad():
            self.first.weight[6:] = self.first.weight[:6]
            self.first.bias[6:] = self.first.bias[:6]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.first(x))))


def test_what_left_weights_can_make_good_they_make_good() -> None:
    net = Redundant().eval()
    x = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    data = DataSet.of({"x": x}, np.arange(200) % 5)
    (group,) = find_groups(net, {"x": torch.zeros(1, 6)})
    removed = together(group.channels[:6])
    (whole,) = answers(net, {"x": torch.from_numpy(x)})
    (cut,) = answers(without(net, removed), {"x": torch.from_numpy(x)})
    (fitted,) = answers(without(compensated(net, removed, data), removed), {"x": torch.from_numpy(x)})
    assert float((cut - whole).square().mean()) > 1e-3
    assert float((fitted - whole).square().mean()) < 1e-2 * float((cut - whole).square().mean())


def test_the_pass_fits_what_is_left_and_keeps_zeros_modes_and_the_users_model() -> None:
    net, data = Named(plain()).train(), images(48)
    attach_mask(net.body[4], "weight", net.body[4].weight > 0)
    before = copy.deepcopy(net.state_dict())
    here = context(net, data)
    step = Prune(0.4, criterion="l1", multiple=1)
    fitted, cut = step(net, here), replace(step, refit=False)(net, here)
    shapes = [[p.shape for p in module.parameters()] for module in (fitted, cut)]
    assert shapes[0] == shapes[1]
    assert fitted.training and all(torch.equal(a, before[k]) for k, a in net.state_dict().items())
    assert torch.equal(fitted.body[4].weight == 0, cut.body[4].weight == 0)
    x = {"x": torch.from_numpy(next(data.batches(48)).inputs["x"])}
    (whole,), (one,), (other,) = (answers(copy.deepcopy(module).eval(), x) for module in (net, fitted, cut))
    assert float((one - whole).square().mean()) < 0.5 * float((other - whole).square().mean())


def test_too_few_samples_to_fit_weights_to_are_refused() -> None:
    net = Named(plain()).eval()
    with pytest.raises(DeploykitError, match="at least 32 calibration samples; there are 31"):
        Prune(0.5, criterion="l1")(net, context(net, images(31)))


def test_without_labels_the_models_own_answers_stand_for_them() -> None:
    net, data = Named(plain()).eval(), images(labels=False)
    own = answers(net, {"x": torch.from_numpy(next(data.batches(32)).inputs["x"])})[0].argmax(1).numpy()
    for criterion in ("taylor", "hessian", "fisher"):
        step = prune(0.4, criterion=criterion, multiple=1)
        one, two = step(net, context(net, data)), step(net, context(net, replace(data, labels=own)))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 4)
    def forward(self, x):
        x = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        return self.head(torch.relu(self.conv3(x)).mean((2, 3)))

def build():
    torch.manual_seed(1)
    return Net()
"""


def test_a_pruned_model_is_written_read_pruned_once_more_and_exported(tmp_path: Path) -> None:
    from deploykit.cli import main

    (tmp_path / "net.py").write_text(NET)
    np.save(tmp_path / "calib.npy", next(images(40).batches(40)).inputs["x"])
    (tmp_path / "prune.toml").write_text(
        '[[step]]\nname = "prune"\namount = 0.3\ncriterion = "l1"\nmultiple = 2\n'
        '[[step]]\nname = "reestimate_bn"\n[[step]]\nname = "sparsify"\nsparsity = 0.3\n'
    )
    source, calib = f"{tmp_path}/net.py:build", f"--calib {tmp_path}/calib.npy"

    def run(command: str) -> None:
        with pytest.raises(SystemExit) as end:
            main(command.split())
        assert not end.value.code

    run(f"compress {source} --recipe {tmp_path}/prune.toml {calib} --force -o {tmp_path}/small")
    small = dk.load(str(tmp_path / "small"))
    assert 2 <= small.conv1.out_channels < 16 and small.conv2.groups == small.conv1.out_channels
    run(f"compress {tmp_path}/small --recipe {tmp_path}/prune.toml {calib} --force -o {tmp_path}/smaller")
    smaller = dk.load(str(tmp_path / "smaller"))
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in small.parameters())
    run(f"export {tmp_path}/smaller --target x86 {calib} --precision fp32 --no-benchmark -o {tmp_path}/out")
    x = next(images(40).batches(8)).inputs["x"]
    found = dk.open_artifact(tmp_path / "out")(x, precision="fp32")
    np.testing.assert_allclose(
        next(iter(found.values())), answers(smaller, {"x": torch.from_numpy(x)})[0].numpy(), atol=1e-4
    )


@pytest.mark.parametrize(
    "sizes", ['{"conv9": {"out_channels": 3}}', '{"conv1": {"depth": 3}}', '{"head": {"out_channels": 3}}']
)
def test_sizes_that_the_factory_does_not_know_are_refused(tmp_path: Path, sizes: str) -> None:
    from deploykit.models import load_model, save_compressed

    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "small").mkdir()
    module = load_model(f"{tmp_path}/net.py:build").module
    assert module is not None
    save_compressed(module, tmp_path / "small", f"{tmp_path}/net.py:build")
    file = tmp_path / "small" / "structure.json"
    file.write_text(file.read_text().replace('"sizes": {}', f'"sizes": {sizes}'))
    with pytest.raises(DeploykitError, match=r"structure\.json does not fit"):
        load_model(str(tmp_path / "small"))


# ------------------------------------------------------------------ what is refused


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
