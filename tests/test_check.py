"""The checks catch what they are there for: each with something wrong that must fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graphs import images, measured, normal, residual

from deploykit import exporters, pipeline
from deploykit.check import (
    LOST,
    Answers,
    Gate,
    check_file_against_hub,
    check_lowering,
    check_operators,
    check_score,
    narrow,
    score,
    sqnr_db,
)
from deploykit.core.artifact import Check
from deploykit.core.errors import DeploykitError, GateFailed
from deploykit.core.manifest import Manifest, OperatorError, Score
from deploykit.core.request import Request
from deploykit.core.target import QuantSpec
from deploykit.exporters import to_onnx
from deploykit.hub.lower import read_onnx
from deploykit.hub.quantize import quantize
from deploykit.models import load_model
from deploykit.report.advice import mend
from deploykit.targets import load

LOGITS = normal(0, 50, 10)


def answers(**outputs) -> Answers:
    return Answers(outputs, None)


def test_sqnr_is_the_textbook_formula() -> None:
    signal = np.array([3.0, 4.0])
    assert sqnr_db(signal, signal + np.array([0.3, 0.4])) == pytest.approx(20.0)
    assert sqnr_db(signal, signal) == 200.0


@pytest.mark.parametrize("spoilt", [normal(1, 50, 4), np.full((50, 4), np.nan, np.float32)])
def test_a_second_output_that_is_wrong_fails_although_the_classes_agree(spoilt) -> None:
    good = answers(logits=LOGITS, boxes=normal(2, 50, 4))
    bad = answers(logits=LOGITS, boxes=spoilt)
    baseline = score(good, good, "original", "eval")
    checks = check_score(score(bad, good, "int8", "eval"), baseline, Gate())
    assert [c.passed for c in checks] == [True, False]
    assert [c.passed for c in check_file_against_hub(bad, good, "int8", Gate())] == [True, False]


def test_a_loss_that_passes_by_the_standard_error_alone_is_said_aloud() -> None:
    before = Score("original", 200, "eval", 97.5, 100.0, None, {})
    found = check_score(replace(before, precision="int8", metric=96.0, agreement=96.0), before, Gate(max_drop=0.5))
    (lost,) = [c for c in found if c.name == LOST]
    assert lost.passed and "97.50 -> 96.00, allowed 0.5 and one standard error of 1.41" in lost.detail
    assert narrow(found, Gate(max_drop=0.5)) == [
        "int8 lost 1.50 points of accuracy, more than 0.5; it passes because one standard error of the samples is "
        "added to that bound (1.91)"
    ]
    assert narrow(found, Gate(max_drop=1.5)) == []


def test_a_negative_bound_on_lost_accuracy_is_refused() -> None:
    with pytest.raises(DeploykitError, match="--max-drop -5: a loss of accuracy is bounded by 0 points or more"):
        Gate(max_drop=-5)


def test_a_lowered_graph_that_computes_something_else_fails() -> None:
    class Other(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3)).repeat(1, 2)[:, :4]

    assert check_lowering(residual(), Other(), {"x": normal(0, 2, 3, 8, 8)}).passed is False


def test_a_file_whose_operators_are_those_of_the_hub_passes_and_another_does_not() -> None:
    made, data = residual(), images()
    hub = quantize(made, measured(made, data), QuantSpec())
    checks, operators = check_operators(hub, to_onnx, load("x86"), data, Gate())
    assert all(c.passed for c in checks)
    assert [o.sqnr_db for o in operators] == sorted(o.sqnr_db for o in operators)

    class Wrong:
        """An exporter whose files add a step to every output."""

        export = staticmethod(to_onnx.export)
        runtime = staticmethod(to_onnx.runtime)

        @staticmethod
        def load(path, threads=1):
            run = to_onnx.load(path, threads)
            return lambda arrays: {n: a + 0.2 * np.abs(a).max() for n, a in run(arrays).items()}

    checks, _ = check_operators(hub, Wrong, load("x86"), data, Gate())
    assert not any(c.passed for c in checks)


def test_the_check_says_how_many_products_were_compared_and_why_not_the_others() -> None:
    made, data = residual(), images()
    for name, coverage in (
        ("mobile-arm", "3 of 3 integer products among them"),
        ("x86", "2 of 3 integer products among them: the others write floats"),
        ("jetson", "1 of 3 integer products among them: the others write floats, or tensors that do not begin with"),
    ):
        target = load(name)
        hub = quantize(made, measured(made, data), target.quant)
        checks, _ = check_operators(hub, exporters.load(target.exporter), target, data, Gate())
        assert coverage in checks[0].detail, checks[0].detail


def test_a_users_onnx_is_compared_with_the_graph_that_is_made_of_it(tmp_path: Path) -> None:
    """Sizes that a Resize computes from floats are left to the runtime: 8 x 1.5 is 12, not 8."""
    text = """<ir_version: 10, opset_import: ["" : 20]> grow (float[batch,3,8,8] x) => (float[batch,3,h,w] y) {
        s = Shape<start=2>(x)
        f = Cast<to=1>(s)
        factor = Constant<value_float=1.5>()
        g = Mul(f, factor)
        sizes = Cast<to=7>(g)
        first = Shape<end=2>(x)
        all = Concat<axis=0>(first, sizes)
        y = Resize<mode="nearest">(x, , , all)
    }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "grow.onnx")
    example = {"x": normal(0, 2, 3, 8, 8)}
    assert check_lowering(read_onnx(tmp_path / "grow.onnx"), tmp_path / "grow.onnx", example).passed
    onnx.save(onnx.load_model_from_string(residual().bytes), tmp_path / "other.onnx")
    assert check_lowering(residual(seed=7), tmp_path / "other.onnx", example).passed is False


def test_an_onnx_file_that_fails_on_the_samples_is_the_users_error(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> bad (float[batch,4] x) => (float[batch,m] y) {
        n = NonZero(x)
        f = Cast<to=1>(n)
        y = MatMul(x, f)
    }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "bad.onnx")
    with pytest.raises(DeploykitError, match=r"fails on the sample inputs|cannot open"):
        check_lowering(residual(), tmp_path / "bad.onnx", {"x": np.ones((2, 4), np.float32)})


def test_what_is_done_about_a_failed_check_fits_the_file() -> None:
    """Nothing to quantize better where nothing is quantized, nothing to keep in float where nothing may be float."""
    quantizing, keeping = "--thresholds mse", "--keep-float stem"

    def advised(precision: str, exporter: str = "onnx") -> str:
        worst = OperatorError("stem", "Conv", 1.0, 0.0, 10.0)
        made = Manifest("t", exporter, "m", Request("m", "t"), (), "0", (), (), (), (), operators=(worst,))
        return mend(Check("agrees with the original model (%)", precision, 80.0, 90.0, False), made)

    assert quantizing in advised("int8") and keeping in advised("int8")
    assert quantizing in advised("int8", "c99") and keeping not in advised("int8", "c99")
    for precision in ("fp32", "fp16"):
        assert quantizing not in advised(precision) and keeping not in advised(precision)


def test_an_export_whose_float_file_fails_gets_no_advice_on_integers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.onnx").write_bytes(residual().bytes)
    prepared = pipeline.prepare(load_model(str(tmp_path / "net.onnx")), {"calibration": images(20)}, None)
    open_file = to_onnx.load
    monkeypatch.setattr(to_onnx, "load", lambda *a: lambda x: {n: -y for n, y in open_file(*a)(x).items()})
    settings = pipeline.Settings(precisions=("fp32",), benchmark=False)
    with pytest.raises(GateFailed, match="Nothing in this file is quantized") as failed:
        pipeline.export(prepared, [load("x86")], [tmp_path / "out"], settings, Gate())
    assert "--thresholds" not in str(failed.value) and "int8" not in str(failed.value)


def test_a_runtime_that_answers_nan_for_an_operator_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    made = residual()
    data = images(8)
    hub = quantize(made, measured(made, data), QuantSpec())
    open_file = to_onnx.load

    def spoil(array: np.ndarray) -> np.ndarray:
        return np.where(np.arange(array.size).reshape(array.shape) == 3, np.nan, array)

    def nan(path: Path, threads: int = 1) -> Any:
        run = open_file(path, threads)
        return lambda arrays: {name: spoil(array) for name, array in run(arrays).items()}

    monkeypatch.setattr(to_onnx, "load", nan)
    checks, _ = check_operators(hub, to_onnx, load("x86"), data, Gate())
    assert all(c.passed is False for c in checks)
