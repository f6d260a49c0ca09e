"""Channels go from everywhere they run through, and the pruned network is the whole one with those channels zeroed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, example
from hypothesis import given, settings
from hypothesis import strategies as st
from pruned import assert_pruned_is_zeroed, settled, some_of, writers
from torch import Tensor, nn

from deploykit import targets
from deploykit.pruning.crop import Port
from deploykit.pruning.groups import find_groups, together
from deploykit.pruning.surgery import without

Inputs = Mapping[str, Tensor]
X86 = targets.load("x86")


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
