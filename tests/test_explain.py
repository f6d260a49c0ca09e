"""`deploykit explain`: planted faults are found, their cures rank first, and nothing is said that was not measured."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from commands import Said, enter
from graphs import images, measured, residual
from small_artifact import small_artifact

from deploykit import passes, targets
from deploykit.core.artifact import Island
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.golden import load_golden
from deploykit.core.manifest import Layer, load_manifest
from deploykit.core.ranges import load_ranges
from deploykit.core.recipe import Step
from deploykit.core.target import QuantSpec
from deploykit.explain import explain, timing
from deploykit.explain.explanation import Alternative, Measured, Part, Quality
from deploykit.explain.known import operators
from deploykit.explain.page import render
from deploykit.explain.remake import remake
from deploykit.hub.analysis.contributions import contributions, owners, whole
from deploykit.hub.analysis.sizes import described
from deploykit.hub.quantize import quantize
from deploykit.hub.running import session

NET = """
import numpy as np
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x) + x)
        return self.head(x.mean((2, 3)))


def build():
    torch.manual_seed(0)
    return Net()


def uneven():
    \"\"\"A dead output channel of the first layer has weights a hundred times as large as the others.\"\"\"
    net = build()
    with torch.no_grad():
        net.first.weight[0] *= 100
        net.first.bias[0] = -1000
    return net


def samples(count=40):
    return np.random.default_rng(0).normal(size=(count, 3, 8, 8)).astype(np.float32)


def calib():
    return samples()


def one_spike():
    x = samples(400)
    x[7, 0, 3, 3] = 200
    return x


def test():
    return samples(64), np.arange(64) % 10
"""
TENSOR = """
extends = "x86"
title = "one scale per weight tensor"
[quant]
weight_granularity = "tensor"
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain")
    (folder / "explained.py").write_text(NET)
    (folder / "tensor.toml").write_text(TENSOR)
    return folder


@pytest.fixture
def here(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(work)
    return work


def exported(here: Path, name: str, arguments: str) -> Path:
    folder = here / name
    if not folder.exists():
        said = enter(f"export explained.py:{arguments} --no-benchmark -o {name}")
        assert said.code == 0, said.err
    return folder


def plain(here: Path) -> Path:
    return exported(here, "plain", "build --calib explained.py:calib --eval explained.py:test --target x86")


# ------------------------------------------------------------------ contributions


def noise(model: onnx.ModelProto, graph, data: DataSet) -> float:
    """d of a whole model against the float graph, on all samples at once."""
    batch = next(data.batches(len(data))).inputs
    z, other = (session(m).run(None, batch) for m in (graph.bytes, model.SerializeToString()))
    return sum(
        float(np.square(b - a, dtype=np.float64).sum() / np.square(a, dtype=np.float64).sum())
        for a, b in zip(z, other, strict=True)
    )


def test_a_tensors_contribution_is_that_of_a_float_network_with_one_pair_of_nodes_in_it() -> None:
    graph, data = residual(), images(6)
    hub = quantize(graph, measured(graph, data), QuantSpec())
    q = onnx.load_model_from_string(hub.bytes)
    constants = {t.name: t for t in q.graph.initializer}
    found = {c.tensor: c for c in contributions(hub, data) if c.part == "values"}
    assert set(found) == {"x", "r", "b", "t", "m", "y"}
    for tensor, contribution in found.items():
        model = onnx.load_model_from_string(graph.bytes)
        quantizer = next(
            n for n in q.graph.node if n.op_type == "QuantizeLinear" and n.input[0] in (tensor, f"{tensor}_float")
        )
        scale, zero = (constants[i] for i in quantizer.input[1:3])
        model.graph.initializer.extend([scale, zero])
        inner = f"{tensor}_exact"
        for node in model.graph.node:
            for names in (node.output, node.input) if tensor != "x" else (node.input,):
                for i, name in enumerate(names):
                    if name == tensor:
                        names[i] = inner if names is node.output else f"{tensor}_rounded"
        writer = next((i for i, n in enumerate(model.graph.node) if inner in n.output), -1)
        end = tensor if tensor == "y" else f"{tensor}_rounded"
        pair = [
            onnx.helper.make_node(
                "QuantizeLinear", [inner if tensor != "x" else "x", scale.name, zero.name], ["integers"]
            ),
            onnx.helper.make_node("DequantizeLinear", ["integers", scale.name, zero.name], [end]),
        ]
        for i, node in enumerate(pair):
            model.graph.node.insert(writer + 1 + i, node)
        assert contribution.noise == pytest.approx(noise(model, graph, data), rel=1e-3), tensor
        assert contribution.layer == {"x": "x", "r": "a", "b": "b", "t": "s", "m": "m", "y": "y"}[tensor]


def test_a_weights_contribution_is_that_of_a_float_network_with_this_weight_rounded_and_its_mean_kept() -> None:
    graph, data = residual(), images(6)
    hub = quantize(graph, measured(graph, data), QuantSpec(weight_bits=4))
    q = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load_model_from_string(hub.bytes).graph.initializer}
    batch = next(data.batches(len(data))).inputs
    for c in (c for c in contributions(hub, data) if c.part == "weights"):
        model = onnx.load_model_from_string(graph.bytes)
        weight = next(t for t in model.graph.initializer if t.name == c.tensor)
        integers, scale = q[f"{c.tensor}_q"], q[f"{c.tensor}_q_scale"]
        real = (integers * scale.reshape(-1, *[1] * (integers.ndim - 1))).astype(np.float32)
        weight.CopyFrom(onnx.numpy_helper.from_array(real, c.tensor))
        node = next(n for n in model.graph.node if n.name == c.layer)
        exposed = [onnx.load_model_from_string(m) for m in (graph.bytes, model.SerializeToString())]
        means = []
        for each in exposed:  # the mean of the layer's output, in front of what is behind it
            del each.graph.output[:]
            each.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], 1, None))
            y = session(each).run(None, batch)[0]
            means.append(y.mean(axis=tuple(i for i in range(y.ndim) if i != 1)))
        bias = next(t for t in model.graph.initializer if t.name == node.input[2])
        shifted = onnx.numpy_helper.to_array(bias) + means[0] - means[1]
        bias.CopyFrom(onnx.numpy_helper.from_array(shifted.astype(np.float32), bias.name))
        assert c.noise == pytest.approx(noise(model, graph, data), rel=2e-3), c.layer


def test_contributions_add_up_to_about_what_the_hub_loses() -> None:
    """Errors of different places are independent of each other on the average, not in every small network."""
    ratios = []
    for seed in range(8):
        graph, data = residual(seed), images(24, seed)
        hub = quantize(graph, measured(graph, data), QuantSpec())
        hub = passes.build(Step("bias_correct"))(hub, Context(targets.load("x86"), {"calibration": data}))
        ratios.append(sum(c.noise for c in contributions(hub, data)) / whole(hub, data))
    assert 0.75 < np.median(ratios) < 1.33
    assert min(ratios) > 0.3 and max(ratios) < 3


def test_what_runs_together_belongs_to_the_first_of_it() -> None:
    assert {t: owners(residual())[t] for t in ("a", "r", "b", "s", "t")} == {
        "a": "a", "r": "a", "b": "b", "s": "s", "t": "s"
    }  # fmt: skip


def test_sizes_are_those_of_the_weights() -> None:
    graph = residual()
    hub = quantize(graph, measured(graph, images()), QuantSpec())
    assert described(hub) == (
        Layer("a", "Conv", 3, 4, 108), Layer("b", "Conv", 4, 4, 144), Layer("s", "Add"), Layer("m", "ReduceMean"),
        Layer("y", "Gemm", 4, 4, 16),
    )  # fmt: skip


# ------------------------------------------------------------------ from the artifact alone


def test_an_artifact_is_explained_without_its_model(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(plain(here), folder)
    monkeypatch.chdir(tmp_path)  # neither model nor data are here
    found = explain(folder)
    manifest = load_manifest(folder)
    assert [o.layer for o in found.operators] == [layer.name for layer in manifest.layers]
    own = {o.layer: o.sqnr_db for o in manifest.operators}
    assert {o.layer: o.sqnr_db for o in found.operators if o.sqnr_db is not None} == own
    assert [o.layer for o in found.worst] == sorted(own, key=lambda name: own[name])
    assert found.measured is None
    assert all(o.weights is None and o.values is None for o in found.operators)  # not measured is not 0
    assert found.convergence is not None and found.convergence.parts == (8, 16, 32, 40)


def test_times_are_the_runtimes_own_and_only_where_it_tells_them(here: Path) -> None:
    found = explain(plain(here))
    assert "onnxruntime" in found.timed_on
    assert all(o.ms is not None and o.ms > 0 for o in found.operators if o.operator == "Conv")
    phone = exported(here, "phone", "build --calib explained.py:calib --target mobile-arm")
    assert explain(phone).timed_on == ""
    assert all(o.ms is None for o in explain(phone).operators)


def test_a_profile_is_read_by_layer_and_conversions_stand_beside_the_operator_in_float() -> None:
    def event(name: str, op: str, kind: str, micros: int) -> dict:
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": micros,
                "args": {"op_name": op, "input_type_shape": [{kind: [1]}]}}  # fmt: skip

    events = [
        *[event("conv_token_3", "QLinearConv", "uint8", m) for m in (90, 90, 90, 10, 20, 30)],
        event("pad", "Pad", "float", 5), event("pad_q", "QuantizeLinear", "float", 7),
        event("x_dq", "DequantizeLinear", "uint8", 3), {"cat": "Session", "name": "run", "dur": 1},
    ]  # fmt: skip
    times = timing._read(events, {"pad_q": "pad", "x_dq": "pad"}, "here")
    assert times.of("conv").ms == pytest.approx(0.020)  # the median, without the first three
    assert times.of("conv").runs_in == "integer"
    pad = times.of("pad")
    assert (pad.ms, pad.converting_ms, pad.runs_in) == (0.005, pytest.approx(0.010), "float")
    assert pad.slow(is_float=False) == [
        "the runtime has no integer kernel for it and runs it in float",
        "29 % of the call converts what it reads or writes",
    ]
    assert pad.slow(is_float=True) == ["29 % of the call converts what it reads or writes"]
    assert times.of("elsewhere").ms is None


def test_float_operators_say_why_and_conversions_around_them_are_seen(tmp_path: Path) -> None:
    layers = tuple(Layer(name, op) for name, op in (("a", "Conv"), ("e", "Erf"), ("y", "Gemm"), ("z", "Abs")))
    manifest = small_artifact(tmp_path / "x", layers=layers)
    file = next(f for f in manifest.files if f.precision == "int8")
    islands = (Island("Erf", "e", "no integer form"), Island("Abs", "z", "no integer form"))
    found = {o.layer: o for o in operators(manifest, replace(file, islands=islands), None)}
    assert (found["e"].state, found["e"].why) == ("float", "no integer form")
    assert any("between integers" in reason for reason in found["e"].slow)
    assert found["a"].slow == ()


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (Layer("l", "Conv", 64, 64, 1), None),
        (Layer("l", "Conv", 3, 64, 1), None),  # colours are three
        (Layer("l", "Conv", 1, 64, 1), None),  # depthwise
        (Layer("l", "Gemm", 64, 10, 1), "64 × 10 channels fill 62 % of a unit that works on multiples of 16"),
        (Layer("l", "Conv", 20, 64, 1), "20 × 64 channels fill 62 % of a unit that works on multiples of 16"),
        (Layer("l", "Gemm"), None),
    ],
)
def test_channels_beside_the_multiple_of_the_target_are_counted(
    tmp_path: Path, layer: Layer, expected: str | None
) -> None:
    assert targets.load("x86").channel_multiple == 16
    manifest = small_artifact(tmp_path / "x", layers=(layer,))
    (found,) = operators(manifest, manifest.files[-1], None)
    assert found.slow == (() if expected is None else (expected,))


# ------------------------------------------------------------------ measured


def test_the_hub_is_made_again_bit_by_bit(here: Path) -> None:
    folder = plain(here)
    manifest, golden = load_manifest(folder), load_golden(folder)
    made = remake(manifest, "int8", folder, load_ranges(folder / "ranges.json"), {"calibration": "explained.py:calib"})
    assert made.graph.hash == manifest.graph
    assert tuple(repr(step) for step in made.steps) == manifest.files[-1].steps != ()
    assert golden is not None
    (answer,) = session(made.hub().bytes, optimize=False).run(None, golden.inputs)
    (kept,) = golden.answers["hub"].values()
    np.testing.assert_array_equal(answer.reshape(-1)[: kept.size], kept.reshape(-1))


def test_a_planted_outlier_channel_is_found_and_its_cure_ranks_first(here: Path) -> None:
    folder = exported(
        here, "uneven",
        "uneven --calib explained.py:calib --eval explained.py:test --target tensor.toml --recipe plain.toml",
    ) if (here / "plain.toml").write_text('[[step]]\nname = "bias_correct"\n') else None  # fmt: skip
    assert folder is not None
    found = explain(folder, calibration="explained.py:calib")
    assert found.measured is not None
    worst = found.worst[0]
    assert worst.layer == "first" and worst.weights is not None and worst.weights > 50
    best = found.measured.alternatives[0]
    assert best.gain_db > 6
    gains = {a.what: a.gain_db for a in found.measured.alternatives}
    assert gains["a weight scale per channel"] == pytest.approx(best.gain_db, abs=3)
    assert gains["first in float"] > 6
    assert [a.gain_db for a in found.measured.alternatives] == sorted(gains.values(), reverse=True)


def test_a_planted_spike_makes_other_thresholds_better(here: Path) -> None:
    folder = exported(here, "spike", "build --calib explained.py:one_spike --eval explained.py:test --target x86")
    found = explain(folder, calibration="explained.py:one_spike")
    assert found.measured is not None
    gains = {a.what: a.gain_db for a in found.measured.alternatives}
    assert gains["thresholds by percentile"] > 6
    assert found.measured.input > 20  # most of the error is made where the spike is
    assert any(s.outline for s in found.spans)  # histograms were measured for the pictures


def test_what_is_measured_is_what_an_export_with_that_option_gives(here: Path) -> None:
    folder = plain(here)
    found = explain(folder, calibration="explained.py:calib", samples=64)
    assert found.measured is not None
    score = next(s for s in load_manifest(folder).scores if s.precision == "int8")
    assert found.measured.quality.agreement == pytest.approx(score.agreement, abs=2)
    assert found.measured.quality.sqnr_db == pytest.approx(min(score.sqnr_db.values()), abs=0.5)
    mse = next(a for a in found.measured.alternatives if a.what == "thresholds by mse")
    other = exported(
        here, "mse", "build --calib explained.py:calib --eval explained.py:test --target x86 --thresholds mse"
    )
    again = next(s for s in load_manifest(other).scores if s.precision == "int8")
    assert mse.quality.sqnr_db == pytest.approx(min(again.sqnr_db.values()), abs=0.5)
    in_float = next(a for a in found.measured.alternatives if a.what.endswith("in float"))
    assert in_float.bytes > 0 and in_float.option.startswith("--keep-float ")
    shares = sum(o.share or 0.0 for o in found.operators) + found.measured.input
    assert shares == pytest.approx(100, abs=0.1)


def test_parts_of_the_samples_end_with_the_export_itself(here: Path) -> None:
    found = explain(plain(here), calibration="explained.py:calib").measured
    assert found is not None
    assert [p.samples for p in found.parts] == [8, 16, 32, 40]
    assert found.parts[-1].quality.sqnr_db == pytest.approx(found.quality.sqnr_db, abs=0.5)  # in another order


def told(*decibels: float) -> Measured:
    parts = tuple(Part(8 << i, Quality(d, None, None)) for i, d in enumerate(decibels))
    return Measured("data", 8, parts[-1].quality, 30.0, 0.0, (), parts, 1.0)


@pytest.mark.parametrize(
    ("decibels", "enough"),
    [((20, 30, 30.2, 30.1), 16), ((30, 30.1, 30), 8), ((20, 25, 30), None), ((30, 20, 30), None), ((30, 30), 8)],
)
def test_enough_samples_are_those_from_which_on_answers_stand_still(
    decibels: tuple[float, ...], enough: int | None
) -> None:
    assert told(*decibels).enough == enough


# ------------------------------------------------------------------ refusals


def refused(command: str, expected: str) -> Said:
    said = enter(command)
    assert said.code == 2, said.out + said.err
    assert re.search(expected, said.err), said.err
    assert "Traceback" not in said.err
    return said


def test_what_cannot_be_explained_says_why(here: Path) -> None:
    folder = plain(here).name
    refused("explain nowhere", "no folder nowhere")
    refused(f"explain {folder} --precision int9", "no integer file of precision 'int9'. Did you mean 'int8'")
    refused(f"explain {folder} --eval explained.py:test", "give --calib")
    refused(f"explain {folder} --calib explained.py:one_spike", "calibrated on .* other samples .* those of the export")
    exported(here, "floats", "build --target x86 --input x=1x3x8x8")
    refused("explain floats", "no file holds any.*--calib")
    exported(here, "eights", "build --target gpu-h100 --precision fp8 --calib explained.py:calib")
    refused("explain eights", "no file holds any.*stays in float in fp8.*report.html")


def test_measuring_needs_the_model_as_it_was(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(plain(here), tmp_path / "plain")
    monkeypatch.chdir(tmp_path)
    refused("explain plain --calib explained.py:calib", "Paths are meant from the folder")
    (tmp_path / "explained.py").write_text(NET.replace("manual_seed(0)", "manual_seed(1)"))
    refused("explain plain --calib explained.py:calib", "exported from another model")


def test_an_export_from_python_objects_is_explained_but_not_measured(here: Path) -> None:
    import torch
    from torch import nn

    import deploykit as dk

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    data = np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)
    if not (here / "object").exists():
        dk.export(net, "x86", data, out=here / "object", benchmark=False)
    assert enter("explain object").code == 0
    refused("explain object --calib explained.py:calib", "Python object")


def test_recipes_that_train_are_not_run_again(here: Path) -> None:
    (here / "train.toml").write_text('[[step]]\nname = "qat"\nsteps = 1\n')
    exported(
        here, "trained",
        "build --calib explained.py:calib --train explained.py:calib --target x86 --recipe train.toml",
    )  # fmt: skip
    refused("explain trained --calib explained.py:calib", "train once more")


def test_a_page_of_somebody_else_is_not_replaced(here: Path) -> None:
    (here / "mine.html").write_text("<html>mine</html>")
    refused(f"explain {plain(here).name} -o mine.html", "not a page that deploykit wrote")
    assert (here / "mine.html").read_text() == "<html>mine</html>"


# ------------------------------------------------------------------ how it is told


def test_the_terminal_shows_tables_and_what_to_do_next(here: Path) -> None:
    said = enter(f"explain {plain(here).name}")
    assert said.code == 0
    assert "worst operators by their own error" in said.out
    assert "ranges, " in said.out and "covered by minmax" in said.out
    assert "ranges by number of calibration samples" in said.out
    assert "add --calib DATA" in said.out


def test_measured_alternatives_come_first_in_the_terminal_with_what_to_type(here: Path) -> None:
    folder = exported(here, "spike", "build --calib explained.py:one_spike --eval explained.py:test --target x86")
    said = enter(f"explain {folder.name} --calib explained.py:one_spike --samples 32")
    assert said.code == 0, said.err
    assert said.out.index("what would be better") < said.out.index("worst operators by their share")
    assert "--thresholds percentile" in said.out
    assert "answers by number of calibration samples" in said.out


def test_json_has_everything_and_none_where_nothing_was_measured(here: Path) -> None:
    found = json.loads(enter(f"explain {plain(here).name} --json").out)
    assert found["precision"] == "int8" and found["measured"] is None
    assert {"layer", "state", "why", "sqnr_db", "weights", "values", "ms", "slow"} <= set(found["operators"][0])
    assert found["convergence"]["parts"] == [8, 16, 32, 40]


def test_the_page_needs_nothing_else_and_escapes_names(here: Path, tmp_path: Path) -> None:
    said = enter(f"explain {plain(here).name} -o {tmp_path / 'page.html'}")
    assert said.code == 0 and said.out.endswith("page.html\n")
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert page.count("<svg") >= 3  # pictures of ranges
    found = explain(plain(here))
    evil = replace(found, operators=(replace(found.operators[0], layer="<b>layer</b>"), *found.operators[1:]))
    assert "<b>layer</b>" not in render(evil) and "&lt;b&gt;layer&lt;/b&gt;" in render(evil)


def test_the_page_draws_what_was_measured() -> None:
    from deploykit.explain.explanation import Explanation, Operator

    alternative = Alternative("thresholds by mse", "--thresholds mse", Quality(31, 99, 80), 1.0, 0.5, 0, 2.0)
    e = Explanation(
        "out", "model.int8.onnx", "int8", "x86", (Operator("a", "Conv", "integer", sqnr_db=30.0, weights=60.0),),
        (), 0, "minmax", None, (), replace(told(20, 30, 30, 30), alternatives=(alternative,)),
    )  # fmt: skip
    page = render(e)
    assert "What would be better" in page and "--thresholds mse" in page
    assert "Answers by number of calibration samples" in page and 'class="front"' in page


def test_a_manifest_of_an_older_export_without_sizes_is_explained(tmp_path: Path) -> None:
    manifest = small_artifact(tmp_path / "x", layers=(Layer("a", "Conv"), Layer("y", "Gemm")))
    assert [o.layer for o in explain(tmp_path / "x").operators] == ["a", "y"]
    assert manifest.layers[0].outputs is None
    with pytest.raises(DeploykitError, match="not calibrated"):
        explain(tmp_path / "x", calibration="images")
