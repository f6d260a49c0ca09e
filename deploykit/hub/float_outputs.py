"""What the float network computes at the outputs of its products: what a hub's layers are corrected to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.calibration.observe import channel_mean, refuse_unfinite
from deploykit.core.data import DataSet
from deploykit.core.progress import track
from deploykit.hub.activations import Spool
from deploykit.hub.graph import FloatGraph
from deploykit.hub.layers import Layer, MatrixForm
from deploykit.hub.operators import channel_axis
from deploykit.hub.running import exposing

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEAST_POSITIONS = 4096


class FloatOutputs:
    """The float network's outputs of some layers, from one pass over the data: the mean of all, and a sample of them.

    Args:
        graph: the float network.
        layers: whose means are wanted.
        forms: layer output -> matrix form, for those whose outputs are kept at drawn positions.
        data: the samples.
        positions: how many per input of a matrix (k), of all samples together, but `LEAST_POSITIONS` at least.
        seed: which.
    """

    def __init__(
        self,
        graph: FloatGraph,
        layers: Sequence[Layer],
        forms: Mapping[str, MatrixForm],
        data: DataSet,
        positions: int,
        seed: int,
    ) -> None:
        """Runs the network; the values wait in spooled temporary files."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._seed, self._forms = seed, forms
        self._each = {
            name: -(-max(LEAST_POSITIONS, positions * form.inputs_per_output) // len(data))
            for name, form in forms.items()
        }
        self._order = {layer.y: i for i, layer in enumerate(layers)}
        self._sums: dict[str, Any] = dict.fromkeys(self._order, 0.0)
        self._samples = len(data)
        self._spools = {name: Spool() for name in forms}
        axes = {layer.y: channel_axis(layer.node.op_type) for layer in layers}
        run = exposing(graph.model, list(self._order))
        for i, batch in enumerate(track(data.batches(1), "float outputs", total=len(data))):
            for name, y in run(batch.inputs).items():
                refuse_unfinite(y, name, data)
                self.shapes[name] = y.shape
                self._sums[name] += channel_mean(y, axes[name])
                if name in forms:
                    self._spools[name].add(forms[name].outputs(y, self.positions(name, i)))

    def mean(self, name: str) -> NDArray[np.float64]:
        """Per channel, over all samples and positions."""
        return np.asarray(self._sums[name] / self._samples, np.float64)

    def positions(self, name: str, sample: int) -> NDArray[np.int64]:
        """Which positions of a layer's output were kept of a sample."""
        total = self._forms[name].positions(self.shapes[name])
        random = np.random.default_rng([self._seed, self._order[name], sample])
        return np.sort(random.choice(total, min(self._each[name], total), replace=False))

    def samples(self, name: str) -> Iterator[NDArray[np.float32]]:
        """``[g, o, n]`` of every sample."""
        return self._spools[name].batches()

    def close(self) -> None:
        """Removes the temporary files."""
        for spool in self._spools.values():
            spool.file.close()
