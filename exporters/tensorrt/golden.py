"""Golden inputs and outputs: what the device must compute, from ONNX Runtime on the machine of the export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.core.artifact import Runner, TensorSpec
from deploykit.core.errors import DeploykitError
from deploykit.exporters.tensorrt.device.build import decibels
from deploykit.hub.graph import Hub

Sample = dict[str, NDArray[Any]]
FEWEST = 8
"""Samples at least, over as many runs as the batch makes necessary."""
ROOM_DB = 3.0
"""An engine may be that much noisier than its file: twice the power. Its noise has the same origin and power, because
it rounds the same network with the same scales, if not always the same way; and some dozens of values tell a power to
within a factor of two. Whatever else is wrong with it must be smaller than the noise of quantizing, or it shows."""
MOST_DB = 30.0
"""More is asked of no engine, as of no float16 file: it may sum in float16, or multiply in TF32."""


def golden_inputs(hub: Hub, inputs: Sequence[TensorSpec], batch: int) -> tuple[list[Sample], str]:
    """Some runs' inputs, each of the batch the device will run, and a sentence on where they come from.

    Real samples if the hub has them; else seeded numbers, uniform between the calibrated smallest and largest value of
    the input (standard normal if nothing was calibrated), and 0 or 1 for integer inputs.

    Raises:
        DeploykitError: the hub's samples are not for this model's inputs.
    """
    runs = -(-FEWEST // batch)
    if hub.samples:
        arrays, origin = _real(hub, inputs), "samples of the calibration data"
        runs = min(runs, -(-min(len(a) for a in arrays.values()) // batch))
    else:
        arrays, origin = _random(hub, inputs, runs * batch), "seeded random numbers, no real samples were given"
    return [
        {s.name: np.take(arrays[s.name], range(r * batch, (r + 1) * batch), axis=0, mode="wrap") for s in inputs}
        for r in range(runs)
    ], origin


def _real(hub: Hub, inputs: Sequence[TensorSpec]) -> Sample:
    wrong = [s.name for s in inputs if s.name not in hub.samples or hub.samples[s.name].shape[1:] != s.shape[1:]]
    if wrong:
        raise DeploykitError(f"the samples do not fit the model's inputs {', '.join(wrong)}")
    return {s.name: np.asarray(hub.samples[s.name], s.dtype) for s in inputs}


def _random(hub: Hub, inputs: Sequence[TensorSpec], count: int) -> Sample:
    random = np.random.default_rng(0)
    arrays: Sample = {}
    for s in inputs:
        shape = (count, *(int(d) for d in s.shape[1:]))
        stats = hub.ranges.tensors.get(s.name) if hub.ranges is not None else None
        if not np.issubdtype(s.dtype, np.floating):
            arrays[s.name] = random.integers(0, 2, shape).astype(s.dtype)
        elif stats is not None:
            arrays[s.name] = random.uniform(stats.low, stats.high, shape).astype(s.dtype)
        else:
            arrays[s.name] = random.standard_normal(shape).astype(s.dtype)
    return arrays


def write_arrays(folder: Path, kind: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """Writes ``golden/KIND.NUMBER.bin`` per array, raw and little-endian; returns the paths by name.

    Files are numbered because trtexec splits its arguments at commas and colons, which names may hold.
    """
    (folder / "golden").mkdir(exist_ok=True)
    paths = {}
    for number, (name, array) in enumerate(arrays.items()):
        paths[name] = f"golden/{kind}.{number}.bin"
        # not tofile: a full disk would be an OSError without its errno
        (folder / paths[name]).write_bytes(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return paths


def signal_to_noise(run: Runner, inputs: list[Sample], golden: list[Sample]) -> dict[str, float]:
    """Of each output over all runs, in dB; what build.py measures on the device."""
    found = [run(sample) for sample in inputs]
    values: dict[str, float] = {}
    for name in golden[0]:
        power = sum(float(np.square(g[name].astype(np.float64)).sum()) for g in golden)
        differences = [f[name].astype(np.float64) - g[name] for f, g in zip(found, golden, strict=True)]
        values[name] = round(decibels(power, sum(float(np.square(d).sum()) for d in differences)), 3)
    return values


def least(expected_db: float) -> float:
    """The signal to noise that an engine must reach, given that of its file in ONNX Runtime."""
    return round(min(expected_db - ROOM_DB, MOST_DB), 3)
