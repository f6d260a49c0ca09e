"""Times files, and answers samples, on the device: needs Python >= 3.7, numpy and the runtime of the files.

How a file is opened stands in the `infer.py` beside it, the script that every artifact carries for its users; this one
only feeds it. One JSON argument says what to do, one line of JSON on stdout what came of it.

Ends when its input does: whoever started it is then gone.
"""

import contextlib
import gc
import glob
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import numpy as np

MARK = "deploykit-result "
WARM_UP_RUNS, WARM_UP_SECONDS = 3, 0.2
MOST_RUNS = 1000
WINDOWS = 20
MEMORY_RUNS = 3

Arrays = Dict[str, Any]
unfinished = []  # type: List[str]


def leash() -> None:
    """Ends this process, and removes what it has half written, when its input ends."""
    while os.read(0, 4096):
        pass
    for path in unfinished:
        with contextlib.suppress(OSError):
            os.remove(path)
    os._exit(1)


def open_file(file: Dict[str, str], threads: int) -> Callable[[Arrays], Arrays]:
    """Opens a file the way its `infer.py` does: one sample ``[1, ...]`` by input name in, outputs by name out."""
    folder = Path(file["folder"])
    spec = importlib.util.spec_from_file_location("infer_" + str(abs(hash(folder))), str(folder / "infer.py"))
    assert spec is not None and spec.loader is not None
    infer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(infer)
    run = infer.open_model(folder / file["path"], threads)  # type: Callable[[Arrays], Arrays]
    return run


def read_arrays(path: str) -> Arrays:
    """The arrays of an .npz by name."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


# Times


def measure(job: Dict[str, Any]) -> Dict[str, Any]:
    """All files in turns (A B C, B C A, ...), then, where minutes are asked for, on and on."""
    calls = []  # type: List[Callable[[], Any]]
    for file in job["files"]:
        calls.append(partial(open_file(file, job["threads"]), read_arrays(file["inputs"])))
    before = readings()
    times, cpu = in_turns(calls, job["runs"], job["seconds"])
    windows = sustain(calls, job["minutes"] * 60.0) if job["minutes"] else []
    peaks = [peak_megabytes(file, job["threads"]) for file in job["files"]]
    files = [{"ms": t, "cpu_ms": c, "peak_mb": p} for t, c, p in zip(times, cpu, peaks)]
    return {"files": files, "before": before, "after": readings(), "windows": windows}


def in_turns(calls: List[Callable[[], Any]], runs: int, seconds: float) -> Any:
    """Milliseconds of every call on the clock and on the processor; the order rotates."""
    start, rounds = time.perf_counter(), 0
    while rounds < WARM_UP_RUNS or time.perf_counter() - start < WARM_UP_SECONDS:
        for call in calls:
            call()
        rounds += 1
    times = [[] for _ in calls]  # type: List[List[float]]
    cpu = [[] for _ in calls]  # type: List[List[float]]
    gc.disable()
    start, rounds = time.perf_counter(), 0
    while rounds < runs or (rounds < MOST_RUNS and time.perf_counter() - start < seconds):
        for i in range(len(calls)):
            turn = (i + rounds) % len(calls)
            begin, worked = time.perf_counter_ns(), time.process_time_ns()
            calls[turn]()
            cpu[turn].append((time.process_time_ns() - worked) / 1e6)
            times[turn].append((time.perf_counter_ns() - begin) / 1e6)
        rounds += 1
    gc.enable()
    return times, cpu


def sustain(calls: List[Callable[[], Any]], seconds: float) -> List[Dict[str, Any]]:
    """Runs without a pause and says per window of time how fast it still is, and how hot."""
    windows = []
    start = time.perf_counter()
    for number in range(1, WINDOWS + 1):
        times = [[] for _ in calls]  # type: List[List[float]]
        rounds = 0
        while not rounds or time.perf_counter() - start < seconds * number / WINDOWS:
            for i in range(len(calls)):
                turn = (i + rounds) % len(calls)
                begin = time.perf_counter_ns()
                calls[turn]()
                times[turn].append((time.perf_counter_ns() - begin) / 1e6)
            rounds += 1
        p50 = [float(np.median(t)) for t in times]
        windows.append(dict(readings(), seconds=time.perf_counter() - start, p50_ms=p50, rounds=rounds))
    return windows


def readings() -> Dict[str, Optional[float]]:
    """Mean clock of the cores in MHz and the hottest zone in degrees Celsius; None where the system does not tell."""
    clocks = numbers("/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")
    degrees = numbers("/sys/class/thermal/thermal_zone*/temp")
    return {
        "clock_mhz": sum(clocks) / len(clocks) / 1e3 if clocks else None,
        "celsius": max(degrees) / 1e3 if degrees else None,
    }


def numbers(pattern: str) -> List[float]:
    """The numbers in all files of a pattern that can be read."""
    found = []
    for path in glob.glob(pattern):
        try:
            with open(path) as file:
                found.append(float(file.read()))
        except (OSError, ValueError):
            continue
    return found


def peak_megabytes(file: Dict[str, str], threads: int) -> Optional[float]:
    """Growth of a fresh process's peak memory while it opens and runs a file, in MB (10^6 bytes)."""
    job = json.dumps({"do": "memory", "file": file, "threads": threads})
    child = subprocess.run(
        [sys.executable, __file__, job], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    result = last_result(child.stdout.decode("utf-8", "replace"))
    return None if child.returncode or result is None else result["peak_mb"]


def memory(job: Dict[str, Any]) -> Dict[str, Any]:
    """The child's part. A first run of nothing but the imports comes before the first look."""
    arrays = read_arrays(job["file"]["inputs"])
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # `import openvino` would report its use
    for module in ("onnxruntime", "ai_edge_litert.interpreter", "tflite_runtime.interpreter", "openvino"):
        if module.partition(".")[0] in Path(job["file"]["folder"], "infer.py").read_text(encoding="utf-8"):
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
    before = peak_kib()
    run = open_file(job["file"], job["threads"])
    for _ in range(MEMORY_RUNS):
        run(arrays)
    after = peak_kib()
    return {"peak_mb": None if before is None or after is None else (after - before) * 1024 / 1e6}


def peak_kib() -> Optional[int]:
    """Peak resident memory of this process so far, as Linux tells it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


# Answers


def answer(job: Dict[str, Any]) -> Dict[str, Any]:
    """Runs a chunk of samples through every file, sample by sample; outputs are there whole or not at all."""
    arrays = read_arrays(job["inputs"])
    count = len(next(iter(arrays.values())))
    for file in job["files"]:
        run = open_file(file, job["threads"])
        results = [run({name: a[i : i + 1] for name, a in arrays.items()}) for i in range(count)]
        part = "{}.{}.part".format(file["outputs"], os.getpid())
        unfinished.append(part)
        outputs = {name: np.concatenate([r[name] for r in results]) for name in results[0]}  # type: Dict[str, Any]
        with open(part, "wb") as out:
            np.savez(out, **outputs)
        os.replace(part, file["outputs"])
        unfinished.remove(part)
    return {"samples": count}


def last_result(text: str) -> Any:
    """What a run of this script printed, None if it did not get that far."""
    lines = [line for line in text.splitlines() if line.startswith(MARK)]
    return json.loads(lines[-1][len(MARK) :]) if lines else None


def main() -> int:
    """Does what the argument says."""
    job = json.loads(sys.argv[1])
    if job["do"] != "memory":
        threading.Thread(target=leash, daemon=True).start()
    try:
        result = {"time": measure, "answer": answer, "memory": memory}[job["do"]](job)
    except OSError as error:
        for path in unfinished:
            with contextlib.suppress(OSError):
                os.remove(path)
        sys.stderr.write("{}\n".format(error))
        return 1
    print(MARK + json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
