"""Runs a folder that `emit` wrote on this machine: compiled by the system's C compiler, called through ctypes."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.artifact import Arrays, Runner
from deploykit.core.errors import DeploykitError
from deploykit.exporters.c99.emit import ABOUT, DECODER, FORMAT, SOURCE
from deploykit.exporters.c99.golden import described, to_integers, to_reals

if TYPE_CHECKING:
    from numpy.typing import NDArray

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=c99", "-O3", "-ffreestanding", "-fPIC")
PARTS = ("model.h", "dk_kernels.c", "dk_kernels.h", "dk_rescale.h", ABOUT)
"""What belongs to a ``model.c``."""


def compiler() -> str:
    """The path of a C compiler: the one in ``$CC``, or cc, gcc, clang.

    Raises:
        DeploykitError: there is none.
    """
    for name in (os.environ.get("CC", ""), *COMPILERS):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise DeploykitError(
        "compiled C is checked on this machine before it is handed over, and there is no C compiler here: install gcc "
        "or clang (e.g. apt install gcc), or name one in CC"
    )


@cache
def compiler_version(path: str) -> str:
    """Its first line about itself, e.g. ``"cc (Debian 12.2.0-14) 12.2.0"``."""
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


class Compiled:
    """A network as a function on integers."""

    def __init__(self, path: Path) -> None:
        """Compiles the folder of a ``model.c``, once per process for equal files.

        Raises:
            DeploykitError: no such file, no compiler, or it does not compile.
        """
        about = _about(path)
        self.inputs = [(described(p), int(p["offset"])) for p in about["inputs"]]
        self.outputs = [(described(p), int(p["offset"])) for p in about["outputs"]]
        self.arena = np.zeros(int(about["arena_bytes"]), np.int8)
        decoder = (DECODER,) if about.get("coded_bytes") else ()
        self._run = ctypes.CDLL(str(_library(path.parent, decoder))).model_run
        self._run.argtypes, self._run.restype = [ctypes.c_void_p], None

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.int8]]:
        """Integers in, integers out, as `execute` takes and gives them: ``[n, elements]`` as stored."""
        count = len(next(iter(inputs.values())))
        found = {port.name: np.empty((count, port.tensor.size), np.int8) for port, _ in self.outputs}
        for i in range(count):
            for port, offset in self.inputs:
                self.arena[offset : offset + port.tensor.size] = inputs[port.name][i].ravel()
            self._run(self.arena.ctypes.data)
            for port, offset in self.outputs:
                found[port.name][i] = self.arena[offset : offset + port.tensor.size]
        return found


def open_runner(path: Path) -> Runner:
    """Runs a ``model.c``: real arrays ``[n, ...]`` by input name in, by output name out, in the model's layout.

    Raises:
        DeploykitError: as `Compiled`.
    """
    network = Compiled(path)

    def run(arrays: Arrays) -> dict[str, NDArray[Any]]:
        counts = {len(arrays[port.name]) for port, _ in network.inputs if port.batched} or {1}
        if len(counts) != 1:
            raise DeploykitError(f"the inputs have different batch sizes: {sorted(counts)}")
        count = counts.pop()
        integers = {}
        for port, _ in network.inputs:
            array = np.asarray(arrays[port.name])
            samples = array if port.batched else np.broadcast_to(array, (count, *array.shape))
            integers[port.name] = to_integers(port, samples)
        found = network.run(integers)
        return {port.name: to_reals(port, found[port.name]) for port, _ in network.outputs}

    return run


def _about(path: Path) -> Any:
    where = path.parent / ABOUT
    try:
        about = json.loads(where.read_text(encoding="utf-8"))
        if path.is_file() and about.get("format") == FORMAT:
            return about
    except (OSError, ValueError, AttributeError):
        pass
    raise DeploykitError(f"{path.parent} does not hold {SOURCE} and {ABOUT} as the c99 exporter writes them")


def _library(folder: Path, decoder: tuple[str, ...]) -> Path:
    """The shared library of a folder, compiled in a place of this process."""
    cc, work = compiler(), _workplace()
    kernels = _compile(cc, folder, "dk_kernels.c", work, ("dk_kernels.c", "dk_kernels.h", "dk_rescale.h"))
    model = _compile(cc, folder, SOURCE, work, (SOURCE, "model.h", "dk_kernels.h", *decoder))
    library = work / f"{model.stem}_{kernels.stem}.so"
    if not library.exists():
        _call([cc, "-shared", "-o", str(library), str(model), str(kernels)], folder)
    return library


def _compile(cc: str, folder: Path, source: str, work: Path, depends: Sequence[str]) -> Path:
    digest = hashlib.sha256(cc.encode())
    try:
        for name in depends:
            digest.update((folder / name).read_bytes())
    except OSError as error:
        raise DeploykitError(f"{folder} is not complete: {error.strerror}: {error.filename}") from None
    made = work / f"{digest.hexdigest()[:16]}.o"
    if not made.exists():
        _call([cc, *FLAGS, "-c", "-o", str(made), str(folder / source)], folder)
    return made


def _call(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise DeploykitError(f"{command[0]} cannot compile {folder}: {lines[0]}")


@cache
def _workplace() -> Path:
    folder = tempfile.mkdtemp(prefix="deploykit-c99-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
