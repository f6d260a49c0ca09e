"""What NVIDIA's own parser and builder make of ONNX files, on a machine without a GPU.

    python benchmarks/tensorrt_oracle.py [--python PY] [--json] model.int8.onnx ...

The wheel ``onnxruntime-ep-nv-tensorrt-rtx-cu13`` brings TensorRT-RTX, which builds engines without a driver; the
wheel ``tensorrt_cu13_bindings`` brings the Python API of the full TensorRT, which loads on top of it. The pairing is
unsupported, builds only, and says nothing about speed or about the kernels of TensorRT 8 and 10 on a Jetson: its
numbers are labelled TensorRT-RTX. Install both in an environment of their own (they also need numpy):

    pip install --no-deps onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0 tensorrt_cu13_bindings==11.4.0.106

and name its interpreter with ``--python`` or the variable DEPLOYKIT_ORACLE_PYTHON. A C compiler is needed for a stub of
one symbol. Each file is judged in a process of its own, because the builder can crash.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"
STUB = "int initLibNvInferPlugins(void *logger, const char *space) { return 1; }"
LIBRARIES = {
    "libtensorrt_rtx.so.*": "libnvinfer.so.11",
    "libtensorrt_onnxparser_rtx.so.*": "libnvonnxparser.so.11",
}
"""RTX's libraries, and the names under which the bindings look for TensorRT's."""
PRODUCT_LAYERS = {"CONVOLUTION": "convolutions", "DECONVOLUTION": "deconvolutions", "MATRIX_MULTIPLY": "products"}
PRODUCT_KERNELS = ("correlation", "convolution", "deconv", "gemm")


class Unavailable(Exception):
    """The oracle cannot run here; says why."""


def libraries(python: str) -> Path:
    """The folder of NVIDIA's libraries in that interpreter's environment."""
    code = (
        "import importlib.util as u\n"
        f"found = [u.find_spec(n) for n in ('{PACKAGE}', 'tensorrt_bindings')]\n"
        "print(found[0].submodule_search_locations[0] if all(found) else '')"
    )
    try:
        where = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"cannot run {python}: {error}") from None
    if not where:
        raise Unavailable(
            f"{python} has no onnxruntime-ep-nv-tensorrt-rtx-cu13 and tensorrt_cu13_bindings; "
            "install them in an environment of their own and set DEPLOYKIT_ORACLE_PYTHON to its interpreter"
        )
    return Path(where)


def judge(files: list[Path], python: str) -> list[dict[str, Any]]:
    """The verdict on each file.

    Raises:
        Unavailable: a wheel or the C compiler is missing.
    """
    source = libraries(python)
    with tempfile.TemporaryDirectory() as folder:
        for pattern, name in LIBRARIES.items():
            found = sorted(source.glob(pattern))
            if not found:
                raise Unavailable(f"{source} has no {pattern}")
            (Path(folder) / name).symlink_to(found[0])
        stub = Path(folder) / "stub.c"
        stub.write_text(STUB)
        plugin = f"{folder}/libnvinfer_plugin.so.11"
        command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libnvinfer_plugin.so.11", "-o", plugin, str(stub)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise Unavailable(f"cannot compile the stub: {error}") from None
        version = found[0].name.partition(".so.")[2]
        return [{"file": str(f), "oracle": f"TensorRT-RTX {version}", **_judge_one(f, python, folder)} for f in files]


def _judge_one(file: Path, python: str, folder: str) -> dict[str, Any]:
    command = [python, os.path.abspath(__file__), "--child", str(file)]
    environment = {**os.environ, "LD_LIBRARY_PATH": folder}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            verdict: dict[str, Any] = json.loads(line)
            return verdict
    return {"accepted": False, "error": f"the builder crashed (exit code {done.returncode})"}


def child(file: str) -> None:
    """Runs in the oracle's environment: parses, builds and prints one line of JSON."""
    import tensorrt_bindings as trt  # type: ignore[import-not-found]

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.extend(message.splitlines())

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(file):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        print(json.dumps({"accepted": False, "error": "; ".join(errors)[:500]}))
        return
    layers = Counter(str(network.get_layer(i).type).rpartition(".")[2] for i in range(network.num_layers))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if any(-1 in tuple(i.shape) for i in inputs):
        profile = builder.create_optimization_profile()
        for i in inputs:
            shapes = [tuple(batch if d < 0 else d for d in tuple(i.shape)) for batch in (1, 8, 32)]
            profile.set_shape(i.name, *shapes)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    kernels = Counter(k for line in log.lines if (k := kernel(line)) is not None)
    verdict = {
        "accepted": plan is not None,
        "error": "" if plan is not None else "the builder returned no engine",
        **{word: layers.get(kind, 0) for kind, word in PRODUCT_LAYERS.items()},
        "kernels": dict(sorted(kernels.items())),
        "int8_convolution_kernels": sum(
            n for k, n in kernels.items() if k.endswith("Int8") and not k.startswith("gemm")
        ),
        "int8_gemm_kernels": kernels.get("gemm Int8", 0),
        "quantize_operations": sum(line.partition(",")[0].count("Roun") for line in log.lines if _is_kernel(line)),
        "plan_bytes": plan.nbytes if plan is not None else None,
    }
    print(json.dumps(verdict), flush=True)
    os._exit(0)  # the library's destructors crash without a driver


def _is_kernel(line: str) -> bool:
    return line.lstrip().startswith("Name:") and "LayerType:" in line


def kernel(line: str) -> str | None:
    """``"correlation Int8"`` for a line of the builder's log about a product: its kind and its first input's type."""
    if not _is_kernel(line):
        return None
    kind = re.search(r"LayerType: (\w+)", line)
    datatype = re.search(r"Inputs: \[ \{.*?Datatype: (\w+)", line)
    if kind is None or datatype is None or kind.group(1) not in PRODUCT_KERNELS:
        return None
    return f"{kind.group(1)} {datatype.group(1)}"


def main() -> int:
    """Prints a line per file, or JSON."""
    parser = argparse.ArgumentParser(description="What NVIDIA's parser and builder make of ONNX files, without a GPU.")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--python", default=os.environ.get("DEPLOYKIT_ORACLE_PYTHON", sys.executable))
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(str(args.models[0]))
        return 0
    try:
        verdicts = judge(args.models, args.python)
    except Unavailable as reason:
        print(f"the oracle cannot run: {reason}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(verdicts, indent=1))
        return 0
    for v in verdicts:
        if not v["accepted"]:
            print(f"{v['file']}: rejected: {v['error']}")
            continue
        print(
            f"{v['file']}: {v['int8_convolution_kernels']}/{v['convolutions'] + v['deconvolutions']} convolutions and "
            f"{v['int8_gemm_kernels']}/{v['products']} products int8, {v['quantize_operations']} quantize operations, "
            f"{v['kernels']} ({v['oracle']})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
