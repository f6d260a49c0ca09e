"""OpenVINO IR (``model.PRECISION.xml`` with its weights in ``.bin``) for Intel's CPUs, GPUs and NPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from deploykit.core.artifact import File, Runner, Runtime
from deploykit.core.errors import DeploykitError
from deploykit.core.precision import Precision, is_integer
from deploykit.core.target import Target
from deploykit.exporters import refuse_uncarried
from deploykit.hub.graph import Hub, attribute

CARRIES: tuple[Precision, ...] = ("fp32", "fp16", "int8", "w8", "w4")
NARROW = "OpenVINO's integer kernels for networks read weights and activations of 8 bits"
WHY_NOT: Mapping[Precision, str] = {
    "bf16": "a plugin computes the fp32 file in bfloat16 by itself where the processor has it",
    "int8-fp16": "a plugin computes what is not integer in float16 by itself where it is told to",
    "fp8": "no processor, GPU or NPU that a plugin is for computes in 8-bit floating point as Q/DQ graphs say it",
    "int16x8": NARROW,
    "w4a8": NARROW,
    "w3a8": NARROW,
    "w2a8": NARROW,
    "w4a4": NARROW,
    "dynamic": "the CPU plugin rounds the inputs of products with integer weights by itself",
}


def export(hubs: Mapping[Precision, Hub], target: Target, out_dir: Path) -> tuple[File, ...]:
    """Writes ``model.PRECISION.xml`` and ``model.PRECISION.bin`` for each precision.

    Args:
        hubs: of fp32, fp16 (float16 weights), int8, and weights alone in integers.
        target: its options say the device and the batch.
        out_dir: an existing folder.

    Raises:
        DeploykitError: a precision or option this exporter does not know, operators that OpenVINO does not have.
        MissingExtra: OpenVINO is not installed.
    """
    from deploykit.exporters.openvino.convert import convert, ports
    from deploykit.exporters.openvino.kernels import judge, kernels
    from deploykit.exporters.openvino.library import openvino
    from deploykit.exporters.openvino.options import options
    from deploykit.exporters.openvino.runner import compile_for_cpu, read_file

    refuse_uncarried(target, hubs, CARRIES, WHY_NOT)
    settings = options(target)
    for hub in hubs.values():
        _refuse_short_groups(hub)
    files = []
    for precision, hub in hubs.items():
        if is_integer(precision) and hub.quantized is None:
            raise DeploykitError(f"target {target.name}: {precision} needs calibration data")
        model = hub.quantized if is_integer(precision) else hub.graph.model
        assert model is not None
        path = out_dir / f"model.{precision}.xml"
        made = convert(model, settings)
        openvino().save_model(made, str(path), compress_to_fp16=precision == "fp16")
        takes, gives = ports(made)
        weights = path.with_suffix(".bin").name
        file = File(
            path.name, precision, notes=settings.notes, parts=(weights,), untimed=settings.untimed, inputs=takes,
            outputs=gives,
        )  # fmt: skip
        if hub.spec.placement == "weights":
            file = replace(file, quantized=hub.counts(), islands=hub.islands())
        elif is_integer(precision):
            counts, islands = judge(hub.decisions, kernels(compile_for_cpu(read_file(path), path, threads=1)))
            file = replace(file, quantized=counts, islands=islands)
        files.append(file)
    return tuple(files)


def _refuse_short_groups(hub: Hub) -> None:
    """Raises where the inputs of a product are not divided by its groups: OpenVINO reads whole groups only."""
    model = hub.quantized if hub.spec.placement == "weights" else None
    short: dict[str, int] = {}
    for node in model.graph if model is not None else ():
        group, held = attribute(node, "block_size", 0), node.inputs[0] if node.inputs else None
        if node.op_type == "DequantizeLinear" and group and held is not None and held.shape is not None:
            size = held.shape[attribute(node, "axis", 1)]
            if isinstance(size, int) and size % group:
                short |= {str(user.name): size for user, _ in node.outputs[0].uses()}
    if short:
        listed = ", ".join(f"{name} ({size})" for name, size in short.items())
        raise DeploykitError(
            f"OpenVINO reads whole groups of weights only, and {hub.spec.weight_group} does not divide the inputs of "
            f"{listed}. Keep these in float (--keep-float), set another weight_group in the target, or ask for w8."
        )


def load(path: Path, threads: int = 1) -> Runner:
    """Opens a ``.xml`` with the ``.bin`` beside it on the CPU, computing floats in float32; see `open_runner`."""
    from deploykit.exporters.openvino.runner import open_runner

    return open_runner(path, threads)


def runtime() -> Runtime:
    """OpenVINO's CPU plugin, and the precision that floats are computed in."""
    from importlib.metadata import version

    from deploykit.exporters.openvino.library import openvino
    from deploykit.exporters.openvino.runner import PRECISION

    openvino()
    return Runtime(f"openvino {version('openvino')} on the CPU, INFERENCE_PRECISION_HINT={PRECISION}")
