"""The tflite exporter: float32, float16 and int8 ``.tflite`` files for LiteRT, images channels-last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from deploykit.core.artifact import File, Runner, Runtime
from deploykit.core.errors import DeploykitError
from deploykit.core.target import Precision, Target
from deploykit.hub.graph import Hub


def export(hub: Hub, target: Target, out_dir: Path, precisions: Sequence[Precision]) -> tuple[File, ...]:
    """Writes ``model.PRECISION.tflite`` files.

    Args:
        hub: ``hub.graph`` gives the float files, ``hub.quantized`` the int8 file.
        target: its name stands in messages.
        out_dir: an existing folder.
        precisions: of fp32, fp16 (float16 weights, float32 sums) and int8.

    Raises:
        DeploykitError: a precision or option this exporter does not know, or operators it cannot write (all are named).
        MissingExtra: LiteRT's schema is not installed.
    """
    from deploykit.exporters.tflite.translate import translate

    if target.options:
        raise DeploykitError(
            f"target {target.name}: the tflite exporter has no options; given: {', '.join(target.options)}"
        )
    files = []
    for precision in precisions:
        model = _model(hub, target, precision)
        reasons: Mapping[str, str] = {d.layer: d.why for d in hub.decisions if d.why}
        made = translate(model, half=precision == "fp16", reasons=reasons)
        path = f"model.{precision}.tflite"
        (out_dir / path).write_bytes(made.data)
        files.append(File(path, precision, made.quantized, made.islands, inputs=made.inputs, outputs=made.outputs))
    return tuple(files)


def load(path: Path, threads: int = 1) -> Runner:
    """Opens a file that `export` wrote in ai-edge-litert or tflite-runtime; see `open_runner`."""
    from deploykit.exporters.tflite.runner import open_runner

    return open_runner(path, threads)


def runtime() -> Runtime:
    """LiteRT, whichever package brings it."""
    from deploykit.exporters.tflite.runner import interpreter_package

    return Runtime(interpreter_package())


def _model(hub: Hub, target: Target, precision: Precision) -> ir.Model:
    if precision in ("fp32", "fp16"):
        return hub.graph.model
    if precision != "int8":
        raise DeploykitError(f"target {target.name}: .tflite files are written in fp32, fp16 and int8, not {precision}")
    if hub.quantized is None:
        raise DeploykitError(f"target {target.name}: int8 needs calibration data")
    return hub.quantized
