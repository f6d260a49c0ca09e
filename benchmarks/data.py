"""The measuring data and trained networks, found through DEPLOYKIT_DATA (default ``../shared/data``). Never shipped."""

from __future__ import annotations

import importlib.util
import io
import os
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from deploykit.core.data import DataSet

ROOT = Path(os.environ.get("DEPLOYKIT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _definitions() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_models", ROOT / "reference_models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _with_weights(module: nn.Module, name: str) -> nn.Module:
    missing = module.load_state_dict(load_file(ROOT / f"{name}.safetensors"), strict=False)
    assert not missing.unexpected_keys
    return module.eval()


def resnet20() -> nn.Module:
    """ResNet-20 fine-tuned on JPEG CIFAR-10; 32 x 32, 10 classes."""
    return _with_weights(_definitions().ResNetC(3), "resnet20_cifar10jpg")


def mobilenetv1() -> nn.Module:
    """MobileNetV1 0.75 at 224, 1000 classes, with batch normalisation."""
    return _with_weights(_definitions().MobileNetV1(), "mobilenetv1_075_224_imagenet")


def mobilenetv2() -> nn.Module:
    """MobileNetV2 1.0 at 224, 1000 classes; its weights already lie on an 8-bit grid."""
    return _with_weights(_definitions().MobileNetV2(bn=False), "mobilenetv2_10_224_imagenet_deq")


def cifar(split: str, count: int) -> DataSet:
    """The first ``count`` JPEG images of ``train`` or ``test``, normalised, decoded one at a time."""
    raw = np.load(ROOT / "cifar10_jpg.npz")
    stream, offsets, labels = raw[f"jpg_{split}"], raw[f"off_{split}"], raw[f"y_{split}"]
    mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (CIFAR_MEAN, CIFAR_STD))

    def sample(i: int) -> dict[str, NDArray[np.float32]]:
        image = Image.open(io.BytesIO(stream[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB")
        pixels = np.asarray(image, np.float32).transpose(2, 0, 1) / 255.0
        return {"x": (pixels - mean) / std}

    return DataSet(sample, tuple(range(count)), labels[:count].astype(np.int64), f"CIFAR-10 JPEG {split}")


def imagenet(calibration: bool, shift: float = 127.5) -> DataSet:
    """Sample images scaled to about [-1, 1]: every fifth to calibrate, or the others to evaluate."""
    archive = tarfile.open(ROOT / "imagenet_samples_224.tar")  # noqa: SIM115 (stays open)
    members = sorted((m for m in archive.getmembers() if m.name.endswith(".jpg")), key=lambda m: Path(m.name).name)
    chosen = [i for i in range(len(members)) if (i % 5 == 0) == calibration]

    def sample(i: int) -> dict[str, NDArray[np.float32]]:
        stream = archive.extractfile(members[i])
        assert stream is not None
        pixels = np.asarray(Image.open(stream).convert("RGB"), np.float32).transpose(2, 0, 1)
        return {"x": (pixels - shift) / 127.5}

    labels = np.asarray([int(Path(members[i].name).name.split("_")[0]) for i in chosen], np.int64)
    return DataSet(sample, tuple(chosen), labels, "ImageNet samples")
