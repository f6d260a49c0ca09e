"""Runs graphs in ONNX Runtime on the CPU, for the project's own use; exporters have their runtimes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from deploykit.calibration.observe import Extremes, Seen
from deploykit.hub.graph import add_initializer

if TYPE_CHECKING:
    from numpy.typing import NDArray

Run = Callable[[Mapping[str, "NDArray[Any]"]], "dict[str, NDArray[Any]]"]


def session(model: onnx.ModelProto | bytes | str, threads: int = 1, optimize: bool = True) -> ort.InferenceSession:
    """A session on the CPU; without optimization the Q/DQ nodes run in float, one by one.

    Args:
        model: in memory, or the path of a file.
        threads: of the runtime; 1 makes results independent of the machine's number of cores.
        optimize: fuse operators (Q/DQ groups become integer kernels).
    """
    options = _options(threads)
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def exposing(model: ir.Model, tensors: Sequence[str]) -> Run:
    """A function from the model's inputs to the named tensors, inner ones and inputs included."""
    inputs = {v.name for v in model.graph.inputs}
    wanted = [t for t in tensors if t not in inputs]
    exposed = model.clone()
    values = {v.name: v for node in exposed.graph for v in node.outputs}
    exposed.graph.outputs[:] = [values[name] for name in wanted]
    running = _mapped_session(exposed)

    def run(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        found = dict(zip(wanted, running.run(wanted, dict(arrays)), strict=True)) if wanted else {}
        return found | {name: arrays[name] for name in tensors if name in inputs}

    return run


def summarizing(
    model: ir.Model, tensors: Sequence[str], channels: Mapping[str, int], values: bool
) -> Callable[[Mapping[str, NDArray[Any]]], Seen]:
    """A function from the model's inputs to the extremes of some tensors and the channel means of others.

    The reductions are part of the graph, so the tensors themselves stay inside the runtime, which reuses their memory.

    Args:
        model: a float graph; not changed.
        tensors: float values whose extremes are wanted; inputs are allowed.
        channels: value name -> channel axis, for those whose per-channel mean is wanted.
        values: whether the tensors themselves are wanted too.
    """
    extended = model.clone()
    graph = extended.graph
    known = {v.name: v for v in [*graph.inputs, *(v for node in graph for v in node.outputs)]}
    reduced: list[ir.Value] = []

    def reduce(operator: str, value: ir.Value, axes: list[int]) -> str:
        name = f"{value.name}.{operator}"
        where = [value, add_initializer(graph, f"{name}.axes", np.asarray(axes, np.int64))]
        node = ir.Node("", operator, where, [ir.AttrInt64("keepdims", 0)], outputs=[ir.Value(name=name)], name=name)
        node.outputs[0].dtype = ir.DataType.FLOAT
        graph.append(node)
        reduced.append(node.outputs[0])
        return name

    low = {name: reduce("ReduceMin", known[name], _axes(known[name])) for name in tensors}
    high = {name: reduce("ReduceMax", known[name], _axes(known[name])) for name in tensors}
    mean = {name: reduce("ReduceMean", known[name], _axes(known[name], but=axis)) for name, axis in channels.items()}
    inner = [n for n in tensors if not known[n].is_graph_input()] if values else []
    graph.outputs[:] = [*reduced, *(known[n] for n in inner)]
    names = [v.name for v in graph.outputs]
    running = _mapped_session(extended)

    def run(arrays: Mapping[str, NDArray[Any]]) -> Seen:
        computed = running.run(names, dict(arrays)) if names else []
        found = dict(arrays) | dict(zip(names, computed, strict=True))
        extremes = {
            n: Extremes(float(found[low[n]]), float(found[high[n]]), found[n] if values else None) for n in tensors
        }
        return Seen(extremes, {n: found[reduction] for n, reduction in mean.items()})

    return run


def _axes(value: ir.Value, but: int | None = None) -> list[int]:
    """All axes of a value, but one."""
    rank = len(value.shape) if value.shape is not None else 0
    return [i for i in range(rank) if but is None or i != but % rank]


def _mapped_session(model: ir.Model) -> ort.InferenceSession:
    """A session in little memory: weights come through a temporary file, and nothing is held back for later runs."""
    options = _options(1)
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path, external_data="weights")
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return options
