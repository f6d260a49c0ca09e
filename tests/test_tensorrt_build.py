"""build.py, the script that runs on the device. No trtexec runs here, so nothing below says anything about speed."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_artifact import small_artifact
from tensorrt_graphs import hub, samples, small_net

from deploykit import targets
from deploykit.check import sqnr_db
from deploykit.exporters import to_tensorrt
from deploykit.exporters.tensorrt.device import build
from deploykit.exporters.tensorrt.golden import signal_to_noise

SCRIPT = Path(build.__file__)
STATIC: dict[str, Any] = {
    "dynamic": False,
    "batch": [1, 1, 1],
    "inputs": [{"name": "x", "shape": [1, 3, 8, 8], "dtype": "float32"}],
    "models": {
        p: {
            "file": f"model.{p}.onnx",
            "opset": 19 if "fp16" in p else 17,
            "typing": "strong" if "fp16" in p else "weak",
        }
        for p in ("fp32", "fp16", "int8", "int8-fp16")
    },
    "sparsity": True,
    "golden": [{"inputs": {"x": "golden/0.input.0.bin"}, "outputs": {"y": "golden/0.output.0.bin"}}],
}
NANO = {
    **STATIC,
    "models": {p: {"file": f"model.{p}.onnx", "opset": 13, "typing": "weak"} for p in ("fp32", "fp16")},
    "sparsity": False,
}
XAVIER = {
    **STATIC,
    "models": {p: {"file": f"model.{p}.onnx", "opset": 17, "typing": "weak"} for p in ("fp32", "fp16", "int8")},
    "sparsity": False,
}
"""What the exporter writes for boards that have no TensorRT 10."""
DYNAMIC = {**STATIC, "dynamic": True, "batch": [1, 8, 32], "inputs": [{"name": "x", "shape": ["batch", 3, 8, 8]}]}
VERSIONS = {"8.2": (8, 2, 1), "8.5": (8, 5, 2), "8.6": (8, 6, 1), "10.3": (10, 3, 0), "10.13": (10, 13, 0),
            "10.16": (10, 16, 0), "11.4": (11, 4, 0)}  # fmt: skip
RELEASES = {
    "v8502": "8.5",
    "v8601": "8.6",
    "v100300": "10.3",
    "v101300": "10.13",
    "v101600": "10.16",
    "v110400": "11.4",
}
PLANS = {p.variant: p for p in build.PLANS}
COMMON = "--timingCacheFile=build/timing.cache --profilingVerbosity=detailed"

GOLDEN_ARGV = {
    # by hand from the table of trtexec's flags in docs/exporters/tensorrt.md
    ("8.2", "fp16-weak"): f"--fp16 --sparsity=enable --workspace=512 {COMMON} --buildOnly",
    ("8.5", "fp32"): f"--sparsity=enable --memPoolSize=workspace:512 {COMMON} --buildOnly",
    ("8.5", "int8-weak"): f"--int8 --fp16 --sparsity=enable --memPoolSize=workspace:512 {COMMON} --buildOnly",
    ("8.6", "int8-weak"): f"--int8 --fp16 --sparsity=enable --memPoolSize=workspace:512 {COMMON} --skipInference",
    ("10.3", "fp16-weak"): f"--fp16 --sparsity=enable --memPoolSize=workspace:512 {COMMON} --skipInference",
    ("10.3", "int8-fp16"): f"--stronglyTyped --sparsity=enable --memPoolSize=workspace:512 {COMMON} --skipInference",
    ("10.13", "int8-weak"): f"--int8 --fp16 --sparsity=enable --memPoolSize=workspace:512 {COMMON} --skipInference",
    ("10.16", "fp16"): f"--stronglyTyped --sparsity=enable --memPoolSize=workspace:512 {COMMON} --skipInference",
    ("11.4", "fp16"): f"--memPoolSize=workspace:512 {COMMON} --skipInference",
    ("11.4", "int8-fp16"): f"--memPoolSize=workspace:512 {COMMON} --skipInference",
}
LEGAL = {
    "8.2": [],
    "8.5": ["fp32", "fp16-weak", "int8-weak"],
    "8.6": ["fp32", "fp16-weak", "int8-weak"],
    "10.3": ["fp32", "fp16-weak", "fp16", "int8-weak", "int8-fp16"],
    "10.13": ["fp32", "fp16-weak", "fp16", "int8-weak", "int8-fp16"],
    "10.16": ["fp32", "fp16-weak", "fp16", "int8-weak", "int8-fp16"],
    "11.4": ["fp32", "fp16", "int8-fp16"],
}


def test_the_script_is_python_3_6_and_imports_the_standard_library_alone() -> None:
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 6))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names <= set(sys.stdlib_module_names) - {"__future__", "dataclasses"}


@pytest.mark.parametrize(("release", "variant"), GOLDEN_ARGV)
def test_the_build_command_fits_the_release(release: str, variant: str) -> None:
    plan = PLANS[variant]
    argv = build.build_argv("trtexec", VERSIONS[release], plan, STATIC, 512)
    start = ["trtexec", f"--onnx=model.{plan.precision}.onnx", f"--saveEngine=build/{variant}.engine"]
    assert argv == [*start, *GOLDEN_ARGV[release, variant].split()]


@pytest.mark.parametrize("release", LEGAL)
def test_only_variants_the_release_can_build_are_tried(release: str) -> None:
    plans, refused = build.legal_plans(STATIC, VERSIONS[release])
    assert [p.variant for p in plans] == LEGAL[release]
    assert len(plans) + len(refused) == 5


def test_boards_without_strong_typing_build_their_float16_file_with_a_flag() -> None:
    plans, refused = build.legal_plans(XAVIER, (8, 5, 2))
    assert [p.variant for p in plans] == ["fp32", "fp16-weak", "fp16-file", "int8-weak"]
    assert refused == []
    assert "--fp16" in build.build_argv("trtexec", (8, 5, 2), PLANS["fp16-file"], XAVIER, 512)


def test_a_parser_that_takes_no_float16_weights_builds_float16_from_the_float32_file() -> None:
    plans, refused = build.legal_plans(NANO, (8, 2, 1))
    assert [p.variant for p in plans] == ["fp32", "fp16-weak"]
    assert refused == ["fp16-file: TensorRT 8.2.1 has no float16 weights"]


def test_zeros_are_looked_for_only_where_the_gpu_can_skip_them() -> None:
    with_zeros = build.build_argv("trtexec", (10, 3, 0), PLANS["fp32"], STATIC, 512)
    without = build.build_argv("trtexec", (8, 2, 1), PLANS["fp32"], NANO, 512)
    assert "--sparsity=enable" in with_zeros
    assert not any("sparsity" in a for a in without)


def test_a_refused_variant_says_why() -> None:
    _, old = build.legal_plans(STATIC, (8, 2, 1))
    assert "fp32: model.fp32.onnx has ONNX operator set 17, TensorRT 8.2.1 reads up to 13" in old
    assert "fp16: TensorRT 8.2.1 has no strong typing" in old
    _, new = build.legal_plans(STATIC, (11, 4, 0))
    assert new == [f"{v}: TensorRT 11.4.0 has no weak typing" for v in ("fp16-weak", "int8-weak")]


def test_free_batches_get_a_profile_and_run_at_its_best() -> None:
    argv = build.build_argv("trtexec", (10, 3, 0), PLANS["int8-fp16"], DYNAMIC, None)
    assert argv[5:8] == ["--minShapes=x:1x3x8x8", "--optShapes=x:8x3x8x8", "--maxShapes=x:32x3x8x8"]
    assert not any("workspace" in a for a in argv)
    assert "--shapes=x:8x3x8x8" in build.timing_argv("trtexec", PLANS["fp32"], DYNAMIC, 200)
    assert "--shapes=x:8x3x8x8" in build.golden_argv("trtexec", PLANS["fp32"], DYNAMIC, 0)


def test_golden_and_timing_runs_are_apart() -> None:
    golden = build.golden_argv("trtexec", PLANS["int8-weak"], STATIC, 0)
    assert golden == [
        "trtexec", "--loadEngine=build/int8-weak.engine", "--loadInputs=x:golden/0.input.0.bin",
        "--exportOutput=build/int8-weak.output.json", "--iterations=1", "--duration=0", "--warmUp=0",
    ]  # fmt: skip
    timing = build.timing_argv("trtexec", PLANS["int8-weak"], STATIC, 200)
    assert {"--useCudaGraph", "--useSpinWait", "--noDataTransfers", "--iterations=200"} <= set(timing)


@pytest.mark.parametrize(
    ("banner", "version"),
    [("v8201", (8, 2, 1)), ("v8502", (8, 5, 2)), ("v8602", (8, 6, 2)), ("v100300", (10, 3, 0)),
     ("v101602", (10, 16, 2)), ("v110400", (11, 4, 0))],
)  # fmt: skip
def test_the_version_is_read_from_the_banner(banner: str, version: tuple[int, ...]) -> None:
    line = f"&&&& RUNNING TensorRT.trtexec [TensorRT {banner}] [b26] # /usr/src/tensorrt/bin/trtexec --help"
    assert build.tensorrt_version(line) == version


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    target = targets.load("jetson")
    to_tensorrt.export(
        dict.fromkeys(target.precisions, hub(small_net(), target.quant, {"x": samples()})), target, folder
    )
    return folder


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def start(bundle: Path, *arguments: str, python: str = sys.executable, **told: Any) -> subprocess.CompletedProcess[str]:
    """Runs build.py against a fake trtexec that was told what to pretend."""
    place = bundle.parent / "fake"
    place.mkdir(exist_ok=True)
    fake = place / "fake_trtexec"
    source = (Path(__file__).parent / "fake_trtexec.py").read_text()
    fake.write_text(f"#!{sys.executable} -SE\n{source}")  # without site-packages it starts at once
    fake.chmod(0o755)
    (place / "fake.json").write_text(json.dumps({"version": "v100300", "output": "y", **told}))
    command = [python, str(bundle / "build.py"), "--trtexec", str(fake), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=bundle.parent)


def calls(bundle: Path) -> list[list[str]]:
    path = bundle.parent / "fake" / "argv.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("release", RELEASES)
def test_every_release_accepts_every_command_line(bundle: Path, release: str) -> None:
    done = start(bundle, "--workspace-mb", "256", version=release)
    assert done.returncode == 0, done.stdout + done.stderr
    variants = LEGAL[RELEASES[release]]
    assert len(calls(bundle)) == len(variants) * (1 + 8 + 1)  # build, eight golden inputs, timing
    kept = json.loads((bundle / "engine.json").read_text())
    assert [r["variant"] for r in kept["results"]] == variants
    assert (bundle / "model.engine").read_text() == f"fake engine of {kept['variant']}"


def test_a_jetson_nano_builds_what_is_made_for_it(tmp_path: Path) -> None:
    target = targets.load("jetson-nano")
    folder = tmp_path / "nano"
    folder.mkdir()
    to_tensorrt.export(
        dict.fromkeys(target.precisions, hub(small_net(), target.quant, {"x": samples()})), target, folder
    )
    done = start(folder, version="v8201")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped fp16-file: TensorRT 8.2.1 has no float16 weights" in done.stdout
    assert "made for" not in done.stdout
    assert json.loads((folder / "engine.json").read_text())["variant"] == "fp16-weak"


def test_the_whole_way_runs_in_python_3_6(bundle: Path) -> None:
    python = shutil.which("python3.6")
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip("no python3.6 on this machine: only its syntax was checked")
    done = start(bundle, python=python)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (bundle / "engine.json").exists()


def test_the_table_has_a_line_per_variant(bundle: Path) -> None:
    lines = start(bundle).stdout.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("variant"))
    assert lines[head].split() == ["variant", "median", "ms", "p99", "ms", "SNR", "dB", "same", "MB"]
    assert [line.split()[0] for line in lines[head + 1 : head + 6]] == LEGAL["10.3"]


def test_a_fast_variant_with_wrong_outputs_is_not_kept(bundle: Path) -> None:
    done = start(bundle, off={"int8-weak": 0.5})
    assert re.search(r"output y has -?\d+\.\d dB of signal to noise, \d+\.\d at least", done.stdout)
    assert json.loads((bundle / "engine.json").read_text())["variant"] == "int8-fp16"


def test_a_variant_that_fails_to_build_does_not_stop_the_others(bundle: Path) -> None:
    done = start(bundle, broken=["int8-weak"], killed=["int8-fp16"])
    assert done.returncode == 0
    assert "Error[4]: made up (log: build/int8-weak.build.log)" in done.stdout
    assert "killed, probably out of memory: try --workspace-mb" in done.stdout
    assert json.loads((bundle / "engine.json").read_text())["variant"] == "fp16-weak"


def test_nothing_that_answers_as_it_should_ends_with_3_and_keeps_nothing(bundle: Path) -> None:
    done = start(bundle, off={v: 2.0 for v in LEGAL["10.3"]})
    assert done.returncode == 3
    assert "no variant was built that answers as it should" in done.stderr
    assert not (bundle / "model.engine").exists()
    assert not (bundle / "engine.json").exists()


def test_one_variant_can_be_asked_for(bundle: Path) -> None:
    start(bundle, "--only", "fp16")
    assert {a for call in calls(bundle) for a in call if "Engine=" in a} == {
        "--saveEngine=build/fp16.engine",
        "--loadEngine=build/fp16.engine",
    }


@pytest.mark.parametrize("damage", ["change", "delete"])
def test_a_damaged_bundle_is_refused_before_anything_is_built(bundle: Path, damage: str) -> None:
    victim = bundle / "model.int8.onnx"
    if damage == "delete":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-1] + b"!")
    done = start(bundle)
    assert done.returncode == 2
    assert "missing or changed since the export: model.int8.onnx" in done.stderr
    assert calls(bundle) == []


def test_without_trtexec_the_message_says_where_it_comes_from(bundle: Path) -> None:
    command = [sys.executable, str(bundle / "build.py"), "--trtexec", "/nowhere/trtexec"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "trtexec not found (looked for: /nowhere/trtexec)" in done.stderr
    assert "JetPack" in done.stderr


def test_a_release_outside_the_range_is_said(bundle: Path) -> None:
    assert "made for TensorRT 8.5 to 10.16" in start(bundle, version="v110400").stdout


def test_the_shell_script_passes_its_arguments_on(bundle: Path) -> None:
    done = subprocess.run(["sh", str(bundle / "build.sh"), "--trtexec", "/nowhere"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "/nowhere" in done.stderr


# ------------------------------------------------------------------ is the engine right?


def answers(golden: NDArray[Any], found: NDArray[Any]) -> build.Answers:
    """Of an engine with one output ``[n, classes]``, one sample a run."""
    seen = build.Answers({"outputs": [{"name": "y", "shape": [1, golden.shape[1]], "dtype": "float32"}]})
    for g, f in zip(golden.tolist(), found.tolist(), strict=True):
        seen.add({"y": g}, {"y": f})
    return seen


def test_signal_to_noise_is_that_of_all_golden_runs_together() -> None:
    random = np.random.default_rng(0)
    golden = random.normal(size=(8, 10)).astype(np.float32)
    found = golden + 0.1 * random.normal(size=(8, 10)).astype(np.float32)
    expected = sqnr_db(golden, found)
    assert answers(golden, found).snr_db()["y"] == pytest.approx(expected, abs=1e-4)
    runs = [{"y": row[None]} for row in golden], [{"y": row[None]} for row in found]
    others = iter(runs[1])
    assert signal_to_noise(lambda _: next(others), runs[0], runs[0])["y"] == pytest.approx(expected, abs=1e-3)


def test_a_class_that_leads_clearly_must_stay_the_best_however_little_noise_there_is() -> None:
    golden = np.zeros((8, 10), np.float32)
    golden[:, 3] = 10.0  # its lead is as large as the signal
    golden[7, 4] = 9.9  # no lead: either class will do
    close = golden.copy()
    close[7, 3] = 9.8
    assert answers(golden, close).trouble({"y": 20.0}) == "" and answers(golden, close).same() == "7/8"
    turned = golden.copy()
    turned[0, 3], turned[0, 5] = 5.0, 5.5
    assert answers(golden, turned).snr_db()["y"] > 12.0
    assert answers(golden, turned).trouble({"y": 12.0}) == "1 of 8 samples lose a class that leads clearly"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_engine_that_answers_no_number_is_noise_alone(value: float) -> None:
    golden = np.ones((8, 10), np.float32)
    assert "output y has -200.0 dB" in answers(golden, golden * np.float32(value)).trouble({"y": 20.0})


def test_infer_answers_with_the_engine_that_was_kept(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    small_artifact(folder, "jetson", classes=("ant", "bee", "cat", "dog"))
    about = json.loads((folder / "bundle.json").read_text())
    x, y = (np.fromfile(folder / about["golden"][2][side][n], "<f4") for side, n in (("inputs", "x"), ("outputs", "y")))
    np.savez(tmp_path / "x.npz", x=x.reshape(1, *about["inputs"][0]["shape"][1:]))
    command = [
        sys.executable,
        "-I",
        str(folder / "infer.py"),
        str(tmp_path / "x.npz"),
        "--save",
        str(tmp_path / "y.npz"),
    ]
    early = subprocess.run(command, capture_output=True, text=True)
    assert early.returncode == 1 and "run ./build.sh on this device first" in early.stderr
    assert start(folder, golden=str(folder / "golden")).returncode == 0
    path = f"{tmp_path / 'fake'}:{os.environ['PATH']}"
    (tmp_path / "fake" / "trtexec").symlink_to(tmp_path / "fake" / "fake_trtexec")
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "y.npz")["y"][0], y, rtol=1e-6)
    assert done.stdout.splitlines()[1].endswith(("ant", "bee", "cat", "dog")[int(y.argmax())])
