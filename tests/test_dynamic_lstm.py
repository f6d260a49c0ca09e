"""LSTMs in files of the precision `dynamic`, against an LSTM in numpy with the weights that the hub holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from commands import enter
from graphs import graph, normal
from numpy.typing import NDArray
from torch import nn

from deploykit import export, targets
from deploykit.core.manifest import load_manifest
from deploykit.core.precision import Precision, spec_of
from deploykit.core.target import QuantSpec
from deploykit.exporters import to_onnx
from deploykit.hub.graph import FloatGraph, Hub
from deploykit.hub.weight_only import quantize_weights

X86 = targets.load("x86")
INPUTS, UNITS = 12, 16


def recurrent(direction: str) -> FloatGraph:
    """x [steps, n, inputs] -> everything an LSTM gives."""
    d = 2 if direction == "bidirectional" else 1
    return graph(
        f"""(float[steps,batch,{INPUTS}] x)
            => (float[steps,{d},batch,{UNITS}] y, float[{d},batch,{UNITS}] last, float[{d},batch,{UNITS}] cell) {{
            y, last, cell = LSTM<hidden_size={UNITS}, direction="{direction}">(x, w, r, b)
        }}""",
        w=normal(0, d, 4 * UNITS, INPUTS) / 4, r=normal(1, d, 4 * UNITS, UNITS) / 4, b=normal(2, d, 8 * UNITS) / 4,
    )  # fmt: skip


def sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-x)))


def by_numpy(direction: str, held: dict[str, NDArray[Any]], x: NDArray[np.float32]) -> list[NDArray[Any]]:
    """ONNX's formulas; gates come in the order input, output, forget, cell."""
    ways = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
    outputs, lasts, cells = [], [], []
    for k, backwards in enumerate(ways):
        w, r = (held[n][k].astype(np.float64) * held[f"{n}_scale"][:, None] for n in ("w_q", "r_q"))
        bias = held["b"][k][: 4 * UNITS] + held["b"][k][4 * UNITS :].astype(np.float64)
        h = c = np.zeros((x.shape[1], UNITS))
        found = []
        for now in x[::-1] if backwards else x:
            i, o, f, g = np.split(now @ w.T + h @ r.T + bias, 4, axis=1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            found.append(h)
        outputs.append(np.stack(found[::-1] if backwards else found))
        lasts.append(h)
        cells.append(c)
    return [np.stack(outputs, axis=1), np.stack(lasts), np.stack(cells)]


def hub(made: FloatGraph, precision: Precision = "dynamic") -> Hub:
    return quantize_weights(made, spec_of(QuantSpec(), precision))


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_an_lstm_multiplies_the_hubs_integers(direction: str, tmp_path: Path) -> None:
    found = hub(recurrent(direction))
    held = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load_model_from_string(found.bytes).graph.initializer}
    x = normal(3, 7, 3, INPUTS)
    (file,) = to_onnx.export({"dynamic": found}, X86, tmp_path)
    outputs = to_onnx.load(tmp_path / file.path)({"x": x})
    assert list(outputs) == ["y", "last", "cell"]
    for ours, expected in zip(outputs.values(), by_numpy(direction, held, x), strict=True):
        noise = np.square(ours - expected).sum() / np.square(expected).sum()
        assert noise < 1e-3  # inputs and states are rounded to 8 bits at every step
    proto = onnx.load(tmp_path / file.path)
    assert [(n.domain, n.op_type) for n in proto.graph.node] == [("com.microsoft", "DynamicQuantizeLSTM")]
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    for wanted in ("w_q", "r_q"):  # the same integers, turned
        assert any(np.array_equal(a, held[wanted].swapaxes(1, 2)) and a.dtype == np.int8 for a in arrays.values())
    assert "which ONNX Runtime alone has" in " ".join(file.notes)


def test_w8_files_hold_the_standard_operator(tmp_path: Path) -> None:
    (file,) = to_onnx.export({"w8": hub(recurrent("forward"), "w8")}, X86, tmp_path)
    proto = onnx.load(tmp_path / file.path)
    assert {o.domain for o in proto.opset_import} == {""}
    assert "LSTM" in {n.op_type for n in proto.graph.node}


class Tagger(nn.Module):
    """An LSTM in both directions between two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 24), nn.Linear(64, 5)
        self.recur = nn.LSTM(24, 32, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.leave(self.recur(self.enter(x))[0].mean(1))


def test_a_network_with_an_lstm_passes_its_checks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    artifact = export(
        Tagger().eval(),
        "x86",
        normal(0, 40, 6, 8),
        out=tmp_path / "out",
        benchmark=False,
        precisions=("fp32", "dynamic"),
    )
    manifest = load_manifest(artifact.folder)
    assert manifest.passed
    kinds = {n.op_type for n in onnx.load(artifact.folder / "model.dynamic.onnx").graph.node}
    assert "DynamicQuantizeLSTM" in kinds and "LSTM" not in kinds
    (scored,) = (s for s in manifest.scores if s.precision == "dynamic")
    assert scored.sqnr_db["output"] > 25


def test_an_lstm_is_said_to_be_in_float_only_in_the_precisions_in_which_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.onnx").write_bytes(recurrent("forward").bytes)
    np.save("calib.npy", normal(3, 8, 3, INPUTS))
    wanted = "--precision dynamic --precision int8"
    said = enter(f"export net.onnx --calib calib.npy --target x86 {wanted} --no-benchmark -o out")
    in_float = [line for line in said.out.splitlines() if "stays in float" in line]
    computed = {
        name: [node.op_type for node in onnx.load(f"out/model.{name}.onnx").graph.node if "LSTM" in node.op_type]
        for name in ("dynamic", "int8")
    }
    assert computed == {"dynamic": ["DynamicQuantizeLSTM"], "int8": ["LSTM"]}, said
    assert len(in_float) == 1 and "stays in float in int8: " in in_float[0] and "weights stored in int8" in in_float[0]
