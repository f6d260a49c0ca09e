"""The float network behind one of its layers: what it answers when that layer's weight, or a tensor, is changed.

Places are asked for in order. The samples run through the network once, up to one place after another; only what lies
behind a place runs again for every change there. What is read there waits in spooled temporary files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from deploykit.calibration.observe import channel_mean
from deploykit.core.data import DataSet
from deploykit.hub.fitting.activations import Spool
from deploykit.hub.graph import FloatGraph
from deploykit.hub.layers import as_entered
from deploykit.hub.operators import channel_axis
from deploykit.hub.running import session
from deploykit.hub.slices import Slicer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = dict[str, NDArray[Any]]

BATCH = 4


class Tail:
    """A float network on some samples, entered at one product after another.

    Args:
        graph: not changed.
        data: the samples.
    """

    def __init__(self, graph: FloatGraph, data: DataSet) -> None:
        """Runs the network, for its answers."""
        self._slicer = Slicer(onnx.load_model_from_string(graph.bytes))
        self._nodes = list(self._slicer.model.graph.node)
        self._written = dict.fromkeys(self._slicer.inputs, -1) | {
            name: i for i, node in enumerate(self._nodes) for name in node.output
        }
        """Value -> position of the node that writes it."""
        self._outputs = [o.name for o in self._slicer.model.graph.output]
        self._front = {name: Spool() for name in self._slicer.inputs}
        """Values that are written in front of the present layer and read from there on."""
        for batch in data.batches(graph.batch or BATCH):
            for name, spool in self._front.items():
                spool.add(batch.inputs[name])
        self._answers = {name: Spool() for name in self._outputs}
        for answers in self._run(self._outputs):
            for name, z in answers.items():
                self._answers[name].add(z)

    def moved(self, layer: str, y: str, weight: str, error: NDArray[np.float32]) -> Iterator[tuple[Arrays, Arrays]]:
        """What is answered when ``error`` is added to a weight, and what without: batch by batch, by output name.

        The product's output keeps its mean in every channel: its bias would see to that.

        Args:
            layer: the product; no place in front of it can be asked for any more.
            y: its output, bias included.
            weight: initializer of its weight.
            error: of the weight's shape.
        """
        position = next(i for i, node in enumerate(self._nodes) if node.name == layer)
        self._advance(position)
        x = self._nodes[position].input[0]
        known = [y, *self._front]
        behind = [name for name in self._outputs if self._written[name] >= position and name != y]
        exact = self._slicer.array(weight)
        piece = self._slicer.cut([y], [x])
        product = session(piece)
        self._slicer.set_array(weight, exact + error)  # all that read it from here on see it
        changed = session(self._slicer.cut([y], [x]))
        tail = session(self._slicer.cut(behind, known)) if behind else None
        read = self._slicer.boundary(behind, known)
        self._slicer.set_array(weight, exact)

        axis = channel_axis(self._nodes[position].op_type)
        mean = as_entered(self._mean(x, images=axis == 1), piece)
        before, after = (channel_mean(p.run([y], {x: mean})[0], axis) for p in (product, changed))
        for values, z in zip(self._values({x, *read} - {y}), _together(self._answers), strict=True):
            (raw,) = changed.run([y], {x: values[x]})
            values[y] = raw + (before - after).reshape([-1 if i == axis % raw.ndim else 1 for i in range(raw.ndim)])
            found = tail.run(behind, {name: values[name] for name in read}) if tail is not None else []
            own = {y: values[y]} if y in self._outputs else {}
            yield z | own | dict(zip(behind, found, strict=True)), z

    def replaced(self, tensor: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Iterator[tuple[Arrays, Arrays]]:
        """As `moved`, where a tensor (an input, too) becomes ``change`` of it for all that read it.

        None in front of it can be asked for any more.
        """
        position = self._written[tensor] + 1
        self._advance(position)
        behind = [name for name in self._outputs if self._written[name] >= position]
        tail = session(self._slicer.cut(behind, self._front)) if behind else None
        read = self._slicer.boundary(behind, self._front)
        fed = [{tensor: z[tensor]} for z in _together(self._answers)] if tensor not in self._front else None
        entering = self._values({tensor, *read}) if fed is None else iter(fed)
        for values, z in zip(entering, _together(self._answers), strict=True):
            values[tensor] = change(values[tensor])
            found = tail.run(behind, {name: values[name] for name in read}) if tail is not None else []
            own = {tensor: values[tensor]} if tensor in self._outputs else {}
            yield z | own | dict(zip(behind, found, strict=True)), z

    def close(self) -> None:
        """Removes the temporary files."""
        for spool in (*self._front.values(), *self._answers.values()):
            spool.file.close()

    def _advance(self, position: int) -> None:
        """Runs the samples up to a node, and forgets what only nodes in front of it read."""
        read = dict.fromkeys(name for node in self._nodes[position:] for name in node.input)
        wanted = [name for name in read if self._written.get(name, position) < position]
        fresh = {name: Spool() for name in wanted if name not in self._front}
        for values in self._run(list(fresh)):
            for name, value in values.items():
                fresh[name].add(value)
        for name in self._front.keys() - set(wanted):
            self._front.pop(name).file.close()
        self._front |= fresh

    def _run(self, wanted: Sequence[str]) -> Iterator[Arrays]:
        """Some values of every batch, from those in front."""
        if not wanted:
            return
        run = session(self._slicer.cut(wanted, self._front))
        for values in self._values(self._slicer.boundary(wanted, self._front)):
            yield dict(zip(wanted, run.run(wanted, values), strict=True))

    def _values(self, names: Sequence[str] | set[str]) -> Iterator[Arrays]:
        return _together({name: self._front[name] for name in sorted(names)})

    def _mean(self, x: str, images: bool) -> NDArray[np.float32]:
        """Of a value in front, over the samples: of images ``[1, ...]``, of others ``[features]``."""
        batches = self._front[x].batches()
        each = batches if images else (batch.reshape(-1, batch.shape[-1]) for batch in batches)
        sums = [(batch.sum(axis=0, dtype=np.float64), len(batch)) for batch in each]
        mean = np.asarray(sum(s for s, _ in sums) / sum(n for _, n in sums), np.float32)
        return mean[None] if images else mean


def _together(spools: Mapping[str, Spool]) -> Iterator[Arrays]:
    """Batch by batch, by name."""
    for batch in zip(*(spool.batches() for spool in spools.values()), strict=True):
        yield dict(zip(spools, batch, strict=True))
