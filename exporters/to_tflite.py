"""The tflite exporter: float32, float16 and int8 ``.tflite`` files for LiteRT, images channels-last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from deploykit.core.artifact import File, Runner, Runtime
from deploykit.core.errors import DeploykitError
from deploykit.core.precision import FORMATS, Precision, is_integer
from deploykit.core.target import Target
from deploykit.exporters import refuse_uncarried
from deploykit.exporters.int4 import narrow_weights
from deploykit.hub.graph import Hub

CARRIES: tuple[Precision, ...] = ("fp32", "fp16", "int16x8", "int8", "w8", "dynamic", "w4a8", "w3a8", "w2a8")
WHY_NOT: Mapping[Precision, str] = {
    "bf16": "LiteRT has no bfloat16 kernels for processors",
    "int8-fp16": "XNNPACK computes in float16 by itself where it is told to, from any file",
    "fp8": "LiteRT has no kernels for 8-bit floating point",
    "w4": "LiteRT reads no weights in groups",
    "w4a4": "LiteRT has no kernels for activations of 4 bits",
}
STORED: Mapping[Precision, str] = {
    "w8": "LiteRT widens integer weights to float when it loads the file: smaller, not faster, nor smaller in memory",
    "dynamic": "LiteRT rounds the inputs of convolutions and matrix products by the range of each call, and multiplies "
    "integers; depthwise convolutions run in float",
}


def export(hubs: Mapping[Precision, Hub], target: Target, out_dir: Path) -> tuple[File, ...]:
    """Writes ``model.PRECISION.tflite`` files.

    Args:
        hubs: of fp32, fp16 (float16 weights, float32 sums) and integers.
        target: its name stands in messages.
        out_dir: an existing folder.

    Raises:
        DeploykitError: a precision or option this exporter does not know, or operators it cannot write (all are named).
        MissingExtra: LiteRT's schema is not installed.
    """
    from deploykit.exporters.tflite.translate import translate

    if target.options:
        raise DeploykitError(
            f"target {target.name}: the tflite exporter has no options; given: {', '.join(target.options)}"
        )
    refuse_uncarried(target, hubs, CARRIES, WHY_NOT)
    files = []
    for precision, hub in hubs.items():
        model = _model(hub, target, precision)
        reasons: Mapping[str, str] = {d.layer: d.why for d in hub.decisions if d.why}
        narrow = narrow_weights(hub) if is_integer(precision) else set()
        made = translate(model, precision == "fp16", reasons, narrow, dynamic=FORMATS[precision].kind == "dynamic")
        path = f"model.{precision}.tflite"
        (out_dir / path).write_bytes(made.data)
        alone = hub.spec.placement == "weights" and is_integer(precision)
        counts, islands = (hub.counts(), hub.islands()) if alone else (made.quantized, made.islands)
        notes = (STORED[precision],) if alone else _notes(hub, made.narrow) if is_integer(precision) else ()
        files.append(File(path, precision, counts, islands, notes, inputs=made.inputs, outputs=made.outputs))
    return tuple(files)


def max_mismatch(target: Target, hub: Hub) -> float:
    """Outside XNNPACK, LiteRT's products round twice; between 16-bit activations they rescale by 16 bits, so that any
    share may be one of 65,536 steps off."""
    if hub.spec.activation_bits == 16:
        return 100.0
    return 10.0 if narrow_weights(hub) else 0.0


def max_lsb(target: Target, hub: Hub) -> float:
    """In 16 bits softmax, sigmoid and tanh come from tables, up to 5 of 65,536 steps off."""
    return 8.0 if hub.spec.activation_bits == 16 else 0.0


def load(path: Path, threads: int = 1) -> Runner:
    """Opens a file that `export` wrote in ai-edge-litert or tflite-runtime; see `open_runner`."""
    from deploykit.exporters.tflite.runner import open_runner

    return open_runner(path, threads)


def runtime() -> Runtime:
    """LiteRT, whichever package brings it."""
    from deploykit.exporters.tflite.runner import interpreter_package

    return Runtime(interpreter_package())


def _notes(hub: Hub, narrow: int) -> tuple[str, ...]:
    """What the user should know about an integer file with so many weights in 4 bits."""
    notes = []
    if hub.spec.activation_bits == 16:
        notes.append(
            "LiteRT computes 16-bit activations in its plain kernels, without XNNPACK: tens of times as slow as int8; "
            "for accelerators that have 16 bits"
        )
    if narrow:
        notes.append(
            f"{narrow} weights are stored in 4 bits; LiteRT computes these layers without XNNPACK, two to three times "
            "as slow as int8: the file is smaller, not faster. tflite-runtime 2.14 refuses it"
        )
    return tuple(notes)


def _model(hub: Hub, target: Target, precision: Precision) -> ir.Model:
    if not is_integer(precision):
        return hub.graph.model
    if hub.quantized is None:
        raise DeploykitError(f"target {target.name}: {precision} needs calibration data")
    return hub.quantized
