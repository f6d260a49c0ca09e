"""What is measured with sample data: the hub made again, alternatives, parts of the samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from explain_desk import exported, lay_desk, plain, told

from deploykit.core.golden import load_golden
from deploykit.core.manifest import load_manifest
from deploykit.core.ranges import load_ranges
from deploykit.explain import explain
from deploykit.explain.remake import remake
from deploykit.hub.running import session


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_desk(tmp_path_factory.mktemp("explain"))


def test_the_hub_is_made_again_bit_by_bit(here: Path) -> None:
    folder = plain(here)
    manifest, golden = load_manifest(folder), load_golden(folder)
    made = remake(manifest, "int8", folder, load_ranges(folder / "ranges.json"), {"calibration": "explained.py:calib"})
    assert made.graph.hash == manifest.graph
    assert tuple(repr(step) for step in made.steps) == manifest.files[-1].steps != ()
    assert golden is not None
    (answer,) = session(made.hub().bytes, optimize=False).run(None, golden.inputs)
    (kept,) = golden.answers["hub"].values()
    np.testing.assert_array_equal(answer.reshape(-1)[: kept.size], kept.reshape(-1))


def test_a_planted_outlier_channel_is_found_and_its_cure_ranks_first(here: Path) -> None:
    folder = exported(
        here, "uneven",
        "uneven --calib explained.py:calib --eval explained.py:test --target tensor.toml --recipe plain.toml",
    ) if (here / "plain.toml").write_text('[[step]]\nname = "bias_correct"\n') else None  # fmt: skip
    assert folder is not None
    found = explain(folder, calibration="explained.py:calib")
    assert found.measured is not None
    worst = found.worst[0]
    assert worst.layer == "first" and worst.weights is not None and worst.weights > 50
    best = found.measured.alternatives[0]
    assert best.gain_db > 6
    gains = {a.what: a.gain_db for a in found.measured.alternatives}
    assert gains["a weight scale per channel"] == pytest.approx(best.gain_db, abs=3)
    assert gains["first in float"] > 6
    assert [a.gain_db for a in found.measured.alternatives] == sorted(gains.values(), reverse=True)


def test_a_planted_spike_makes_other_thresholds_better(here: Path) -> None:
    folder = exported(here, "spike", "build --calib explained.py:one_spike --eval explained.py:test --target x86")
    found = explain(folder, calibration="explained.py:one_spike")
    assert found.measured is not None
    gains = {a.what: a.gain_db for a in found.measured.alternatives}
    assert gains["thresholds by percentile"] > 6
    assert found.measured.input > 20  # most of the error is made where the spike is
    assert any(s.outline for s in found.spans)  # histograms were measured for the pictures


def test_what_is_measured_is_what_an_export_with_that_option_gives(here: Path) -> None:
    folder = plain(here)
    found = explain(folder, calibration="explained.py:calib", samples=64)
    assert found.measured is not None
    score = next(s for s in load_manifest(folder).scores if s.precision == "int8")
    assert found.measured.quality.agreement == pytest.approx(score.agreement, abs=2)
    assert found.measured.quality.sqnr_db == pytest.approx(min(score.sqnr_db.values()), abs=0.5)
    mse = next(a for a in found.measured.alternatives if a.what == "thresholds by mse")
    other = exported(
        here, "mse", "build --calib explained.py:calib --eval explained.py:test --target x86 --thresholds mse"
    )
    again = next(s for s in load_manifest(other).scores if s.precision == "int8")
    assert mse.quality.sqnr_db == pytest.approx(min(again.sqnr_db.values()), abs=0.5)
    in_float = next(a for a in found.measured.alternatives if a.what.endswith("in float"))
    assert in_float.bytes > 0 and in_float.option.startswith("--keep-float ")
    shares = sum(o.share or 0.0 for o in found.operators) + found.measured.input
    assert shares == pytest.approx(100, abs=0.1)


def test_parts_of_the_samples_end_with_the_export_itself(here: Path) -> None:
    found = explain(plain(here), calibration="explained.py:calib").measured
    assert found is not None
    assert [p.samples for p in found.parts] == [8, 16, 32, 40]
    assert found.parts[-1].quality.sqnr_db == pytest.approx(found.quality.sqnr_db, abs=0.5)  # in another order


@pytest.mark.parametrize(
    ("decibels", "enough"),
    [((20, 30, 30.2, 30.1), 16), ((30, 30.1, 30), 8), ((20, 25, 30), None), ((30, 20, 30), None), ((30, 30), 8)],
)
def test_enough_samples_are_those_from_which_on_answers_stand_still(
    decibels: tuple[float, ...], enough: int | None
) -> None:
    assert told(*decibels).enough == enough
