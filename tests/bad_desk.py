"""A folder with everything that can be wrong with data, models, weights, recipes and targets."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import torch
from commands import Said, contents, enter
from conftest import TinyCNN
from graphs import conv_relu_conv, graph, normal, residual
from PIL import Image
from safetensors.torch import save_file

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


def lay_desk(folder: Path) -> Path:
    """Fills a folder with everything that wrong commands name: data, models, weights, an artifact."""
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
