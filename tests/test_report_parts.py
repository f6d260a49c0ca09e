"""What the report's pictures and advice are made of, against figures worked out by hand or with numpy."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploykit.core.artifact import Check, File, Island, Measurement, TensorSpec
from deploykit.core.manifest import Layer, Manifest, OperatorError, Score, Source
from deploykit.core.ranges import Histogram, Ranges, Stats
from deploykit.core.request import Request, Settings
from deploykit.report import spans
from deploykit.report.advice import CHECKS, NOTES, advice
from deploykit.report.layers import maps, noise

ROOT = Path(__file__).parents[1]
LAYERS = (
    Layer("stem.conv", "Conv"),
    Layer("body.0.conv", "Conv"),
    Layer("body.0.norm", "LayerNormalization"),
    Layer("body.1.view", "Reshape"),
    Layer("body.1.fc", "Gemm"),
    Layer("head", "Gemm"),
)
ISLANDS = (Island("LayerNormalization", "body.0.norm", "no rule"),)
PLAIN = Manifest(
    target="x86",
    exporter="onnx",
    model="nets.py:net",
    request=Request("nets.py:net", "x86"),
    steps=(),
    graph="0",
    inputs=(),
    outputs=(TensorSpec("y", ("batch", 10), "float32"),),
    files=(File("a.fp32", "fp32"), File("a.int8", "int8", {"Conv": 2, "Gemm": 2, "Reshape": 1}, ISLANDS)),
    stored=(),
    operators=(
        OperatorError("body.1.view", "Reshape", 0.0, 0.0, 10.0),
        OperatorError("head", "Gemm", 0.0, 0.0, 20.0),
        OperatorError("stem.conv", "Conv", 0.0, 0.0, 40.0),
    ),
    layers=LAYERS,
)


def said(manifest: Manifest, ranges: Ranges | None = None) -> dict[str, str]:
    return {a.what: a.mend for a in advice(manifest, ranges)}


def with_thresholds(method: str) -> Manifest:
    return replace(PLAIN, request=Request("nets.py:net", "x86", settings=Settings(thresholds=method)))


# ------------------------------------------------------------------ layer by layer


@pytest.mark.parametrize(("decibels", "percent"), [(0.0, 100.0), (20.0, 10.0), (40.0, 1.0), (6.0206, 50.0)])
def test_noise_is_the_error_over_the_signal(decibels: float, percent: float) -> None:
    assert noise(decibels) == pytest.approx(percent, rel=1e-4)


def test_noise_is_what_numpy_measures() -> None:
    random = np.random.default_rng(0)
    signal = random.normal(size=1000)
    error = 0.03 * random.normal(size=1000)
    decibels = 10 * np.log10((signal**2).sum() / (error**2).sum())
    assert noise(decibels) == pytest.approx(100 * np.sqrt((error**2).mean() / (signal**2).mean()))


def test_the_map_has_every_operator_in_the_networks_order() -> None:
    (found,) = maps(PLAIN)
    assert [c.layer for c in found.cells] == [layer.name for layer in LAYERS]
    assert [c.integer for c in found.cells] == [True, True, False, True, True, True]
    assert (found.integers, found.moved, found.floats) == (4, 1, 1)
    assert found.cells[2].why == "no rule"


def test_only_operators_that_compute_have_an_error_and_a_rank() -> None:
    (found,) = maps(PLAIN)
    errors = {c.layer: (c.error, c.rank) for c in found.cells if c.rank is not None}
    assert errors == {"head": (pytest.approx(10.0), 1), "stem.conv": (pytest.approx(1.0), 2)}
    assert [c.layer for c in found.worst] == ["head", "stem.conv"]
    assert found.errors is not None and found.errors.high == 10.0


def test_files_with_the_same_floats_share_a_map() -> None:
    half = replace(PLAIN.files[1], path="a.int8-fp16", precision="int8-fp16")
    assert [m.path for m in maps(replace(PLAIN, files=(*PLAIN.files, half)))] == ["a.int8"]
    other = replace(half, islands=(*ISLANDS, Island("Gemm", "head", "kept in float on request")))
    both = maps(replace(PLAIN, files=(*PLAIN.files, other)))
    assert [m.floats for m in both] == [1, 2] and both[1].half
    assert next(c for c in both[1].cells if c.layer == "head").error is None


def test_nothing_integer_has_no_map_and_nothing_measured_no_axis() -> None:
    assert maps(replace(PLAIN, files=PLAIN.files[:1])) == ()
    (found,) = maps(replace(PLAIN, operators=()))
    assert found.errors is None and found.worst == ()


def test_blocks_go_deeper_where_most_names_begin_alike() -> None:
    (found,) = maps(PLAIN)
    assert [(b.first, b.count) for b in found.blocks] == [(0, 1), (1, 2), (3, 2), (5, 1)]
    assert found.blocks[1].name in ("body.0", "0")
    flat = replace(PLAIN, layers=tuple(Layer(f"conv{i}", "Conv") for i in range(4)))
    assert [b.count for b in maps(flat)[0].blocks] == [1, 1, 1, 1]


# ------------------------------------------------------------------ ranges


def histogram(values: np.ndarray, limit: float = 8.0) -> Histogram:
    return Histogram(limit, np.histogram(values, 2048, (-limit, limit))[0])


def test_a_span_places_zero_and_the_average_sample() -> None:
    (span,) = spans.spans(Ranges("", "", 1, {"a": Stats(-2.0, 6.0, -1.0, 4.0)}), PLAIN)
    assert (span.low, span.high, span.zero, span.average) == (-2.0, 6.0, 0.25, (0.125, 0.75))
    assert (span.stretch, span.outline, span.cut) == (8 / 5, "", None)
    (positive,) = spans.spans(Ranges("", "", 1, {"a": Stats(2.0, 6.0, 2.0, 6.0)}), PLAIN)
    assert positive.zero == 0.0 and positive.average[0] == pytest.approx(1 / 3)


def test_the_outline_is_the_histogram() -> None:
    values = np.concatenate([np.full(1000, 0.01), np.full(10, 3.99), np.full(100, -1.99)])
    (span,) = spans.spans(Ranges("", "", 1, {"a": Stats(-2.0, 4.0, -2.0, 4.0, histogram(values))}), PLAIN)
    heights = [spans.HEIGHT - float(v) for v in re.findall(r"V([\d.]+)H", span.outline)]
    assert len(heights) == spans.BINS
    full = spans.HEIGHT - 2
    third = spans.BINS // 3
    assert heights[third] == pytest.approx(full, abs=0.1), "zero lies at a third of the way"
    assert heights[0] == pytest.approx(full * np.log1p(100) / np.log1p(1000), abs=0.1)
    assert heights[-1] == pytest.approx(full * np.log1p(10) / np.log1p(1000), abs=0.1)
    assert sum(h > 0.1 for h in heights) <= 4


def test_the_cut_is_what_the_threshold_method_leaves_out() -> None:
    values = np.concatenate([np.linspace(0, 1, 100_000), [4.0]])
    ranges = Ranges("", "", 1, {n: Stats(0.0, 4.0, 0.0, 1.0, histogram(values)) for n in ("a", "y")})
    a, y = spans.spans(ranges, with_thresholds("percentile"))
    assert a.cut is not None and a.cut[0] == 0.0 and a.cut[1] == pytest.approx(0.25, abs=0.005)
    assert y.cut is None, "what the network answers is never cut"
    (whole, _) = spans.spans(ranges, PLAIN)
    assert whole.cut is None, "minmax cuts nothing"
    unknown = replace(with_thresholds("percentile"), target="my-board")
    assert {s.cut for s in spans.spans(ranges, unknown)} == {None}


def test_moving_average_shows_its_cut_without_a_histogram() -> None:
    ranges = Ranges("", "", 1, {"a": Stats(-2.0, 6.0, -1.0, 4.0)})
    (span,) = spans.spans(ranges, with_thresholds("moving_average"))
    assert span.cut == (0.125, 0.75)


def test_tensors_that_were_only_moved_are_left_out() -> None:
    ranges = Ranges("", "", 1, {n: Stats(0.0, 1.0, 0.0, 1.0) for n in ("a", "body.1.view", "b")})
    constant = Ranges("", "", 1, {**ranges.tensors, "c": Stats(0.0, 0.0, 0.0, 0.0)})
    assert [s.name for s in spans.spans(constant, PLAIN)] == ["a", "b"]
    assert list(spans.computed(constant, PLAIN)) == ["a", "b"]


def test_of_many_tensors_those_with_the_rarest_ends_are_shown_in_order() -> None:
    tensors = {f"t{i}": Stats(0.0, 1.0 + i % 40, 0.0, 1.0) for i in range(80)}
    shown = [s.name for s in spans.spans(Ranges("", "", 1, tensors), PLAIN)]
    assert shown == [f"t{i}" for i in range(80) if i % 40 >= 28]


# ------------------------------------------------------------------ what to know, and what to do


def test_a_plain_export_needs_no_advice() -> None:
    good = replace(PLAIN, operators=PLAIN.operators[1:])
    assert said(good) == {}


def test_what_failed_comes_first_with_its_mend() -> None:
    failed = Check("lost accuracy (points)", "int8", 3.51234, 2.0, False, "80.00 -> 76.49")
    first, *_ = advice(replace(PLAIN, checks=(failed,), notes=("a note",)), None)
    assert (first.weight, first.what) == ("failed", "int8: lost accuracy (points) 3.512, bound 2 (80.00 -> 76.49)")
    assert "--keep-float body.1.view --keep-float head" in first.mend


def test_few_samples_are_said() -> None:
    few = replace(
        PLAIN,
        scores=(Score("original", 50, "", 90.0, None, None, {}),),
        data={"calibration": Source("", 16, ""), "holdout": Source("", 50, "")},
    )
    found = said(few)
    assert found["Scored on 50 samples only: one answer more or less is 2.0 points."].startswith("Give --eval")
    assert found["Ranges come from 16 samples only."].startswith("Give --calib")
    assert found["Scored on 50 samples held out of the calibration data."].startswith("Give --eval")


def test_noisy_layers_saturated_outputs_and_wide_ranges_are_said() -> None:
    noisy = replace(
        PLAIN,
        operators=(OperatorError("stem.conv", "Conv", 0.0, 0.0, 10.0),),
        scores=(Score("int8", 500, "", 90.0, None, None, {}, saturated=12.0),),
    )
    found = said(noisy, Ranges("", "", 1, {"a": Stats(0.0, 9.0, 0.0, 3.0), "b": Stats(0.0, 1.0, 0.0, 1.0)}))
    assert found["stem.conv (Conv) has noise of 32 % of its signal."].endswith("--keep-float stem.conv.")
    assert "--keep-float" in found["int8: for 12 % of the samples the two best classes are equal."]
    assert "--thresholds mse" in found["A few samples set the range of a."]
    assert "A few samples set the range of a." not in said(
        with_thresholds("mse"), Ranges("", "", 1, {"a": Stats(0.0, 9.0, 0.0, 3.0)})
    )


def test_times_that_are_not_the_devices_are_said() -> None:
    there = Measurement("fp32", 1, 1, 9, 1.0, 1.0, 1.0, 1.0, None, 1, "this machine, not the device: CPU, rt 1")
    none = replace(there, precision="int8", runs=0, p50_ms=None, where="not run here: needs a board")
    found = said(replace(PLAIN, measurements=(there, none)))
    assert "--device" in found["fp32 was timed on this machine, not on x86."]
    assert "--device" in found["int8 was not timed: needs a board."]


@pytest.mark.parametrize("target", ["cortex-m4", "cortex-m7", "fpga-int8"])
def test_nothing_is_advised_that_the_exporter_refuses_or_the_device_cannot_do(target: str) -> None:
    untimed = Measurement("int8", 1, 1, 0, None, None, None, None, None, 1, "not run here: needs the board")
    checks = tuple(Check(f"{start} x", "int8", 1.0, 0.0, False) for start in CHECKS)
    saturated = Score("int8", 500, "d", 80.0, 90.0, 12.0, {})
    board = replace(
        PLAIN, target=target, exporter="c99", measurements=(untimed,), checks=checks, scores=(saturated,)
    )  # fmt: skip
    mends = " ".join(said(board).values())
    assert "--keep-float" not in mends and "--device" not in mends and "--thresholds mse" in mends
    assert "Linux or Android" in said(board)["int8 was not timed: needs the board."]


def test_notes_are_sentences_and_names_keep_their_case() -> None:
    noted = replace(
        PLAIN, operators=(), advice=("int8 is slower than fp32 here (1.2 times): use a.fp32",), notes=("a b",)
    )
    found = said(noted)
    assert found == {
        "int8 is slower than fp32 here (1.2 times).": "Use a.fp32.",
        "A b.": "",
    }


def test_every_note_and_check_with_a_mend_is_still_said_somewhere() -> None:
    folders = (ROOT / "deploykit", ROOT / "exporters", ROOT / "calibration")
    sources = [p for folder in folders for p in folder.rglob("*.py") if p.parent.name != "report"]
    text = re.sub(r'"\s*\n\s*f?"', "", "\n".join(p.read_text(encoding="utf-8") for p in sources))
    for phrase in (*NOTES, *CHECKS):
        assert phrase in text, phrase
