"""What people get wrong first, and what they are told before any long work."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyCNN, TinyMLP
from graphs import normal
from torch import Tensor, nn

from deploykit import passes, pipeline, targets
from deploykit.check import Answers, Gate, doubts
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.files import refuse_existing
from deploykit.core.manifest import load_manifest
from deploykit.core.recipe import Recipe, Step
from deploykit.models import accept_module, load_model
from deploykit.pipeline import Settings


def images(count: int, side: int = 16, labels: bool = True, origin: str = "calibration data a.npz") -> DataSet:
    classes = np.random.default_rng(0).integers(0, 10, count) if labels else None
    return DataSet.of({"x": normal(count, count, 3, side, side)}, classes, origin)


def test_calibration_and_evaluation_data_of_different_shapes_are_refused(tiny_cnn: TinyCNN) -> None:
    data = {"calibration": images(20, 12), "eval": images(20, 16, origin="eval data b.npz")}
    with pytest.raises(DeploykitError, match=r"b.npz: samples of 'x' are 3 x 16 x 16, those of .*a.npz 3 x 12 x 12"):
        pipeline.prepare(accept_module(tiny_cnn), data, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("factor", "warned"), [(60.0, True), (2.0, False)])
def test_data_sets_whose_values_differ_many_fold_get_a_warning(
    factor: float, warned: bool, tiny_cnn: TinyCNN, capsys: pytest.CaptureFixture[str]
) -> None:
    x = normal(1, 20, 3, 16, 16)
    data = {
        "calibration": DataSet.of({"x": x * factor}, None, "calibration data a.npz"),
        "eval": images(20, origin="eval data b.npz"),
    }
    pipeline.prepare(accept_module(tiny_cnn), data, None)  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert (
        "warning: 'x' lies between -" in said and "in eval data b.npz: prepare both as in training" in said
    ) == warned


def test_a_bound_on_lost_accuracy_without_labels_is_refused(tiny_cnn: TinyCNN, tmp_path: Path) -> None:
    data = {"calibration": images(20), "eval": images(20, labels=False)}
    prepared = pipeline.prepare(accept_module(tiny_cnn), data, None)  # type: ignore[arg-type]
    with pytest.raises(
        DeploykitError, match="--max-drop 0 is a bound on lost accuracy, but the evaluation data has no"
    ):
        pipeline.export(prepared, [targets.load("x86")], [tmp_path / "out"], Settings(), Gate(max_drop=0.0))
    assert not (tmp_path / "out").exists()


def test_evaluation_data_without_labels_is_said_aloud(tiny_cnn: TinyCNN, tmp_path: Path) -> None:
    data = {"calibration": images(20), "eval": images(20, labels=False)}
    prepared = pipeline.prepare(accept_module(tiny_cnn), data, None)  # type: ignore[arg-type]
    gate = Gate(min_agreement=0.0)
    pipeline.export(prepared, [targets.load("x86")], [tmp_path / "out"], Settings(benchmark=False), gate)
    assert any("has no labels: files are judged by" in n for n in load_manifest(tmp_path / "out").notes)


def test_samples_that_were_held_out_are_counted_in_a_note(tiny_cnn: TinyCNN, tmp_path: Path) -> None:
    prepared = pipeline.prepare(accept_module(tiny_cnn), {"calibration": images(20)}, None)
    gate = Gate(min_agreement=0.0, max_drop=100.0)
    pipeline.export(prepared, [targets.load("x86")], [tmp_path / "out"], Settings(benchmark=False), gate)
    assert any("scored on 4 calibration samples that were held out" in n for n in load_manifest(tmp_path / "out").notes)


def test_a_model_no_better_than_chance_raises_doubts_about_its_weights() -> None:
    labels = np.arange(1000) % 10
    wrong = np.random.default_rng(0).normal(size=(1000, 10))
    assert "no better than chance" in doubts(Answers({"y": wrong}, labels))[0]
    half = wrong + 10 * np.eye(10)[np.where(np.arange(1000) % 20 < 10, labels, 0)]
    assert doubts(Answers({"y": half}, labels)) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_refused_at_once(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(DeploykitError, match="is no folder that you may write to"):
            refuse_existing(tmp_path / "out", overwrite=False)
    finally:
        tmp_path.chmod(0o700)


def test_an_output_below_a_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DeploykitError, match="is no folder that you may write to"):
        refuse_existing(tmp_path / "file" / "out", overwrite=False)


def test_compress_for_a_target_refuses_a_step_that_cannot_pay_there(tmp_path: Path) -> None:
    (tmp_path / "only_linear.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Linear(4, 3))\n"
    )
    data = DataSet.of({"input": normal(0, 20, 4)})
    prepared = pipeline.prepare(load_model(f"{tmp_path / 'only_linear.py'}:build"), {"calibration": data}, None)
    settings = Settings(recipe=Recipe((Step("sparsify", {"sparsity": 0.5}),)))
    with pytest.raises(DeploykitError, match=r"cannot pay on target 'x86'.*--force"):
        pipeline.compress(prepared, settings, targets.load("x86"), tmp_path / "small")
    pipeline.compress(prepared, settings, None, tmp_path / "small")
    assert (tmp_path / "small" / "structure.json").is_file()


class Outside(nn.Module):
    """Something that neither .tflite nor TensorRT can hold."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.det(x[:, 0, :4, :4])[:, None]


def test_what_several_targets_cannot_take_is_said_at_once(tmp_path: Path) -> None:
    prepared = pipeline.prepare(accept_module(Outside().eval()), {"calibration": images(20)}, None)
    chosen = [targets.load(n) for n in ("mobile-arm", "raspberry-pi-5", "jetson")]
    folders = [tmp_path / t.name for t in chosen]
    with pytest.raises(DeploykitError) as error:
        pipeline.export(prepared, chosen, folders, Settings(benchmark=False), Gate())
    assert str(error.value).count("cannot be written as .tflite") == 1, "two targets, one and the same reason"
    assert "TensorRT" in str(error.value)
    assert not any(f.exists() for f in folders)


class Normed(nn.Module):
    """A network with a layer that integer C does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.norm(self.first(x)))
        return found


TIGHT = {"rounding": "tflm_double", "flash_bytes": 100}


@pytest.mark.parametrize(
    ("module", "options", "keep", "said"),
    [
        (Normed, {"rounding": "tflm_double"}, (), r"norm \(LayerNormalization\)"),
        (TinyMLP, {"rounding": "tflm_double"}, ("hidden",), r"hidden \(Gemm\): kept in float on request"),
        (TinyMLP, {"rounding": "tflm_double", "flahs_bytes": 5}, (), "Did you mean 'flash_bytes'"),
        (TinyMLP, TIGHT, (), r"does not fit target 'cortex-m4'.*\n.*Layer hidden needs most"),
    ],
)
def test_what_integer_c_cannot_take_is_said_before_the_calibration_data_is_read(
    module: type[nn.Module], options: dict[str, object], keep: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    rows, read = normal(0, 40, 8 if module is Normed else 4), set()

    def sample(i: int) -> dict[str, np.ndarray]:
        read.add(i)
        return {"x": rows[i]}

    prepared = pipeline.prepare(
        accept_module(module().eval()), {"calibration": DataSet(sample, tuple(range(40)))}, None
    )
    target = replace(targets.load("cortex-m4"), options=options)
    with pytest.raises(DeploykitError, match=said):
        pipeline.export(prepared, [target], [tmp_path / "out"], Settings(keep_float=keep), Gate())
    assert len(read) <= 4
    assert not (tmp_path / "out").exists()


def test_a_budget_is_not_held_against_a_model_that_steps_may_still_make_smaller(
    tiny_mlp: TinyMLP, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = pipeline.prepare(accept_module(tiny_mlp), {"calibration": DataSet.of({"x": normal(0, 40, 4)})}, None)
    settings = Settings(recipe=Recipe((Step("sparsify", {"sparsity": 0.5}),)))
    with pytest.raises(DeploykitError, match="does not fit target"):
        pipeline.export(
            prepared, [replace(targets.load("cortex-m4"), options=TIGHT)], [tmp_path / "out"], settings, Gate()
        )
    assert "running Sparsify" in capsys.readouterr().err


def test_the_plan_lists_passes_by_stage_and_what_they_need(capsys: pytest.CaptureFixture[str]) -> None:
    from deploykit import cli

    with pytest.raises(SystemExit):
        cli.main(["plan", "--target", "x86", "--json"])
    found = json.loads(capsys.readouterr().out)
    stages = [passes.load(row["step"].partition("(")[0]).stage for row in found]
    assert stages == sorted(stages, key=["model", "graph", "hub"].index)
    (qat,) = [row for row in found if row["step"].startswith("qat")]
    assert "train" in qat["needs"]
