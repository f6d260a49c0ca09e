"""Everything a user can get wrong: what was done, what is said. Exit code 2, no traceback, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bad_desk import GOOD, lay_desk, refused
from commands import contents
from conftest import TinyCNN
from graphs import normal

from deploykit import export
from deploykit.core.errors import DeploykitError


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_desk(tmp_path_factory.mktemp("desk"))


# what the user wrote behind `deploykit export`, and what is said
EXPORT: dict[str, tuple[str, ...]] = {
    # targets
    "net.onnx --calib calib.npy": ("Missing option '--target'", "export --help"),
    "net.onnx --calib calib.npy --target jetsn": ("no target 'jetsn'", "Did you mean 'jetson'?", "gpu-t4, "),
    "net.onnx --calib calib.npy --target my.toml": ("no file my.toml",),
    "net.onnx --calib calib.npy --target typo.toml": ("target typo.toml, extends", "Did you mean 'x86'?"),
    "net.onnx --calib calib.npy --target exporter.toml": ("no exporter 'onxx'", "Did you mean 'onnx'?"),
    "net.onnx --calib calib.npy --target key.toml": ("no key 'profit'", "Did you mean 'profits'?"),
    "net.onnx --calib calib.npy --target bits.toml": ("target bits.toml", "weight_bits", "between 2 and 8"),
    "net.onnx --calib calib.npy --target files.toml": ("target files.toml", "precisions must name at least one"),
    "net.onnx --calib calib.npy --target options.toml": ("target options", "no options", "delegate"),
    f"net.onnx {GOOD} --target x86": ("--target x86 is given twice",),
    "net.onnx --calib calib.npy --target typo": ("no target 'typo', but there is a file: --target typo.toml",),
    # passes and options
    f"net.onnx {GOOD} --recipe pass.toml": ("no pass 'sparsfy'", "Did you mean 'sparsify'?"),
    f"net.onnx {GOOD} --recipe option.toml": ("step 'sparsify': no key 'sparsty'", "Did you mean 'sparsity'?"),
    f"net.onnx {GOOD} --recipe missing.toml": ("step 'sparsify'", "missing required field `sparsity`"),
    f"net.onnx {GOOD} --recipe range.toml": ("step 'sparsify'", "between 0 and 1", "given 1.5"),
    f"net.onnx {GOOD} --recipe type.toml": ("step 'sparsify'", "Expected `float`, got `str`"),
    f"net.onnx {GOOD} --recipe broken.toml": ("broken.toml is not valid TOML", "line 1"),
    f"net.onnx {GOOD} --recipe train.toml": ("train.toml [train]", "above 0"),
    f"net.onnx {GOOD} --recipe goood.toml": ("no file goood.toml", "Did you mean 'good.toml'?"),
    f"net.onnx {GOOD} --recipe order.toml": (
        "'equalize' works on the graph", "cannot come after 'qat'", "model, graph, hub",
    ),
    f"nets.py:build {GOOD} --recipe late.toml": ("'sparsify' works on the model", "cannot come after 'equalize'"),
    f"nets.py:build {GOOD} --recipe good.toml": (
        "step Sparsify(sparsity=0.5", "cannot pay on target 'x86'", "unstructured or small_file", "--force runs it",
    ),
    f"net.onnx {GOOD} --recipe good.toml --force": ("step Sparsify(", "works on the model", "give file.py:factory"),
    f"nets.py:build {GOOD} --recipe qat.toml": ("needs --train",),
    f"net.onnx {GOOD} --taget x86": ("No such option: --taget", "--target"),
    f"net.onnx {GOOD} --thresholds kl": ("no threshold method 'kl'", "Known: entropy, minmax"),
    f"net.onnx {GOOD} --precision int4": ("no precision 'int4'", "Did you mean 'int8'?"),
    f"net.onnx {GOOD} --precision int8-fp16": (
        "target 'x86' does not take int8-fp16 (ONNX Runtime's kernels", "The nearest is --precision int8",
    ),
    "net.onnx --calib calib.npy --target jetson-nano --precision int8": (
        "target 'jetson-nano' does not take int8", "INT8 needs compute capability 6.1", "nearest is --precision fp16",
    ),
    f"net.onnx {GOOD} --keep-float stem": ("no layer 'stem'", "Known: a, b"),
    f"net.onnx {GOOD} --threads 0": ("Invalid value for '--threads'",),
    f"net.onnx {GOOD} --seed -1": ("Invalid value for '--seed'",),
    f"net.onnx {GOOD} --mean red": ("--mean takes numbers separated by commas", "'red'"),
    f"net.onnx {GOOD} --preprocess preprocess.toml": ("no key 'meen'", "Did you mean 'mean'?"),
    # models
    f"ned.onnx {GOOD}": ("no file ned.onnx", "Did you mean 'net.onnx'?"),
    f"resnet {GOOD}": ("no file or folder 'resnet'", "file.py:factory"),
    f"nets.py {GOOD}": ("name the function that makes the model too", "nets.py:build"),
    f"nets.py {GOOD} --weights wrong.safetensors": ("name the function that makes the model too", "nets.py:build"),
    f"wrong.safetensors {GOOD}": ("holds weights, not a model", "--weights wrong.safetensors"),
    f"half.onnx {GOOD}": ("half.onnx is not a valid ONNX model",),
    f"void.onnx {GOOD}": ("void.onnx is empty: export the model again",),
    f"program.pt2 {GOOD}": ("program.pt2 is damaged or no exported program",),
    f"artifact/model.int8.onnx {GOOD}": ("already quantized", "starts from the float model"),
    f"four.onnx {GOOD}": ("takes exactly 4 samples at once", "free batch dimension"),
    f"artifact {GOOD}": ("no structure.json", "MODEL is what goes in"),
    f"net.py:build {GOOD}": ("no file net.py", "Did you mean 'nets.py'?"),
    f"nets.py:biuld {GOOD}": ("no factory 'biuld'", "Did you mean 'build'?"),
    f"nopackage.nets:build {GOOD}": ("'nopackage.nets' cannot be imported", "No module named 'nopackage'"),
    f"broken.py:build {GOOD}": ("broken.py cannot be imported", "SyntaxError", "line 3"),
    f"nets.py:raises {GOOD}": ("nets.py:raises raised RuntimeError: weights not downloaded", "nets.py, line "),
    f"nets.py:leaves {GOOD}": ("nets.py:leaves raised SystemExit", "nets.py, line "),
    f"nets.py:nothing {GOOD}": ("returned None, no nn.Module",),
    f"nets.py:with_arguments {GOOD}": ("needs arguments (classes)", "def build(): return with_arguments(classes=...)"),
    f"nets.py:nested {GOOD}": ("returns dict", "a flat tuple or dict of tensors, is needed"),
    f"nets.py:failing {GOOD}": ("forward fails on the sample inputs (x (2, 3, 8, 8)", "ValueError: no such thing"),
    f"nets.py:undecided {GOOD}": ("torch cannot export this model", "data-dependent", "if x.sum() > 0:"),
    f"nets.py:inverse {GOOD}": ("erf_inv", "it has no ONNX form (nets.py, line ", ": return torch.erfinv(x))\n"),
    "nets.py:build --target x86 --calib last.npy": ("'x' looks like channels-last", "transpose them to [n, c, h, w]"),
    # weights
    f"nets.py:build {GOOD} --weights w.safetensors": ("no file w.safetensors",),
    f"nets.py:build {GOOD} --weights wrong.safetensors": (
        "wrong.safetensors does not fit nets.py:build", "missing: conv.bias", "not in the model: tail.bias",
        "wrong shape: head.weight (7, 4) instead of (4, 4)",
    ),
    f"nets.py:build {GOOD} --weights damaged.safetensors": ("damaged or no safetensors file",),
    f"nets.py:build {GOOD} --weights pickle.pt": (
        "holds more than weights (conftest.TinyCNN)", "would run code", "torch.save(model.state_dict(), ...)",
    ),
    f"nets.py:build {GOOD} --weights list.pt": ("list.pt holds list; expected a state dict",),
    f"net.onnx {GOOD} --weights wrong.safetensors": ("net.onnx brings its own weights", "leave out --weights"),
    # data
    "net.onnx --target x86 --calib calb.npy": ("no file calb.npy", "Did you mean 'calib.npy'?"),
    "net.onnx --target x86 --calib net.onnx": ("expected a folder of images, a .npy, a .npz or file.py:loader",),
    "net.onnx --target x86 --calib empty.npy": ("calibration data empty.npy", "not a single sample"),
    "net.onnx --target x86 --calib one.npy": ("1 sample; at least 2 are needed",),
    "net.onnx --target x86 --calib corrupt.npy": ("calibration data corrupt.npy: damaged",),
    "net.onnx --target x86 --calib objects.npy": ("objects.npy", "Python objects instead of arrays"),
    "net.onnx --target x86 --calib large.npy": ("'x' has samples [3, 9, 9], the model takes [3, 8, 8]",),
    "net.onnx --target x86 --calib last.npy": ("[8, 8, 3]", "array.transpose(0, 3, 1, 2)"),
    "net.onnx --target x86 --calib grey.npy": ("[1, 8, 8]", "These are grey", "array.repeat(3, axis=1)"),
    "net.onnx --target x86 --calib pixels.npy": ("'x' is uint8, the model takes float32", "declare [preprocess]"),
    "net.onnx --target x86 --calib pixels.npy --crop 8": ("These are grey: set channels = 'L'",),
    "net.onnx --target x86 --calib greys --preprocess grey_preprocess.toml": (
        "'x' has samples [1, 8, 8], the model takes [3, 8, 8]", "Set channels = 'RGB'",
    ),
    "net.onnx --target x86 --calib double.npy": ("'x' is float64", "array.astype('float32')"),
    "net.onnx --target x86 --calib nan.npy": ("nan.npy: sample 3: 'x' holds NaN",),
    "net.onnx --target x86 --calib inf.npy": ("inf.npy: sample 3: 'x' holds inf",),
    "net.onnx --target x86 --calib constant.npy": ("all 10 samples are identical", "nothing can be learned"),
    "net.onnx --target x86 --calib input.npz": ("no input 'z'", "Known: x"),
    "net.onnx --target x86 --calib no_images": ("the folder holds no images",),
    "net.onnx --target x86 --calib text": ("text/a.txt is not an image",),
    "net.onnx --target x86 --calib damaged": ("damaged/2.png is damaged",),
    "net.onnx --target x86 --calib deep": ("more than 8 bits per channel",),
    "net.onnx --target x86 --calib nets.py:build": ("Net is no data", "expected a DataLoader"),
    f"net.onnx {GOOD} --eval evl.npz": ("no file evl.npz",),
    f"net.onnx {GOOD} --eval labels.npz": ("labels.npz: sample 4 has label 4", "the model has 4 classes, 0..3"),
    f"net.onnx {GOOD} --eval from_one.npz": ("sample 3 has label 4", "They seem to start at 1: subtract 1"),
    f"net.onnx {GOOD} --eval negative.npz": ("sample 1 has label -1",),
    f"net.onnx {GOOD} --eval masks.npz": ("labels must be class numbers, int64 [10]", "need a metric"),
    f"net.onnx {GOOD} --eval few.npz": ("same length", "'labels': 9"),
    "net.onnx --target x86 --calib labels.npz": ("labels.npz: sample 4 has label 4",),
    f"net.onnx {GOOD} --train calb.npy": ("no file calb.npy",),
    f"net.onnx {GOOD} --metric nets.py:metrik": ("no metric 'metrik'", "Did you mean 'metric'?"),
    f"net.onnx {GOOD} --metric nets.py:metric": ("the metric raised KeyError", "nets.py, line "),
    f"net.onnx {GOOD} --metric nets.py:no_number": ("the metric returned str", "a number is expected"),
    "net.onnx --target x86 --precision int8": ("target 'x86': int8 needs sample data; give --calib",),
    "nets.py:build --target x86": ("what does 'x' look like?", "--calib", "--input x=1x3x224x224"),
    "nets.py:build --target cortex-m4": ("target 'cortex-m4': int8 needs sample data; give --calib",),
    "nets.py:build --target x86 --calib one_image.npy": (
        "3 samples of 'x', each 8 x 8. If that is one image, the axis of the samples is missing",
    ),
    f"net.onnx {GOOD} --max-drop -5": ("--max-drop -5",),
    "nets.py:build --target x86 --input x=1x3": ("forward fails on the sample inputs (x (2, 3)",),
    "nets.py:build --target x86 --input image=1x3x8x8": ("forward takes x", "missing: x"),
    "nets.py:build --target x86 --input x=0x3x8x8": ("--input takes NAME=1x3x224x224", "x=0x3x8x8"),
    "nets.py:build --target x86 --input x=1x3x8x8:flaot32": ("no dtype 'flaot32'", "Did you mean 'float32'?"),
    "net.onnx --target x86 --input image=1x3x8x8": ("no input 'image'", "Known: x"),
    # ranges
    f"net.onnx {GOOD} --ranges rages.json": ("no file rages.json",),
    f"net.onnx {GOOD} --ranges foreign.json": ("foreign.json is not a ranges file",),
    f"net.onnx {GOOD} --ranges other.json": ("measured on another graph", "Leave --ranges out"),
    f"net.onnx {GOOD} --ranges minmax.json --thresholds mse": ("no histograms", "calibrate"),
    # operators
    "odd.onnx --target mobile-arm --calib calib.npy": (
        "cannot be written as .tflite", "b (Sin)", "c (Erf)", "d (Mish)", "y (CenterCropPad)", "Change these operators",
    ),
    "odd.onnx --target jetson --calib calib.npy": (
        "ONNX operator set 17", "CenterCropPad (layer 'y') is defined since 18", "Change these operators",
    ),
    "odd.onnx --target x86 --target mobile-arm --calib calib.npy": ("cannot be written as .tflite",),
}  # fmt: skip


@pytest.mark.parametrize("command", EXPORT)
def test_a_wrong_export_says_what_is_wrong_and_leaves_nothing(here: Path, command: str) -> None:
    refused(f"export {command} --no-benchmark -o out", *EXPORT[command])


# what the user wrote behind `deploykit`, and what is said
COMMANDS: dict[str, tuple[str, ...]] = {
    "exprot net.onnx": ("No such command 'exprot'", "Did you mean 'export'?"),
    "calibrate net.onnx": ("Missing option '--calib'",),
    "calibrate net.onnx --calib nan.npy": ("sample 3: 'x' holds NaN",),
    "calibrate net.onnx --calib calib.npy --thresholds ms": ("no threshold method 'ms'", "Did you mean 'mse'?"),
    "calibrate net.onnx --calib calib.npy -o other.json": ("other.json already exists", "--overwrite"),
    "calibrate net.onnx --calib calib.npy -o calib.npy/ranges.json": ("cannot write", "ranges.json"),
    "compress nets.py:build --calib calib.npy": (
        "give --target, or one of deep_compression, dsd, prune, small_file, sparse_2_4",
    ),
    "compress nets.py:build --calib calib.npy --recipe god.toml": ("no file god.toml", "Did you mean 'good.toml'?"),
    "compress nets.py:build --calib calib.npy --recipe qat.toml": ("runs model-stage steps", "Use `deploykit export`"),
    "compress nets.py:build --recipe good.toml": ("what does 'x' look like?",),
    "compress net.onnx --calib calib.npy --recipe good.toml": ("net.onnx holds no PyTorch module",),
    "compress nets.py:build --calib calib.npy --recipe good.toml -o artifact": ("artifact already exists",),
    "plan --target jetsn": ("no target 'jetsn'", "Did you mean 'jetson'?"),
    "plan ned.onnx --target x86": ("no file ned.onnx", "Did you mean 'net.onnx'?"),
    "plan nets.py:biuld --target x86": ("no factory 'biuld'",),
    "plan --target x86 --recipe order.toml": ("cannot come after 'qat'",),
    "targets jetsn": ("no target 'jetsn'", "Did you mean 'jetson'?"),
    "targets jetsn --json": ("no target 'jetsn'",),
    "verify": ("Missing argument",),
    "verify nowhere": ("no folder nowhere", "`deploykit export`"),
    "verify net.onnx": ("no folder net.onnx",),
    "verify tidy": ("tidy has no manifest.json", "not an artifact"),
    "report tidy": ("tidy has no manifest.json", "not an artifact"),
    "report artifact nowhere": ("no folder nowhere",),
    "report net.onnx": ("no folder net.onnx",),
    "report artifact -o net.onnx": ("net.onnx exists and is not a report",),
    "report nowhere": ("no folder nowhere",),
    "benchmark nowhere": ("no folder nowhere",),
    "benchmark artifact --against nowhere": ("no folder nowhere",),
    "benchmark artifact --runs 0": ("Invalid value for '--runs'",),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_command_says_what_is_wrong_and_leaves_nothing(here: Path, command: str) -> None:
    refused(command, *COMMANDS[command])


# ------------------------------------------------------------------ extras that are not installed


@pytest.mark.parametrize(
    ("hidden", "command", "phrases"),
    [
        (
            ("ai_edge_litert", "ai_edge_litert.interpreter", "tflite_runtime", "tflite_runtime.interpreter"),
            "export net.onnx --target mobile-arm --calib calib.npy -o out",
            (".tflite files needs the extra 'tflite'", "pip install 'deploykit[tflite]'"),
        ),
        (
            ("accelerate",),
            "export nets.py:build --target x86 --calib calib.npy --train calib.npy --recipe qat.toml -o out",
            ("training needs the extra 'train'", "pip install 'deploykit[train]'"),
        ),
        (("jinja2",), "report artifact", ("report.html needs the extra 'report'", "deploykit[report]")),
        (("sklearn", "sklearn.datasets"), "demo -o out", ("demo's data needs the extra 'demo'", "deploykit[demo]")),
    ],
)
def test_an_extra_that_is_not_installed_is_named(
    here: Path, monkeypatch: pytest.MonkeyPatch, hidden: tuple[str, ...], command: str, phrases: tuple[str, ...]
) -> None:
    for module in hidden:
        monkeypatch.setitem(sys.modules, module, None)
    refused(command, *phrases)


# ------------------------------------------------------------------ from Python


def test_a_model_in_training_mode_is_refused(tiny_cnn: TinyCNN, tmp_path: Path) -> None:
    with pytest.raises(DeploykitError, match=r"training mode: call \.eval\(\) first"):
        export(tiny_cnn.train(), "x86", normal(0, 8, 3, 16, 16), out=tmp_path / "out")
    tiny_cnn.eval().norm.train()
    with pytest.raises(DeploykitError, match=r"'norm' \(BatchNorm2d\) is in training mode"):
        export(tiny_cnn, "x86", normal(0, 8, 3, 16, 16), out=tmp_path / "out")
    assert contents(tmp_path) == {}


def test_python_data_that_is_wrong_says_which_role_it_had(tiny_cnn: TinyCNN, tmp_path: Path) -> None:
    with pytest.raises(DeploykitError, match="eval data: sample 0: 'x' holds NaN"):
        export(tiny_cnn, "x86", normal(0, 8, 3, 16, 16), evaluation=np.full((4, 3, 16, 16), np.nan, np.float32))


# ------------------------------------------------------------------ as a process


@pytest.mark.parametrize(
    ("command", "phrase"),
    [
        ("export net.onnx --target jetsn --calib calib.npy -o out", "Did you mean 'jetson'?"),
        ("export net.onnx --target x86 --calib nan.npy -o out", "sample 3: 'x' holds NaN"),
        ("verify tidy", "tidy has no manifest.json"),
    ],
)
def test_a_process_ends_with_2_and_one_message(desk: Path, command: str, phrase: str) -> None:
    before = contents(desk)
    root = Path(__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, "-m", "deploykit", *command.split()],
        cwd=desk, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.startswith("deploykit: ") and ran.stderr.count("\n") == 1
    assert phrase in ran.stderr
    assert contents(desk) == before
