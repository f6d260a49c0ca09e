"""Stands in for trtexec in the tests of build.py: checks the command line, touches files, measures nothing.

``fake_trtexec`` is installed into a folder with a ``fake.json`` beside it: which TensorRT it pretends to be, which
variants fail to build, how far outputs are off, where golden inputs lie that come from elsewhere. It appends every
command line to ``argv.jsonl``. The times it writes are made up.
"""

from __future__ import annotations

import json
import os
import struct
import sys

MADE_UP_MS = {"fp32": 4.0, "fp16-weak": 3.0, "fp16-file": 3.2, "fp16": 3.5, "int8-weak": 2.0, "int8-fp16": 2.5}

# Flags by release, from the table in docs/exporters/tensorrt.md (not from build.py, which is under test).
ALWAYS = {
    "--onnx", "--saveEngine", "--loadEngine", "--loadInputs", "--exportOutput", "--exportTimes", "--exportLayerInfo",
    "--minShapes", "--optShapes", "--maxShapes", "--shapes", "--timingCacheFile", "--profilingVerbosity",
    "--iterations", "--duration", "--warmUp", "--useCudaGraph", "--useSpinWait", "--noDataTransfers",
}  # fmt: skip
ONLY = {
    "v8201": {"--fp16", "--int8", "--sparsity", "--workspace", "--buildOnly"},
    "v8502": {"--fp16", "--int8", "--sparsity", "--workspace", "--memPoolSize", "--buildOnly"},
    "v8601": {"--fp16", "--int8", "--sparsity", "--workspace", "--memPoolSize", "--buildOnly", "--skipInference"},
    "v100300": {"--fp16", "--int8", "--sparsity", "--stronglyTyped", "--memPoolSize", "--skipInference"},
    "v101300": {"--fp16", "--int8", "--sparsity", "--stronglyTyped", "--memPoolSize", "--skipInference"},
    "v101600": {"--fp16", "--int8", "--sparsity", "--stronglyTyped", "--memPoolSize", "--skipInference"},
    "v110400": {"--stronglyTyped", "--memPoolSize", "--skipInference"},
}


def main(argv: list[str]) -> int:
    """One call."""
    here = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(here, "fake.json")) as file:
        told = json.load(file)
    print(f"&&&& RUNNING TensorRT.trtexec [TensorRT {told['version']}] # {' '.join(argv)}")
    if argv == ["--help"]:
        return 0
    with open(os.path.join(here, "argv.jsonl"), "a") as file:
        file.write(json.dumps(argv) + "\n")
    flags = dict(a.split("=", 1) if "=" in a else (a, "") for a in argv)
    unknown = [f for f in flags if f not in ALWAYS | ONLY[told["version"]]]
    if unknown:
        print(f"[E] Unknown option: {' '.join(unknown)}")
        return 1
    engine = flags.get("--saveEngine") or flags["--loadEngine"]
    variant = os.path.basename(engine)[: -len(".engine")]
    if "--saveEngine" in flags:
        if not os.path.exists(flags["--onnx"]):
            print("[E] no such file")
            return 1
        if variant in told.get("killed", []):
            return 137
        if variant in told.get("broken", []):
            print("[11/22/2026-00:00:00] [E] Error[4]: made up")
            return 1
        with open(engine, "w") as file:
            file.write("fake engine of " + variant)
        return 0
    if not os.path.exists(engine):
        print("[E] no engine")
        return 1
    if "--exportOutput" in flags:
        path = flags["--loadInputs"].split(",")[0].split(":")[1]
        with open(same_golden(path, told.get("golden", "")).replace("input", "output"), "rb") as file:
            raw = file.read()
        golden = struct.unpack(f"<{len(raw) // 4}f", raw)
        off = told.get("off", {}).get(variant, 0.0) * max(map(abs, golden))
        with open(flags["--exportOutput"], "w") as file:
            json.dump([{"name": told["output"], "dimensions": "1x10", "values": [v + off for v in golden]}], file)
    if "--exportTimes" in flags:
        warm = {"startComputeMs": 0.1, "computeMs": 99.0}
        timed = {"startComputeMs": 1000.0, "computeMs": MADE_UP_MS[variant]}
        with open(flags["--exportTimes"], "w") as file:
            json.dump([warm] + [timed] * int(flags["--iterations"]), file)
        with open(flags["--exportLayerInfo"], "w") as file:
            file.write("{}")
    return 0


def same_golden(path: str, folder: str) -> str:
    """The golden input with the bytes of the one given, from another folder."""
    with open(path, "rb") as file:
        given = file.read()
    for name in sorted(os.listdir(folder)) if folder else []:
        with open(os.path.join(folder, name), "rb") as file:
            if ".input." in name and file.read() == given:
                return os.path.join(folder, name)
    return path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
