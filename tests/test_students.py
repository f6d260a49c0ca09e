"""Students: as large as their papers' tables say, for small images too, and every one of them reaches a device."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import deploykit as dk
from deploykit.asked import file_hash, files_read
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import load_manifest
from deploykit.core.recipe import Recipe, Step, TrainSettings
from deploykit.core.request import Request, Settings
from deploykit.hub.lower import lower
from deploykit.hub.running import session
from deploykit.losses import cross_entropy
from deploykit.models import load_model
from deploykit.students.mobilenet_v1 import MobileNetV1
from deploykit.students.mobilenet_v2 import MobileNetV2
from deploykit.students.parts import scaled
from deploykit.students.shufflenet_v2 import ShuffleNetV2, shuffled
from deploykit.students.squeezenet import SqueezeNet
from deploykit.training.trainer import Trainer

STUDENTS: dict[str, Callable[..., nn.Module]] = {
    "mobilenet_v1": MobileNetV1, "mobilenet_v2": MobileNetV2, "shufflenet_v2": ShuffleNetV2, "squeezenet": SqueezeNet,
}  # fmt: skip


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def norm_conv(inputs: int, outputs: int, taps: int = 1, groups: int = 1) -> int:
    """Weights of a convolution, and two per channel of its batch norm."""
    return inputs * outputs * taps // groups + 2 * outputs


# ------------------------------------------------------------------ sizes


def test_mobilenet_v1_has_the_4_2_million_parameters_of_its_table() -> None:
    channels = [32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]
    expected = norm_conv(3, 32, 9) + 1024 * 1000 + 1000
    for c, f in pairwise(channels):
        expected += norm_conv(c, c, 9, groups=c) + norm_conv(c, f)
    assert size(MobileNetV1()) == expected == 4_231_976


def test_mobilenet_v2_has_the_3_5_million_parameters_of_its_table() -> None:
    expected, c = norm_conv(3, 32, 9), 32
    for t, f, n in [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]:
        for _ in range(n):
            wide = t * c
            expected += (norm_conv(c, wide) if t > 1 else 0) + norm_conv(wide, wide, 9, groups=wide)
            expected += norm_conv(wide, f)
            c = f
    expected += norm_conv(320, 1280) + 1280 * 1000 + 1000
    assert size(MobileNetV2()) == expected == 3_504_872


def test_shufflenet_v2_has_the_2_3_million_parameters_of_its_table() -> None:
    expected, c = norm_conv(3, 24, 9), 24
    for f, n in [(116, 4), (232, 8), (464, 4)]:
        half = f // 2
        expected += norm_conv(c, c, 9, groups=c) + norm_conv(c, half)  # the left branch of the first block
        expected += norm_conv(c, half) + norm_conv(half, half, 9, groups=half) + norm_conv(half, half)
        expected += (n - 1) * (2 * norm_conv(half, half) + norm_conv(half, half, 9, groups=half))
        c = f
    expected += norm_conv(464, 1024) + 1024 * 1000 + 1000
    assert size(ShuffleNetV2()) == expected == 2_278_604


def test_squeezenet_has_the_1_2_million_parameters_of_its_table() -> None:
    expected, c = 64 * 3 * 9 + 64, 64
    for s, e in [(16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256)]:
        expected += s * c + s + e * s + e + e * s * 9 + e
        c = 2 * e
    expected += 512 * 1000 + 1000
    assert size(SqueezeNet()) == expected == 1_235_496


@pytest.mark.parametrize(
    ("build", "width", "million"),
    [
        (MobileNetV1, 0.75, 2.6), (MobileNetV1, 0.5, 1.3), (MobileNetV1, 0.25, 0.5),  # table 6
        (MobileNetV2, 0.75, 2.6), (MobileNetV2, 0.5, 2.0), (MobileNetV2, 0.35, 1.7),
        (ShuffleNetV2, 0.5, 1.4), (ShuffleNetV2, 1.5, 3.5), (ShuffleNetV2, 2.0, 7.4),  # table 8
    ],
)  # fmt: skip
def test_at_other_widths_sizes_are_those_of_the_papers(
    build: Callable[..., nn.Module], width: float, million: float
) -> None:
    assert round(size(build(width=width)) / 1e6, 1) == million


@pytest.mark.parametrize("name", STUDENTS)
def test_a_smaller_width_is_a_smaller_network_at_any_width(name: str) -> None:
    sizes = [size(STUDENTS[name](classes=10, width=w)) for w in (0.1, 0.25, 0.4, 0.6, 1.0, 1.3)]
    assert sizes == sorted(set(sizes))


def test_channels_are_multiples_of_eight_and_hardly_less_than_they_should_be() -> None:
    for c in range(8, 400, 8):
        for width in (0.1, 0.35, 0.5, 0.77, 1.0, 1.4):
            found = scaled(c, width)
            assert found % 8 == 0 and found >= 8 and found >= 0.9 * c * width and found - c * width <= 8
    assert all(scaled(c, 1.0) == c for c in range(8, 400, 8))


# ------------------------------------------------------------------ shapes


def maps(net: nn.Module, side: int, channels: int = 3) -> tuple[torch.Size, int]:
    """The shape of the answer, and how high the last map is."""
    sides = []
    hooks = [m.register_forward_hook(lambda _m, _x, y: sides.append(y.shape[2])) for m in net.modules()
             if isinstance(m, nn.Conv2d)]  # fmt: skip
    with torch.no_grad():
        y = net.eval()(torch.randn(2, channels, side, side))
    for hook in hooks:
        hook.remove()
    return y.shape, sides[-1]


LAST = {"mobilenet_v1": (7, 4), "mobilenet_v2": (7, 4), "shufflenet_v2": (7, 4), "squeezenet": (13, 6)}


@pytest.mark.parametrize("name", STUDENTS)
def test_small_images_are_halved_two_times_less(name: str) -> None:
    large, small = (STUDENTS[name](classes=7, width=0.25, small=small) for small in (False, True))
    assert maps(large, 224) == ((2, 7), LAST[name][0])
    assert maps(small, 32) == ((2, 7), LAST[name][1])
    assert size(large) == size(small)


@pytest.mark.parametrize("name", STUDENTS)
def test_grey_images_are_taken_too(name: str) -> None:
    assert maps(STUDENTS[name](classes=3, width=0.25, small=True, inputs=1), 32, channels=1)[0] == (2, 3)


def test_shuffled_channels_come_from_the_halves_in_turns() -> None:
    x = torch.arange(6.0).reshape(1, 6, 1, 1).expand(2, 6, 3, 2)
    assert shuffled(x)[1, :, 2, 1].tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("given", [{"classes": 1}, {"width": 0.0}, {"width": float("nan")}, {"inputs": 0}])
@pytest.mark.parametrize("name", STUDENTS)
def test_sizes_that_no_network_has_are_refused(name: str, given: dict[str, float]) -> None:
    with pytest.raises(DeploykitError, match="2 classes or more, a width above 0 and 1 input channel or more"):
        STUDENTS[name](**given)


# ------------------------------------------------------------------ as a MODEL


def test_a_student_is_a_model_by_its_name_and_the_same_every_time() -> None:
    spec = "deploykit.students.squeezenet:SqueezeNet"
    first = load_model(spec).module
    torch.rand(5)
    second = load_model(spec).module
    assert first is not None and second is not None and not first.training
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_any_factory_makes_the_same_weights_every_time_and_leaves_the_generators_alone(tmp_path: Path) -> None:
    file = tmp_path / "drawing.py"
    file.write_text(
        "import numpy as np, random, torch\nfrom torch import nn\n\n\ndef build():\n    net = nn.Linear(3, 3)\n"
        "    net.bias.data = torch.tensor([random.random(), float(np.random.rand()), 0.0])\n    return net\n"
    )
    before = torch.get_rng_state()
    first, second = (load_model(f"{file}:build").module for _ in range(2))
    assert first is not None and second is not None
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)  # type: ignore[arg-type]


# ------------------------------------------------------------------ to a device


def pictures(n: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """``[n, 3, 32, 32]``: four patterns under noise."""
    patterns = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).repeat(4, 2).repeat(4, 3)
    y = np.arange(n) % 4
    return (patterns[y] + 0.25 * np.random.default_rng(seed).normal(size=(n, 3, 32, 32))).astype(np.float32), y


@cache
def begun(name: str) -> nn.Module:
    """After a few steps: answers of random weights tie, and then the class is a matter of chance."""
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    net = STUDENTS[name](classes=4, width=0.25, small=True).eval()
    x, y = pictures(96, 1)
    Trainer(TrainSettings(batch=16)).fit(net, DataSet.of({"x": x}, y), cross_entropy, steps=60, learning_rate=3e-3)
    return net


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_random_weights_answer_alike_as_onnx(name: str) -> None:
    net, x = STUDENTS[name](classes=4, width=0.25, small=True).eval(), pictures(6, 1)[0]
    (found,) = session(lower(net, {"x": x[:2]}).bytes).run(None, {"x": x})
    with torch.no_grad():
        np.testing.assert_allclose(found, net(torch.from_numpy(x)).numpy(), rtol=1e-3, atol=1e-4 * abs(found).max())


@pytest.mark.slow
@pytest.mark.parametrize("target", ["x86", "mobile-arm"])
@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_is_exported_and_passes_its_checks(name: str, target: str, tmp_path: Path) -> None:
    if target == "mobile-arm" and importlib.util.find_spec("ai_edge_litert") is None:
        pytest.skip("needs LiteRT: pip install 'deploykit[tflite]'")
    out = tmp_path / "out"
    dk.export(begun(name), target, pictures(64, 1)[0], evaluation=pictures(64, 2), out=out, benchmark=False)
    manifest = load_manifest(out)
    assert "int8" in [f.precision for f in manifest.files]
    assert all(check.passed is not False for check in manifest.checks)


# ------------------------------------------------------------------ what is known of its teachers


def test_files_that_steps_name_are_among_those_that_were_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("net.py").write_text("def build(): ...\n")
    Path("wide_part.py").write_text("WIDTH = 3\n")
    Path("wide.py").write_text("import wide_part\n\n\ndef build(): ...\n")
    Path("wider.py").write_text("def build(): ...\n")
    Path("widest.onnx").write_bytes(b"any bytes")
    Path("answers").mkdir()
    teachers = ("wide.py:build", "wider:build", "widest.onnx", "gone.py:build", "no_module:build")
    steps = (
        Step("semi_structured", {"pattern": "2:4"}),
        Step("distill", {"teacher": teachers, "cache": "answers", "layers": {"a": "b"}, "steps": 3}),
        Step("distill", {"teacher": "wide.py:build"}),
    )
    found = files_read(Request("net.py:build", "x86", settings=Settings(recipe=Recipe(steps))))
    assert list(found) == ["net.py", "wide.py", "wide_part.py", "wider.py", "widest.onnx"]
    assert found["widest.onnx"] == file_hash(Path("widest.onnx"))
