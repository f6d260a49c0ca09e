"""What is wrong with calibration data: nothing is said about clean data, and every planted fault is found."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from commands import enter
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn

from deploykit import pipeline
from deploykit.calibration.lint import START, Lint, Normed
from deploykit.core.data import DataSet
from deploykit.cost import cost
from deploykit.hub.analysis.norms import first_norm, norms, shifts
from deploykit.models import accept_module

MEAN, STD = np.float32([0.45, 0.5, 0.4])[:, None, None], np.float32([0.25, 0.2, 0.3])[:, None, None]


def colour_images(count: int, seed: int = 0, side: int = 16) -> NDArray[np.float32]:
    """Smooth images of two colours in 0..1, ``[n, 3, side, side]``, of many brightnesses."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    waves = np.zeros((count, 3, side, side))
    for a, b in np.ndindex(3, 3):
        phase = random.uniform(0, 6, (count, 1, 1, 1))
        waves += random.normal(size=(count, 3, 1, 1)) * np.sin(2 * np.pi * (a * x + b * y) + phase)
    return np.clip(0.45 + 0.1 * waves + random.normal(0, 0.1, (count, 1, 1, 1)), 0, 1).astype(np.float32)


def standardised(images: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray((images - MEAN) / STD, np.float32)


def net(channels: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def knowing(images: NDArray[np.float32], channels: int = 3) -> nn.Module:
    """A network whose batch normalisation keeps the statistics of these images, as training leaves it."""
    torch.manual_seed(1)
    module = net(channels)
    if channels == 3:  # red against green, as every network trained on colours has some
        with torch.no_grad():
            module[0].weight[:2] = 0
            module[0].weight[:2, 0, 1, 1], module[0].weight[:2, 1, 1, 1] = 0.25, -0.2
    for norm in (module[1], module[4]):
        norm.momentum = None
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    module.train()
    with torch.no_grad():
        for part in np.array_split(images, 8):
            module(torch.from_numpy(part))
    return module.eval()


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return knowing(standardised(colour_images(256, seed=1)))


def found(data: DataSet, module: nn.Module | None = None) -> tuple[str, ...]:
    chosen = module if module is not None else net().eval()
    prepared = pipeline.prepare(accept_module(chosen), {"calibration": data}, None, hold_out=False)
    graph = pipeline.float_graph(prepared.model, prepared.example)
    return pipeline.calibrate(graph, data, module=module).notes


def labelled(images: NDArray[np.float32], labels: Any = None) -> DataSet:
    return DataSet.of({"input": images}, None if labels is None else np.asarray(labels, np.int64))


# ------------------------------------------------------------------ clean data


@pytest.mark.parametrize("count", [8, 32, 64])
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_images_like_those_of_training_pass(module: nn.Module, count: int, seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.arange(count) % 10)
    assert found(labelled(standardised(colour_images(count, seed)), labels), module) == ()


@pytest.mark.parametrize("part", [slice(0, 100), slice(0, None, 20), slice(1000, 1064)])
def test_scikit_learns_digits_pass(part: slice) -> None:
    digits = load_digits()
    images = (digits.images[:, None] / 16.0).astype(np.float32)
    assert found(labelled(images[part], digits.target[part]), knowing(images, channels=1)) == ()


def test_grey_digits_for_a_network_trained_on_grey_as_colour_pass() -> None:
    images = (load_digits().images[:, None] / 16.0).astype(np.float32).repeat(3, axis=1)
    assert found(labelled(images[:100]), knowing(images)) == ()


def test_without_batch_normalisation_normalised_images_pass() -> None:
    data = labelled(standardised(colour_images(32)))
    assert found(data, nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 10)).eval()) == ()


def test_statistics_that_were_never_trained_judge_nothing() -> None:
    assert found(labelled(255 * standardised(colour_images(16))), net().eval()) == ()


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_random_labels_are_not_called_skewed(seed: int) -> None:
    random = np.random.default_rng(seed)
    classes = int(random.integers(2, 200))
    labels = random.integers(0, classes, int(random.integers(2, 8 * classes)))
    lint = Lint(DataSet.of({"x": np.zeros((len(labels), 1), np.float32)}, labels), classes)
    assert not [text for text in lint.findings() if "missing" in text or "are of one class" in text or "of all" in text]


# ------------------------------------------------------------------ planted faults

FAULTS: dict[str, tuple[Callable[[NDArray[np.float32]], NDArray[Any]], str]] = {
    "0..1": (lambda x: x, "prepared otherwise than in training"),
    "0..255": (lambda x: 255 * x, "prepared otherwise than in training"),
    "-1..1": (lambda x: 2 * x - 1, "prepared otherwise than in training"),
    "twice": (lambda x: standardised(standardised(x)), "prepared otherwise than in training"),
    "mean alone": (lambda x: x - MEAN, "prepared otherwise than in training"),
    "noise": (
        lambda x: standardised(np.random.default_rng(0).random(x.shape)),
        "prepared otherwise than in training|unlike the training data",
    ),
    "copies": (lambda x: standardised(np.concatenate([x[:16]] * 2)), "16 of 32 samples are copies"),
    "blank": (
        lambda x: np.concatenate([standardised(x[:-2]), np.zeros_like(x[:2])]),
        r"2 of 32 samples are blank.*\(30, 31\)",
    ),
    "some grey": (
        lambda x: standardised(np.where(np.arange(len(x))[:, None, None, None] % 3 == 0, x[:, :1], x)),
        "11 of 32 images are grey",
    ),
    "all grey": (lambda x: standardised(x[:, :1].repeat(3, 1)), "all 32 images are grey"),
    "one unscaled": (
        lambda x: np.concatenate([standardised(x[:-1]), 255 * x[-1:]]),
        r"1 of 32 samples vary up to \d+ times as much as the others \(31\)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(module: nn.Module, fault: str) -> None:
    plant, expected = FAULTS[fault]
    notes = found(labelled(np.asarray(plant(colour_images(32, seed=2)), np.float32)), module)
    assert [n for n in notes if re.search(expected, n)], notes
    assert all(note.startswith(START) for note in notes)


def test_wrong_preparation_is_said_once_with_what_was_seen_and_what_to_do(module: nn.Module) -> None:
    (note,) = found(labelled(255 * colour_images(16)), module)
    assert "'1', the first batch normalisation" in note
    assert "Inputs lie between" in note
    assert "--scale, --mean and --std of training" in note


def test_raw_pixels_are_suspicious_where_nothing_normalises() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 10)).eval()
    (note,) = found(labelled(np.rint(255 * colour_images(16))), plain)
    assert "raw pixels" in note


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.zeros(20), "20 samples of 1 of the 10 classes, where a random choice has 9"),
        (np.arange(100) % 9, r"no samples of 1 of the 10 classes \(9\)"),
        (np.concatenate([np.zeros(80), np.arange(20) % 10]), "82 % of the samples are of one class of 10, 0"),
    ],
)
def test_labels_that_leave_classes_out_are_found(labels: NDArray[Any], expected: str) -> None:
    labels = labels.astype(np.int64)
    random = np.random.default_rng(0).normal(size=(len(labels), 4)).astype(np.float32)
    lint = Lint(DataSet.of({"x": random}, labels), 10)
    (note,) = lint.findings()
    assert re.search(expected, note), note


def test_classes_are_called_by_their_names() -> None:
    labels = np.arange(50) % 4
    data = replace(
        DataSet.of({"x": np.arange(50, dtype=np.float32)[:, None]}, labels),
        classes=("ant", "bee", "cow", "dog", "emu"),
    )
    assert "('emu')" in Lint(data, 5).findings()[0]


def test_a_nan_names_the_tensor_and_the_sample() -> None:
    images = standardised(colour_images(8))
    images[5] = np.nan
    data = DataSet.of({"input": images})
    with pytest.raises(Exception, match=r"tensor 'input' becomes NaN or infinite .*\(sample 5\)"):
        found(data)


# ------------------------------------------------------------------ how it measures


def test_what_the_first_normalisation_reads_is_numpys_mean_and_variance(module: nn.Module) -> None:
    x = standardised(colour_images(8, seed=5))
    z = module[0](torch.from_numpy(x)).detach().numpy().astype(np.float64)
    norm = module[1]
    mean, variance = norm.running_mean.numpy(), norm.running_var.numpy().astype(np.float64)
    ratio = z.var(axis=(0, 2, 3)) / variance
    shift = (z.mean(axis=(0, 2, 3)) - mean) / np.sqrt(variance + norm.eps)
    seen = first_norm(module, {"input": x})
    assert seen is not None and seen.name == "1" and seen.silent == 0.0
    # of an even number of channels torch takes the lower one in the middle
    assert seen.variance == pytest.approx(np.sort(ratio)[(len(ratio) - 1) // 2], rel=1e-4)
    assert seen.shift == pytest.approx(np.sqrt((shift**2).mean()), rel=1e-4)


def test_layers_that_are_called_by_keyword_are_seen_and_counted_as_well() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up = nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 2, 2, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(input=self.norm(input=x))

    net, x = Named().eval(), {"x": colour_images(8).astype(np.float32)}
    net.norm.running_mean += 1.0
    assert first_norm(net, x) is not None
    assert cost(net, x).macs == x["x"][0].size * 2 * 2 * 2


def test_what_lies_behind_the_first_normalisation_is_not_run(module: nn.Module) -> None:
    broken = copy.deepcopy(module)
    broken[3] = nn.Conv2d(99, 16, 3)  # would raise
    assert first_norm(broken, {"input": standardised(colour_images(8))}) is not None


def test_shifts_are_those_of_the_activations_themselves(module: nn.Module) -> None:
    x = standardised(colour_images(24, seed=6)) + np.float32(0.5)
    prepared = pipeline.prepare(accept_module(module), {"calibration": labelled(x)}, None, hold_out=False)
    ranges = pipeline.calibrate(pipeline.float_graph(prepared.model, prepared.example), labelled(x))
    got = shifts(module, prepared.example, ranges.means)
    assert set(got) == {"0", "3"}
    z = torch.from_numpy(x)
    with torch.no_grad():
        for i, layer in enumerate(module[:5]):
            z = layer(z)
            if i in (1, 4):
                off = (z.mean((0, 2, 3)) - layer.bias) / layer.weight.abs()
                assert got[str(i - 1)] == pytest.approx(float(off.square().mean().sqrt()), rel=1e-3)


def test_hooks_are_gone_afterwards_and_the_module_is_as_it_was(module: nn.Module) -> None:
    before = {name: value.clone() for name, value in module.state_dict().items()}
    first_norm(module, {"input": standardised(colour_images(8))})
    shifts(module, {"input": standardised(colour_images(8))}, {"0": np.zeros(12)})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert list(norms(module)) == ["1", "4"]


def test_samples_are_not_kept() -> None:
    data = DataSet.of({"x": np.random.default_rng(0).random((64, 3, 64, 64), np.float32)})
    lint = Lint(data)
    for batch in data.batches(1):
        lint.add(batch)
    kept = {name: value for name, value in vars(lint).items() if name != "_data"}
    assert len(pickle.dumps(kept)) < 64 * 100  # bytes; one sample has 49,152


def test_alike_values_at_the_places_looked_at_are_no_copies() -> None:
    images = np.zeros((8, 3, 256, 256), np.float32)
    images[:, :, 0, :48] = 1.0
    images[np.arange(8), 0, 0, 1 + np.arange(8)] = 0.5  # differ between the places only
    lint = Lint(DataSet.of({"x": images}))
    for batch in DataSet.of({"x": images}).batches(1):
        lint.add(batch)
    assert not [note for note in lint.findings() if "copies" in note]


def test_judgement_needs_no_samples_where_the_norm_is_silent() -> None:
    lint = Lint(DataSet.of({"x": np.zeros((2, 4), np.float32)}))
    assert lint.findings(Normed("bn", 1.0, 0.0, 0.0), {"conv": 0.1}) == ()


# ------------------------------------------------------------------ where it is said


def test_calibrate_says_it_and_the_file_keeps_it(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(
        "import torch\ndef build():\n    return torch.load('net.pt', weights_only=False)\n"
    )
    torch.save(knowing(standardised(colour_images(128, seed=1))), tmp_path / "net.pt")
    np.save(tmp_path / "raw.npy", 255 * colour_images(16))
    said = enter("calibrate nets.py:build --calib raw.npy")
    assert said.code == 0 and "prepared otherwise than in training" in said.out
    again = enter("export nets.py:build --calib raw.npy --ranges ranges.json --target x86 --no-benchmark -o out")
    assert again.code in (0, 3)
    assert "prepared otherwise than in training" in (tmp_path / "out" / "manifest.json").read_text()
