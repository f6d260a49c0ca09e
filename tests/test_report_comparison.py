"""Several exports on one page: what is found, what may share axes, which are best, and the command."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import contents, enter
from hypothesis import given
from hypothesis import strategies as st
from small_artifact import small_artifact

from deploykit.core.artifact import File, Measurement, TensorSpec
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import Manifest, Score, Source, Stored, load_intact, load_manifest
from deploykit.core.request import Request
from deploykit.report import comparison, report_json, scatter, write_report
from deploykit.report.axes import around, from_zero, positive
from deploykit.report.labels import Box, Name, place
from deploykit.report.made import Made, find

HERE = "this machine: CPU, rt 1.0"


BARE = Manifest(
    "x86", "onnx", "net", Request("net", "x86"), (), "", (), (), (File("model.int8.onnx", "int8"),),
    (Stored("model.int8.onnx", 1000, ""),), {"eval": Source("test", 500, "0123456789abcdef")},
)  # fmt: skip


def timed(precision: str, p50: float, where: str = HERE) -> Measurement:
    return Measurement(precision, 1, 1, 50, p50, p50 * 1.2, p50 * 2, 1000 / p50, 1.5, 1000, where)


def scored(precision: str, metric: float | None, data: str = "test") -> Score:
    return Score(precision, 500, data, metric, 99.0, None, {"y": 30.0})


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``x86`` with times, ``jetson`` without, in one folder."""
    folder = tmp_path_factory.mktemp("exports")
    data = {"eval": Source("test", 500, "0123456789abcdef")}
    small_artifact(
        folder / "x86",
        data=data,
        scores=(scored("original", 90.0), scored("fp32", 90.0), scored("int8", 89.0)),
        measurements=(timed("fp32", 2.0), timed("int8", 1.0)),
    )
    none = {"p50_ms": None, "p90_ms": None, "p99_ms": None, "per_second": None, "peak_mb": None, "runs": 0}
    why = "not run here: needs a board"
    names = ("fp32", "fp16", "int8", "int8-fp16")
    small_artifact(
        folder / "jetson",
        "jetson",
        data=data,
        scores=tuple(scored(p, 89.5) for p in names),
        measurements=tuple(replace(timed(p, 1.0, why), **none) for p in names),
    )
    return folder


@pytest.fixture
def copy(exports: Path, tmp_path: Path) -> Path:
    """To be spoilt."""
    shutil.copytree(exports, tmp_path / "exports")
    return tmp_path / "exports"


def made(label: str, manifest: Manifest) -> Made:
    return Made(Path(label), label, replace(manifest, target=label), None)


# ------------------------------------------------------------------ what is found


def test_a_folder_of_artifacts_stands_for_them(exports: Path) -> None:
    assert [m.label for m in find([exports])] == ["jetson", "x86"]
    assert [m.label for m in find([exports / "x86", exports])] == ["x86", "jetson"], "none is taken twice"
    assert [m.ranges for m in find([exports])] == [None, None]


def test_exports_for_one_target_are_told_apart_by_their_folders(copy: Path) -> None:
    shutil.copytree(copy / "x86", copy / "pruned")
    assert [m.label for m in find([copy / "x86", copy / "pruned"])] == ["x86", "pruned"]
    shutil.copytree(copy / "x86", copy / "old" / "x86")
    labels = [m.label for m in find([copy / "x86", copy / "old" / "x86"])]
    assert labels == [(copy / "x86").as_posix(), (copy / "old" / "x86").as_posix()]


def test_a_folder_without_artifacts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeploykitError, match=r"has no manifest.json: it is not an artifact"):
        find([tmp_path])


# ------------------------------------------------------------------ what may share axes


def test_only_what_was_timed_alike_shares_axes(exports: Path) -> None:
    manifest = load_manifest(exports / "x86")
    there = replace(manifest, measurements=(timed("fp32", 9.0, "pi@10.0.0.7: Cortex-A76, rt 1.0"),))
    other = replace(manifest, measurements=(timed("fp32", 3.0, "this machine, not the device: CPU, other 2.0"),))
    entries = scatter.entries([made("a", manifest), made("b", there), made("c", other)])
    here, pi = scatter.over_time(entries)
    assert [p.entry.name for p in here.points] == ["a fp32", "a int8", "c fp32"]
    assert here.caption.startswith("this machine: CPU, batch 1, 1 thread") and here.elsewhere
    assert any(label.name.text == "c fp32 *" for label in here.labels)
    assert [p.entry.name for p in pi.points] == ["b fp32"] and pi.caption.startswith("pi@10.0.0.7: Cortex-A76, batch")
    assert "2 machines" in comparison.split(entries)


def test_threads_are_a_way_of_measuring(exports: Path) -> None:
    manifest = load_manifest(exports / "x86")
    four = replace(manifest, measurements=(replace(timed("fp32", 1.0), threads=4),))
    assert len(scatter.over_time(scatter.entries([made("a", manifest), made("b", four)]))) == 2


def test_only_what_was_scored_on_the_same_samples_shares_axes(exports: Path) -> None:
    manifest = load_manifest(exports / "x86")
    there = replace(manifest, scores=(scored("int8", 88.0, "test, answered on pi@10.0.0.7"),))
    other = replace(manifest, data={"eval": Source("test", 500, "fedcba9876543210")})
    entries = scatter.entries([made("a", manifest), made("b", there), made("c", other)])
    plots = scatter.over_bytes(entries)
    assert [[p.entry.made.label for p in plot.points] for plot in plots] == [["a", "a", "b"], ["c", "c"]]
    assert "2 data sets" in comparison.split(entries) and "models" not in comparison.split(entries)


@pytest.mark.parametrize("other", [{"model": "other.py:net"}, {"outputs": (TensorSpec("y", ("batch", 3), "float32"),)}])
def test_exports_of_two_models_are_called_that_above_everything_else(exports: Path, other: dict[str, Any]) -> None:
    manifest = replace(load_manifest(exports / "x86"), scores=())
    two = [made("a", manifest), made("b", replace(manifest, **other))]
    head = comparison.render(two).partition("<main>")[0]
    assert "These exports come from 2 models, so they differ in more than the target." in head
    assert comparison.strangers([made("a", manifest), made("b", manifest)]) == ""


def test_no_label_stands_on_a_line(exports: Path) -> None:
    manifest = load_manifest(exports / "x86")
    (plot,) = scatter.over_bytes(scatter.entries([made("a", manifest)]))
    strokes = scatter._strokes(sorted((p for p in plot.points if p.best), key=lambda p: p.x))
    assert strokes and plot.original is not None
    level = Box(scatter.LEFT, plot.original - 1, scatter.WIDTH, plot.original + 1)
    assert not [label.name.text for label in plot.labels if any(label.box.overlap(s) for s in (level, *strokes))]


def test_without_labels_the_axis_is_the_share_of_the_same_answers(exports: Path) -> None:
    manifest = load_manifest(exports / "x86")
    unlabelled = replace(manifest, scores=(scored("int8", None),))
    (plot,) = scatter.over_bytes(scatter.entries([made("a", manifest), made("b", unlabelled)]))
    assert plot.y_name.startswith("same answer") and {p.y for p in plot.points} == {99.0} and plot.original is None


def test_files_without_a_time_are_named_not_dropped(exports: Path) -> None:
    gone = scatter.left_out(scatter.entries(find([exports])))
    assert gone == (
        scatter.Missing(("jetson fp32, fp16, int8, int8-fp16",), "no time: needs a board"),
    )  # fmt: skip
    unscored = replace(load_manifest(exports / "x86"), scores=())
    (missing,) = scatter.left_out(scatter.entries([made("x86", unscored)]))
    assert missing.names == ("x86 fp32, int8",) and missing.why.startswith("not scored: there was no data")


# ------------------------------------------------------------------ which are best


def beaten(p: tuple[float, float], others: Sequence[tuple[float, float]]) -> bool:
    return any((x < p[0] and y >= p[1]) or (x <= p[0] and y > p[1]) for x, y in others)


coordinates = st.integers(0, 6).map(float)


@given(st.lists(st.tuples(coordinates, coordinates), max_size=12))
def test_the_front_is_what_no_other_beats(points: list[tuple[float, float]]) -> None:
    assert scatter.front(points) == {i for i, p in enumerate(points) if not beaten(p, points)}


def test_the_best_are_marked_in_the_plot(exports: Path) -> None:
    entries = scatter.entries(find([exports]))
    (plot,) = scatter.over_bytes(entries)
    sizes = {e.name: e.row.bytes for e in entries}
    values = {p.entry.name: (p.x, p.y) for p in plot.points}
    assert values["x86 int8"] == (sizes["x86 int8"], 89.0)
    assert set(plot.best) == {name for name, p in values.items() if not beaten(p, list(values.values()))}
    assert plot.best[-1] == "x86 fp32", "the most accurate is the last"


@given(st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=8), st.floats(0.1, 5.0))
def test_axes_hold_their_values_and_have_round_ticks(values: list[float], least: float) -> None:
    axes = [positive(values), from_zero(max(values)), around(values, least)]
    for axis in axes:
        assert all(-1e-9 <= axis(v) <= 1 + 1e-9 for v in values)
        assert all(-1e-9 <= axis(t) <= 1 + 1e-9 for t in axis.ticks) and len(axis.ticks) <= 8
        for tick in axis.ticks:
            digits = abs(tick) / 10 ** math.floor(math.log10(abs(tick))) if abs(tick) > 1e-9 else 0.0
            assert axis is axes[2] or abs(digits * 4 - round(digits * 4)) < 1e-6, tick


def test_an_axis_of_percent_ends_at_100() -> None:
    axis = around([99.4, 99.9], 2.0, 100.0)
    assert axis.high == 100.0 and max(axis.ticks) == 100.0


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(86, 90)), min_size=1, max_size=8))
def test_every_file_has_a_point_in_the_frame_and_every_point_a_label(places: list[tuple[int, int]]) -> None:
    found = [
        made(f"t{i}", replace(BARE, scores=(scored("int8", float(y)),), measurements=(timed("int8", 1.0 + x),)))
        for i, (x, y) in enumerate(places)
    ]
    (plot,) = scatter.over_time(scatter.entries(found))
    assert len(plot.points) == len(places)
    for p in plot.points:
        assert scatter.LEFT <= p.left <= scatter.WIDTH - scatter.RIGHT and 0 <= p.top <= scatter.HEIGHT
    names = [label.name.text for label in plot.labels if label.name.text != "original model"]
    assert 1 <= len(names) <= len({(p.left, p.top) for p in plot.points})


@given(st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_labels_do_not_cover_each_other_where_there_is_room(rows: list[int]) -> None:
    frame = Box(0.0, 0.0, 440.0, 330.0)
    points = [(60.0 + 100 * i, 60.0 + 60 * row) for i, row in enumerate(rows)]
    placed = place([Name("jetson int8", x, y) for x, y in points], points, [], frame)
    boxes = [label.box for label in placed] + [Box(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    assert len(placed) == 4
    assert all(a.overlap(b) == 0 for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.overlap(frame) == pytest.approx((box.right - box.left) * (box.bottom - box.top)) for box in boxes)


# ------------------------------------------------------------------ the page and the command


def test_several_exports_give_one_page(copy: Path) -> None:
    path = write_report(copy)
    assert path == copy / "report.html"
    source = path.read_text(encoding="utf-8")
    for expected in ("Accuracy over size", "Accuracy over time", "jetson fp32, fp16, int8, int8-fp16", "What differs"):
        assert expected in source, expected
    assert write_report(copy).read_text(encoding="utf-8") == source, "the same twice"
    assert "None" not in source


def test_several_folders_give_a_page_where_one_works(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    said = enter("report exports/x86 exports/jetson")
    assert (said.code, said.out, said.err) == (0, "report.html\n", "")
    assert enter("report exports/x86 exports/jetson -o other.html").out == "other.html\n"
    assert enter("report exports -o exports/x86").out == "exports/x86/report.html\n"
    assert Path("other.html").read_bytes() == Path("report.html").read_bytes()
    load_intact(copy / "x86")  # a page beside the files changes nothing


def test_a_file_that_is_no_report_is_not_replaced(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    Path("notes.html").write_text("mine")
    for command in ("report x86 -o notes.html", "report x86 jetson -o notes.html"):
        said = enter(command)
        assert said.code == 2 and "notes.html exists and is not a report" in said.err
    assert Path("notes.html").read_text() == "mine"


def test_json_holds_all_of_it_and_writes_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    before = contents(copy)
    said = enter("report x86 jetson --json")
    assert said.code == 0 and contents(copy) == before
    plain = json.loads(said.out)
    x86, jetson = plain["artifacts"]
    assert [r["accuracy"] for r in x86["results"]] == [90.0, 90.0, 89.0]
    assert jetson["results"][0]["measurement"]["p50_ms"] is None
    assert any("not timed" in a["what"] and "--device" in a["mend"] for a in jetson["warnings"])
    (over_time,) = plain["comparison"]["accuracy_over_time"]
    assert [(p["artifact"], p["precision"], p["x"], p["best"]) for p in over_time["points"]] == [
        ("x86", "fp32", 2.0, True),
        ("x86", "int8", 1.0, True),
    ]
    assert over_time["best"] == ["x86 int8", "x86 fp32"]
    assert "needs a board" in plain["comparison"]["left_out"][0]["why"]
    assert json.loads(enter("report x86 --json").out)["comparison"] is None
    assert enter("report x86 --json -o page.html").code == 0 and Path("page.html").is_file()


def test_json_needs_no_jinja(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert report_json(copy)["comparison"] is not None


def spoil(folder: Path, how: str) -> None:
    path = folder / "manifest.json"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:400])
    elif how == "altered":
        (folder / "model.int8.onnx").write_bytes(b"x" * (folder / "model.int8.onnx").stat().st_size)
    elif how == "missing":
        (folder / "model.int8.onnx").unlink()
    elif how == "foreign":
        path.write_text('{"name": "web application"}')


@pytest.mark.parametrize("how", ["truncated", "altered", "missing", "foreign"])
@pytest.mark.parametrize(
    "command", ["report .", "report x86 jetson", "report jetson x86 -o page.html", "report . --json"]
)
def test_one_broken_folder_ends_it_before_anything_is_written(
    copy: Path, monkeypatch: pytest.MonkeyPatch, command: str, how: str
) -> None:
    monkeypatch.chdir(copy)
    spoil(copy / "jetson", how)
    before = contents(copy)
    said = enter(command)
    assert said.code == 2 and said.out == "" and said.err.startswith("deploykit: ")
    assert "jetson" in said.err and "Traceback" not in said.err
    assert contents(copy) == before


def test_what_two_exports_share_is_said_once(exports: Path) -> None:
    manifest = load_manifest(exports / "x86")
    twice = comparison.shared_advice([made("a", replace(manifest, notes=("a note",))), made("b", manifest)])
    assert [owners for a, owners in twice if a.what == "A note."] == [["a"]]
    both = [replace(manifest, notes=("a note",))] * 2
    shared = comparison.shared_advice([made(label, m) for label, m in zip("ab", both, strict=True)])
    assert [owners for a, owners in shared if a.what == "A note."] == [["a", "b"]]
