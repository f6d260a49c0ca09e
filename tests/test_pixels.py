"""Files that take raw uint8 images: the preprocessing moves inside, and the answers stay."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import TinyCNN, TinyMLP
from graphs import conv_relu_conv, graph, measured, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from deploykit import pipeline, targets
from deploykit.core.artifact import TensorSpec
from deploykit.core.data import DataSet, Preprocess
from deploykit.core.errors import DeploykitError, GateFailed
from deploykit.core.manifest import load_manifest
from deploykit.core.target import QuantSpec
from deploykit.exporters import open_artifact
from deploykit.hub.graph import FloatGraph, Hub
from deploykit.hub.pixels import affine, fold, folded_floats, take_pixels
from deploykit.hub.quantize import quantize
from deploykit.hub.running import session
from deploykit.models import accept_module
from deploykit.pipeline import Settings
from deploykit.sources import load_data

SPREAD = Preprocess(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
EVEN = Preprocess(mean=(128 / 255,), std=(0.25,))


def pixels(seed: int, n: int = 12, h: int = 8, w: int = 8, c: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, c)).astype(np.uint8)


def normalised(images: NDArray[np.uint8], p: Preprocess) -> NDArray[np.float32]:
    """What the network was trained on, written as the declaration says it."""
    x = images.astype(np.float64) * p.scale
    x = (x - np.asarray(p.mean or 0.0)) / np.asarray(p.std or 1.0)
    return (x.transpose(0, 3, 1, 2) if p.layout == "NCHW" else x).astype(np.float32)


def run(model: bytes, x: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(session(model, optimize=False).run(None, {"x": x})[0])


def calibrated(made: FloatGraph, p: Preprocess) -> Hub:
    data = DataSet.of({"x": normalised(pixels(1, 32), p)})
    return quantize(made, measured(made, data), QuantSpec())


def operators(model: bytes) -> list[str]:
    return [n.op_type for n in onnx.load_model_from_string(model).graph.node]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 3]), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_folding_is_exact_where_nothing_is_padded(groups: int, per_in: int, per_out: int, kernel: int, s: int) -> None:
    import torch

    c, o = groups * per_in, groups * per_out
    random = np.random.default_rng(s)
    weight, bias = random.normal(size=(o, per_in, kernel, kernel)), random.normal(size=o)
    a, b = random.uniform(0.01, 0.1, c), random.normal(size=c)
    how = replace(affine(Preprocess()), a=a, b=b)
    image = random.integers(0, 256, (1, c, 5, 5)).astype(np.float64)

    def convolved(x: NDArray[Any], w: NDArray[Any], offset: NDArray[Any]) -> NDArray[Any]:
        arrays = (torch.from_numpy(np.ascontiguousarray(v)) for v in (x, w, offset))
        return np.asarray(torch.nn.functional.conv2d(*arrays, groups=groups))

    sides = (1, c, 1, 1)
    folded = fold(weight, bias, groups, how)
    expected = convolved(image * a.reshape(sides) + b.reshape(sides), weight, bias)
    np.testing.assert_allclose(convolved(image - how.zero, folded.weight, folded.bias), expected, rtol=1e-9, atol=1e-9)


def test_the_zero_point_is_the_grey_value_that_the_network_sees_as_zero() -> None:
    assert affine(Preprocess(mean=(0.5,), std=(0.5,))).zero == 128  # 127.5, halves to even
    assert affine(Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))).zero == 114
    assert affine(Preprocess(scale=1.0, mean=(104.0, 117.0, 123.0))).zero == 115
    assert affine(Preprocess()).zero == 0


@pytest.mark.parametrize("p", [SPREAD, EVEN, Preprocess(), replace(SPREAD, scale=1.0, mean=(104.0, 117.0, 123.0))])
def test_the_float_graph_with_a_front_answers_alike_on_pixels(p: Preprocess) -> None:
    made = conv_relu_conv()
    images = pixels(3)
    fed = take_pixels(Hub(made, QuantSpec()), p, ["x"], fold=False).hub
    expected = run(made.bytes, normalised(images, p))
    np.testing.assert_allclose(run(fed.graph.bytes, images), expected, rtol=1e-4, atol=1e-3 * np.abs(expected).max())


def test_a_network_that_takes_channels_last_gets_no_transpose() -> None:
    made = graph(
        """(float[batch,4,4,3] x) => (float[batch,4] y) {
            m = ReduceMean<keepdims=0>(x, axes)
            y = Gemm(m, w)
        }""",
        axes=np.array([1, 2]), w=normal(1, 3, 4),
    )  # fmt: skip
    p = replace(SPREAD, layout="NHWC")
    images = pixels(3, 6, 4, 4)
    fed = take_pixels(Hub(made, QuantSpec()), p, ["x"], fold=False).hub
    np.testing.assert_allclose(run(fed.graph.bytes, images), run(made.bytes, normalised(images, p)), rtol=1e-4)
    assert "Transpose" not in operators(fed.graph.bytes)


def test_a_folded_hub_has_no_float_between_the_pixels_and_the_first_convolution() -> None:
    hub = calibrated(conv_relu_conv(), EVEN)
    taken = take_pixels(hub, EVEN, ["x"], fold=True)
    fed, notes = taken.hub, taken.notes
    assert notes == ()
    kinds = operators(fed.bytes)
    assert "Mul" not in kinds and "Cast" not in kinds
    assert kinds.count("QuantizeLinear") == operators(hub.bytes).count("QuantizeLinear") - 1
    model = onnx.load_model_from_string(fed.bytes)
    onnx.checker.check_model(model)
    shape = model.graph.input[0].type.tensor_type
    assert shape.elem_type == onnx.TensorProto.UINT8 and [d.dim_value for d in shape.shape.dim][1:] == [8, 8, 3]


def test_a_folded_hub_answers_like_the_hub_it_came_from() -> None:
    images = pixels(5, 40)
    for p, tolerance in ((EVEN, 0.04), (replace(SPREAD, mean=(0.45, 0.45, 0.45)), 0.04)):
        hub = calibrated(conv_relu_conv(), p)
        fed = take_pixels(hub, p, ["x"], fold=True).hub
        ours, before = run(fed.bytes, images), run(hub.bytes, normalised(images, p))
        exact = run(hub.graph.bytes, normalised(images, p))
        assert np.abs(ours - before).max() <= tolerance * np.abs(exact).max()


def test_with_one_mean_for_all_channels_folding_costs_nothing_and_with_three_only_the_border() -> None:
    images = pixels(7)
    made = conv_relu_conv()
    folded = folded_floats(made, EVEN, ["x"], ["x"])
    np.testing.assert_allclose(
        run(folded.bytes, images), run(made.bytes, normalised(images, EVEN)), rtol=1e-4, atol=1e-3
    )
    only = graph(
        "(float[batch,3,8,8] x) => (float[batch,4,8,8] y) { y = Conv<pads=[1,1,1,1]>(x, w, b) }",
        w=normal(0, 4, 3, 3, 3), b=normal(1, 4),
    )  # fmt: skip
    folded = folded_floats(only, SPREAD, ["x"], ["x"])
    difference = np.abs(run(folded.bytes, images) - run(only.bytes, normalised(images, SPREAD)))
    assert difference[:, :, 1:-1, 1:-1].max() < 1e-4
    assert difference[:, :, 0].max() > 0.1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("m = MaxPool<kernel_shape=[2,2]>(x) y = Conv(m, w)", "not every operator that reads it is a convolution"),
        ("a = Conv(x, w) s = Sigmoid(x) b = Conv(s, w) y = Add(a, b)", "not every operator"),
    ],
)
def test_what_cannot_be_folded_gets_a_float_front_and_the_reason(text: str, why: str) -> None:
    made = graph(f"(float[batch,3,8,8] x) => (float[batch,4,h,w] y) {{ {text} }}", w=normal(0, 4, 3, 1, 1))
    hub = calibrated(made, EVEN)
    taken = take_pixels(hub, EVEN, ["x"], fold=True)
    fed, notes = taken.hub, taken.notes
    assert why in notes[0]
    images = pixels(2)
    expected = run(hub.bytes, normalised(images, EVEN))
    assert np.abs(run(fed.bytes, images) - expected).mean() < 0.01 * np.abs(expected).max()


def test_a_target_whose_integers_cannot_hold_pixels_gets_a_float_front() -> None:
    made = conv_relu_conv()
    data = DataSet.of({"x": normalised(pixels(1), EVEN)})
    spec = QuantSpec(activation_signed=True, activation_symmetric=True)
    notes = take_pixels(quantize(made, measured(made, data), spec), EVEN, ["x"], fold=True).notes
    assert "cannot hold a pixel" in notes[0]


def image_data(folder: Path, p: Preprocess, n: int = 40) -> DataSet:
    random = np.random.default_rng(0)
    np.savez(folder / "calib.npz", x=pixels(1, n, 16, 16), y=random.integers(0, 10, n))
    return load_data(str(folder / "calib.npz"), [TensorSpec("x", (), "")], p, "calibration")


@pytest.mark.parametrize("target", ["x86", "mobile-arm", "jetson"])
def test_files_that_take_pixels_answer_like_files_that_take_floats(
    target: str, tiny_cnn: TinyCNN, tmp_path: Path
) -> None:
    data = image_data(tmp_path, SPREAD)
    answers = {}
    for inside in (False, True):
        prepared = pipeline.prepare(accept_module(tiny_cnn), {"calibration": data}, None)
        folder = tmp_path / str(inside)
        chosen = Settings(benchmark=False, uint8_input=inside)
        pipeline.export(prepared, [targets.load(target)], [folder], chosen, pipeline.Gate())
        artifact = open_artifact(folder)
        images = pixels(9, 30, 16, 16)
        for file in artifact.files:
            fed = images if inside else normalised(images, SPREAD)
            answers[file.precision, inside] = artifact(fed, precision=file.precision)["output"]
        if inside:
            assert artifact.inputs == (TensorSpec("x", ("batch", 16, 16, 3), "uint8"),)
    for precision in {p for p, _ in answers}:
        floats, raw = answers[precision, False], answers[precision, True]
        tolerance = 2e-4 if precision == "fp32" else 0.02 if precision == "fp16" else 0.08
        assert np.abs(raw - floats).max() <= tolerance * np.abs(floats).max(), precision


def test_the_manifest_says_what_folding_costs_at_the_border(tiny_cnn: TinyCNN, tmp_path: Path) -> None:
    prepared = pipeline.prepare(accept_module(tiny_cnn), {"calibration": image_data(tmp_path, SPREAD)}, None)
    chosen = Settings(benchmark=False, uint8_input=True)
    pipeline.export(prepared, [targets.load("x86")], [tmp_path / "out"], chosen, pipeline.Gate())
    manifest = load_manifest(tmp_path / "out")
    (border,) = [c for c in manifest.checks if "border" in c.name]
    assert border.value is not None and 30 <= border.value < 100
    assert manifest.preprocess == Preprocess(scale=1.0, layout="NHWC")


class Pair(nn.Module):
    """Reads one image by a convolution, and pools the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(7, 10)

    def forward(self, near: Tensor, far: Tensor) -> Tensor:
        return self.last(torch.cat([self.conv(near).relu().mean((2, 3)), torch.max_pool2d(far, 2).mean((2, 3))], 1))


def test_the_border_is_looked_at_where_only_one_of_two_images_was_folded(tmp_path: Path) -> None:
    images = {"near": pixels(1, 40, 16, 16), "far": pixels(2, 40, 16, 16)}
    np.savez(tmp_path / "calib.npz", **images)
    data = load_data(str(tmp_path / "calib.npz"), [TensorSpec(n, (), "") for n in images], SPREAD, "calibration")
    prepared = pipeline.prepare(accept_module(Pair().eval()), {"calibration": data}, None)
    settings = Settings(benchmark=False, uint8_input=True)
    with contextlib.suppress(GateFailed):
        pipeline.export(prepared, [targets.load("x86")], [tmp_path / "out"], settings, pipeline.Gate())
    manifest = load_manifest(tmp_path / "out")
    assert any("'far'" in note and "in float" in note for note in manifest.notes)
    (border,) = [c for c in manifest.checks if "border" in c.name]
    assert border.value is not None and 20 <= border.value < 100


def test_pixels_of_data_that_came_as_floats_are_refused_before_any_work(tiny_mlp: TinyMLP, tmp_path: Path) -> None:
    data = DataSet.of({"x": normal(0, 20, 4)}, origin="calibration data floats.npz")
    prepared = pipeline.prepare(accept_module(tiny_mlp), {"calibration": data}, None)
    with pytest.raises(DeploykitError, match=r"floats.npz: files that take uint8 pixels need image data"):
        pipeline.export(
            prepared, [targets.load("x86")], [tmp_path / "out"], Settings(uint8_input=True), pipeline.Gate()
        )
    assert not (tmp_path / "out").exists()


def test_where_one_reader_cannot_be_folded_none_is(tmp_path: Path) -> None:
    made = graph(
        """(float[batch,3,8,8] x) => (float[batch,4,8,8] y, float[batch,4,8,8] z) {
            y = Conv(x, w)
            z = Conv(x, v)
        }""",
        w=normal(0, 4, 3, 1, 1), v=normal(1, 4, 3, 1, 1),
    )  # fmt: skip
    data = DataSet.of({"x": normalised(pixels(1, 32), EVEN)})
    hub = quantize(made, measured(made, data), QuantSpec(), keep_float=["z"])
    taken = take_pixels(hub, EVEN, ["x"], fold=True)
    fed, notes = taken.hub, taken.notes
    assert notes
    images = pixels(4)
    for name in ("y", "z"):
        ours = np.asarray(session(fed.bytes, optimize=False).run([name], {"x": images})[0])
        before = np.asarray(session(hub.bytes, optimize=False).run([name], {"x": normalised(images, EVEN)})[0])
        assert np.abs(ours - before).max() <= 0.03 * np.abs(before).max()
