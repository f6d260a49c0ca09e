"""Runs an OpenVINO IR (``.xml`` with its ``.bin``) on the CPU."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.artifact import Arrays, Runner
from deploykit.core.errors import DeploykitError
from deploykit.exporters.openvino.convert import ABOUT, reason
from deploykit.exporters.openvino.library import openvino

if TYPE_CHECKING:
    from numpy.typing import NDArray

PRECISION = "f32"
"""OpenVINO computes float networks in bfloat16 where the processor has it, unless it is told otherwise."""


def open_runner(path: Path, threads: int) -> Runner:
    """A file that this project wrote, as a `Runner`: larger batches are run in pieces, the last one filled up with its
    last sample.

    Raises:
        DeploykitError: files that are missing, damaged or refused by the runtime; inputs of different batch sizes.
        MissingExtra: OpenVINO is not installed.
    """
    model = read_file(path)
    axes: dict[str, dict[str, int | None]] = json.loads(model.get_rt_info(ABOUT).value)
    request = compile_for_cpu(model, path, threads).create_infer_request()
    bound = {
        name: int(tensor.partial_shape[axis].get_length())
        for (name, axis), tensor in zip(axes["inputs"].items(), model.inputs, strict=True)
        if axis is not None
    }

    def once(arrays: Arrays) -> list[NDArray[Any]]:
        request.infer([np.ascontiguousarray(arrays[name]) for name in axes["inputs"]])
        return [np.array(request.get_output_tensor(i).data) for i in range(len(axes["outputs"]))]

    def run(arrays: Arrays) -> dict[str, NDArray[Any]]:
        counts = {arrays[name].shape[axes["inputs"][name] or 0] for name in bound} or {1}
        if len(counts) > 1:
            raise DeploykitError(f"the inputs have different batch sizes: {sorted(counts)}")
        count, step = counts.pop(), next(iter(bound.values()), 1)
        if count == step:
            return dict(zip(axes["outputs"], once(arrays), strict=True))
        parts = []
        for start in range(0, count, step):
            rows = np.minimum(np.arange(start, start + step), count - 1)
            parts.append(once({**arrays, **{n: arrays[n].take(rows, axes["inputs"][n]) for n in bound}}))
        return {
            name: found[0] if axis is None else np.concatenate(found, axis).take(np.arange(count), axis)
            for found, (name, axis) in zip(zip(*parts, strict=True), axes["outputs"].items(), strict=True)
        }

    return run


def read_file(path: Path) -> Any:
    """An ``openvino.Model``; the file may be overwritten afterwards.

    Raises:
        DeploykitError: one of the two files is missing or damaged, or was not written by this project.
        MissingExtra: OpenVINO is not installed.
    """
    weights = path.with_suffix(".bin")
    for part in (path, weights):
        if not part.is_file():
            raise DeploykitError(f"no file {part}: an OpenVINO model is two files, {path.name} and {weights.name}")
    try:
        model = _core().read_model(str(path), str(weights), {"ENABLE_MMAP": False})
    except Exception as error:  # OpenVINO raises several kinds without a common base
        raise DeploykitError(f"OpenVINO cannot read {path}: {reason(error)}") from None
    if not model.has_rt_info(ABOUT):
        raise DeploykitError(f"{path} was not written by deploykit: it does not say which axes are the batch")
    return model


def compile_for_cpu(model: Any, path: Path, threads: int) -> Any:
    """An ``openvino.CompiledModel``.

    Raises:
        DeploykitError: the CPU plugin refuses the model.
    """
    settings = {
        "INFERENCE_PRECISION_HINT": PRECISION,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
    }
    try:
        return _core().compile_model(model, "CPU", settings)
    except Exception as error:  # OpenVINO raises several kinds without a common base
        raise DeploykitError(f"OpenVINO cannot compile {path} for the CPU: {reason(error)}") from None


@cache
def _core() -> Any:
    return openvino().Core()
