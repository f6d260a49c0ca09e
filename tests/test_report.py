"""The result table, report.html, README.md and infer.py."""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from small_artifact import small_artifact

from deploykit import exporters
from deploykit.core.artifact import Check, Island, Measurement, Port, TensorSpec
from deploykit.core.data import Preprocess
from deploykit.core.device import Facts
from deploykit.core.errors import DeploykitError, MissingExtra
from deploykit.core.figures import file_size, milliseconds, number, quotient
from deploykit.core.manifest import Layer, Manifest, OperatorError, Score, Source, Stored, load_manifest
from deploykit.core.ranges import Ranges, Stats
from deploykit.core.request import Request
from deploykit.report import comparison, result_table, summary_json, write_report, write_usage
from deploykit.report.cards import cards
from deploykit.report.infer import script
from deploykit.report.layers import grouped
from deploykit.report.made import Made
from deploykit.report.page import facts, render, summary, verdict
from deploykit.report.ports import ports
from deploykit.report.rows import rows
from deploykit.report.words import decibels, preprocessing, shape, title
from deploykit.sources import preprocess_image

LOOK = Preprocess(resize=10, crop=8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def timed(precision: str, p50: float, size: int = 1000) -> Measurement:
    return Measurement(precision, 1, 1, 50, p50, p50 * 1.2, p50 * 2, 1000 / p50, 1.5, size, "this machine: CPU, rt 1.0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "x86"
    small_artifact(path, measurements=(timed("fp32", 2.0), timed("int8", 1.0)))
    return path


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return load_manifest(folder)


def page(manifest: Manifest) -> str:
    return render(Made(Path("x86"), "x86", manifest, None))


def printed(manifest: Manifest) -> str:
    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(result_table([(Path("out"), manifest)]))
    return console.export_text()


# ------------------------------------------------------------------ figures


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (number(86.333), "86.33"),
        (number(0.0), "0.00"),
        (milliseconds(123.4), "123"),
        (milliseconds(12.34), "12.3"),
        (milliseconds(1.234), "1.23"),
        (milliseconds(0.1234), "0.123"),
        (milliseconds(0.01234), "0.0123"),
        (file_size(842), "842 B"),
        (file_size(12_300), "12.3 kB"),
        (file_size(4_560_000), "4.56 MB"),
        (quotient(0.274), "0.27×"),
    ],
)
def test_figures_have_about_three_digits(written: str, expected: str) -> None:
    assert written == expected


def test_what_was_not_measured_is_a_dash() -> None:
    assert {number(None), milliseconds(None), file_size(None), quotient(None)} == {"–"}


# ------------------------------------------------------------------ the table


def test_the_table_has_a_line_per_file_and_the_original(manifest: Manifest) -> None:
    lines = [line.split() for line in printed(manifest).splitlines() if line.strip().startswith("x86")]
    assert [line[1] for line in lines] == ["original", "fp32", "int8"]
    assert lines[0][2:] == ["80.00"]
    assert lines[2][-5:] == ["79.50", "98.00", "1.00", "1.20", "[1]"]
    assert "[1] this machine: CPU, rt 1.0" in printed(manifest)


def test_nothing_measured_is_never_zero(manifest: Manifest) -> None:
    nothing = replace(manifest, measurements=(), scores=())
    shown = printed(nothing)
    assert "not measured" in shown and "–" in shown and " 0.00" not in shown
    (plain,) = json.loads(json.dumps(summary_json([(Path("out"), nothing)])))
    assert [r["accuracy"] for r in plain["results"]] == [None, None]
    assert [r["measurement"] for r in plain["results"]] == [None, None]
    assert all(r["bytes"] > 0 for r in plain["results"])


def test_json_has_what_the_table_has(manifest: Manifest) -> None:
    (plain,) = json.loads(json.dumps(summary_json([(Path("out"), manifest)])))
    assert (plain["folder"], plain["target"], plain["passed"]) == ("out", "x86", True)
    original, fp32, int8 = plain["results"]
    assert original["path"] is None and original["accuracy"] == 80.0
    assert fp32["size_ratio"] == 1.0 and int8["size_ratio"] == int8["bytes"] / fp32["bytes"]
    assert int8["measurement"]["p50_ms"] == 1.0 and int8["agreement"] == 98.0
    assert plain["checks"][0]["passed"] is True


# ------------------------------------------------------------------ the page


VOID = ("meta", "rect", "path", "circle")


class Page(HTMLParser):
    """Notes what a browser would load, and whether tags are closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [str(v) for k, v in attrs if k in ("src", "href", "srcset", "onload")] + [tag] * (tag == "script")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def words(manifest: Manifest) -> str:
    found = Page(page(manifest))
    assert found.open == [] and found.loads == []
    return " ".join(" ".join(found.text).split())


def test_the_page_is_self_contained_and_the_same_twice(folder: Path) -> None:
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert b"@import" not in first and b"url(" not in first


def test_the_page_tells_the_whole_story(manifest: Manifest) -> None:
    full = replace(
        manifest,
        preprocess=LOOK,
        notes=("int8 is slower than fp16 here",),
        operators=(OperatorError("stem.conv", "Conv", 0.75, 1.5, 21.25), OperatorError("head", "Gemm", 0.0, 0.0, 40.0)),
        files=(*manifest.files[:-1], replace(manifest.files[-1], islands=(Island("Softmax", "head.s", "no kernel"),))),
        checks=(*manifest.checks, Check("device run", "int8", None, None, None, "no board here")),
    )
    shown = words(full)
    for expected in (
        "nets.py:small on x86",
        "1 check passed, 1 could not run here.",
        "One call takes 1.00 ms instead of 2.00 ms (0.50×) on this machine.",
        "It scores 79.50 %, the original model 80.00 %, on 16 samples (eval).",
        "python infer.py image.jpg",
        "BiasCorrect(samples=64)",
        "no board here",
        "no kernel",
        "1 stem.conv Conv 8.7 % 21.2 dB",
        "stem.conv Conv 8.7 % 21.2 dB 0.75 LSB 1.500 %",
        "cut the centre, 8 × 8 (height × width)",
        "deploykit 0.1.0",
        "int8 is slower than fp16 here",
        "batch × 3 × 8 × 8, float32",
    ):
        assert expected in shown, expected
    assert shown.index("stem.conv Conv") < shown.index("head Gemm"), "the operator that loses most comes first"
    assert "None" not in shown


def test_names_in_the_page_are_escaped(manifest: Manifest) -> None:
    bad = "<script>alert(1)</script>\"'&"
    layer = OperatorError(bad, bad, 0.0, 0.0, 20.0)
    files = tuple(replace(f, path=bad, islands=(Island(bad, bad, bad),), notes=(bad,)) for f in manifest.files)
    spec = TensorSpec(bad, (bad, 3), bad)
    ill = replace(
        manifest, target=bad, model=bad, steps=(bad,), graph=bad, notes=(bad,), advice=(bad,), classes=(bad,),
        request=Request(bad, bad, objects=(bad,)), operators=(layer,), layers=(Layer(bad, bad),), files=files,
        inputs=(spec,), outputs=(spec,), data={bad: Source(bad, 1, bad), "calibration": Source(bad, 1, bad)},
        checks=(Check(bad, bad, None, None, None, bad), Check(bad, bad, 1.0, 2.0, False, bad)),
        scores=(Score(bad, 1, bad, 1.0, 1.0, None, {bad: 1.0}),), versions={bad: bad}, seconds={bad: 1.0},
        stored=(Stored(bad, 1, bad),), device=Facts(bad, bad, bad, board=bad, temperatures={bad: 40.0}),
        measurements=tuple(replace(timed(p, 1.0), where=bad) for p in ("fp32", "int8")),
    )  # fmt: skip
    ranges = Ranges(bad, bad, 1, {bad: Stats(-1.0, 1.0, -1.0, 1.0)})
    made = Made(Path("x86"), bad, ill, ranges)
    for source in (render(made), comparison.render([made, made])):
        found = Page(source)
        assert found.loads == [] and found.open == [] and "<script" not in source
        assert bad in " ".join(found.text)


def test_a_page_without_any_figure_still_says_what_it_is(manifest: Manifest) -> None:
    bare = replace(
        manifest, scores=(), measurements=(), checks=(), data={}, versions={}, steps=(), stored=(), seconds={}
    )
    shown = words(bare)
    assert "Nothing was checked." in shown and "Its accuracy was not measured." in shown
    assert "Times and memory were not measured" in shown


def test_checks_that_could_not_run_are_not_passed(manifest: Manifest) -> None:
    checks = [Check("c", "int8", None, None, passed, "") for passed in (True, None, False)]
    assert verdict(replace(manifest, checks=tuple(checks[:2]))).text == "1 check passed, 1 could not run here"
    assert verdict(replace(manifest, checks=tuple(checks))).state == "failed"
    assert verdict(replace(manifest, checks=(checks[1],))).state == "open"
    assert verdict(replace(manifest, checks=())).state == "open"


def test_what_failed_stands_at_the_top(manifest: Manifest) -> None:
    failed = Check("lost accuracy (points)", "int8", 3.5, 2.0, False, "80.00 -> 76.50")
    shown = words(replace(manifest, checks=(failed,)))
    assert shown.index("int8: lost accuracy (points) 3.5, bound 2 (80.00 -> 76.50)") < shown.index("Results")
    assert "Do: Try --thresholds mse" in shown


def test_times_from_elsewhere_are_not_in_the_summary(manifest: Manifest) -> None:
    nowhere = replace(timed("int8", 1.0), p50_ms=None, runs=0, where="not run here: needs a board")
    found = summary(rows(replace(manifest, measurements=(timed("fp32", 2.0), nowhere))))
    assert "Its speed was not measured: needs a board." in found
    assert not any("One call" in sentence for sentence in found)


def test_bars_start_at_zero_and_missing_figures_have_none(manifest: Manifest) -> None:
    stored = (Stored("model.fp32.onnx", 4000, ""), Stored("model.int8.onnx", 1000, ""))
    size, lost, time = cards(replace(manifest, stored=stored, measurements=(timed("fp32", 2.0),)))
    assert [(b.value, b.text) for b in size.bars] == [(1.0, "4.00 kB"), (0.25, "1.00 kB")]
    assert (size.figure, size.unit) == ("1.00", "kB")
    assert [(b.label, b.value) for b in time.bars] == [("fp32", 2.0 / 2.4), ("int8", None)]
    assert time.bars[1].text == "not measured"
    assert (time.figure, time.beside) == ("", "it was not timed (--no-benchmark)")
    assert (lost.figure, [b.text for b in lost.bars]) == ("79.50", ["not measured", "0.50"])
    assert lost.bars[1].value == 0.25, "two points fill the panel"


def test_without_labels_the_card_shows_the_same_answers(manifest: Manifest) -> None:
    scores = tuple(Score(p, 16, "held out", None, a, None, {}) for p, a in (("original", 100.0), ("int8", 96.0)))
    lost = cards(replace(manifest, scores=scores))[1]
    assert (lost.title, lost.figure, lost.bars[1].text, lost.bars[1].value) == ("Same answers", "96.00", "4.00", 1.0)


def test_outputs_that_are_no_classes_are_judged_by_signal_to_noise(manifest: Manifest) -> None:
    scores = tuple(Score(p, 16, "eval", None, None, None, {"a": 40.0, "b": 31.25}) for p in ("original", "int8"))
    card = cards(replace(manifest, scores=scores))[1]
    assert (card.title, card.figure, card.unit) == ("Signal to noise", "31.2", "dB")
    assert card.beside.startswith("output b")


def test_a_card_says_why_there_is_no_figure(manifest: Manifest) -> None:
    why = "the files were not evaluated: give --eval"
    nowhere = replace(timed("int8", 1.0), p50_ms=None, p90_ms=None, runs=0, where="not run here: needs a board")
    bare = replace(
        manifest, scores=(), measurements=(nowhere,), checks=(Check("accuracy", "all", None, None, None, why),)
    )
    _, accuracy, time = cards(bare)
    assert (accuracy.figure, accuracy.beside, accuracy.bars) == ("", why, ())
    assert (time.figure, time.beside, time.bars) == ("", "needs a board", ())
    assert words(bare).count("not measured") >= 2


def test_what_a_device_said_about_itself_is_told(manifest: Manifest) -> None:
    device = Facts(
        "ssh://pi@10.0.0.7", "pi@10.0.0.7", "aarch64", cpu="Cortex-A76", cores=4, clock_max_mhz=2400.0,
        temperatures={"cpu": 61.5},
    )  # fmt: skip
    assert dict(facts(device)) == {
        "device": "pi@10.0.0.7 (ssh://pi@10.0.0.7)",
        "processor": "4 × Cortex-A76",
        "clock": "at most 2400 MHz",
        "temperatures": "cpu 62 °C",
    }
    assert "cpu 62 °C" in words(replace(manifest, device=device))


def test_float_operators_are_grouped_by_reason() -> None:
    islands = [Island("Softmax", f"block{i}", "no kernel") for i in range(10)] + [Island("Resize", "up", "cubic")]
    groups = grouped(islands)
    assert [(g.operator, g.why, g.count) for g in groups] == [("Softmax", "no kernel", 10), ("Resize", "cubic", 1)]
    assert groups[0].layers.endswith("block7 and 2 more")


def test_an_altered_artifact_gets_no_report(tmp_path: Path) -> None:
    small_artifact(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("something else")
    with pytest.raises(DeploykitError, match=r"README.md has 14 bytes, \d+ were written"):
        write_report(tmp_path / "a")


def test_without_jinja_the_missing_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtra, match=r"deploykit\[report\]"):
        write_report(folder)


# ------------------------------------------------------------------ how to run it


def infer(folder: Path, *arguments: str, code: int = 0) -> str:
    """Runs infer.py where deploykit cannot be imported: isolated, in another folder."""
    command = [sys.executable, "-I", str(folder / "infer.py"), *arguments]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert code or not done.stderr
    return done.stdout if code == 0 else done.stderr


def picture(path: Path, width: int, height: int, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("target", ["x86", "mobile-arm"])
def test_infer_gives_what_the_artifact_gives(tmp_path: Path, target: str) -> None:
    if target == "mobile-arm":
        pytest.importorskip("ai_edge_litert", reason="the extra 'tflite' runs .tflite files")
    folder = tmp_path / "artifact"
    small_artifact(folder, target, preprocess=LOOK, classes=("ant", "bee", "cat", "dog"))
    paths = [picture(tmp_path / "a.png", 13, 17), picture(tmp_path / "b.png", 30, 11, seed=1)]
    arrays = np.stack([preprocess_image(Image.open(p), LOOK) for p in paths])
    artifact = exporters.open_artifact(folder)
    for precision in ("fp32", "int8"):
        expected = artifact(arrays, precision=precision)["y"]
        saved = tmp_path / "out.npz"
        shown = infer(folder, *map(str, paths), "--precision", precision, "--save", str(saved))
        np.testing.assert_allclose(np.load(saved)["y"], expected, rtol=1e-6, atol=1e-6)
        best = ("ant", "bee", "cat", "dog")[int(expected[0].argmax())]
        assert shown.splitlines()[0] == f"{paths[0]}:" and shown.splitlines()[1].endswith(f"  {best}")
        assert len(shown.splitlines()) == 2 * (1 + 4)


def test_infer_takes_arrays_where_inputs_are_no_images(folder: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "inputs.npz", x=x)
    infer(folder, str(tmp_path / "inputs.npz"), "--save", str(tmp_path / "out.npz"))
    expected = exporters.open_artifact(folder)(x)["y"]
    np.testing.assert_allclose(np.load(tmp_path / "out.npz")["y"], expected, rtol=1e-6, atol=1e-6)


def test_infer_takes_the_very_npz_that_the_evaluation_took(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    small_artifact(folder, preprocess=LOOK)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 17, 13, 3), np.uint8)
    np.savez(tmp_path / "test.npz", images=pixels, y=np.arange(3))
    infer(folder, str(tmp_path / "test.npz"), "--save", str(tmp_path / "out.npz"))
    x = np.stack([preprocess_image(Image.fromarray(p), LOOK) for p in pixels])
    expected = exporters.open_artifact(folder)(x)["y"]
    np.testing.assert_allclose(np.load(tmp_path / "out.npz")["y"], expected, rtol=1e-6, atol=1e-6)
    np.savez(tmp_path / "grey.npz", images=pixels[..., :1])
    assert "expected as [n, height, width, 3]" in infer(folder, str(tmp_path / "grey.npz"), code=1)


def test_infer_says_which_file_it_cannot_read(tmp_path: Path) -> None:
    small_artifact(tmp_path / "a", preprocess=LOOK)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "text.npz").write_text("no arrays")
    image = picture(tmp_path / "a.png", 20, 20)
    half = picture(tmp_path / "half.png", 20, 20)
    half.write_bytes(half.read_bytes()[:500])
    for path, message in (
        (tmp_path, f"{tmp_path} is a folder; give the files in it: {tmp_path}/*"),
        (tmp_path / "text.png", "text.png is damaged, or no image"),
        (half, "half.png is damaged, or no image"),
        (tmp_path / "text.npz", "text.npz is damaged, or no .npz"),
    ):
        error = infer(tmp_path / "a", str(path), code=1)
        assert message in error and len(error.splitlines()) == 1
    (tmp_path / "a" / "model.int8.onnx").write_bytes(b"cut off")
    error = infer(tmp_path / "a", str(image), code=1)
    assert "cannot open" in error and "model.int8.onnx" in error and len(error.splitlines()) == 1


def test_infer_says_what_is_wrong_with_its_input(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", z=np.zeros(3))
    np.savez(tmp_path / "large.npz", x=np.zeros((1, 3, 9, 8)))
    image = picture(tmp_path / "a.png", 8, 8)
    for path, message in (
        (tmp_path / "other.npz", "input x has the shape [3]; the network takes ['batch', 3, 8, 8]"),
        (tmp_path / "large.npz", "input x has the shape [1, 3, 9, 8]; the network takes ['batch', 3, 8, 8]"),
        (image, "does not take image files: give an .npz with x"),
        (tmp_path / "missing.npz", "no file"),
        (Path("/dev/null"), "/dev/null is no regular file"),
    ):
        error = infer(folder, str(path), code=1)
        assert message in error and "Traceback" not in error


def test_a_picture_smaller_than_the_crop_is_refused_not_padded(tmp_path: Path) -> None:
    small_artifact(tmp_path / "a", preprocess=replace(LOOK, resize=None))
    error = infer(tmp_path / "a", str(picture(tmp_path / "tiny.png", 20, 7)), code=1)
    assert "is 20 x 7; the network looks at 8 x 8 (width x height)" in error


def test_a_picture_of_another_size_is_refused_with_what_to_do(tmp_path: Path) -> None:
    small_artifact(tmp_path / "a", preprocess=Preprocess())
    paths = [str(picture(tmp_path / name, size, 8)) for name, size in (("fits.png", 8), ("big.png", 20))]
    error = infer(tmp_path / "a", *paths, code=1)
    assert "the network takes ['batch', 3, 8, 8]: resize or crop " in error and "big.png" in error


def test_a_score_is_never_minus_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    script.show("y", np.array([-0.00001, -1.0]), is_scores=True)
    assert capsys.readouterr().out.split() == ["0.0000", "class", "0", "-1.0000", "class", "1"]


def test_a_single_sample_may_come_without_its_batch_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "INPUTS", {"x": (("batch", 2, 2), "float32")})
    assert script.fit("x", {"x": np.zeros((2, 2))}).shape == (1, 2, 2)


def test_outputs_that_are_no_scores_are_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    script.show("mask", np.array([[1.0, 3.0]]), is_scores=False)
    assert capsys.readouterr().out == "  mask [1, 2]: min 1, mean 2, max 3\n"


@given(
    size=st.tuples(st.integers(8, 60), st.integers(8, 60)),
    resize=st.one_of(st.none(), st.integers(8, 40)),
    crop=st.one_of(st.none(), st.tuples(st.integers(1, 8), st.integers(1, 8))),
    layout=st.sampled_from(["NCHW", "NHWC"]),
    channels=st.sampled_from(["RGB", "BGR", "L"]),
)
def test_infer_preprocesses_as_calibration_did(
    tmp_path_factory: pytest.TempPathFactory,
    size: tuple[int, int],
    resize: int | None,
    crop: tuple[int, int] | None,
    layout: str,
    channels: str,
) -> None:
    look = Preprocess(resize, crop, 1 / 127.5, (1.0,), (0.5,), layout, channels)
    path = picture(tmp_path_factory.getbasetemp() / "sized.png", *size)
    ours: NDArray[Any] = script.load_image(path, {f: getattr(look, f) for f in look.__dataclass_fields__})
    np.testing.assert_array_equal(ours, preprocess_image(Image.open(path), look))


def test_infer_depends_on_nothing_of_ours(folder: Path) -> None:
    tree = ast.parse((folder / "infer.py").read_text(), feature_version=(3, 7))
    found = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    found |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    known = {"argparse", "sys", "pathlib", "typing", "collections.abc", "__future__", "numpy", "onnxruntime", "PIL"}
    assert found == known


@pytest.mark.parametrize("model", ['a"""b.py:net', "C:\\new\\nets.py:net", "nets.py:net"])
def test_infer_is_valid_whatever_the_model_is_called(tmp_path: Path, model: str) -> None:
    small_artifact(tmp_path / "a", model=model)
    assert "net" in (ast.get_docstring(ast.parse((tmp_path / "a" / "infer.py").read_text())) or "")


def test_usage_is_the_same_twice_and_holds_no_timing(tmp_path: Path) -> None:
    manifest = small_artifact(tmp_path / "a")
    before = {n: (tmp_path / "a" / n).read_bytes() for n in ("infer.py", "README.md")}
    write_usage(tmp_path / "a", replace(manifest, measurements=(timed("int8", 1.0),), seconds={"check": 1.0}))
    assert before == {n: (tmp_path / "a" / n).read_bytes() for n in before}


def test_the_readme_says_how_to_run_and_what_goes_in(tmp_path: Path) -> None:
    small_artifact(tmp_path / "a", preprocess=LOOK, classes=("ant", "bee"), notes=("a note",))
    readme = (tmp_path / "a" / "README.md").read_text()
    for expected in (
        "# nets.py:small for x86",
        "pip install numpy onnxruntime pillow",
        "python infer.py image.jpg",
        "| `model.int8.onnx` | int8 |",
        "- `x`: batch × 3 × 8 × 8, float32",
        "2. resize the shorter side to 10 pixels, bilinear",
        "Classes, in order: ant, bee.",
        "- a note",
    ):
        assert expected in readme, expected


def test_a_tensorrt_bundle_is_run_by_its_own_script(tmp_path: Path) -> None:
    small_artifact(tmp_path / "jetson", "jetson")
    readme = (tmp_path / "jetson" / "README.md").read_text()
    assert "    ./build.sh\n" in readme and "BUILD.md" in readme
    assert "deploykit benchmark" not in readme
    assert "    python3 infer.py inputs.npz\n" in readme, "JetPack has no python, or it is Python 2"
    assert (tmp_path / "jetson" / "build.sh").is_file()


def test_a_board_whose_python_is_too_old_gets_a_newer_one_beside_it(tmp_path: Path) -> None:
    small_artifact(tmp_path / "nano", "jetson-nano")
    readme = (tmp_path / "nano" / "README.md").read_text()
    assert "    python3.8 -m venv env\n" in readme and "    env/bin/python infer.py inputs.npz\n" in readme
    assert "its python3 is 3.6" in readme


def test_the_headline_is_about_the_file_that_the_device_reads(tmp_path: Path) -> None:
    nano = small_artifact(tmp_path / "nano", "jetson-nano")
    assert nano.files[-1].read_instead == nano.files[0].path
    assert "makes its fp16 engine from model.fp32.onnx: it cannot read model.fp16.onnx" in " ".join(summary(rows(nano)))
    assert cards(nano)[0].beside == "the fp32 file"


def test_whoever_runs_files_on_an_npu_is_told_where_they_were_measured_and_what_they_need(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    small_artifact(tmp_path / "npu", "intel-npu")
    readme = (tmp_path / "npu" / "README.md").read_text()
    assert "kernels for the CPU; the NPU has kernels of its own" in readme and "NPU driver" in readme


def test_pixels_that_go_in_as_they_are_are_never_called_floats(tmp_path: Path) -> None:
    pixels = (TensorSpec("x", ("batch", 8, 8, 3), "uint8"),)
    made = small_artifact(tmp_path / "a", preprocess=Preprocess(scale=1.0, layout="NHWC"), inputs=pixels)
    readme, report = (tmp_path / "a" / "README.md").read_text(), words(made)
    assert "uint8, NHWC" in readme and "float32, NHWC" not in readme
    assert "uint8, NHWC" in report and "float32, NHWC" not in report


def test_pixels_have_no_scale_and_no_zero_point_in_any_file(manifest: Manifest) -> None:
    held = Port("x", (1, 8, 8, 3), "uint8", 1.0, 114)
    file = replace(manifest.files[0], inputs=(held,))
    (whole,) = ports(replace(manifest, files=(file,), inputs=(TensorSpec("x", ("batch", 8, 8, 3), "uint8"),)))
    (real,) = ports(replace(manifest, files=(file,)))
    assert (whole.scale, whole.zero_point) == ("", "") and (real.scale, real.zero_point) == ("1", "114")


def test_no_noise_at_all_is_called_equal(manifest: Manifest) -> None:
    assert (decibels(200.0), decibels(41.26), decibels(None)) == ("equal", "41.3 dB", "– dB")
    exact = Score("int8", 16, "eval", None, None, None, {"y": 200.0})
    only = replace(manifest, scores=(exact,))
    assert "Its outputs equal the original model's" in " ".join(summary(rows(only)))
    assert cards(only)[1].figure == "equal"


def test_the_readme_says_what_the_files_hold_where_that_is_not_what_the_model_takes(tmp_path: Path) -> None:
    phone = small_artifact(tmp_path / "phone", "mobile-arm")
    (int8,) = [f for f in phone.files if f.precision == "int8"]
    readme = (tmp_path / "phone" / "README.md").read_text()
    assert "| in | `x` | 1 × 8 × 8 × 3 | float32 |  |  | `model.fp32.tflite`, `model.fp16.tflite` |" in readme
    p = int8.inputs[0]
    assert f"| in | `x` | 1 × 8 × 8 × 3 | int8 | {p.scale:.9g} | {p.zero_point} | `model.int8.tflite` |" in readme
    page = write_report(tmp_path / "phone").read_text()
    assert f"1 × 8 × 8 × 3, int8, scale {p.scale:.9g}, zero point {p.zero_point} (model.int8.tflite)" in page


def test_the_readme_says_which_batch_is_bound(tmp_path: Path) -> None:
    small_artifact(tmp_path / "jetson", "jetson")
    assert "| in | `x` | 1 × 3 × 8 × 8 | float32 |  |  | `model." in (tmp_path / "jetson" / "README.md").read_text()
    small_artifact(tmp_path / "x86")
    assert "What the files hold" not in (tmp_path / "x86" / "README.md").read_text()


def test_the_readme_says_how_good_the_files_are(tmp_path: Path) -> None:
    small_artifact(tmp_path / "a")
    readme = (tmp_path / "a" / "README.md").read_text()
    assert "| the original model | 80.00 |  |  |  |" in readme
    assert re.search(r"^\| `model.int8.onnx` \| 79\.50 \| 98\.00 \| 30\.0 \| \d\.\d\d kB \|$", readme, re.MULTILINE)
    assert "On 16 samples: eval." in readme
    small_artifact(tmp_path / "b", scores=())
    assert "It was not evaluated" in (tmp_path / "b" / "README.md").read_text()


def test_every_exporter_says_how_its_files_are_run() -> None:
    parts = Path(script.__file__).parent
    assert {p.stem.removeprefix("run_") for p in parts.glob("run_*.py")} == set(exporters.names())


def test_preprocessing_is_told_step_by_step() -> None:
    assert preprocessing(LOOK, "float32") == (
        "read as RGB, values 0 to 255",
        "resize the shorter side to 10 pixels, bilinear",
        "cut the centre, 8 × 8 (height × width)",
        "multiply by 1/255",
        "subtract (0.4, 0.5, 0.6) per channel",
        "divide by (0.2, 0.25, 0.3) per channel",
        "float32, NCHW",
    )
    assert preprocessing(Preprocess(scale=1.0, mean=(127.5,), layout="NHWC", channels="L"), "float32") == (
        "read as grey, values 0 to 255",
        "subtract 127.5",
        "float32, NHWC",
    )


def test_names_and_shapes_are_fit_to_read() -> None:
    assert shape(("s77", 3, "length")) == "batch × 3 × length"
    assert title("/home/me/nets.py:build") == "nets.py:build" and title("torchvision.models:resnet18")
