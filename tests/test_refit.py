"""Weights chosen by what they do to the data: products as matrices, second moments, roundings and their passes."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graphs import graph, images, measured, normal, residual, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from deploykit import targets
from deploykit.calibration.observe import channel_mean
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.target import QuantSpec
from deploykit.hub.bits import held_weights
from deploykit.hub.fitting.activations import Activations
from deploykit.hub.fitting.float_outputs import FloatOutputs
from deploykit.hub.fitting.moments import Moments, moments
from deploykit.hub.fitting.refit import best_ridge, regressed
from deploykit.hub.fitting.rounding import (
    column_by_column,
    descend,
    error,
    gptq,
    nearest,
    searched_scale,
    to_nearest,
    widest,
)
from deploykit.hub.graph import FloatGraph, Hub
from deploykit.hub.layers import MatrixForm, layers
from deploykit.hub.quantize import quantize
from deploykit.hub.running import session
from deploykit.hub.slices import Slicer
from deploykit.passes.bias_correct import BiasCorrect
from deploykit.passes.gptq import Gptq
from deploykit.passes.weight_correct import WeightCorrect

SPEC = QuantSpec()
LINEAR_INPUTS = QuantSpec(
    activation_signed=True, activation_symmetric=True, bias="float", placement="linear_inputs",
    weight_scale_floor=2.0**-14,
)  # fmt: skip
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def context(data: DataSet) -> Context:
    return Context(targets.load("x86"), {"calibration": data})


def hub_of(made: FloatGraph, data: DataSet, spec: QuantSpec = SPEC) -> Hub:
    return quantize(made, measured(made, data), spec)


def stored(hub: Hub) -> dict[str, NDArray[Any]]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load_model_from_string(hub.bytes).graph.initializer}


def noise(hub: Hub, data: DataSet) -> float:
    """Squared error of the hub's first output, against the float network's."""
    return float(np.square(run(hub.bytes, data, optimize=False)[0] - run(hub.graph.bytes, data)[0]).sum())


def mean_error(hub: Hub, data: DataSet) -> float:
    """Largest difference of the first output's means per channel."""
    difference = run(hub.bytes, data, optimize=False)[0] - run(hub.graph.bytes, data)[0]
    return float(np.abs(channel_mean(difference, 1)).max())


# --- a product as a matrix


def check_form(text: str, shape: tuple[int, ...], **weights: NDArray[Any]) -> None:
    """``matrix @ inputs`` is the product's output, at positions in any order."""
    made, data = graph(text, **weights), images(3, shape=shape)
    hub = hub_of(made, data)
    slicer = Slicer(onnx.load_model_from_string(hub.bytes))
    (layer,) = layers(slicer)
    form = MatrixForm.of(layer, weights["w"].shape)
    x = next(data.batches(3)).inputs["x"]
    (y,) = session(slicer.cut([layer.node.output[0]], [layer.node.input[0]]), optimize=False).run(
        None, {layer.node.input[0]: x}
    )
    w = form.matrix(slicer.array(layer.weight) * along(slicer.array(layer.weight_scale), layer, slicer))
    chosen = np.random.default_rng(0).permutation(form.positions(y.shape))[:7]
    at = y.reshape(*y.shape[:2], -1)[:, :, chosen] if form.images else y.reshape(-1, y.shape[-1])[chosen]
    np.testing.assert_allclose(w @ form.inputs(x, y.shape, chosen, 0.0), form.outputs(at), atol=1e-4)
    np.testing.assert_array_equal(form.weight(form.matrix(weights["w"])), weights["w"])


def along(scale: NDArray[Any], layer: Any, slicer: Slicer) -> NDArray[Any]:
    dequantizer = slicer.producer[layer.node.input[1]]
    axis = next(a.i for a in dequantizer.attribute if a.name == "axis")
    rank = slicer.array(layer.weight).ndim
    return scale.reshape([-1 if i == axis else 1 for i in range(rank)])


@FEW
@given(st.data())
def test_a_convolution_of_any_shape_is_a_product_of_matrices(data: Any) -> None:
    number = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    group, each, out = number(1, 3), number(1, 2), number(1, 2)
    kernel = [number(1, 3), number(1, 3)]
    weight = normal(0, group * out, each, *kernel)
    pads = [number(0, 2) for _ in range(4)]
    text = (
        f"(float[batch,{group * each},7,6] x) => (float[batch,{group * out},h,v] y) {{ y = Conv<pads={pads}, "
        f"strides=[{number(1, 2)},{number(1, 2)}], dilations=[{number(1, 2)},{number(1, 2)}], group={group}>(x, w) }}"
    )
    check_form(text, (group * each, 7, 6), w=weight)


def test_a_convolution_over_a_line_is_a_product_of_matrices() -> None:
    text = "(float[batch,3,9] x) => (float[batch,4,l] y) { y = Conv<pads=[1,1], strides=[2]>(x, w) }"
    check_form(text, (3, 9), w=normal(0, 4, 3, 3))


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_dense_layer_is_a_product_of_matrices(transposed: int) -> None:
    text = f"(float[batch,5] x) => (float[batch,4] y) {{ y = Gemm<transB={transposed}>(x, w) }}"
    check_form(text, (5,), w=normal(0, *((4, 5) if transposed else (5, 4))))


def test_a_product_over_positions_is_a_product_of_matrices() -> None:
    check_form("(float[batch,6,5] x) => (float[batch,6,4] y) { y = MatMul(x, w) }", (6, 5), w=normal(0, 5, 4))


# --- second moments


def test_moments_are_the_covariances_of_what_is_fed_and_what_should_come_out() -> None:
    made, data = residual(), images(10)
    slicer = Slicer(onnx.load_model_from_string(hub_of(made, data).bytes))
    layer = next(found for found in layers(slicer) if found.y == "b")
    form = MatrixForm.of(layer, slicer.array(layer.weight).shape)
    outputs = FloatOutputs(made, [layer], {layer.y: form}, data, 4, 99, 0)  # all positions
    inputs = Activations(slicer, [layer.x], data, 4, [layer.x])
    with contextlib.closing(outputs), contextlib.closing(inputs):
        whole, halves = moments(layer, form, inputs, outputs)
    real = slicer.cut([layer.node.input[0]], [])
    (x,) = session(real, optimize=False).run(None, next(data.batches(10)).inputs)
    (y,) = session(Slicer(onnx.load_model_from_string(made.bytes)).cut(["b"], [])).run(
        None, next(data.batches(10)).inputs
    )
    columns = torch.nn.functional.unfold(torch.from_numpy(x), 3, padding=1).permute(1, 0, 2).reshape(36, -1).numpy()
    rows = y.transpose(1, 0, 2, 3).reshape(4, -1)
    both = np.cov(np.concatenate([columns, rows]), bias=True)
    np.testing.assert_allclose(whole.h[0], both[:36, :36], atol=1e-4)
    np.testing.assert_allclose(whole.c[0], both[36:, :36], atol=1e-4)
    np.testing.assert_allclose(whole.yy[0], np.diag(both)[36:], atol=1e-4)
    np.testing.assert_allclose(outputs.mean("b"), rows.mean(axis=1), atol=1e-4)
    assert len(halves) == 2


def random_moments(seed: int, o: int, k: int, n: int = 200, gap: float = 0.0) -> tuple[NDArray[Any], Moments]:
    """A weight, and the moments of its float outputs with inputs that are ``gap`` away from what they should be."""
    random = np.random.default_rng(seed)
    w = random.standard_normal((1, o, k))
    right = random.standard_normal((k, k)) @ random.standard_normal((k, n))
    x = right + gap * (right[::-1] - random.standard_normal((k, n)))
    y = w[0] @ right
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    return w, Moments((x @ x.T / n)[None], (y @ x.T / n)[None], (y * y).mean(1)[None], (x * x).mean(1).max()[None])


def test_the_regressed_target_is_the_weight_where_nothing_was_lost() -> None:
    w, found = random_moments(0, 3, 5)
    np.testing.assert_allclose(regressed(found, w, 1e-3), w, atol=1e-8)


def test_the_regressed_target_answers_better_than_the_weight_where_something_was() -> None:
    w, found = random_moments(0, 3, 5, gap=0.2)
    assert (found.error(regressed(found, w, 1e-6)) < 0.9 * found.error(w)).all()


def test_inputs_that_repeat_each_other_have_a_target_too() -> None:
    w, found = random_moments(0, 3, 4)
    same = np.broadcast_to(found.h[:, :1, :1], (1, 4, 4)) - 1e-3 * np.eye(4)
    twins = replace(found, h=same, c=np.broadcast_to(found.c[:, :, :1], (1, 3, 4)))
    assert np.isfinite(regressed(twins, w, 1e-6)).all()


def test_the_ridge_is_small_where_halves_agree_and_large_where_each_half_tells_another_story() -> None:
    w, same = random_moments(0, 3, 5, gap=0.2)
    assert best_ridge((same, same), w) == 1e-2
    noise = np.random.default_rng(9)
    nothing = np.zeros((1, 3, 40))
    halves = [random_moments(seed, 3, 40, n=12)[1] for seed in (1, 2)]
    noisy = [replace(m, c=noise.standard_normal((1, 3, 40)) * 3) for m in halves]
    assert best_ridge(noisy, nothing) == 10.0


# --- roundings


@st.composite
def problems(draw: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    seed, g, o, k = (draw(st.integers(low, high)) for low, high in ((0, 10**6), (1, 3), (1, 4), (1, 9)))
    random = np.random.default_rng(seed)
    w, mix = random.standard_normal((g, o, k)), random.standard_normal((g, k, 2 * k))
    return w, mix @ mix.swapaxes(1, 2) + 0.05 * np.eye(k)


def none(w: NDArray[Any]) -> NDArray[Any]:
    return np.zeros(w.shape[:2])


@FEW
@given(problems(), st.sampled_from([2, 3, 4, 8]), st.sampled_from(["channel", "tensor"]))
def test_gptq_never_loses_more_than_the_nearest_integers_at_its_own_scales(
    problem: tuple[NDArray[Any], NDArray[Any]], bits: int, granularity: Any
) -> None:
    w, h = problem
    spec = QuantSpec(weight_bits=bits, weight_granularity=granularity)
    q, s = gptq(w, h, none(w), spec)
    start = searched_scale(w, h, none(w), spec)
    assert error(q, s, w, h).sum() <= error(nearest(w, start, spec.weight_max), start, w, h).sum() + 1e-9
    assert np.abs(q).max() <= spec.weight_max and np.array_equal(q, np.rint(q))
    assert granularity == "channel" or len(np.unique(s)) == 1


@FEW
@given(problems())
def test_descent_ends_where_no_single_integer_can_be_moved_for_the_better(
    problem: tuple[NDArray[Any], NDArray[Any]],
) -> None:
    w, h = problem
    s = widest(w, none(w), QuantSpec(weight_bits=3))
    q = descend(column_by_column(w, s, h, 3), w, s, h, 3)
    q = descend(q, w, s, h, 3)
    reached = error(q, s, w, h)
    for j, step in itertools.product(range(w.shape[2]), (-1, 1)):
        other = q.copy()
        other[:, :, j] = np.clip(other[:, :, j] + step, -3, 3)
        assert (error(other, s, w, h) >= reached - 1e-9).all()


def test_blocks_of_columns_give_what_single_columns_give(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    w, mix = random.standard_normal((1, 3, 10)), random.standard_normal((1, 10, 20))
    h, s = mix @ mix.swapaxes(1, 2), widest(w, none(w), QuantSpec(weight_bits=4))
    found = []
    for block in (1, 3, 64):
        monkeypatch.setattr("deploykit.hub.fitting.columns.BLOCK", block)
        q = column_by_column(w, s, h, 7)
        found.append((q, descend(q, w, s, h, 7)))
    for q, d in found[1:]:
        assert np.array_equal(q, found[0][0]) and np.array_equal(d, found[0][1])


def test_gptq_finds_the_best_of_all_roundings_of_a_small_row_nearly_always() -> None:
    hits = 0
    every = np.array(list(itertools.product((-1.0, 0.0, 1.0), repeat=4)))[None]
    for seed in range(20):
        random = np.random.default_rng(seed)
        w, mix = random.standard_normal((1, 1, 4)), random.standard_normal((1, 4, 8))
        h, s = mix @ mix.swapaxes(1, 2), widest(w, none(w), QuantSpec(weight_bits=2))
        best = error(every, np.full((1, every.shape[1]), s.item()), w, h).min()
        found = error(descend(column_by_column(w, s, h, 1), w, s, h, 1), s, w, h)
        hits += bool(found <= best + 1e-9)
    assert hits >= 16


def test_scales_keep_their_kind() -> None:
    w, h = normal(0, 2, 3, 5).astype(np.float64), np.broadcast_to(np.eye(5), (2, 5, 5))
    for rounding in (to_nearest, gptq):
        _, s = rounding(w, h, none(w), QuantSpec(weight_bits=4, scale="power_of_two"))
        assert np.array_equal(np.log2(s), np.rint(np.log2(s)))
        _, s = rounding(w, h, np.full((2, 3), 0.5), QuantSpec(weight_bits=4))
        assert s.min() >= 0.5
        assert np.array_equal(s, s.astype(np.float32))


# --- the passes


@pytest.mark.parametrize("spec", [replace(SPEC, weight_bits=3), replace(LINEAR_INPUTS, weight_bits=3)])
def test_on_data_never_seen_gptq_answers_better_than_corrected_weights_and_those_better_than_corrected_biases(
    spec: QuantSpec,
) -> None:
    made, data = residual(), images(64)
    hub, unseen = hub_of(made, data, spec), images(64, seed=77)
    found = [noise(step(hub, context(data)), unseen) for step in (BiasCorrect(), WeightCorrect(), Gptq())]
    assert found[1] < 0.95 * found[0]
    assert found[2] < 0.95 * found[1]


@pytest.mark.parametrize("step", [WeightCorrect(), Gptq()])
def test_the_mean_of_every_output_comes_back(step: Any) -> None:
    made, data = residual(), images(32)
    hub = hub_of(made, data, replace(SPEC, weight_bits=3))
    assert mean_error(step(hub, context(data)), data) < 0.2 * mean_error(hub, data) + 0.02


@pytest.mark.parametrize("step", [WeightCorrect(), Gptq()])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_only_integers_scales_and_biases_change_and_biases_have_the_scale_of_their_sums(
    step: Any, granularity: Any
) -> None:
    made, data = residual(), images(16)
    hub = hub_of(made, data, replace(SPEC, weight_bits=4, weight_granularity=granularity))
    changed = step(hub, context(data))
    before, after = stored(hub), stored(changed)
    assert before.keys() == after.keys()
    names = {layer.weight for layer in layers(Slicer(onnx.load_model_from_string(hub.bytes)))}
    for layer in layers(Slicer(onnx.load_model_from_string(changed.bytes))):
        slicer = Slicer(onnx.load_model_from_string(changed.bytes))
        x_scale = slicer.array(slicer.producer[layer.x].input[1])
        np.testing.assert_array_equal(after[layer.bias_scale], x_scale * after[layer.weight_scale])
        assert granularity == "channel" or len(np.unique(after[layer.weight_scale])) == 1
        assert np.abs(after[layer.weight]).max() <= 7
        names |= {layer.weight_scale, layer.bias, layer.bias_scale}
    assert {n for n in before if not np.array_equal(before[n], after[n])} <= names


def test_zeros_that_stay_zero_stay_zero() -> None:
    made, data = residual(), images(16)
    mask = np.abs(normal(2, 4, 4, 3, 3)) > 0.7
    weight = made.model.graph.initializers["wb"]
    assert weight.const_value is not None
    import onnx_ir as ir

    weight.const_value = ir.tensor(weight.const_value.numpy() * mask, name="wb")
    masked = replace(made, masks={"wb": mask})
    hub = hub_of(masked, data, replace(SPEC, weight_bits=4))
    changed = Gptq()(hub, context(data))
    (name,) = [n for n, origin in hub.weights.items() if origin == "wb"]
    np.testing.assert_array_equal(stored(changed)[name], stored(hub)[name])


def test_a_bias_added_behind_a_product_over_positions_is_corrected_too() -> None:
    made = graph(
        "(float[batch,6,5] x) => (float[batch,6,4] y) { p = MatMul(x, w)\n y = Add(p, b) }",
        w=normal(0, 5, 4), b=normal(1, 4),
    )  # fmt: skip
    data = images(32, shape=(6, 5))
    data = DataSet.of({"x": next(data.batches(32)).inputs["x"] + 1.0})
    hub = hub_of(made, data, replace(SPEC, weight_bits=3))

    def lost(of: Hub) -> float:
        y, expected = run(of.bytes, data, optimize=False)[0], run(made.bytes, data)[0]
        return float(np.abs((y - expected).mean(axis=(0, 1))).max())

    assert lost(WeightCorrect()(hub, context(data))) < 0.1 * lost(hub)


def test_transposed_convolutions_keep_their_weights_and_have_their_biases_corrected() -> None:
    made = graph(
        """(float[batch,3,6,6] x) => (float[batch,2,12,12] y) {
            a = Conv<pads=[1,1,1,1]>(x, w, b)
            y = ConvTranspose<strides=[2,2], kernel_shape=[2,2]>(a, v, c)
        }""",
        w=normal(0, 4, 3, 3, 3), b=normal(1, 4), v=normal(2, 4, 2, 2, 2), c=normal(3, 2),
    )  # fmt: skip
    data = images(16, shape=(3, 6, 6))
    hub = hub_of(made, data, replace(SPEC, weight_bits=3))
    changed = WeightCorrect()(hub, context(data))
    (name,) = [n for n, origin in hub.weights.items() if origin == "v"]
    np.testing.assert_array_equal(stored(changed)[name], stored(hub)[name])
    assert mean_error(changed, data) < mean_error(hub, data)


@pytest.mark.parametrize("step", [WeightCorrect(), Gptq()])
def test_the_number_of_threads_does_not_change_a_bit(step: Any) -> None:
    made, data = residual(), images(16)
    hub = hub_of(made, data, replace(SPEC, weight_bits=4))
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.append(step(hub, context(data)).bytes)
    assert found[0] == found[1]


def test_wide_layers_keep_their_integers_and_have_their_biases_corrected() -> None:
    made, data = residual(), images(16)
    hub = hub_of(made, data, replace(SPEC, weight_bits=3))
    changed = WeightCorrect(widest=0)(hub, context(data))
    before, after = stored(hub), stored(changed)
    names = {layer.bias for layer in layers(Slicer(onnx.load_model_from_string(hub.bytes)))}
    assert {n for n in before if not np.array_equal(before[n], after[n])} <= names
    assert mean_error(changed, data) < 0.2 * mean_error(hub, data) + 0.02


def test_means_of_the_same_samples_are_not_measured_again() -> None:
    made, data = residual(), images(16)
    hub = hub_of(made, data)
    assert hub.ranges is not None
    anew = replace(hub, ranges=replace(hub.ranges, samples=17))
    ours, theirs = (stored(WeightCorrect(widest=0)(h, context(data))) for h in (hub, anew))
    for name in ours:
        np.testing.assert_allclose(ours[name].astype(float), theirs[name].astype(float), atol=1)


def test_a_single_sample_is_enough_for_weight_correct_and_too_few_for_gptq() -> None:
    made, data = residual(), images(1)
    hub = hub_of(made, data)
    assert noise(WeightCorrect()(hub, context(data)), images(32, seed=5)) < 1.5 * noise(hub, images(32, seed=5))
    with pytest.raises(DeploykitError, match="at least 8 calibration samples; there are 1"):
        Gptq()(hub, context(data))


@pytest.mark.parametrize("step", [WeightCorrect(), Gptq()])
@pytest.mark.parametrize("kind", ["a matrix for every head", "padding that is worked out"])
def test_products_that_are_no_matrix_at_a_position_keep_their_integers(kind: str, step: Any) -> None:
    if kind == "a matrix for every head":
        made = graph("(float[batch,3,8,8] x) => (float[batch,3,8,8] y) { y = MatMul(x, w) }", w=normal(2, 3, 8, 8))
    else:
        made = graph(
            '(float[batch,3,h,v] x) => (float[batch,4,i,j] y) { y = Conv<auto_pad="SAME_UPPER">(x, w, b) }',
            w=normal(0, 4, 3, 3, 3), b=normal(1, 4),
        )  # fmt: skip
    data = images(32)
    before = quantize(made, measured(made, data), QuantSpec())
    after = step(before, context(data))
    integers = [held.weight for held in held_weights(Slicer(onnx.load_model_from_string(before.bytes)))]
    assert len(integers) == 1
    old, new = (Slicer(onnx.load_model_from_string(hub.bytes)).array(integers[0]) for hub in (before, after))
    assert np.array_equal(old, new)
