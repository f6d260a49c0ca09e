"""Depthwise-separable rewriting: the nearest there is, everything else as it was, and what comes after it works."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

import deploykit as dk
from deploykit import passes, pipeline, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import Finding, load_manifest
from deploykit.core.recipe import Recipe, Step, TrainSettings
from deploykit.cost import cost
from deploykit.hub.structure import mask_of
from deploykit.losses import TrainBatch, cross_entropy
from deploykit.models import load_model
from deploykit.passes.compact import Compact
from deploykit.training.trainer import Trainer

DEVICE = "mobile-arm" if importlib.util.find_spec("ai_edge_litert") else "x86"


def context(x: Tensor, found: list[Finding] | None = None) -> Context:
    example = {"input": x.numpy()}
    note = (found if found is not None else []).append
    return Context(targets.load("x86"), {}, example, cost=lambda m: cost(m, example), note=note)


def rewritten(net: nn.Module, x: Tensor, found: list[Finding] | None = None, **options: Any) -> nn.Module:
    return Compact(**options)(net, context(x, found))


def alone(conv: nn.Module) -> nn.Module:
    return nn.Sequential(conv).eval()


def kernels(net: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(m.weight.shape) for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}


# ------------------------------------------------------------------ how near


def test_kernels_of_rank_one_are_kept_exactly() -> None:
    conv = nn.Conv2d(6, 20, 3, padding=1)
    conv.weight.data = torch.einsum("fc,cyx->fcyx", torch.randn(20, 6), torch.randn(6, 3, 3))
    net, x = alone(conv), torch.randn(2, 6, 7, 7)
    made = rewritten(net, x, layers=("0",))
    assert list(kernels(made).values()) == [(6, 1, 3, 3), (20, 6, 1, 1)]
    torch.testing.assert_close(made(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("multiplier", [1, 2])
def test_other_kernels_become_the_nearest_there_is(multiplier: int) -> None:
    """By NumPy's singular value decomposition: what is lost is what the other singular values have."""
    conv = nn.Conv2d(5, 16, (3, 2))
    made: Any = rewritten(alone(conv), torch.randn(2, 5, 6, 6), layers=("0",), multiplier=multiplier)
    depthwise, pointwise = (m.weight.detach().double().numpy() for m in made[0])
    w = conv.weight.detach().double().numpy()
    for c in range(5):
        own = slice(c * multiplier, (c + 1) * multiplier)
        found = pointwise[:, own, 0, 0] @ depthwise[own].reshape(multiplier, 6)
        u, s, v = np.linalg.svd(w[:, c].reshape(16, 6), full_matrices=False)
        best = (u[:, :multiplier] * s[:multiplier]) @ v[:multiplier]
        np.testing.assert_allclose(found, best, atol=1e-6)
    assert made[0][1].bias is not None and torch.equal(made[0][1].bias, conv.bias)


def test_more_kernels_per_channel_start_nearer() -> None:
    net, x = alone(nn.Conv2d(8, 32, 3)), torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        errors = [float((rewritten(net, x, layers=("0",), multiplier=m)(x) - net(x)).norm()) for m in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.7 * errors[0]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_stride_padding_and_dilation_stays(data: st.DataObject) -> None:
    """Seen exactly: kernels of rank one compute the same."""

    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    c, kernel, mode = draw(1, 5), (draw(1, 3), draw(2, 4)), data.draw(st.sampled_from(["zeros", "reflect", "circular"]))
    padding: Any = data.draw(st.sampled_from(["valid", (draw(0, 2), draw(0, 2))]))
    stride, dilation = (draw(1, 3), draw(1, 3)), (draw(1, 2), draw(1, 2))
    conv = nn.Conv2d(c, 30, kernel, stride, padding, dilation, bias=data.draw(st.booleans()), padding_mode=mode)
    conv.weight.data = torch.einsum("fc,cyx->fcyx", torch.randn(30, c), torch.randn(c, *kernel))
    net, x = alone(conv), torch.randn(2, c, draw(7, 12), draw(7, 12))
    found = rewritten(net, x, layers=("0",))(x)
    torch.testing.assert_close(found, net(x), rtol=1e-3, atol=1e-4)


def test_series_and_volumes_are_rewritten_too() -> None:
    for kind, shape in ((nn.Conv1d, (2, 6, 9)), (nn.Conv3d, (2, 6, 5, 5, 5))):
        net = alone(kind(6, 24, 3, stride=2, padding=1))  # type: ignore[arg-type]
        x = torch.randn(shape)
        made: Any = rewritten(net, x, layers=("0",))
        assert made(x).shape == net(x).shape and made[0][0].groups == 6


def test_a_class_of_the_users_goes_on_doing_what_it_did() -> None:
    class Padded(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(nn.functional.pad(input, (0, 1, 0, 1)))

    conv = Padded(4, 16, 3, stride=2)
    conv.weight.data = torch.einsum("fc,cyx->fcyx", torch.randn(16, 4), torch.randn(4, 3, 3))
    net, x = alone(conv), torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(rewritten(net, x, layers=("0",))(x), net(x), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ which layers


def mixed() -> nn.Module:
    """A stem, a depthwise convolution, 1 x 1, two that can be smaller, one that cannot, a dense layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 12, 3),
        nn.Conv2d(12, 16, 3), nn.Conv2d(16, 1, 3), nn.Flatten(), nn.Linear(36, 4),
    ).eval()  # fmt: skip


def test_what_would_not_save_stays_and_the_report_says_why() -> None:
    net, x, found = mixed(), torch.randn(2, 3, 16, 16), list[Finding]()
    made = rewritten(net, x, found)
    assert [n for n, s in kernels(made).items() if "." in n] == ["3.0", "3.1", "4.0", "4.1"]
    (finding,) = found
    whys = {row[0]: row[3] for row in finding.rows}
    assert whys == {
        "0": "it runs first", "1": "it is depthwise: every channel has one small kernel, which shares nothing with "
        "the others", "3": "", "4": "", "5": "it would not become smaller",
    }  # fmt: skip
    before, after = (cost(m, {"input": x.numpy()}) for m in (net, made))
    assert f"{1 - after.params / before.params:.1%} of the parameters" in finding.summary
    assert f"{1 - after.macs / before.macs:.1%} of the multiply-accumulates" in finding.summary
    assert before.params - after.params == (12 * 12 * 9 - 12 * 9 - 12 * 12) + (16 * 12 * 9 - 12 * 9 - 16 * 12)
    left = {row[0]: row[1] for row in finding.rows}
    assert left["4"] == pytest.approx(100 * (12 * 9 + 16 * 12) / (16 * 12 * 9))


def test_the_model_that_came_in_stays() -> None:
    net = mixed()
    before = copy.deepcopy(net.state_dict())
    rewritten(net, torch.randn(2, 3, 16, 16))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_layers_and_skip_choose() -> None:
    net, x = mixed(), torch.randn(2, 3, 16, 16)
    assert "0.0" in kernels(rewritten(net, x, layers=("0",)))
    assert "4" in kernels(rewritten(net, x, skip=("4",)))
    assert "3" in kernels(rewritten(net, x, layers=("[34]",), skip=("3",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ("5",)}, "compact: layer '5' cannot be rewritten: it would not become smaller"),
        ({"layers": ("1",)}, "compact: layer '1' cannot be rewritten: it is depthwise"),
        ({"skip": ("conv",)}, "compact: no convolution 'conv'"),
        ({"skip": ("3", "4")}, "compact: no convolution of this model can become smaller"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DeploykitError, match=message):
        rewritten(mixed(), torch.randn(2, 3, 16, 16), **options)
    with pytest.raises(DeploykitError, match="multiplier must be at least 1"):
        passes.build(Step("compact", {"multiplier": 0}))


def test_weights_that_are_not_finite_are_refused_by_the_steps_own_name() -> None:
    net: Any = mixed()
    net[3].weight.data[0] = float("nan")
    with pytest.raises(DeploykitError, match=r"^compact: the weights of layer '3' are not all finite"):
        rewritten(net, torch.randn(2, 3, 16, 16))


# ------------------------------------------------------------------ what comes after it


class Small(nn.Module):
    """``[n, 3, 16, 16]`` -> logits ``[n, 4]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv, self.norm2 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32)
        self.deep, self.norm3 = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.norm2(self.conv(x)))
        x = torch.relu(x + self.norm3(self.deep(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def small() -> nn.Module:
    """A factory."""
    return Small()


def pictures(n: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    patterns = np.random.default_rng(0).normal(size=(4, 3, 4, 4)).repeat(4, 2).repeat(4, 3)
    y = np.arange(n) % 4
    return (patterns[y] + np.random.default_rng(seed).normal(size=(n, 3, 16, 16))).astype(np.float32), y


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    pytest.importorskip("accelerate")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, (x, y) = Small().eval(), pictures(256, 1)
    Trainer(TrainSettings(batch=32)).fit(net, DataSet.of({"x": x}, y), cross_entropy, steps=60, learning_rate=1e-2)
    return net


DISTILL = Step("distill", {"steps": 60, "learning_rate": 5e-3})
CHAINS = {
    "compact, distill": (Step("compact"), DISTILL),
    "prune, distill": (Step("prune", {"amount": 0.3, "multiple": 1}), DISTILL),
    "compact, distill, qat": (Step("compact"), DISTILL, Step("qat", {"steps": 10})),
}


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS)
def test_a_smaller_student_is_distilled_quantized_and_exported(chain: str, trained: nn.Module, tmp_path: Path) -> None:
    x, _ = pictures(256, 1)
    recipe = Recipe(CHAINS[chain], TrainSettings(batch=32))
    dk.export(
        trained, DEVICE, x[:64], train=x, evaluation=pictures(200, 2), recipe=recipe, out=tmp_path / "out",
        benchmark=False, precisions=("int8",),
    )  # fmt: skip
    manifest = load_manifest(tmp_path / "out")
    assert all(check.passed is not False for check in manifest.checks)
    names = [step.partition("(")[0].lower() for step in manifest.steps]
    assert [n for n in names if n in chain] == chain.split(", ")
    scores = {score.precision: score.metric for score in manifest.scores}
    assert scores["int8"] is not None and scores["original"] is not None
    assert scores["original"] > 90 and scores["int8"] > scores["original"] - 6


def test_training_makes_good_what_the_rewriting_costs(trained: nn.Module) -> None:
    x, _ = pictures(256, 1)
    data = DataSet.of({"x": x})
    example = {"x": x[:2]}
    here = Context(targets.load("x86"), {"train": data}, example, original=trained, cost=lambda m: cost(m, example),
                   trainer=Trainer(TrainSettings(batch=32)))  # fmt: skip
    started = Compact()(trained, here)
    taught = passes.build(DISTILL)(started, here)

    def distance(net: nn.Module) -> float:
        test = torch.from_numpy(pictures(200, 3)[0])
        with torch.no_grad():
            return float(cross_entropy(net(test), TrainBatch({}, trained(test).softmax(1))))

    assert distance(taught) - distance(trained) < 0.2 * (distance(started) - distance(trained))
    assert cost(taught, example).macs < 0.5 * cost(trained, example).macs


def test_a_folder_remembers_it(trained: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text("from test_compact import small as build\n")
    prepared = pipeline.prepare(load_model(f"{file}:build"), {}, {"x": pictures(2, 1)[0]})
    recipe = Recipe((Step("compact"), Step("sparsify", {"sparsity": 0.5})))
    done = pipeline.compress(prepared, pipeline.Settings(recipe), None, tmp_path / "small")
    again = load_model(str(tmp_path / "small")).module
    assert again is not None and kernels(again)["conv.0"] == (16, 1, 3, 3)
    assert mask_of(again.get_submodule("conv.1"), "weight") is not None
    assert cost(again, {"x": pictures(2, 1)[0]}).params == done.after.params
