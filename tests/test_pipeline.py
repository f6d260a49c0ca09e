"""The whole road on tiny models: every kind of model, of inputs and outputs, recipes, and what is said aloud."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from commands import enter
from conftest import TinyCNN, TinyMLP
from graphs import graph, normal
from numpy.typing import NDArray
from torch import Tensor, nn

from deploykit import export, open_artifact
from deploykit.check import sqnr_db
from deploykit.core.artifact import Artifact
from deploykit.core.errors import DeploykitError, GateFailed
from deploykit.core.manifest import Manifest, load_manifest
from deploykit.core.recipe import Recipe, Step


class TwoInputs(nn.Module):
    """An image ``[n, 3, 8, 8]`` and what is known about it ``[n, 5]`` -> logits ``[n, 4]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.known = nn.Linear(5, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, image: Tensor, known: Tensor) -> Tensor:
        seen = torch.relu(self.conv(image)).mean((2, 3))
        logits: Tensor = self.head(seen + torch.relu(self.known(known)))
        return logits


class TwoHeads(nn.Module):
    """``[n, 4]`` -> classes and a value, as a dict or a tuple."""

    def __init__(self, as_dict: bool) -> None:
        super().__init__()
        self.as_dict = as_dict
        self.hidden = nn.Linear(4, 16)
        self.classes = nn.Linear(16, 3)
        self.value = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.hidden(x))
        classes, value = self.classes(h), self.value(h)
        return {"classes": classes, "value": value} if self.as_dict else (classes, value)


class Words(nn.Module):
    """Word numbers ``[n, 6]`` int64 -> logits ``[n, 5]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.embedding(ids).mean(1)))
        return logits


def out(folder: Path, model: nn.Module, target: str, data: Any, **options: Any) -> Artifact:
    """An artifact that was not timed."""
    return export(model.eval(), target, data, out=folder / target, benchmark=False, **options)


def torch_outputs(model: nn.Module, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    with torch.no_grad():
        found = model(**{name: torch.from_numpy(a) for name, a in inputs.items()})
    values = [found] if isinstance(found, Tensor) else list(found.values() if isinstance(found, dict) else found)
    return [v.numpy() for v in values]


def assert_close(artifact: Artifact, model: nn.Module, inputs: Mapping[str, NDArray[Any]]) -> None:
    """Files answer as the PyTorch model does: the float one to rounding, the integer one to quantization noise."""
    expected = torch_outputs(model, inputs)
    for given, wanted in zip(artifact(**inputs, precision="fp32").values(), expected, strict=True):
        np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-5)
    for given, wanted in zip(artifact(**inputs, precision="int8").values(), expected, strict=True):
        assert sqnr_db(wanted, given) > 20


# ------------------------------------------------------------------ inputs and outputs


@pytest.mark.parametrize("target", ["x86", "mobile-arm"])
def test_two_inputs_keep_their_names_and_their_data(tmp_path: Path, target: str) -> None:
    model = TwoInputs()
    data = {"image": normal(0, 20, 3, 8, 8), "known": normal(1, 20, 5)}
    artifact = out(tmp_path, model, target, data)
    assert [s.name for s in artifact.inputs] == ["image", "known"]
    fresh = {"image": normal(2, 6, 3, 8, 8), "known": normal(3, 6, 5)}
    assert_close(artifact, model, fresh)
    with pytest.raises(DeploykitError, match="takes the inputs image, known; given: image"):
        artifact(fresh["image"])


@pytest.mark.parametrize(("as_dict", "names"), [(True, ["classes", "value"]), (False, ["output_0", "output_1"])])
def test_several_outputs_keep_their_names_and_order(tmp_path: Path, as_dict: bool, names: list[str]) -> None:
    model = TwoHeads(as_dict)
    artifact = out(tmp_path, model, "x86", normal(0, 40, 4))
    assert [s.name for s in artifact.outputs] == names
    assert_close(artifact, model, {"x": normal(1, 8, 4)})
    scores = {s.precision: s for s in load_manifest(tmp_path / "x86").scores}
    assert set(scores["int8"].sqnr_db) == set(names)


def test_a_table_is_as_good_as_an_image(tmp_path: Path, tiny_mlp: TinyMLP) -> None:
    artifact = out(tmp_path, tiny_mlp, "mobile-arm", normal(0, 40, 4))
    assert_close(artifact, tiny_mlp, {"x": normal(1, 8, 4)})


def test_whole_numbers_stay_whole_numbers(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    model = Words()
    artifact = out(tmp_path, model, "x86", random.integers(0, 50, (40, 6)))
    assert artifact.inputs[0].dtype == "int64"
    assert_close(artifact, model, {"ids": random.integers(0, 50, (8, 6))})


# ------------------------------------------------------------------ ways in


def test_python_gives_an_artifact_that_takes_numpy_and_torch(tmp_path: Path, tiny_cnn: TinyCNN) -> None:
    artifact = out(tmp_path, tiny_cnn, "x86", torch.from_numpy(normal(0, 20, 3, 16, 16)))
    x = normal(1, 5, 3, 16, 16)
    from_numpy, from_torch = artifact(x)["output"], artifact(torch.from_numpy(x))["output"]
    np.testing.assert_array_equal(from_numpy, from_torch)
    assert sqnr_db(torch_outputs(tiny_cnn, {"x": x})[0], from_numpy) > 20
    np.testing.assert_array_equal(open_artifact(artifact.folder)(x)["output"], from_numpy)
    assert artifact.file().precision == "int8"
    with pytest.raises(DeploykitError, match="no precision 'int4'"):
        artifact(x, precision="int4")


@pytest.mark.parametrize("free_batch", [True, False])
def test_an_exported_program_takes_the_same_road(tmp_path: Path, tiny_mlp: TinyMLP, free_batch: bool) -> None:
    example = torch.zeros(2 if free_batch else 1, 4)
    shapes = {"x": {0: torch.export.Dim("n")}} if free_batch else None
    torch.export.save(torch.export.export(tiny_mlp, (example,), dynamic_shapes=shapes), tmp_path / "net.pt2")
    artifact = export(tmp_path / "net.pt2", "x86", normal(0, 40, 4), out=tmp_path / "out", benchmark=False)
    assert artifact.inputs[0].shape == ("batch" if free_batch else 1, 4)
    assert_close(artifact, tiny_mlp, {"x": normal(1, 8, 4)})


@pytest.mark.parametrize("target", ["x86", "mobile-arm", "jetson"])
def test_an_onnx_file_with_a_fixed_batch_takes_the_same_road(tmp_path: Path, target: str) -> None:
    made = graph(
        """(float[1,3,8,8] x) => (float[1,4] y) {
            a = Conv<pads=[1,1,1,1]>(x, w, b)
            r = Relu(a)
            m = ReduceMean<keepdims=0>(r, axes)
            y = Gemm<transB=1>(m, v, b)
        }""",
        w=normal(0, 4, 3, 3, 3), b=normal(1, 4), v=normal(2, 4, 4), axes=np.array([2, 3]),
    )  # fmt: skip
    (tmp_path / "net.onnx").write_bytes(made.bytes)
    data = normal(3, 20, 3, 8, 8)
    artifact = export(tmp_path / "net.onnx", target, data, out=tmp_path / "out", benchmark=False)
    floats, integers = artifact(data, precision="fp32")["y"], artifact(data, precision="int8")["y"]
    assert floats.shape == (20, 4)
    assert sqnr_db(floats, integers) > 20


# ------------------------------------------------------------------ recipes


W4 = """
extends = "x86"
profits = ["unstructured", "int8", "int4"]

[quant]
weight_bits = 4
"""
PRUNE = '[[step]]\nname = "prune"\nsparsity = 0.5\n'
EQUALIZE = '[[step]]\nname = "equalize"\n'
QAT = '[[step]]\nname = "qat"\nsteps = 60\nlearning_rate = 0.001\n'


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def weights(artifact: Artifact) -> list[NDArray[np.int8]]:
    """The integer weights of its int8 file."""
    model = onnx.load(artifact.folder / "model.int8.onnx")
    arrays = [onnx.numpy_helper.to_array(i) for i in model.graph.initializer]
    return [a for a in arrays if a.dtype == np.int8 and a.ndim > 1]


def test_prune_equalize_and_train_at_four_bits_in_one_recipe(tmp_path: Path, tiny_cnn: TinyCNN) -> None:
    (tmp_path / "w4.toml").write_text(W4)
    data = normal(0, 128, 3, 16, 16)
    found = {}
    for name, steps in (("untrained", PRUNE + EQUALIZE), ("trained", PRUNE + EQUALIZE + QAT)):
        found[name] = export(
            tiny_cnn, str(tmp_path / "w4.toml"), data, train=data, recipe=recipe(tmp_path, f"{steps}[train]\nbatch = 32\n"),
            out=tmp_path / name, benchmark=False, gate=GATE_OPEN,
        )  # fmt: skip
    manifest = load_manifest(tmp_path / "trained")
    assert [step.split("(")[0] for step in manifest.steps] == ["Prune", "Equalize", "BiasCorrect", "Qat"]
    for artifact in found.values():
        arrays = weights(artifact)
        assert len(arrays) == 3
        assert max(int(np.abs(a).max()) for a in arrays) == 7  # four bits
        assert sum((a == 0).sum() for a in arrays) >= sum(a.size for a in arrays) // 2  # zeros stay zero
    loss = {name: divergence(artifact, tiny_cnn, normal(1, 64, 3, 16, 16)) for name, artifact in found.items()}
    assert loss["trained"] < 0.7 * loss["untrained"]
