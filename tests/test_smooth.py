"""Smoothing keeps what the float network computes, touches only what may be scaled, and makes integers better."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from families import example
from graphs import graph, measured, normal, run
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deploykit import passes, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.recipe import Step
from deploykit.core.target import QuantSpec
from deploykit.hub.fitting.smoothing import groups
from deploykit.hub.graph import FloatGraph
from deploykit.hub.lower import lower
from deploykit.hub.quantize import quantize
from deploykit.passes.smooth import Smooth

X86 = targets.load("x86")


def context(data: DataSet) -> Context:
    return Context(X86, {"calibration": data})


def rows(count: int = 16, length: int = 6, width: int = 8) -> DataSet:
    return DataSet.of({"x": normal(9, count, length, width)})


def weights(made: FloatGraph) -> dict[str, NDArray[np.float32]]:
    return {name: value.const_value.numpy() for name, value in made.model.graph.initializers.items()}


def normed(gains: NDArray[np.float32], seed: int = 0) -> FloatGraph:
    """x [n,6,8] -> LayerNormalization with these gains -> MatMul [8,5], whose rows shrink as the gains grow -> y."""
    return graph(
        """(float[batch,6,8] x) => (float[batch,6,5] y) {
            a = LayerNormalization<axis=-1>(x, g, b)
            y = MatMul(a, w)
        }""",
        g=gains, b=0.1 * gains, w=(normal(seed, 8, 5) / gains[:, None]).astype(np.float32),
    )  # fmt: skip


def attention(width: int, heads: int, length: int, split: bool, seed: int) -> FloatGraph:
    """x [n,length,width] -> LayerNormalization -> attention -> y; queries, keys and values from one or three."""
    each, random = width // heads, np.random.default_rng(seed)
    outlying = np.exp(2 * random.normal(size=width)).astype(np.float32)
    if split:
        made = "\n".join(f"p{k} = MatMul(a, w{k}) b{k} = Add(p{k}, bias)".replace(" b", "\nb") for k in "qkv")
        parts = {f"w{k}": normal(seed + i, width, width) for i, k in enumerate("qkv")} | {"bias": normal(seed, width)}
    else:
        made = "p = MatMul(a, w)\ns = Add(p, bias)\nbq, bk, bv = Split<axis=-1, num_outputs=3>(s)"
        parts = {"w": normal(seed, width, 3 * width), "bias": normal(seed + 1, 3 * width)}
    cut = "\n".join(
        f"h{k} = Reshape(b{k}, heads)\n{k} = Transpose<perm={perm}>(h{k})"
        for k, perm in (("q", "[0,2,1,3]"), ("k", "[0,2,3,1]"), ("v", "[0,2,1,3]"))
    )
    return graph(
        f"""(float[batch,{length},{width}] x) => (float[batch,{length},3] y) {{
            a = LayerNormalization<axis=-1>(x, g, g)
            {made}
            {cut}
            scores = MatMul(q, k)
            share = Softmax<axis=-1>(scores)
            mixed = MatMul(share, v)
            back = Transpose<perm=[0,2,1,3]>(mixed)
            flat = Reshape(back, together)
            y = MatMul(flat, wo)
        }}""",
        g=outlying, heads=np.array([0, length, heads, each]), together=np.array([0, length, width]),
        wo=normal(seed + 7, width, 3), **parts,
    )  # fmt: skip


def test_a_channel_is_scaled_as_the_paper_says() -> None:
    gains = np.array([50, 1, 1, 1, 1, 1, 1, 1], np.float32)
    made, data = normed(gains), rows()
    smoothed = weights(Smooth(alpha=0.5)(made, context(data)))
    x = np.concatenate([batch.inputs["x"] for batch in data.batches(16)]).reshape(-1, 8).astype(np.float64)
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    reach = np.abs(x * gains + 0.1 * gains).max(axis=0)
    w = weights(made)["w"]
    s = np.sqrt(reach / np.abs(w).max(axis=1))
    s *= (reach / s).max() / reach.max()  # the largest activation stays as large
    np.testing.assert_allclose(smoothed["w"], w * s[:, None], rtol=1e-4)
    np.testing.assert_allclose(smoothed["g"], gains / s, rtol=1e-4)
    np.testing.assert_allclose(smoothed["b"], 0.1 * gains / s, rtol=1e-4)


@settings(max_examples=12, deadline=None)
@given(
    each=st.integers(1, 4), heads=st.integers(1, 3), length=st.integers(1, 5), split=st.booleans(),
    seed=st.integers(0, 1000), alpha=st.sampled_from([None, 0.0, 0.3, 1.0]),
)  # fmt: skip
def test_attention_computes_the_same(
    each: int, heads: int, length: int, split: bool, seed: int, alpha: float | None
) -> None:
    width = each * heads
    made, data = attention(width, heads, length, split, seed), rows(8, length, width)
    smoothed = Smooth(alpha)(made, context(data))
    (before,), (after,) = run(made.bytes, data), run(smoothed.bytes, data)
    np.testing.assert_allclose(after, before, atol=1e-4 * np.abs(before).max())


@pytest.mark.parametrize("split", [True, False])
def test_values_meet_the_output_projection_and_queries_and_keys_are_left(split: bool) -> None:
    made = attention(6, 2, 4, split, 3)
    first, *others = groups(made, {"x": normal(0, 2, 4, 6)})
    assert len(first.readers) == (3 if split else 1)  # all who read the LayerNormalization
    (values,) = others
    assert values.source == ("pv" if split else "p")
    assert np.flatnonzero(values.free).tolist() == [*range(6)] if split else [*range(12, 18)]
    assert values.readers[0].node == "y"


@pytest.mark.parametrize("name", ["vit", "bert", "gpt", "convnext", "mixer"])
def test_families_compute_the_same_in_other_scales(name: str) -> None:
    made = example(name)
    lowered = lower(made.module, next(made.data.batches(2)).inputs)
    smoothed = Smooth(alpha=0.5)(lowered, context(made.data.take(slice(16))))
    assert smoothed.hash != lowered.hash
    for after, before in zip(run(smoothed.bytes, made.data), run(lowered.bytes, made.data), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize(
    "reads",
    [
        "p = MatMul(a, w)\ny = Add(p, a)",  # a residual stream
        "q = Gelu(a)\ny = MatMul(q, w)",  # not homogeneous
        "t = Transpose<perm=[0,2,1]>(a)\nu = MatMul(t, w)\ny = Transpose<perm=[0,2,1]>(u)",  # reads positions
        "q = MatMul(a, w)\nr = MatMul(q, w)\ny = Identity(r)",  # one weight for two layers
        "q = ReduceMean(a, channels)\nr = Expand(q, shape)\ny = MatMul(r, w)",  # mixes channels
    ],
)
def test_what_cannot_be_scaled_is_left(reads: str) -> None:
    made = graph(
        f"(float[batch,8,8] x) => (float[batch,8,8] y) {{\na = LayerNormalization<axis=-1>(x, g)\n{reads}\n}}",
        g=np.exp(normal(2, 8)), w=normal(3, 8, 8), channels=np.array([2]), shape=np.array([1, 1, 8]),
    )  # fmt: skip
    assert Smooth(alpha=0.5)(made, context(rows(8, 8))).bytes == made.bytes


def test_what_the_caller_reads_is_left() -> None:
    made = graph(
        """(float[batch,6,8] x) => (float[batch,6,5] y, float[batch,6,8] a) {
            a = LayerNormalization<axis=-1>(x, g)
            y = MatMul(a, w)
        }""",
        g=np.exp(normal(2, 8)), w=normal(3, 8, 5),
    )  # fmt: skip
    assert Smooth(alpha=0.5)(made, context(rows())).bytes == made.bytes


def test_only_the_channels_that_somebody_else_reads_are_left() -> None:
    made = graph(
        """(float[batch,6,8] x) => (float[batch,6,5] y, float[batch,6,3] z) {
            a = LayerNormalization<axis=-1>(x, g)
            z = Slice(a, from, to, axis)
            y = MatMul(a, w)
        }""",
        g=np.exp(normal(2, 8)), w=normal(3, 8, 5), axis=np.array([2]), to=np.array([5]), **{"from": np.array([2])},
    )  # fmt: skip
    data = rows()
    smoothed = Smooth(alpha=0.5)(made, context(data))
    assert (weights(smoothed)["g"] == weights(made)["g"])[2:5].all()
    assert (weights(smoothed)["g"] != weights(made)["g"]).any()
    for after, before in zip(run(smoothed.bytes, data), run(made.bytes, data), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


def test_a_mean_over_positions_hands_channels_on() -> None:
    made = graph(
        """(float[batch,6,8] x) => (float[batch,5] y) {
            a = LayerNormalization<axis=-1>(x, g)
            m = ReduceMean<keepdims=0>(a, axes)
            y = Gemm<transB=1>(m, w)
        }""",
        g=np.exp(normal(2, 8)), w=normal(3, 5, 8), axes=np.array([1]),
    )  # fmt: skip
    data = rows()
    smoothed = Smooth(alpha=0.5)(made, context(data))
    assert smoothed.hash != made.hash
    np.testing.assert_allclose(run(smoothed.bytes, data)[0], run(made.bytes, data)[0], rtol=1e-4, atol=1e-5)


def test_a_scale_that_two_normalisations_share_is_copied() -> None:
    made = graph(
        """(float[batch,6,8] x) => (float[batch,6,8] y) {
            a = LayerNormalization<axis=-1>(x, g)
            p = MatMul(a, w)
            r = Relu(p)
            b = LayerNormalization<axis=-1>(r, g)
            y = MatMul(b, v)
        }""",
        g=np.exp(normal(2, 8)), w=normal(3, 8, 8), v=np.exp(normal(4, 8, 8)),
    )  # fmt: skip
    data = rows()
    smoothed = Smooth(alpha=0.7)(made, context(data))
    assert len(weights(smoothed)) == len(weights(made)) + 1
    (after,), (before,) = run(smoothed.bytes, data), run(made.bytes, data)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


def test_zeros_stay_zeros() -> None:
    mask = normal(5, 8, 5) > 0
    pruned = graph(
        """(float[batch,6,8] x) => (float[batch,6,5] y) {
            a = LayerNormalization<axis=-1>(x, g)
            y = MatMul(a, w)
        }""",
        g=np.exp(normal(1, 8)), w=normal(0, 8, 5) * mask,
    )  # fmt: skip
    smoothed = Smooth()(replace(pruned, masks={"w": mask}), context(rows()))
    assert not weights(smoothed)["w"][~mask].any()


def decibels(made: FloatGraph, exact: NDArray[np.float32], data: DataSet) -> float:
    hub = quantize(made, measured(made, data), QuantSpec())
    (answer,) = run(hub.bytes, data)
    return float(10 * np.log10(np.square(exact).sum() / np.square(answer - exact).sum()))


def test_outlying_channels_cost_integers_nothing_once_they_are_smoothed() -> None:
    """A channel 60 times the others, read by weights 60 times smaller: the integers of all others would be few."""
    data = rows(64)
    even, outlying = normed(np.ones(8, np.float32)), normed(np.array([1, 60, 1, 1, 1, 1, 1, 1], np.float32))
    (exact,) = run(outlying.bytes, data)
    lost = decibels(even, run(even.bytes, data)[0], data) - decibels(outlying, exact, data)
    left = decibels(even, run(even.bytes, data)[0], data) - decibels(Smooth()(outlying, context(data)), exact, data)
    assert lost > 15
    assert left < 1


@settings(max_examples=10, deadline=None)
@given(spread=st.floats(0, 3), seed=st.integers(0, 1000))
def test_the_chosen_scales_are_never_worse_on_the_data_they_were_chosen_by(spread: float, seed: int) -> None:
    """One product: its output's error in integers is what the choice goes by."""
    made, data = normed(np.exp(spread * normal(seed, 8)), seed), rows(64)
    (exact,) = run(made.bytes, data)
    assert decibels(Smooth()(made, context(data)), exact, data) >= decibels(made, exact, data) - 0.3


def test_an_alpha_that_is_no_share_is_refused() -> None:
    with pytest.raises(DeploykitError, match="alpha must be between 0 and 1"):
        passes.build(Step("smooth", {"alpha": 1.5}))


def test_without_calibration_data_it_says_what_is_missing() -> None:
    with pytest.raises(DeploykitError, match="--calib"):
        Smooth()(normed(np.ones(8, np.float32)), Context(X86))
