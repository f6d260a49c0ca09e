"""The pass mixed: assignments within budgets and losses, on the road and in the report."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import conv_relu_conv, graph, images, normal, run
from mixed_cases import classifier, hub_of, slicer_of

from deploykit import passes, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.recipe import Step
from deploykit.core.target import QuantSpec
from deploykit.hub.analysis.answers import Exam
from deploykit.hub.bits import held_weights, with_bits
from deploykit.hub.graph import FloatGraph, Hub
from deploykit.hub.mixed.assignment import cost

pytest.importorskip("scipy")


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


Array = np.ndarray[Any, Any]


def lent(before: Array, after: Array, met: Array, right: Array) -> float:
    """Percent of right answers to all met where each meets what was done to every judged one, place by place."""
    hits = 0
    for scores, answer in zip(met, right, strict=True):
        places = sorted(range(len(scores)), key=lambda c: -scores[c])
        for own, moved in zip(before, after, strict=True):
            theirs = sorted(range(len(own)), key=lambda c: -own[c])
            there = [scores[c] + moved[d] - own[d] for c, d in zip(places, theirs, strict=True)]
            hits += places[int(np.argmax(there))] == answer
    return 100 * hits / (len(before) * len(met))


def test_labels_decide_where_there_are_some_and_the_float_networks_answers_where_not() -> None:
    made, data = classifier()
    hub = with_bits(hub_of(made, data), {"a": 2})
    few = data.pick(np.arange(24))
    before, after = run(made.bytes, few)[0], run(hub.bytes, few)[0]
    labels = (np.arange(24) % 10).astype(np.int64)
    for samples, right in ((few, before.argmax(1)), (replace(few, labels=labels), labels)):
        exam = Exam(made, samples, "mixed")
        most, counted = (100 * (scores.argmax(1) == right).mean() for scores in (before, after))
        assert exam.lost(hub.bytes) == pytest.approx(most - min(counted, lent(before, after, before, right)))
        assert exam.lost(made.bytes) == 0.0


def test_changes_are_tried_on_samples_too_that_are_not_judged_but_have_answers_of_the_same_kind() -> None:
    made, data = classifier()
    hub = with_bits(hub_of(made, data), {"a": 2})
    few, others = data.pick(np.arange(8)), data.pick(np.arange(8, 40))
    before, after = run(made.bytes, few)[0], run(hub.bytes, few)[0]
    met = np.concatenate([before, run(made.bytes, others)[0]])
    counted = 100 * (before.argmax(1) != after.argmax(1)).mean()
    expected = 100 - lent(before, after, met, met.argmax(1))
    assert Exam(made, few, "mixed", others).lost(hub.bytes) == pytest.approx(max(counted, expected))
    alone = Exam(made, few, "mixed").lost(hub.bytes)
    assert alone != pytest.approx(max(counted, expected))
    for unlike in (replace(others, synthetic=True), replace(others, labels=np.zeros(32, np.int64))):
        assert Exam(made, few, "mixed", unlike).lost(hub.bytes) == alone
    assert Exam(made, few, "mixed", others).lost(made.bytes) == 0.0


def test_of_many_samples_each_change_is_tried_on_some(monkeypatch: pytest.MonkeyPatch) -> None:
    made, data = classifier()
    hub = with_bits(hub_of(made, data), {"a": 2})
    judged, others = data.pick(np.arange(40)), data.pick(np.arange(40, len(data)))
    every = Exam(made, judged, "mixed", others).lost(hub.bytes)
    monkeypatch.setattr("deploykit.hub.analysis.answers.PAIRS", 40 * len(data) // 2)
    assert Exam(made, judged, "mixed", others).lost(hub.bytes) == pytest.approx(every, abs=3)


def test_a_network_that_loses_no_answer_by_luck_is_expected_to_lose_some() -> None:
    def scaled(by: float) -> FloatGraph:
        return graph("(float[batch,2] x) => (float[batch,2] y) { y = Mul(x, by) }", by=np.asarray([by, 1], np.float32))

    near, far = (
        [1.0, 0.9],
        [10.0, 1.0],
    )  # a change as large as that of the far ones would cost the near ones their answer
    data = DataSet.of({"x": np.asarray([near] * 10 + [far] * 10, np.float32)})
    exact, smaller = scaled(1.0), scaled(0.95)
    assert (run(smaller.bytes, data)[0].argmax(1) == 0).all()
    assert Exam(exact, data, "mixed").lost(smaller.bytes) == 25.0


def test_fewer_samples_than_the_points_ask_for_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    made, data = classifier()
    few = replace(data.pick(np.arange(40)), labels=np.zeros(40, np.int64))
    chosen(hub_of(made, data), data, few, max_drop=2.0)
    assert "judges 2 points by 40 samples, one of which is 2.5; 50 or more" in capsys.readouterr().err
    chosen(hub_of(made, data), data, few, max_drop=2.5)
    assert "one of which" not in capsys.readouterr().err


def test_outputs_that_are_no_class_scores_have_no_answers() -> None:
    with pytest.raises(
        DeploykitError, match=r"max_drop counts answers, and output 'y'.*no class scores.*give mixed a budget"
    ):
        Exam(conv_relu_conv(), images(), "mixed")


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
