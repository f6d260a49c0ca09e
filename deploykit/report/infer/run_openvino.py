"""How `infer.py` runs the files of `deploykit.exporters.to_openvino`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    Arrays = dict[str, np.ndarray[Any, Any]]

PACKAGES = ("openvino",)


# region runtime
def open_model(path: Path, threads: int) -> Callable[[Arrays], Arrays]:
    """Opens a file in OpenVINO: arrays of one sample ``[1, ...]`` by input name in, by output name out.

    On the device the file was exported for if this machine has it, otherwise on the CPU; there in float32, because
    OpenVINO computes float networks in bfloat16 where it can.
    """
    import json
    import sys

    modules: dict[str, Any] = sys.modules
    modules.setdefault("openvino_telemetry", None)  # through it `import openvino` would report its use to its makers
    import openvino

    core = openvino.Core()
    model = core.read_model(str(path))
    about = json.loads(model.get_rt_info(["deploykit"]).value["about"])
    device = about["device"]
    if not any(name.startswith(device) for name in core.available_devices):
        print(f"OpenVINO finds no {device} here: running on the CPU", file=sys.stderr)
        device = "CPU"
    cpu = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = core.compile_model(model, device, {"PERFORMANCE_HINT": "LATENCY", **(cpu if device == "CPU" else {})})
    request = compiled.create_infer_request()

    def run(arrays: Arrays) -> Arrays:
        feed = []
        for (name, axis), tensor in zip(about["inputs"].items(), compiled.inputs):
            array = arrays[name]
            if axis is not None:  # a file for a larger batch gets it full of the one sample
                array = np.repeat(array, tensor.shape[axis] // array.shape[axis], axis=axis)
            feed.append(np.ascontiguousarray(array))
        request.infer(feed)
        found = [np.array(request.get_output_tensor(i).data) for i in range(len(about["outputs"]))]
        axes = zip(found, about["outputs"].items())
        return {name: array if axis is None else array.take([0], axis) for array, (name, axis) in axes}

    return run


# endregion
