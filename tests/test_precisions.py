"""Precisions: what each changes, what its hub holds, which exporter writes it, and the road with several of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
import torch
from commands import enter
from conftest import TinyCNN
from graphs import conv_relu_conv, graph, images, measured, normal, residual
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto
from torch import nn

from deploykit import export, exporters, passes, pipeline, targets
from deploykit.core.artifact import Artifact
from deploykit.core.data import DataSet, Preprocess
from deploykit.core.errors import DeploykitError, MissingExtra
from deploykit.core.golden import load_golden
from deploykit.core.manifest import load_manifest
from deploykit.core.precision import (
    FORMATS,
    PRECISIONS,
    Precision,
    integers,
    is_corrected,
    is_integer,
    is_quantized,
    nearest,
    needs_calibration,
    spec_of,
)
from deploykit.core.request import Gate
from deploykit.core.target import QuantSpec
from deploykit.hub.graph import FloatGraph, Hub, constant
from deploykit.hub.quantize import activation_params, quantize
from deploykit.hub.running import session
from deploykit.hub.training.module import HubModule
from deploykit.hub.widen import widened
from deploykit.planning import correction
from deploykit.report import report_json, write_report
from deploykit.verify import verify

STATIC = [p for p in PRECISIONS if FORMATS[p].kind == "static"]
FLOAT = [p for p in PRECISIONS if FORMATS[p].kind == "float"]
FLOAT8 = [p for p in PRECISIONS if FORMATS[p].kind == "float8"]
TARGETS = {"onnx": "x86", "tflite": "mobile-arm", "openvino": "x86-openvino", "tensorrt": "jetson", "c99": "cortex-m4"}
LENIENT = Gate(min_agreement=1.0)


def hub_of(made: FloatGraph, data: DataSet, precision: Precision, spec: QuantSpec | None = None) -> Hub:
    return quantize(made, measured(made, data), spec_of(spec or QuantSpec(), precision))


def node_by_node(model: bytes, data: DataSet) -> NDArray[Any]:
    """What ONNX Runtime computes of the hub as it is, without the project's own rewriting."""
    return np.asarray(session(model, optimize=False).run(None, next(data.batches(len(data))).inputs)[0])


# ------------------------------------------------------------------------------------------------------------ the table


def test_every_precision_has_a_format_and_what_comes_nearest_to_it_is_known() -> None:
    assert get_args(Precision) == PRECISIONS
    for precision, found in FORMATS.items():
        assert found.title
        assert set(found.nearest) <= set(PRECISIONS) - {precision}
        assert found.nearest or precision == "fp32"
        assert not (found.numbers and found.kind == "float")


def test_integers_are_told_from_floats() -> None:
    assert [p for p in PRECISIONS if not is_quantized(p)] == FLOAT == ["fp32", "fp16", "bf16"]
    assert [p for p in PRECISIONS if is_quantized(p) and not is_integer(p)] == FLOAT8 == ["fp8"]
    assert {p for p in PRECISIONS if needs_calibration(p)} == {*STATIC, *FLOAT8}
    assert [p for p in PRECISIONS if is_corrected(p)] == STATIC
    assert integers(["original", "fp16", "w4a8", "all", "int8"]) == ("w4a8", "int8")
    assert not is_integer("original")


@pytest.mark.parametrize(
    ("precision", "there", "expected"),
    [
        ("w4a8", ("fp32", "fp16", "int8", "int8-fp16"), "int8"),
        ("w2a8", ("fp32", "w4a8", "int8"), "w4a8"),
        ("int8-fp16", ("fp32", "fp16"), "fp16"),
        ("fp16", ("int8",), "int8"),
    ],
)
def test_the_nearest_is_the_first_of_its_own_that_can_be_had(precision: Any, there: Any, expected: str) -> None:
    assert nearest(precision, there) == expected


def test_a_precision_changes_a_targets_numbers_only_where_it_says_so() -> None:
    board = QuantSpec(weight_bits=5, scale="power_of_two", weight_granularity="tensor")
    assert spec_of(board, "int8") is not None and spec_of(board, "int8") == spec_of(board, "fp16") == board
    assert spec_of(board, "w4a8") == replace(board, weight_bits=4)
    assert spec_of(board, "w3a8").weight_max == 3
    assert spec_of(board, "w2a8").weight_max == 1  # -1, 0, 1
    wide = spec_of(board, "int16x8")
    assert (wide.weight_bits, wide.activation_range, wide.activation_storage) == (8, (-32767, 32767), "int16")


@pytest.mark.parametrize(
    ("signed", "symmetric", "inside", "storage"),
    [(False, False, (0, 15), "uint4"), (True, False, (-8, 7), "int4"), (True, True, (-7, 7), "int4")],
)
def test_four_bit_activations_keep_eight_bits_where_the_network_is_entered_and_left(
    signed: bool, symmetric: bool, inside: tuple[int, int], storage: str
) -> None:
    spec = spec_of(QuantSpec(activation_signed=signed, activation_symmetric=symmetric), "w4a4")
    assert (spec.activation_range, spec.activation_storage) == (inside, storage)
    assert spec.ports.activation_bits == 8 and spec.ports.port_bits is None
    assert spec.ports.activation_storage == ("int8" if signed else "uint8")


@pytest.mark.parametrize(
    "wrong", [{"weight_bits": 1}, {"weight_bits": 9}, {"activation_bits": 1}, {"activation_bits": 12}, {"port_bits": 9}]
)
def test_bits_without_a_storage_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="between 2 and 8"):
        QuantSpec(**wrong)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- the hub


@pytest.mark.parametrize(
    ("precision", "low", "high", "scale", "zero"),
    [
        ("w4a4", 0.0, 3.0, 0.2, 0),  # 15 steps
        ("w4a4", -1.0, 2.0, 0.2, 5),
        ("int16x8", -1.0, 2.0, 2 / 32767, 0),
        ("w4a8", 0.0, 2.55, 0.01, 0),
    ],
)
def test_scales_worked_out_by_hand(precision: Any, low: float, high: float, scale: float, zero: int) -> None:
    p = activation_params(low, high, spec_of(QuantSpec(), precision))
    assert p.scale == np.float32(scale)
    assert int(p.zero_point) == zero


def test_a_four_bit_value_beyond_its_range_is_cut_at_the_end_of_the_range() -> None:
    text = "(float[batch,1] a, float[batch,1] b) => (float[batch,1] y) { d = Sub(a, b)  y = Mul(d, two) }"
    made = graph(text, two=np.float32(2))
    near = DataSet.of({"a": np.float32([[0], [1], [3], [3]]), "b": np.float32([[0], [0], [0], [3]])})  # a - b is 0 to 3
    hub = hub_of(made, near, "w4a4")
    far = DataSet.of({"a": np.float32([[3], [0]]), "b": np.float32([[-3], [3]])})  # b saturates at 0
    assert hub.quantized is not None
    d = {v.name: v for n in hub.quantized.graph for v in n.inputs if v is not None}["d_scale"]
    assert constant(d) == np.float32(0.2)
    np.testing.assert_allclose(node_by_node(hub.bytes, far), [[6.0], [0.0]], atol=0.03)


@pytest.mark.parametrize("precision", STATIC)
def test_a_hub_is_standard_onnx_with_the_types_of_its_precision(precision: Precision) -> None:
    hub = hub_of(residual(), images(), precision)
    model = onnx.load_model_from_string(hub.bytes)
    onnx.checker.check_model(model)
    zeros = {t.name: t.data_type for t in model.graph.initializer}
    kinds = {n.input[0]: zeros[n.input[2]] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    inside = {"w4a4": TensorProto.UINT4, "int16x8": TensorProto.INT16}.get(precision, TensorProto.UINT8)
    port = inside if precision == "int16x8" else TensorProto.UINT8
    assert kinds["x"] == kinds["y_float"] == port
    assert {kinds["r"], kinds["b"], kinds["t"], kinds["m"]} == {inside}
    assert model.opset_import[0].version == (21 if inside != TensorProto.UINT8 else 20)
    largest = max(int(np.abs(a).max()) for a in stored_weights(hub))
    assert largest == hub.spec.weight_max


def stored_weights(hub: Hub) -> list[NDArray[Any]]:
    assert hub.quantized is not None
    found = [constant(hub.quantized.graph.initializers[name]) for name in hub.weights]
    return [a for a in found if a is not None]


def test_ternary_weights_are_minus_one_zero_and_one() -> None:
    for array in stored_weights(hub_of(residual(), images(), "w2a8")):
        assert set(np.unique(array)) == {-1, 0, 1}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.sampled_from(STATIC), st.booleans(), st.floats(0.2, 4.0))
def test_everybody_who_runs_a_hub_computes_the_same(seed: int, precision: Any, signed: bool, reach: float) -> None:
    made = residual(seed) if seed % 2 else conv_relu_conv(seed)
    hub = hub_of(made, images(seed=seed), precision, QuantSpec(activation_signed=signed))
    beyond = DataSet.of({"x": reach * normal(seed + 7, 4, 3, 8, 8)})  # ranges are exceeded, and cut
    expected = node_by_node(hub.bytes, beyond)
    proto, x = onnx.load_model_from_string(hub.bytes), next(beyond.batches(4)).inputs
    np.testing.assert_array_equal(session(proto, optimize=False).run(None, x)[0], expected)
    step = np.abs(expected).max() / hub.spec.ports.activation_range[1]
    with torch.no_grad():
        (trained,) = HubModule(hub)(x=torch.from_numpy(x["x"])).values()
    for ours in (session(proto).run(None, x)[0], trained.numpy()):  # by integer kernels; with gradients
        # a tie inside may be rounded either way, and one step inside is some at the end
        assert (np.abs(ours - expected) <= 3 * step).mean() > 0.99


def test_widening_leaves_no_four_bit_type_and_what_has_none_as_it_is() -> None:
    model = onnx.load_model_from_string(hub_of(residual(), images(), "w4a4").bytes)
    before = model.SerializeToString()
    made = widened(model)
    assert model.SerializeToString() == before
    assert not {t.data_type for t in made.graph.initializer} & {TensorProto.UINT4, TensorProto.INT4}
    clips = [n for n in made.graph.node if n.op_type == "Clip"]
    assert len(clips) == 4  # r, b, t, m; x and y have 8 bits
    eight = onnx.load_model_from_string(hub_of(residual(), images(), "int8").bytes)
    assert widened(eight) is eight


def test_values_that_are_only_moved_are_not_cut_again() -> None:
    made = graph(
        """(float[batch,2,4,4] x) => (float[batch,2,2,2] y) {
            a = Add(x, one)  p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)  y = Mul(p, one)
        }""",
        one=np.ones((1, 2, 1, 1), np.float32),
    )
    made_wide = widened(onnx.load_model_from_string(hub_of(made, images(shape=(2, 4, 4)), "w4a4").bytes))
    assert sum(n.op_type == "Clip" for n in made_wide.graph.node) == 1  # a; p has its scale


# -------------------------------------------------------------------------------------------------------- the exporters


def loaded(name: str) -> exporters.Exporter:
    exporter = exporters.load(name)
    try:
        exporter.runtime()
    except MissingExtra as error:
        pytest.skip(str(error))
    return exporter


@pytest.mark.parametrize("name", exporters.names())
def test_an_exporters_table_names_known_precisions_and_a_reason_for_what_it_leaves_out(name: str) -> None:
    exporter = exporters.load(name)
    assert set(exporter.CARRIES) <= set(PRECISIONS) and len(set(exporter.CARRIES)) == len(exporter.CARRIES)
    assert set(exporter.WHY_NOT) == set(PRECISIONS) - set(exporter.CARRIES)


@pytest.mark.parametrize("name", targets.names())
def test_what_a_target_takes_its_exporter_writes(name: str) -> None:
    target = targets.load(name)
    assert set(target.precisions) | set(target.on_request) <= set(exporters.load(target.exporter).CARRIES)
    assert not set(target.precisions) & set(target.on_request)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("precision", [*FLOAT, *FLOAT8, *STATIC])
def test_a_precision_is_written_and_runs_like_its_hub_or_is_refused_with_the_nearest(
    name: str, precision: Precision, tmp_path: Path
) -> None:
    exporter, target = loaded(name), targets.load(TARGETS[name])
    made, data = conv_relu_conv(), images()
    hub = hub_of(made, data, precision, target.quant)
    if precision not in exporter.CARRIES:
        with pytest.raises(DeploykitError) as error:
            exporter.export({precision: hub}, target, tmp_path)
        said = str(error.value)
        assert f"does not write {precision} ({exporter.WHY_NOT[precision]})" in said
        assert f"--precision {nearest(precision, exporter.CARRIES)}." in said
        assert not list(tmp_path.iterdir())
        return
    (file,) = exporter.export({precision: hub}, target, tmp_path)
    assert file.precision == precision
    x = next(data.batches(16)).inputs
    (y,) = exporter.load(tmp_path / file.path, 1)(x).values()
    expected = node_by_node(hub.bytes if is_integer(precision) else made.bytes, data)
    span = np.abs(expected).max()
    # two layers, each of whose results may be one step off
    tolerance = 2.5 * span / hub.spec.activation_range[1] if is_integer(precision) else 2e-3 * span
    assert np.abs(y - expected).max() <= tolerance


def test_an_exporter_that_is_given_several_hubs_writes_each_file_from_its_own(tmp_path: Path) -> None:
    made, data = residual(), images()
    hubs = {p: hub_of(made, data, p) for p in ("w2a8", "fp32", "int8")}  # type: ignore[arg-type]
    files = exporters.load("onnx").export(hubs, targets.load("x86"), tmp_path)  # type: ignore[arg-type]
    assert [f.path for f in files] == ["model.w2a8.onnx", "model.fp32.onnx", "model.int8.onnx"]
    for file in files:
        y = np.asarray(exporters.load("onnx").load(tmp_path / file.path)(next(data.batches(16)).inputs)["y"])
        model = hubs[file.precision].bytes if is_integer(file.precision) else made.bytes
        np.testing.assert_allclose(y, node_by_node(model, data), atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- the road


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """One artifact with five precisions, two of which share a hub with nobody."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("several") / "out"
    return export(
        TinyCNN().eval(), "x86", normal(0, 40, 3, 16, 16), out=folder, benchmark=False, gate=LENIENT,
        precisions=("fp32", "w4a8", "int8", "w4a4", "int16x8"),
    )  # fmt: skip


def test_every_integer_file_of_an_artifact_has_a_hub_steps_and_checks_of_its_own(several: Artifact) -> None:
    manifest = load_manifest(several.folder)
    assert [f.path for f in manifest.files] == [f"model.{p}.onnx" for p in ("fp32", "w4a8", "int8", "w4a4", "int16x8")]
    numbers = targets.load("x86").quant
    for file in manifest.files:
        automatic = correction(spec_of(numbers, file.precision)) if is_integer(file.precision) else ()
        assert [s.split("(")[0] for s in file.steps] == [passes.load(name).__name__ for name in automatic]
    assert set(manifest.steps) == {s for f in manifest.files for s in f.steps}
    assert len({f.steps for f in manifest.files}) == 3  # none, that of 8 bits, that of 4
    for precision in integers(f.precision for f in manifest.files):
        operators = manifest.operators_of(precision)
        assert {o.precision for o in operators} == {precision}
        assert {o.layer for o in operators} >= {"stem", "conv", "mean"}
        assert any(c.precision == precision and c.name.startswith("file agrees with the hub") for c in manifest.checks)
        assert any(c.precision == precision and c.name.startswith("operators: largest") for c in manifest.checks)
    assert manifest.passed


def test_an_artifact_with_several_integer_files_is_verified_and_reported(several: Artifact, tmp_path: Path) -> None:
    golden = load_golden(several.folder)
    assert golden is not None
    whose = {"original", "hub", "hub w4a8", "hub w4a4", "hub int16x8", "fp32", "w4a8", "int8", "w4a4", "int16x8"}
    assert set(golden.answers) == whose
    found = verify(several.folder)
    found.refuse_failed()
    against = [c.precision for c in found.checks if c.name == "answers against the hub (dB)"]
    assert against == ["w4a8", "int8", "w4a4", "int16x8"]
    pytest.importorskip("jinja2", reason="the extra 'report' is not installed")
    page = write_report(several.folder, out=tmp_path / "report.html").read_text(encoding="utf-8")
    for expected in ("w4a4 (", "int8 (", "for w4a8, w4a4", "for int8, int16x8"):
        assert expected in page
    (told,) = report_json(several.folder)["artifacts"]
    integer = [f"model.{p}.onnx" for p in ("w4a8", "int8", "w4a4", "int16x8")]
    assert [layers["path"] for layers in told["layers"]] == integer


def test_a_file_does_not_depend_on_what_is_written_beside_it(several: Artifact, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = TinyCNN().eval()
    alone = export(net, "x86", normal(0, 40, 3, 16, 16), out=tmp_path / "out", benchmark=False, precisions=("int8",))
    assert (alone.folder / "model.int8.onnx").read_bytes() == (several.folder / "model.int8.onnx").read_bytes()


def test_two_targets_share_the_hubs_of_their_precisions(tmp_path: Path, tiny_cnn: nn.Module) -> None:
    pytest.importorskip("ai_edge_litert", reason="the extra 'tflite' is not installed")
    data = {"calibration": DataSet.of({"x": normal(0, 24, 3, 16, 16)})}
    chosen = [targets.load(name) for name in ("mobile-arm", "raspberry-pi-5")]
    from deploykit.models import accept_module

    prepared = pipeline.prepare(accept_module(tiny_cnn), data, None)
    wanted = pipeline.Settings(precisions=("int8", "w4a8"), benchmark=False)
    folders = [tmp_path / t.name for t in chosen]
    first, second = pipeline.export(prepared, chosen, folders, wanted, LENIENT)
    x = {"x": normal(3, 8, 3, 16, 16)}
    for precision in wanted.precisions:
        ours, theirs = (load_golden(a.folder) for a in (first, second))
        assert ours is not None and theirs is not None
        who = "hub" if precision == "int8" else f"hub {precision}"
        np.testing.assert_array_equal(ours.answers[who]["output"], theirs.answers[who]["output"])
        a, b = (artifact(**x, precision=precision)["output"] for artifact in (first, second))
        np.testing.assert_array_equal(a, b)


def test_pixels_are_folded_into_a_first_layer_that_keeps_seven_bits(tmp_path: Path) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(20):
        Image.fromarray(random.integers(0, 256, (12, 12, 3)).astype(np.uint8)).save(tmp_path / "images" / f"{i}.png")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(1024, 5))
    artifact = export(
        net.eval(), "x86", str(tmp_path / "images"), out=tmp_path / "out", benchmark=False, gate=LENIENT,
        preprocess=Preprocess(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25)), precisions=("w4a8", "w4a4", "int16x8"),
        uint8_input=True,
    )  # fmt: skip
    manifest = load_manifest(artifact.folder)
    (note,) = [n for n in manifest.notes if n.startswith("int16x8: input")]
    assert "scaled and normalised in float" in note
    largest = {}
    for precision in ("w4a8", "w4a4"):
        model = onnx.load(artifact.folder / f"model.{precision}.onnx")
        arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        (name,) = [n for n in arrays if n.endswith("weight_pixels")]
        largest[precision] = int(np.abs(arrays[name].astype(np.int64)).max())
        assert next(i.type.tensor_type.elem_type for i in model.graph.input) == TensorProto.UINT8
    assert largest == {"w4a8": 63, "w4a4": 63}
    scores = {s.precision: s.sqnr_db["output"] for s in manifest.scores}
    assert scores["int16x8"] > scores["w4a8"] > scores["w4a4"] > 6


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("target", "precision", "phrases"),
    [
        ("jetson", "w4a8", ("TensorRT's integer kernels", "--precision int8.")),
        ("jetson-nano", "int8-fp16", ("--precision fp16.",)),
        ("gpu-t4", "fp8", ("fp8 tensor cores begin with compute capability 8.9", "--precision int8-fp16.")),
        ("x86", "fp8", ("widens 8-bit floating point", "--precision int8.")),
        (
            "mobile-arm",
            "w4a4",
            ("no kernels for activations of 4 bits", "on request int16x8", "--precision w4a8."),
        ),
        ("x86", "bf16", ("no bfloat16 kernels", "--precision fp32.")),
        ("x86-openvino", "w2a8", ("8 bits", "--precision int8.")),
        ("cortex-m7", "int16x8", ("its kernels read weights and activations of 8 bits", "--precision int8.")),
    ],
)
def test_what_a_target_does_not_take_is_refused_before_anything_runs(
    target: str, precision: str, phrases: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("calib.npy", normal(0, 8, 4))
    said = enter(f"export nowhere.py:net --target {target} --precision {precision} --calib calib.npy -o out")
    assert said.code == 2 and not said.out
    assert f"target '{target}' does not take {precision}" in said.err
    for phrase in phrases:
        assert phrase in said.err
    assert not Path("out").exists()


BOARD = 'extends = "x86"\nopset = 20\n'


def test_a_runtime_too_old_for_int4_gets_int8_and_is_told_so(tmp_path: Path, tiny_cnn: nn.Module) -> None:
    (tmp_path / "old.toml").write_text(BOARD)
    data = normal(0, 24, 3, 16, 16)
    artifact = export(
        tiny_cnn, str(tmp_path / "old.toml"), data, out=tmp_path / "out", benchmark=False, gate=LENIENT,
        precisions=("w4a8", "w4a4"),
    )  # fmt: skip
    for file in load_manifest(artifact.folder).files:
        model = onnx.load(artifact.folder / file.path)
        assert model.opset_import[0].version == 20
        assert "stored in int8: INT4 begins with operator set 21" in " ".join(file.notes)


def test_sixteen_bits_are_refused_early_where_the_runtime_is_too_old(
    tmp_path: Path, tiny_cnn: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old.toml").write_text(BOARD)

    def long_work(*_: Any) -> None:
        raise AssertionError("the long work began")

    monkeypatch.setattr("deploykit.check.check_lowering", long_work)  # what comes after the rehearsal
    with pytest.raises(DeploykitError, match="operator sets up to 20; the int16x8 graph needs 21"):
        export(
            tiny_cnn, str(tmp_path / "old.toml"), normal(0, 24, 3, 16, 16), out=tmp_path / "out", benchmark=False,
            precisions=("int16x8",),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_without_sample_data_an_integer_file_is_refused_by_its_name(tmp_path: Path, tiny_cnn: nn.Module) -> None:
    with pytest.raises(DeploykitError, match="w4a8 needs sample data; give --calib"):
        export(tiny_cnn, "x86", example={"x": normal(0, 2, 3, 16, 16)}, out=tmp_path / "out", precisions=("w4a8",))
