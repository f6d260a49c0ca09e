"""Weight sharing: clustering against every possible clustering, codebooks, their training, bits under a budget."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import graphs
import numpy as np
import onnx
import pytest
import torch
from graphs import conv_relu_conv, images, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from deploykit import passes, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import Finding
from deploykit.core.recipe import Step, TrainSettings
from deploykit.hub.graph import FloatGraph
from deploykit.hub.lower import lower
from deploykit.hub.running import session
from deploykit.hub.sharing.choice import FINE, LEVELS, PARTS, levels
from deploykit.hub.sharing.codebooks import Weight, codebook, share, weights, with_weights
from deploykit.hub.sharing.kmeans import cluster, lloyd, nearest
from deploykit.hub.sharing.module import SharedModule
from deploykit.losses import distill_kl
from deploykit.training.trainer import Trainer

TRAINS = importlib.util.find_spec("accelerate") is not None
needs_training = pytest.mark.skipif(not TRAINS, reason="training needs the extra 'train'")
STARTS: list[Any] = ["optimal", "linear", "density", "random"]


def error(x: NDArray[Any], c: NDArray[Any], h: NDArray[Any] | float = 1.0) -> float:
    return float((h * (x - c[nearest(x, c)]) ** 2).sum())


def least_error(x: NDArray[Any], h: NDArray[Any], k: int) -> float:
    """Of all ways to cut the sorted values into k runs."""
    order = np.argsort(x)
    x, h, n = x[order], h[order], len(x)

    def run(a: int, b: int) -> float:
        mean = np.average(x[a:b], weights=h[a:b])
        return float((h[a:b] * (x[a:b] - mean) ** 2).sum())

    cuts = itertools.combinations(range(1, n), k - 1)
    return min(sum(run(a, b) for a, b in itertools.pairwise((0, *cut, n))) for cut in cuts)


# ------------------------------------------------------------------ clustering


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 9), k=st.integers(1, 5), ties=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_no_clustering_has_less_error_than_the_optimal_one(n: int, k: int, ties: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    x, h = random.normal(size=n), random.uniform(0.1, 3.0, n)
    x = np.round(x, 1) if ties else x
    found = cluster(x, k, "optimal", h)
    assert len(found) <= k
    assert (np.diff(found) > 0).all()
    assert error(x, found, h) == pytest.approx(least_error(x, h, min(k, n)), abs=1e-9)


@pytest.mark.parametrize("start", STARTS)
def test_every_start_ends_where_each_value_is_the_mean_of_what_is_nearest_to_it(start: Any) -> None:
    x = np.random.default_rng(1).standard_t(4, 3000)
    c = cluster(x, 12, start)
    of = nearest(x, c)
    for i in np.unique(of):
        assert c[i] == pytest.approx(x[of == i].mean(), abs=2e-3 * np.ptp(x))


@pytest.mark.parametrize("k", [3, 15, 31, 255])
def test_the_optimal_start_never_does_worse_than_the_papers(k: int) -> None:
    x = np.random.default_rng(2).standard_t(5, 20_000)
    best = error(x, cluster(x, k, "optimal"))
    for start in STARTS[1:]:
        assert best <= 1.001 * error(x, cluster(x, k, start))


@pytest.mark.parametrize("outlier", [1.0, 100.0, 1e4])
def test_an_outlier_does_not_take_the_others_their_values(outlier: float) -> None:
    x = np.append(np.random.default_rng(0).normal(0, 0.02, 8000), outlier)
    best = cluster(x, 31, "optimal")
    assert len(best) == 31
    assert error(x, best) < 1.15 * error(x, cluster(x, 31, "density"))


def test_clusters_around_zero_do_not_make_weights_zero_that_are_not() -> None:
    weight = np.asarray([0.0, 0.1, -0.1, 0.1, -0.1] * 20, np.float32)
    found = share(weight, 1)
    assert np.array_equal(found.weight == 0, weight == 0) and len(found.book) == 2


def test_lloyds_iteration_leaves_a_centre_alone_that_nothing_is_near_to() -> None:
    found = lloyd(np.array([0.0, 1.0]), np.ones(2), np.array([0.0, 1.0, 9.0]))
    assert found.tolist() == [0.0, 1.0, 9.0]


def test_values_that_do_not_matter_do_not_draw_a_centre() -> None:
    x, h = np.array([0.0, 0.1, 5.0, 5.1, 100.0]), np.array([1.0, 1.0, 1.0, 1.0, 0.0])
    assert cluster(x, 2, "optimal", h) == pytest.approx([0.05, 5.05], abs=1e-6)


# ------------------------------------------------------------------ codebooks


@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4), bits=st.integers(1, 8),
    zeros=st.sampled_from([0.0, 0.5, 0.9, 1.0]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_a_shared_weight_has_no_more_values_than_its_bits_allow_and_zeros_stay(
    shape: list[int], bits: int, zeros: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    weight = (random.normal(size=shape) * (random.random(shape) >= zeros)).astype(np.float32)
    found = share(weight, bits)
    assert found.codes.shape == weight.shape
    assert len(found.book) <= 2**bits
    assert np.array_equal(found.weight == 0, weight == 0)
    assert len(np.unique(found.weight)) == len(np.unique(found.codes))


def test_bits_enough_for_all_values_lose_nothing() -> None:
    weight = np.random.default_rng(0).choice([-0.5, 0.0, 0.25, 3.0], (30, 5)).astype(np.float32)
    assert np.array_equal(share(weight, 2).weight, weight)


def test_a_codebook_is_found_again_in_the_weight_alone() -> None:
    made = share(normal(0, 40, 30) * (normal(1, 40, 30) > 0), 4)
    found = codebook(made.weight)
    assert found is not None
    assert found.book[0] == 0
    assert np.array_equal(found.book, np.unique(made.weight)[np.argsort(np.unique(made.weight) != 0, kind="stable")])
    assert np.array_equal(found.weight, made.weight)


def test_a_weight_of_many_values_has_no_codebook() -> None:
    assert codebook(normal(0, 40, 30), 600) is None


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(wrong: float) -> None:
    weight = normal(0, 10, 10)
    weight[3, 3] = wrong
    with pytest.raises(DeploykitError, match="NaN or infinity"):
        share(weight, 4)


# ------------------------------------------------------------------ the step


class Normalised(torch.nn.Module):
    """Convolutions with batch normalisation, which folding scales channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = torch.nn.Conv2d(3, 12, 3, padding=1, bias=False), torch.nn.BatchNorm2d(12)
        self.second, self.head = torch.nn.Conv2d(12, 16, 3, padding=1), torch.nn.Linear(16, 4)
        torch.nn.init.uniform_(self.norm.weight, 0.2, 3.0)
        torch.nn.init.uniform_(self.norm.get_buffer("running_var"), 0.5, 2.0)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        scores: torch.Tensor = self.head(torch.relu(self.second(x)).mean((2, 3)))
        return scores


def context(findings: list[Finding] | None = None, **more: Any) -> Context:
    data = images(48)
    notes: list[Finding] = [] if findings is None else findings
    return Context(targets.load("x86"), {"calibration": data}, note=notes.append, **more)


def answers(graph: FloatGraph, data: DataSet) -> NDArray[Any]:
    run = session(onnx.load_model_from_string(graph.bytes))
    return np.concatenate([run.run(None, dict(batch.inputs))[0] for batch in data.batches(16)])


def test_folded_normalisation_leaves_no_more_values_than_asked_for() -> None:
    graph = lower(Normalised(), {"x": np.zeros((2, 3, 8, 8), np.float32)})
    shared = passes.build(Step("share", {"bits": 3}))(graph, context())
    for own in weights(shared):
        assert len(np.unique(own.values)) <= 8
    assert [own.name for own in weights(shared)] == [own.name for own in weights(graph)]


def test_more_bits_come_nearer_to_the_float_answers() -> None:
    graph, data = conv_relu_conv(), images(16)
    exact = answers(graph, data)
    lost = [
        float(np.square(answers(passes.build(Step("share", {"bits": b}))(graph, context()), data) - exact).mean())
        for b in (1, 2, 4, 6)
    ]
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 1e-3 * lost[0]


def test_layers_get_bits_of_their_own_and_may_be_left_out() -> None:
    graph, findings = conv_relu_conv(), list[Finding]()
    shared = passes.build(Step("share", {"bits": 2, "layers": {"y": 4}}))(graph, context(findings))
    assert [len(np.unique(own.values)) for own in weights(shared)] == [4, 16]
    assert [row[3] for row in findings[0].rows] == [2, 4]
    left = passes.build(Step("share", {"skip": ["a"]}))(graph, context())
    assert np.array_equal(weights(left)[0].values, weights(graph)[0].values)
    assert not np.array_equal(weights(left)[1].values, weights(graph)[1].values)


@pytest.mark.parametrize("kind", ["ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum"])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_reductions_mean_in_torch_what_they_mean_in_onnx_runtime(kind: str, keepdims: int) -> None:
    text = f"(float[batch,3,4,5] x) => (float y) {{ a = Relu(x) y = {kind}<keepdims={keepdims}>(a, axes) }}"
    made, x = graphs.graph(text, axes=np.array([1, -1])), normal(0, 2, 3, 4, 5)
    expected = session(made.bytes).run(None, {"x": x})[0]
    found = SharedModule(made, {})(x=torch.from_numpy(x))["y"]
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_levels_are_fine_where_one_weight_is_most_of_all() -> None:
    def of(*sizes: int) -> list[Weight]:
        return [Weight(f"w{i}", f"l{i}", f"y{i}", np.zeros(n, np.float32)) for i, n in enumerate(sizes)]

    assert levels(of(900, 100)) == FINE and levels(of(500, 300, 200)) == LEVELS
    assert max(FINE) == max(LEVELS) == 8 * PARTS and len(FINE) > len(LEVELS)


def test_a_budget_leaves_recurrent_layers_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    class Recurrent(nn.Module):
        def __init__(self, head: bool) -> None:
            super().__init__()
            self.layer, self.head = nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 10) if head else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x)[0][:, -1])

    data = DataSet.of({"x": normal(0, 32, 5, 8)})
    here = Context(targets.load("x86"), {"calibration": data})
    step = passes.build(Step("share", {"bytes": 0.2}))
    whole = lower(Recurrent(True).eval(), next(data.batches(2)).inputs)
    both = zip(weights(step(whole, here)), weights(whole), strict=True)
    made = {own.layer: (own.values, old.values) for own, old in both}
    assert "keep their weights" in capsys.readouterr().err
    assert len(np.unique(made["head"][0])) < len(np.unique(made["head"][1]))
    assert all(np.array_equal(*pair) for name, pair in made.items() if name != "head")
    with pytest.raises(DeploykitError, match="levels are chosen for products alone"):
        step(lower(Recurrent(False).eval(), next(data.batches(2)).inputs), here)


def test_a_budget_of_bytes_gives_bits_to_the_layer_whose_answers_need_them() -> None:
    """The first layer's weights are spread evenly, the second's are two values already: one bit holds them."""
    graph = conv_relu_conv()
    two = np.where(normal(7, 5, 4, 3, 3) > 0, np.float32(0.5), np.float32(-0.5))
    graph, findings = with_weights(graph, {"wb": two}), list[Finding]()
    shared = passes.build(Step("share", {"bytes": 0.25}))(graph, context(findings))
    bits = {row[0]: row[3] for row in findings[-1].rows}
    assert bits["y"] == 1
    assert int(bits["a"] or 0) > 3
    assert np.array_equal(weights(shared)[1].values, two)
    taken = sum(int(row[5] or 0) for row in findings[-1].rows)
    assert taken <= 0.25 * 4 * sum(own.values.size for own in weights(graph))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"bits": 0}, "bits must lie between 1 and 12"),
        ({"bits": 13}, "bits must lie between 1 and 12"),
        ({"bytes": 0.0}, "above 0 and at most 1"),
        ({"bytes": 20000}, "above 0 and at most 1"),
        ({"bytes": 0.1, "layers": {"a": 3}}, "leave out layers"),
        ({"start": "lienar"}, "lienar"),
        ({"skip": ["zz"]}, "no layer"),
        ({"layers": {"aa": 4}}, "aa"),
        ({"bytes": 0.001}, "the least possible is"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(DeploykitError, match=why):
        passes.build(Step("share", options))(conv_relu_conv(), context())


# ------------------------------------------------------------------ training


def test_the_module_computes_what_the_graph_does_and_gives_it_back() -> None:
    graph = passes.build(Step("share", {"bits": 3}))(
        lower(Normalised(), {"x": np.zeros((2, 3, 8, 8), np.float32)}), context()
    )
    books = {own.name: codebook(own.values) for own in weights(graph)}
    module = SharedModule(graph, {name: own for name, own in books.items() if own is not None})
    data = images(8)
    (found,) = module(x=torch.from_numpy(next(data.batches(8)).inputs["x"])).values()
    assert np.allclose(found.detach().numpy(), answers(graph, data), atol=1e-5)
    assert module.to_graph().hash == graph.hash


def test_the_gradient_of_a_value_is_the_sum_of_those_of_its_weights() -> None:
    """Against central differences of the graph's answers, in float64 weights' place."""
    graph = with_weights(conv_relu_conv(), {"wa": share(normal(0, 4, 3, 3, 3), 2).weight})
    found = codebook(weights(graph)[0].values)
    assert found is not None
    module, x = SharedModule(graph, {"wa": found}), torch.from_numpy(normal(9, 4, 3, 8, 8))
    module(x=x)["y"].square().mean().backward()
    (unit,) = {float(u) for u in module.get_buffer("wa·unit")}
    gradient = module.move["wa"].grad
    assert gradient is not None
    for i in range(len(found.book)):
        step = np.zeros(len(found.book), np.float32)
        step[i] = 1e-2
        moved = [
            float(np.square(answers(with_weights(graph, {"wa": (found.book + sign * step)[found.codes]}),
                                    DataSet.of({"x": x.numpy()}))).mean())
            for sign in (1, -1)
        ]  # fmt: skip
        assert float(gradient[i]) == pytest.approx(unit * (moved[0] - moved[1]) / 2e-2, rel=2e-2, abs=1e-4)


@needs_training
def test_training_the_values_mends_answers_and_keeps_codes_and_zeros() -> None:
    net = Normalised()
    with torch.no_grad():
        net.second.weight *= torch.from_numpy(normal(5, 16, 12, 3, 3) > 0)
    graph = lower(net, {"x": np.zeros((2, 3, 8, 8), np.float32)})
    data = images(256)
    here = Context(
        targets.load("x86"), {"train": data, "calibration": data}, original=net,
        trainer=Trainer(TrainSettings(batch=32)), loss=distill_kl(),
    )  # fmt: skip
    shared = passes.build(Step("share", {"bits": 2}))(graph, here)
    tuned = passes.build(Step("tune_codebooks", {"steps": 60, "learning_rate": 1e-2}))(shared, here)
    exact = answers(graph, data)
    before, after = (float(np.square(answers(g, data) - exact).mean()) for g in (shared, tuned))
    assert after < 0.5 * before
    for old, new in zip(weights(shared), weights(tuned), strict=True):
        own, other = codebook(old.values), codebook(new.values)
        assert own is not None and other is not None
        assert len(other.book) <= len(own.book)
        assert np.array_equal(new.values == 0, old.values == 0)
        for code in range(len(own.book)):
            assert len(np.unique(new.values[own.codes == code])) == 1


@needs_training
def test_training_needs_shared_values_and_somebody_to_follow() -> None:
    data = images(64)
    here = Context(targets.load("x86"), {"train": data}, trainer=Trainer(TrainSettings()))
    step = passes.build(Step("tune_codebooks", {}))
    with pytest.raises(DeploykitError, match="loss"):
        step(conv_relu_conv(), here)
    with pytest.raises(DeploykitError, match="put share before it"):
        step(conv_relu_conv(), Context(here.target, here.data, original=Normalised(), trainer=here.trainer))
