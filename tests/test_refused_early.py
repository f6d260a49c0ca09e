"""What exporters and steps will refuse is refused before anything is trained or calibrated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyMLP
from graphs import normal
from test_pipeline import out
from torch import Tensor, nn

from deploykit import passes, pipeline
from deploykit.core.errors import DeploykitError
from deploykit.core.recipe import Recipe, Step


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("mobile-arm", r"cannot be written as \.tflite:\n  sin \(Sin\)"),
        ("jetson-nano", r"operator set 13: GridSample \(layer '.*'\) is defined since 16"),
    ],
)
def test_what_an_exporter_cannot_write_is_refused_before_anything_is_trained_or_calibrated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, said: str
) -> None:
    class Warped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            grid = torch.stack([torch.sin(x[:, 0]), x[:, 1]], -1)
            return nn.functional.grid_sample(x, grid, align_corners=False)

    def long_work(*_: Any) -> None:
        raise AssertionError("the long work began")

    monkeypatch.setattr(pipeline.steps, "calibrate", long_work)
    monkeypatch.setattr(passes.load("sparsify"), "__call__", long_work)
    steps = Recipe((Step("sparsify", {"sparsity": 0.5}),))
    with pytest.raises(DeploykitError, match=said):
        out(tmp_path, Warped(), target, {"x": normal(0, 8, 2, 4, 4)}, recipe=steps, force=True)


@pytest.fixture
def no_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever calibrates on more samples than a stand-in takes, or trains, fails the test."""
    from deploykit.calibration import observe
    from deploykit.training.trainer import Trainer

    watch = observe.observe

    def few_only(run: Any, graph: str, data: Any, *more: Any) -> Any:
        assert len(data) <= 2, f"calibrated on {len(data)} samples before the refusal"
        return watch(run, graph, data, *more)

    monkeypatch.setattr(observe, "observe", few_only)
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("trained before the refusal"))


@pytest.mark.parametrize(
    ("step", "options", "samples", "precision", "said"),
    [
        ("mixed", {"keep": ["head.*"]}, 80, "int8", r"no layer 'head\.\*'"),
        ("mixed", {"bytes": 0.3}, 80, "int8", r"0\.3 .*cannot be met: the least possible is 0\.5"),
        ("mixed", {"bytes": 0.9}, 80, "w2a8", None),
        ("mixed", {}, 15, "int8", "at least 16 calibration samples; there are 12"),
        ("mixed", {"ms": 3.0, "times": "none.toml"}, 80, "int8", "none.toml"),
        ("gptq", {}, 8, "int8", "at least 8 calibration samples; there are 7"),
        ("adaround", {}, 8, "int8", "at least 8 calibration samples; there are 7"),
        ("reconstruct", {}, 35, "int8", "at least 32 calibration samples; there are 28"),
    ],
)
def test_what_a_hub_step_will_refuse_is_refused_before_the_calibration(
    tmp_path: Path, tiny_mlp: TinyMLP, no_long_work: None, step: str, options: Any, samples: int, precision: str,
    said: str | None,
) -> None:  # fmt: skip
    recipe, data = Recipe((Step("equalize"), Step(step, options))), normal(0, samples, 4)
    expected = AssertionError if said is None else DeploykitError  # nothing to refuse: it would calibrate
    with pytest.raises(expected, match=said or "calibrated on 64 samples"):
        out(tmp_path, tiny_mlp, "x86", data, recipe=recipe, precisions=(precision,))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("step", "options", "said"),
    [
        ("refit", {}, "at least 32 calibration samples; there are 28"),
        ("prune", {"amount": 0.3}, "at least 32 calibration samples; there are 28"),
        ("sparsify", {"sparsity": 0.5, "criterion": "obs"}, "at least 32 calibration samples; there are 28"),
        ("semi_structured", {"criterion": "obs"}, "at least 32 calibration samples; there are 28"),
        ("sparsify", {"sparsity": 0.5, "criterion": "snip"}, "criterion .snip. needs labels"),
        ("iterate", {"amount": 0.5, "options": {"criterion": "obs"}}, "at least 32 calibration samples; there are 28"),
        ("iterate", {"amount": 0.5, "options": {"sparsity": 0.2}}, "sparsity of sparsify is set round by round"),
    ],
)
def test_what_a_model_step_will_refuse_is_refused_before_another_trains(
    tmp_path: Path, tiny_mlp: TinyMLP, no_long_work: None, step: str, options: Any, said: str
) -> None:
    data = normal(0, 35, 4)
    recipe = Recipe((Step("finetune", {"steps": 1}), Step(step, options)))
    with pytest.raises(DeploykitError, match=said):
        out(tmp_path, tiny_mlp, "x86", data, recipe=recipe, train=normal(1, 35, 4), force=True)
    assert list(tmp_path.iterdir()) == []
