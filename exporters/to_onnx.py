"""ONNX for ONNX Runtime and other readers of standard Q/DQ graphs: the hub itself, without what only tools need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from deploykit.core.artifact import Arrays, File, Runner, Runtime
from deploykit.core.errors import DeploykitError
from deploykit.core.target import Precision, Target
from deploykit.exporters.half import bake_half
from deploykit.hub.graph import Hub


def export(hub: Hub, target: Target, out_dir: Path, precisions: Sequence[Precision]) -> tuple[File, ...]:
    """Writes ``model.PRECISION.onnx`` for each precision.

    Raises:
        DeploykitError: the graph's operator set is above the target's, or a precision this exporter does not write.
    """
    written = []
    for precision in precisions:
        notes: tuple[str, ...] = ()
        if precision == "fp32":
            model = onnx.load_model_from_string(hub.graph.bytes)
        elif precision == "fp16":
            half = hub.graph.copy()
            notes = bake_half(half)
            model = ir.to_proto(half)
        elif precision == "int8":
            model = onnx.load_model_from_string(hub.bytes)
        else:
            raise DeploykitError(f"the onnx exporter writes fp32, fp16 and int8; asked for {precision}")
        _fit_opset(model, target)
        del model.graph.value_info[:]  # runtimes infer shapes again
        onnx.checker.check_model(model)
        path = f"model.{precision}.onnx"
        (out_dir / path).write_bytes(model.SerializeToString(deterministic=True))
        integer = precision == "int8"
        written.append(File(path, precision, hub.counts() if integer else {}, hub.islands() if integer else (), notes))
    return tuple(written)


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
    import onnxruntime as ort

    return Runtime(f"onnxruntime {ort.__version__}")


def _fit_opset(model: onnx.ModelProto, target: Target) -> None:
    opset = next(o.version for o in model.opset_import if o.domain == "")
    if opset > target.opset:
        raise DeploykitError(
            f"target '{target.name}' reads operator sets up to {target.opset}; this graph needs {opset}"
        )
