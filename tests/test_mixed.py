"""Mixed precision: bits product by product, what fewer of them lose, and which assignment is best."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import graph, images, measured, normal, residual, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mixed_cases import classifier, hub_of, slicer_of
from numpy.typing import NDArray

from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError, MissingExtra
from deploykit.core.patterns import matching
from deploykit.core.target import QuantSpec
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

pytest.importorskip("scipy")
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


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


SPEAKS = """
import numpy as np
from deploykit.hub.mixed.assignment import assign
random = np.random.default_rng(0)
for _ in range(60):
    sizes, bits = random.choice([432, 2304, 9216, 36864, 18432, 640], 20), np.linspace(0.5, 8, 15)
    d = 10 ** random.uniform(-1, 0.3, 20)[:, None] * 4.0**-bits * random.uniform(0.9, 1.1, (20, 15))
    c = sizes[:, None] * bits * random.uniform(0.95, 1.05, (20, 15)) / (32 * sizes.sum())
    losses, costs = ({str(i): dict(enumerate(row)) for i, row in enumerate(t.tolist())} for t in (d, c))
    assign(losses, costs, random.uniform(0.04, 0.2))
print("done")
"""


def test_the_solver_says_nothing_of_its_own_where_results_are_printed() -> None:
    """HiGHS does on five of these, to a pipe when the process ends."""
    said = subprocess.run([sys.executable, "-c", SPEAKS], capture_output=True, text=True, check=True)
    assert said.stdout == "done\n"


@pytest.mark.parametrize("closed", ["sys.stdout = None", "os.close(1)"])
def test_the_solver_works_where_there_is_no_standard_output(closed: str) -> None:
    once = SPEAKS.replace("range(60)", "range(1)").replace('print("done")', "")
    subprocess.run([sys.executable, "-c", f"import os, sys\n{closed}\n{once}"], capture_output=True, check=True)


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
