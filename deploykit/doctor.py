"""What is installed here, and what a missing extra would add."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil

EXTRAS = {
    "tflite": (("ai-edge-litert", "tflite-runtime"), "writes and runs .tflite files"),
    "train": (("accelerate",), "steps that train"),
    "report": (("jinja2",), "report.html"),
    "demo": (("scikit-learn",), "`deploykit demo`"),
    "openvino": (("openvino",), "OpenVINO files"),
}
BASE = ("torch", "numpy", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


def findings() -> dict[str, str]:
    """One line per component."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in BASE:
        found[name] = _version(name) or "MISSING: pip install deploykit"
    for extra, (packages, what) in EXTRAS.items():
        present = [f"{p} {v}" for p in packages if (v := _version(p))]
        found[f"extra {extra}"] = present[0] if present else f"not installed ({what}): pip install 'deploykit[{extra}]'"
    trtexec = shutil.which("trtexec")
    found["trtexec"] = trtexec or "not on this machine: TensorRT bundles are built on the device by build.sh"
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
