"""A bundle for TensorRT, written on a machine without a GPU: ONNX variants, golden data and the script that builds.

Engines run only on the GPU and the TensorRT that built them, so this writes what a device needs to build its own:

* ``model.fp32.onnx`` and ``model.int8.onnx``: float32 between the operators; TensorRT 8 and 10 pick the kernels' types
  (weak typing, ``--fp16``, ``--int8``); the operator set is the oldest parser's;
* ``model.fp16.onnx``, ``model.int8-fp16.onnx`` and ``model.fp8.onnx``: float16 between float32 inputs and outputs; the
  file's types are the kernels' types (strong typing, TensorRT 10 and later; where a device only has older ones, the
  fp16 file is built with ``--fp16``);
* ``golden/``, ``bundle.json``, ``build.py``, ``build.sh``, ``BUILD.md``: `./build.sh` on the device builds every
  variant its TensorRT can, checks and times them, and keeps the fastest.

What each choice rests on: docs/exporters/tensorrt.md.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from deploykit.core.artifact import Arrays, File, Island, Port, Runner, Runtime, TensorSpec
from deploykit.core.errors import DeploykitError, some
from deploykit.core.precision import FORMATS, Precision, is_quantized
from deploykit.core.target import Target
from deploykit.exporters import refuse_uncarried
from deploykit.exporters.half import bake_half
from deploykit.exporters.tensorrt import lint as trt_lint
from deploykit.exporters.tensorrt.device.build import PLANS, legal_plans
from deploykit.exporters.tensorrt.golden import golden_inputs, least, signal_to_noise, write_arrays
from deploykit.exporters.tensorrt.lint import Finding, lint, runs_in_8_bits
from deploykit.exporters.tensorrt.opset import lower_opset, verify_opset
from deploykit.exporters.tensorrt.options import Options, options
from deploykit.exporters.tensorrt.parsers import FLOAT16_WEIGHTS, unread
from deploykit.exporters.tensorrt.shapes import bind_batch
from deploykit.exporters.tensorrt.sparsity import lost_zeros, sparse_layers
from deploykit.hub.graph import Hub, serialize, specs
from deploykit.hub.operators import CANNOT_BE_STORED, PRODUCTS

DEVICE_FILES = ("build.py", "build.sh")
GUIDE = "BUILD.md"
HOLDS = {
    "fp32": "float32",
    "fp16": "float16 between float32 inputs and outputs",
    "int8": "Q/DQ in a float32 graph",
    "int8-fp16": "Q/DQ in a float16 graph",
    "fp8": "Q/DQ of 8-bit floating point (E4M3) in a float16 graph",
}
"""What the file of a precision holds, for the guide."""


CARRIES: tuple[Precision, ...] = ("fp32", "fp16", "int8", "int8-fp16", "fp8")
KERNELS = "TensorRT's integer kernels for convolutions read weights and activations of 8 bits"
STORED = "its weight-only kernels are for generated text; networks are built in int8 or fp16"
WHY_NOT: Mapping[Precision, str] = {
    "bf16": "its files are checked in ONNX Runtime, which has no bfloat16 kernels for processors",
    "int16x8": KERNELS,
    "w4a8": KERNELS,
    "w3a8": KERNELS,
    "w2a8": KERNELS,
    "w4a4": KERNELS,
    "w8": STORED,
    "dynamic": STORED,
    "w4": STORED,
}


def export(hubs: Mapping[Precision, Hub], target: Target, out_dir: Path) -> tuple[File, ...]:
    """Writes the bundle. The hubs are of one model.

    Golden inputs are the hubs' ``samples``, or seeded random numbers where there are none.

    Raises:
        DeploykitError: operators that the operator set or float16 does not have (all of them named), a file that
            breaks a rule TensorRT rejects, wrong options, int8 without calibration.
    """
    refuse_uncarried(target, hubs, CARRIES, WHY_NOT)
    settings, first = options(target), next(iter(hubs.values()))
    if "fp16" in hubs and "fp32" not in hubs and settings.newest < FLOAT16_WEIGHTS:
        raise DeploykitError(
            f"target {target.name}: TensorRT {settings.trt[1]} reads no float16 weights and builds fp16 from the fp32 "
            "file: give --precision fp32 too"
        )
    reference = _variant(first, "fp32", settings)
    graph = ir.from_proto(reference[0]).graph
    takes, gives = specs(list(graph.inputs)), specs(list(graph.outputs))
    dynamic = isinstance(takes[0].shape[0], str)
    batch = settings.batch if dynamic else 3 * (int(takes[0].shape[0]),)
    inputs, origin = golden_inputs(first, takes, batch[1])
    compute = _runner(reference[0].SerializeToString(), "the float model", threads=1)
    golden = [compute(sample) for sample in inputs]

    files, models, findings = [], {}, {}
    for precision, hub in hubs.items():
        proto, notes = reference if precision == "fp32" else _variant(hub, precision, settings)
        found = lint(proto, (settings.readers(precision)[1], settings.newest))
        _refuse_errors(found, precision, target)
        path = out_dir / f"model.{precision}.onnx"
        path.write_bytes(proto.SerializeToString(deterministic=True))
        counts, islands = _quantized_operators(proto, found, hub) if is_quantized(precision) else ({}, ())
        read = ir.from_proto(proto).graph
        sparse = sparse_layers(read) if "2:4" in target.profits else ()
        if filled := lost_zeros(read, hub):
            raise DeploykitError(f"{path.name}: zeros of the pattern 2:4 were filled in {some(filled)}")
        if sparse:
            notes.append(f"2:4 zeros in {some(sparse)}: TensorRT may pick sparse kernels for them")
        in_islands = {island.layer for island in islands}
        notes += [str(f) for f in found if f.node not in in_islands]
        unreadable = precision == "fp16" and settings.newest < FLOAT16_WEIGHTS
        if unreadable:
            notes.append(
                f"TensorRT {settings.trt[1]} reads no float16 weights: build.py builds fp16 from the fp32 file"
            )
        bound = (_bound(takes, batch), _bound(gives, batch))
        instead = "model.fp32.onnx" if unreadable else ""
        files.append(
            File(
                path.name, precision, counts, islands, tuple(notes), inputs=bound[0], outputs=bound[1],
                read_instead=instead,
            )
        )  # fmt: skip
        expected = signal_to_noise(load(path), inputs, golden)
        models[precision] = {
            "file": path.name,
            "opset": proto.opset_import[0].version,
            "typing": settings.typing(precision),
            "sparse": sparse,
            "expected_db": expected,
            "least_db": {name: least(db) for name, db in expected.items()},
        }
        findings[path.name] = [asdict(f) for f in found]

    about = {
        "format": "deploykit-tensorrt-2",
        "target": target.name,
        "tensorrt": settings.trt,
        "sparsity": "2:4" in target.profits,
        "batch": batch,
        "dynamic": dynamic,
        "inputs": [asdict(s) for s in takes],
        "outputs": [asdict(s) for s in gives],
        "models": models,
        "golden_from": origin,
        "golden": [
            {"inputs": write_arrays(out_dir, f"{i}.input", x), "outputs": write_arrays(out_dir, f"{i}.output", y)}
            for i, (x, y) in enumerate(zip(inputs, golden, strict=True))
        ],
        "lint": findings,
    }
    _write_bundle(out_dir, about, [f.path for f in files], settings)
    return tuple(files)


def _bound(tensors: Sequence[TensorSpec], batch: Sequence[int]) -> tuple[Port, ...]:
    """How engines take and give them, each free batch as its smallest and largest number of samples."""
    span = f"{batch[0]}..{batch[2]}"
    return tuple(
        Port(t.name, tuple(span if isinstance(d, str) and i == 0 else d for i, d in enumerate(t.shape)), t.dtype)
        for t in tensors
    )


def load(path: Path, threads: int = 1) -> Runner:
    """Runs a variant's ONNX file in ONNX Runtime on the CPU, in batches of any size.

    This checks the file's numbers. It is no TensorRT engine: nothing about speed follows, and the sums on the device
    round elsewhere.

    Args:
        path: a ``model.*.onnx`` of a bundle.
        threads: intra-op threads.

    Raises:
        DeploykitError: the file is missing, truncated or no ONNX model.
    """
    return _runner(str(path), str(path), threads)


def _runner(model: str | bytes, what: str, threads: int) -> Runner:
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    # ORT's quantization passes give biases the scale s_x * s_w, which underflows in a float16 graph (top-1 falls to 0
    # on MobileNetV1), and are not what the device runs. Without them Q, DQ and the operators run as they are written.
    settings.add_session_config_entry("session.disable_quant_qdq", "1")
    taking_float8_for_uint8 = ["ReluQuantRewrite"]  # drops the Relu in front of a QuantizeLinear
    try:
        session = ort.InferenceSession(
            model, settings, providers=["CPUExecutionProvider"], disabled_optimizers=taking_float8_for_uint8
        )
    except Exception as error:  # ORT's exceptions have no common base class
        raise DeploykitError(f"{what} is not an ONNX file ONNX Runtime can run: {str(error).splitlines()[0]}") from None
    first = session.get_inputs()[0].shape[0]
    fixed = first if isinstance(first, int) else None
    names = [o.name for o in session.get_outputs()]

    def run(arrays: Arrays) -> dict[str, Any]:
        feed = {name: np.asarray(array) for name, array in arrays.items()}
        count = len(next(iter(feed.values())))
        step = fixed or count
        parts = []
        for start in range(0, count, step):
            rows = np.minimum(
                np.arange(start, start + step), count - 1
            )  # the last batch is filled up with its last row
            parts.append(session.run(names, {name: array[rows] for name, array in feed.items()}))
        return {
            name: np.concatenate(outputs)[:count] for name, outputs in zip(names, zip(*parts, strict=True), strict=True)
        }

    return run


def runtime() -> Runtime:
    """ONNX Runtime stands in for TensorRT: it checks numbers, its times mean nothing for the device."""
    import onnxruntime as ort

    return Runtime(f"onnxruntime {ort.__version__} for numbers", "needs TensorRT on the device (run build.sh there)")


def _variant(hub: Hub, precision: Precision, settings: Options) -> tuple[onnx.ModelProto, list[str]]:
    """One variant's model, verified, and notes about it."""
    if is_quantized(precision) and hub.quantized is None:
        raise DeploykitError(f"{precision} needs calibration: give --calib")
    source = hub.quantized if is_quantized(precision) else hub.graph.model
    assert source is not None
    opset, oldest = settings.readers(precision)
    model = bind_batch(source, settings.bound)
    lower_opset(model, opset, unread(oldest))
    half = precision == "fp16" or FORMATS[precision].half
    notes = list(bake_half(model)) if half else []
    _forget_origin(model)
    proto = onnx.load_model_from_string(serialize(model))
    del proto.graph.value_info[:]  # parsers infer shapes again
    verify_opset(proto, opset)
    return proto, notes


def _forget_origin(model: ir.Model) -> None:
    """Drops what only tools need; stack traces would carry the user's paths, and older IR versions have no metadata."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()


def _refuse_errors(found: tuple[Finding, ...], precision: Precision, target: Target) -> None:
    errors = [str(f) for f in found if f.severity == "E"]
    if errors:
        raise DeploykitError(f"{target.name}: TensorRT would reject model.{precision}.onnx: {'; '.join(errors)}")


def _quantized_operators(
    proto: onnx.ModelProto, found: tuple[Finding, ...], hub: Hub
) -> tuple[dict[str, int], tuple[Island, ...]]:
    """How many linear operators run in 8 bits, and why the others do not."""
    sentences = {f.node: f.sentence for f in found if f.severity == "S"}
    decisions = {d.layer: d.why for d in hub.decisions if not d.quantized}
    counts: Counter[str] = Counter()
    islands = [Island(d.operator, d.layer, d.why) for d in hub.decisions if d.why == CANNOT_BE_STORED]
    for node in trt_lint.read(proto).graph:
        if node.op_type not in PRODUCTS:
            continue
        layer = trt_lint.name(node)
        if runs_in_8_bits(node):
            counts[node.op_type] += 1
        else:
            why = sentences.get(layer) or decisions.get(layer) or "its inputs are not quantized"
            islands.append(Island(node.op_type, layer, why))
    return dict(sorted(counts.items())), tuple(islands)


def _write_bundle(out_dir: Path, about: dict[str, Any], models: list[str], settings: Options) -> None:
    """The scripts, then ``bundle.json`` with the checksums of everything else."""
    device = resources.files("deploykit.exporters.tensorrt.device")
    for name in DEVICE_FILES:
        (out_dir / name).write_bytes((device / name).read_bytes())
    guide = (device / GUIDE).read_text(encoding="utf-8")
    (out_dir / GUIDE).write_bytes(_guide(guide, about, settings).encode())
    (out_dir / "build.sh").chmod(0o755)
    golden = [path for run in about["golden"] for paths in run.values() for path in paths.values()]
    about["sha256"] = {
        name: hashlib.sha256((out_dir / name).read_bytes()).hexdigest() for name in sorted([*models, *golden])
    }
    (out_dir / "bundle.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _guide(text: str, about: dict[str, Any], settings: Options) -> str:
    """``BUILD.md``: the files of this bundle, and what the releases of this device build of them."""
    releases = settings.oldest, settings.newest
    legal = {plan.variant for release in releases for plan in legal_plans(about, release)[0]}
    rows = []
    for precision, model in about["models"].items():
        built = [f"`{p.variant}`" for p in PLANS if p.precision == precision and p.variant in legal]
        none = f"nothing: TensorRT {settings.trt[1]} cannot read it; it shows what {precision} costs"
        rows.append(f"| `{model['file']}` | {HOLDS[precision]} | {', '.join(built) or none} |")
    some = next(plan.variant for plan in reversed(PLANS) if plan.variant in legal)
    return text.replace("@FILES@", "\n".join(rows)).replace("@VARIANT@", some)
