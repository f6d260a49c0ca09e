"""What the float network computes at the outputs of its products: what a hub's layers are corrected to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from deploykit.calibration.observe import refuse_unfinite
from deploykit.core.data import DataSet
from deploykit.core.progress import track
from deploykit.hub.fitting.activations import Spool
from deploykit.hub.graph import FloatGraph, add_initializer, drop_unused
from deploykit.hub.layers import Layer, MatrixForm
from deploykit.hub.operators import channel_axis
from deploykit.hub.running import append_node, append_reduction, session

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEAST_POSITIONS = 2048


class FloatOutputs:
    """The float network's outputs of some layers, from one pass over the data: the mean of all, and a sample of them.

    Means are taken and samples drawn inside the runtime: the tensors themselves, many times larger, do not leave it.

    Args:
        graph: the float network; what comes after the last of the layers is not computed.
        layers: whose means are wanted; may be none.
        forms: layer output -> matrix form, for those whose outputs are kept at drawn positions.
        data: the samples.
        batch: how many run at once.
        positions: how many per input of a matrix (k), of all samples together, but `LEAST_POSITIONS` at least.
        seed: which.
        known: means per channel, by layer output: they are not taken again.
    """

    def __init__(
        self,
        graph: FloatGraph,
        layers: Sequence[Layer],
        forms: Mapping[str, MatrixForm],
        data: DataSet,
        batch: int,
        positions: int,
        seed: int,
        known: Mapping[str, NDArray[np.float64]] | None = None,
    ) -> None:
        """Runs the network; the values wait in spooled temporary files."""
        self._means = dict(known or {})
        self._seed, self._forms, self._samples = seed, forms, len(data)
        self._order = {layer.y: i for i, layer in enumerate(layers)}
        self._each = {
            name: -(-max(LEAST_POSITIONS, positions * form.inputs_per_output) // len(data))
            for name, form in forms.items()
        }
        self._sums: dict[str, Any] = {name: 0.0 for name in self._order if name not in self._means}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._sizes: list[int] = []
        self._least = graph.batch or 1
        self._spools = {name: Spool() for name in forms}
        if layers:  # making samples is costly
            axes = {layer.y: channel_axis(layer.node.op_type) for layer in layers if layer.y in self._sums}
            self._run(graph, axes, data, batch)
            self._means |= {name: np.asarray(s / self._samples, np.float64) for name, s in self._sums.items()}

    def _run(self, graph: FloatGraph, axes: Mapping[str, int], data: DataSet, batch: int) -> None:
        self._shapes = _shapes(graph, list(self._forms), next(data.batches(self._least)).inputs)
        run = _drawing(graph, axes, self._forms)
        for i, arrays in enumerate(track(data.batches(batch), "float outputs", total=-(-len(data) // batch))):
            self._sizes.append(len(next(iter(arrays.inputs.values()))))
            chosen = {name: self.positions(name, i) for name in self._forms}
            means, drawn = run(arrays.inputs, chosen)
            for name, mean in means.items():
                refuse_unfinite(mean, name, data)
                self._sums[name] += mean * np.float64(self._sizes[i])
            for name, y in drawn.items():
                self._spools[name].add(self._forms[name].outputs(y))

    def mean(self, name: str) -> NDArray[np.float64]:
        """Per channel, over all samples and positions."""
        return self._means[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a layer's output for the smallest batch there can be."""
        return self._shapes[name]

    def positions(self, name: str, batch: int) -> NDArray[np.int64]:
        """Which positions of a layer's output were kept of a batch: one of every stretch of equal length."""
        form = self._forms[name]
        times = 1 if form.images else self._sizes[batch]
        total = form.positions(self._shapes[name]) * times // (1 if form.images else self._least)
        count = min(self._each[name] * times, total)
        random = np.random.default_rng([self._seed, self._order[name], batch])
        return ((np.arange(count) + random.random(count)) * (total / count)).astype(np.int64)

    def samples(self, name: str) -> Iterator[NDArray[np.float32]]:
        """``[g, o, n]`` of every batch."""
        return self._spools[name].batches()

    def close(self) -> None:
        """Removes the temporary files."""
        for spool in self._spools.values():
            spool.file.close()


def _copy(graph: FloatGraph) -> tuple[ir.Model, dict[str, ir.Value]]:
    """A model that may be changed, and its values by name."""
    model = graph.copy()
    return model, {str(v.name): v for node in model.graph for v in node.outputs}


def _session(model: ir.Model, outputs: Sequence[ir.Value]) -> Any:
    model.graph.outputs[:] = outputs
    drop_unused(model.graph)
    return session(model)


def _shapes(graph: FloatGraph, names: Sequence[str], inputs: Mapping[str, NDArray[Any]]) -> dict[str, tuple[int, ...]]:
    """Of some values, for these inputs."""
    if not names:
        return {}
    model, values = _copy(graph)
    shapes = [append_node(model.graph, "Shape", [values[n]], f"{n}.shape", ir.DataType.INT64) for n in names]
    found = _session(model, shapes).run(None, dict(inputs))
    return {name: tuple(shape.tolist()) for name, shape in zip(names, found, strict=True)}


Drawn = tuple["dict[str, NDArray[Any]]", "dict[str, NDArray[Any]]"]


def _drawing(
    graph: FloatGraph, axes: Mapping[str, int], forms: Mapping[str, MatrixForm]
) -> Callable[[Mapping[str, NDArray[Any]], Mapping[str, NDArray[np.int64]]], Drawn]:
    """A function from inputs and positions to means per channel and to values at the positions, by value name.

    Args:
        graph: a float graph.
        axes: value name -> channel axis, for those whose mean is wanted.
        forms: value name -> how positions are counted, for those that are drawn from.
    """
    model, values = _copy(graph)
    g = model.graph
    means = [append_reduction(g, "ReduceMean", values[name], axis) for name, axis in axes.items()]
    drawn = []
    for name, form in forms.items():
        positions = ir.Value(name=f"{name}.positions", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["n"]))
        g.inputs.append(positions)
        kept = [0, 0, -1] if form.images else [-1, form.channels]
        shape = add_initializer(g, f"{name}.flat_shape", np.asarray(kept, np.int64))
        flat = append_node(g, "Reshape", [values[name], shape], f"{name}.flat", ir.DataType.FLOAT)
        axis = ir.AttrInt64("axis", 2 if form.images else 0)
        drawn.append(append_node(g, "Gather", [flat, positions], f"{name}.drawn", ir.DataType.FLOAT, axis))
    running = _session(model, [*means, *drawn])

    def run(inputs: Mapping[str, NDArray[Any]], chosen: Mapping[str, NDArray[np.int64]]) -> Drawn:
        found = running.run(None, {**inputs, **{f"{name}.positions": where for name, where in chosen.items()}})
        return dict(zip(axes, found, strict=False)), dict(zip(forms, found[len(axes) :], strict=True))

    return run
