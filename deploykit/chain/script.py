"""Runs a network segment by segment, and stops as soon as an exit is sure enough.

    python infer.py inputs.npz        or image files, where the network takes images

It needs what the segments' own infer.py need (numpy and the runtime, for images Pillow), and this folder as a whole.
A sample leaves by the first exit whose largest probability is above the exit's threshold; chain.json has these.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

HERE = Path(__file__).resolve().parent

if TYPE_CHECKING:
    Arrays = dict[str, np.ndarray[Any, Any]]
    Run = Callable[[Arrays], Arrays]


def stop(message: str) -> NoReturn:
    """Ends with a sentence instead of a traceback."""
    sys.exit(f"infer.py: {message}")


def part(folder: str) -> Any:
    """The infer.py of a segment, as a module."""
    path = HERE / folder / "infer.py"
    if not path.is_file():
        stop(f"{path} is missing: copy the folder of chain.json as a whole")
    spec = importlib.util.spec_from_file_location(folder, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_segments(chain: Any, parts: list[Any], precision: str, threads: int) -> list[Run]:
    """Every segment's file in its runtime: arrays of one sample by name in, and out."""
    opened = []
    for i in range(len(parts)):
        path = HERE / chain["segments"][i]["folder"] / parts[i].FILES[precision]
        if not path.is_file():
            stop(f"{path} is missing: copy the folder of chain.json as a whole")
        try:
            opened.append(parts[i].open_model(path, threads))
        except Exception as error:  # runtimes have no error in common
            why = str(error).strip().splitlines() or [""]
            stop(f"cannot open {path}: {type(error).__name__}: {why[0]}")
    return opened


def softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Probabilities ``[classes]`` of logits ``[1, classes]``."""
    z = logits[0].astype(np.float64)
    e = np.exp(z - z.max())
    p: np.ndarray[Any, Any] = e / e.sum()
    return p


def answer(
    runs: list[Run], names: list[str], thresholds: list[float], ensemble: bool, inputs: Arrays
) -> tuple[np.ndarray[Any, Any], int]:
    """Probabilities of one sample, and the exit it left by, counted from 1."""
    said: list[np.ndarray[Any, Any]] = []
    p = np.zeros(0)
    for k in range(len(runs)):
        outputs = runs[k](inputs)
        said.append(softmax(outputs.pop(names[k])))
        p = sum(said[1:], said[0]) / len(said) if ensemble else said[-1]
        if k < len(thresholds) and p.max() > thresholds[k]:
            return p, k + 1
        inputs = outputs
    return p, len(runs)


def main() -> None:
    """Reads the command line, runs every sample, prints what comes out."""
    if not (HERE / "chain.json").is_file():
        stop(f"there is no chain.json beside {__file__}")
    chain = json.loads((HERE / "chain.json").read_text())
    parser = argparse.ArgumentParser(description="Runs the network, and leaves it as soon as an exit is sure.")
    parser.add_argument("inputs", nargs="+", type=Path, help="image files, or one .npz with arrays by input name")
    parser.add_argument("--precision", choices=list(chain["variants"]), default=list(chain["variants"])[-1])
    parser.add_argument("--threshold", type=float, action="append", help="of an exit, first to last; else chain.json's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", type=Path, help="write probabilities and exits to this .npz")
    options = parser.parse_args()
    thresholds = options.threshold or chain["variants"][options.precision]["thresholds"]
    exits = len(chain["segments"])
    if len(thresholds) != exits - 1 or not all(0 <= t <= 1 for t in thresholds):
        stop(f"thresholds are {exits - 1} numbers between 0 (all leave) and 1 (nobody does); given: {thresholds}")
    parts = [part(segment["folder"]) for segment in chain["segments"]]
    for path in options.inputs:
        if not path.is_file():
            stop(f"no file {path}")
    arrays = parts[0].read_inputs(options.inputs)
    runs = open_segments(chain, parts, options.precision, options.threads)
    names = [segment["answer"] for segment in chain["segments"]]
    found, left = [], []
    for i in range(len(next(iter(arrays.values())))):
        sample = {name: array[i : i + 1] for name, array in arrays.items()}
        p, k = answer(runs, names, thresholds, chain["ensemble"], sample)
        print(f"sample {i}: left by exit {k} of {exits}")
        parts[0].show("probability", p, True)
        found.append(p)
        left.append(k)
    if options.save:
        np.savez(options.save, probability=np.stack(found), exit=np.asarray(left))


if __name__ == "__main__":
    main()
