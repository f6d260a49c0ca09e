"""Calibration without data: inputs made up, said so everywhere, and never judged by."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import enter
from graphs import residual
from test_lint import colour_images, knowing, standardised
from torch import nn

import deploykit as dk
from deploykit import pipeline
from deploykit.core.artifact import TensorSpec
from deploykit.core.data import DataSet, Preprocess
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import load_manifest
from deploykit.hub.analysis.norms import reading
from deploykit.models import accept_module
from deploykit.pipeline.steps import WIDER
from deploykit.sources import data_of, is_made_up
from deploykit.sources import synthetic as making

LOOK = Preprocess(crop=16, mean=(0.45, 0.5, 0.4), std=(0.25, 0.2, 0.3))
INPUT = [TensorSpec("input", (), "")]


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return knowing(standardised(colour_images(256, seed=1)))


@pytest.fixture(scope="module")
def synthetic(module: nn.Module) -> DataSet:
    return data_of("synthetic", INPUT, LOOK, "calibration", 0, module)


def arrays(data: DataSet) -> np.ndarray[Any, Any]:
    return next(data.batches(len(data))).inputs["input"]


def mismatch(module: nn.Module, x: np.ndarray[Any, Any]) -> float:
    """The loss of ZeroQ, computed from the activations themselves."""
    found = []

    def see(name: str, norm: Any, z: torch.Tensor) -> None:
        sigma = (norm.running_var + norm.eps).sqrt()
        mean, std = z.mean((0, 2, 3)), (z.var((0, 2, 3), unbiased=False) + norm.eps).sqrt()
        found.append(float((((mean - norm.running_mean) / sigma) ** 2).mean() + ((std / sigma - 1) ** 2).mean()))

    with torch.no_grad(), reading(module, see):
        module(torch.from_numpy(x))
    return sum(found)


# ------------------------------------------------------------------ what is made


def test_synthetic_inputs_match_what_batch_normalisation_kept(module: nn.Module, synthetic: DataSet) -> None:
    start = mismatch(module, arrays(data_of("random", INPUT, LOOK, "calibration", 0)))
    real = mismatch(module, standardised(colour_images(32, seed=7)))
    assert mismatch(module, arrays(synthetic)) < 0.2 * start
    assert mismatch(module, arrays(synthetic)) < 2 * real + 0.05


@pytest.mark.parametrize("kind", ["synthetic", "random"])
def test_what_is_made_are_8_bit_pixels_prepared_as_declared(module: nn.Module, kind: str) -> None:
    data = data_of(kind, INPUT, LOOK, "calibration", 0, module)
    x = arrays(data)
    assert x.shape == (making.SAMPLES, 3, 16, 16) and x.dtype == np.float32
    mean, std = (np.float32(v)[:, None, None] for v in (LOOK.mean, LOOK.std))
    pixels = (x * std + mean) * 255
    np.testing.assert_allclose(pixels, np.rint(pixels), atol=1e-3)
    assert pixels.min() >= 0 and pixels.max() <= 255
    raw = next(data.as_pixels().batches(2)).inputs["input"]
    assert raw.shape == (2, 16, 16, 3) and raw.dtype == np.uint8
    np.testing.assert_array_equal(raw.transpose(0, 3, 1, 2), np.rint(pixels[:2]).astype(np.uint8))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("channels", ["RGB", "BGR", "L"])
def test_random_images_come_in_every_declared_form(layout: str, channels: str) -> None:
    look = Preprocess(crop=(8, 12), layout=layout, channels=channels, mean=(0.5,), std=(0.5,))
    x = arrays(data_of("random", INPUT, look, "calibration"))
    depth = look.depth
    assert x.shape[1:] == ((depth, 8, 12) if layout == "NCHW" else (8, 12, depth))
    assert -1 <= x.min() < 0 < x.max() <= 1
    assert x.std(axis=tuple(range(1, 4))).min() > 0.01  # no blank ones


def test_the_same_seed_makes_the_same_and_another_one_others(module: nn.Module) -> None:
    one, same, other = (data_of("random", INPUT, LOOK, "calibration", seed) for seed in (0, 0, 1))
    assert one.hash == same.hash != other.hash
    again = data_of("synthetic", INPUT, LOOK, "calibration", 0, module)
    assert again.hash == data_of("synthetic", INPUT, LOOK, "calibration", 0, module).hash


def test_global_random_numbers_and_the_module_stay_as_they_were(module: nn.Module) -> None:
    before, state = torch.random.get_rng_state(), {k: v.clone() for k, v in module.state_dict().items()}
    data_of("synthetic", INPUT, LOOK, "calibration", 0, module)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert not any(m._forward_pre_hooks for m in module.modules())


def test_inputs_without_declared_preprocessing_are_matched_without_bounds(module: nn.Module) -> None:
    example = {"input": np.zeros((2, 3, 16, 16), np.float32)}
    data = data_of("synthetic", INPUT, None, "calibration", 0, module, example)
    assert arrays(data).shape == (making.SAMPLES, 3, 16, 16)
    assert mismatch(module, arrays(data)) < 0.5
    assert data.pixels is None


def test_vectors_can_be_matched_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    net[1].momentum = None
    net.train()
    net(torch.randn(512, 6) * 3 + 1)
    data = data_of("synthetic", INPUT, None, "calibration", 0, net.eval(), {"input": np.zeros((1, 6), np.float32)})
    z = net[0](torch.from_numpy(arrays(data))).detach()
    off = (z.mean(0) - net[1].running_mean) / net[1].running_var.sqrt()
    assert float(off.abs().mean()) < 0.3


# ------------------------------------------------------------------ what it is worth


def test_an_int8_file_calibrated_without_data_answers_like_one_with_data(module: nn.Module, tmp_path: Path) -> None:
    x = standardised(colour_images(200, seed=3))
    with torch.no_grad():
        labels = module(torch.from_numpy(x)).argmax(1).numpy()
    agreement = {}
    for name, calibration in (("real", standardised(colour_images(64, seed=4))), ("synthetic", "synthetic")):
        dk.export(
            module, "x86", calibration, evaluation=(x, labels), preprocess=LOOK, out=tmp_path / name, benchmark=False
        )
        scores = {s.precision: s for s in load_manifest(tmp_path / name).scores}
        agreement[name] = scores["int8"].agreement
    assert agreement["synthetic"] >= agreement["real"] - 5.0
    assert agreement["synthetic"] >= 90.0


def test_outputs_get_room_for_clearer_answers_than_made_up_inputs_get(module: nn.Module, synthetic: DataSet) -> None:
    prepared = pipeline.prepare(accept_module(module), {"calibration": synthetic}, None)
    graph = pipeline.float_graph(prepared.model, prepared.example)
    made_up = pipeline.calibrate(graph, synthetic)
    plain = pipeline.calibrate(graph, DataSet.of({"input": arrays(synthetic)}))
    (output,) = (v.name for v in graph.model.graph.outputs)
    for name, stats in plain.tensors.items():
        factor = WIDER if name == output else 1.0
        assert made_up.tensors[name].high == pytest.approx(factor * stats.high, rel=1e-5)
        assert made_up.tensors[name].low == pytest.approx(factor * stats.low, rel=1e-5)


# ------------------------------------------------------------------ said everywhere, never judged by

FILES = """
import torch
from torch import nn


def build():
    return torch.load("net.pt", weights_only=False)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 196, 10))
"""


@pytest.fixture
def here(module: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "unseen.py").write_text(FILES)
    torch.save(module, tmp_path / "net.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


DECLARED = "--crop 16 --mean 0.45,0.5,0.4 --std 0.25,0.2,0.3"


@pytest.mark.parametrize(
    ("kind", "origin"), [("synthetic", "synthetic inputs, made to match the batch norm"), ("random", "random images")]
)
def test_an_export_says_everywhere_that_its_data_was_made_up(here: Path, kind: str, origin: str) -> None:
    said = enter(f"export unseen.py:build --calib {kind} {DECLARED} --target x86 --no-benchmark -o out")
    assert said.code == 0, said.err
    assert f"calibrated without real data, on {making.SAMPLES} {origin}" in said.out
    manifest = load_manifest(here / "out")
    assert manifest.data["calibration"].origin.startswith(origin)
    assert manifest.request.data["calibration"] == kind
    assert any("without real data" in note for note in manifest.notes)
    assert enter("report out").code == 0
    page = (here / "out" / "report.html").read_text()
    assert "alibrated without real data" in page and page.count(origin) >= 2


def test_files_are_not_judged_by_what_was_made_up(here: Path) -> None:
    enter(f"export unseen.py:build --calib synthetic {DECLARED} --target x86 --no-benchmark -o out")
    manifest = load_manifest(here / "out")
    assert manifest.scores == ()  # nothing was held out of them
    assert set(manifest.data) == {"calibration"}
    (accuracy,) = (c for c in manifest.checks if c.name == "accuracy")
    assert accuracy.passed is None and "not evaluated" in accuracy.detail


def test_real_evaluation_data_judges_all_the_same(here: Path) -> None:
    x = standardised(colour_images(40, seed=3))
    np.savez(here / "test.npz", input=x, y=np.arange(40) % 10)
    said = enter(
        f"export unseen.py:build --calib synthetic --eval test.npz {DECLARED} --target x86 --no-benchmark -o out"
    )
    assert said.code in (0, 3), said.err
    assert {s.data for s in load_manifest(here / "out").scores} == {"eval data test.npz"}


def test_it_is_made_again_by_reproduce(here: Path) -> None:
    enter(f"export unseen.py:build --calib random {DECLARED} --target x86 --no-benchmark -o out")
    said = enter("reproduce out")
    assert said.code == 0, said.out + said.err


def test_uint8_files_can_be_calibrated_without_data(here: Path) -> None:
    said = enter(f"export unseen.py:build --calib random {DECLARED} --uint8-input --target x86 --no-benchmark -o out")
    assert said.code == 0, said.err
    assert load_manifest(here / "out").inputs[0].dtype == "uint8"


def test_calibrate_takes_it_too_and_does_not_lint_it(here: Path) -> None:
    said = enter(f"calibrate unseen.py:build --calib random {DECLARED} --json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["notes"] == []


def test_a_folder_of_that_name_is_real_data(here: Path) -> None:
    assert is_made_up("random") and is_made_up("synthetic") and not is_made_up("samples/")
    (here / "random").mkdir()
    assert not is_made_up("random")
    said = enter("export unseen.py:build --calib random --target x86 -o out")
    assert said.code == 2 and "holds no images" in said.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (f"plain --calib synthetic {DECLARED}", "no batch normalisation with statistics.*--calib random"),
        ("build --calib synthetic", "what does 'input' look like.*--input input=1x3x224x224"),
        ("build --calib random --input input=1x3x16x16", "is not declared. Say what is done to images: .*--preprocess"),
        (
            "build --calib random --input input=1x1x16x16",
            "takes grey images, NCHW, and nothing is declared.*--preprocess file, with channels = .L. and layout",
        ),
        (
            "build --calib random --scale 0.01 --input input=1x16x16x1",
            "takes grey images, NHWC, and RGB, NCHW, are declared.*channels = .L. and layout = .NHWC",
        ),
        ("plain --calib synthetic --input input=1x9", "no batch normalisation with statistics. Give sample data"),
        (f"build --calib random --eval synthetic {DECLARED}", "made-up inputs can calibrate"),
        (f"build --calib random --train random {DECLARED}", "made-up inputs can calibrate"),
        ("build --calib random --crop 16 --input input=1x9", r"'input' \[9\] takes no images.*--calib synthetic"),
    ],
)
def test_what_cannot_be_made_up_says_why_and_what_to_do(here: Path, arguments: str, expected: str) -> None:
    said = enter(f"export unseen.py:{arguments} --target x86 --no-benchmark -o out")
    assert said.code == 2, said.out
    assert re.search(expected, said.err.replace("\n", " ")), said.err
    assert not (here / "out").exists()


def test_grey_images_are_drawn_once_they_are_declared_as_the_message_says() -> None:
    with pytest.raises(DeploykitError, match='channels = "L" and layout = "NHWC"') as refused:
        data_of("random", [TensorSpec("input", ("batch", 16, 16, 1), "float32")], LOOK, "calibration")
    channels, layout = re.findall('= "([A-Z]+)"', str(refused.value))
    declared = replace(LOOK, channels=channels, layout=layout, mean=(), std=())
    x = arrays(data_of("random", [TensorSpec("input", ("batch", 16, 16, 1), "float32")], declared, "calibration"))
    assert x.shape[1:] == (16, 16, 1)


def test_token_inputs_cannot_be_made_up() -> None:
    with pytest.raises(DeploykitError, match="'ids' is int64; only inputs of real numbers"):
        data_of("synthetic", [TensorSpec("ids", ("batch", 16), "int64")], None, "calibration")


def test_an_onnx_file_has_no_statistics_but_random_images_do(here: Path) -> None:
    (here / "net.onnx").write_bytes(residual().bytes)
    said = enter(f"export net.onnx --calib synthetic {DECLARED} --target x86 --no-benchmark -o out")
    assert said.code == 2 and "no PyTorch model" in said.err
    said = enter(f"export net.onnx --calib random {DECLARED} --target x86 --no-benchmark -o out")
    assert said.code == 0, said.err  # its shape is that of the file, whatever a crop says
