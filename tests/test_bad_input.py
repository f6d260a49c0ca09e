"""Everything a user can get wrong: what was done, what is said. Exit code 2, no traceback, nothing left behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from commands import Said, contents, enter
from conftest import TinyCNN
from graphs import conv_relu_conv, graph, normal, residual
from PIL import Image
from safetensors.torch import save_file

from deploykit import export, targets
from deploykit.core.errors import DeploykitError
from deploykit.core.target import QuantSpec
from deploykit.exporters import to_tflite
from deploykit.exporters.tflite import runner
from deploykit.hub.graph import Hub

FACTORIES = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


class Nested(Net):
    def forward(self, x):
        return {"boxes": [x]}


class Undecided(Net):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


class Inverse(Net):
    def forward(self, x):
        return torch.erfinv(x)


class Failing(Net):
    def forward(self, x):
        raise ValueError("no such thing")


def build():
    return Net()


def raises():
    raise RuntimeError("weights not downloaded")


def leaves():
    raise SystemExit(0)


def nothing():
    return None


def with_arguments(classes):
    return Net()


def nested():
    return Nested()


def undecided():
    return Undecided()


def failing():
    return Failing()


def inverse():
    return Inverse()


def metric(outputs, labels):
    raise KeyError("scores")


def no_number(outputs, labels):
    return "good"
"""

RECIPES = {
    "good.toml": '[[step]]\nname = "sparsify"\nsparsity = 0.5\n',
    "pass.toml": '[[step]]\nname = "sparsfy"\nsparsity = 0.5\n',
    "option.toml": '[[step]]\nname = "sparsify"\nsparsty = 0.5\n',
    "missing.toml": '[[step]]\nname = "sparsify"\n',
    "range.toml": '[[step]]\nname = "sparsify"\nsparsity = 1.5\n',
    "type.toml": '[[step]]\nname = "sparsify"\nsparsity = "half"\n',
    "broken.toml": '[[step]\nname = "sparsify"\n',
    "order.toml": '[[step]]\nname = "qat"\n[[step]]\nname = "equalize"\n',
    "late.toml": '[[step]]\nname = "equalize"\n[[step]]\nname = "sparsify"\nsparsity = 0.5\n',
    "qat.toml": '[[step]]\nname = "qat"\nsteps = 1\n',
    "train.toml": "[train]\nepochs = 0\n",
    "none.toml": "",
}

TARGETS = {
    "typo.toml": 'extends = "x68"\n',
    "exporter.toml": 'extends = "x86"\nexporter = "onxx"\n',
    "key.toml": 'extends = "x86"\nprofit = ["int8"]\n',
    "bits.toml": 'extends = "x86"\n[quant]\nweight_bits = 9\n',
    "files.toml": 'extends = "x86"\nprecisions = []\n',
    "options.toml": 'extends = "mobile-arm"\n[options]\ndelegate = "gpu"\n',
}


def write_arrays() -> None:
    good = normal(9, 10, 3, 8, 8)
    np.save("calib.npy", good)
    np.save("empty.npy", good[:0])
    np.save("one.npy", good[:1])
    np.save("one_image.npy", good[0])
    np.save("large.npy", normal(0, 10, 3, 9, 9))
    np.save("last.npy", good.transpose(0, 2, 3, 1))
    np.save("grey.npy", good[:, :1])
    np.save("pixels.npy", np.zeros((10, 8, 8), np.uint8))
    np.save("double.npy", good.astype(np.float64))
    np.save("constant.npy", np.ones_like(good))
    np.save("objects.npy", np.array([{}, []], dtype=object))
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        spoiled = good.copy()
        spoiled[3, 0, 0, 0] = value
        np.save(f"{name}.npy", spoiled)
    Path("corrupt.npy").write_bytes(b"\x93NUMPY, but not really")
    for name, labels in (
        ("labels", np.arange(10)), ("from_one", np.arange(10) % 4 + 1), ("negative", -np.arange(10)),
        ("masks", np.zeros((10, 8, 8), int)), ("few", np.arange(9)),
    ):  # fmt: skip
        np.savez(f"{name}.npz", x=good, y=labels)
    np.savez("input.npz", z=good, w=good)
    Path("no_images").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (4, 8, 8))
    for folder, dtype in (("text", np.uint8), ("damaged", np.uint8), ("deep", np.uint16), ("greys", np.uint8)):
        Path(folder).mkdir()
        for i in range(4):
            Image.fromarray(noise[i].astype(dtype)).save(f"{folder}/{i}.png")
    Path("text/a.txt").write_text("notes")
    image = Path("damaged/2.png").read_bytes()
    Path("damaged/2.png").write_bytes(image[: len(image) // 2])
    Path("grey_preprocess.toml").write_text('channels = "L"\n')
    Path("preprocess.toml").write_text("meen = [0.5]\n")


def write_models() -> None:
    float_model = residual().bytes
    Path("net.onnx").write_bytes(float_model)
    Path("other.onnx").write_bytes(conv_relu_conv().bytes)
    Path("half.onnx").write_bytes(float_model[: len(float_model) // 2])
    Path("void.onnx").write_bytes(b"")
    Path("program.pt2").write_bytes(b"PK, but not really")
    odd = (
        "a = Conv<pads=[1,1,1,1]>(x, w)\n b = Sin(a)\n c = Erf(b)\n d = Mish(c)\n y = CenterCropPad<axes=[2,3]>(d, hw)"
    )
    made = graph(
        f"(float[batch,3,8,8] x) => (float[batch,5,4,4] y) {{ {odd} }}", w=normal(0, 5, 3, 3, 3), hw=np.array([4, 4])
    )
    Path("odd.onnx").write_bytes(made.bytes)
    fixed = onnx.load_model_from_string(float_model)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    Path("four.onnx").write_bytes(fixed.SerializeToString())


def write_weights() -> None:
    zeros = {"conv.weight": (4, 3, 3, 3), "conv.bias": (4,), "head.weight": (4, 4), "head.bias": (4,)}
    state = {name: torch.zeros(shape) for name, shape in zeros.items()}
    wrong = {**state, "head.weight": torch.zeros(7, 4), "tail.bias": torch.zeros(1)}
    del wrong["conv.bias"]
    save_file(wrong, "wrong.safetensors")
    Path("damaged.safetensors").write_bytes(Path("wrong.safetensors").read_bytes()[:50])
    torch.save(TinyCNN(), "pickle.pt")
    torch.save([1, 2, 3], "list.pt")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything the commands below name."""
    folder = tmp_path_factory.mktemp("desk")
    before = Path.cwd()
    os.chdir(folder)
    try:
        Path("nets.py").write_text(FACTORIES)
        Path("broken.py").write_text("import torch\n\ndef build(:\n")
        for name, text in {**RECIPES, **TARGETS}.items():
            Path(name).write_text(text)
        write_arrays()
        write_models()
        write_weights()
        done = [
            enter("export net.onnx --target x86 --calib calib.npy --no-benchmark -o artifact"),
            enter("calibrate other.onnx --calib calib.npy -o other.json"),
            enter("calibrate net.onnx --calib calib.npy -o minmax.json"),
        ]
        assert [d.code for d in done] == [0, 0, 0], done
        Path("foreign.json").write_text("{}")
        Path("tidy").mkdir()
        return folder
    finally:
        os.chdir(before)


@pytest.fixture
def here(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(desk)
    yield desk
    for written in ("out", "full"):  # by a command that should have been refused
        shutil.rmtree(desk / written, ignore_errors=True)


def refused(command: str, *phrases: str) -> Said:
    """Runs the command and makes sure that it is refused with these words, and that nothing else happened."""
    before = contents(Path.cwd())
    said = enter(command)
    assert said.code == 2, said
    assert said.out == ""
    for phrase in phrases:
        assert phrase in said.err
    assert "Traceback" not in said.err
    assert contents(Path.cwd()) == before
    return said


GOOD = "--target x86 --calib calib.npy"

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
    "compress nets.py:build --calib calib.npy": ("give --target, or one of dsd, prune, sparse_2_4",),
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


# ------------------------------------------------------------------ destinations


@pytest.mark.parametrize(
    ("out", "phrase"),
    [
        ("tidy", "tidy already exists. Give another -o, or --overwrite"),
        ("artifact", "artifact already exists"),
        ("calib.npy", "calib.npy already exists"),
        ("calib.npy --overwrite", "calib.npy is a file; the output is a folder"),
        ("calib.npy/out", "cannot write"),
        ("/proc/nowhere/out", "cannot write /proc/nowhere/out"),
    ],
)
def test_a_taken_or_unwritable_destination_is_left_alone(here: Path, out: str, phrase: str) -> None:
    refused(f"export net.onnx {GOOD} --no-benchmark -o {out}", phrase)


def test_an_existing_destination_is_refused_before_anything_is_read(here: Path) -> None:
    refused("export nowhere.onnx --target x86 --calib nowhere.npy -o artifact", "artifact already exists")


def test_a_failed_overwrite_keeps_the_old_artifact_and_does_not_show_it_as_new(here: Path) -> None:
    refused("export odd.onnx --target mobile-arm --calib calib.npy --no-benchmark -o artifact --overwrite", "Sin")


def test_folders_made_for_a_failed_destination_go_again(here: Path) -> None:
    refused("export odd.onnx --target mobile-arm --calib calib.npy --no-benchmark -o deep/down/out", "Sin")


# ------------------------------------------------------------------ a full disk


@pytest.mark.parametrize("target", ["x86", "mobile-arm"])
def test_a_disk_that_fills_up_at_any_file_leaves_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """Every write of an export fails once; where no more fails, the export is whole."""
    before = contents(here)
    for allowed in range(100):
        with monkeypatch.context() as patch:
            fill_up_after(allowed, patch)
            said = enter(f"export net.onnx --calib calib.npy --no-benchmark --target {target} -o full")
        if said.code == 0:
            break
        assert said.code == 2
        assert re.search(r"cannot write \S*full: No space left on device", said.err)
        assert contents(here) == before
    shutil.rmtree("full")
    assert allowed > 4


def fill_up_after(writes: int, patch: pytest.MonkeyPatch) -> None:
    left = writes
    real = {"write_bytes": Path.write_bytes, "write_text": Path.write_text}

    def failing(name: str) -> Callable[..., int]:
        def write(path: Path, *args: Any, **kwargs: Any) -> int:
            nonlocal left
            if path.absolute().is_relative_to(Path.cwd()):  # temporary files elsewhere are on another disk
                left -= 1
            if left < 0:
                path.touch()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return real[name](path, *args, **kwargs)

        return write

    for name in real:
        patch.setattr(Path, name, failing(name))


def test_a_full_disk_is_said_by_the_other_commands_too(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (
        "calibrate net.onnx --calib calib.npy",
        "compress nets.py:build --calib calib.npy --recipe good.toml",
        "report artifact",
    ):
        with monkeypatch.context() as patch:
            fill_up_after(0, patch)
            refused(command, "cannot write", "No space left on device")


IN_A_SMALL_DISK = """
import pathlib, subprocess, sys
sys.path[:0] = sys.argv[3:]
from commands import enter
for kilobytes in (4, 8, 12, 20, 28):
    for target in ("x86", "mobile-arm", "jetson"):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", sys.argv[1]], check=True)
        said = enter(f"export {sys.argv[2]}/net.onnx --calib {sys.argv[2]}/calib.npy --no-benchmark -o",
                         f"{sys.argv[1]}/out", "--target", target)
        left = sorted(p.name for p in pathlib.Path(sys.argv[1]).iterdir())
        print(said.code, left, said.err.splitlines()[-1:])
        subprocess.run(["umount", sys.argv[1]], check=True)
"""


def test_a_really_full_disk_leaves_nothing(desk: Path, tmp_path: Path) -> None:
    own_mounts = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    disk = tmp_path / "disk"
    disk.mkdir()
    probe = [*own_mounts, "mount", "-t", "tmpfs", "none", str(disk)]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a small disk")
    ran = subprocess.run(
        [*own_mounts, sys.executable, "-c", IN_A_SMALL_DISK, str(disk), str(desk), *sys.path],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    outcomes = ran.stdout.splitlines()
    assert len(outcomes) == 15
    for outcome in outcomes:
        assert outcome.startswith("0 ['out']") or (outcome.startswith("2 []") and "No space left" in outcome), outcome
    assert sum(outcome.startswith("2") for outcome in outcomes) >= 6


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


# ------------------------------------------------------------------ truncated and foreign artifacts


def truncate(folder: Path) -> None:
    file = folder / "model.int8.onnx"
    file.write_bytes(file.read_bytes()[:300])


def alter(folder: Path) -> None:
    file = folder / "model.int8.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(bytes(data))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def truncate_and_say_so(folder: Path) -> None:
    """As if the file had been truncated before the manifest was written."""
    truncate(folder)
    data = (folder / "model.int8.onnx").read_bytes()

    def stored(manifest: dict[str, Any]) -> None:
        for entry in manifest["stored"]:
            if entry["path"] == "model.int8.onnx":
                entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    edit_manifest(folder, stored)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "file truncated": (truncate, "model.int8.onnx has 300 bytes, 2"),
    "file altered": (alter, "model.int8.onnx was changed after the export"),
    "file missing": (lambda f: (f / "model.int8.onnx").unlink(), "model.int8.onnx is missing"),
    "manifest missing": (lambda f: (f / "manifest.json").unlink(), "no manifest.json: it is not an artifact"),
    "manifest truncated": (
        lambda f: (f / "manifest.json").write_bytes((f / "manifest.json").read_bytes()[:500]),
        "manifest.json is not a manifest that deploykit wrote",
    ),
    "manifest of something else": (
        lambda f: (f / "manifest.json").write_text('{"name": "web application", "icons": []}'),
        "manifest.json is not a manifest that deploykit wrote",
    ),
    "manifest of another version": (
        lambda f: edit_manifest(f, lambda m: m.update(format="deploykit-artifact-9")),
        "has format 'deploykit-artifact-9'; this deploykit reads",
    ),
    "exporter unknown": (
        lambda f: edit_manifest(f, lambda m: m.update(exporter="onxx")),
        "no exporter 'onxx'. Did you mean 'onnx'?",
    ),
}


@pytest.mark.parametrize("command", ["benchmark", "verify", "report"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_artifact_is_refused(here: Path, tmp_path: Path, damage: str, command: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree("artifact", broken)
    spoil, phrase = DAMAGES[damage]
    spoil(broken)
    before = contents(tmp_path)
    refused(f"{command} {broken}", "broken" if "exporter" not in damage else "onxx", phrase)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", ["benchmark", "verify"])
def test_a_file_that_its_runtime_cannot_open_is_named(here: Path, tmp_path: Path, command: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree("artifact", broken)
    truncate_and_say_so(broken)
    refused(f"{command} {broken}", "ONNX Runtime cannot open", "model.int8.onnx")


def test_verify_as_json_names_the_problems_too(here: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree("artifact", broken)
    truncate(broken)
    said = enter(f"verify {broken} --json")
    assert said.code == 2
    assert "300 bytes" in json.loads(said.out)["problems"][0]


# ------------------------------------------------------------------ what a runtime says on file descriptor 2


GREETS = b"INFO: Created TensorFlow Lite XNNPACK delegate for CPU.\n"


@pytest.fixture
def unmet(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A process that has not been greeted yet."""
    monkeypatch.setattr(runner, "_greeted", threading.Event())
    return runner._greeted


def test_a_runtimes_error_comes_through_without_its_greeting_also_where_it_raises(
    unmet: threading.Event, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        os.write(2, GREETS + b"ERROR: tensor 3 is no tensor\n")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        runner.ungreeted(fail)
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "ERROR: tensor 3 is no tensor\nafterwards\n"
    assert unmet.is_set()


def test_once_greeted_files_are_opened_without_touching_the_descriptor(
    unmet: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = to_tflite.export({"fp32": Hub(residual(), QuantSpec())}, targets.load("mobile-arm"), tmp_path)
    unmet.set()
    monkeypatch.setattr(runner, "ungreeted", None)
    assert to_tflite.load(tmp_path / file.path)({"x": normal(0, 1, 3, 8, 8)})["y"].shape == (1, 4)


def test_threads_that_open_files_at_once_do_not_lose_each_others_errors(
    unmet: threading.Event, capfd: pytest.CaptureFixture[str]
) -> None:
    before = os.fstat(2)

    def speak(i: int) -> None:
        runner.ungreeted(lambda: os.write(2, f"ERROR: {i}\n".encode()))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(speak, range(50)))
    assert sorted(capfd.readouterr().err.split()[1::2], key=int) == [str(i) for i in range(50)]
    assert os.path.samestat(os.fstat(2), before)


def test_a_process_without_stderr_opens_files_too(unmet: threading.Event) -> None:
    kept, called = os.dup(2), []
    os.close(2)
    try:
        runner.ungreeted(lambda: called.append(True))
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    assert called == [True]


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
