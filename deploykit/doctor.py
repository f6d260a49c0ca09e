"""``deploykit doctor``: what is installed here, what this processor can, and how to get what is missing.

Versions are read from the packages' metadata; nothing is imported or started for them.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deploykit.core.machine import VNNI, features, processor


@dataclass(frozen=True)
class Finding:
    """One thing that is here or not."""

    name: str
    found: str
    """Version or path; empty: it is missing."""
    enables: str
    get: str
    """The command that brings it."""


@dataclass(frozen=True)
class Wanted:
    """One thing to look for: any of the names will do."""

    names: tuple[str, ...]
    enables: str
    get: str


BASE = ("torch", "numpy", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
PACKAGES = (
    *(Wanted((name,), "everything", "pip install deploykit") for name in BASE),
    Wanted(("ai-edge-litert", "tflite-runtime"), "writes and runs .tflite files", "pip install 'deploykit[tflite]'"),
    Wanted(("openvino",), "writes and runs OpenVINO files", "pip install 'deploykit[openvino]'"),
    Wanted(("tensorrt",), "builds engines where there is an NVIDIA GPU", "pip install 'deploykit[tensorrt]'"),
    Wanted(("accelerate",), "steps that train, such as qat", "pip install 'deploykit[train]'"),
    Wanted(("jinja2",), "report.html", "pip install 'deploykit[report]'"),
    Wanted(("scipy",), "the step mixed", "pip install 'deploykit[mixed]'"),
    Wanted(("scikit-learn",), "data for `deploykit demo`", "pip install 'deploykit[demo]'"),
)
TOOLS = (
    Wanted(("cc", "gcc", "clang"), "compiles and runs C files here", "apt install build-essential"),
    Wanted(("cmake",), "builds C files with their CMakeLists.txt", "apt install cmake"),
    Wanted(("make",), "builds C files with their Makefile", "apt install make"),
    Wanted(("arm-none-eabi-gcc",), "compiles C files for Cortex-M", "apt install gcc-arm-none-eabi"),
    Wanted(("qemu-aarch64", "qemu-aarch64-static"), "runs arm64 programs here", "apt install qemu-user-static"),
    Wanted(("trtexec",), "builds and times TensorRT bundles here, not only on the device", "install TensorRT"),
    Wanted(("ssh",), "devices at ssh://user@host", "apt install openssh-client"),
    Wanted(("adb",), "devices at adb://serial", "apt install adb"),
)


@dataclass(frozen=True)
class Diagnosis:
    """All findings."""

    python: str
    machine: str
    processor: str
    features: tuple[str, ...]
    target: str
    """The x86 target that fits this processor; empty on others."""
    why: str
    packages: tuple[Finding, ...]
    tools: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is missing has None for ``found``."""
        found = asdict(self)
        for kind in ("packages", "tools"):
            found[kind] = [f | {"found": f["found"] or None} for f in found[kind]]
        return found

    def lines(self) -> list[str]:
        """For people: what is here, then what is missing."""
        found = [
            f"python {self.python} on {self.machine}",
            f"processor  {self.processor}" + (f" ({', '.join(self.features)})" if self.features else ""),
            *([f"target     {self.target}: {self.why}"] if self.target else []),
        ]
        everything = (*self.packages, *self.tools)
        here, missing = [f for f in everything if f.found], [f for f in everything if not f.found]
        width = max(len(f.name) for f in everything)
        found += ["", *(f"{f.name:{width}}  {f.found}" for f in here)]
        if missing:
            found += ["", "not here (pip adds an extra to the deploykit of this environment, from any folder):"]
            found += [f"{f.name:{width}}  {f.enables}: {f.get}" for f in missing]
        return found


def diagnose() -> Diagnosis:
    """Looks around."""
    packages = tuple(Finding(w.names[0], _version(w.names), w.enables, w.get) for w in PACKAGES)
    tools = tuple(Finding(w.names[0], _path(w.names), w.enables, w.get) for w in TOOLS)
    can = features()
    target, why = fitting_target(platform.machine(), can)
    return Diagnosis(
        platform.python_version(), platform.machine(), processor(), can, target, why, packages, tools
    )  # fmt: skip


def fitting_target(machine: str, can: Sequence[str]) -> tuple[str, str]:
    """The x86 target whose numbers this processor computes without saturating, and why; empty on other machines."""
    if machine not in ("x86_64", "AMD64"):
        return "", ""
    if not can:
        return "x86-avx2", "this system does not tell its vector extensions, and 7-bit weights are safe on all"
    vnni = [name for name in VNNI if name in can]
    if vnni:
        return "x86", f"{', '.join(vnni)} adds 8-bit products in 32 bits"
    return "x86-avx2", "without VNNI, 8-bit products are added in 16 bits and may saturate; 7-bit weights do not"


def _version(packages: Sequence[str]) -> str:
    for name in packages:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _path(names: Sequence[str]) -> str:
    return next((path for name in names if (path := shutil.which(name))), "")
