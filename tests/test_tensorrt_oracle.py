"""NVIDIA's own parser and builder as the judge: does TensorRT take our files, and does it run them in int8?

The machinery, and what the verdicts are worth, is in benchmarks/tensorrt_oracle.py. It builds and never runs; the
numbers are TensorRT-RTX's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from families import example
from tensorrt_graphs import BROKEN, OPERATORS, SINCE_16, hub, model, residual, samples, small_net

from deploykit import targets
from deploykit.exporters import to_tensorrt
from deploykit.exporters.tensorrt.opset import lower_opset
from deploykit.exporters.tensorrt.parsers import unread

pytestmark = pytest.mark.oracle

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("DEPLOYKIT_DATA", ROOT.parent / "shared" / "data"))
FLOAT_RUN = {"Q9", "Q10", "Q11", "Q12"}
"""S rules whose graphs NVIDIA builds, with no int8 product in the engine."""


def judge(*files: Path) -> list[dict[str, Any]]:
    """The oracle's verdicts; skips with its reason where it cannot run."""
    command = [sys.executable, str(ROOT / "benchmarks" / "tensorrt_oracle.py"), "--json", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    verdicts: list[dict[str, Any]] = json.loads(done.stdout)
    return verdicts


def export(proto: onnx.ModelProto, target_name: str, folder: Path, data: np.ndarray[Any, Any]) -> list[Path]:
    target = targets.load(target_name)
    name = proto.graph.input[0].name
    files = to_tensorrt.export(dict.fromkeys(target.precisions, hub(proto, target.quant, {name: data})), target, folder)
    return [folder / f.path for f in files]


def assert_int8(verdict: dict[str, Any]) -> None:
    assert verdict["accepted"], verdict
    assert verdict["int8_convolution_kernels"] >= 0.95 * verdict["convolutions"] > 0, verdict
    assert verdict["int8_gemm_kernels"] == verdict["products"], verdict


@pytest.mark.parametrize("target", ["jetson", "gpu-t4"])
def test_every_variant_of_a_bundle_is_taken_and_int8_runs_in_int8(target: str, tmp_path: Path) -> None:
    fp32, fp16, int8, both = judge(*export(small_net(), target, tmp_path, samples()))
    assert (fp32["accepted"], fp16["accepted"]) == (True, True)
    assert fp32["kernels"] == {"correlation Float": 2}
    assert fp16["kernels"] == {"correlation Half": 2}
    for verdict in (int8, both):
        assert_int8(verdict)
        assert verdict["quantize_operations"] == 3  # the inputs of two convolutions and a product; the skip shares one


@pytest.mark.parametrize("target", ["jetson-nano", "jetson-xavier-nx"])
def test_files_for_boards_without_strong_typing_are_taken(target: str, tmp_path: Path) -> None:
    fp32, fp16, *int8 = judge(*export(small_net(), target, tmp_path, samples()))
    assert fp32["kernels"] == {"correlation Float": 2}
    assert fp16["kernels"] == {"correlation Half": 2}
    assert len(int8) == (target == "jetson-xavier-nx")
    for verdict in int8:
        assert_int8(verdict)


@pytest.mark.parametrize(("opset", "release"), [(13, (8, 2)), (17, (8, 5))])
def test_operators_of_older_sets_are_taken(opset: int, release: tuple[int, int], tmp_path: Path) -> None:
    """This parser reads them all; that of 8.2 or 8.5 cannot be asked here."""
    paths = []
    later = {k: v for k, v in SINCE_16.items() if k != "scattered sums"}  # a plugin, which RTX does not have
    for what, (body, y, arrays) in {**OPERATORS, **(later if opset >= 16 else {})}.items():
        proto = model(body, "float[2,16,8,8] x", y, 20, **arrays)
        lowered = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
        lower_opset(lowered, opset, unread(release))
        paths.append(tmp_path / f"{what}.onnx")
        paths[-1].write_bytes(ir.to_proto(lowered).SerializeToString())
    refused = {Path(v["file"]).stem: v["error"] for v in judge(*paths) if not v["accepted"]}
    assert refused == {}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["squeeze_excite", "vit", "yolo", "bert", "lstm"])
@pytest.mark.parametrize("target", ["jetson-nano", "jetson-xavier-nx", "jetson"])
def test_families_of_networks_are_taken_in_older_operator_sets(family: str, target: str, tmp_path: Path) -> None:
    from deploykit.hub.graph import Hub
    from deploykit.hub.lower import lower

    found, board = example(family), targets.load(target)
    graph = lower(found.module, next(found.data.batches(2)).inputs)
    files = to_tensorrt.export(dict.fromkeys(("fp32", "fp16"), Hub(graph, board.quant)), board, tmp_path)
    for verdict in judge(*(tmp_path / f.path for f in files)):
        assert verdict["accepted"], verdict


def test_the_lint_says_what_the_parser_and_builder_do(tmp_path: Path) -> None:
    graphs = {"clean": ("", "", residual()), **BROKEN}
    paths = []
    for name, (_, _, proto) in graphs.items():
        paths.append(tmp_path / f"{name}.onnx")
        paths[-1].write_bytes(proto.SerializeToString())
    for (name, (rule, severity, _)), verdict in zip(graphs.items(), judge(*paths), strict=True):
        if rule == "Q23":  # ONNX forbids what this parser lets pass
            continue
        assert verdict["accepted"] == (severity != "E"), (name, verdict)
        if severity != "E":
            assert (verdict["int8_convolution_kernels"] == 0) == (rule in FLOAT_RUN), (name, verdict)


@pytest.mark.data
@pytest.mark.parametrize("network", ["resnet20_cifar10jpg", "mobilenetv1_075_224_imagenet"])
def test_real_networks_run_in_int8(network: str, tmp_path: Path) -> None:
    if not DATA.is_dir():
        pytest.skip(f"no measuring data at {DATA}: set DEPLOYKIT_DATA")
    from safetensors.torch import load_file

    from deploykit.hub.lower import lower

    sys.path.insert(0, str(DATA))
    try:
        import reference_models  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(DATA))
    small = network.startswith("resnet")
    module = reference_models.ResNetC(3) if small else reference_models.MobileNetV1()
    module.load_state_dict(load_file(DATA / f"{network}.safetensors"), strict=False)
    x = samples(4, 3, 32, 32) if small else samples(2, 3, 224, 224)
    graph = lower(module.eval(), {"x": x})
    files = export(onnx.load_model_from_string(graph.bytes), "jetson", tmp_path, x)
    _, fp16, int8, both = judge(*files)
    assert fp16["accepted"], fp16
    assert_int8(int8)
    assert_int8(both)
    assert int8["convolutions"] == (19 if small else 27)
