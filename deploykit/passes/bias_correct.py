"""Bias correction: shift every channel back to the mean it had in float.

Rounding weights and activations changes the mean of each output channel; the shift is known from calibration data and
is removed by the bias (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
section 4.2, empirical form). Layers are corrected in order, each on the outputs of the layers corrected before it:

    b_c  +=  E[y_c]  -  E[ (W_q x_q + b)_c ]

E[y_c] was measured on the float network (`Ranges`). A layer is linear, so E[W_q x_q + b] = W_q E[x_q] + b: the layer
runs once, on the mean of its integer inputs. Only the integer inputs are needed sample by sample, and the network
produces them once, in stretches from one linear layer to the next; they wait in spooled temporary files, so memory
does not grow with the number of samples.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir

from deploykit.calibration.observe import channel_mean
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.progress import track
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit
from deploykit.hub.graph import Hub
from deploykit.hub.operators import channel_axis
from deploykit.hub.quantize import BIAS_LIMIT
from deploykit.hub.running import session
from deploykit.hub.slices import Slicer

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCH = 4
IN_MEMORY = 4 << 20
"""Integer activations of one tensor above this many bytes wait on disk."""


@dataclass(frozen=True)
class BiasCorrect:
    """Empirical, sequential bias correction on all calibration samples. Weights and scales do not change."""

    stage: ClassVar[Stage] = "hub"
    needs: ClassVar[tuple[Need, ...]] = ("data",)
    pays_if: ClassVar[tuple[Profit, ...]] = ("int8",)

    def __call__(self, hub: Hub, context: Context) -> Hub:
        """The hub with corrected biases."""
        data = context.need("calibration", "bias_correct")
        assert hub.quantized is not None and hub.ranges is not None
        slicer = Slicer(onnx.load_model_from_string(hub.bytes))
        layers = [n for n in slicer.model.graph.node if _is_correctable(n, slicer, hub.ranges.means)]
        sources = [_integer_input(n, slicer) for n in layers]
        inputs = _IntegerInputs(slicer, sources, data, hub.graph.batch or BATCH)
        with contextlib.closing(inputs):
            for layer in track(layers, "correcting biases"):
                mean_x = inputs.mean(_integer_input(layer, slicer))
                y = _run_layer(slicer, layer, mean_x)
                found = channel_mean(y, channel_axis(layer.op_type))
                _shift_bias(slicer, layer, hub.ranges.means[_float_name(layer, slicer)] - found)
        return replace(hub, quantized=ir.from_proto(slicer.model))


def _is_correctable(node: onnx.NodeProto, slicer: Slicer, means: Mapping[str, Any]) -> bool:
    """A linear layer with an integer input, a bias, and a known float mean."""
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or len(node.input) < 3:
        return False
    known = _float_name(node, slicer) in means
    source = slicer.producer.get(node.input[0])
    return known and source is not None and source.op_type == "DequantizeLinear"


def _float_name(layer: onnx.NodeProto, slicer: Slicer) -> str:
    """The name that a layer's output has in the float graph; quantizing renames the graph's outputs."""
    return str(slicer.renamed.get(layer.output[0], layer.output[0]))


def _integer_input(layer: onnx.NodeProto, slicer: Slicer) -> str:
    return str(slicer.producer[layer.input[0]].input[0])


def _run_layer(slicer: Slicer, layer: onnx.NodeProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The layer's output before its activation, on one (mean) input ``[1, ...]``."""
    model = slicer.cut([layer.output[0]], [layer.input[0]])
    (y,) = session(model, optimize=False).run(None, {layer.input[0]: x})
    return np.asarray(y)


def _shift_bias(slicer: Slicer, layer: onnx.NodeProto, delta: NDArray[np.float64]) -> None:
    dequantizer = slicer.producer.get(layer.input[2])
    if dequantizer is None:  # a float bias
        bias = slicer.array(layer.input[2])
        slicer.set_array(layer.input[2], (bias + delta).astype(bias.dtype))
        return
    name, scale = dequantizer.input[0], slicer.array(dequantizer.input[1]).astype(np.float64)
    steps = slicer.array(name) + np.rint(delta / scale)
    slicer.set_array(name, np.clip(steps, -BIAS_LIMIT, BIAS_LIMIT).astype(np.int32))


@dataclass
class _IntegerInputs:
    """Integer activations at the layers' inputs, computed stretch by stretch and dropped after their last use."""

    slicer: Slicer
    wanted: Sequence[str]
    data: DataSet
    batch: int
    stored: dict[str, _Spool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known: list[str] = []
        self.uses: Counter[str] = Counter()
        for name in dict.fromkeys(self.wanted):
            self.uses.update(self.slicer.boundary([name], known))
            known.append(name)

    def mean(self, name: str) -> NDArray[np.float32]:
        """Mean over all samples of the real values behind an integer tensor, ``[1, ...]``."""
        if name not in self.stored:
            self.stored[name] = self._compute(name)
        quantizer = self.slicer.producer[name]
        scale, zero = (self.slicer.array(i).astype(np.float64) for i in quantizer.input[1:3])
        return ((self.stored[name].mean() - zero) * scale).astype(np.float32)[None]

    def _compute(self, name: str) -> _Spool:
        sources = self.slicer.boundary([name], list(self.stored))
        run = session(self.slicer.cut([name], list(self.stored)))
        spool = _Spool()
        for arrays in self._batches(sources):
            (integers,) = run.run(None, arrays)
            spool.add(integers)
        for source in sources:
            self.uses[source] -= 1
            if self.uses[source] == 0 and source in self.stored:
                self.stored.pop(source).file.close()
        return spool

    def close(self) -> None:
        for spool in self.stored.values():
            spool.file.close()

    def _batches(self, sources: Sequence[str]) -> Iterator[dict[str, NDArray[Any]]]:
        kept = {s: self.stored[s].batches() for s in sources if s in self.stored}
        fresh = [s for s in sources if s not in self.stored]
        samples = self.data.batches(self.batch) if fresh else None  # making samples is costly: only where needed
        for _ in range(-(-len(self.data) // self.batch)):
            found = {s: next(b) for s, b in kept.items()}
            yield found | ({s: array for s, array in next(samples).inputs.items() if s in fresh} if samples else {})


class _Spool:
    """Batches of one tensor, in memory while they are few and in a temporary file when they are many."""

    def __init__(self) -> None:
        self.file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 (closed by its owner)
        self.shapes: list[tuple[int, ...]] = []
        self.dtype: Any = None
        self.sum: Any = 0

    def add(self, array: NDArray[Any]) -> None:
        self.file.write(np.ascontiguousarray(array).tobytes())
        self.shapes.append(array.shape)
        self.dtype = array.dtype
        self.sum = self.sum + array.sum(axis=0, dtype=np.int32)

    def mean(self) -> NDArray[np.float64]:
        return np.asarray(self.sum, np.float64) / sum(shape[0] for shape in self.shapes)

    def batches(self) -> Iterator[NDArray[Any]]:
        self.file.seek(0)
        for shape in self.shapes:
            raw = self.file.read(int(np.prod(shape)) * self.dtype.itemsize)
            yield np.frombuffer(raw, self.dtype).reshape(shape)
