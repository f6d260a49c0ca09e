"""What a user sees who does everything right: results on stdout, everything else on stderr, exit codes 0 and 3."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import artifact, enter
from graphs import normal, residual

from deploykit import bench, load, pipeline, targets
from deploykit.bench import timing
from deploykit.core.figures import file_size
from deploykit.core.manifest import load_manifest
from deploykit.report import result_table
from deploykit.show import print_table

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "export", "calibrate", "compress", "benchmark", "plan", "targets", "verify", "diff", "reproduce", "report",
    "explain", "doctor", "demo", "pack", "unpack", "exits",
)  # fmt: skip
NETS = """
import torch
from torch import nn


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(4, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(x)))


def build():
    torch.manual_seed(0)
    return Table()
"""


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolutional net as .onnx, a net for tables as a factory, and data for both."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "net.onnx").write_bytes(residual().bytes)
    (folder / "nets.py").write_text(NETS)
    (folder / "prune.toml").write_text('[[step]]\nname = "sparsify"\nsparsity = 0.5\n')
    np.save(folder / "calib.npy", normal(9, 20, 3, 8, 8))
    np.savez(folder / "test.npz", x=normal(8, 40, 3, 8, 8), y=np.arange(40) % 4)
    np.savez(folder / "table.npz", x=normal(3, 60, 4), y=np.arange(60) % 3)
    wild = normal(2, 40, 4)
    wild[0] *= 1e4
    np.save(folder / "wild.npy", wild)
    return folder


@pytest.fixture(autouse=True)
def at_the_desk(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)


@pytest.fixture
def x86(desk: Path) -> Path:
    """An artifact, made once."""
    if not (desk / "x86").exists():
        said = enter("export net.onnx --target x86 --calib calib.npy --eval test.npz --no-benchmark -o x86")
        assert said.code == 0, said
    return desk / "x86"


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks of five rounds instead of five seconds."""
    real = timing.measure

    def short(folders: Any, samples: Any = None, **options: Any) -> Any:
        return real(folders, samples, **{**options, "runs": 5, "seconds": 0.0, "memory": False})

    monkeypatch.setattr(timing, "measure", short)
    monkeypatch.setattr(bench, "measure", short)


def process(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    how = ["-m", "deploykit"] if code is None else ["-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *how, *arguments], env=environment, capture_output=True, text=True)


# ------------------------------------------------------------------ help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    said = enter(f"{command} --help")
    assert said.code == 0
    assert said.err == ""
    assert re.match(rf"Usage: .+ {command} \[OPTIONS\]", said.out)
    assert len(said.out.splitlines()) > 5


def test_the_help_lists_every_command_with_a_sentence() -> None:
    said = enter("--help")
    assert said.code == 0
    listed = dict(re.findall(r"^  (\w+) +([A-Z].+)$", said.out.partition("Commands:")[2], re.MULTILINE))
    assert tuple(listed) == COMMANDS


def test_deploykit_alone_shows_the_help() -> None:
    said = enter("")
    assert "Usage:" in said.out + said.err
    assert all(command in said.out + said.err for command in COMMANDS)


@pytest.mark.parametrize("arguments", ["--help", "export --help", "targets", "targets jetson", "doctor"])
def test_what_needs_no_model_loads_neither_torch_nor_onnx(arguments: str) -> None:
    ran = process(
        *arguments.split(),
        code="""
import sys
from deploykit.cli import main
try:
    main()
finally:
    print([m for m in ("torch", "onnx", "onnx_ir", "onnxruntime", "onnxscript") if m in sys.modules], file=sys.stderr)
""",
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == "[]\n"


def test_help_takes_less_than_a_third_of_a_second_of_cpu_time() -> None:
    code = """
import resource, subprocess, sys
subprocess.run([sys.executable, "-m", "deploykit", "--help"], check=True, stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime)
"""
    seconds = min(float(process(code=code).stdout) for _ in range(3))
    assert seconds <= 0.3


# ------------------------------------------------------------------ export


def test_an_export_prints_its_table_on_stdout_and_nothing_else(brief: None) -> None:
    said = enter("export net.onnx --target x86 --calib calib.npy --eval test.npz -o timed")
    assert said.code == 0
    assert said.err == ""  # progress is for terminals
    header, *rows = [line.split() for line in said.out.splitlines() if line.strip(" ─")][:4]
    assert [*header[:3], *header[-1:]] == ["target", "precision", "size", "where"]
    assert [row[:2] for row in rows] == [["x86", "original"], ["x86", "fp32"], ["x86", "int8"]]
    assert "this machine" in said.out
    manifest = json.loads(Path("timed/manifest.json").read_text())
    assert all(m["p50_ms"] > 0 and m["runs"] == 5 for m in manifest["measurements"])
    assert set(artifact(Path("timed"))) == {
        "README.md", "golden.npz", "infer.py", "model.fp32.onnx", "model.int8.onnx", "ranges.json",
    }  # fmt: skip


def test_an_export_as_json_is_json_and_nothing_else() -> None:
    said = enter("export net.onnx --target x86 --calib calib.npy --eval test.npz --no-benchmark --json -o as_json")
    assert said.code == 0
    (found,) = json.loads(said.out)
    assert found["target"] == "x86" and found["passed"] is True
    by_precision = {r["precision"]: r for r in found["results"]}
    assert by_precision["int8"]["bytes"] == Path("as_json/model.int8.onnx").stat().st_size
    assert by_precision["int8"]["measurement"] is None  # not measured, never 0


def test_progress_is_shown_on_a_terminal_and_never_on_stdout() -> None:
    code = """
import os, pty, subprocess, sys
leader, follower = pty.openpty()
command = "export net.onnx --target x86 --calib calib.npy --no-benchmark -o terminal"
ran = subprocess.Popen([sys.executable, "-m", "deploykit", *command.split()], stdout=subprocess.PIPE, stderr=follower)
os.close(follower)
shown = b""
try:
    while chunk := os.read(leader, 4096):
        shown += chunk
except OSError:
    pass
print(ran.wait(), b"calibrating" in shown, b"calibrating" in ran.stdout.read())
"""
    assert process(code=code).stdout == "0 True False\n"


def test_a_failed_gate_is_3_names_the_worst_and_still_writes() -> None:
    """One wild sample in the calibration data makes all the others fall on a few integers."""
    command = "export nets.py:build --target x86 --calib wild.npy --eval table.npz --no-benchmark --json -o poor"
    said = enter(command)
    assert said.code == 3
    assert "\ndeploykit: the files were written but failed their checks:\n" in said.err
    assert said.err.startswith("warning: 'x' lies between ")
    assert re.search(r"poor: agrees with the original model \(%\) [\d.]+, bound [\d.]+ \(int8; 60 samples", said.err)
    assert re.search(r"layers that lose most in int8: (hidden|out) \(Gemm, -?[\d.]+ dB\)", said.err)
    assert "--thresholds mse" in said.err
    (found,) = json.loads(said.out)
    assert found["passed"] is False
    assert enter("verify poor").code == 3
    assert {"model.fp32.onnx", "model.int8.onnx"} <= set(artifact(Path("poor")))


def test_without_data_the_float_files_are_written_and_it_is_said_what_is_missing() -> None:
    said = enter("export net.onnx --target mobile-arm --no-benchmark -o floats")
    assert said.code == 0
    assert "no --calib: only float files were written; with sample data int8 files would be added" in said.out
    assert {name for name in artifact(Path("floats")) if name.startswith("model")} == {
        "model.fp32.tflite", "model.fp16.tflite",
    }  # fmt: skip


def test_too_few_samples_to_hold_some_out_is_said() -> None:
    np.save("few.npy", normal(9, 3, 3, 8, 8))
    said = enter("export net.onnx --target x86 --calib few.npy --no-benchmark -o few")
    assert said.code == 0
    assert "the files were not evaluated: give --eval, or at least 5 samples in --calib" in said.out


def test_only_the_precisions_asked_for_are_written() -> None:
    said = enter("export net.onnx --target x86 --calib calib.npy --precision int8 --no-benchmark -o only")
    assert said.code == 0
    assert [name for name in artifact(Path("only")) if name.startswith("model")] == ["model.int8.onnx"]


def test_several_targets_share_one_lowering_and_one_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return call

    for name in ("calibrate", "float_graph"):
        monkeypatch.setattr(pipeline.steps, name, counted(getattr(pipeline.steps, name)))
    said = enter(
        "export net.onnx --target x86 --target mobile-arm --target jetson --calib calib.npy --no-benchmark -o all"
    )
    assert said.code == 0
    assert sorted(calls) == ["calibrate", "float_graph"]
    assert sorted(p.name for p in Path("all").iterdir()) == ["jetson", "mobile-arm", "x86"]
    assert len({Path(f"all/{t}/ranges.json").read_bytes() for t in ("x86", "mobile-arm", "jetson")}) == 1
    for target in ("x86", "mobile-arm", "jetson"):
        assert re.search(rf"^ +{target} +int8 ", said.out, re.MULTILINE)


def test_overwrite_replaces_the_old_artifact() -> None:
    command = "export net.onnx --target x86 --calib calib.npy --no-benchmark -o again"
    assert enter(command).code == 0
    Path("again/of-the-old").touch()
    assert enter(f"{command} --precision int8 --overwrite").code == 0
    assert {"model.int8.onnx", "README.md", "golden.npz", "infer.py", "ranges.json"} == set(artifact(Path("again")))


# ------------------------------------------------------------------ the other commands


def test_ranges_measured_once_give_the_same_files_as_measuring_again(x86: Path) -> None:
    said = enter("calibrate net.onnx --calib calib.npy -o ranges.json")
    assert said.code == 0 and re.match(r"ranges.json: \d+ tensors on \d+ samples\n", said.out)
    command = "export net.onnx --target x86 --calib calib.npy --eval calib.npy --no-benchmark"
    assert enter(f"{command} -o measured").code == 0
    assert enter(f"{command} --ranges ranges.json -o given").code == 0
    assert artifact(Path("given")) == artifact(Path("measured"))


def test_ranges_are_enough_for_integer_files() -> None:
    assert enter("calibrate net.onnx --calib calib.npy --thresholds mse -o histograms.json").code == 0
    said = enter("export net.onnx --target x86 --ranges histograms.json --thresholds mse --no-benchmark -o no_data")
    assert said.code == 0
    assert "model.int8.onnx" in artifact(Path("no_data"))
    assert "not evaluated" in said.out


def test_a_compressed_folder_is_a_model() -> None:
    said = enter("compress nets.py:build --recipe prune.toml --calib table.npz -o small")
    assert said.code == 0 and said.out.startswith("small: Sparsify(sparsity=0.5")
    small: Any = load("small")
    weights = [small.hidden.weight, small.out.weight]
    zeros = sum(int((w == 0).sum()) for w in weights)
    assert zeros == sum(w.numel() for w in weights) // 2
    said = enter("export small --target mobile-arm --calib table.npz --no-benchmark -o from_small")
    assert said.code == 0
    assert "model.int8.tflite" in artifact(Path("from_small"))


def test_verify_says_what_was_checked(x86: Path) -> None:
    said = enter("verify x86")
    assert said.code == 0
    assert all(line.startswith("ok ") for line in said.out.splitlines())
    assert re.search(r"^ok +export +int8 +agrees with the original model \(%\): \d", said.out, re.MULTILINE)
    assert json.loads(enter("verify x86 --json").out)["problems"] == []


def test_report_prints_where_it_is(x86: Path) -> None:
    said = enter("report x86")
    assert (said.code, said.out, said.err) == (0, "x86/report.html\n", "")
    assert Path("x86/report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert enter("verify x86").code == 0  # a report beside the files changes nothing


def test_benchmark_prints_a_table_or_json(x86: Path, brief: None) -> None:
    said = enter("benchmark x86")
    assert said.code == 0
    assert re.search(r"^ +int8 / fp32 ", said.out, re.MULTILINE)
    found = json.loads(enter("benchmark x86 --against x86 --json").out)
    assert [f["precision"] for f in found["files"]] == ["fp32", "int8", "fp32", "int8"]
    assert all(f["p50_ms"] > 0 for f in found["files"])


def test_folders_side_by_side_are_timed_in_one_run(x86: Path, brief: None) -> None:
    found = json.loads(enter("benchmark x86 x86 --json").out)
    assert [f["precision"] for f in found["files"]] == ["fp32", "int8", "fp32", "int8"]


def test_a_narrow_terminal_shows_every_name_and_size_in_full(
    x86: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    manifest = replace(load_manifest(x86), target="jetson-agx-xavier")
    print_table(result_table([(x86, manifest)]))
    lines = capsys.readouterr().out.splitlines()
    sizes = [file_size(f.size(x86)) for f in manifest.files]
    assert max(map(len, lines)) <= 80
    assert all(any(line.startswith(f"jetson-agx-xavier {p}") and s in line for line in lines)
               for p, s in zip(("fp32", "int8"), sizes, strict=True))  # fmt: skip
    assert "[1] not measured" in [line.strip() for line in lines]


def test_plan_says_which_steps_apply_and_why_the_others_do_not() -> None:
    said = enter("plan nets.py:build --target x86 --calib calib.npy")
    assert said.code == 0
    lines = {line.split("(")[0].strip(): line for line in said.out.splitlines()[2:]}
    assert lines["+ equalize"] and lines["+ weight_correct"]
    assert "pays where unstructured or small_file does" in lines["- sparsify"]
    assert "needs --train" in lines["- qat"]
    assert "works on the model" in enter("plan net.onnx --target mobile-arm").out


def test_plan_takes_it_that_training_data_has_labels() -> None:
    found = json.loads(enter("plan nets.py:build --target x86 --train train.npz --json").out)
    (step,) = [f for f in found if f["step"].startswith("self_distill")]
    assert step["applies"] and "labels" in step["needs"]


def test_plan_of_a_recipe_lists_its_steps_in_order() -> None:
    Path("steps.toml").write_text('[[step]]\nname = "equalize"\n[[step]]\nname = "qat"\nsteps = 5\n')
    found = json.loads(enter("plan --target x86 --recipe steps.toml --json").out)
    assert [(f["step"].split("(")[0], f["applies"]) for f in found] == [
        ("Equalize", True), ("WeightCorrect", True), ("Qat", True),
    ]  # fmt: skip


def test_targets_are_listed_and_each_has_a_card() -> None:
    said = enter("targets")
    assert said.code == 0
    families = {line for line in said.out.splitlines() if not line.startswith(" ")}
    assert families == {targets.load(name).exporter for name in targets.names()}
    assert sorted(line.split()[0] for line in said.out.splitlines() if line.startswith(" ")) == targets.names()
    card = enter("targets jetson").out
    assert card.startswith("jetson: NVIDIA Jetson")
    assert "exporter tensorrt" in card and "8 bit signed symmetric, float scales, at the inputs of products" in card
    assert re.search(r"timed here +no: only on the device", card)
    columns = {len(found[0]) for line in card.splitlines()[1:] if (found := re.match(r"  \w+( \w+)* {2,}", line))}
    assert len(columns) == 1
    assert "not verified" in card
    (found,) = json.loads(enter("targets jetson --json").out)
    assert found["quant"]["placement"] == "linear_inputs"


def test_a_card_says_which_facts_are_another_targets() -> None:
    card = {line.split()[0]: line for line in enter("targets jetson-orin-nx").out.splitlines()}
    assert "as jetson-orin-nano" in card["compute_capability"]
    assert "as " not in card["memory_bandwidth"]
    nano = enter("targets jetson-nano").out
    assert re.search(r"int8 +no  \(.*needs compute capability 6\.1", nano)
    assert "activations" not in nano and "weights" not in nano


def test_a_target_of_the_users_own_is_a_file() -> None:
    Path("my-board.toml").write_text('extends = "x86"\ntitle = "My board"\n[quant]\nweight_bits = 7\n')
    assert re.search("weights +7 bit", enter("targets my-board.toml").out)
    said = enter("export net.onnx --target my-board.toml --calib calib.npy --no-benchmark -o board")
    assert said.code == 0
    assert json.loads(Path("board/manifest.json").read_text())["target"] == "my-board"


def test_the_version_is_that_of_the_package() -> None:
    assert enter("--version").out == f"deploykit {version('deploykit')}\n"


def test_an_interrupted_command_says_that_nothing_is_half_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(targets, "names", interrupted)
    said = enter("targets")
    assert (said.code, said.out) == (130, "")
    assert said.err == "\ndeploykit: interrupted; nothing was left half-written\n"


def test_calibrate_and_compress_answer_in_json_too() -> None:
    found = json.loads(enter("calibrate net.onnx --calib calib.npy --json -o again.json").out)
    assert found["out"] == "again.json" and found["tensors"] > 3 and found["samples"] > 3
    said = enter("compress nets.py:build --recipe prune.toml --calib table.npz --json -o half")
    found = json.loads(said.out)
    assert found["out"] == "half" and [step.split(",")[0] for step in found["steps"]] == ["Sparsify(sparsity=0.5"]


def test_doctor_names_what_is_installed() -> None:
    said = enter("doctor")
    assert said.code == 0
    assert re.search(r"^onnxruntime +\d", said.out, re.MULTILINE)
    found = {f["name"]: f["found"] for f in json.loads(enter("doctor --json").out)["packages"]}
    assert found["numpy"] == np.__version__


def test_a_reader_that_stops_early_gets_no_traceback() -> None:
    code = """
import subprocess, sys
writer = subprocess.Popen([sys.executable, "-m", "deploykit", "targets", "--json"],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
writer.stdout.close()
print(writer.stderr.read().decode())
"""
    assert process(code=code).stdout.strip() == ""


@pytest.mark.slow
def test_the_demo_trains_exports_and_reports(tmp_path: Path) -> None:
    said = enter(f"demo -o {tmp_path / 'demo'} --json")
    assert said.code == 0, said.err
    assert (tmp_path / "demo" / "report.html").is_file() and (tmp_path / "demo" / "x86" / "report.html").is_file()
    found = json.loads(said.out)
    assert [f["target"] for f in found] == ["x86", "x86-openvino", "mobile-arm", "jetson", "cortex-m4", "fpga-int8"]
    for entry in found:
        scores = {r["precision"]: r["accuracy"] for r in entry["results"]}
        assert scores["original"] > 95
        assert scores["int8"] > scores["original"] - 1
