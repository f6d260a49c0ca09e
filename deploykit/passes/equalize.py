"""Cross-layer equalization: scale channels down in one layer and up in the next, so that their weight ranges agree.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1. For two
layers with a positively homogeneous function f between them (ReLU, or nothing), W2 f(W1 x + b1) does not change under

    W1_i -> W1_i / s_i,   b1_i -> b1_i / s_i,   W2_:i -> W2_:i s_i,      s_i = sqrt(r1_i / r2_i)

with r1_i, r2_i the largest magnitudes of output channel i of the first and input channel i of the second layer; both
become sqrt(r1_i r2_i). Pairs are swept until the scales settle.

ReLU6 (any Clip from 0) is not homogeneous. A channel may still be scaled there while, on all calibration data, it
stays below the limit before and after: s_i >= largest activation_i / limit. Channels that reach the limit are left
alone. Without calibration data such pairs are skipped.

When it must not act: the first layer's output is read by anyone else, or is an output of the graph; grouped
convolutions that are not depthwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.progress import track
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit
from deploykit.hub.graph import FloatGraph, attribute, constant
from deploykit.hub.operators import weight_axis
from deploykit.hub.running import exposing

if TYPE_CHECKING:
    from numpy.typing import NDArray

SWEEPS = 30
SETTLED = 1e-3


@dataclass(frozen=True)
class Equalize:
    """Evens out weight ranges between neighbouring layers; the float network computes the same."""

    stage: ClassVar[Stage] = "graph"
    needs: ClassVar[tuple[Need, ...]] = ()
    pays_if: ClassVar[tuple[Profit, ...]] = ("int8", "int4")

    def __call__(self, graph: FloatGraph, context: Context) -> FloatGraph:
        """The equalized graph."""
        model = graph.copy()
        pairs = list(_pairs(model.graph))
        clipped = [p.clip.outputs[0].name or "" for p in pairs if p.clip is not None]
        reached: dict[str, NDArray[np.float32]] = {}
        if clipped and "calibration" in context.data:
            reached = _channel_maxima(graph, clipped, context.data["calibration"])
        arrays = {name: np.array(constant(v), np.float64) for name, v in model.graph.initializers.items()}
        floors = {id(p): _floor(p, reached) for p in pairs}
        cumulative = {key: np.ones_like(floor) for key, floor in floors.items() if floor is not None}
        for _ in range(SWEEPS):
            change = 0.0
            for pair in pairs:
                floor = floors[id(pair)]
                if floor is None:
                    continue
                s = pair.scales(arrays)
                # in total, a channel may not be scaled past its limit, and one at the limit not at all
                total = np.where(np.isinf(floor), 1.0, np.maximum(s * cumulative[id(pair)], floor))
                s = total / cumulative[id(pair)]
                cumulative[id(pair)] *= s
                pair.apply(arrays, s)
                change = max(change, float(np.abs(np.log(s)).max()))
            if change < SETTLED:
                break
        for name, value in model.graph.initializers.items():
            old = constant(value)
            if old is not None and old.dtype == np.float32:
                value.const_value = ir.tensor(arrays[name].astype(np.float32), name=name)
        return replace(graph, model=model)


@dataclass(frozen=True)
class _Pair:
    """Two layers with at most a Relu or Clip between them."""

    first: ir.Node
    second: ir.Node
    clip: ir.Node | None
    """The Clip between them, if it is one."""

    def _names(self) -> tuple[str, str | None, str]:
        bias = self.first.inputs[2] if len(self.first.inputs) > 2 else None
        return _name(self.first.inputs[1]), _name(bias) if bias is not None else None, _name(self.second.inputs[1])

    def scales(self, arrays: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        w1, _, w2 = self._names()
        r1 = _reach(arrays[w1], weight_axis(self.first))
        r2 = _reach(arrays[w2], _input_axis(self.second))
        alive = (r1 > 1e-8) & (r2 > 1e-8)  # a dead channel has nothing to even out
        return np.sqrt(np.where(alive, r1, 1.0) / np.where(alive, r2, 1.0))

    def apply(self, arrays: dict[str, NDArray[np.float64]], s: NDArray[np.float64]) -> None:
        w1, b1, w2 = self._names()
        arrays[w1] = arrays[w1] / _along(s, arrays[w1].ndim, weight_axis(self.first))
        arrays[w2] = arrays[w2] * _along(s, arrays[w2].ndim, _input_axis(self.second))
        if b1 is not None:
            arrays[b1] = arrays[b1] / s


def _pairs(graph: ir.Graph) -> Iterator[_Pair]:
    for node in graph:
        if not _can_scale(node):
            continue
        value, clip = node.outputs[0], None
        reader = _only_reader(value)
        if reader is not None and reader.op_type == "Relu":
            reader = _only_reader(reader.outputs[0])
        elif reader is not None and reader.op_type == "Clip" and _clips_from_zero(reader):
            clip, reader = reader, _only_reader(reader.outputs[0])
        if reader is not None and _can_scale(reader) and _uses_once(node) and _uses_once(reader):
            yield _Pair(node, reader, clip)


def _can_scale(node: ir.Node) -> bool:
    if len(node.inputs) > 2 and node.inputs[2] is not None and constant(node.inputs[2]) is None:
        return False  # a computed bias cannot be scaled along
    if node.op_type == "Gemm":
        return constant(node.inputs[1]) is not None and not attribute(node, "transA", 0)
    if node.op_type != "Conv" or (weight := constant(node.inputs[1])) is None:
        return False
    group = attribute(node, "group", 1)
    return bool(group == 1 or (weight.shape[1] == 1 and weight.shape[0] == group))


def _uses_once(node: ir.Node) -> bool:
    """Weights shared between layers cannot be scaled for one of them."""
    return all(v is None or constant(v) is None or len(list(v.uses())) == 1 for v in node.inputs[1:])


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0][1] != 0:
        return None
    return uses[0][0]


def _clips_from_zero(node: ir.Node) -> bool:
    low, high = ([constant(v) for v in node.inputs[1:3]] + [None, None])[:2]
    return low is not None and high is not None and float(low) == 0.0


def _input_axis(node: ir.Node) -> int:
    """Input channels of a weight; a depthwise weight has them where its output channels are."""
    if node.op_type == "Gemm":
        return 1 - weight_axis(node)
    return 0 if attribute(node, "group", 1) > 1 else 1


def _floor(pair: _Pair, reached: dict[str, NDArray[np.float32]]) -> NDArray[np.float64] | None:
    """Smallest allowed scale per channel, infinity for channels that may not be scaled; None: the pair is skipped."""
    weight = constant(pair.first.inputs[1])
    assert weight is not None
    channels = weight.shape[weight_axis(pair.first)]
    if pair.clip is None:
        return np.zeros(channels)
    name = _name(pair.clip.outputs[0])
    if name not in reached:
        return None
    limit = float(constant(pair.clip.inputs[2]))  # type: ignore[arg-type]
    at_limit = reached[name] >= limit * 0.999
    return np.where(at_limit, np.inf, reached[name] / limit)


def _channel_maxima(graph: FloatGraph, names: list[str], data: DataSet) -> dict[str, NDArray[np.float32]]:
    """Largest value per channel of some activations, over all calibration samples."""
    run = exposing(graph.model, names)
    largest: dict[str, NDArray[np.float32]] = {}
    for batch in track(data.batches(1), "measuring channels", total=len(data)):
        for name, array in run(batch.inputs).items():
            top = array.max(axis=tuple(i for i in range(array.ndim) if i != 1))
            largest[name] = top if name not in largest else np.maximum(largest[name], top)
    return largest


def _reach(weight: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    return np.asarray(np.abs(weight).max(axis=tuple(i for i in range(weight.ndim) if i != axis)))


def _along(s: NDArray[np.float64], rank: int, axis: int) -> NDArray[np.float64]:
    return s.reshape([-1 if i == axis else 1 for i in range(rank)])


def _name(value: ir.Value | None) -> str:
    return (value.name if value is not None else None) or ""
