"""The house: layers, layout, and that one file is enough to add a pass, an exporter or a target."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from deploykit import exporters, passes, targets
from deploykit.core.precision import PRECISIONS
from deploykit.core.recipe import STAGES
from deploykit.core.target import Need, Profit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
CODE = ("deploykit", "exporters", "calibration", "targets", "benchmarks")
LINKED = ("exporters", "calibration", "targets")
HEAVY = ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "ai_edge_litert", "openvino", "accelerate", "sklearn")
LONGEST = 500


def project() -> dict[str, object]:
    found: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return found


def texts() -> Iterator[Path]:
    """Every text file of the project, each once; not what tools leave."""
    folders = (*CODE, "tests", "docs", "examples", ".ci")
    for path in [*ROOT.iterdir(), *(p for folder in folders for p in (ROOT / folder).rglob("*"))]:
        is_text = path.suffix in (".py", ".md", ".toml", ".txt", ".sh", ".yaml", ".j2", ".in", ".json", "")
        if path.is_file() and is_text and "__pycache__" not in path.parts and not path.parent.is_symlink():
            yield path


# ------------------------------------------------------------------ layers


def test_every_line_imports_only_from_lines_below() -> None:
    pytest.importorskip("importlinter", reason="the layers are checked by import-linter, part of the extra 'dev'")
    linter = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    ran = subprocess.run(
        [*linter, "--no-cache"], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "1 kept, 0 broken" in ran.stdout


def loaded_after(*modules: str) -> list[str]:
    """Which heavy libraries a fresh process has loaded after importing these."""
    code = f"import json, sys; import {', '.join(modules)}; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    found: list[str] = json.loads(ran.stdout)
    return found


def test_the_core_and_the_command_line_load_nothing_heavy() -> None:
    core = [f"deploykit.core.{p.stem}" for p in (ROOT / "deploykit" / "core").glob("*.py") if p.stem != "__init__"]
    assert len(core) > 10
    assert loaded_after("deploykit", *core, "deploykit.targets", "deploykit.cli", "deploykit.doctor") == []


def test_a_library_that_is_there_would_be_noticed() -> None:
    assert loaded_after("deploykit.hub.graph") == ["onnx", "onnx_ir"]


# ------------------------------------------------------------------ layout


def test_every_package_is_listed_and_every_listed_package_exists() -> None:
    settings = project()["tool"]["setuptools"]  # type: ignore[index]
    places: dict[str, str] = settings["package-dir"]
    found = {"deploykit"}
    for name, folder in places.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / folder).parts
            if inner[:1] not in [(linked,) for linked in LINKED] or name != "deploykit":
                found.add(".".join((name, *inner)))
    assert sorted(settings["packages"]) == sorted(found)


def test_files_that_are_no_python_are_packed_too() -> None:
    settings = project()["tool"]["setuptools"]  # type: ignore[index]
    packed = settings["package-data"]
    for name in packed:
        folder = ROOT.joinpath(*name.split("."))  # through the links
        assert all(any(folder.glob(pattern)) for pattern in packed[name]), name
    others = {
        p for folder in ("deploykit", "exporters", "calibration", "targets") for p in (ROOT / folder).rglob("*")
        if p.is_file() and p.suffix not in (".py", ".pyc") and "__pycache__" not in p.parts
    }  # fmt: skip
    kinds = {".toml", ".sh", ".md", ".j2", ".typed", ".c", ".h", ".txt", "Makefile"}
    assert {p.suffix or p.name for p in others} == kinds


@pytest.mark.parametrize("name", LINKED)
def test_the_top_folders_are_the_packages(name: str) -> None:
    link = ROOT / "deploykit" / name
    assert link.is_symlink() and os.readlink(link) == f"../{name}"
    assert project()["tool"]["setuptools"]["package-dir"][f"deploykit.{name}"] == name  # type: ignore[index]


def test_no_file_of_the_project_names_a_place_outside_it() -> None:
    may = {ROOT / "benchmarks" / "data.py", ROOT / "tests" / "conftest.py"}  # the default of DEPLOYKIT_DATA
    places = ("/" + "work/", "shared" + "/")
    named = {p: [x for x in places if x in p.read_text(encoding="utf-8")] for p in texts()}
    assert len(named) > 150
    assert {p.relative_to(ROOT): found for p, found in named.items() if found and p not in may} == {}


def test_no_file_of_code_is_long() -> None:
    """Tests may be long: they are lists of cases. build.py runs alone on a device and is one file by design."""
    may = ROOT / "exporters" / "tensorrt" / "device" / "build.py"
    lengths = {
        p: p.read_text(encoding="utf-8").count("\n")
        for p in texts()
        if p.suffix == ".py" and p != may and p.relative_to(ROOT).parts[0] in CODE
    }
    assert {p.relative_to(ROOT).as_posix(): n for p, n in lengths.items() if n > LONGEST} == {}


def opens_with_a_sentence(path: Path) -> bool:
    return bool(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))))


def test_every_file_of_code_says_what_it_is_for() -> None:
    silent = [
        p.relative_to(ROOT).as_posix()
        for p in texts()
        if p.suffix == ".py" and p.relative_to(ROOT).parts[0] in CODE and not opens_with_a_sentence(p)
    ]
    assert silent == []


# ------------------------------------------------------------------ a file name is the registry


@pytest.mark.parametrize("name", passes.names())
def test_every_pass_is_a_frozen_value_that_says_its_rules(name: str) -> None:
    loaded = passes.load(name)
    assert isinstance(loaded, type) and dataclasses.is_dataclass(loaded)
    assert loaded.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert loaded.stage in STAGES
    assert set(loaded.needs) <= set(get_args(Need))
    assert loaded.pays_if and set(loaded.pays_if) <= set(get_args(Profit))
    assert loaded.__doc__ and (sys.modules[loaded.__module__].__doc__ or "").strip()
    assert (ROOT / "docs" / "passes" / f"{name}.md").is_file()


@pytest.mark.parametrize("name", exporters.names())
def test_every_exporter_has_the_three_functions(name: str) -> None:
    loaded = exporters.load(name)
    assert all(callable(getattr(loaded, function)) for function in ("export", "load", "runtime"))
    assert (ROOT / "docs" / "exporters" / f"{name}.md").is_file()


@pytest.mark.parametrize("name", targets.names())
def test_every_target_has_an_exporter_and_a_source_for_every_figure(name: str) -> None:
    target = targets.load(name)
    assert target.name == name and target.title
    assert target.exporter in exporters.names()
    assert target.precisions[0] in ("fp32", "int8") and set(target.precisions) <= set(PRECISIONS)  # the baseline first
    assert target.facts
    assert all(len(fact.source) > 3 for fact in target.facts.values())
    if "int8" in target.precisions:  # the boards without integer kernels wait for passes that make networks smaller
        assert any(set(passes.load(p).pays_if) & set(target.profits) for p in passes.names())


def test_dropping_in_one_file_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target in its folder is listed at once; so are passes and exporters, which are found the same way."""
    for module, file in ((targets, "my-board.toml"), (passes, "sparkle.py"), (exporters, "to_ptx.py")):
        monkeypatch.setattr(module.resources, "files", lambda _: tmp_path)
        (tmp_path / file).touch()
    assert targets.names() == ["my-board"]
    assert passes.names() == ["sparkle", "to_ptx"]
    assert exporters.names() == ["ptx"]


def test_the_layers_on_the_page_about_the_architecture_are_those_that_imports_keep() -> None:
    told = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")
    block = next(part for part in told if part.startswith("\ncli\n"))
    held: Any = project()["tool"]
    (contract,) = held["importlinter"]["contracts"]
    assert block.strip().splitlines() == contract["layers"]


def test_every_decision_is_listed_on_the_page_about_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert [p.name for p in (ROOT / "docs" / "decisions").glob("*.md") if f"decisions/{p.name}" not in text] == []
