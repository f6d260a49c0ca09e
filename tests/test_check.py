"""The checks catch what they are there for: each with something wrong that must fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deploykit import exporters
from deploykit.check import (
    Answers,
    Gate,
    check_file_against_hub,
    check_lowering,
    check_operators,
    check_score,
    score,
    sqnr_db,
)
from deploykit.core.target import QuantSpec
from deploykit.exporters import to_onnx
from deploykit.hub.quantize import quantize
from deploykit.targets import load
from tests.graphs import images, measured, normal, residual

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
        ("x86", "3 of 3 integer products among them"),
        ("jetson", "1 of 3 integer products among them: the others write floats, or tensors that do not begin with"),
    ):
        target = load(name)
        hub = quantize(made, measured(made, data), target.quant)
        checks, _ = check_operators(hub, exporters.load(target.exporter), target, data, Gate())
        assert coverage in checks[0].detail, checks[0].detail
