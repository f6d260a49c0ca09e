"""The benchmark. Nothing below asserts how fast anything is."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from commands import enter
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from small_artifact import small_artifact

from deploykit.bench import Benchmark, Timing, measure, measure_artifact
from deploykit.bench.compare import ratio
from deploykit.bench.memory import peak_megabytes
from deploykit.bench.timing import MOST_RUNS, SECONDS, feed, in_turns, processor
from deploykit.core.artifact import Artifact, File, Measurement, TensorSpec
from deploykit.core.errors import DeploykitError
from deploykit.exporters import to_onnx


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "x86"
    small_artifact(path)
    return path


def quick(folders: Sequence[Path], **options: Any) -> Benchmark:
    return measure(folders, **{"runs": 5, "seconds": 0.0, "memory": False, **options})


def text(found: Benchmark) -> str:
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(found.table())
    return console.export_text()


# ------------------------------------------------------------------ measuring


def test_every_file_gets_percentiles_and_says_where_it_ran(folder: Path) -> None:
    found = quick([folder], batch=3, threads=1)
    assert [t.measurement.precision for t in found.timings] == ["fp32", "int8"]
    for timing in found.timings:
        m = timing.measurement
        assert m.p50_ms is not None and m.p90_ms is not None and m.p99_ms is not None and m.per_second is not None
        assert 0 < m.p50_ms <= m.p90_ms <= m.p99_ms
        assert m.per_second == pytest.approx(3 * 5 / (timing.milliseconds.sum() / 1000))
        assert (m.batch, m.threads, m.runs, m.peak_mb) == (3, 1, 5, None)
        assert m.bytes == (folder / timing.file.path).stat().st_size
        assert m.where == f"this machine: {processor()}, {to_onnx.runtime().name}"
        assert m.spread == m.p90_ms / m.p50_ms


def test_a_target_this_machine_does_not_stand_for_is_labelled_so(tmp_path: Path) -> None:
    small_artifact(tmp_path / "board", exporter="onnx", target="x86")
    manifest = (tmp_path / "board" / "manifest.json").read_text().replace('"target": "x86"', '"target": "my-board"')
    (tmp_path / "board" / "manifest.json").write_text(manifest)
    assert quick([tmp_path / "board"]).timings[0].measurement.where.startswith("this machine, not the device: ")


def test_files_for_tensorrt_are_not_timed_here(tmp_path: Path) -> None:
    small_artifact(tmp_path / "jetson", "jetson")
    found = quick([tmp_path / "jetson"], memory=True)
    for timing in found.timings:
        m = timing.measurement
        assert m.where == "not run here: needs TensorRT on the device (run build.sh there)"
        assert (m.p50_ms, m.p90_ms, m.p99_ms, m.per_second, m.peak_mb, m.spread) == (None,) * 6
        assert m.runs == 0 and m.bytes > 0
    assert found.advice == ()
    assert all(r.time is None and r.verdict == "" and r.bytes > 0 for r in found.ratios)
    assert "0.00" not in text(found) and "–" in text(found)


def test_files_take_turns_and_the_order_rotates() -> None:
    seen: list[str] = []
    calls = [lambda name=name: seen.append(name) for name in "abc"]  # type: ignore[misc]
    times = in_turns(calls, runs=4, seconds=0.0)
    assert "".join(seen[-12:]) == "abcbcacababc"
    assert [len(t) for t in times] == [4, 4, 4]
    assert len(seen) > 12, "warmed up before"


def test_fast_files_are_run_more_often_than_asked() -> None:
    (times,) = in_turns([lambda: None], runs=5, seconds=10.0)
    assert len(times) == 1000


def test_at_least_fifty_rounds_unless_fewer_are_asked_for(folder: Path) -> None:
    assert {t.measurement.runs for t in measure([folder], seconds=0.0, memory=False).timings} == {50}


def test_the_help_says_that_runs_are_the_fewest() -> None:
    said = " ".join(enter("benchmark --help").out.split())
    assert f"at least; fast files go on for {SECONDS:g} s, up to {MOST_RUNS}" in said


@pytest.mark.parametrize("what", ["batch", "threads", "runs"])
def test_numbers_below_one_are_refused(folder: Path, what: str) -> None:
    with pytest.raises(DeploykitError, match=f"{what} must be 1 or more; given 0"):
        quick([folder], **{what: 0})


def test_peak_memory_is_the_files_own(tmp_path: Path) -> None:
    """A file with 40 MB of weights needs that much more, whatever this process holds."""
    held = np.ones(300_000_000, np.uint8)
    peaks = []
    for name, width in (("small", 8), ("large", 3163)):
        body = "y = MatMul(x, w)"
        proto = onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["": 20]> t (float[n,{width}] x) => (float[n,{width}] y) {{ {body} }}'
        )
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((width, width), np.float32), "w"))
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(proto.SerializeToString())
        peaks.append(peak_megabytes("onnx", path, {"x": np.zeros((1, width), np.float32)}, threads=1))
    small, large = peaks
    if small is None or large is None:
        pytest.skip("this system does not tell a process's peak memory (no VmHWM in /proc/self/status)")
    assert small < 40
    assert 40 < large - small < 200
    assert held.nbytes == 300_000_000


def test_memory_that_cannot_be_measured_is_none(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    assert peak_megabytes("onnx", tmp_path / "broken.onnx", {"x": np.zeros((1, 1), np.float32)}, threads=1) is None


def test_measure_artifact_gives_the_manifests_measurements(folder: Path) -> None:
    measurements, advice = measure_artifact(folder, samples={"x": np.ones((2, 3, 8, 8), np.float32)})
    assert [m.precision for m in measurements] == ["fp32", "int8"]
    assert isinstance(advice, tuple)


# ------------------------------------------------------------------ inputs


@given(
    sizes=st.lists(st.integers(1, 4), max_size=3),
    dtype=st.sampled_from(["float32", "float16", "int64", "int32", "uint8", "bool"]),
    batch=st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_random_inputs_fit_and_are_the_same_for_the_same_seed(
    sizes: list[int], dtype: str, batch: int, seed: int
) -> None:
    specs = [TensorSpec("a", ("n", *sizes), dtype), TensorSpec("b", (1, *sizes), dtype)]
    once, again = feed(specs, None, batch, seed), feed(specs, None, batch, seed)
    assert list(once) == ["a", "b"]
    for name, array in once.items():
        assert array.shape == (batch, *sizes) and array.dtype == dtype
        np.testing.assert_array_equal(array, again[name])


def test_samples_are_repeated_to_fill_the_batch() -> None:
    samples = {"x": np.array([[1.0], [2.0], [3.0]]), "unused": np.zeros(3)}
    arrays = feed([TensorSpec("x", ("n", 1), "float32")], samples, 5, 0)
    assert arrays["x"].ravel().tolist() == [1, 2, 3, 1, 2] and arrays["x"].dtype == np.float32


def test_missing_samples_are_named() -> None:
    with pytest.raises(DeploykitError, match="samples of the inputs mask; given: x"):
        feed([TensorSpec("x", ("n",), "float32"), TensorSpec("mask", ("n",), "int64")], {"x": np.zeros(1)}, 1, 0)


def test_a_free_dimension_needs_samples() -> None:
    with pytest.raises(DeploykitError, match="free dimension 'length': timing it needs samples"):
        feed([TensorSpec("ids", ("n", "length"), "int64")], None, 1, 0)


# ------------------------------------------------------------------ bad artifacts


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-100]), r"model.int8.onnx has \d+ bytes, \d+ were written"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1] + b"?"), "model.int8.onnx was changed after the export"),
        (lambda p: p.unlink(), "model.int8.onnx is missing"),
    ],
)
def test_damaged_artifacts_are_refused_by_name(tmp_path: Path, damage: Any, message: str) -> None:
    small_artifact(tmp_path / "a")
    damage(tmp_path / "a" / "model.int8.onnx")
    with pytest.raises(DeploykitError, match=message):
        quick([tmp_path / "a"])


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeploykitError, match=r"has no manifest.json: it is not an artifact"):
        quick([tmp_path])


def test_the_artifact_to_compare_with_is_looked_at_before_anything_runs(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DeploykitError, match="no folder"):
        quick([folder, tmp_path / "missing"])


# ------------------------------------------------------------------ comparing


def timing(
    artifact: Artifact, precision: Any, times: Sequence[float], size: int = 100, peak: float | None = None
) -> Timing:
    array = np.asarray(times, np.float64)
    p50, p90, p99 = np.percentile(array, [50, 90, 99]).tolist() if len(array) else (None, None, None)
    m = Measurement(precision, 1, 1, len(array), p50, p90, p99, None, peak, size, "somewhere")
    return Timing(artifact, File(f"model.{precision}.onnx", precision), m, array)


def artifact(name: str = "a") -> Artifact:
    return Artifact(Path("somewhere") / name, "x86", "onnx", (), (), (), to_onnx.load)


def test_a_ratio_compares_calls_of_the_same_round() -> None:
    """A machine that is ten times slower half of the time does not change what is twice as fast."""
    busy = np.where(np.arange(50) % 2, 10.0, 1.0)
    a = artifact()
    found = ratio(timing(a, "int8", 2 * busy, 25, 3.0), timing(a, "fp32", 4 * busy, 100, 6.0))
    assert (found.time, found.faster, found.bytes, found.memory) == (0.5, 1.0, 0.25, 0.5)
    assert found.verdict == "faster"


@pytest.mark.parametrize(("wins", "verdict"), [(50, "faster"), (38, "faster"), (25, "as fast"), (12, "slower")])
def test_a_difference_counts_only_if_the_rounds_agree(wins: int, verdict: str) -> None:
    a = artifact()
    other = np.where(np.arange(50) < wins, 0.9, 1.1)
    assert ratio(timing(a, "int8", other), timing(a, "fp32", np.ones(50))).verdict == verdict


def test_a_slow_integer_file_is_advised_against() -> None:
    a = artifact()
    files = [timing(a, p, np.full(50, t)) for p, t in (("fp32", 3.0), ("fp16", 2.0), ("int8", 2.6))]
    assert Benchmark(tuple(files)).advice == ("int8 is slower than fp16 here (1.30 times): use model.fp16.onnx",)


def test_nobody_is_advised_to_change_files_for_three_percent() -> None:
    a = artifact()
    assert Benchmark((timing(a, "fp32", np.full(50, 1.0)), timing(a, "int8", np.full(50, 1.03)))).advice == ()


def test_a_busy_machine_is_said_aloud() -> None:
    times = np.where(np.arange(50) % 4, 1.0, 3.0)
    (sentence,) = Benchmark((timing(artifact(), "fp32", times),)).advice
    assert "busy (p90 is up to 3.0 times p50)" in sentence


def test_ratios_are_over_the_baseline_and_across_artifacts() -> None:
    a, b = artifact("a"), artifact("b")
    found = Benchmark(
        tuple(timing(x, p, np.full(50, t)) for x, p, t in ((a, "fp32", 4), (a, "int8", 2), (b, "int8", 8)))
    )
    named = {(found.name(r.of), found.name(r.over)): r.time for r in found.ratios}
    assert named == {("a int8", "a fp32"): 0.5, ("a int8", "b int8"): 0.25}


def test_artifacts_in_folders_of_one_name_are_told_apart() -> None:
    found = Benchmark((timing(artifact("one/out"), "fp32", [1]), timing(artifact("two/out"), "fp32", [1])))
    assert [found.name(t) for t in found.timings] == ["somewhere/one/out fp32", "somewhere/two/out fp32"]


def test_table_and_json_hold_the_same_run(folder: Path, tmp_path: Path) -> None:
    small_artifact(tmp_path / "other")
    found = quick([folder, tmp_path / "other"])
    plain = json.loads(json.dumps(found.to_dict()))
    assert [f["precision"] for f in plain["files"]] == ["fp32", "int8"] * 2
    assert [(r["of"], r["over"]) for r in plain["ratios"]] == [
        ("x86 int8", "x86 fp32"),
        ("other int8", "other fp32"),
        ("x86 fp32", "other fp32"),
        ("x86 int8", "other int8"),
    ]
    assert plain["files"][0]["peak_mb"] is None
    shown = text(found)
    assert "x86 int8 / x86 fp32" in shown and "5 rounds" in shown and processor() in shown


# ------------------------------------------------------------------ the guide


def test_the_guides_snippet_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (Path(__file__).parent.parent / "docs" / "benchmark.md").read_text()
    snippet = guide.partition("```python\n")[2].partition("```")[0]
    seen: list[Benchmark] = []

    def brief(folders: Sequence[Path], **options: Any) -> Benchmark:
        seen.append(quick(folders, **options))
        return seen[-1]

    (folder.parent / "out").symlink_to(folder)
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr("deploykit.bench.measure", brief)
    exec(snippet, {})
    assert len(seen) == 1
