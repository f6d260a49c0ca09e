"""``.tflite`` files: through Python and a LiteRT runtime there, or else TensorFlow's ``benchmark_model``, which times
files but answers nothing. Phones have no Python, but take that one program."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.artifact import File, Measurement
from deploykit.core.device import Facts
from deploykit.core.errors import DeploykitError
from deploykit.devices import run_infer
from deploykit.devices.device import Device
from deploykit.devices.run_infer import answer as answer
from deploykit.devices.run_infer import computed_by as computed_by
from deploykit.devices.run_infer import read as read
from deploykit.devices.run_infer import send as send
from deploykit.devices.work import Asked, Found, Timed, Work, where

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOOL = "benchmark_model"


def lacks(facts: Facts, exporter: str) -> str:
    """A LiteRT runtime in Python, or benchmark_model."""
    why = run_infer.lacks(facts, exporter)
    if not why or TOOL in facts.tools:
        return ""
    return f"{why}; or, to time files only, put TensorFlow's {TOOL} on PATH (on Android: into /data/local/tmp)"


def mute(facts: Facts, exporter: str) -> str:
    """benchmark_model feeds random numbers and keeps its answers to itself."""
    return run_infer.lacks(facts, exporter)


def measure(
    device: Device, facts: Facts, works: Sequence[Work], asked: Asked, feeds: Sequence[Mapping[str, NDArray[Any]]]
) -> Found:
    """Calls in turns through Python; without one, one file after the other."""
    if not run_infer.lacks(facts, "tflite"):
        return run_infer.measure(device, facts, works, asked, feeds)
    if asked.minutes:
        raise DeploykitError(f"--sustained needs Python there: {run_infer.lacks(facts, 'tflite')}")
    return Found(tuple(tuple(_timed(device, facts, w, f, asked) for f in w.manifest.files) for w in works))


@dataclass(frozen=True)
class Summary:
    """What benchmark_model says about its timed runs. Newer ones tell the median too."""

    runs: int
    mean_ms: float
    p50_ms: float | None


def parse(text: str) -> Summary | None:
    """The last line of statistics (microseconds), which is that of the timed runs; None: there is none."""
    lines = [line for line in text.splitlines() if re.match(r".*count=\d+ .*avg=", line)]
    if not lines:
        return None
    values = {key: float(value) for key, value in re.findall(r"(\w+)=([\d.e+]+)", lines[-1])}
    median = values.get("median")
    return Summary(int(values["count"]), values["avg"] / 1e3, None if median is None else median / 1e3)


def _timed(device: Device, facts: Facts, work: Work, file: File, asked: Asked) -> Timed:
    argv = [
        facts.tools[TOOL], f"--graph={work.path(file.path)}", f"--num_runs={asked.runs}",
        f"--num_threads={asked.threads}", "--report_peak_memory_footprint=true",
    ]  # fmt: skip
    ran = device.run(" ".join(map(shlex.quote, argv)))
    found = parse(ran.out + ran.err)
    if ran.code or found is None:
        said = (ran.err or ran.out).strip().splitlines()
        raise DeploykitError(f"{facts.address}: {TOOL} failed on {file.path}: {said[-1] if said else ran.code}")
    place = where(work, facts, TOOL)
    place += "" if found.p50_ms is not None else f", which tells only the mean: {found.mean_ms:.3g} ms"
    measurement = Measurement(
        file.precision, 1, asked.threads, found.runs, found.p50_ms, None, None, 1000.0 / found.mean_ms, None,
        file.size(work.local), place,
    )  # fmt: skip
    return Timed(measurement, np.empty(0))
