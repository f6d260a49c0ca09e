"""One streaming pass of the float graph over the calibration data in ONNX Runtime.

Memory holds one sample's tensors and one histogram per tensor, whatever the number of samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.progress import track
from deploykit.core.ranges import Histogram, Ranges, Stats

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

BINS = 2048


def observe(
    model: onnx.ModelProto,
    graph_hash: str,
    tensors: Sequence[str],
    channels: Mapping[str, int],
    data: DataSet,
    histograms: bool = False,
) -> Ranges:
    """Runs the data through the model, one sample at a time, and keeps statistics of the named tensors.

    Args:
        model: float ONNX with at most a free batch dimension.
        graph_hash: identifies the model in the result.
        tensors: float32 values to observe; graph inputs are allowed.
        channels: tensor name -> channel axis, for tensors whose per-channel mean is kept too.
        data: inputs by the model's input names.
        histograms: also keep `BINS`-bin histograms (needed by every threshold but min-max and moving average).

    Raises:
        DeploykitError: a tensor is constant zero or not finite on all the data's samples, or the data does not fit.
    """
    if len(data) == 0:
        raise DeploykitError(f"{data.origin}: no calibration samples")
    run = _exposing(model, tensors)
    states = {name: _State(histograms, channels.get(name)) for name in tensors}
    for batch in track(data.batches(1), "calibrating", total=len(data)):
        for name, array in run(batch.inputs).items():
            states[name].add(array)
    for name, state in states.items():
        if not (np.isfinite(state.low) and np.isfinite(state.high)):
            raise DeploykitError(f"{data.origin}: tensor '{name}' becomes NaN or infinite on the calibration data")
    return Ranges(graph_hash, data.hash, len(data), {name: state.stats() for name, state in states.items()})


def _exposing(model: onnx.ModelProto, tensors: Sequence[str]) -> Any:
    """A function from inputs to the named tensors."""
    import onnx
    import onnxruntime as ort

    proto = onnx.ModelProto()
    proto.CopyFrom(model)
    inputs = {i.name for i in proto.graph.input}
    wanted = [t for t in tensors if t not in inputs]
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(t, onnx.TensorProto.FLOAT, None) for t in wanted)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # results must not depend on the number of cores
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    seen = [t for t in tensors if t in inputs]

    def run(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        found = dict(zip(wanted, session.run(wanted, dict(arrays)), strict=True))
        return found | {name: arrays[name] for name in seen}

    return run


class _State:
    """Running statistics of one tensor."""

    def __init__(self, histogram: bool, channel_axis: int | None) -> None:
        self.low, self.high = np.inf, -np.inf
        self.sum_low, self.sum_high, self.samples = 0.0, 0.0, 0
        self.axis = channel_axis
        self.sum: NDArray[np.float64] | None = None
        self.positions = 0
        self.histogram = StreamingHistogram(BINS) if histogram else None

    def add(self, array: NDArray[Any]) -> None:
        low, high = float(array.min()), float(array.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.sum_low, self.sum_high, self.samples = self.sum_low + low, self.sum_high + high, self.samples + 1
        if self.axis is not None:
            count = array.size // array.shape[self.axis]
            total = channel_mean(array, self.axis).astype(np.float64) * count
            self.sum = total if self.sum is None else self.sum + total
            self.positions += count
        if self.histogram is not None and np.isfinite(low) and np.isfinite(high):
            self.histogram.add(array, low, high)

    def stats(self) -> Stats:
        mean = None if self.sum is None else self.sum / self.positions
        histogram = None
        if self.histogram is not None:
            histogram = Histogram(self.histogram.limit, self.histogram.counts)
        return Stats(
            self.low, self.high, self.sum_low / self.samples, self.sum_high / self.samples, mean, histogram
        )  # fmt: skip


def channel_mean(array: NDArray[Any], axis: int) -> NDArray[Any]:
    """Mean per channel, over all other axes.

    Trailing axes are reduced first: numpy sums contiguous values pairwise, which is fast and exact enough in float32.
    """
    axis %= array.ndim
    flat = array.reshape(-1, array.shape[axis], int(np.prod(array.shape[axis + 1 :])))
    return np.asarray(flat.mean(axis=2).mean(axis=0))


class StreamingHistogram:
    """A histogram of ``[-limit, limit)`` with a fixed number of bins; the limit doubles when a value falls outside.

    Doubling adds neighbouring bins pairwise, so nothing is lost but resolution, and memory never grows.
    """

    def __init__(self, bins: int) -> None:
        """An empty histogram; ``bins`` must be a multiple of 4."""
        self.limit = 0.0
        self.counts = np.zeros(bins, np.int64)

    def add(self, array: NDArray[Any], low: float, high: float) -> None:
        """Counts the values of ``array``, whose smallest and largest are given."""
        reach = max(-low, high, 1e-12)
        if self.limit == 0.0:
            self.limit = float(2.0 ** np.ceil(np.log2(reach)))
        bins = len(self.counts)
        while self.limit <= reach:
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.pad(pairs, bins // 4)
            self.limit *= 2.0
        index = (array.reshape(-1) * np.float32(bins / 2 / self.limit) + np.float32(bins / 2)).astype(np.int32)
        self.counts += np.bincount(np.clip(index, 0, bins - 1), minlength=bins)
