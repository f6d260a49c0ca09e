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
from graphs import graph, normal, residual
from numpy.typing import NDArray
from torch import Tensor, nn

from deploykit import export, open_artifact
from deploykit.check import Gate, sqnr_db
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
    """Files answer as the PyTorch model does: the float one to rounding, the integer one to quantization noise (on
    samples that were calibrated on: others may exceed the ranges)."""
    expected = torch_outputs(model, inputs)
    for given, wanted in zip(artifact(**inputs, precision="fp32").values(), expected, strict=True):
        np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-5)
    for given, wanted in zip(artifact(**inputs, precision="int8").values(), expected, strict=True):
        assert sqnr_db(wanted, given) > 25


# ------------------------------------------------------------------ inputs and outputs


@pytest.mark.parametrize("target", ["x86", "mobile-arm"])
def test_two_inputs_keep_their_names_and_their_data(tmp_path: Path, target: str) -> None:
    model = TwoInputs()
    data = {"image": normal(0, 20, 3, 8, 8), "known": normal(1, 20, 5)}
    artifact = out(tmp_path, model, target, data)
    assert [s.name for s in artifact.inputs] == ["image", "known"]
    assert_close(artifact, model, {name: array[:4] for name, array in data.items()})
    with pytest.raises(DeploykitError, match="takes the inputs image, known; given: image"):
        artifact(data["image"])


@pytest.mark.parametrize(("as_dict", "names"), [(True, ["classes", "value"]), (False, ["output_0", "output_1"])])
def test_several_outputs_keep_their_names_and_order(tmp_path: Path, as_dict: bool, names: list[str]) -> None:
    model = TwoHeads(as_dict)
    data = normal(0, 40, 4)
    artifact = out(tmp_path, model, "x86", data)
    assert [s.name for s in artifact.outputs] == names
    assert_close(artifact, model, {"x": data[:4]})
    scores = {s.precision: s for s in load_manifest(tmp_path / "x86").scores}
    assert set(scores["int8"].sqnr_db) == set(names)


def test_a_table_is_as_good_as_an_image(tmp_path: Path, tiny_mlp: TinyMLP) -> None:
    data = normal(0, 40, 4)
    assert_close(out(tmp_path, tiny_mlp, "mobile-arm", data), tiny_mlp, {"x": data[:4]})


def test_whole_numbers_stay_whole_numbers(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 50, (40, 6))
    model = Words()
    artifact = out(tmp_path, model, "x86", data)
    assert artifact.inputs[0].dtype == "int64"
    assert_close(artifact, model, {"ids": data[:4]})


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
    assert repr(artifact) == (
        f"<Artifact {tmp_path}/x86 for x86: fp32, int8; x [batch, 3, 16, 16] -> output [batch, 10]>"
    )


def test_an_artifact_refuses_shapes_it_does_not_take_and_says_which_it_does(tmp_path: Path, tiny_cnn: TinyCNN) -> None:
    artifact = out(tmp_path, tiny_cnn, "x86", torch.from_numpy(normal(0, 20, 3, 16, 16)))
    x = normal(1, 5, 3, 16, 16)
    for wrong, hint in (
        (x[0], "Add the batch dimension: x[None]."),
        (x.transpose(0, 2, 3, 1), "These are channels-last: x.transpose(0, 3, 1, 2)."),
        (x[0].transpose(1, 2, 0), "This is one channels-last image: x.transpose(2, 0, 1)[None]."),
        (x[:, :, :8], ""),
    ):
        with pytest.raises(DeploykitError) as refused:
            artifact(wrong)
        said = f"input 'x' has the shape {list(wrong.shape)}; this artifact takes [batch, 3, 16, 16]. {hint}"
        assert str(refused.value) == said.rstrip()


def test_a_misspelt_setting_is_answered_with_the_nearest(tmp_path: Path, tiny_cnn: TinyCNN) -> None:
    with pytest.raises(DeploykitError, match=r"settings: no key 'keep_flaot'. Did you mean 'keep_float'"):
        export(tiny_cnn, "x86", normal(0, 20, 3, 16, 16), keep_flaot=("conv",), out=tmp_path / "out")


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({"precisions": ("int9",)}, r"settings, precisions 1: no choice 'int9'. Did you mean"),
        ({"precisions": "int8"}, "settings: Expected `array`, got `str`"),
        ({"keep_float": "conv"}, "settings: Expected `array`, got `str`"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(
    setting: dict[str, Any], why: str, tmp_path: Path, tiny_cnn: TinyCNN
) -> None:
    with pytest.raises(DeploykitError, match=why):
        export(tiny_cnn, "x86", normal(0, 20, 3, 16, 16), out=tmp_path / "out", **setting)


@pytest.mark.parametrize("free_batch", [True, False])
def test_an_exported_program_takes_the_same_road(tmp_path: Path, tiny_mlp: TinyMLP, free_batch: bool) -> None:
    example = torch.zeros(2 if free_batch else 1, 4)
    shapes = {"x": {0: torch.export.Dim("n")}} if free_batch else None
    torch.export.save(torch.export.export(tiny_mlp, (example,), dynamic_shapes=shapes), tmp_path / "net.pt2")
    data = normal(0, 40, 4)
    artifact = export(tmp_path / "net.pt2", "x86", data, out=tmp_path / "out", benchmark=False)
    assert artifact.inputs[0].shape == ("batch" if free_batch else 1, 4)
    assert_close(artifact, tiny_mlp, {"x": data[:4]})


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


LENIENT = Gate(min_agreement=0.0)
W4 = """
extends = "x86"
profits = ["unstructured", "int8", "int4"]

[quant]
weight_bits = 4
"""
PRUNE = '[[step]]\nname = "sparsify"\nsparsity = 0.5\n'
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
    return [a.astype(np.int8) for a in arrays if a.dtype.name in ("int8", "int4") and a.ndim > 1]


def divergence(artifact: Artifact, model: nn.Module, x: NDArray[np.float32]) -> float:
    """Mean Kullback-Leibler divergence of the integer file's answers from the model's."""
    ours, theirs = (
        torch.from_numpy(a).log_softmax(1) for a in (artifact(x)["output"], torch_outputs(model, {"x": x})[0])
    )
    return float(torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean"))


def test_prune_equalize_and_train_at_four_bits_in_one_recipe(tmp_path: Path, tiny_cnn: TinyCNN) -> None:
    (tmp_path / "w4.toml").write_text(W4)
    data = normal(0, 128, 3, 16, 16)
    found = {}
    for name, steps in (("untrained", PRUNE + EQUALIZE), ("trained", PRUNE + EQUALIZE + QAT)):
        found[name] = export(
            tiny_cnn, str(tmp_path / "w4.toml"), data, train=data, out=tmp_path / name, benchmark=False, gate=LENIENT,
            recipe=recipe(tmp_path, f"{steps}[train]\nbatch = 32\n"),
        )  # fmt: skip
    manifest = load_manifest(tmp_path / "trained")
    assert [step.split("(")[0] for step in manifest.steps] == ["Sparsify", "Equalize", "Gptq", "Qat"]
    for artifact in found.values():
        arrays = weights(artifact)
        assert len(arrays) == 3
        assert max(int(np.abs(a).max()) for a in arrays) == 7  # four bits
        assert sum((a == 0).sum() for a in arrays) >= sum(a.size for a in arrays) // 2  # zeros stay zero
    loss = {name: divergence(artifact, tiny_cnn, normal(1, 64, 3, 16, 16)) for name, artifact in found.items()}
    assert loss["trained"] < 0.7 * loss["untrained"]


def test_a_step_on_integers_is_not_left_out_in_silence(tmp_path: Path, tiny_mlp: TinyMLP) -> None:
    data = {"x": normal(0, 8, 8)}
    steps = Recipe((Step("bias_correct"),))
    with pytest.raises(DeploykitError, match=r"BiasCorrect\(samples=64\) works on integers, and for .x86. only fp32"):
        out(tmp_path, tiny_mlp, "x86", data, recipe=steps, precisions=("fp32",))
    with pytest.raises(DeploykitError, match="works on integers, and for 'jetson-nano' only fp32, fp16 would"):
        out(tmp_path, tiny_mlp, "jetson-nano", data, recipe=steps, force=True)


def test_targets_of_one_run_get_what_each_would_get_alone(desk: Path) -> None:
    Path("net.onnx").write_bytes(residual().bytes)
    names = ["x86", "jetson-nano", "mobile-arm", "jetson"]
    command = "export net.onnx --calib calib.npz --no-benchmark"
    for folder, order in (("together", names), ("reversed", names[::-1])):
        assert enter(f"{command} {' '.join(f'--target {n}' for n in order)} -o {folder}").code == 0
    for name in names:
        assert enter(f"{command} --target {name} -o alone/{name}").code == 0
        alone = {f.path: f.sha256 for f in load_manifest(Path("alone", name)).stored}
        for folder in ("together", "reversed"):
            assert {f.path: f.sha256 for f in load_manifest(Path(folder, name)).stored} == alone
    assert not Path("together/jetson-nano/ranges.json").exists()


def test_a_step_that_cannot_pay_runs_only_by_force_and_is_noted(tmp_path: Path, tiny_mlp: TinyMLP) -> None:
    steps = Recipe((Step("sparsify", {"sparsity": 0.25}),))
    with pytest.raises(DeploykitError, match=r"step Sparsify\(sparsity=0\.25.* cannot pay on target 'x86'"):
        out(tmp_path, tiny_mlp, "x86", normal(0, 40, 4), recipe=steps)
    out(tmp_path, tiny_mlp, "x86", normal(0, 40, 4), recipe=steps, force=True, gate=LENIENT)
    manifest = load_manifest(tmp_path / "x86")
    assert manifest.steps[0].startswith("Sparsify(sparsity=0.25")
    assert manifest.steps[1:] == ("WeightCorrect(samples=64, positions=16, widest=256)",)
    assert "cannot pay" in " ".join(manifest.notes)


def test_the_model_that_is_exported_is_not_changed(tmp_path: Path, tiny_mlp: TinyMLP) -> None:
    before = {name: value.clone() for name, value in tiny_mlp.state_dict().items()}
    steps = Recipe((Step("sparsify", {"sparsity": 0.5}), Step("equalize")))
    out(tmp_path, tiny_mlp, "mobile-arm", normal(0, 40, 4), recipe=steps, gate=LENIENT)
    after = tiny_mlp.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# ------------------------------------------------------------------ what is measured


CONV_SIN_CONV = """(float[batch,3,8,8] x) => (float[batch,4] y) {
    first = Conv<pads=[1,1,1,1]>(x, w, b)
    wave = Sin(first)
    second = Conv<pads=[1,1,1,1]>(wave, v, b)
    mean = ReduceMean<keepdims=0>(second, axes)
    y = Gemm<transB=1>(mean, u, b)
}"""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two networks as .onnx and data for them, and a metric."""
    monkeypatch.chdir(tmp_path)
    w, v, u, b = normal(0, 4, 3, 3, 3), normal(1, 4, 4, 3, 3), normal(2, 4, 4), normal(3, 4)
    Path("waves.onnx").write_bytes(graph(CONV_SIN_CONV, w=w, v=v, u=u, b=b, axes=np.array([2, 3])).bytes)
    Path("sines.onnx").write_bytes(graph("(float[batch,3,8,8] x) => (float[batch,3,8,8] y) { y = Sin(x) }").bytes)
    np.savez("calib.npz", x=normal(4, 22, 3, 8, 8), y=np.arange(22) % 4)
    np.savez("values.npz", x=normal(5, 12, 3, 8, 8), y=normal(6, 12, 4))
    Path("metrics.py").write_text(
        "import numpy as np\n\n"
        "def near(outputs, labels):\n"
        "    return 100 - float(np.abs(outputs['y'] - labels).mean())\n\n"
        "def poor(outputs, labels):\n"
        "    poor.calls += 1\n"
        "    return 100 - 10 * poor.calls\n\n"
        "poor.calls = 0\n"
    )
    return tmp_path


def exported(command: str) -> Manifest:
    said = enter(f"export {command} --no-benchmark -o out")
    assert said.code == 0, said
    return load_manifest(Path("out"))


def test_samples_held_out_are_not_calibrated_on_and_are_labelled(desk: Path) -> None:
    manifest = exported("waves.onnx --target x86 --calib calib.npz")
    assert manifest.data["calibration"].samples == 18
    assert manifest.data["holdout"].samples == 4  # every fifth of 22
    assert {(s.samples, s.data) for s in manifest.scores} == {(4, "every fifth calibration sample, held out")}
    assert json.loads(Path("out/ranges.json").read_text())["samples"] == 18
    assert all(s.metric is not None for s in manifest.scores)  # the calibration data had labels


def test_data_to_evaluate_on_is_evaluated_on(desk: Path) -> None:
    np.savez("test.npz", x=normal(7, 30, 3, 8, 8), y=np.arange(30) % 4)
    manifest = exported("waves.onnx --target x86 --calib calib.npz --eval test.npz")
    assert manifest.data["calibration"].samples == 22
    assert {(s.samples, s.data) for s in manifest.scores} == {(30, "eval data test.npz")}


def test_a_metric_of_the_users_reads_labels_of_any_kind(desk: Path) -> None:
    manifest = exported("waves.onnx --target x86 --calib calib.npz --eval values.npz --metric metrics.py:near")
    expected = {}
    with np.load("values.npz") as values:
        for precision in ("fp32", "int8"):
            outputs = open_artifact(Path("out"))(values["x"], precision=precision)["y"]
            expected[precision] = 100 - float(np.abs(outputs - values["y"]).mean())
    found = {s.precision: s.metric for s in manifest.scores}
    assert found["int8"] == pytest.approx(expected["int8"])
    assert found["original"] == pytest.approx(expected["fp32"])


def test_a_metric_that_falls_fails_the_gate(desk: Path) -> None:
    said = enter("export waves.onnx --target x86 --calib calib.npz --metric metrics.py:poor --no-benchmark -o out")
    assert said.code == 3
    assert "lost accuracy (points) 20" in said.err and "90.00 -> 70.00" in said.err


# ------------------------------------------------------------------ what is said aloud


def test_operators_that_stay_in_float_are_named_with_the_reason(desk: Path) -> None:
    said = enter("export waves.onnx --target x86 --calib calib.npz --no-benchmark -o out")
    assert said.code == 0
    assert "out: Sin wave stays in float in int8: " in said.out
    (file,) = [f for f in load_manifest(Path("out")).files if f.precision == "int8"]
    assert [(i.operator, i.layer) for i in file.islands] == [("Sin", "wave")]
    assert file.quantized == {"Conv": 2, "Gemm": 1, "ReduceMean": 1}


def test_what_several_files_or_targets_say_is_said_once_with_the_names_of_all(desk: Path) -> None:
    command = "export waves.onnx --calib calib.npz --target x86 --target x86-avx2 --precision int8 --precision w4a8"
    said = enter(f"{command} --no-benchmark -o out")
    assert said.code == 0, said
    notes = [line for line in said.out.splitlines() if line.startswith("x86") and ": " in line]
    texts = [line.partition(": ")[2] for line in notes]
    assert len(set(texts)) == len(texts)
    stays = [line for line in notes if "stays in float" in line]
    assert len(stays) == 1 and stays[0].startswith("x86, x86-avx2: Sin wave stays in float in int8, w4a8: ")
    assert len([line for line in notes if line.startswith("x86, x86-avx2: scored on ")]) == 1
    for name in ("x86", "x86-avx2"):  # what is said of one is in its manifest
        own = load_manifest(Path("out", name))
        assert {i.layer for f in own.files for i in f.islands} == {"wave"}
        assert all(any(line.endswith(note) and name in line for line in notes) for note in own.notes)


def test_a_layer_kept_in_float_is_float_and_said_to_be_so_on_request(desk: Path) -> None:
    manifest = exported("waves.onnx --target x86 --calib calib.npz --keep-float second")
    (file,) = [f for f in manifest.files if f.precision == "int8"]
    assert {i.layer: i.why for i in file.islands}["second"] == "kept in float on request"
    nodes = {n.name: n for n in onnx.load("out/model.int8.onnx").graph.node}
    weights = {i.name: i for i in onnx.load("out/model.int8.onnx").graph.initializer}
    assert nodes["second"].input[1] in weights  # a float weight, no DequantizeLinear in front
    assert nodes["first"].input[1] not in weights


def test_a_silent_no_op_fails_the_gate(desk: Path) -> None:
    """Nothing became integer, and the file would still answer like the original."""
    layers = " ".join(f"--keep-float {name}" for name in ("first", "second", "y"))
    said = enter(f"export waves.onnx --target x86 --calib calib.npz {layers} --no-benchmark -o out")
    assert said.code == 3
    assert "integer products 0, bound 1 (int8; 0 of 3 convolutions and matrix products)" in said.err


def test_a_network_of_which_nothing_can_be_integer_fails_the_gate_too(desk: Path) -> None:
    np.save("x.npy", normal(4, 10, 3, 8, 8))
    said = enter("export sines.onnx --target x86 --calib x.npy --no-benchmark -o out")
    assert said.code == 3
    assert "integer operators 0, bound 1 (int8; 0 of 1 operators)" in said.err


def test_a_quantized_file_that_did_not_shrink_is_said_aloud(desk: Path) -> None:
    said = enter("export waves.onnx --target x86 --calib calib.npz --no-benchmark -o out")
    sizes = {p: Path(f"out/model.{p}.onnx").stat().st_size for p in ("fp32", "int8")}
    times = f"{sizes['int8'] / sizes['fp32']:.2f}"
    assert f"model.int8.onnx is {times} x the size of the fp32 file" in said.out


def test_a_quantized_file_that_did_shrink_is_not_remarked_on(tmp_path: Path) -> None:
    wide = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    out(tmp_path, wide, "x86", normal(0, 20, 64))
    assert not any("size of the fp32" in note for note in load_manifest(tmp_path / "x86").notes)


def test_the_gate_can_be_set(tmp_path: Path, tiny_mlp: TinyMLP) -> None:
    with pytest.raises(GateFailed, match="operators: largest difference"):
        out(tmp_path, tiny_mlp, "x86", normal(0, 40, 4), gate=Gate(max_lsb=-1.0))
    assert (tmp_path / "x86" / "manifest.json").is_file()
