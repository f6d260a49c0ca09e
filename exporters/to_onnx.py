"""ONNX for ONNX Runtime and other readers of standard Q/DQ graphs: the hub itself, without what only tools need."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from deploykit.core.artifact import Arrays, File, Runner, Runtime
from deploykit.core.errors import DeploykitError
from deploykit.core.precision import FORMATS, Precision, is_integer
from deploykit.core.target import Target
from deploykit.exporters import refuse_uncarried
from deploykit.exporters.codebooks import store_codebooks
from deploykit.exporters.half import bake_half
from deploykit.exporters.int4 import narrow_weights, store_int4
from deploykit.exporters.stored import stored_model
from deploykit.hub.graph import OPSET as INT4_OPSET
from deploykit.hub.graph import Hub
from deploykit.hub.widen import widened

CARRIES: tuple[Precision, ...] = (
    "fp32", "fp16", "int16x8", "int8", "w8", "dynamic", "w4", "w4a8", "w3a8", "w2a8", "w4a4"
)  # fmt: skip
WHY_NOT: Mapping[Precision, str] = {
    "bf16": "ONNX Runtime has no bfloat16 kernels for processors",
    "int8-fp16": "ONNX Runtime's kernels for processors have no float16, and its optimizer breaks such files",
    "fp8": "ONNX Runtime widens 8-bit floating point on processors and computes in float32",
}


def export(hubs: Mapping[Precision, Hub], target: Target, out_dir: Path) -> tuple[File, ...]:
    """Writes ``model.PRECISION.onnx`` for each precision.

    Raises:
        DeploykitError: the graph's operator set is above the target's, or a precision this exporter does not write.
    """
    refuse_uncarried(target, hubs, CARRIES, WHY_NOT)
    written = []
    for precision, hub in hubs.items():
        if hub.spec.placement == "weights" and is_integer(precision):
            stored, notes = stored_model(hub, dynamic=FORMATS[precision].kind == "dynamic")
            model = ir.to_proto(stored)
        elif is_integer(precision):
            model, notes = _integer_model(hub, target)
        elif precision == "fp16":
            half = hub.graph.copy()
            notes = bake_half(half)
            model = ir.to_proto(half)
        else:
            model = onnx.load_model_from_string(hub.graph.bytes)
            notes = store_codebooks(model, target.opset)
        _fit_opset(next(o.version for o in model.opset_import if o.domain == ""), target, precision)
        del model.graph.value_info[:]  # runtimes infer shapes again
        onnx.checker.check_model(model)
        path = f"model.{precision}.onnx"
        (out_dir / path).write_bytes(model.SerializeToString(deterministic=True))
        integer = is_integer(precision)
        written.append(File(path, precision, hub.counts() if integer else {}, hub.islands() if integer else (), notes))
    return tuple(written)


def _integer_model(hub: Hub, target: Target) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The hub as this runtime computes it in integers, and what the user should know."""
    model, notes = widened(onnx.load_model_from_string(hub.bytes), fused=True), []
    if hub.spec.activation_bits == 16:
        notes.append(
            "ONNX Runtime's kernels for processors compute 16-bit activations in float: not faster than fp32 there; "
            "runtimes of some NPUs have integer kernels for them"
        )
    elif hub.spec.activation_bits == 4:
        notes.append("activations of 4 bits are stored in 8, and a Clip keeps them within 4: not faster than int8")
        _lower_opset(model, min(hub.graph.model.opset_imports[""], max(INT4_OPSET - 1, target.opset)))
    narrow = narrow_weights(hub)
    if narrow and target.opset < INT4_OPSET:
        notes.append(
            f"weights of 4 bits and fewer are stored in int8: INT4 begins with operator set {INT4_OPSET}, and target "
            f"'{target.name}' reads {target.opset}"
        )
    elif narrow:
        count, values = store_int4(model, narrow)
        notes.append(
            f"{count} of {len(narrow)} weights of 4 bits and fewer are stored as INT4, {-(-values // 2):,} bytes; ONNX "
            "Runtime (1.23 and later) widens them to int8 when it loads the file: smaller than int8, not faster"
        )
    return model, tuple(notes)


def rehearse(hubs: Mapping[Precision, Hub], target: Target, final: bool) -> None:
    """Refuses what `export` would refuse; files that need no other operators and may be large are not written."""
    with tempfile.TemporaryDirectory() as folder:
        for precision, hub in hubs.items():
            model = hub.quantized if hub.spec.placement == "weights" else hub.graph.model
            if model is not None and (precision == "fp32" or hub.spec.placement == "weights"):
                _fit_opset(model.opset_imports[""], target, precision)
            else:
                export({precision: hub}, target, Path(folder))


def load(path: Path, threads: int = 1) -> Runner:
    """Runs an ``.onnx`` in ONNX Runtime on the CPU.

    Raises:
        DeploykitError: the file is truncated or no ONNX model.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a family of exceptions without a common base
        reason = str(error).splitlines()[0]
        raise DeploykitError(f"ONNX Runtime cannot open {path}: {reason}") from None
    return runner(session)


def runner(session: ort.InferenceSession) -> Runner:
    """A session as a `Runner`: batches are split for files with a fixed batch of 1."""
    outputs = [o.name for o in session.get_outputs()]
    fixed = any(i.shape[0] == 1 for i in session.get_inputs() if i.shape)

    def run(arrays: Arrays) -> dict[str, np.ndarray]:
        feed = {n: np.ascontiguousarray(a) for n, a in arrays.items()}
        count = len(next(iter(feed.values())))
        if not fixed or count == 1:
            return dict(zip(outputs, session.run(outputs, feed), strict=True))
        singles = [session.run(outputs, {n: a[i : i + 1] for n, a in feed.items()}) for i in range(count)]
        return {name: np.concatenate([s[k] for s in singles]) for k, name in enumerate(outputs)}

    return run


def runtime() -> Runtime:
    """ONNX Runtime."""
    return Runtime(f"onnxruntime {ort.__version__}")


def _lower_opset(model: onnx.ModelProto, opset: int) -> None:
    """Back to the operator set from before 4-bit types needed the one that has them; they are gone."""
    for imported in model.opset_import:
        if imported.domain == "" and imported.version == INT4_OPSET:
            imported.version = opset


def _fit_opset(opset: int, target: Target, precision: Precision) -> None:
    if opset > target.opset:
        raise DeploykitError(
            f"target '{target.name}' reads operator sets up to {target.opset}; the {precision} graph needs {opset}"
        )
