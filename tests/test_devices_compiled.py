"""Artifacts that a device builds first: integer C by its compiler (a real one), TensorRT by trtexec (a stand-in)."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from commands import enter
from small_artifact import small_artifact

from deploykit import targets, trial
from deploykit.bench.there import send_all
from deploykit.core.data import DataSet
from deploykit.core.device import Facts
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import load_manifest
from deploykit.devices import Device, connect, parse, read_facts, run_c99, run_tensorrt
from deploykit.devices.work import Work
from deploykit.exporters import open_artifact
from deploykit.exporters.c99.golden import described, to_integers

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here: apt-get install gcc"
)


def data(count: int) -> DataSet:
    random = np.random.default_rng(0)
    x = random.standard_normal((count, 3, 8, 8)).astype(np.float32)
    return DataSet.of({"x": x}, random.integers(0, 4, count), "samples")


@needs_compiler
@pytest.mark.parametrize("target", ["cortex-m4", "fpga-int8"])
def test_integer_c_is_compiled_there_and_answers_as_here_bit_for_bit(target: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    small_artifact(folder, target)
    samples = data(30)
    found = trial.try_out(
        f"local?dir={tmp_path / 'work'}", [folder], exams=[trial.Exam(samples, "samples")], runs=20
    )  # fmt: skip
    (check,) = found.checks[0]
    assert check.value == 100.0
    answers = open_artifact(folder)(x=next(samples.batches(30)).inputs["x"])["y"]
    (written,) = (tmp_path / "work").rglob("answers/*")
    about = json.loads((folder / "model.json").read_text())["outputs"][0]
    stored = np.frombuffer(written.read_bytes(), np.int8).reshape(30, -1).astype(np.float32)
    assert np.array_equal((stored - about["zero_point"]) * np.float32(about["scale"]), answers)
    (timing,) = found.benchmark.timings if found.benchmark else ()
    assert timing.measurement.runs == 20 and timing.measurement.cpu_ms is not None
    assert "compiled there by" in timing.measurement.where
    assert not list((tmp_path / "work").rglob("*.part")) and not list((tmp_path / "work").rglob("*.samples*"))


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The real compiler under a name and version of ours, which stands in the file that is returned."""
    real = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    tool = tmp_path / "bin" / "cc"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec cat {tool}.version\nexec {real} "$@"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    return Path(f"{tool}.version")


@needs_compiler
def test_answers_of_another_compiler_are_not_taken_for_those_of_this_one(compiler: Path, tmp_path: Path) -> None:
    small_artifact(tmp_path / "out", "cortex-m4")
    address, exam = f"local?dir={tmp_path / 'work'}", trial.Exam(data(3), "samples")
    seen = []
    for version in ("1", "1", "2"):
        compiler.write_text(f"our cc {version}\n")
        trial.try_out(address, [tmp_path / "out"], exams=[exam], time=False)
        (harness,) = (tmp_path / "work").rglob("harness")
        answered = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("answers/*")}
        seen.append((harness.stat().st_mtime_ns, answered))
    assert seen[0] == seen[1]
    assert seen[2][0] > seen[1][0]
    assert len(seen[2][1]) == 2 and seen[2][1].items() > seen[1][1].items()


@needs_compiler
def test_times_of_a_microcontrollers_files_say_what_stands_in_for_it(tmp_path: Path) -> None:
    small_artifact(tmp_path / "out", "cortex-m4")
    said = enter(f"benchmark --runs 10 --record --device local?dir={tmp_path / 'work'}", tmp_path / "out")
    assert said.code == 0, said.err
    mark = f"this machine ({os.uname().machine} stands in for cortex-m4), not the device: "
    assert mark in " ".join(said.out.split())
    assert load_manifest(tmp_path / "out").measurements[0].where.startswith(mark)


def test_pixels_are_taken_as_they_are_from_whole_numbers_of_any_width() -> None:
    port = described(
        {"name": "x", "shape": [1, 3, 2, 2], "order": [0, 2, 3, 1], "batched": True, "dtype": "uint8", "scale": 1.0,
         "zero_point": 0}
    )  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 2, 2))
    expected = pixels.astype(np.uint8).transpose(0, 2, 3, 1).reshape(5, 12).view(np.int8)
    for dtype in (np.uint8, np.int32, np.int64):
        assert np.array_equal(to_integers(port, pixels.astype(dtype)), expected)


@needs_compiler
def test_two_networks_in_c_take_turns(tmp_path: Path) -> None:
    small_artifact(tmp_path / "a", "cortex-m4")
    small_artifact(tmp_path / "b", "fpga-int8")
    found = trial.try_out(f"local?dir={tmp_path / 'work'}", [tmp_path / "a", tmp_path / "b"], runs=20)
    assert found.benchmark is not None
    (ratio,) = found.benchmark.ratios
    assert ratio.time is not None and ratio.faster is not None


@needs_compiler
def test_a_folder_there_is_no_shell_command(tmp_path: Path) -> None:
    small_artifact(tmp_path / "a", "cortex-m4")
    found = trial.try_out(f"local?dir={tmp_path}/$(touch {tmp_path}/entered) work", [tmp_path / "a"], runs=10)
    assert found.benchmark is not None and not (tmp_path / "entered").exists()


@needs_compiler
@pytest.mark.parametrize(
    ("end", "said"), [("echo burst failed >&2; exit 1", "burst failed"), ("exit 0", "of 10 timed")]
)
def test_a_burst_that_fails_in_the_middle_is_an_error(
    end: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two harnesses is a stand-in: its first burst ends so, the others are well."""
    built = run_c99._built

    def replaced(device: Device, facts: Facts, work: Work) -> str:
        compiler = built(device, facts, work)
        if work.local.name == "b":
            harness = Path(work.path("harness"))
            harness.write_text(f"#!/bin/sh\n[ -e begun ] || {{ touch begun; {end}; }}\necho 1000 1000\n")
        return compiler

    monkeypatch.setattr(run_c99, "_built", replaced)
    small_artifact(tmp_path / "a", "cortex-m4")
    small_artifact(tmp_path / "b", "fpga-int8")
    with pytest.raises(DeploykitError, match=said):
        trial.try_out(f"local?dir={tmp_path / 'work'}", [tmp_path / "a", tmp_path / "b"], runs=10)


@needs_compiler
def test_c_that_fails_its_self_test_there_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a compiler that miscompiles: the self-test it builds says FAIL."""
    tool = tmp_path / "bin" / "cc"
    tool.parent.mkdir()
    real = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    tool.write_text(
        textwrap.dedent(
            f"""\
            #!/bin/sh
            case "$*" in *selftest*)
                for a; do [ "$before" = -o ] && out=$a; before=$a; done
                printf "#!/bin/sh\\necho FAIL: 1 of 4 values differ; exit 1\\n" > "$out"
                chmod +x "$out"; exit 0;;
            esac
            exec {real} "$@"
            """
        )
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    small_artifact(tmp_path / "out", "cortex-m4")
    said = enter(f"benchmark --device local?dir={tmp_path / 'work'}", tmp_path / "out")
    assert said.code == 2 and "FAIL: 1 of 4 values differ" in said.err
    assert not list((tmp_path / "work").rglob("harness")) and not list((tmp_path / "work").rglob("*.part"))


@pytest.fixture
def jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A stand-in for trtexec: an engine is a copy of its ONNX file, run by ONNX Runtime; times are made up."""
    tool = tmp_path / "bin" / "trtexec"
    tool.parent.mkdir()
    tool.write_text(
        f"#!{sys.executable}\n"
        + textwrap.dedent(
            """
            # stand-in for trtexec
            import json, shutil, sys
            flags = dict(a.split("=", 1) if "=" in a else (a, "") for a in sys.argv[1:])
            print("&&&& RUNNING TensorRT.trtexec [TensorRT v100300]")
            print("[I] Compute Capability: 8.7")
            if "--saveEngine" in flags:
                shutil.copy(flags["--onnx"], flags["--saveEngine"])
            if "--loadEngine" in flags and "--exportOutput" in flags:
                import numpy as np
                import onnxruntime as ort
                options = ort.SessionOptions()
                options.add_session_config_entry("session.disable_quant_qdq", "1")
                session = ort.InferenceSession(flags["--loadEngine"], options, providers=["CPUExecutionProvider"])
                feed = {}
                for pair, spec in zip(flags["--loadInputs"].split(","), session.get_inputs()):
                    name, path = pair.split(":", 1)
                    shape = [d if isinstance(d, int) else -1 for d in spec.shape]
                    feed[name] = np.fromfile(path, "<f4").reshape(shape)
                found = session.run(None, feed)
                names = [o.name for o in session.get_outputs()]
                with open(flags["--exportOutput"], "w") as file:
                    json.dump([{"name": n, "values": a.ravel().tolist()} for n, a in zip(names, found)], file)
            if "--exportTimes" in flags:
                ms = 1.0 if "int8" in flags["--loadEngine"] else 2.0
                with open(flags["--exportTimes"], "w") as file:
                    json.dump([{"startComputeMs": 1000.0, "computeMs": ms}] * int(flags["--iterations"]), file)
            """
        )
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    profile = targets.load("jetson")
    monkeypatch.setattr("deploykit.bench.there._wrong_machine", lambda facts, exporter, target: "")
    return profile.name


def test_a_bundle_is_built_timed_and_asked_there(jetson: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    small_artifact(folder, jetson)
    found = trial.try_out(
        f"local?dir={tmp_path / 'work'}", [folder], exams=[trial.Exam(data(2), "samples")], runs=7
    )  # fmt: skip
    assert found.benchmark is not None
    measured = {t.file.precision: t.measurement for t in found.benchmark.timings}
    assert set(measured) == {"fp32", "fp16", "int8", "int8-fp16"}
    assert (measured["int8"].p50_ms, measured["fp32"].p50_ms, measured["int8"].runs) == (1.0, 2.0, 7)
    assert "TensorRT 10.3.0, engine int8-weak, GPU time" in measured["int8"].where
    assert [c.value for c in found.checks[0]] == 4 * [100.0]
    assert not list((tmp_path / "work").rglob("*.part")) and not list((tmp_path / "work").rglob("*.samples*"))

    tool = tmp_path / "bin" / "trtexec"
    with connect(parse(f"local?dir={tmp_path / 'work'}")) as device:  # neither its engines nor its answers outlive it
        known = read_facts(device)
        (work,) = send_all(device, known, [folder])
        assert run_tensorrt.computed_by(device, known, work) == "TensorRT 10.3.0"
        assert run_tensorrt._built(device, known, work) is not None
        tool.write_text(tool.read_text().replace("v100300", "v100400"))
        assert run_tensorrt.computed_by(device, known, work) == "TensorRT 10.4.0"
        assert run_tensorrt._built(device, known, work) is None


def test_times_of_another_gpu_than_the_targets_say_so(jetson: str, tmp_path: Path) -> None:
    small_artifact(tmp_path / "out", "gpu-t4")
    said = enter(f"benchmark --runs 3 --json --device local?dir={tmp_path / 'work'}", tmp_path / "out")
    assert said.code == 0, said.err
    places = {f["where"].partition(": ")[0] for f in json.loads(said.out)["files"]}
    assert places == {"this machine (compute capability 8.7 stands in for gpu-t4 (7.5)), not the device"}


def test_an_engine_that_cannot_be_built_is_not_measured_and_says_why(jetson: str, tmp_path: Path) -> None:
    tool = tmp_path / "bin" / "trtexec"
    text = tool.read_text().replace(
        'if "--saveEngine" in flags:',
        'if "--saveEngine" in flags and "--stronglyTyped" in flags:\n    print("[E] made up"); sys.exit(1)\n'
        'if "--saveEngine" in flags:',
    )
    tool.write_text(text)
    folder = tmp_path / "out"
    small_artifact(folder, jetson)
    said = enter(f"benchmark --runs 3 --json --device local?dir={tmp_path / 'work'}", folder)
    assert said.code == 0, said.err
    files = {f["path"]: f for f in json.loads(said.out)["files"]}
    assert files["model.int8-fp16.onnx"]["p50_ms"] is None
    assert "not built on this machine: [E] made up" in files["model.int8-fp16.onnx"]["where"]
    assert files["model.int8.onnx"]["p50_ms"] == 1.0
