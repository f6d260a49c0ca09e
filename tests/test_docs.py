"""The documentation is true: snippets run, what they print is shown, links resolve, figures are those of the results.

What a page's blocks mean is said in CONTRIBUTING.md. Every page runs in a folder of its own, which holds what pages
take for granted: ``net.py`` with weights, ``samples/``, ``test.npz``, ``train.npz``, ``inputs.npz``, the example.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file

import deploykit as dk
from benchmarks import tables
from deploykit import exporters, passes, targets
from deploykit.bench import timing
from deploykit.calibration.thresholds import METHODS
from deploykit.check import MAX_DROP, Gate
from deploykit.cli import app, main
from deploykit.core.data import Preprocess
from deploykit.core.recipe import TrainSettings, load_recipe
from deploykit.core.tables import read_toml
from deploykit.core.target import QuantSpec, Target
from deploykit.sources import load_preprocess

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
}
HOW_TO = [name for name in PAGES if name.startswith("docs/how-to/")]
WITH_ARTIFACT = (
    "docs/benchmark.md", "docs/devices.md", "docs/checks.md", "docs/explain.md", "docs/report.md",
    "docs/exporters/onnx.md",
)  # fmt: skip
"""Pages that speak of an artifact ``out/`` that is there already."""
FOREIGN_OPTIONS = {"--nncf", "--save", "--workspace-mb", "--only"}
"""Options of infer.py and build.py."""
LANGUAGES = ("python", "toml", "console")


@dataclass(frozen=True)
class Block:
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that a block's first line names."""
        named = re.match(r"# ([\w./-]+\.(?:py|toml))\n", self.text)
        return named[1] if named else None


def blocks(page: str) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)
    return [Block(language, text) for language, text in found if language in LANGUAGES]


def commands(text: str) -> list[tuple[str, list[str], int]]:
    """(command line, output lines shown, exit code) of a console block."""
    found = []
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        line, *shown = part.rstrip("\n").split("\n")
        code = next((int(m[1]) for s in shown if (m := re.fullmatch(r"\[exit code (\d)\]", s))), 0)
        found.append((line, [s for s in shown if not s.startswith("[exit code")], code))
    return found


# ------------------------------------------------------------------ what pages take for granted


@pytest.fixture(scope="session")
def granted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for needed in ("ai_edge_litert", "accelerate", "sklearn", "jinja2"):
        pytest.importorskip(needed, reason=f"the snippets need {needed}: pip install 'deploykit[dev]'")
    folder = tmp_path_factory.mktemp("granted")
    digits = folder / "examples" / "digits"
    shutil.copytree(ROOT / "examples" / "digits", digits)
    (net,) = (b.text for b in blocks("README.md") if b.file == "net.py")
    (folder / "net.py").write_text(net)
    namespace: dict[str, Any] = {}
    exec((digits / "data.py").read_text(), namespace)
    exec(net, namespace)
    (images, labels), (test, answers) = namespace["training"](), namespace["test"]()
    images, test = images.repeat(3, axis=1), test.repeat(3, axis=1)  # the network of the README takes colour
    trained = _trained(namespace["build"], images, labels)
    save_file(trained.state_dict(), folder / "net.safetensors")
    torch.save(trained.state_dict(), folder / "net.pt")
    np.savez(folder / "test.npz", x=test, y=answers)
    np.savez(folder / "train.npz", x=images, y=labels)
    np.savez(folder / "inputs.npz", x=test[:2])
    for digit in range(10):
        (folder / "samples" / str(digit)).mkdir(parents=True)
        for i, position in enumerate(np.flatnonzero(labels == digit)[:10]):
            pixels = np.rint(images[position].transpose(1, 2, 0) * 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "samples" / str(digit) / f"{i}.png")
    dk.export(trained, "x86", images[:50], evaluation=(test, answers), out=folder / "artifact", benchmark=False)
    return folder


def _trained(build: Callable[[], torch.nn.Module], images: Any, labels: Any) -> torch.nn.Module:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = build()
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, epochs=8, steps_per_epoch=23)
    for _ in range(8):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@pytest.fixture
def workplace(granted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the folder, as working directory; what pages import from it is forgotten afterwards."""
    folder = tmp_path / "page"
    shutil.copytree(granted, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    # pages are about what is printed, not about milliseconds
    in_turns = timing.in_turns
    monkeypatch.setattr(timing, "in_turns", lambda calls, runs, seconds: in_turns(calls, 3, 0.0))
    monkeypatch.setattr(timing, "peak_megabytes", lambda *_: None)
    for name, module in list(sys.modules.items()):  # other tests have a net.py of their own
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path.parent)):
            monkeypatch.delitem(sys.modules, name)
    known = set(sys.modules)
    yield folder
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


# ------------------------------------------------------------------ running a page


@dataclass
class Page:
    """Runs the blocks of a page in order."""

    folder: Path
    tree: Path | None = None
    """A copy of the package that how-to pages add to; commands then run in processes of their own."""
    namespace: dict[str, Any] = field(default_factory=lambda: {"__name__": "page"})

    def run(self, block: Block) -> None:
        if block.file is not None:
            self.write(block.file, block.text)
        elif block.language == "python":
            exec(block.text, self.namespace)
        if block.language == "toml":
            self.read_toml(block)
        if block.language == "console":
            for line, shown, code in commands(block.text):
                self.command(line, shown, code)

    def write(self, name: str, text: str) -> None:
        package = name.split("/")[0] in ("deploykit", "exporters", "calibration", "targets", "tests")
        assert not package or self.tree is not None, f"{name}: only how-to pages add to the package"
        path = (self.tree if package and self.tree is not None else Path.cwd()) / name
        assert path.parent.is_dir(), f"{name}: there is no such folder"
        path.write_text(text, encoding="utf-8")

    def read_toml(self, block: Block) -> None:
        path = Path(block.file or "block.toml")
        path.write_text(block.text, encoding="utf-8")
        table = read_toml(path)
        if table.keys() <= {"step", "train"}:
            for step in load_recipe(path).steps:
                passes.build(step)
        elif table.keys() == {"preprocess"}:
            load_preprocess(path)
        else:
            exporters.load(targets.load(str(path)).exporter)

    def command(self, line: str, shown: list[str], code: int) -> None:
        name, *arguments = shlex.split(line)
        if name in ("deploykit", "python"):
            found, printed = self.started(name, arguments)
            assert found == code, f"{line}: exit code {found}\n{printed}"
            compare(shown, printed, line)
        elif name == "cd":
            os.chdir(arguments[0])
            sys.path.insert(0, str(Path.cwd()))
        elif name == "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        elif name == "pip":
            extras = re.findall(r"\[(.*)\]", line)[0].split(",")
            known = read_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]
            assert set(extras) <= set(known), line
        else:
            assert name in ("ssh", "scp"), f"{line}: not a command that documentation may show"

    def started(self, name: str, arguments: list[str]) -> tuple[int, str]:
        """Exit code and output of ``deploykit …`` or ``python file.py …``."""
        if self.tree is not None:
            return in_tree(self.tree, ["-m", "deploykit", *arguments] if name == "deploykit" else arguments)
        printed, code = io.StringIO(), 0
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                if name == "deploykit":
                    main(arguments)
                else:
                    with pytest.MonkeyPatch.context() as patch:
                        patch.setattr(sys, "argv", arguments)
                        runpy.run_path(arguments[0], run_name="__main__")
            except SystemExit as end:
                code = int(end.code or 0)
        return code, printed.getvalue()


def in_tree(tree: Path, arguments: list[str]) -> tuple[int, str]:
    """Exit code and output of python with the copy of the package first on its path."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=300)
    return done.returncode, done.stdout + done.stderr


def compare(shown: list[str], printed: str, line: str) -> None:
    """Every line that is shown is printed, in that order; figures may differ, ``…`` stands for anything."""
    rest = iter([" ".join(text.split()) for text in printed.splitlines()])
    for text in shown:
        pattern = _pattern(" ".join(text.split()))
        assert any(re.fullmatch(pattern, candidate) for candidate in rest), (
            f"{line}\nshown: {text}\nprinted:\n{printed}"
        )


def _pattern(text: str) -> str:
    parts = re.findall(r"…|\d[\d.,]*|[^\d…]+", text)
    return "".join(".*" if p == "…" else r"[\d.,]+" if p[0].isdigit() else re.escape(p) for p in parts)


@pytest.mark.parametrize("page", [name for name in PAGES if blocks(name) and name not in HOW_TO])
def test_the_snippets_of_a_page_run_and_print_what_it_shows(page: str, workplace: Path) -> None:
    if page in WITH_ARTIFACT:
        shutil.copytree(workplace / "artifact", workplace / "out")
    running = Page(workplace)
    for block in blocks(page):
        running.run(block)


def test_what_the_how_to_pages_add_works_and_passes_its_tests(workplace: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("deploykit", "exporters", "calibration", "targets"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "tests").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tree)
    for page in HOW_TO:
        adds_code = any(block.file and block.language == "python" for block in blocks(page))
        running = Page(workplace, tree if adds_code else None)
        for block in blocks(page):
            running.run(block)
    tests = sorted(str(path) for path in (tree / "tests").glob("test_*.py"))
    assert len(tests) == 2
    os.chdir(tree)
    code, printed = in_tree(tree, ["-m", "pytest", "-p", "no:cacheprovider", *tests])
    assert code == 0, printed


# ------------------------------------------------------------------ what pages say


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_resolve(page: str) -> None:
    prose = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert linked.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(_slug, headings), f"{page}: {target}"


@pytest.mark.parametrize("page", [name for name in PAGES if name != "docs/exporters/tensorrt.md"])
def test_every_option_that_is_named_exists(page: str) -> None:
    group: Any = typer.main.get_command(app)
    known = {o for c in group.commands.values() for p in c.params for o in (*p.opts, *p.secondary_opts)}
    prose = "\n".join(re.findall(r"`([^`\n]+)`", PAGES[page]))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", prose)) - FOREIGN_OPTIONS
    assert named <= known | {"--help", "--strict"}, named - known


def test_every_pass_has_a_page_that_names_its_options() -> None:
    for name in passes.names():
        page = PAGES[f"docs/passes/{name}.md"]
        assert [o for o in passes.options(name) if f"`{o}`" not in page] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_row_of_a_table_has_the_cells_of_its_head(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        cells = [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()]
        assert len(set(cells)) == 1, table


def test_a_target_may_name_every_exporter() -> None:
    (row,) = re.findall(r"^\| `exporter` \|.*$", PAGES["docs/how-to/add-a-target.md"], re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) == {"exporter", *exporters.names()}


def test_every_exporter_has_a_page() -> None:
    assert [n for n in exporters.names() if f"docs/exporters/{n}.md" not in PAGES] == []


def test_every_target_is_on_the_page_of_its_family() -> None:
    families = "\n".join(text for name, text in PAGES.items() if name.startswith("docs/targets/"))
    assert [n for n in targets.names() if f"| `{n}` |" not in families] == []


@pytest.mark.parametrize(
    ("page", "cls"),
    [
        ("docs/recipes.md", TrainSettings),
        ("docs/models-and-data.md", Preprocess),
        ("docs/how-to/add-a-target.md", QuantSpec),
        ("docs/how-to/add-a-target.md", Target),
    ],
)
def test_every_key_of_a_table_is_explained(page: str, cls: type) -> None:
    without_name = {"name", "quant", "options", "facts"}
    keys = {f.name for f in dataclasses.fields(cls)} - without_name
    assert [key for key in sorted(keys) if f"`{key}`" not in PAGES[page]] == []


def test_every_threshold_method_is_explained() -> None:
    assert [m for m in METHODS if f"`{m}`" not in PAGES["docs/calibration.md"]] == []


def test_the_bounds_of_the_gate_are_those_of_the_page() -> None:
    gate, page = Gate(), PAGES["docs/checks.md"]
    rows: Mapping[str, str] = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", page, re.MULTILINE))
    assert rows["operators: largest difference with forced inputs"] == f"{gate.max_lsb:g} LSB"
    assert rows["operators: differing outputs of products with forced inputs"] == f"{gate.max_mismatch:g} %"
    assert rows["file agrees with the hub, top-1"] == f"{gate.min_file_agreement:g} %"
    assert rows["file agrees with the original model, top-1"] == f"{gate.min_agreement:g} %"
    assert rows["lost accuracy"] == f"{MAX_DROP:g} points (`--max-drop`)"


def test_figures_and_pictures_are_those_of_the_results() -> None:
    made = tables.written(tables.results())
    stale = [str(path) for path, text in made.items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run `make docs`"
