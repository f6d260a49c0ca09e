from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import images, measured, residual

from deploykit import passes, pipeline, targets
from deploykit.core import journal as journals
from deploykit.core.context import Context
from deploykit.core.errors import DeploykitError
from deploykit.core.journal import NOTHING_KEPT, Journal, beside
from deploykit.core.recipe import Recipe, Step
from deploykit.core.request import Gate
from deploykit.hub.quantize import quantize
from deploykit.models import accept_module

X86 = targets.load("x86")


@pytest.fixture(autouse=True)
def keep_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "WORTH", 0.0)


class Counted:
    """Arrays, and how often they were computed."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.times += 1
        return {"a/b": np.arange(6, dtype=np.int8).reshape(2, 3), "scalar": np.asarray(np.float64(0.1))}


def test_what_was_found_is_read_back_exactly_and_not_computed_again(tmp_path: Path) -> None:
    compute, journal = Counted(), Journal(tmp_path).of("step", 3)
    first, second = journal.once("layer", compute), journal.once("layer", compute)
    assert compute.times == 1
    for name in first:
        assert (second[name].dtype, second[name].shape) == (first[name].dtype, first[name].shape)
        np.testing.assert_array_equal(second[name], first[name])


def test_what_depends_on_something_else_is_another_result(tmp_path: Path) -> None:
    compute = Counted()
    journal = Journal(tmp_path)
    for other in (journal, journal.of("a"), journal.of("b"), journal.of("a", "b"), journal.of("ab"), journal.of(b"x")):
        other.once("layer", compute)
    journal.once("another layer", compute)
    assert compute.times == 7 == journal.results()


def test_a_damaged_result_is_computed_again(tmp_path: Path) -> None:
    compute, journal = Counted(), Journal(tmp_path)
    journal.once("layer", compute)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    journal.once("layer", compute)
    assert compute.times == 2
    journal.once("layer", compute)
    assert compute.times == 2


def test_without_a_folder_nothing_is_kept_and_quick_work_is_not_worth_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Counted()
    NOTHING_KEPT.once("layer", compute)
    NOTHING_KEPT.once("layer", compute)
    monkeypatch.setattr(journals, "WORTH", 60.0)
    Journal(tmp_path).once("layer", compute)
    assert compute.times == 3
    assert list(tmp_path.iterdir()) == []


def interrupt_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C does, once so many results were written."""
    write, done = journals._write, [0]

    def then(path: Path, arrays: journals.Arrays) -> None:
        write(path, arrays)
        done[0] += 1
        if done[0] == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(journals, "_write", then)


STEPS = {
    "gptq": {}, "adaround": {"steps": 20}, "fit_ranges": {}, "reconstruct": {"steps": 10, "layers": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_a_step_that_was_cut_goes_on_and_ends_where_it_would_have(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, data = residual(), images(40)
    hub = quantize(made, measured(made, data), X86.quant)
    step = passes.build(Step(name, STEPS[name]))
    whole = step(hub, Context(X86, {"calibration": data})).bytes
    here = Context(X86, {"calibration": data}, journal=Journal(tmp_path))
    with monkeypatch.context() as cut:
        interrupt_after(2, cut)
        with pytest.raises(KeyboardInterrupt):
            step(hub, here)
    assert here.journal.results() == 2
    there = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert step(hub, here).bytes == whole
    assert here.journal.results() > 2
    assert {p: p.stat().st_mtime_ns for p in there} == there  # neither result was written again


def test_an_export_that_was_interrupted_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from torch import nn

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(80, 3)).eval()
    settings = pipeline.Settings(Recipe((Step("gptq"),)), precisions=("int8",), benchmark=False)

    def export(out: str) -> None:
        prepared = pipeline.prepare(accept_module(net), {"calibration": images(40, name="input")}, None)
        pipeline.export(prepared, [X86], [tmp_path / out], settings, Gate(min_agreement=0, min_file_agreement=0))

    export("whole")
    with monkeypatch.context() as cut:
        interrupt_after(2, cut)
        with pytest.raises(KeyboardInterrupt):
            export("out")
    assert "the same command goes on from there" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.deploykit-journal", "whole"]
    export("out")
    assert "going on where a run was cut: 2 results" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]
    files = [(tmp_path / out / "model.int8.onnx").read_bytes() for out in ("whole", "out")]
    assert files[0] == files[1]


def test_a_run_that_fails_leaves_no_journal(tmp_path: Path) -> None:
    with pytest.raises(DeploykitError), beside(tmp_path / "out") as journal:
        journal.once("layer", Counted())
        raise DeploykitError("a budget that cannot be met")
    assert list(tmp_path.iterdir()) == []
