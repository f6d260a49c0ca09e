"""Early exits: when samples leave, and chains of segments that compute what the whole network does."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from commands import enter
from numpy.typing import NDArray
from test_self_distill import PLACES, Net, build, corners
from torch import Tensor, nn

from deploykit import exporters, targets
from deploykit.chain.chain import Running, Variant, load_chain, open_chain
from deploykit.chain.commands import show
from deploykit.chain.write import Wanted, write_chain
from deploykit.check import Answers, score
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.request import Settings
from deploykit.cost import cost
from deploykit.exits.confidence import probabilities
from deploykit.exits.network import WithExits, attach, with_cuts
from deploykit.exits.places import Places, Stage
from deploykit.exits.segments import ports, segment
from deploykit.exits.stages import named
from deploykit.exits.thresholds import Outcome, cheapest, frontier, leaves, most_accurate, outcome
from deploykit.hub.graph import Hub
from deploykit.hub.lower import lower
from deploykit.models import Model, save_compressed
from deploykit.pipeline import Prepared, prepare
from deploykit.reproduce import reproduce

pytest.importorskip("ai_edge_litert")


# ------------------------------------------------------------------ thresholds


def drawn(exits: int, samples: int, seed: int, levels: int = 0) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Confidences and right answers; the surer, the likelier right. ``levels``: so many different confidences."""
    random = np.random.default_rng(seed)
    confidence = random.random((exits, samples))
    if levels:
        confidence = np.ceil(confidence * levels) / (levels + 1)
    return confidence, random.random((exits, samples)) < 0.4 + 0.5 * confidence


def every_outcome(confidence: NDArray[np.float64], right: NDArray[np.bool_], costs: list[float]) -> list[Outcome]:
    choices = [[0.0, 1.0, *((c + np.nextafter(c, 1)) / 2 for c in row)] for row in confidence[:-1]]
    return [outcome(confidence, right, costs, t) for t in itertools.product(*choices)]


@pytest.mark.parametrize(("exits", "samples", "levels"), [(2, 12, 0), (2, 12, 4), (3, 9, 0), (3, 9, 3), (4, 6, 0)])
@pytest.mark.parametrize("seed", range(3))
def test_the_cheapest_thresholds_are_those_of_brute_force(exits: int, samples: int, levels: int, seed: int) -> None:
    confidence, right = drawn(exits, samples, seed, levels)
    costs = [1.0, 2.5, 4.0, 7.0][:exits]
    for allowed in (0.0, 15.0, 100.0):
        ours = cheapest(confidence, right, costs, allowed)
        least = 100 * right[-1].mean() - allowed - 1e-9
        best = min(o.cost for o in every_outcome(confidence, right, costs) if o.accuracy >= least)
        assert ours.accuracy >= least and ours.cost == pytest.approx(best)


@pytest.mark.parametrize(("exits", "samples", "levels"), [(2, 12, 0), (3, 9, 0), (3, 9, 3), (4, 6, 0)])
@pytest.mark.parametrize("seed", range(3))
def test_standard_errors_of_the_loss_must_fit_in_as_well(exits: int, samples: int, levels: int, seed: int) -> None:
    confidence, right = drawn(exits, samples, seed, levels)
    costs = [1.0, 2.5, 4.0, 7.0][:exits]

    def loss(found: Outcome) -> float:
        """In points, with two standard errors of the mean of (right at the last exit) - (right where it left)."""
        left = leaves(confidence, found.thresholds)
        each = right[-1].astype(float) - right[left, np.arange(samples)]
        return 100 * float(each.mean() + 2 * each.std() / np.sqrt(samples))

    for allowed in (0.0, 20.0, 60.0):
        ours = cheapest(confidence, right, costs, allowed, errors=2.0)
        best = min(o.cost for o in every_outcome(confidence, right, costs) if loss(o) <= allowed + 1e-9)
        assert loss(ours) <= allowed + 1e-9 and ours.cost == pytest.approx(best)


def test_what_was_chosen_on_some_samples_holds_on_others() -> None:
    """Exits as right as they are sure, in front of one that is right 9 times in 10: who leaves, loses."""
    costs, lost = (1.0, 2.0, 3.0), {0.0: np.zeros(10), 2.0: np.zeros(10)}
    for seed, errors in itertools.product(range(10), lost):
        random = np.random.default_rng(seed)
        confidence = random.random((3, 1000))
        right = random.random((3, 1000)) < np.stack([confidence[0], confidence[1], np.full(1000, 0.9)])
        chosen = cheapest(confidence[:, ::2], right[:, ::2], costs, 2.0, errors)
        there = outcome(confidence[:, 1::2], right[:, 1::2], costs, chosen.thresholds)
        lost[errors][seed] = 100 * right[-1, 1::2].mean() - there.accuracy
    assert lost[2.0].mean() <= 2.0 < lost[0.0].mean()


@pytest.mark.parametrize(("exits", "samples", "levels"), [(2, 12, 0), (2, 12, 4), (3, 9, 0), (3, 9, 3), (4, 6, 0)])
@pytest.mark.parametrize("seed", range(3))
def test_the_most_accurate_thresholds_are_those_of_brute_force(
    exits: int, samples: int, levels: int, seed: int
) -> None:
    confidence, right = drawn(exits, samples, seed, levels)
    costs = [1.0, 2.5, 4.0, 7.0][:exits]
    for budget in (1.0, 2.0, 3.3, 7.0):
        ours = most_accurate(confidence, right, costs, budget)
        best = max(o.accuracy for o in every_outcome(confidence, right, costs) if o.cost <= budget + 1e-9)
        assert ours.cost <= budget + 1e-9 and ours.accuracy == pytest.approx(best)


@pytest.mark.parametrize(("exits", "samples", "levels"), [(2, 12, 0), (2, 12, 4), (3, 9, 0), (3, 9, 3), (4, 6, 0)])
@pytest.mark.parametrize("seed", range(3))
def test_a_frontier_is_the_most_accurate_for_every_budget(exits: int, samples: int, levels: int, seed: int) -> None:
    confidence, right = drawn(exits, samples, seed, levels)
    costs = [1.0, 2.5, 4.0, 7.0][:exits]
    found = frontier(confidence, right, costs, points=5)
    each = [most_accurate(confidence, right, costs, budget) for budget in np.linspace(1.0, costs[-1], 5)]
    better = [o for k, o in enumerate(each) if all(o.accuracy > before.accuracy for before in each[:k])]
    assert [o.accuracy for o in found] == pytest.approx([o.accuracy for o in better])
    assert [o.cost for o in found] == pytest.approx([o.cost for o in better])


def test_what_thresholds_do_by_hand() -> None:
    confidence = np.array([[0.9, 0.6, 0.5, 0.2], [0.5, 0.9, 0.4, 0.8], [0.3, 0.3, 0.3, 0.3]])
    right = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0]], bool)
    found = outcome(confidence, right, (1.0, 3.0, 6.0), (0.8, 0.7))
    # the first leaves by exit 1, right; the second and the fourth by exit 2, one of them right; the third by the last
    assert found == Outcome((0.8, 0.7), 75.0, (1 + 3 + 6 + 3) / 4, (0.25, 0.5, 0.25))


def test_a_threshold_of_one_lets_nobody_leave_and_zero_everybody() -> None:
    confidence = np.array([[1.0, 0.3], [1.0, 1.0]])
    assert leaves(confidence, (1.0,)).tolist() == [1, 1]
    assert leaves(confidence, (0.0,)).tolist() == [0, 0]
    assert leaves(confidence, (0.3,)).tolist() == [0, 1]


def test_many_samples_and_exits_take_no_long_search() -> None:
    confidence, right = drawn(5, 5000, 0)
    found = cheapest(confidence, right, (1.0, 2.0, 3.0, 4.0, 5.0), 1.0)
    assert found.accuracy >= 100 * right[-1].mean() - 1.0 and found.cost < 5.0


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_thresholds_outside_zero_to_one_are_refused(threshold: float) -> None:
    with pytest.raises(DeploykitError, match="a probability between 0"):
        outcome(*drawn(2, 3, 0), (1.0, 2.0), (threshold,))


def test_another_number_of_thresholds_or_costs_is_refused() -> None:
    with pytest.raises(DeploykitError, match="1 thresholds are given, and 2 exits stand in front"):
        outcome(*drawn(3, 3, 0), (1.0, 2.0, 3.0), (0.5,))
    with pytest.raises(DeploykitError, match="not of the same exits"):
        cheapest(*drawn(3, 3, 0), (1.0, 2.0), 0.0)


def test_what_cannot_be_reached_is_refused() -> None:
    with pytest.raises(
        DeploykitError, match=r"a mean cost of 0.5 cannot be reached: leaving by the first exit costs 1"
    ):
        most_accurate(*drawn(2, 3, 0), (1.0, 2.0), 0.5)
    with pytest.raises(DeploykitError, match="0 points or more; given -1"):
        cheapest(*drawn(2, 3, 0), (1.0, 2.0), -1.0)


def test_an_ensemble_answers_the_mean_of_the_probabilities_so_far() -> None:
    logits = np.log(np.array([[[0.5, 0.5]], [[0.9, 0.1]], [[0.1, 0.9]]]))
    assert np.allclose(probabilities(logits)[:, 0, 0], [0.5, 0.9, 0.1])
    assert np.allclose(probabilities(logits, ensemble=True)[:, 0, 0], [0.5, 0.7, 0.5])


def test_the_mean_time_counts_all_segments_up_to_the_exit() -> None:
    variant = Variant((0.5,), 1, 1, 0.0, 0.0, (), (0.75, 0.25), 0.0, 0.0, (2.0, 4.0))
    assert variant.mean_ms == 0.75 * 2 + 0.25 * 6
    assert Variant((0.5,), 1, 1, 0.0, 0.0, (), (1.0, 0.0), 0.0, 0.0).mean_ms is None


# ------------------------------------------------------------------ chains


@pytest.fixture(scope="module")
def whole() -> WithExits:
    """Trained enough that exits differ in how sure they are."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = attach(build(), PLACES).train()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    data = corners(256)
    for _ in range(3):
        for batch in data.batches(32):
            optimizer.zero_grad()
            y = torch.from_numpy(batch.labels)
            answers = net(image=torch.from_numpy(batch.inputs["image"]))
            sum(nn.functional.cross_entropy(z, y) for z in answers.values()).backward()  # type: ignore[union-attr]
            optimizer.step()
    return net.eval()


def images(count: int = 60, seed: int = 3) -> DataSet:
    """Of all degrees of noise."""
    data = corners(count, seed)
    random = np.random.default_rng(seed)
    x = next(data.batches(count)).inputs["image"]
    noise = random.standard_normal(x.shape) * np.linspace(0, 3, count)[:, None, None, None]
    return DataSet.of({"image": (x + noise).astype(np.float32)}, data.labels)


def prepared(module: nn.Module, **more: DataSet) -> Prepared:
    data = {"calibration": images(40, 4), "eval": images()} | more
    return prepare(Model("net", module=module, compressed=True), data, None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def made(whole: WithExits, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Chains by target."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("chains")
    for name in ("x86", "mobile-arm"):
        settings = Settings(precisions=("fp32", "int8"))
        write_chain(prepared(whole), targets.load(name), folder / name, settings, Wanted(max_drop=5.0))
    return {name: folder / name for name in ("x86", "mobile-arm")}


NAMES = ("exit_1", "exit_2", "output")


def at_once(folder: Path, precision: str, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    return exporters.open_artifact(folder / "whole").runner(precision)(inputs)


@pytest.mark.parametrize("target", ["x86", "mobile-arm"])
def test_the_integer_chain_answers_what_the_whole_file_does_bit_for_bit(made: dict[str, Path], target: str) -> None:
    inputs = next(images().batches(60)).inputs
    logits = open_chain(made[target], "int8").every_exit(inputs)
    whole_file = at_once(made[target], "int8", inputs)
    for k, name in enumerate(NAMES):
        assert np.array_equal(logits[k], whole_file[name])


@pytest.mark.parametrize("target", ["x86", "mobile-arm"])
def test_the_float_chain_answers_what_the_network_does(made: dict[str, Path], whole: WithExits, target: str) -> None:
    inputs = next(images().batches(60)).inputs
    logits = open_chain(made[target], "fp32").every_exit(inputs)
    with torch.no_grad():
        expected = whole(image=torch.from_numpy(inputs["image"]))
    for k, name in enumerate(NAMES):
        assert np.allclose(logits[k], expected[name], atol=1e-4)


def test_integer_chains_stay_near_the_network(made: dict[str, Path]) -> None:
    inputs = next(images().batches(60)).inputs
    ints, floats = (open_chain(made["x86"], p).every_exit(inputs) for p in ("int8", "fp32"))
    assert (ints.argmax(-1) == floats.argmax(-1)).mean() > 0.9


def test_both_sides_of_a_cut_have_one_scale(made: dict[str, Path]) -> None:
    models = [onnx.load(made["x86"] / f"segment_{k}" / "model.int8.onnx") for k in (1, 2, 3)]

    def parameters(model: onnx.ModelProto, node: onnx.NodeProto) -> list[NDArray[np.float32]]:
        held = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        return [held[name] for name in node.input[1:]]

    for k, (before, behind) in enumerate(itertools.pairwise(models), 1):
        (leaving,) = (n for n in before.graph.node if n.output[0] == f"cut_{k}")
        (entering,) = (n for n in behind.graph.node if n.input[0] == f"cut_{k}")
        assert (leaving.op_type, entering.op_type) == ("DequantizeLinear", "QuantizeLinear")
        assert parameters(before, leaving) == parameters(behind, entering)


def test_a_segment_holds_its_own_weights_only(made: dict[str, Path]) -> None:
    held = [
        {t.name for t in onnx.load(made["x86"] / f"segment_{k}" / "model.fp32.onnx").graph.initializer}
        for k in (1, 2, 3)
    ]
    assert any("layer1" in n for n in held[0]) and not any("layer2" in n for n in held[0])
    assert any("layer2" in n for n in held[1]) and not any("layer3" in n or "exits.0" in n for n in held[1])


def test_segments_together_cost_what_the_network_with_exits_does(made: dict[str, Path], whole: WithExits) -> None:
    chain = load_chain(made["x86"])
    assert sum(s.macs for s in chain.segments) == cost(whole, next(images(2).batches(2)).inputs).macs


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_books_of_a_chain_are_right(made: dict[str, Path], precision: str) -> None:
    """Run sample by sample, on the half that thresholds were not chosen on."""
    chain = load_chain(made["x86"])
    variant = chain.variants[precision]
    scored = images().pick(np.arange(1, 60, 2))
    answers, left = open_chain(made["x86"], precision)(next(scored.batches(60)).inputs)
    macs = np.cumsum([s.macs for s in chain.segments])
    assert (variant.chosen_on, variant.scored_on) == (30, 30)
    assert variant.accuracy == pytest.approx(100 * (answers.argmax(1) == scored.labels).mean())
    assert variant.shares == pytest.approx(np.bincount(left, minlength=3) / 30)
    assert variant.macs == pytest.approx(macs[left].mean())
    assert variant.whole < (1e-4 if precision == "fp32" else 1e-12)
    assert variant.macs < macs[-1]


def test_the_frontier_of_a_chain_is_what_its_thresholds_come_to(made: dict[str, Path]) -> None:
    variant = load_chain(made["x86"]).variants["int8"]
    scored = images().pick(np.arange(1, 60, 2))
    for point in (variant.frontier[0], variant.frontier[-1]):
        answers, left = open_chain(made["x86"], "int8", point.thresholds)(next(scored.batches(60)).inputs)
        assert point.accuracy == pytest.approx(100 * (answers.argmax(1) == scored.labels).mean())
        assert point.ms == pytest.approx(np.cumsum(variant.ms)[left].mean())


def test_thresholds_decide_how_far_a_sample_goes(made: dict[str, Path]) -> None:
    inputs = next(images(8).batches(8)).inputs
    every = probabilities(open_chain(made["x86"]).every_exit(inputs))
    for thresholds, exit_ in (((0.0, 0.0), 0), ((1.0, 0.0), 1), ((1.0, 1.0), 2)):
        answers, left = open_chain(made["x86"], thresholds=thresholds)(inputs)
        assert left.tolist() == [exit_] * 8
        assert np.allclose(answers, every[exit_])


def test_an_ensemble_averages_the_exits_that_were_passed(made: dict[str, Path]) -> None:
    inputs = next(images(4).batches(4)).inputs
    chain = open_chain(made["x86"])
    together = Running(chain.runners, chain.answers, (1.0, 1.0), ensemble=True)
    assert np.allclose(together(inputs)[0], probabilities(chain.every_exit(inputs)).mean(0))


@pytest.mark.parametrize("target", ["x86", "mobile-arm"])
def test_infer_py_leaves_where_the_chain_does_and_needs_nothing_of_ours(
    made: dict[str, Path], target: str, tmp_path: Path
) -> None:
    inputs = next(images(6).batches(6)).inputs
    np.savez(tmp_path / "inputs.npz", **inputs)
    script = made[target] / "infer.py"
    block = "import sys; sys.modules['deploykit'] = None; import runpy; sys.argv = sys.argv[1:]; "
    code = block + "runpy.run_path(sys.argv[0], run_name='__main__')"
    ran = subprocess.run(
        [sys.executable, "-c", code, script, tmp_path / "inputs.npz", "--save", tmp_path / "out.npz"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    answers, left = open_chain(made[target])(inputs)
    saved = np.load(tmp_path / "out.npz")
    assert saved["exit"].tolist() == (left + 1).tolist()
    assert np.allclose(saved["probability"], answers, atol=1e-6)
    assert ran.stdout.count("left by exit") == 6


def test_a_chain_whose_files_are_missing_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "chain"
    shutil.copytree(made["x86"], broken)
    (broken / "segment_2" / "model.int8.onnx").unlink()
    shutil.rmtree(broken / "segment_3")
    with pytest.raises(DeploykitError, match=r"is not whole: .*model.int8.onnx is missing.*no folder .*segment_3"):
        open_chain(broken)
    np.savez(tmp_path / "inputs.npz", **next(images(2).batches(2)).inputs)
    ran = subprocess.run([sys.executable, broken / "infer.py", tmp_path / "inputs.npz"], capture_output=True, text=True)
    assert ran.returncode == 1
    assert "segment_3" in ran.stderr and "copy the folder" in ran.stderr and "Traceback" not in ran.stderr
    (broken / "chain.json").unlink()
    with pytest.raises(DeploykitError, match=r"no chain.json"):
        load_chain(broken)


def test_thresholds_outside_zero_to_one_are_refused_when_a_chain_is_opened(made: dict[str, Path]) -> None:
    with pytest.raises(DeploykitError, match=r"given 1.1"):
        open_chain(made["x86"], thresholds=(0.5, 1.1))
    with pytest.raises(DeploykitError, match=r"no precision 'int9'. Did you mean 'int8'"):
        open_chain(made["x86"], "int9")


# ------------------------------------------------------------------ what cannot be cut or written


class Around(Net):
    """What lies behind the second stage also reads the stem."""

    def forward(self, image: Tensor) -> Tensor:
        stem = self.stem(image)
        x = self.layer2(self.layer1(stem))
        return self.fc(self.layer3(x).mean((2, 3)) + stem.mean((1, 2, 3))[:, None])  # type: ignore[no-any-return]


def test_a_stage_that_does_not_cut_the_network_in_two_is_refused() -> None:
    net = Around().eval()
    example = next(images(2).batches(2)).inputs
    places = Places(named(net, {"image": torch.from_numpy(example["image"])}, ("layer1", "layer2", "layer3")), 4)
    graph = lower(with_cuts(attach(net, places).eval()), example)
    hub = Hub(graph, targets.load("x86").quant)
    first, second, third = ports(("image",), 2, "output")
    assert segment(hub, first).graph.model.graph.outputs[1].name == "cut_1"
    with pytest.raises(DeploykitError, match=r"stage 2 does not cut the network in two: .* also reads 'image'"):
        segment(hub, third)
    assert second.gives == ("exit_2", "cut_2")


@pytest.mark.parametrize(
    ("target", "wanted", "message"),
    [
        ("cortex-m4", Wanted(max_drop=1.0), "the c99 exporter writes no chains .* onnx, openvino, tflite do"),
        ("jetson", Wanted(max_drop=1.0), "the tensorrt exporter writes no chains .*engines are built on the device"),
        ("mobile-arm", Wanted(max_ms=1.0), "times taken here say nothing about 'mobile-arm'"),
        ("x86", Wanted(max_drop=1.0, max_ms=1.0), "one of --max-drop, --max-ms and --threshold"),
        ("x86", Wanted(thresholds=(0.5,)), "1 thresholds are given, and 2 exits"),
        ("x86", Wanted(thresholds=(0.5, 2.0)), "given 2"),
        ("x86", Wanted(max_drop=-1.0), "0 points or more"),
        ("x86", Wanted(max_ms=0.0), "--max-ms must be above 0"),
    ],
)
def test_what_cannot_be_written_is_refused_before_any_work(
    whole: WithExits, tmp_path: Path, target: str, wanted: Wanted, message: str
) -> None:
    with pytest.raises(DeploykitError, match=message):
        write_chain(prepared(whole), targets.load(target), tmp_path / "out", Settings(), wanted)
    assert list(tmp_path.iterdir()) == []


def test_a_network_without_exits_or_samples_to_choose_on_is_refused(whole: WithExits, tmp_path: Path) -> None:
    x86, wanted = targets.load("x86"), Wanted(max_drop=1.0)
    with pytest.raises(DeploykitError, match=r"net has no exits: .* self_distill and keep_exits = true"):
        write_chain(prepared(build().eval()), x86, tmp_path / "out", Settings(), wanted)
    alone = prepare(Model("net", module=whole), {"calibration": images(4)}, None)
    with pytest.raises(DeploykitError, match="thresholds are chosen on samples: give --eval"):
        write_chain(alone, x86, tmp_path / "out", Settings(), wanted)


def test_without_labels_an_answer_is_right_if_it_is_the_last_exits(whole: WithExits, tmp_path: Path) -> None:
    unlabelled = DataSet.of(next(images().batches(60)).inputs)
    chain = write_chain(
        prepared(whole, calibration=images(40, 4), eval=unlabelled), targets.load("x86"), tmp_path / "out",
        Settings(precisions=("fp32",)), Wanted(thresholds=(0.7, 0.7)),
    )  # fmt: skip
    variant = chain.variants["fp32"]
    assert not chain.labels and variant.last_accuracy == 100.0 and variant.chosen_on == 0
    assert variant.thresholds == (0.7, 0.7)


def test_the_command_writes_a_chain_from_a_compressed_folder(
    whole: WithExits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("kept").mkdir()
    save_compressed(whole, Path("kept"), "test_self_distill:build")
    data = images(30)
    np.savez("test.npz", image=next(data.batches(30)).inputs["image"], y=data.labels)
    said = enter(
        "exits kept --calib test.npz --eval test.npz --precision fp32 --ensemble --threshold 0.9 --threshold 0.8"
    )
    assert said.code == 0, said.err
    assert "thresholds 0.9, 0.8" in said.out and "leave by exit 1 to 3" in said.out
    chain = load_chain(Path("chain"))
    assert chain.ensemble
    with pytest.raises(DeploykitError, match=r"cannot be made again: .* with cuts"):
        reproduce(Path("chain/whole"))
    again = enter("exits kept --calib test.npz --precision fp32")
    assert again.code == 2 and "already exists" in again.err
    show(Path("chain"), chain, as_json=True)
    assert json.loads(capsys.readouterr().out)["variants"]["fp32"]["thresholds"] == [0.9, 0.8]


def test_stages_keep_their_shapes_through_json() -> None:
    import msgspec

    assert msgspec.json.decode(msgspec.json.encode(PLACES), type=Places) == PLACES
    assert PLACES.stages[0] == Stage("layer1", (4, 16, 16))


def test_answers_that_a_step_added_are_not_compared_with_the_original() -> None:
    """An export whose recipe keeps exits: the original has none."""
    z = np.eye(3, dtype=np.float32)
    found = score(Answers({"output": z, "exit_1": z}, None), Answers({"output": z}, None), "fp32", "samples")
    assert found.agreement == 100.0 and list(found.sqnr_db) == ["output"]
