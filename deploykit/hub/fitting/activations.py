"""Activations at the inputs of a hub's layers, for steps that go through it layer by layer.

A step changes layer after layer, each on what the layers changed before it make of the data. The network runs over the
samples once, in stretches from one wanted tensor to the next. What a stretch produced waits in spooled temporary files
until its last reader was served, so memory does not grow with the number of samples.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.data import DataSet
from deploykit.hub.running import session
from deploykit.hub.slices import Slicer

if TYPE_CHECKING:
    from numpy.typing import NDArray

IN_MEMORY = 1 << 20
"""A tensor's activations above this many bytes wait on disk."""


class Activations:
    """The values of some tensors on all samples.

    Args:
        slicer: of the model; weights and biases that were changed by then are seen by later stretches.
        wanted: inner tensors in the order in which they will be asked for; repeated ones are kept.
        data: the samples.
        batch: how many run at once.
        images: those whose first axis counts samples, and whose mean is wanted position by position, as convolutions
            read it. Of others the last axis counts features; samples may be on any.
    """

    def __init__(
        self, slicer: Slicer, wanted: Sequence[str], data: DataSet, batch: int = 1, images: Collection[str] = ()
    ) -> None:
        """Nothing is computed yet."""
        self.slicer, self.data, self.batch, self._images = slicer, data, batch, frozenset(images)
        self._stored: dict[str, Spool] = {}
        self._means: dict[str, NDArray[np.float64]] = {}
        self._uses: Counter[str] = Counter()
        known: list[str] = []
        for name in dict.fromkeys(wanted):
            self._uses.update(slicer.boundary([name], known))
            known.append(name)

    def mean(self, name: str) -> NDArray[np.float32]:
        """Mean over all samples of the real values of a tensor, or of those behind an integer one.

        Of images ``[1, ...]``, of others ``[features]``.
        """
        self._spool(name)
        scale, zero = self.parameters(name)
        mean = ((self._means[name] - zero) * scale).astype(np.float32)
        return mean[None] if name in self._images else mean

    def batches(self, name: str) -> Iterator[NDArray[Any]]:
        """A tensor, ``[batch, ...]``, in the order of the data."""
        return self._spool(name).batches()

    def named(self, names: Sequence[str]) -> Iterator[dict[str, NDArray[Any]]]:
        """Several tensors, graph inputs among them, batch by batch; those that others still wait for are there."""
        for name in names:
            if name not in self.slicer.inputs:
                self._spool(name)
        return self._inputs(names)

    def close(self) -> None:
        """Removes the temporary files."""
        for spool in self._stored.values():
            spool.file.close()

    def parameters(self, name: str) -> tuple[float, float]:
        """Scale and zero point of an integer tensor; 1 and 0 of real values."""
        if self._written_by(name) != "QuantizeLinear":
            return 1.0, 0.0
        scale, zero = (float(self.slicer.array(i)) for i in self.slicer.producer[name].input[1:3])
        return scale, zero

    def _written_by(self, name: str) -> str:
        """Operator that a tensor comes from; empty for graph inputs."""
        return "" if name in self.slicer.inputs else str(self.slicer.producer[name].op_type)

    def _spool(self, name: str) -> Spool:
        if name not in self._stored:
            self._stored[name] = self._compute(name)
        return self._stored[name]

    def _compute(self, name: str) -> Spool:
        sources = self.slicer.boundary([name], list(self._stored))
        # the optimizer takes float8 for integers that end at 0, and drops a Relu in front of them
        is_float8 = self._written_by(name) == "DequantizeLinear"
        is_input = name in self.slicer.inputs
        run = None if is_input else session(self.slicer.cut([name], list(self._stored)), optimize=not is_float8)
        spool, total, rows = Spool(), np.zeros((), np.float64), 0
        for arrays in self._inputs(sources):
            (array,) = [arrays[name]] if run is None else run.run(None, arrays)
            spool.add(array)
            each = array if name in self._images else array.reshape(-1, array.shape[-1])
            total = total + each.sum(axis=0, dtype=np.int32 if array.dtype.kind in "iu" else np.float64)
            rows += len(each)
        self._means[name] = total / rows
        for source in sources:
            self._uses[source] -= 1
            if self._uses[source] == 0 and source in self._stored:
                self._stored.pop(source).file.close()
        return spool

    def _inputs(self, sources: Sequence[str]) -> Iterator[dict[str, NDArray[Any]]]:
        kept = {s: self._stored[s].batches() for s in sources if s in self._stored}
        fresh = [s for s in sources if s not in self._stored]
        samples = self.data.batches(self.batch) if fresh else None  # making samples is costly: only where needed
        for _ in range(-(-len(self.data) // self.batch)):
            found = {s: next(b) for s, b in kept.items()}
            yield found | ({s: array for s, array in next(samples).inputs.items() if s in fresh} if samples else {})


class Spool:
    """Batches of one tensor, in memory while they are few and in a temporary file when they are many."""

    def __init__(self) -> None:
        """Empty."""
        self.file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 (closed by its owner)
        self._shapes: list[tuple[int, ...]] = []
        self._dtype: Any = None

    def add(self, array: NDArray[Any]) -> None:
        """The next batch ``[n, ...]``."""
        self.file.write(np.ascontiguousarray(array).tobytes())
        self._shapes.append(array.shape)
        self._dtype = array.dtype

    def batches(self) -> Iterator[NDArray[Any]]:
        """As they were added."""
        self.file.seek(0)
        for shape in self._shapes:
            raw = self.file.read(int(np.prod(shape)) * self._dtype.itemsize)
            yield np.frombuffer(raw, self._dtype).reshape(shape)
