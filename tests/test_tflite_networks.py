"""Trained networks: every operator int8, fast to write, faster than float, the same answers as ONNX Runtime."""

from __future__ import annotations

import importlib.util
import io
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tflite_graphs import kinds, quantized, written

pytest.importorskip("ai_edge_litert", reason="the extra 'tflite' is not installed")

from deploykit.hub.lower import lower
from deploykit.hub.running import session

pytestmark = [pytest.mark.data, pytest.mark.slow]

Images = NDArray[np.float32]


def network(folder: Path, name: str, **options: Any) -> Any:
    from safetensors.torch import load_file

    spec = importlib.util.spec_from_file_location("reference_models", folder / "reference_models.py")
    assert spec is not None and spec.loader is not None
    definitions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(definitions)
    kind = {"resnet20": "ResNetC", "mobilenetv1": "MobileNetV1", "mobilenetv2": "MobileNetV2"}[name.split("_")[0]]
    module = getattr(definitions, kind)(**options)
    module.load_state_dict(load_file(folder / f"{name}.safetensors"), strict=False)
    return module.eval()


def cifar(folder: Path, split: str, count: int) -> Images:
    raw = np.load(folder / "cifar10_jpg.npz")
    stream, offsets = raw[f"jpg_{split}"], raw[f"off_{split}"]
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    opened = [Image.open(io.BytesIO(stream[offsets[i] : offsets[i + 1]].tobytes())) for i in range(count)]
    return np.stack([((np.asarray(i, np.float32) / 255 - mean) / std).transpose(2, 0, 1) for i in opened])


def imagenet(folder: Path, calibration: bool, count: int) -> Images:
    with tarfile.open(folder / "imagenet_samples_224.tar") as archive:
        members = sorted((m for m in archive.getmembers() if m.name.endswith(".jpg")), key=lambda m: Path(m.name).name)
        chosen = [m for i, m in enumerate(members) if (i % 5 == 0) == calibration][:count]
        opened = [Image.open(archive.extractfile(m)).convert("RGB") for m in chosen]  # type: ignore[arg-type]
    return np.stack([(np.asarray(i, np.float32).transpose(2, 0, 1) - 127.5) / 127.5 for i in opened])


@pytest.mark.parametrize(
    ("name", "options", "agreement"),
    [
        ("resnet20_cifar10jpg", {"n": 3}, 99.5),
        ("mobilenetv1_075_224_imagenet", {}, 99.5),
        ("mobilenetv2_10_224_imagenet_deq", {"bn": False}, 97.5),  # 200 images; rounding ties grow over 53 layers
    ],
)
def test_a_trained_network_runs_in_int8_as_the_hub_does(
    name: str, options: dict[str, Any], agreement: float, measuring_data: Path, tmp_path: Path
) -> None:
    small = name.startswith("resnet")
    calibration = cifar(measuring_data, "train", 256) if small else imagenet(measuring_data, True, 64)
    images = cifar(measuring_data, "test", 1000) if small else imagenet(measuring_data, False, 200)
    hub = quantized(lower(network(measuring_data, name, **options), {"x": calibration[:2]}), {"x": calibration})
    started = time.process_time()
    file, run = written(hub, tmp_path, "int8")
    assert time.process_time() - started <= 2
    assert file.islands == ()
    assert not {"TRANSPOSE", "QUANTIZE", "DEQUANTIZE"} & set(kinds(tmp_path / file.path))
    expected = session(hub.bytes).run(None, {"x": images})[0]
    found = run({"x": images})["output"]
    assert 100 * (found.argmax(1) == expected.argmax(1)).mean() >= agreement
    if name.startswith("mobilenetv1"):
        np.testing.assert_array_equal(found, expected)
    whole, slow = written(hub, tmp_path, "fp32")
    assert (tmp_path / file.path).stat().st_size <= 0.275 * (tmp_path / whole.path).stat().st_size
    times = interleaved([run, slow], {"x": images[:1]})
    assert times[0] < times[1]


def interleaved(runners: list[Callable[..., Any]], fed: dict[str, Images], runs: int = 40) -> list[float]:
    """Median seconds per call, all runners in turn."""
    taken = np.zeros((runs, len(runners)))
    for i in range(runs):
        for k, run in enumerate(runners):
            started = time.perf_counter()
            run(fed)
            taken[i, k] = time.perf_counter() - started
    return [float(m) for m in np.median(taken[5:], axis=0)]
