"""Mixed precision: bits product by product, what fewer of them lose, and which assignment is best."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import conv_relu_conv, graph, images, measured, normal, residual, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deploykit import passes, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError, MissingExtra
from deploykit.core.patterns import matching
from deploykit.core.recipe import Step
from deploykit.core.target import QuantSpec
from deploykit.hub.analysis.answers import Exam
from deploykit.hub.analysis.measures import cross_entropy, divergence, squared
from deploykit.hub.analysis.tail import Tail
from deploykit.hub.bits import held_weights, with_bits
from deploykit.hub.graph import FloatGraph, Hub
from deploykit.hub.layers import layers
from deploykit.hub.mixed import assignment
from deploykit.hub.mixed.assignment import OverBudget, assign, cost
from deploykit.hub.mixed.costs import macs, read_times
from deploykit.hub.mixed.frontier import cheapest_within, frontier
from deploykit.hub.mixed.sensitivity import sensitivities
from deploykit.hub.quantize import quantize
from deploykit.hub.slices import Slicer

pytest.importorskip("scipy")
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def hub_of(made: FloatGraph, data: DataSet, spec: QuantSpec | None = None) -> Hub:
    return quantize(made, measured(made, data), spec or QuantSpec())


def slicer_of(hub: Hub) -> Slicer:
    return Slicer(onnx.load_model_from_string(hub.bytes))


def stored(hub: Hub) -> dict[str, tuple[NDArray[Any], ...]]:
    """What is stored for every product: integers, their scale, bias and its scale."""
    slicer = slicer_of(hub)
    return {
        layer.name: tuple(
            slicer.array(name) for name in (layer.weight, layer.weight_scale, layer.bias, layer.bias_scale) if name
        )
        for layer in layers(slicer)
    }


# --- bits


def every_kind() -> FloatGraph:
    """All kinds of products; a channel with small weights and a large bias, whose scale the bias decides."""
    small = normal(0, 4, 3, 3, 3)
    small[2] *= 1e-9
    return graph(
        """(float[batch,3,6,6] x) => (float[batch,5] y, float[batch,6,6,4] z) {
            a = Conv<pads=[1,1,1,1]>(x, wa, ba)
            d = Conv<pads=[1,1,1,1], group=4>(a, wd)
            t = ConvTranspose<kernel_shape=[1,1], group=2>(d, wt, bt)
            c = Transpose<perm=[0,2,3,1]>(t)
            p = MatMul(c, wp)
            z = Add(p, bp)
            m = ReduceMean<keepdims=0>(t, axes)
            y = Gemm<transB=1>(m, wy, by)
        }""",
        wa=small, ba=normal(1, 4) * 1e3, wd=normal(2, 4, 1, 3, 3), wt=normal(3, 4, 2, 1, 1), bt=normal(4, 4),
        wp=normal(5, 4, 4), bp=normal(6, 4), wy=normal(7, 5, 4), by=normal(8, 5), axes=np.array([2, 3]),
    )  # fmt: skip


@FEW
@given(
    st.lists(st.integers(2, 8), min_size=5, max_size=5),
    st.sampled_from(["channel", "tensor"]),
    st.sampled_from(["float", "power_of_two"]),
    st.sampled_from(["int32", "float"]),
    st.integers(2, 8),
)
def test_each_product_is_what_quantizing_the_network_with_its_bits_makes_of_it(
    chosen: list[int], granularity: Any, scale: Any, bias: Any, others: int
) -> None:
    made, data = every_kind(), images(8, shape=(3, 6, 6))
    spec = QuantSpec(weight_bits=others, weight_granularity=granularity, scale=scale, bias=bias)
    ranges = measured(made, data)
    bits = dict(zip("adtpy", chosen, strict=True))
    found = stored(with_bits(quantize(made, ranges, spec), bits))
    for name, b in bits.items():
        expected = stored(quantize(made, ranges, replace(spec, weight_bits=b)))[name]
        for one, other in zip(found[name], expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_products_that_are_not_named_keep_every_bit_and_the_hub_it_came_from_all() -> None:
    hub = hub_of(residual(), images())
    before, bits = stored(hub), with_bits(hub, {"b": 4})
    after = stored(bits)
    assert [np.array_equal(before[n][0], after[n][0]) for n in ("a", "b", "y")] == [True, False, True]
    assert bits.bits == {held_weights(slicer_of(hub))[1].weight: 4}
    assert stored(hub)["b"][0].max() == 127 and bits.spec_of(next(iter(bits.bits))).weight_max == 7


def test_bits_that_are_the_specs_are_none_of_their_own() -> None:
    hub = hub_of(residual(), images())
    again = with_bits(with_bits(hub, {"b": 4}), {"b": 8})
    assert again.bits == {} and again.bytes == hub.bytes


def shared() -> FloatGraph:
    """Two convolutions with one weight."""
    return graph(
        """(float[batch,3,8,8] x) => (float[batch,3,8,8] y) {
            a = Conv<pads=[1,1,1,1]>(x, w)
            r = Relu(a)
            y = Conv<pads=[1,1,1,1]>(r, w)
        }""",
        w=normal(0, 3, 3, 3, 3),
    )


def test_products_that_share_a_weight_share_its_bits_and_the_most_hold() -> None:
    hub = hub_of(shared(), images())
    assert [[layer.name for layer in held.layers] for held in held_weights(slicer_of(hub))] == [["a", "y"]]
    for asked, most in (({"a": 4}, 4), ({"y": 4}, 4), ({"a": 3, "y": 5}, 5)):
        found = with_bits(hub, asked)
        assert list(found.bits.values()) == [most]
        assert np.abs(stored(found)["a"][0]).max() == 2 ** (most - 1) - 1
        assert stored(found)["y"][0] is not None
        np.testing.assert_array_equal(stored(found)["a"][0], stored(found)["y"][0])


def test_a_name_that_no_product_has_is_an_error_with_the_nearest() -> None:
    with pytest.raises(DeploykitError, match=r"no product with integer weights 'bb'. Did you mean 'b'"):
        with_bits(hub_of(residual(), images()), {"bb": 4})


# --- patterns


def test_patterns_choose_names_and_a_name_is_never_taken_for_a_pattern() -> None:
    names = ["layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "odd[1]"]
    assert matching("layer", ["layer1.*"], names) == {"layer1.0.conv1", "layer1.0.conv2"}
    assert matching("layer", ["*.conv1", "odd[1]"], names) == {"layer1.0.conv1", "layer2.0.conv1", "odd[1]"}
    assert matching("layer", [], names) == set()
    with pytest.raises(DeploykitError, match=r"no layer 'layer3\.\*'\. Did you mean 'layer2\.0\.conv1'"):
        matching("layer", ["layer1.*", "layer3.*"], names)


def test_layers_stay_in_float_by_pattern() -> None:
    made, data = residual(), images()
    hub = quantize(made, measured(made, data), QuantSpec(), keep_float=["[ab]"])
    assert [d.layer for d in hub.decisions if d.why == "kept in float on request"] == ["a", "b"]


# --- what a change of one weight does to the answers


def changed(made: FloatGraph, weight: str, error: NDArray[np.float32], bias: str, shift: NDArray[Any]) -> FloatGraph:
    import onnx_ir as ir

    model = made.copy()
    for name, delta in ((weight, error), (bias, shift)):
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor((value.const_value.numpy() + delta).astype(np.float32), name=name)
    return replace(made, model=model)


def output_of(made: FloatGraph, name: str, data: DataSet) -> NDArray[Any]:
    from deploykit.hub.running import exposing

    return exposing(made.model, [name])(next(data.batches(len(data))).inputs)[name]


@pytest.mark.parametrize("count", [4, 7])
def test_what_a_changed_weight_loses_is_what_a_network_with_that_weight_and_a_corrected_bias_answers(
    count: int,
) -> None:
    made, data = residual(), images(count)
    tail = Tail(made, data)
    (z,) = run(made.bytes, data)
    for layer, y, axes in (("a", "a", (0, 2, 3)), ("b", "b", (0, 2, 3)), ("y", "y", (0,))):
        weight, bias = ("wc", "bc") if layer == "y" else (f"w{layer}", f"b{layer}")
        shape = made.model.graph.initializers[weight].shape
        error = 0.1 * normal(3, *(int(d) for d in shape or ()))
        uncorrected = changed(made, weight, error, bias, np.zeros(4))
        shift = (output_of(made, y, data) - output_of(uncorrected, y, data)).mean(axes)
        (answer,) = run(changed(made, weight, error, bias, shift).bytes, data)
        expected = np.square(answer - z).sum() / np.square(z).sum()
        assert squared(tail.moved(layer, y, weight, error)) == pytest.approx(expected, rel=1e-3)
    tail.close()


def test_the_answers_of_several_outputs_and_of_branches_count_each_by_its_own_size() -> None:
    made = graph(
        """(float[batch,3,8,8] x) => (float[batch,3,8,8] y, float[batch,3,8,8] z) {
            a = Conv<pads=[1,1,1,1]>(x, wa)
            z = Conv<pads=[1,1,1,1]>(x, wz)
            s = Add(a, z)
            y = Mul(s, big)
        }""",
        wa=normal(0, 3, 3, 3, 3), wz=normal(1, 3, 3, 3, 3), big=np.float32(100.0),
    )  # fmt: skip
    data, error = images(6), 0.1 * normal(2, 3, 3, 3, 3)
    y, z = run(made.bytes, data)
    moved = run(changed(made, "wz", error, "wa", np.zeros(1)).bytes, data)
    drift = [m - e - (m - e).mean((0, 2, 3), keepdims=True) for m, e in zip(moved, (y, z), strict=True)]
    expected = [np.square(d).sum() / np.square(e).sum() for d, e in zip(drift, (y, z), strict=True)]
    tail = Tail(made, data)
    assert squared(tail.moved("a", "a", "wa", error)) > 0
    assert squared(tail.moved("z", "z", "wz", error)) == pytest.approx(sum(expected), rel=1e-3)
    tail.close()


def test_the_loss_of_a_weight_is_noise_of_the_answers_and_falls_with_its_bits() -> None:
    made, data = residual(), images(64)
    hub = hub_of(made, data)
    found = sensitivities(hub, data.take(slice(0, 48)), data.take(slice(48, 64)), (2, 4, 8))
    assert list(found) == ["a", "b", "y"]
    for row in found.values():
        assert row[2] > 4 * row[4] > 16 * row[8] > 0


def test_layers_whose_answers_nobody_hears_may_have_few_bits() -> None:
    wa, wb = normal(0, 4, 3, 3, 3), normal(1, 4, 4, 3, 3)
    made = graph(
        """(float[batch,3,8,8] x) => (float[batch,4,8,8] y) {
            a = Conv<pads=[1,1,1,1]>(x, wa)
            q = Conv<pads=[1,1,1,1]>(a, wb)
            m = Mul(q, little)
            y = Add(a, m)
        }""",
        wa=wa, wb=wb, little=np.float32(0.01),
    )  # fmt: skip
    data = images(32)
    found = sensitivities(hub_of(made, data), data, data, (4, 8))
    assert found["q"][4] < 0.01 * found["a"][4]


def test_weights_whose_integers_are_never_chosen_have_a_loss_too() -> None:
    made, data = every_kind(), images(32, shape=(3, 6, 6))
    found = sensitivities(hub_of(made, data), data, data, (4, 8))
    assert list(found) == ["a", "d", "t", "p", "y"]
    assert found["t"][4] > 10 * found["t"][8] > 0
    twins = sensitivities(hub_of(shared(), images()), images(), images(), (4, 8))
    assert list(twins) == ["a"] and twins["a"][4] > 10 * twins["a"][8] > 0


def test_answers_are_also_measured_by_their_probabilities_and_by_labels() -> None:
    import torch
    import torch.nn.functional as F

    z, moved, labels = normal(0, 9, 5), normal(1, 9, 5), np.arange(9) % 5
    pairs = [({"y": moved[:4]}, {"y": z[:4]}), ({"y": moved[4:]}, {"y": z[4:]})]
    p, q = (F.log_softmax(torch.from_numpy(a), 1) for a in (z, moved))
    expected = F.kl_div(q, p, reduction="batchmean", log_target=True)
    assert divergence(pairs) == pytest.approx(float(expected), rel=1e-5)
    right = torch.from_numpy(labels)
    assert cross_entropy(pairs, labels) == pytest.approx(float(F.nll_loss(q, right) - F.nll_loss(p, right)), rel=1e-5)
    with pytest.raises(DeploykitError, match="the calibration data has none"):
        cross_entropy(pairs)
    with pytest.raises(DeploykitError, match=r"output 'y' with shape \[2, 3, 4\] is no class scores"):
        divergence([({"y": normal(0, 2, 3, 4)}, {"y": normal(0, 2, 3, 4)})])


@pytest.mark.parametrize("measure", ["squared", "divergence", "cross_entropy"])
def test_by_every_measure_fewer_bits_lose_more(measure: Any) -> None:
    made, data = classifier()
    labelled = replace(data, labels=run(made.bytes, data)[0].argmax(1))
    for row in sensitivities(hub_of(made, data), data, labelled, (2, 8), measure).values():
        assert row[2] > 4 * abs(row[8])


# --- assignments


@st.composite
def tables(draw: Any) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
    bits = draw(st.lists(st.sampled_from([2, 3, 4, 8]), min_size=1, max_size=3, unique=True))
    names = [f"l{i}" for i in range(draw(st.integers(1, 5)))]
    own = {name: bits if draw(st.booleans()) else bits[:1] for name in names}
    loss, price = st.floats(0, 1, width=32), st.integers(0, 50)
    losses = {name: {b: draw(loss) for b in own[name]} for name in names}
    return losses, {name: {b: float(draw(price)) for b in own[name]} for name in names}


@settings(max_examples=100, deadline=None)
@given(tables(), st.floats(0, 1))
def test_no_assignment_within_the_budget_loses_less(
    problem: tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]], share: float
) -> None:
    losses, costs = problem
    every = [
        dict(zip(losses, bits, strict=True)) for bits in itertools.product(*(list(row) for row in losses.values()))
    ]
    least, most = min(cost(costs, bits) for bits in every), max(cost(costs, bits) for bits in every)
    budget = least + share * (most - least)
    found = assign(losses, costs, budget)
    best = min(cost(losses, bits) for bits in every if cost(costs, bits) <= budget * (1 + 1e-6))
    assert cost(costs, found) <= budget * (1 + 3e-6) + 1e-9
    assert cost(losses, found) == pytest.approx(best, rel=1e-6, abs=1e-9)
    if least > 0:
        with pytest.raises(OverBudget) as refused:
            assign(losses, costs, 0.9 * least)
        assert refused.value.least == least


def test_hundreds_of_layers_are_assigned_as_well_as_a_relaxation_allows() -> None:
    random = np.random.default_rng(0)
    sizes, harm = random.integers(100, 10**6, 300), random.random(300)
    losses = {str(i): {4: float(harm[i]), 8: float(harm[i]) / 256} for i in range(300)}
    costs = {str(i): {b: float(sizes[i] * b) for b in (4, 8)} for i in range(300)}
    budget = 0.7 * 8 * float(sizes.sum())
    found = assign(losses, costs, budget)
    # the linear relaxation gives 4 bits to weights in the order of harm per byte, the last of them in part
    order = np.argsort(harm / sizes)
    saved = np.cumsum(4.0 * sizes[order])
    needed = 8 * float(sizes.sum()) - budget
    bound = harm.sum() / 256 + float((harm[order] * 255 / 256)[: np.searchsorted(saved, needed)].sum())
    assert cost(costs, found) <= budget * (1 + 1e-6)
    assert bound <= cost(losses, found) <= bound + 2 * float(harm.max())


def test_a_missing_solver_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"needs the extra 'mixed': pip install 'deploykit\[mixed\]'"):
        assignment.require_solver()


def some_tables(seed: int = 0, count: int = 12) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
    random = np.random.default_rng(seed)
    sizes, harm = random.integers(1, 100, count), random.random(count)
    return (
        {str(i): {4: float(harm[i]), 8: 0.0} for i in range(count)},
        {str(i): {b: float(sizes[i] * b) for b in (4, 8)} for i in range(count)},
    )


def test_the_frontier_loses_less_the_more_it_costs() -> None:
    losses, costs = some_tables()
    found = frontier(losses, costs)
    assert len(found) > 5 and all(t.lost is None for t in found)
    assert all(a.cost < b.cost and a.predicted > b.predicted for a, b in itertools.pairwise(found))
    assert found[0].cost == sum(row[4] for row in costs.values())
    assert found[-1].predicted == 0.0


@pytest.mark.parametrize("most", [0.0, 0.1, 0.7, 3.0, 99.0])
def test_the_cheapest_within_a_loss_is_found_in_few_trials(most: float) -> None:
    losses, costs = some_tables()
    asked: list[float] = []

    def measure(bits: Any) -> float:
        asked.append(cost(losses, bits))
        return asked[-1]

    best, tried = cheapest_within(losses, costs, most, measure)
    assert best is not None and best.lost is not None and best.lost <= most
    assert len(asked) == len(tried) <= 9 and tried == sorted(tried, key=lambda t: t.cost)
    whole = sum(row[8] for row in costs.values())
    for budget in np.arange(best.cost - 0.02 * whole, sum(row[4] for row in costs.values()), -0.02 * whole):
        assert cost(losses, assign(losses, costs, float(budget))) > most


def test_where_even_the_most_bits_lose_too_much_there_is_none() -> None:
    losses, costs = some_tables()
    best, tried = cheapest_within(losses, costs, 1.0, lambda bits: 2.0)
    assert best is None and [t.lost for t in tried] == [2.0, 2.0]


def test_costs_are_counted_by_hand() -> None:
    made = every_kind()
    hub = hub_of(made, images(8, shape=(3, 6, 6)))
    held = held_weights(slicer_of(hub))
    assert [each.size for each in held] == [4 * 3 * 9, 4 * 9, 4 * 2, 4 * 4, 5 * 4]
    positions = 6 * 6
    assert macs(hub, held) == {
        "a": 4 * 3 * 9 * positions, "d": 4 * 9 * positions, "t": 4 * 2 * positions, "p": 4 * 4 * positions, "y": 5 * 4
    }  # fmt: skip
    twice = hub_of(shared(), images())
    assert macs(twice, held_weights(slicer_of(twice))) == {"a": 2 * 3 * 3 * 9 * 64}


def test_multiply_accumulates_of_free_shapes_are_not_known() -> None:
    made = graph(
        "(float[batch,3,h,w] x) => (float[batch,4,h,w] y) { y = Conv<pads=[1,1,1,1]>(x, w) }", w=normal(0, 4, 3, 3, 3)
    )
    hub = hub_of(made, images())
    with pytest.raises(DeploykitError, match=r"multiply-accumulates of 'y' depend on the shape.*use bytes"):
        macs(hub, held_weights(slicer_of(hub)))


def test_times_that_somebody_measured_are_read_and_gaps_are_named(tmp_path: Path) -> None:
    path = tmp_path / "times.toml"
    path.write_text('["a.b"]\n4 = 1\n8 = 2.5\n[c]\n4 = 0.5\n')
    assert read_times(path, ["a.b", "c"], [4]) == {"a.b": {4: 1.0}, "c": {4: 0.5}}
    with pytest.raises(DeploykitError, match="layer 'c' has no milliseconds at 8 bits"):
        read_times(path, ["a.b", "c"], [4, 8])
    with pytest.raises(DeploykitError, match="layer 'd' has no milliseconds at 4 bits"):
        read_times(path, ["a.b", "c", "d"], [4])
    with pytest.raises(DeploykitError, match=r"no layer 'a\.b'"):
        read_times(path, ["c"], [4])


# --- the pass


def classifier(seed: int = 0) -> tuple[FloatGraph, DataSet]:
    """Scores of ten classes from three layers of very different size, and samples for it."""
    made = graph(
        """(float[batch,12] x) => (float[batch,10] y) {
            a = Gemm<transB=1>(x, wa, ba)
            ra = Relu(a)
            b = Gemm<transB=1>(ra, wb, bb)
            rb = Relu(b)
            y = Gemm<transB=1>(rb, wc, bc)
        }""",
        wa=normal(seed, 16, 12), ba=normal(1, 16), wb=normal(2, 64, 16), bb=normal(3, 64), wc=normal(4, 10, 64),
        bc=normal(5, 10),
    )  # fmt: skip
    return made, images(100, shape=(12,))


def chosen(hub: Hub, data: DataSet, held_out: DataSet | None = None, **options: Any) -> Hub:
    roles = {"calibration": data} | ({"holdout": held_out} if held_out is not None else {})
    return passes.build(Step("mixed", options))(hub, Context(targets.load("x86"), roles))


def share(hub: Hub) -> float:
    held = held_weights(slicer_of(hub))
    return sum(h.size * hub.spec_of(h.weight).weight_bits for h in held) / (8 * sum(h.size for h in held))


@pytest.mark.parametrize("budget", [0.6, 0.75, 0.9])
def test_of_all_assignments_within_the_budget_it_takes_the_one_that_loses_least(budget: float) -> None:
    made, data = classifier()
    hub = hub_of(made, data)
    found = chosen(hub, data, bytes=budget)
    assert share(found) <= budget
    curve, table = found.findings
    assert (
        len({row[:2] for row in curve.rows}) == len(curve.rows) and [row[3] for row in curve.rows].count("chosen") == 1
    )
    assert table.columns == ("layer", "bits", "weights", "loss with 4 bits", "loss with 8 bits")
    losses = {str(row[0]): {4: float(row[3] or 0), 8: float(row[4] or 0)} for row in table.rows}
    sizes = {str(row[0]): int(row[2] or 0) for row in table.rows}
    every = [dict(zip(losses, bits, strict=True)) for bits in itertools.product((4, 8), repeat=3)]
    within = [b for b in every if sum(sizes[n] * b[n] for n in b) <= budget * 8 * sum(sizes.values())]
    best = min(within, key=lambda b: cost(losses, b))
    assert {str(row[0]): row[1] for row in table.rows} == best
    assert {held.name: found.spec_of(held.weight).weight_bits for held in held_weights(slicer_of(found))} == best
    assert found.bytes == with_bits(hub, best).bytes


def test_a_budget_of_multiplications_or_of_milliseconds_chooses_by_these(tmp_path: Path) -> None:
    made, data = classifier()
    hub = hub_of(made, data)
    times = tmp_path / "times.toml"
    times.write_text(
        "".join(f"[{name}]\n4 = {4 if name == 'y' else 0.9}\n8 = {9 if name == 'y' else 1}\n" for name in "aby")
    )
    by_time = chosen(hub, data, ms=6.0, times=str(times))
    assert list(by_time.bits.values()) == [4] and next(iter(by_time.bits)) == held_weights(slicer_of(hub))[2].weight
    assert share(chosen(hub, data, macs=0.7)) <= 0.7  # a dense layer multiplies each of its weights once


def test_layers_that_are_to_keep_their_bits_keep_them() -> None:
    made, data = classifier()
    hub = hub_of(made, data)
    weights = {held.name: held.weight for held in held_weights(slicer_of(hub))}
    found = chosen(hub, data, bytes=0.95, keep=["[by]"])
    assert set(found.bits) == {weights["a"]}
    with pytest.raises(DeploykitError, match=r"no layer 'head\.\*'"):
        chosen(hub, data, keep=["head.*"])


def test_a_budget_that_cannot_be_met_is_refused_with_the_least_there_is() -> None:
    made, data = classifier()
    with pytest.raises(
        DeploykitError, match=r"0\.3 \(weight bytes, share of int8\) cannot be met.*least possible is 0\.5"
    ):
        chosen(hub_of(made, data), data, bytes=0.3)
    with pytest.raises(DeploykitError, match=r"0\.6 .*the least possible is 0\.9483"):
        chosen(hub_of(made, data), data, bytes=0.6, keep=["b", "y"])


def test_the_smallest_network_within_a_loss_has_no_smaller_neighbour_within_it() -> None:
    made, data = classifier()
    hub, held_out = hub_of(made, data), images(200, seed=5, shape=(12,))
    found = chosen(hub, data, held_out, max_drop=4.0)
    frontier_ = next(f for f in found.findings if f.curve)
    rows = {row[3]: row for row in frontier_.rows}
    assert rows["chosen"][2] is not None and rows["chosen"][2] <= 4.0
    assert all(row[2] > 4.0 for row in frontier_.rows if row[0] < rows["chosen"][0])
    assert len(frontier_.rows) > 2
    loose = chosen(hub, data, held_out, max_drop=100.0)
    assert share(loose) == 0.5


def test_a_loss_that_no_assignment_stays_within_is_refused_with_what_was_tried() -> None:
    made, data = classifier()
    noise = DataSet.of({"x": normal(5, 40, 12)}, np.zeros(40, np.int64))
    hub = hub_of(made, data)
    right = run(made.bytes, noise)[0].argmax(1)
    with pytest.raises(
        DeploykitError, match=r"no assignment stays within 0 points of accuracy on 40 samples.*2\.5.*0\.375 loses"
    ):
        chosen(hub, data, replace(noise, labels=right), max_drop=0.0, bits=[2, 3])


def test_answers_to_samples_that_are_made_up_are_not_counted() -> None:
    made, data = classifier()
    with pytest.raises(DeploykitError, match="max_drop counts answers to real samples"):
        chosen(hub_of(made, data), replace(data, synthetic=True), max_drop=1.0)


def test_labels_decide_where_there_are_some_and_the_float_networks_answers_where_not() -> None:
    made, data = classifier()
    hub = with_bits(hub_of(made, data), {"a": 2})
    answers, float_answers = run(hub.bytes, data)[0].argmax(1), run(made.bytes, data)[0].argmax(1)
    exam = Exam(hub, data)
    assert exam.lost(hub) == pytest.approx(100 - 100 * (answers == float_answers).mean())
    labels = (np.arange(100) % 10).astype(np.int64)
    exam = Exam(hub, replace(data, labels=labels))
    assert exam.lost(hub) == pytest.approx(100 * ((float_answers == labels).mean() - (answers == labels).mean()))
    with pytest.raises(
        DeploykitError, match=r"max_drop counts answers, and output 'y'.*no class scores.*bytes, macs or ms"
    ):
        Exam(hub_of(conv_relu_conv(), images()), images())


@pytest.mark.parametrize(
    "options, said",
    [
        ({"bits": [4]}, "bits must be two or more"),
        ({"bits": [4, 9]}, "between 2 and 8"),
        ({"bytes": 0.7, "macs": 0.7}, "one budget"),
        ({"bytes": 0.0}, "above 0"),
        ({"ms": 3.0}, "ms needs times.*cannot be measured here"),
        ({"times": "times.toml"}, "give ms"),
        ({"max_drop": -1.0}, "0 or more points"),
        ({"byte": 0.7}, "Did you mean 'bytes'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(DeploykitError, match=said):
        passes.build(Step("mixed", options))


def test_too_few_samples_and_steps_in_front_of_it_are_refused() -> None:
    made, data = classifier()
    hub = hub_of(made, data)
    with pytest.raises(DeploykitError, match="at least 16 calibration samples; there are 12"):
        chosen(hub, data.take(slice(0, 12)))
    corrected = passes.build(Step("bias_correct"))(hub, Context(targets.load("x86"), {"calibration": data}))
    with pytest.raises(DeploykitError, match="comes first of the hub steps"):
        chosen(corrected, data)


def test_no_weight_gets_more_bits_than_the_target_has() -> None:
    made, data = classifier()
    found = chosen(hub_of(made, data, QuantSpec(weight_bits=7)), data, bytes=0.8)
    assert set(found.bits.values()) == {4} and found.spec.weight_bits == 7


# --- on the road


def test_the_correction_that_few_bits_need_comes_behind_the_step_that_sets_them() -> None:
    from deploykit import planning
    from deploykit.core.recipe import Recipe

    def planned(*names: str, quant: QuantSpec | None = None, **options: Any) -> list[str]:
        steps = Recipe(tuple(Step(name, options if name == "mixed" else {}) for name in names))
        target = targets.load("x86")
        found = planning.plan(steps, replace(target, quant=quant or target.quant), ["data", "train", "teacher"])
        return [type(p.step).__name__ for p in found]

    assert planned("mixed") == ["Mixed", "Gptq"]
    assert planned("mixed", bits=[7, 8]) == ["Mixed", "WeightCorrect"]
    assert planned("mixed", "qat") == ["Mixed", "Gptq", "Qat"]
    assert planned("mixed", "weight_correct") == ["Mixed", "WeightCorrect"]
    assert planned("mixed", quant=QuantSpec(weight_granularity="tensor")) == ["Equalize", "Mixed", "Gptq"]
    assert planned("qat") == ["WeightCorrect", "Qat"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A network of two layers: with eight bits, and with as few as make 0.7 of their bytes."""
    import torch
    from torch import nn

    import deploykit as dk
    from deploykit.core.recipe import Recipe

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    folder, data = tmp_path_factory.mktemp("mixed"), normal(3, 120, 32)
    for name, steps in (("plain", ()), ("mixed", (Step("mixed", {"bytes": 0.7}),))):
        dk.export(net, "x86", data, recipe=Recipe(steps), out=folder / name, benchmark=False, precisions=("int8",))
    return folder / "plain", folder / "mixed"


def test_the_file_stores_few_bits_in_few_bytes(exported: tuple[Path, Path]) -> None:
    plain, mixed = ((folder / "model.int8.onnx").stat().st_size for folder in exported)
    weights = 32 * 64 + 64 * 64 + 64 * 10
    assert 0.2 * weights < plain - mixed < 0.4 * weights


def test_the_artifact_tells_how_bits_were_chosen(exported: tuple[Path, Path]) -> None:
    from deploykit.core.manifest import load_manifest
    from deploykit.report import report_json

    manifest = load_manifest(exported[1])
    assert [step.partition("(")[0] for step in manifest.steps] == ["Mixed", "Gptq"]
    curve, table = manifest.findings
    assert curve.curve == (curve.columns[0], "predicted loss") and table.columns[:3] == ("layer", "bits", "weights")
    assert {row[1] for row in table.rows} == {4, 8} and curve.step == manifest.steps[0]
    found = report_json(exported[1])["artifacts"][0]["findings"]
    assert [f["title"] for f in found] == [curve.title, table.title]
    assert load_manifest(exported[0]).findings == ()


def test_the_report_draws_the_frontier_and_lists_every_layer(exported: tuple[Path, Path]) -> None:
    pytest.importorskip("jinja2")
    from deploykit.core.manifest import load_manifest
    from deploykit.report import write_report

    page = write_report(exported[1]).read_text()
    curve, table = load_manifest(exported[1]).findings
    assert page.count("<circle") >= len(curve.rows) and f"<h2>{table.title}</h2>" in page
    for row in table.rows:
        assert f"<td>{row[0]}</td>" in page and f"{row[2]:,.0f}</td>" in page
