"""Peak memory of one file, in a process of its own."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit import exporters

if TYPE_CHECKING:
    from numpy.typing import NDArray

RUNS = 3


def peak_megabytes(exporter: str, path: Path, arrays: Mapping[str, NDArray[Any]], threads: int) -> float | None:
    """How much a fresh process's peak resident memory grows while it loads and runs a file, in MB (10^6 bytes).

    None where that cannot be known: no Linux, or the process did not end well.
    """
    child = subprocess.run(
        [sys.executable, "-c", "from deploykit.bench.memory import child; child()"],
        input=pickle.dumps((exporter, path.absolute(), threads, dict(arrays))),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
    )
    last = child.stdout.decode().strip().rpartition("\n")[2]
    return float(last) if child.returncode == 0 and last else None


def child() -> None:
    """Prints the growth in MB. The runtime is imported before the first look: its libraries are not the model's."""
    name, path, threads, arrays = pickle.load(sys.stdin.buffer)
    exporter = exporters.load(name)
    exporter.runtime()
    before = peak_kib()
    runner = exporter.load(path, threads)
    for _ in range(RUNS):
        runner(arrays)
    after = peak_kib()
    print("" if before is None or after is None else (after - before) * 1024 / 1e6)


def peak_kib() -> int | None:
    """This process's peak so far (Linux's VmHWM). Not `ru_maxrss`: that one is inherited from the parent process."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
