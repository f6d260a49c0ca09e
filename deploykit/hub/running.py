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

from deploykit.calibration.observe import Summary
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
) -> Callable[[Mapping[str, NDArray[Any]]], dict[str, Summary]]:
    """A function from the model's inputs to a `Summary` of each of the named tensors.

    The reductions are part of the graph, so the tensors themselves stay inside the runtime, which reuses their memory.

    Args:
        model: a float graph; not changed.
        tensors: float values to summarize; inputs are allowed.
        channels: tensor name -> channel axis, for tensors whose per-channel mean is wanted.
        values: whether the tensors themselves are wanted too.
    """
    extended = model.clone()
    graph = extended.graph
    known = {v.name: v for v in [*graph.inputs, *(v for node in graph for v in node.outputs)]}
    outputs: list[ir.Value] = []

    def reduce(operator: str, value: ir.Value, axes: list[int]) -> str:
        name = f"{value.name}.{operator}"
        where = [value, add_initializer(graph, f"{name}.axes", np.asarray(axes, np.int64))]
        node = ir.Node("", operator, where, [ir.AttrInt64("keepdims", 0)], outputs=[ir.Value(name=name)], name=name)
        node.outputs[0].dtype = ir.DataType.FLOAT
        graph.append(node)
        outputs.append(node.outputs[0])
        return name

    made: dict[str, tuple[str, str, str | None]] = {}
    for name in tensors:
        value = known[name]
        rank = len(value.shape) if value.shape is not None else 0
        everything = list(range(rank))
        low, high = reduce("ReduceMin", value, everything), reduce("ReduceMax", value, everything)
        others = [i for i in everything if i != channels.get(name, 0) % max(rank, 1)]
        made[name] = low, high, reduce("ReduceMean", value, others) if name in channels else None
    inputs = {v.name for v in graph.inputs}
    exposed = [n for n in tensors if n not in inputs] if values else []
    graph.outputs[:] = [*outputs, *(known[n] for n in exposed)]
    running = _mapped_session(extended)
    names = [v.name for v in graph.outputs]

    def run(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Summary]:
        found = dict(arrays) | dict(zip(names, running.run(names, dict(arrays)), strict=True))
        return {
            name: Summary(
                float(found[low]), float(found[high]), None if mean is None else found[mean],
                found[name] if values else None,
            )
            for name, (low, high, mean) in made.items()
        }  # fmt: skip

    return run


def _mapped_session(model: ir.Model) -> ort.InferenceSession:
    """A session whose weights came through a temporary file that the runtime mapped: no copies in this process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path, external_data="weights")
        return ort.InferenceSession(str(path), _options(1), providers=["CPUExecutionProvider"])


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return options
