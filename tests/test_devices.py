"""Devices without a network: addresses, facts, what is missing, timing and answers on this machine; adb stands in."""

from __future__ import annotations

import ast
import json
import os
import shutil
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import enter
from small_artifact import small_artifact

from deploykit import asked, targets, trial
from deploykit.bench.drift import Drift
from deploykit.bench.there import lacks, send_all
from deploykit.check import Answers
from deploykit.core.artifact import Check
from deploykit.core.data import DataSet
from deploykit.core.device import Facts
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import load_intact, load_manifest
from deploykit.core.request import Gate, Request
from deploykit.devices import connect, parse, read_facts, run_infer, run_tflite, stand_in
from deploykit.devices.answers import room
from deploykit.devices.work import Window
from deploykit.exporters import open_artifact

THERE = Path(__file__).parents[1] / "deploykit" / "devices" / "there"


def facts(**changes: Any) -> Facts:
    """Of a device that has everything."""
    known: dict[str, Any] = {
        "address": "ssh://pi", "name": "pi", "machine": "aarch64", "python": "/usr/bin/python3",
        "python_version": "3.11.2", "packages": {"numpy": "2.0.0", "onnxruntime": "1.20.0", "ai-edge-litert": "2.1.0"},
        "tools": {"cc": "/usr/bin/cc", "trtexec": "/usr/bin/trtexec"},
    }  # fmt: skip
    return Facts(**{**known, **changes})


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("devices") / "out"
    small_artifact(folder)
    return folder


def samples(count: int) -> DataSet:
    random = np.random.default_rng(0)
    return DataSet.of(
        {"x": random.standard_normal((count, 3, 8, 8)).astype(np.float32)}, random.integers(0, 4, count), "samples"
    )


# ------------------------------------------------------------------ addresses


def test_an_address_says_how_and_where() -> None:
    full = parse("ssh://pi@10.0.0.7:2222?dir=/mnt/ssd&python=/home/pi/venv/bin/python")
    assert (full.user, full.host, full.port, full.folder) == ("pi", "10.0.0.7", 2222, "/mnt/ssd")
    assert full.python == "/home/pi/venv/bin/python"
    assert full.text == "ssh://pi@10.0.0.7:2222"
    assert parse("adb://192.168.1.5:5555").host == "192.168.1.5:5555"
    assert parse("adb://R5CT").host == "R5CT"
    assert parse("adb://").host == ""
    assert parse("local?dir=/tmp/x").folder == "/tmp/x"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pi", "a device is local, ssh://[user@]host[:port] or adb://serial; given: pi"),
        ("http://pi", "a device is local"),
        ("ssh:pi", "a device is local"),
        ("ssh://", "a device is local"),
        ("ssh://pi/home", "a device is local"),
        ("ssh://-oProxyCommand=x", "a device is local"),
        ("ssh://pi:secret@host", "no password"),
        ("ssh://pi:0x", "port"),
        ("ssh://pi?pyton=/x", "Did you mean 'python'?"),
    ],
)
def test_an_address_that_cannot_be_is_refused(text: str, said: str) -> None:
    with pytest.raises(DeploykitError) as error:
        parse(text)
    assert said.lower() in str(error.value).lower()
    assert "secret" not in str(error.value)


# ------------------------------------------------------------------ facts


def test_a_device_says_what_it_is(tmp_path: Path) -> None:
    with connect(parse(f"local?dir={tmp_path / 'work'}")) as device:
        found = read_facts(device)
    assert found.machine == os.uname().machine
    assert found.cores == os.cpu_count()
    assert found.packages["numpy"] == np.__version__
    assert found.python == sys.executable
    assert found.folder == str(tmp_path / "work")
    assert found.free_mb is not None and found.memory_mb is not None
    assert found.text.startswith("this machine: ")


def test_clocks_temperatures_and_power_mode_are_read(tmp_path: Path) -> None:
    """The probe's own words for a board, on a device that says them (a stand-in for /sys and nvpmodel)."""

    class Board:
        address = parse("ssh://nano")

        def run(self, command: str, feed: bytes | None = None) -> Any:
            from deploykit.devices import Ran

            lines = [
                "machine\taarch64", "folder\t/x", "free_kb\t1000", "clock_khz\t1428000", "clock_khz\t1224000",
                "clock_max_khz\t1479000", "governor\tschedutil", "governor\tschedutil", "cores\t4",
                "temperature CPU-therm\t45500", "temperature GPU-therm\t43000", "power_mode\tNV Power Mode: MAXN",
            ]  # fmt: skip
            return Ran(0, "\n".join(lines), "")

    found = read_facts(Board())  # type: ignore[arg-type]
    assert found.clock_mhz == pytest.approx(1326)
    assert found.clock_max_mhz == 1479
    assert found.governor == "schedutil"
    assert found.temperatures == {"CPU-therm": 45.5, "GPU-therm": 43.0}
    assert found.power_mode == "MAXN"
    assert "4 x cpu (aarch64) up to 1479 MHz, governor schedutil, MAXN" in found.text


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with connect(parse(f"local?dir={tmp_path / 'file'}/below")) as device, pytest.raises(DeploykitError) as error:
        read_facts(device)
    assert "?dir=PATH" in str(error.value)


def test_a_python_that_is_not_there_is_named(tmp_path: Path) -> None:
    address = parse(f"local?dir={tmp_path}&python=/nowhere/python")
    with connect(address) as device, pytest.raises(DeploykitError, match="no Python interpreter '/nowhere/python'"):
        read_facts(device)


def test_a_python_that_cannot_be_run_is_named_with_its_own_words(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no libpython here >&2; exit 1\n")
    broken.chmod(0o755)
    with connect(parse(f"local?dir={tmp_path}&python={broken}")) as device, pytest.raises(DeploykitError) as error:
        read_facts(device)
    assert f"'{broken}' cannot be run there as a Python interpreter: no libpython here" in str(error.value)


@pytest.mark.parametrize(
    ("exporter", "target", "changes", "said"),
    [
        ("onnx", "x86", {"python_version": ""}, "pip install numpy onnxruntime"),
        ("onnx", "x86", {"packages": {"numpy": "2"}}, "has no onnxruntime: run `pip install numpy onnxruntime` there"),
        ("onnx", "x86", {"packages": {}}, "no numpy and no onnxruntime"),
        ("onnx", "x86", {"python_version": "3.6.9"}, "3.7 or newer"),
        ("tflite", "mobile-arm", {"packages": {"numpy": "2"}}, "benchmark_model"),
        ("tensorrt", "jetson", {"tools": {}}, "sudo apt install tensorrt"),
        ("tensorrt", "jetson", {"machine": "x86_64"}, "target 'jetson' is aarch64, this device is x86_64"),
        ("c99", "cortex-m4", {"tools": {}}, "apt install gcc"),
    ],
)
def test_what_a_device_lacks_is_named_with_the_way_to_get_it(
    exporter: str, target: str, changes: dict[str, Any], said: str
) -> None:
    assert said in lacks(facts(**changes), exporter, target)
    assert lacks(facts(), exporter, target) == ""


@pytest.mark.parametrize(
    ("machine", "target", "knows", "capability", "said"),
    [
        ("x86_64", "mobile-arm", {"architecture": "aarch64"}, "", "x86_64 stands in for mobile-arm (aarch64)"),
        ("aarch64", "mobile-arm", {"architecture": "aarch64"}, "", ""),
        ("arm64", "mobile-arm", {"architecture": "aarch64"}, "", ""),
        ("x86_64", "mobile-arm", {}, "", ""),
        ("x86_64", "cortex-m4", {}, "", "x86_64 stands in for cortex-m4"),
        ("x86_64", "gpu-t4", {"compute_capability": "7.5"}, "9.0", "compute capability 9.0 stands in for gpu-t4 (7.5)"),
        ("x86_64", "gpu-t4", {"compute_capability": "7.5"}, "7.5", ""),
        ("x86_64", "gpu-t4", {"compute_capability": "7.5"}, "", ""),
        ("x86_64", "nobody's", {}, "", ""),
    ],
)
def test_a_device_that_is_not_the_target_stands_in_for_it(
    machine: str, target: str, knows: dict[str, str], capability: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in, "fact", lambda of, name: knows.get(name, ""))
    exporter = targets.load(target).exporter if target in targets.names() else "onnx"
    assert stand_in.stand_in(facts(machine=machine), exporter, target, capability) == said


def test_what_a_target_says_of_its_hardware_is_read_from_its_profile() -> None:
    assert stand_in.fact("jetson", "architecture") == "aarch64"
    assert stand_in.fact("gpu-t4", "compute_capability") == "7.5"
    assert stand_in.fact("nobody's", "architecture") == ""


# ------------------------------------------------------------------ what runs there


@pytest.mark.parametrize("script", ["run.py", "engine.py"])
def test_scripts_for_devices_are_old_python_and_need_nothing_but_numpy(script: str) -> None:
    tree = ast.parse((THERE / script).read_text(encoding="utf-8"), feature_version=(3, 7))
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    roots = {name.partition(".")[0] for name in imported} - {"build"}  # the bundle's own script, beside it
    assert roots - set(sys.stdlib_module_names) <= {"numpy"}


def test_files_answer_on_a_device_as_they_do_here(artifact: Path, tmp_path: Path) -> None:
    data = samples(40)
    found = trial.try_out(f"local?dir={tmp_path / 'work'}", [artifact], exams=[trial.Exam(data, "samples")], time=False)
    here = open_artifact(artifact)
    for score in found.scores[0]:
        answers = here(x=next(data.batches(40)).inputs["x"], precision=score.precision)["y"]
        assert score.metric == pytest.approx(100 * (answers.argmax(1) == data.labels).mean())
    assert [c.value for c in found.checks[0]] == [100.0, 100.0]
    assert found.scores[0][0].data == "samples, answered on this machine"


@pytest.mark.parametrize(
    ("precision", "exporter", "passes"),
    [("fp32", "onnx", False), ("fp16", "tflite", False), ("fp32", "tensorrt", False), ("int8", "onnx", True)],
)
def test_outputs_behind_the_class_scores_are_judged_by_precision(precision: str, exporter: str, passes: bool) -> None:
    random = np.random.default_rng(0)
    classes, boxes = random.standard_normal((50, 4)), random.standard_normal((50, 3, 2))
    here = Answers({"classes": classes, "boxes": boxes}, None)
    off, broken = (Answers({"classes": classes, "boxes": boxes * by}, None) for by in (1.15, np.nan))
    for there, expected in ((here, True), (off, passes), (broken, False)):
        found = trial._same(there, here, precision, exporter, facts(), Gate())
        assert [c.name for c in found] == [trial.SAME_HERE, trial.SAME_HERE_DB]
        assert [c.passed for c in found] == [True, expected]


def test_a_benchmark_judges_by_the_metric_of_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("judge.py").write_text(
        "def seven(outputs, labels):\n    return 7.0\n\n\ndef nine(outputs, labels):\n    return 9.0\n"
    )
    request = Request("nets.py:small", "x86", metric="judge.py:seven")
    small_artifact(tmp_path / "out", request=request)
    np.savez("eval.npz", x=next(samples(5).batches(5)).inputs["x"], y=samples(5).labels)
    for given, expected in ((None, 7.0), ("judge.py:nine", 9.0)):
        exam = asked._exam(load_manifest(tmp_path / "out"), "eval.npz", given)
        assert exam is not None and exam.metric is not None and exam.metric({}, None) == expected


def test_a_copy_that_breaks_off_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: str, part: Path) -> None:
        part.write_text("ha")
        raise OSError("the disk is full")

    (tmp_path / "kept").write_text("whole")
    monkeypatch.setattr(shutil, "copyfile", broken)
    with connect(parse("local")) as device, pytest.raises(OSError, match="full"):
        device.get(str(tmp_path / "source"), tmp_path / "kept")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["whole"]


def test_what_a_killed_run_left_behind_is_swept_a_day_later(artifact: Path, tmp_path: Path) -> None:
    with connect(parse(f"local?dir={tmp_path}")) as device:
        known = read_facts(device)
        (work,) = send_all(device, known, [artifact])
        folder = Path(work.remote)
        (folder / "answers").mkdir()
        yesterday = time.time() - 25 * 3600
        left = [".model.int8.onnx.7.part", "answers/0f.int8.7.part", ".build.7.part/model.o", "0f.samples.npz"]
        for age, paths in (
            (yesterday, [*(folder / name for name in left), tmp_path / "mine.part"]),
            (time.time(), [folder / f"new{name.replace('/', '_')}" for name in left]),
        ):
            for path in paths:
                path.parent.mkdir(exist_ok=True)
                path.touch()
                os.utime(path, (age, age))
        os.utime(folder / ".build.7.part", (yesterday, yesterday))
        os.utime(folder / "infer.py", (yesterday, yesterday))
        before = set(tmp_path.rglob("*"))
        send_all(device, known, [artifact])
    swept = {*(folder / name for name in left), folder / ".build.7.part"}
    assert before - set(tmp_path.rglob("*")) == swept


def test_times_of_two_artifacts_on_a_device_are_taken_in_turns(tmp_path: Path) -> None:
    artifact, other = tmp_path / "out", tmp_path / "other"
    small_artifact(artifact)
    small_artifact(other, "mobile-arm")
    command = f"benchmark --runs 5 --record --json --device local?dir={tmp_path / 'work'} --against"
    said = enter(command, other, artifact)
    assert said.code == 0, said.err
    result = json.loads(said.out)
    assert [f["path"] for f in result["files"]] == [
        "model.fp32.onnx", "model.int8.onnx", "model.fp32.tflite", "model.fp16.tflite", "model.int8.tflite"
    ]  # fmt: skip
    for file in result["files"]:
        assert file["p50_ms"] <= file["p90_ms"] <= file["p99_ms"]
        assert file["cpu_ms"] > 0 and file["peak_mb"] > 0 and file["runs"] >= 5
    assert {"onnxruntime", "ai-edge-litert"} <= set(
        " ".join(f["where"] for f in result["files"]).replace(",", "").split()
    )
    assert result["device"]["machine"] == os.uname().machine
    assert any(
        r["of"] == "out int8" and r["over"] == "other int8" and r["faster_in"] is not None for r in result["ratios"]
    )
    for folder in (artifact, other):  # each manifest speaks of its own files
        manifest = load_manifest(folder)
        assert [m.precision for m in manifest.measurements] == [f.precision for f in manifest.files]
        assert not any(name in line for line in manifest.advice for name in ("out ", "other "))


def test_a_sustained_run_records_windows(artifact: Path, tmp_path: Path) -> None:
    said = enter(f"benchmark --runs 2 --sustained 0.01 --json --device local?dir={tmp_path}", artifact)
    assert said.code == 0, said.err
    drift = json.loads(said.out)["drift"]
    assert [d["precision"] for d in drift] == ["fp32", "int8"]
    seconds = [w["seconds"] for w in drift[0]["windows"]]
    assert seconds == sorted(seconds) and seconds[-1] >= 0.6
    assert all(w["p50_ms"] > 0 and w["rounds"] > 0 for w in drift[0]["windows"])


def test_a_drift_is_explained_by_clock_and_temperature() -> None:
    def window(i: int, ms: float, clock: float, celsius: float) -> Window:
        return Window(60.0 * i, (1.0, ms), 100, clock, celsius)

    windows = tuple(window(i, 10 if i < 3 else 15, 2400 if i < 3 else 1500, 50 + 4 * i) for i in range(1, 9))
    slow, steady = Drift(None, windows, 1), Drift(None, windows, 0)  # type: ignore[arg-type]
    assert slow.factor == pytest.approx(1.5)
    assert slow.advice("int8") == (
        "int8 takes 15.0 ms after 8.0 minutes without a pause, 1.50 times what it took at first; the clock went from "
        "2400 to 1500 MHz and the temperature from 54 to 82 °C: cool the device, lower its clock for good, or plan "
        "with the sustained figure"
    )
    assert steady.advice("fp32") == ""


def test_what_a_device_found_is_recorded_in_the_manifest(artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    small_artifact(folder)
    np.savez(tmp_path / "eval.npz", x=next(samples(20).batches(20)).inputs["x"],
             y=samples(20).labels)  # fmt: skip
    command = f"benchmark --runs 2 --record --device local?dir={tmp_path / 'work'} --eval {tmp_path / 'eval.npz'}"
    for _ in range(2):  # again gives the same, not the same twice
        said = enter(command, folder)
        assert said.code == 0, said.err
        manifest = load_manifest(folder)
        assert manifest.device is not None and manifest.device.machine == os.uname().machine
        assert [m.precision for m in manifest.measurements] == ["fp32", "int8"]
        answered = [s for s in manifest.scores if "answered on" in s.data]
        assert [s.precision for s in answered] == ["fp32", "int8"] and answered == list(manifest.scores[:2])
        assert [c.name for c in manifest.checks].count(trial.SAME_HERE) == 2
    assert load_intact(folder) == load_manifest(folder)


def test_a_disk_without_room_is_refused_before_anything_is_copied(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for df says that a kilobyte is left."""
    tool = tmp_path / "bin" / "df"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho header; echo disk 100 99 1 99% /\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    said = enter(f"benchmark --device local?dir={tmp_path / 'work'}", artifact)
    assert said.code == 2
    assert "0.0 MB free" in said.err and "?dir=PATH" in said.err
    assert list((tmp_path / "work").rglob("*")) == []


def test_a_disk_with_room_for_the_files_but_not_for_the_samples_is_refused_before_anything_is_copied(
    artifact: Path, tmp_path: Path
) -> None:
    with connect(parse(f"local?dir={tmp_path}")) as device:
        known = replace(read_facts(device), free_mb=0.1)
        with pytest.raises(DeploykitError, match=r"0\.1 MB free in .* needs 0\.2 MB there, 0\.2 of them for samples"):
            send_all(device, known, [artifact], room(samples(800)))
        assert list(tmp_path.iterdir()) == []
        send_all(device, known, [artifact])


def test_scores_of_artifacts_in_folders_of_one_name_are_told_apart() -> None:
    checks = tuple((Check(trial.SAME_HERE, "fp32", 100.0, 96.0, True),) for _ in range(2))
    found = trial.Trial(facts(), None, ((), ()), checks).lines([Path("one/x86"), Path("two/x86")])
    assert [line.partition(" fp32")[0] for line in found] == ["one/x86", "two/x86"]


def test_a_file_that_fails_there_is_an_error_with_the_devices_words(artifact: Path, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text(f'#!/bin/sh\ncase $1 in -) exec {sys.executable} "$@";; esac\necho out of luck >&2; exit 1\n')
    broken.chmod(0o755)
    said = enter(f"benchmark --device local?dir={tmp_path / 'work'}&python={broken}", artifact)
    assert said.code == 2
    assert "running the files of" in said.err and "out of luck" in said.err


def test_labels_that_are_no_classes_are_refused(artifact: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "eval.npz", x=next(samples(5).batches(5)).inputs["x"], y=np.full(5, 9))
    said = enter(f"benchmark --runs 1 --device local?dir={tmp_path / 'work'} --eval", tmp_path / "eval.npz", artifact)
    assert said.code == 2 and "4 classes" in said.err


# ------------------------------------------------------------------ benchmark_model and adb, by stand-ins


def test_the_words_of_benchmark_model_are_understood() -> None:
    old = "count=50 first=112256 curr=111087 min=110425 max=114213 avg=112533 std=778"
    new = (
        "INFO: count=71 first=13801 curr=14061 min=13650 max=15310 avg=14100.7 std=213 p5=13711 median=14042 p95=14565"
    )
    found = run_tflite.parse(
        f"warm-up\ncount=5 first=1 curr=1 min=1 max=1 avg=1 std=0\n{old}\nInference timings in us:"
    )
    assert found == run_tflite.Summary(50, 112.533, None)
    assert run_tflite.parse(new) == run_tflite.Summary(71, pytest.approx(14.1007), 14.042)
    assert run_tflite.parse("ERROR: no such file") is None


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins: an adb whose device is a folder of this machine without Python, and a benchmark_model that makes its
    figures up."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {
        "adb": """
            #!/bin/sh
            # stand-in for adb: the device is this machine
            state=$(cat $STATE); [ "$1" = devices ] && { echo "List of devices attached"; cat $STATE; exit 0; }
            [ "$1" = -s ] && serial=$2 && shift 2
            case $(cat $STATE) in *"$serial"*device) ;; *) echo "error: device '$serial' not found" >&2; exit 1;; esac
            case $1 in
                shell) shift; PATH=$PHONE:/usr/bin:/bin; export PATH; exec sh -c "$*";;
                push) if [ -n "$FULL" ]; then echo "adb: error: failed to copy: No space left on device" >&2; exit 1; fi
                      cp "$2" "$3" && echo "$2: 1 file pushed";;
                pull) cp "$2" "$3" && echo "1 file pulled";;
            esac
            """,
        "phone/python3": "#!/bin/sh\n# stand-in for a device without Python\nexit 127\n",
        "phone/benchmark_model": """
            #!/bin/sh
            # stand-in for benchmark_model: figures are made up
            for a in "$@"; do case $a in --graph=*) [ -f "${a#--graph=}" ] || exit 1;; esac; done
            echo "count=50 first=2000 curr=1000 min=900 max=2000 avg=1100 std=7 p5=950 median=1050 p95=1500"
            """,
    }.items():
        path = tools / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip())
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("PHONE", str(tools / "phone"))
    monkeypatch.setenv("STATE", str(tools / "state"))
    (tools / "state").write_text("R5CT10\tdevice\n")
    return tools / "state"


def test_a_phone_without_python_is_timed_by_benchmark_model(tmp_path: Path, phone: Path) -> None:
    folder = tmp_path / "out"
    small_artifact(folder, "mobile-arm")
    said = enter(f"benchmark --runs 3 --json --device adb://?dir={tmp_path / 'sdcard'}", folder)
    assert said.code == 0, said.err
    result = json.loads(said.out)
    assert [(f["p50_ms"], f["p90_ms"], f["runs"]) for f in result["files"]] == 3 * [(1.05, None, 50)]
    assert result["device"]["address"] == "adb://R5CT10"
    assert not list((tmp_path / "sdcard").rglob("*.part"))


def test_a_phone_without_python_answers_nothing_and_says_why(tmp_path: Path, phone: Path) -> None:
    folder = tmp_path / "out"
    small_artifact(folder, "mobile-arm")
    found = trial.try_out(
        f"adb://R5CT10?dir={tmp_path / 'sdcard'}", [folder], exams=[trial.Exam(samples(4), "four")], runs=3
    )
    assert found.scores == ((),)
    assert all(c.passed is None and "no python3" in c.detail.lower() for c in found.checks[0])


@pytest.mark.parametrize(
    ("state", "address", "said"),
    [
        ("", "adb://", "none is attached"),
        ("A\tdevice\nB\tdevice\n", "adb://", "attached: A, B"),
        ("A\tdevice\n", "adb://B", "no Android device 'B'; attached: A"),
        ("A\tunauthorized\n", "adb://A", "accept this computer's key"),
        ("A\toffline\n", "adb://A", "is offline"),
    ],
)
def test_a_phone_that_cannot_be_used_is_refused(
    artifact: Path, phone: Path, state: str, address: str, said: str
) -> None:
    phone.write_text(state)
    found = enter(f"benchmark --device {address}", artifact)
    assert found.code == 2 and said in found.err


def test_a_full_phone_is_an_error_and_keeps_no_part(
    tmp_path: Path, phone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    small_artifact(folder, "mobile-arm")
    monkeypatch.setenv("FULL", "yes")
    said = enter(f"benchmark --device adb://R5CT10?dir={tmp_path / 'sdcard'}", folder)
    assert said.code == 2 and "No space left on device" in said.err
    assert [p for p in (tmp_path / "sdcard").rglob("*") if p.is_file()] == []


def test_the_runtimes_of_exporters_are_those_of_the_targets() -> None:
    assert {targets.load(n).exporter for n in targets.names()} - {"tensorrt", "c99"} == set(run_infer.RUNTIMES)
