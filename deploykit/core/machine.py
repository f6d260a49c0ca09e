"""`Machine`: what of a machine can change the numbers that are computed on it."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

FEATURES = {
    "avx2": "avx2", "avx512f": "avx512", "avx_vnni": "avx-vnni", "avx512_vnni": "avx512-vnni", "amx_int8": "amx-int8",
    "avx512_bf16": "avx512-bf16", "amx_bf16": "amx-bf16",
    "asimd": "neon", "asimddp": "dotprod", "i8mm": "i8mm", "asimdhp": "fp16", "sve": "sve",
}  # fmt: skip
"""What Linux calls the vector extensions that runtimes have kernels for, and what everybody else calls them."""
VNNI = ("avx-vnni", "avx512-vnni", "amx-int8")
"""Any of these adds u8 x s8 products in 32 bits."""


@dataclass(frozen=True)
class Machine:
    """Where an artifact was made."""

    processor: str
    features: tuple[str, ...]
    """Vector extensions; empty where the system does not tell."""
    threads: int
    """Of torch. The sums of training depend on it."""
    gpu: str = ""
    """What torch trains on, if that is not the processor."""


def this_machine() -> Machine:
    """The one this runs on; imports torch."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return Machine(processor(), features(), torch.get_num_threads(), gpu)


def processor() -> str:
    """The processor's name as the system gives it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def features() -> tuple[str, ...]:
    """The vector extensions of this processor; empty where the system does not tell."""
    given = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return tuple(name for flag, name in FEATURES.items() if flag in given)


def _cpuinfo(key: str) -> str:
    """The first core's entry in Linux's /proc/cpuinfo, or nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")
