"""Runs graphs in ONNX Runtime on the CPU, for the project's own use; exporters have their runtimes."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from deploykit.calibration.observe import Extremes, Seen
from deploykit.hub.graph import add_initializer, drop_unused, serialize
from deploykit.hub.operators import is_float, is_nonnegative
from deploykit.hub.widen import widened

if TYPE_CHECKING:
    from numpy.typing import NDArray

Run = Callable[[Mapping[str, "NDArray[Any]"]], "dict[str, NDArray[Any]]"]


MAPPED = 1 << 26
"""Weights of more bytes are not copied into a session: they are mapped from a file, and not laid out anew.
Counted in float32, which integers become."""


def session(
    model: ir.Model | onnx.ModelProto | bytes | str, threads: int = 1, optimize: bool = True
) -> ort.InferenceSession:
    """A session on the CPU; without optimization the Q/DQ nodes run in float, one by one.

    Args:
        model: a graph, which may be large; a model in memory (its activations of 4 bits come and go as 8), serialized,
            or the path of a file.
        threads: of the runtime; 1 makes results independent of the machine's number of cores.
        optimize: fuse operators (Q/DQ groups become integer kernels).
    """
    if isinstance(model, ir.Model):
        if is_large(model):
            return _mapped_session(model, threads, optimize)
        model = serialize(model)
    options = _options(threads, optimize)
    data = widened(model).SerializeToString() if isinstance(model, onnx.ModelProto) else model
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def exposing(model: ir.Model, tensors: Sequence[str]) -> Run:
    """A function from the model's inputs to the named tensors, inner ones and inputs included."""
    inputs = {v.name for v in model.graph.inputs}
    wanted = [t for t in tensors if t not in inputs]
    exposed = model.clone()
    values = {v.name: v for node in exposed.graph for v in node.outputs}
    exposed.graph.outputs[:] = [values[name] for name in wanted]
    drop_unused(exposed.graph)
    running = _mapped_session(exposed)

    def run(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        found = dict(zip(wanted, running.run(wanted, dict(arrays)), strict=True)) if wanted else {}
        return found | {name: arrays[name] for name in tensors if name in inputs}

    return run


def summarizing(
    model: ir.Model, tensors: Sequence[str], channels: Mapping[str, int], values: bool
) -> Callable[[Mapping[str, NDArray[Any]], bool], Seen]:
    """A function from the model's inputs to the extremes of some tensors and, if asked, the channel means of others.

    The reductions are part of the graph, so the tensors themselves stay inside the runtime, which reuses their memory.
    Means are of what stands before an activation and keep the runtime from fusing it, so there is a graph without them.

    Args:
        model: a float graph; not changed.
        tensors: float values whose extremes are wanted; inputs are allowed.
        channels: value name -> channel axis, for those whose per-channel mean is wanted.
        values: whether the tensors themselves are wanted too.
    """

    @functools.cache
    def summary(means: bool) -> Callable[[Mapping[str, NDArray[Any]]], Seen]:
        return _summary(model, tensors, channels if means else {}, values)

    return lambda arrays, means: summary(means)(arrays)


def _summary(
    model: ir.Model, tensors: Sequence[str], channels: Mapping[str, int], values: bool
) -> Callable[[Mapping[str, NDArray[Any]]], Seen]:
    extended = model.clone()
    graph = extended.graph
    known = {v.name: v for v in [*graph.inputs, *(v for node in graph for v in node.outputs)]}
    reduced: list[ir.Value] = []

    def reduce(operator: str, value: ir.Value, but: int | None = None) -> str:
        reduced.append(append_reduction(graph, operator, value, but))
        return str(reduced[-1].name)

    def pooled(value: ir.Value) -> ir.Value:
        """The largest of every channel of an image: pooling reads it as convolutions wrote it, in blocks of channels,
        where a reduction has it laid out anew first."""
        if value.is_graph_input() or value.shape is None or len(value.shape) != 4:
            return value
        made = append_node(graph, "GlobalMaxPool", [value], f"{value.name}.pooled", ir.DataType.FLOAT)
        made.shape = ir.Shape([*value.shape[:2], 1, 1])
        return made

    # every range includes 0, so the least of what is never negative need not be looked for
    low = {name: reduce("ReduceMin", known[name]) for name in tensors if not is_nonnegative(known[name])}
    high = {name: reduce("ReduceMax", pooled(known[name])) for name in tensors}
    total = {str(v.name): reduce("ReduceSum", v) for v in [*graph.inputs, *graph.outputs] if is_float(v)}
    mean = {name: reduce("ReduceMean", known[name], axis) for name, axis in channels.items()}
    inner = [n for n in tensors if not known[n].is_graph_input()] if values else []
    graph.outputs[:] = [*reduced, *(known[n] for n in inner)]
    drop_unused(graph)
    names = [v.name for v in graph.outputs]
    running = _mapped_session(extended)

    def run(arrays: Mapping[str, NDArray[Any]]) -> Seen:
        computed = running.run(names, dict(arrays)) if names else []
        found = dict(arrays) | dict(zip(names, computed, strict=True))
        extremes = {
            n: Extremes(
                float(found[low[n]]) if n in low else 0.0, float(found[high[n]]), found[n] if values else None
            )
            for n in tensors
        }  # fmt: skip
        totals = {name: float(found[reduction]) for name, reduction in total.items()}
        return Seen(extremes, {n: found[reduction] for n, reduction in mean.items()}, totals)

    return run


def append_reduction(graph: ir.Graph, operator: str, value: ir.Value, but: int | None = None) -> ir.Value:
    """A reduction of a value over all its axes, or all but one, at the end of a graph."""
    rank = len(value.shape) if value.shape is not None else 0
    axes = np.asarray([i for i in range(rank) if but is None or i != but % rank], np.int64)
    name = f"{value.name}.{operator}"
    inputs = [value, add_initializer(graph, f"{name}.axes", axes)]
    return append_node(graph, operator, inputs, name, ir.DataType.FLOAT, ir.AttrInt64("keepdims", 0))


def append_node(
    graph: ir.Graph, operator: str, inputs: Sequence[ir.Value], name: str, dtype: ir.DataType, *attributes: ir.Attr
) -> ir.Value:
    """The only output, called ``name``, of a new node at the end of a graph."""
    node = ir.Node("", operator, inputs, attributes, outputs=[ir.Value(name=name)], name=name)
    node.outputs[0].dtype = dtype
    graph.append(node)
    return node.outputs[0]


def _mapped_session(model: ir.Model, threads: int = 1, optimize: bool = True) -> ort.InferenceSession:
    """A session in little memory: weights come through a temporary file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path, external_data="weights")
        return lean_session(path, threads, optimize, large=is_large(model))


def is_large(model: ir.Model) -> bool:
    """Whether its weights, or the floats that they become, should not be copied."""
    held = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    return 4 * sum(t.size for t in held) > MAPPED


def lean_session(path: Path, threads: int = 1, optimize: bool = True, large: bool = True) -> ort.InferenceSession:
    """A file in little memory: nothing is held back for later runs; ``large``: external weights stay as they are."""
    options = _options(threads, optimize)
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    if large:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _options(threads: int, optimize: bool = True) -> ort.SessionOptions:
    options = ort.SessionOptions()
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED  # weights become floats when they are needed
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return options
