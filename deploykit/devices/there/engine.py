"""Answers samples with an engine that `build.py` built, on the device: Python >= 3.6 and trtexec, nothing else.

trtexec loads the engine anew for every call, which takes a second or two: this is for accuracy, not for speed.
One JSON argument says what to do: inputs as raw little-endian files, outputs as JSON, one list of numbers per sample.

Ends when its input does: whoever started it is then gone.
"""

import importlib
import json
import os
import subprocess
import sys
import threading
from typing import Any, Dict, List

build = importlib.import_module("build")  # the bundle's own script, beside this one
unfinished = []  # type: List[str]


def leash() -> None:
    """Ends this process, and removes what it has half written, when its input ends."""
    while os.read(0, 4096):
        pass
    clear()
    os._exit(1)


def clear() -> None:
    """Removes what is not finished."""
    for path in unfinished:
        if os.path.exists(path):
            os.remove(path)


def answer(job: Dict[str, Any]) -> Dict[str, List[List[float]]]:
    """Outputs of all samples by name, as many at a time as the engine takes at most."""
    folder = os.path.dirname(os.path.abspath(__file__))
    bundle = build.read_bundle(folder)
    step = bundle["batch"][2]
    part = "{}.{}".format(job["key"], os.getpid())
    found = {spec["name"]: [] for spec in bundle["outputs"]}  # type: Dict[str, List[List[float]]]
    for start in range(0, job["samples"], step):
        files = {}
        for number, spec in enumerate(bundle["inputs"]):
            path = "{}.input{}.part".format(part, number)
            unfinished.append(path)
            cut(job["inputs"][spec["name"]], path, start, step, job["samples"])
            files[spec["name"]] = path
        exported = "{}.output.part".format(part)
        unfinished.append(exported)
        argv = build.answer_argv(job["trtexec"], job["engine"], bundle, step, files, exported)
        ran = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if ran.returncode:
            lines = ran.stdout.decode("utf-8", "replace").splitlines() or ["code {}".format(ran.returncode)]
            raise OSError("trtexec failed: {}".format(([line for line in lines if "[E]" in line] or lines[-1:])[0]))
        with open(exported) as file:
            for entry in json.load(file):
                values = [float(v) for v in entry["values"]]
                each = len(values) // step
                rows = [values[i * each : (i + 1) * each] for i in range(step)]
                found[entry["name"]] += rows[: job["samples"] - start]
    return found


def cut(source: str, destination: str, start: int, step: int, samples: int) -> None:
    """Copies some samples of a raw file; the last one fills up what is missing."""
    each = os.path.getsize(source) // samples
    with open(source, "rb") as file:
        file.seek(start * each)
        data = file.read(step * each)
    data += data[-each:] * (step - len(data) // each)
    with open(destination, "wb") as out:
        out.write(data)


def main() -> int:
    """Writes the outputs, whole or not at all."""
    job = json.loads(sys.argv[1])
    threading.Thread(target=leash, daemon=True).start()
    part = "{}.{}.part".format(job["outputs"], os.getpid())
    unfinished.append(part)
    try:
        found = answer(job)
        with open(part, "w") as file:
            json.dump(found, file)
        os.replace(part, job["outputs"])
    except (OSError, ValueError, KeyError) as error:
        sys.stderr.write("{}\n".format(error))
        return 1
    finally:
        clear()
    return 0


if __name__ == "__main__":
    sys.exit(main())
