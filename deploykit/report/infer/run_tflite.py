"""How `infer.py` runs the files of `deploykit.exporters.to_tflite`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.core.artifact import File
from deploykit.exporters.tflite.runner import describe

PACKAGES = ("ai-edge-litert",)
Arrays = dict[str, np.ndarray[Any, Any]]
AXES: dict[str, dict[str, list[tuple[str, tuple[int, ...]]]]] = {}


def settings(folder: Path, files: tuple[File, ...]) -> dict[str, object]:
    """``AXES``: how each file orders the axes of its inputs and outputs, which its tensors do not tell."""
    found = {}
    for file in files:
        about = describe(folder / file.path)
        found[file.path] = {
            side: [(d["name"], tuple(d["order"])) for d in about[side]] for side in ("inputs", "outputs")
        }
    return {"AXES": found}


# region runtime
def open_model(path: Path, threads: int) -> Callable[[Arrays], Arrays]:
    """Opens a file in LiteRT: float arrays of one sample ``[1, ...]`` by input name in, by output name out.

    Images are stored channels-last, and integer files have integer inputs and outputs: both is taken care of here.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        from tflite_runtime.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=threads)
    ungreeted(interpreter.allocate_tensors)
    inputs = list(zip(AXES[path.name]["inputs"], interpreter.get_input_details()))
    outputs = list(zip(AXES[path.name]["outputs"], interpreter.get_output_details()))

    def run(arrays: Arrays) -> Arrays:
        for (name, axes), tensor in inputs:
            value = arrays[name].transpose(axes)
            if tensor["dtype"] in (np.int8, np.int16):
                scale, zero = tensor["quantization"]
                ends = np.iinfo(tensor["dtype"])
                value = np.clip(np.rint(value / np.float32(scale)) + zero, ends.min, ends.max)
            interpreter.set_tensor(tensor["index"], np.ascontiguousarray(value, tensor["dtype"]))
        interpreter.invoke()
        found = {}
        for (name, axes), tensor in outputs:
            value = interpreter.get_tensor(tensor["index"])
            if tensor["dtype"] in (np.int8, np.int16):
                scale, zero = tensor["quantization"]
                value = (value.astype(np.float32) - zero) * np.float32(scale)
            found[name] = value.transpose(np.argsort(axes))
        return found

    return run


def ungreeted(call: Callable[[], object]) -> None:
    """LiteRT announces its delegate on file descriptor 2; all else that it writes there meanwhile comes through."""
    import os
    import tempfile

    stderr = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            call()
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            said.seek(0)
            os.write(2, b"".join(line for line in said if b"Created TensorFlow Lite XNNPACK delegate" not in line))


# endregion
