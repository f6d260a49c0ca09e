"""Integer C on the whole road: from the command line to a checked folder; and against TensorFlow Lite Micro."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import enter
from graphs import images, measured, residual
from numpy.typing import NDArray

from deploykit import targets
from deploykit.check import check_operators
from deploykit.core.artifact import Runner
from deploykit.core.manifest import load_manifest
from deploykit.core.request import Gate
from deploykit.exporters import to_c99, to_tflite
from deploykit.exporters.c99.execute import execute
from deploykit.exporters.c99.golden import to_integers
from deploykit.exporters.c99.lower import lower
from deploykit.hub.quantize import quantize

if not any(shutil.which(cc) for cc in ("cc", "gcc", "clang")):
    pytest.skip("no C compiler: what the c99 exporter writes is not run here", allow_module_level=True)

NET = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A network with weights, data whose labels are its own answers."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    namespace: dict[str, object] = {}
    exec(NET, namespace)
    net = namespace["build"]().eval()  # type: ignore[operator]
    torch.save(net.state_dict(), tmp_path / "net.pt")
    x = np.random.default_rng(0).normal(size=(60, 3, 12, 12)).astype(np.float32)
    with torch.no_grad():
        y = net(torch.from_numpy(x)).argmax(1).numpy()
    np.savez(tmp_path / "data.npz", x=x, y=y)
    return tmp_path


def test_an_export_is_compiled_checked_and_scored_against_the_original(workplace: Path) -> None:
    said = enter("export net.py:build --weights net.pt --target cortex-m4 --calib data.npz --eval data.npz -o out")
    assert said.code == 0, said.err
    manifest = load_manifest(workplace / "out")
    (file,) = manifest.files
    assert (file.path, file.precision) == ("model.c", "int8") and file.quantized["Conv"] == 2
    assert file.bytes is not None and 1000 < file.bytes < 10_000  # flash, not the size of the source
    assert {s.precision for s in manifest.scores} == {"original", "int8"}
    checked = {c.name: c for c in manifest.checks}
    assert checked["C equals the integer oracle (differing values)"].value == 0.0
    assert all(c.passed is not False for c in manifest.checks)
    assert all(m.p50_ms is None and "needs the board" in m.where for m in manifest.measurements)
    readme = (workplace / "out" / "README.md").read_text()
    assert "make test" in readme and "FIRMWARE.md" in readme and "Flash: " in readme
    assert readme.index("| in | `input` | 1 × ") < readme.index("- `input`: batch × "), "first what the buffer takes"
    assert not (workplace / "out" / "infer.py").exists()
    assert enter("report out").code == 0


@pytest.mark.parametrize("target", ["cortex-m4", "fpga-int8"])
def test_without_calibration_data_the_command_ends_with_2_and_says_what_is_missing(
    target: str, workplace: Path
) -> None:
    said = enter(f"export net.py:build --weights net.pt --target {target} --input input=1x3x12x12 -o out")
    assert said.code == 2 and "--calib" in said.err
    assert not (workplace / "out").exists()


def test_a_model_that_does_not_fit_ends_with_2_and_leaves_nothing(workplace: Path) -> None:
    (workplace / "small.toml").write_text('extends = "cortex-m4"\n[options]\nram_bytes = 500\n')
    said = enter("export net.py:build --weights net.pt --target small.toml --calib data.npz -o out")
    assert said.code == 2 and "does not fit target 'small'" in said.err and "needs most" in said.err
    assert not (workplace / "out").exists()


@pytest.mark.parametrize("name", ["cortex-m4", "fpga-int8"])
def test_every_operator_is_at_most_one_step_off_the_hub_with_forced_inputs(name: str) -> None:
    target, graph, data = targets.load(name), residual(), images(64)
    hub = quantize(graph, measured(graph, data), target.quant)
    checks, errors = check_operators(hub, to_c99, target, data, Gate(), samples=32)
    assert {e.operator for e in errors} == {"Conv", "Add", "ReduceMean", "Gemm"}
    assert [c.passed for c in checks] == [True, True]


class OftenOff:
    """The c99 exporter, but every 30th value is one step off."""

    export, runtime, max_mismatch = to_c99.export, to_c99.runtime, to_c99.max_mismatch

    @staticmethod
    def load(path: Path, threads: int = 1) -> Runner:
        run = to_c99.load(path, threads)

        def off(array: NDArray[Any]) -> NDArray[Any]:
            step = np.diff(np.unique(array)).min()
            return array + step * (np.arange(array.size).reshape(array.shape) % 30 == 29)

        return lambda arrays: {name: off(array) for name, array in run(arrays).items()}


def test_as_many_values_may_be_off_as_the_rounding_explains_and_no_more() -> None:
    """Two roundings explain a few percent, one shift none at all."""
    graph, data = residual(), images(64)
    for name, bound, passed in (("cortex-m4", 10.0, True), ("fpga-int8", 0.5, False)):
        target = targets.load(name)
        hub = quantize(graph, measured(graph, data), target.quant)
        (_, right), _ = check_operators(hub, to_c99, target, data, Gate())
        (_, off), _ = check_operators(hub, OftenOff, target, data, Gate())  # type: ignore[arg-type]
        assert (right.value, right.bound) == (0.0, bound)
        assert off.value == pytest.approx(100 / 30, abs=0.5) and off.passed is passed


@pytest.mark.tflm
def test_the_numbers_are_those_of_tensorflow_lite_micro(tmp_path: Path) -> None:
    """The .tflite and the C of one hub: equal bytes."""
    if importlib.util.find_spec("tflite_micro") is None:
        pytest.skip("tflite-micro is not installed: equality with TFLM is not checked here")
    from tflite_micro import runtime

    graph, data = residual(), images(64)
    hub = quantize(graph, measured(graph, data), targets.load("cortex-m4").quant)
    (file,) = to_tflite.export({"int8": hub}, targets.load("mobile-arm"), tmp_path)
    assert hub.quantized is not None
    program = lower(hub.quantized, "tflm_double").program
    (port,) = program.inputs
    fed = to_integers(port, next(data.batches(64)).inputs["x"])
    expected = execute(program, {"x": fed})["y"]
    interpreter = runtime.Interpreter.from_file(str(tmp_path / file.path), arena_size=1_000_000)
    for sample, wanted in zip(fed, expected, strict=True):
        interpreter.set_input(sample.reshape(tuple(port.shape[a] for a in port.order)), 0)
        interpreter.invoke()
        np.testing.assert_array_equal(interpreter.get_output(0).ravel(), wanted)
