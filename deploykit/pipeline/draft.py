"""Drafts: the file that a network would become on a target, made quickly to be weighed and timed.

Ranges come from two samples, nothing makes good what rounding costs, and nothing is checked: what a file takes and how
long it runs hardly depends on the numbers in it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit import exporters
from deploykit.core.artifact import File
from deploykit.core.data import DataSet
from deploykit.core.precision import Precision, is_quantized, needs_calibration, spec_of
from deploykit.core.progress import status
from deploykit.core.request import Settings
from deploykit.core.target import Target
from deploykit.pipeline import steps

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from deploykit.hub.graph import FloatGraph, Hub

Example = Mapping[str, "NDArray[Any]"]


def stand_in(
    graph: FloatGraph, data: DataSet, target: Target, precision: Precision, keep_float: tuple[str, ...]
) -> Hub:
    """A hub of a precision's numbers by the ranges of two samples, which give scales that fit each other."""
    from deploykit.hub.graph import Hub
    from deploykit.hub.quantize import quantize
    from deploykit.hub.weight_only import quantize_weights

    numbers = spec_of(target.quant, precision)
    if not is_quantized(precision):
        return Hub(graph, numbers)
    if not needs_calibration(precision):
        return quantize_weights(graph, numbers, keep_float, search=False)
    return quantize(graph, steps.calibrate(graph, data.spread(2)), numbers, keep_float=keep_float)


def file_bytes(module: nn.Module, example: Example, settings: Settings, target: Target) -> int:
    """What the most compressed file of a module takes on the device, or on disk where nothing else is known.

    Raises:
        DeploykitError: the target's exporter cannot write the module.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _written(module, example, settings, target, Path(folder)).size(Path(folder))


def caller(module: nn.Module, example: Example, settings: Settings, target: Target) -> Callable[[], object]:
    """What runs one sample through the most compressed file of a module, in the target's runtime here.

    Raises:
        DeploykitError: the target's exporter cannot write the module.
        MissingExtra: the runtime is not installed.
    """
    one = {name: array[:1] for name, array in example.items()}
    with tempfile.TemporaryDirectory() as folder:
        file = _written(module, example, settings, target, Path(folder))
        run = exporters.load(target.exporter).load(Path(folder) / file.path, settings.threads)
    return lambda: run(one)


def _written(module: nn.Module, example: Example, settings: Settings, target: Target, folder: Path) -> File:
    from deploykit.hub.lower import lower

    precision = (settings.precisions or target.precisions)[-1]
    with status("writing a draft of the file"):
        data = DataSet.of(dict(example), origin="the example")
        hub = stand_in(lower(module, example), data, target, precision, settings.keep_float)
        exporter = exporters.load(target.exporter)
        hubs = {precision: replace(hub, samples=dict(example))}
        (file,) = exporter.export(hubs, exporters.unlimited(exporter, target), folder)
    return file
