"""Recipes that ship, by name; a target's own; steps that run only where they can."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import enter
from torch import Tensor, nn

import deploykit as dk
from deploykit import planning, recipes, targets
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import load_manifest
from deploykit.core.recipe import Recipe, Step, dump_recipe, load_recipe
from deploykit.core.request import Gate

NET = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5),
    ).eval()
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("small_net.py").write_text(NET)
    random = np.random.default_rng(0)
    x = random.normal(size=(60, 3, 8, 8)).astype(np.float32)
    np.savez("calib.npz", input=x)
    np.savez("train.npz", input=x, y=random.integers(0, 5, 60))
    return tmp_path


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", recipes.names())
def test_every_shipped_recipe_builds_and_says_in_comments_what_it_needs(name: str) -> None:
    recipe = recipes.load(name)
    every = ["data", "train", "labels", "teacher"]
    packed = planning.profiting(targets.load("jetson-orin-nano"), name in ("deep_compression", "small_file"))
    planned = planning.plan(recipe, packed, every, automatic=False)
    assert planned and all(not p.refusal for p in planned)
    text = (Path(recipes.__file__).parent / f"{name}.toml").read_text()
    assert text.startswith("# ") and "Needs" in text


@pytest.mark.parametrize("name", targets.names())
def test_a_targets_own_recipe_pays_there_and_prunes_where_narrower_layers_do(name: str) -> None:
    target = targets.load(name)
    assert ("structured" in target.profits) == (target.recipe == "prune")
    planned = planning.plan(recipes.load("default", [target]), target, ["data", "teacher"], automatic=False)
    assert [(type(p.step).__name__, p.refusal) for p in planned] == [("Prune", ""), ("Finetune", "needs --train")]
    assert planned[1].left_out


def test_a_board_inherits_its_bases_recipe_and_may_have_none(tmp_path: Path) -> None:
    board = tmp_path / "board.toml"
    board.write_text('extends = "x86"\ntitle = "Mine"\n')
    assert targets.load(str(board)).recipe == "prune"
    board.write_text('extends = "x86"\ntitle = "Mine"\nrecipe = ""\n')
    with pytest.raises(DeploykitError, match=r"target .board. has no default recipe.*deep_compression, dsd, prune"):
        recipes.load("default", [targets.load(str(board))])


def test_default_means_nothing_without_a_target_or_for_targets_that_differ(tmp_path: Path) -> None:
    with pytest.raises(DeploykitError, match="give --target"):
        recipes.load("default")
    board = tmp_path / "board.toml"
    board.write_text('extends = "x86"\ntitle = "Mine"\nrecipe = "dsd"\n')
    with pytest.raises(DeploykitError, match="x86 has prune, board has dsd"):
        recipes.load("default", [targets.load("x86"), targets.load(str(board))])


def test_a_name_that_is_no_recipe_and_no_file_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DeploykitError, match=r"no recipe 'prun'\. Did you mean 'prune'"):
        recipes.load("prun")
    with pytest.raises(DeploykitError, match=r"no file .*prun\.toml"):
        recipes.load(str(tmp_path / "prun.toml"))


def test_a_file_of_the_users_own_is_a_recipe_too(tmp_path: Path) -> None:
    recipe = Recipe((Step("prune", {"amount": 0.5}), Step("finetune", optional=True)))
    (tmp_path / "mine.toml").write_text(dump_recipe(recipe))
    assert recipes.load(str(tmp_path / "mine.toml")) == recipe == load_recipe(tmp_path / "mine.toml")


def test_optional_is_true_or_false(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('[[step]]\nname = "prune"\noptional = "yes"\n')
    with pytest.raises(DeploykitError, match="step 1: optional is true or false"):
        load_recipe(tmp_path / "mine.toml")


def test_compress_for_a_target_runs_its_recipe_and_says_what_is_left_out(workplace: Path) -> None:
    said = enter("compress small_net.py:build --target x86 --calib calib.npz -o small")
    assert said.code == 0, said.err
    assert said.out.startswith("small: Prune(amount=0.3") and "Finetune" not in said.out
    assert "Finetune(steps=150, learning_rate=0.001, temperature=1.0) is left out: it needs --train" in said.err
    net: nn.Module = dk.load("small")
    namespace: dict[str, nn.Module] = {}
    exec(NET, namespace)
    assert parameters(net) < parameters(namespace["build"]())  # type: ignore[operator]


def test_compress_without_recipe_and_target_asks_for_one(workplace: Path) -> None:
    said = enter("compress small_net.py:build --calib calib.npz -o small")
    assert (
        said.code == 2 and "give --target, or one of deep_compression, dsd, prune, small_file, sparse_2_4" in said.err
    )


def test_without_a_target_every_step_pays_and_optional_ones_run(workplace: Path) -> None:
    Path("mine.toml").write_text('[[step]]\nname = "semi_structured"\noptional = true\n')
    asked = "compress small_net.py:build --recipe mine.toml --calib calib.npz"
    assert "SemiStructured(" in enter(f"{asked} -o any").out
    said = enter(f"{asked} --target x86 -o none")
    assert "is left out: it cannot pay on target 'x86'" in said.err and "SemiStructured" not in said.out


def test_export_prunes_only_when_asked_and_notes_the_step_that_was_left_out(workplace: Path) -> None:
    asked = "export small_net.py:build --target x86 --calib calib.npz --no-benchmark"
    assert enter(f"{asked} -o whole").code == 0
    assert not any("Prune" in step for step in load_manifest(workplace / "whole").steps)
    assert enter(f"{asked} --recipe default -o narrow").code in (0, 3)  # random weights agree by chance
    manifest = load_manifest(workplace / "narrow")
    assert any(step.startswith("Prune(") for step in manifest.steps)
    assert not any(step.startswith("Finetune(") for step in manifest.steps)
    assert any(note.startswith("Finetune(") and "was left out: it needs --train" in note for note in manifest.notes)
    assert manifest.request.settings.recipe == recipes.load("prune")


def test_a_step_that_is_not_optional_is_still_refused(workplace: Path) -> None:
    said = enter("compress small_net.py:build --recipe dsd --target x86 --calib calib.npz -o dense")
    assert said.code == 2 and "needs --train" in said.err


def test_plan_names_the_targets_recipe_and_takes_recipes_by_name() -> None:
    assert "default recipe: prune" in enter("plan --target jetson").out
    found = json.loads(enter("plan --target jetson --recipe sparse_2_4 --calib x --json").out)
    assert [(f["step"].split("(")[0], f["applies"]) for f in found if f["step"][0] in "SRF"] == [
        ("SemiStructured", True), ("Refit", True), ("Finetune", False),
    ]  # fmt: skip
    assert "prune by default" in enter("targets jetson").out


@pytest.mark.parametrize("name", ["prune", "dsd"])
def test_shipped_recipes_run_from_python_by_name(name: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.second(torch.relu(self.first(x)))))

    torch.manual_seed(0)
    random = np.random.default_rng(0)
    x = random.normal(size=(80, 8)).astype(np.float32)
    data = x, random.integers(0, 4, 80)
    dk.export(
        Net().eval(), "x86", x, train=data, recipe=name, out=tmp_path / "out", benchmark=False,
        gate=Gate(min_agreement=0.0),  # the point is what runs
    )  # fmt: skip
    steps = load_manifest(tmp_path / "out").steps
    first = {"prune": ["Prune", "Finetune"], "dsd": ["Dsd"]}[name]
    assert [step.split("(")[0] for step in steps][: len(first)] == first
