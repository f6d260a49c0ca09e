"""How the bundle of `deploykit.exporters.to_tensorrt` is run: the device builds its own engine first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.artifact import File
from deploykit.report.infer.script import stop

if TYPE_CHECKING:
    Arrays = dict[str, np.ndarray[Any, Any]]

PACKAGES = ()
PYTHON = "python3"
"""On JetPack, python is Python 2 or not there."""
COMMANDS = ("./build.sh",)
ABOUT = (
    "On the device, in a copy of this folder: `build.sh` needs Python 3.6 and TensorRT's `trtexec`, and `BUILD.md` "
    "says what it does. `infer.py` needs Python 3.7 and has trtexec load the engine anew for every sample, so it shows "
    "answers, not speed; a program of yours keeps `model.engine` loaded."
)
TIMING = "./build.sh              # on the device: builds, checks and times every engine"


def settings(folder: Path, files: tuple[File, ...]) -> dict[str, object]:
    """``FILES``: of the engines that can be built, the one that is kept."""
    return {"FILES": {"kept": "model.engine"}}


# region runtime
def open_model(path: Path, threads: int) -> Callable[[Arrays], Arrays]:
    """Opens the engine that build.sh kept: arrays of one sample ``[1, ...]`` by input name in, by output name out."""
    import json
    import subprocess
    import sys
    import tempfile

    folder = path.parent
    if not path.is_file():
        stop(f"there is no {path} yet: run ./build.sh on this device first")
    sys.path.insert(0, str(folder))
    import build  # type: ignore[import-not-found,unused-ignore]  # the bundle's own script, beside this one

    bundle, trtexec = build.read_bundle(str(folder)), build.find_trtexec(None)
    step = bundle["batch"][0]  # an engine for larger batches gets them full of the one sample

    def run(arrays: Arrays) -> Arrays:
        with tempfile.TemporaryDirectory() as work:
            files = {}
            for number, spec in enumerate(bundle["inputs"]):
                files[spec["name"]] = f"{work}/input{number}.bin"
                np.repeat(arrays[spec["name"]], step, axis=0).tofile(files[spec["name"]])
            argv = build.answer_argv(trtexec, str(path), bundle, step, files, f"{work}/output.json")
            ran = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            if ran.returncode:
                errors = [line for line in ran.stdout.decode("utf-8", "replace").splitlines() if "[E]" in line]
                stop(errors[0] if errors else f"trtexec ended with code {ran.returncode}")
            found = {entry["name"]: entry["values"] for entry in json.loads(Path(work, "output.json").read_text())}
        shapes = {spec["name"]: (step, *spec["shape"][1:]) for spec in bundle["outputs"]}
        return {name: np.array(found[name], np.float32).reshape(shape)[:1] for name, shape in shapes.items()}

    return run


# endregion
