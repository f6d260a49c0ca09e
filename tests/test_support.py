"""docs/support.md says what is so: every cell measured again, none without a reason, none that disagrees."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import FAMILIES, example

from benchmarks import support_page
from benchmarks.support import TARGETS, cell, lowered, saved

PAGE = Path(__file__).parents[1] / "docs" / "support.md"


def test_the_page_has_every_family_and_every_exporter() -> None:
    cells = saved()
    assert {(c.family, c.exporter) for c in cells} == {(f, name) for f in FAMILIES for name in TARGETS}


def test_the_page_is_what_was_measured() -> None:
    assert PAGE.read_text(encoding="utf-8") == support_page.page(support_page.load())


def test_no_cell_disagrees_and_none_is_without_a_reason() -> None:
    assert [c for c in saved() if c.state == "disagrees" or not c.explained] == []


@pytest.mark.parametrize("exporter", TARGETS)
def test_every_exporter_takes_eight_families_and_more(exporter: str) -> None:
    assert sum(c.state == "ok" for c in saved() if c.exporter == exporter) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cells_come_out_again(family: str, tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert", reason="the extra 'tflite' is not installed")
    pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")
    expected = {c.exporter: c.facts() for c in saved() if c.family == family}
    made = example(family)
    model = lowered(made, tmp_path)
    for exporter in TARGETS:
        found = cell(model, made, exporter)
        assert found.state != "disagrees" and found.explained, found
        assert found.facts() == expected[exporter], f"{family}/{exporter}: run `python -m benchmarks.support {family}`"
