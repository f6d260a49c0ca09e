from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploykit.core.errors import DeploykitError
from deploykit.core.recipe import Recipe, Step, TrainSettings, dump_recipe, load_recipe

names = st.text("abc_xyz", min_size=1, max_size=8)
values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
positive = st.floats(1e-6, 1e6)
settings = st.builds(
    TrainSettings, st.text(max_size=8), positive, positive, st.integers(1, 4096), st.floats(0, 1),
    st.lists(st.sampled_from(["flip", "crop"])).map(tuple),
)  # fmt: skip
options = st.dictionaries(names.filter(lambda n: n != "name"), values, max_size=3)
steps = st.lists(st.builds(Step, names, options, st.booleans()))


@given(st.builds(Recipe, steps.map(tuple), settings))
def test_a_recipe_survives_toml(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    file = tmp_path_factory.mktemp("r") / "r.toml"
    file.write_text(dump_recipe(recipe), encoding="utf-8", newline="")
    assert load_recipe(file) == recipe


def load(tmp_path: Path, text: str) -> Recipe:
    (tmp_path / "r.toml").write_text(text)
    return load_recipe(tmp_path / "r.toml")


def test_steps_keep_their_order_and_options(tmp_path: Path) -> None:
    recipe = load(
        tmp_path, '[[step]]\nname = "sparsify"\nsparsity = 0.5\n[[step]]\nname = "qat"\n[train]\nepochs = 2\n'
    )
    assert recipe == Recipe((Step("sparsify", {"sparsity": 0.5}), Step("qat")), TrainSettings(epochs=2.0))
    assert [str(s) for s in recipe.steps] == ["sparsify(sparsity=0.5)", "qat()"]


def test_an_empty_file_is_the_empty_recipe(tmp_path: Path) -> None:
    assert load(tmp_path, "") == Recipe()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[[stp]]\nname = "sparsify"', "no key 'stp'. Did you mean 'step'?"),
        ('[step]\nname = "sparsify"', "with two brackets"),
        ("step = [1]", "with two brackets"),
        ("[[step]]\nsparsity = 1", "step 1 has no name"),
        ('[[step]]\nname = "a"\n[[step]]\nname = 3', "step 2 has no name"),
        ("[train]\nepoch = 1", "no key 'epoch'. Did you mean 'epochs'?"),
        ("[train]\nepochs = 0", "epochs and learning_rate must be above 0"),
        ("[train]\nlearning_rate = nan", "must be above 0"),
        ("[train]\nbatch = 1.5", "batch"),
        ('[train]\naugment = ["flipp"]', "no choice 'flipp'. Did you mean 'flip'?"),
        ("train = 3", "a table is expected"),
    ],
)
def test_a_wrong_recipe_says_what_and_where(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(DeploykitError) as error:
        load(tmp_path, text)
    assert expected in str(error.value) and "r.toml" in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"learning_rate": -1},
        {"batch": 0},
        {"weight_decay": -0.1},
        {"optimizer": "adam"},
        {"epochs": float("nan")},
    ],
)
def test_settings_that_cannot_train_are_refused(options: Any) -> None:
    with pytest.raises(ValueError):
        TrainSettings(**options)
