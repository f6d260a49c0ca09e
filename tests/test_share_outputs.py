"""Values shared for what layers compute: the least of error and bits against all clusterings, codes and values against
least squares, networks against what sharing by weights leaves of them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graphs import conv_relu_conv, graph, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deploykit import passes, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.journal import Journal
from deploykit.core.manifest import Finding
from deploykit.core.recipe import Step
from deploykit.hub.analysis.answers import Exam
from deploykit.hub.graph import FloatGraph
from deploykit.hub.layers import float_layers
from deploykit.hub.lower import lower
from deploykit.hub.running import session
from deploykit.hub.sharing.codebooks import coded_bits, share, share_at_level, weights, with_weights
from deploykit.hub.sharing.codes import at_level, cost, fitted, in_bits, values
from deploykit.hub.sharing.entropy import VALUE, borders, cheapest, constrained, rates
from deploykit.hub.sharing.outputs import forms
from deploykit.hub.slices import Slicer

seeds = st.integers(0, 2**32 - 1)


# ------------------------------------------------------------------ error and bits


def least_cost(x: NDArray[Any], h: NDArray[Any], lam: float, zeros: int) -> float:
    """Of all ways to cut sorted values into runs, and with zeros of all choices of the run around zero."""
    n, total, best = len(x), len(x) + zeros, np.inf

    def bits(count: int) -> float:
        return count * np.log2(total / count) if count else 0.0

    def run(a: int, b: int) -> float:
        mean = np.average(x[a:b], weights=h[a:b])
        return float((h[a:b] * (x[a:b] - mean) ** 2).sum() + lam * (bits(b - a) + VALUE))

    for k in range(n + 1):
        for cuts in itertools.combinations_with_replacement(range(n + 1), k):
            runs = list(itertools.pairwise((0, *cuts, n)))
            for around in range(len(runs)) if zeros else (None,):
                if all(a < b or i == around for i, (a, b) in enumerate(runs)):
                    costs = [run(a, b) for i, (a, b) in enumerate(runs) if i != around]
                    if around is not None:
                        a, b = runs[around]
                        costs.append(float((h[a:b] * x[a:b] ** 2).sum() + lam * bits(b - a + zeros)))
                    best = min(best, sum(costs))
    return float(best)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 6), zeros=st.sampled_from([0, 1, 9]), power=st.floats(-4, 0), seed=seeds)
def test_no_runs_of_values_cost_less_in_error_and_bits(n: int, zeros: int, power: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    x, h, lam = np.unique(random.normal(size=n)), random.uniform(0.1, 3.0, n), 10.0**power
    c, price = constrained(x, h, lam, zeros)
    assert (np.diff(c) > 0).all() and (not zeros or 0 in c)
    q = cheapest(x, h, c, price)
    occurs = np.bincount(q, minlength=len(c)) + zeros * (c == 0)
    used = occurs[occurs > 0]
    taken = (used * np.log2(used.sum() / used)).sum() + VALUE * np.count_nonzero((occurs > 0) & (c != 0))
    spent = float((h * (x - c[q]) ** 2).sum() + lam * taken)
    assert spent <= least_cost(x, h, lam, zeros) * (1 + 1e-9)


@pytest.mark.parametrize("bits", [3, 5])
def test_at_the_error_of_k_means_codes_take_fewer_bits(bits: int) -> None:
    weight = np.random.default_rng(0).standard_t(5, (200, 300)).astype(np.float32)
    plain = share(weight, bits)

    def error(found: NDArray[Any]) -> float:
        return float(np.square(found - weight, dtype=np.float64).sum())

    low, high = 0.0, 9.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (
            (low, middle) if error(share_at_level(weight, middle).weight) <= error(plain.weight) else (middle, high)
        )
    found = share_at_level(weight, high)
    assert error(found.weight) <= error(plain.weight)
    assert coded_bits(found) < 0.95 * coded_bits(plain)


def test_zeros_stay_and_small_weights_join_them() -> None:
    weight = normal(0, 80, 80) * (normal(1, 80, 80) > 0.8)
    found = share_at_level(weight, 2).weight
    assert (found[weight == 0] == 0).all()
    for sign in (-1, 1):
        joined, left = (found == 0) & (sign * weight > 0), sign * found > 0
        assert joined.any() and (sign * weight[joined]).max() <= (sign * weight[left]).min()
    assert not share_at_level(np.zeros((9, 9), np.float32), 3).weight.any()


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "an outlier"])
def test_a_level_is_the_bits_that_codes_take(kind: str) -> None:
    weight = normal(3, 300, 300)
    if kind == "heavy tails":
        weight = np.random.default_rng(0).standard_t(3, (300, 300)).astype(np.float32)
    if kind == "an outlier":
        weight[0, 0] = 1e4
    for bits in (2, 4, 6):
        assert coded_bits(share_at_level(weight, bits)) / weight.size == pytest.approx(bits, abs=0.3)


def test_a_weight_of_two_values_keeps_them_at_every_level() -> None:
    weight = np.random.default_rng(0).choice([-0.5, 0.5], (40, 40)).astype(np.float32)
    assert all(np.array_equal(share_at_level(weight, bits).weight, weight) for bits in (1, 4, 8))


@settings(max_examples=150, deadline=None)
@given(k=st.integers(1, 9), h=st.floats(0.01, 100), ties=st.booleans(), seed=seeds)
def test_between_borders_stand_the_cheapest_codes(k: int, h: float, ties: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    c, price = random.normal(size=k), random.uniform(0, 5, k)
    c = np.round(c) if ties else c
    v = random.normal(0, 2, 60)
    codes, between = borders(h, c, price)
    assert (np.diff(between) > 0).all() and len(between) == len(codes) - 1
    found, best = codes[np.searchsorted(between, v)], cheapest(v, np.asarray(h), c, price)
    assert h * (v - c[found]) ** 2 + price[found] == pytest.approx(h * (v - c[best]) ** 2 + price[best])


def test_wide_layers_get_the_codes_that_narrow_ones_get(monkeypatch: pytest.MonkeyPatch) -> None:
    t, h, kept = problem(2, 2, 30, 12, 0.3)
    c, price = np.asarray([-1.0, 0.0, 0.7, 1.5]), np.asarray([2.0, 0.5, 1.0, 3.0])
    narrow = fitted(t, h, kept, c, price, 0.5)
    monkeypatch.setattr("deploykit.hub.sharing.codes.WIDE", 1)
    assert all(np.array_equal(a, b) for a, b in zip(narrow, fitted(t, h, kept, c, price, 0.5), strict=True))


# ------------------------------------------------------------------ values and codes of a layer


def problem(seed: int, g: int, o: int, k: int, zeros: float = 0.0) -> tuple[Any, Any, Any]:
    """T, H and where weights may be other than zero."""
    random = np.random.default_rng(seed)
    mix = random.normal(size=(g, k, k))
    kept = random.random((g, o, k)) >= zeros
    kept[0, 0, 0] = True
    return random.normal(size=(g, o, k)), mix @ mix.swapaxes(1, 2) + 0.1 * np.eye(k), kept


@settings(max_examples=60, deadline=None)
@given(g=st.integers(1, 2), o=st.integers(1, 4), k=st.integers(1, 9), codes=st.integers(1, 4), seed=seeds)
def test_values_are_the_least_squares_solution_for_their_codes(g: int, o: int, k: int, codes: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    t, h, _ = problem(seed, g, o, k)
    q = random.integers(0, codes, (g, o, k))
    root = np.linalg.cholesky(h).swapaxes(1, 2)  # |L'(c_q - t)|² is the error of a row
    one_hot = np.eye(codes)[q]
    design = np.einsum("gij,gojc->goic", root, one_hot).reshape(-1, codes)
    aim = np.einsum("gij,goj->goi", root, t).reshape(-1)
    best = np.linalg.lstsq(design, aim, rcond=None)[0]
    found = values(q, t, h, random.normal(size=codes))
    least = float(np.square(design @ best - aim).sum())
    assert float(np.square(design @ found - aim).sum()) <= least * (1 + 1e-6) + 1e-9


@settings(max_examples=60, deadline=None)
@given(
    g=st.integers(1, 3), o=st.integers(1, 5), k=st.integers(1, 9), zeros=st.sampled_from([0.0, 0.6]),
    lam=st.sampled_from([0.0, 0.01, 0.3]), seed=seeds,
)  # fmt: skip
def test_every_turn_costs_less_and_none_more_than_the_nearest_codes(
    g: int, o: int, k: int, zeros: float, lam: float, seed: int
) -> None:
    t, h, kept = problem(seed, g, o, k, zeros)
    c = np.asarray([-1.0, 0.0, 0.7, 1.5])
    price = np.zeros(4)
    nearest = np.where(kept, np.abs(t[..., None] - c).argmin(-1), 1)
    before = cost(t, h, c, nearest, lam)
    if lam == 0:
        assert cost(t, h, *fitted(t, h, kept, c, price, lam, turns=0), lam) <= before * (1 + 1e-9)
    reached = [cost(t, h, *fitted(t, h, kept, c, price, lam, turns), lam) for turns in range(4)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(reached))
    found, q = fitted(t, h, kept, c, price, lam)
    assert (found[q][~kept] == 0).all()


def test_with_inputs_that_know_nothing_of_each_other_codes_are_the_nearest() -> None:
    t, c = np.random.default_rng(0).normal(size=(1, 4, 7)), np.asarray([-1.0, 0.2, 1.1])
    found, q = fitted(t, np.eye(7)[None], np.ones_like(t, bool), c, np.zeros(3), turns=0)
    assert np.array_equal(q, np.abs(t[..., None] - c).argmin(-1)) and np.array_equal(found, c)


def test_codes_of_a_small_layer_are_the_best_of_all_more_often_than_not() -> None:
    hits = 0
    for seed in range(40):
        t, h, kept = problem(seed, 1, 1, 6)
        c = np.asarray([-1.0, 0.0, 1.0])
        every = np.asarray(list(itertools.product(range(3), repeat=6)))
        best = min(cost(t, h, c, q[None, None], 0.0) for q in every)
        hits += cost(t, h, *fitted(t, h, kept, c, np.zeros(3), turns=1), 0.0) <= best * (1 + 1e-9)
    assert hits >= 24


@settings(max_examples=40, deadline=None)
@given(
    g=st.integers(1, 3), o=st.integers(1, 5), k=st.integers(1, 9), zeros=st.sampled_from([0.0, 0.6]),
    bits=st.integers(1, 4), seed=seeds,
)  # fmt: skip
def test_a_layer_has_no_more_values_than_its_bits_allow_and_zeros_stay(
    g: int, o: int, k: int, zeros: float, bits: int, seed: int
) -> None:
    t, h, kept = problem(seed, g, o, k, zeros)
    found = in_bits(t, h, kept, bits)
    assert len(np.unique(found)) <= 2**bits
    assert (found[~kept] == 0).all() and (at_level(t, h, kept, bits)[~kept] == 0).all()


def test_codes_whose_bits_count_take_fewer() -> None:
    t, h, kept = problem(5, 1, 40, 60)
    taken = []
    for lam in (0.0, 10.0, 100.0):
        c, q = fitted(t, h, kept, np.linspace(-2, 2, 9), np.zeros(9), lam)
        counts = np.bincount(q.reshape(-1), minlength=len(c))
        taken.append(float(rates(counts)[q].sum()))
    assert taken == sorted(taken, reverse=True) and taken[2] < 0.8 * taken[0]


# ------------------------------------------------------------------ networks


class Mixed(torch.nn.Module):
    """Convolutions, a depthwise one without bias among them, and products of matrices with their biases behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm = torch.nn.Conv2d(3, 12, 3, padding=1), torch.nn.BatchNorm2d(12)
        self.each = torch.nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.wide, self.head = torch.nn.Linear(12, 24), torch.nn.Linear(24, 6)
        torch.nn.init.uniform_(self.norm.weight, 0.2, 3.0)
        torch.nn.init.uniform_(self.norm.get_buffer("running_var"), 0.5, 2.0)
        self.eval()
        with torch.no_grad():  # every class is the answer now and then
            self.head.bias -= self(torch.from_numpy(next(smooth(64, 1).batches(64)).inputs["x"])).mean(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.each(torch.relu(self.norm(self.first(x)))))
        tokens = torch.relu(self.wide(x.flatten(2).transpose(1, 2)))
        scores: torch.Tensor = self.head(tokens).mean(1)
        return scores


def smooth(count: int, seed: int) -> DataSet:
    """Images whose neighbours know of each other."""
    raw = normal(seed, count, 3, 10, 10)
    shifted = [raw[:, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    return DataSet.of({"x": np.asarray(np.mean(shifted, axis=0), np.float32)})


def context(findings: list[Finding] | None = None, count: int = 64, **more: Any) -> Context:
    notes: list[Finding] = [] if findings is None else findings
    return Context(targets.load("x86"), {"calibration": smooth(count, 0)}, note=notes.append, **more)


def answers(made: FloatGraph, data: DataSet) -> NDArray[Any]:
    run = session(onnx.load_model_from_string(made.bytes))
    return np.concatenate([run.run(None, dict(batch.inputs))[0] for batch in data.batches(16)])


def lost(made: FloatGraph, exact: FloatGraph) -> Any:
    """On samples that nothing was chosen by."""
    data = smooth(64, 99)
    right = answers(exact, data)
    return float(np.square(answers(made, data) - right).sum() / np.square(right - right.mean(0)).sum())


def mixed_graph() -> FloatGraph:
    return lower(Mixed(), {"x": np.zeros((2, 3, 8, 8), np.float32)})


@pytest.mark.parametrize("options", [{"bits": 3}, {"bits": 4}, {"bytes": 0.3}])
def test_values_chosen_for_outputs_lose_less_than_those_near_the_weights(options: dict[str, Any]) -> None:
    exact = mixed_graph()
    by = {
        near: lost(passes.build(Step("share", options | {"near": near}))(exact, context()), exact)
        for near in ("weights", "outputs")
    }
    assert by["outputs"] < 0.5 * by["weights"]


def test_products_of_a_float_graph_are_found_with_their_own_biases() -> None:
    made = mixed_graph()
    found = float_layers(Slicer(onnx.load_model_from_string(made.bytes)))
    assert [layer.node.op_type for layer in found] == ["Conv", "Conv", "MatMul", "MatMul"]
    assert [bool(layer.bias) for layer in found] == [True, False, True, True]
    own = {weight.name: weight for weight in weights(made)}
    assert set(forms(made, list(own.values()))) == {layer.weight for layer in found} & set(own)


def test_a_weight_or_bias_that_two_layers_read_is_nobodys_own() -> None:
    made = graph(
        """(float[batch,3,8,8] x) => (float[batch,3,8,8] y) {
            a = Conv<pads=[1,1,1,1]>(x, w, b)
            y = Conv<pads=[1,1,1,1]>(a, w, b)
        }""",
        w=normal(0, 3, 3, 3, 3), b=normal(1, 3),
    )  # fmt: skip
    assert [layer.bias for layer in float_layers(Slicer(onnx.load_model_from_string(made.bytes)))] == ["", ""]
    assert not forms(made, weights(made))
    shared = passes.build(Step("share", {"bits": 2, "near": "outputs"}))(made, context())
    assert np.array_equal(weights(shared)[0].values, share(weights(made)[0].values, 2).weight)


def test_zeros_of_a_pruned_network_stay_and_values_are_few() -> None:
    net = Mixed()
    with torch.no_grad():
        net.first.weight *= torch.from_numpy(normal(5, 12, 3, 3, 3) > 0)
    exact = lower(net, {"x": np.zeros((2, 3, 8, 8), np.float32)})
    for options in ({"bits": 3}, {"bytes": 0.08}):
        findings: list[Finding] = []
        shared = passes.build(Step("share", options | {"near": "outputs"}))(exact, context(findings))
        for old, new in zip(weights(exact), weights(shared), strict=True):
            assert (new.values[old.values == 0] == 0).all()
            assert "bits" not in options or len(np.unique(new.values)) <= 8
        if "bytes" in options:
            taken = sum(int(row[5] or 0) for row in findings[-1].rows)
            # what was chosen by was measured before values and codes were fitted to each other
            assert taken <= 1.1 * 0.08 * 4 * sum(own.values.size for own in weights(exact))


def answered(made: FloatGraph, exact: FloatGraph, data: DataSet) -> Any:
    """Points of agreement lost."""
    return 100 * float((answers(made, data).argmax(1) != answers(exact, data).argmax(1)).mean())


def test_the_smallest_file_is_found_that_loses_no_more_points() -> None:
    exact, held_out = mixed_graph(), smooth(200, 7)
    taken = []
    for points in (4.0, 40.0):
        findings: list[Finding] = []
        here = context(findings)
        here = replace(here, data={**here.data, "holdout": held_out})
        made = passes.build(Step("share", {"max_drop": points, "near": "outputs"}))(exact, here)
        assert answered(made, exact, held_out) <= points
        trials, layers = findings
        (chosen,) = [row for row in trials.rows if row[3] == "chosen"]
        assert chosen[2] == pytest.approx(Exam(exact, held_out, "share", here.data["calibration"]).lost(made.bytes))
        cheaper = [row for row in trials.rows if float(row[0] or 0) < float(chosen[0] or 0) - 0.02]
        assert all(float(row[2] or 0) > points for row in cheaper)
        taken.append(sum(int(row[5] or 0) for row in layers.rows))
    assert taken == sorted(taken, reverse=True) and taken[1] < 0.8 * taken[0]


def test_points_that_cannot_be_kept_say_what_was_tried() -> None:
    exact = mixed_graph()
    held_out = replace(smooth(64, 0), labels=answers(exact, smooth(64, 0)).argmax(1))
    here = context()
    here = replace(here, data={**here.data, "holdout": held_out})
    step = passes.build(Step("share", {"max_drop": 0.0, "bytes": 0.06, "near": "outputs"}))
    with pytest.raises(DeploykitError, match=r"share: (no assignment stays|to stay) within 0 points of accuracy on 64"):
        step(exact, here)


def test_the_network_that_was_judged_is_the_one_that_is_given() -> None:
    """Without hold-out every fifth sample is judged on, and none of them chooses values."""
    exact, findings = mixed_graph(), list[Finding]()
    here = context(findings, count=100)
    made = passes.build(Step("share", {"max_drop": 10.0, "near": "outputs"}))(exact, here)
    data, at = here.data["calibration"], np.arange(100) % 5 == 4
    judged, fitted = data.pick(np.flatnonzero(at)), data.pick(np.flatnonzero(~at))
    (chosen,) = [row for row in findings[0].rows if row[3] == "chosen"]
    assert chosen[2] == pytest.approx(Exam(exact, judged, "share", fitted).lost(made.bytes))
    assert answered(made, exact, judged) <= chosen[2] <= 10


def odd(nodes: str, **weights: NDArray[Any]) -> FloatGraph:
    """x [n,3,8,8] -> ... -> t [n,3,8,8] -> y."""
    text = "(float[batch,3,8,8] x) => (float[batch,4,8,8] y) {" + nodes + " y = Conv<pads=[1,1,1,1]>(t, w, b) }"
    return graph(text, w=normal(0, 4, 3, 3, 3), b=normal(1, 4), **weights)


ODD = {
    "free_padding": graph(
        """(float[batch,3,h,v] x) => (float[batch,4,i,j] y) { y = Conv<auto_pad="SAME_UPPER">(x, w, b) }""",
        w=normal(0, 4, 3, 3, 3), b=normal(1, 4),
    ),
    "heads": odd("t = MatMul(x, v)", v=normal(2, 3, 8, 8)),
    "rows": odd("m = MatMul(x, v) t = Add(m, c)", v=normal(2, 8, 8), c=normal(3, 8, 1)),
    "double": odd(
        "d = Cast<to=11>(x) m = MatMul(d, v) a = Add(m, c) t = Cast<to=1>(a)",
        v=normal(2, 8, 8).astype(np.float64), c=normal(3, 8).astype(np.float64),
    ),
    "not_of_the_input": odd("k = Relu(o) m = Gemm(k, v) t = Add(x, m)", o=normal(3, 8, 8), v=normal(2, 8, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("options", [{"bits": 3}, {"bytes": 0.3}])
def test_products_that_are_no_matrix_at_a_position_keep_near_their_weights(name: str, options: dict[str, Any]) -> None:
    exact = ODD[name]
    made = passes.build(Step("share", options | {"near": "outputs"}))(exact, context())
    assert lost(made, exact) < 0.2
    if "bits" in options:
        assert all(len(np.unique(own.values)) <= 8 for own in weights(made))


def test_answers_to_made_up_samples_are_not_counted() -> None:
    here = context()
    here = replace(here, data={"calibration": replace(here.data["calibration"], synthetic=True)})
    with pytest.raises(DeploykitError, match="made up; give bytes"):
        passes.build(Step("share", {"max_drop": 1.0}))(mixed_graph(), here)


def test_what_was_measured_and_chosen_is_taken_from_the_journal(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploykit.core.journal.WORTH", 0.0)
    step, exact = passes.build(Step("share", {"bytes": 0.1, "near": "outputs"})), mixed_graph()
    first = step(exact, context(journal=Journal(tmp_path)))

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr("deploykit.hub.sharing.choice.at_level", never)
    monkeypatch.setattr("deploykit.hub.sharing.codes.fitted", never)
    assert step(exact, context(journal=Journal(tmp_path))).hash == first.hash


@pytest.mark.parametrize(
    ("options", "count", "why"),
    [
        ({"near": "outputs"}, 7, "at least 8"),
        ({"near": "outputs", "start": "linear"}, 64, "start says where"),
        ({"near": "outptus"}, 64, "outptus"),
        ({"bytes": 0.1, "start": "linear"}, 64, "start says where"),
        ({"max_drop": -1.0}, 64, "0 or more points"),
        ({"max_drop": 1.0, "layers": {"a": 3}}, 64, "leave out layers"),
        ({"max_drop": 1.0, "bits": 3}, 64, "leave out layers and bits"),
        ({"max_drop": 1.0}, 15, "at least 16"),
        ({"max_drop": 1.0}, 64, "no class scores; give share a budget instead"),
        ({"near": "outputs", "bytes": 0.001}, 64, "the least possible is"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], count: int, why: str) -> None:
    with pytest.raises(DeploykitError, match=why):
        passes.build(Step("share", options))(conv_relu_conv(), context(count=count))


def test_outputs_need_calibration_data() -> None:
    with pytest.raises(DeploykitError, match="calibration"):
        passes.build(Step("share", {"near": "outputs"}))(conv_relu_conv(), Context(targets.load("x86"), {}))


def test_layers_with_very_many_inputs_keep_near_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploykit.hub.sharing.outputs.WIDEST", 30)
    exact = conv_relu_conv()  # 27 and 36 inputs
    assert list(forms(exact, weights(exact))) == ["wa"]


def test_weights_that_are_no_numbers_are_named() -> None:
    broken = normal(0, 4, 3, 3, 3)
    broken[0, 0, 0, 0] = np.nan
    exact = with_weights(conv_relu_conv(), {"wa": broken})
    with pytest.raises(DeploykitError, match="NaN or infinity cannot be shared: those of 'a'"):
        passes.build(Step("share", {"near": "outputs"}))(exact, context())


def test_weights_that_are_all_zero_stay() -> None:
    made = graph(
        """(float[batch,3,8,8] x) => (float[batch,4,8,8] y) {
            a = Conv<pads=[1,1,1,1]>(x, w)
            y = Conv<pads=[1,1,1,1]>(a, v)
        }""",
        w=normal(0, 3, 3, 3, 3), v=np.zeros((4, 3, 3, 3), np.float32),
    )  # fmt: skip
    shared = passes.build(Step("share", {"near": "outputs"}))(made, context())
    assert not weights(shared)[1].values.any()
