"""Times files in turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit import exporters, targets
from deploykit.bench.compare import Benchmark, Timing
from deploykit.bench.memory import peak_megabytes
from deploykit.core.artifact import Artifact, File, Measurement, TensorSpec
from deploykit.core.errors import DeploykitError
from deploykit.core.machine import processor

if TYPE_CHECKING:
    from numpy.typing import NDArray

RUNS = 50
MOST_RUNS = 1000
SECONDS = 5.0
WARM_UP_RUNS = 3
WARM_UP_SECONDS = 0.2


def measure(
    folders: Sequence[Path],
    samples: Mapping[str, NDArray[Any]] | None = None,
    *,
    batch: int = 1,
    threads: int = 1,
    runs: int = RUNS,
    seconds: float = SECONDS,
    seed: int = 0,
    memory: bool = True,
) -> Benchmark:
    """Times every file of the artifacts, in turns: A B C, B C A, C A B, ...

    Args:
        folders: artifacts; those to compare the first one with go behind it.
        samples: arrays ``[n, ...]`` by input name; seeded random numbers without (see `feed`).
        batch: samples per call. Files written for another batch run it in pieces.
        threads: of the runtime.
        runs: rounds at least, after the warm-up. p99 says little below some hundred.
        seconds: goes on this long where the files are fast, up to 1000 rounds.
        seed: of the random inputs.
        memory: whether to measure peak memory too, in a process of its own per file (a second or two each).

    Returns:
        One timing per file, in the order of the folders and within them of the files. Files whose exporter says that
        times taken here mean nothing for the device are not run: their times are None.

    Raises:
        DeploykitError: not an artifact, or one whose files were truncated or altered; numbers below 1; samples that do
            not fit; a file that its runtime cannot open.
        MissingExtra: the runtime of a file is not installed.
    """
    for what, value in (("batch", batch), ("threads", threads), ("runs", runs)):
        if value < 1:
            raise DeploykitError(f"{what} must be 1 or more; given {value}")
    artifacts = [exporters.open_artifact(folder) for folder in folders]
    files = [(artifact, file) for artifact in artifacts for file in artifact.files]
    calls: dict[int, Callable[[], object]] = {}
    peaks: dict[int, float | None] = {}
    for i, (artifact, file) in enumerate(files):
        if file.untimed or exporters.load(artifact.exporter).runtime().untimed:
            continue
        arrays = feed(artifact.inputs, samples, batch, seed)
        calls[i] = partial(artifact.runner(file.precision, threads), arrays)
        if memory:
            peaks[i] = peak_megabytes(artifact.exporter, artifact.folder / file.path, arrays, threads)
    times = dict(zip(calls, in_turns(list(calls.values()), runs, seconds), strict=True))
    return Benchmark(
        tuple(
            _timing(artifact, file, times.get(i, np.empty(0)), peaks.get(i), batch, threads)
            for i, (artifact, file) in enumerate(files)
        )
    )


def measure_artifact(
    folder: Path, samples: Mapping[str, NDArray[Any]] | None = None, threads: int = 1
) -> tuple[tuple[Measurement, ...], tuple[str, ...]]:
    """The measurements of one artifact's files, and what to conclude from them; see `measure`."""
    found = measure([folder], samples, threads=threads)
    return tuple(t.measurement for t in found.timings), found.advice


def feed(
    inputs: Sequence[TensorSpec], samples: Mapping[str, NDArray[Any]] | None, batch: int, seed: int
) -> dict[str, NDArray[Any]]:
    """Inputs for one call, ``[batch, ...]`` by name: the samples, repeated as needed, or random numbers.

    Random means standard normal for floats, all values for 8-bit integers (pixels), 0 or 1 for wider ones, which are
    indices into tables of unknown length.

    Raises:
        DeploykitError: an input without samples, or a free dimension (other than the batch) and no samples.
    """
    if samples is not None:
        missing = [s.name for s in inputs if s.name not in samples]
        if missing:
            given = ", ".join(samples) or "none"
            raise DeploykitError(f"the artifact needs samples of the inputs {', '.join(missing)}; given: {given}")
        return {s.name: np.asarray(samples[s.name], s.dtype)[np.arange(batch) % len(samples[s.name])] for s in inputs}
    random = np.random.default_rng(seed)
    arrays = {}
    for spec in inputs:
        free = [d for d in spec.shape[1:] if isinstance(d, str)]
        if free:
            raise DeploykitError(f"input '{spec.name}' has the free dimension '{free[0]}': timing it needs samples")
        shape, dtype = (batch, *(int(d) for d in spec.shape[1:])), np.dtype(spec.dtype)
        if np.issubdtype(dtype, np.floating):
            arrays[spec.name] = random.standard_normal(shape).astype(dtype)
        elif dtype in (np.uint8, np.int8):
            arrays[spec.name] = random.integers(np.iinfo(dtype).min, np.iinfo(dtype).max + 1, shape).astype(dtype)
        else:
            arrays[spec.name] = random.integers(0, 2, shape).astype(dtype)
    return arrays


def in_turns(calls: Sequence[Callable[[], object]], runs: int, seconds: float) -> list[NDArray[np.float64]]:
    """Milliseconds of every call, ``[rounds]`` each; the order rotates, so nobody always runs behind the same one."""
    if not calls:
        return []
    start, rounds = time.perf_counter(), 0
    while rounds < WARM_UP_RUNS or time.perf_counter() - start < WARM_UP_SECONDS:
        for call in calls:
            call()
        rounds += 1
    times: list[list[int]] = [[] for _ in calls]
    collecting = gc.isenabled()
    gc.disable()
    try:
        start, rounds = time.perf_counter(), 0
        while rounds < runs or (rounds < MOST_RUNS and time.perf_counter() - start < seconds):
            for i in range(len(calls)):
                turn = (i + rounds) % len(calls)
                begin = time.perf_counter_ns()
                calls[turn]()
                times[turn].append(time.perf_counter_ns() - begin)
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return [np.asarray(t) / 1e6 for t in times]


def _timing(
    artifact: Artifact, file: File, times: NDArray[np.float64], peak: float | None, batch: int, threads: int
) -> Timing:
    size = file.size(artifact.folder)
    runtime = exporters.load(artifact.exporter).runtime()
    if not len(times):
        where = f"not run here: {file.untimed or runtime.untimed}"
        nothing = Measurement(file.precision, batch, threads, 0, None, None, None, None, None, size, where)
        return Timing(artifact, file, nothing, times)
    p50, p90, p99 = (float(v) for v in np.percentile(times, [50, 90, 99]))
    rate = 1000.0 * batch * len(times) / float(times.sum())
    stands_for_device = artifact.target in targets.names() and targets.load(artifact.target).measured_here
    machine = "this machine" if stands_for_device else "this machine, not the device"
    where = f"{machine}: {processor()}, {runtime.name}"
    found = Measurement(file.precision, batch, threads, len(times), p50, p90, p99, rate, peak, size, where)
    return Timing(artifact, file, found, times)
