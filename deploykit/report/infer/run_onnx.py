"""How `infer.py` runs the files of `deploykit.exporters.to_onnx`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("onnxruntime",)
Arrays = dict[str, np.ndarray[Any, Any]]


# region runtime
def open_model(path: Path, threads: int) -> Callable[[Arrays], Arrays]:
    """Opens a file in ONNX Runtime: arrays of one sample ``[1, ...]`` by input name in, by output name out."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda arrays: dict(zip(names, session.run(names, arrays)))


# endregion
