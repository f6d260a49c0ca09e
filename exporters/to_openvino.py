"""OpenVINO IR (``model.PRECISION.xml`` with its weights in ``.bin``) for Intel's CPUs, GPUs and NPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from deploykit.core.artifact import File, Runner, Runtime
from deploykit.core.errors import DeploykitError
from deploykit.core.target import Precision, Target
from deploykit.hub.graph import Hub


def export(hub: Hub, target: Target, out_dir: Path, precisions: Sequence[Precision]) -> tuple[File, ...]:
    """Writes ``model.PRECISION.xml`` and ``model.PRECISION.bin`` for each precision.

    Args:
        hub: ``hub.graph`` gives the float files, ``hub.quantized`` the int8 file.
        target: its options say the device and the batch.
        out_dir: an existing folder.
        precisions: of fp32, fp16 (float16 weights) and int8.

    Raises:
        DeploykitError: a precision or option this exporter does not know, operators that OpenVINO does not have.
        MissingExtra: OpenVINO is not installed.
    """
    from deploykit.exporters.openvino.convert import convert, ports
    from deploykit.exporters.openvino.kernels import judge, kernels
    from deploykit.exporters.openvino.library import openvino
    from deploykit.exporters.openvino.options import options
    from deploykit.exporters.openvino.runner import compile_for_cpu, read_file

    settings = options(target)
    files = []
    for precision in precisions:
        if precision not in ("fp32", "fp16", "int8"):
            raise DeploykitError(
                f"target {target.name}: OpenVINO files are written in fp32, fp16, int8, not {precision}"
            )
        if precision == "int8" and hub.quantized is None:
            raise DeploykitError(f"target {target.name}: int8 needs calibration data")
        model = hub.quantized if precision == "int8" else hub.graph.model
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
        if precision == "int8":
            counts, islands = judge(hub.decisions, kernels(compile_for_cpu(read_file(path), path, threads=1)))
            file = replace(file, quantized=counts, islands=islands)
        files.append(file)
    return tuple(files)


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
