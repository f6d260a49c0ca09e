"""The scan says of every layer what the answers lose without some of its channels, and the report shows it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from commands import contents, enter
from torch import Tensor, nn

from deploykit import passes, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import Finding, load_manifest
from deploykit.core.recipe import Step
from deploykit.cost import cost
from deploykit.passes.sensitivity import Sensitivity
from deploykit.report.findings import shown
from deploykit.report.heat import DEEPEST

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 16), nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def build():
    torch.manual_seed(0)
    return Net().eval()
"""


def net() -> Any:
    namespace: dict[str, Any] = {}
    exec(NET, namespace)
    return namespace["build"]()


def samples(n: int = 60, labels: bool = True) -> DataSet:
    random = np.random.default_rng(0)
    x = random.normal(size=(n, 4)).astype(np.float32)
    return DataSet.of({"x": x}, random.integers(0, 3, n) if labels else None)


def scanned(model: nn.Module, data: DataSet, **options: Any) -> Finding:
    found: list[Finding] = []
    sample = next(data.batches(2)).inputs
    here = Context(targets.load("x86"), {"calibration": data}, sample, cost=lambda m: cost(m, sample))
    assert passes.build(Step("sensitivity", options))(model, replace(here, note=found.append)) is model
    (finding,) = found
    return finding


def test_a_row_is_what_the_network_loses_with_those_channels_silenced_by_hooks() -> None:
    model, data = net(), samples()
    finding = scanned(model, data, shares=[0.25, 0.5], criterion="l1")
    x = torch.from_numpy(next(data.batches(60)).inputs["x"])
    with torch.no_grad():
        whole = model(x)
    rows = {(row[0], row[2]): row for row in finding.rows}
    assert len(rows) == 4
    for name in ("first", "second"):
        layer = model.get_submodule(name)
        order = layer.weight.detach().abs().sum(1).argsort()
        for share in (0.25, 0.5):
            gone = order[: round(share * len(order))]

            def silence(module: nn.Module, given: Any, output: Tensor, gone: Tensor = gone) -> Tensor:
                return output.index_fill(1, gone, 0.0)  # ReLU of 0 is 0

            hook = layer.register_forward_hook(silence)
            with torch.no_grad():
                left = model(x)
            hook.remove()
            changed = 100 * float((left.argmax(1) != whole.argmax(1)).double().mean())
            error = 100 * float((left - whole).double().square().sum() / whole.double().square().sum())
            assert rows[name, 100 * share][1:] == (
                len(order), 100 * share, pytest.approx(changed), pytest.approx(error, rel=1e-4),
            )  # fmt: skip


def test_the_summary_names_the_layer_that_matters() -> None:
    """The second layer's channels are equal and of no account but for the bias; the first's are the network."""
    model = net()
    with torch.no_grad():
        model.second.weight.mul_(0.01)
        model.head.weight.mul_(0.01)
        model.head.weight[:, 0] = torch.tensor([5.0, -5.0, 0.0])
        model.second.weight[0] = model.first.weight.new_ones(16)
    finding = scanned(model, samples(), shares=[0.5], criterion="l1")
    first = finding.summary.removeprefix("most sensitive with 50% of the channels gone: ")
    assert first.startswith("first (") and "second (" in first
    errors = {row[0]: row[-1] for row in finding.rows}
    assert errors["first"] > 100 * float(errors["second"] or 0.0)  # type: ignore[operator]


def test_outputs_that_are_no_class_scores_are_told_apart_by_their_error() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = torch.relu(self.first(x))
            return self.a(x), self.b(x)

    finding = scanned(Two().eval(), samples(), criterion="l2")
    assert finding.columns == ("layer", "channels", "% removed", "error %")
    assert finding.heat == ("layer", "% removed", "error %")
    errors = [float(row[3] or 0.0) for row in finding.rows]
    assert len(errors) == 3 and min(errors) > 0


def test_the_map_is_as_deep_as_the_values_are_large() -> None:
    rows = (("a", 25.0, 1.0), ("a", 50.0, 4.0), ("b" * 50, 25.0, None), ("b" * 50, 50.0, 2.0))
    (found,) = shown([Finding("s", "t", ("layer", "share", "lost"), rows, heat=("layer", "share", "lost"))])
    assert found.heat is not None
    assert [(c.text, c.opacity / DEEPEST) for c in found.heat.cells] == [("1", 0.25), ("4", 1.0), ("2", 0.5)]
    assert [name for _, name, _ in found.heat.rows] == ["a", "…" + "b" * 31]
    tops = {c.text: c.top for c in found.heat.cells}
    assert tops["1"] == tops["4"] < tops["2"]
    assert max(c.left for c in found.heat.cells) < found.heat.width and tops["2"] < found.heat.height


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("scanned_net.py").write_text(NET)
    Path("scan.toml").write_text('[[step]]\nname = "sensitivity"\n')
    x = next(samples().batches(60)).inputs["x"]
    np.savez("calib.npz", x=x)
    return tmp_path


def pictures(page: Path) -> list[ElementTree.Element]:
    text = page.read_text(encoding="utf-8")
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL) if "heat" in svg]


def test_compress_prints_the_layers_that_lose_most_and_writes_a_page_with_the_map(workplace: Path) -> None:
    pytest.importorskip("jinja2")
    said = enter("compress scanned_net.py:build --recipe scan.toml --calib calib.npz -o scanned")
    assert said.code == 0, said.err
    line = said.out.splitlines()[2]
    assert line.startswith("scanned: most sensitive with 50% of the channels gone: ")
    assert {"first", "second"} <= set(re.findall(r"\w+", line))
    (picture,) = pictures(workplace / "scanned" / "report.html")
    assert len(picture.findall(".//rect")) == 6  # two layers at three shares
    assert set(contents(workplace / "scanned")) == {"model.safetensors", "structure.json", "report.html"}


def test_export_has_the_map_in_its_report_and_the_table_in_its_manifest(workplace: Path) -> None:
    pytest.importorskip("jinja2")
    asked = "export scanned_net.py:build --target x86 --recipe scan.toml --calib calib.npz --no-benchmark -o out"
    said = enter(asked)
    assert said.code == 0, said.err
    assert "out: most sensitive with 50% of the channels gone: " in said.out
    (finding,) = load_manifest(workplace / "out").findings
    assert finding.step.startswith("Sensitivity(") and len(finding.rows) == 6
    assert enter("report out").code == 0
    (picture,) = pictures(workplace / "out" / "report.html")
    assert len(picture.findall(".//rect")) == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shares": []}, "shares must be"),
        ({"shares": [1.0]}, "shares must be"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"criterion": "tailor"}, "Did you mean 'taylor'"),
        ({"skip": ["frist"]}, "no layer 'frist'. Did you mean 'first'"),
        ({"skip": ["first", "second"]}, "no channels that can be taken out"),
        ({"criterion": "snip"}, "needs labels"),
    ],
)
def test_what_cannot_be_scanned_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(DeploykitError, match=re.escape(said)):
        scanned(net(), samples(labels=False), **options)


def test_a_scan_needs_data() -> None:
    with pytest.raises(DeploykitError, match="give --calib"):
        Sensitivity()(net(), Context(targets.load("x86")))
