"""SmoothQuant: outliers of activations become larger weights, so that one scale per activation tensor is enough.

Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", section 4.
For a product Y = X W the float network does not change under

    X_:j -> X_:j / s_j,     W_j: -> W_j: s_j,          s_j = max|X_:j|^α / max|W_j:|^(1-α)

where what makes X can divide by s_j itself: a LayerNormalization in its scale and bias, a product in its columns and
bias (through a Relu; through attention, where the value columns meet the output projection), a Mul in its constant. All
products that read the same channels share s (`deploykit.hub.fitting.smoothing`). A common factor of all s_j changes
nothing; it is chosen such that the largest activation stays as large as it was.

The paper takes one α for a network, 0.5. Here every group takes the α of a grid, or s = 1, that leaves the least of

    Σ  |Q(X / s) Q(s W) - X W|² / |X W|²        over the products of the group

on rows of the calibration data, rounded as the target stores numbers.

When it must not act: channels that anyone else reads (a residual stream, a Gelu), weights that layers share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.progress import say, track
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit, QuantSpec
from deploykit.hub.fitting.smoothing import Group, groups, input_axis
from deploykit.hub.graph import FloatGraph, add_initializer, constant
from deploykit.hub.plan import name_of
from deploykit.hub.quantize import activation_params, round_weight, weight_scale
from deploykit.hub.running import exposing

if TYPE_CHECKING:
    from numpy.typing import NDArray

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
ROWS = 1024
"""Rows of an activation that α is judged on, of all samples together."""


@dataclass(frozen=True)
class Smooth:
    """Moves outliers of activations into the weights that read them; the float network computes the same."""

    alpha: float | None = None
    """How much of the ranges goes into the weights, for all groups; None: each takes what measures best."""

    stage: ClassVar[Stage] = "graph"
    needs: ClassVar[tuple[Need, ...]] = ("data",)
    pays_if: ClassVar[tuple[Profit, ...]] = ("int8", "int4")

    def __post_init__(self) -> None:
        """Refuses what is no share."""
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError("alpha must be between 0 and 1")

    def __call__(self, graph: FloatGraph, context: Context) -> FloatGraph:
        """The smoothed graph."""
        data = context.need("calibration", "smooth")
        found = groups(graph, next(data.batches(graph.batch or 2)).inputs)
        if not found:
            say("smooth: no product reads what could be scaled where it is made")
            return graph
        model = graph.copy()
        nodes = {name_of(node): node for node in model.graph}
        read = {r.node: name_of(nodes[r.node].inputs[0]) for group in found for r in group.readers}
        seen = _observe(graph, sorted(set(read.values())), data)
        scaled = 0
        for group in found:
            products = [
                _Product(seen[read[r.node]], _rows(nodes[r.node]), r.channels, group.free) for r in group.readers
            ]
            alphas = ALPHAS if self.alpha is None else (self.alpha,)
            s = _chosen([scales(a, group, products) for a in alphas], products, context.target.quant, self.alpha)
            if s is not None:
                scaled += 1
                _apply(model.graph, nodes, group, s)
        say(f"smooth: {scaled} of {len(found)} groups of products are better off with other scales")
        return replace(graph, model=model)


@dataclass(frozen=True)
class _Seen:
    """An activation ``[..., k]`` on the calibration data."""

    low: NDArray[np.float32]
    high: NDArray[np.float32]
    rows: NDArray[np.float32]
    """``[n, k]``, some."""

    @property
    def reach(self) -> NDArray[np.float32]:
        return np.maximum(np.abs(self.low), np.abs(self.high))


@dataclass(frozen=True)
class _Product:
    """X W of one reader: X as it was seen, W ``[k, o]``."""

    x: _Seen
    weight: NDArray[np.float64]
    channels: NDArray[np.int64]
    """``[k]``: the source's channel behind each input."""
    free: NDArray[np.bool_]

    def per_channel(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """``[c]``: the largest of one number per input, 0 for channels of the source that are not read."""
        largest = np.zeros(len(self.free))
        np.maximum.at(largest, self.channels, values)
        return largest


def scales(alpha: float, group: Group, products: Sequence[_Product]) -> NDArray[np.float64]:
    """s ``[c]``: 1 for channels that are not free, or where activations or weights are nothing but zeros."""
    x = np.max([p.per_channel(p.x.reach.astype(np.float64)) for p in products], axis=0)
    w = np.max([p.per_channel(np.abs(p.weight).max(axis=1)) for p in products], axis=0)
    alive = group.free & (x > 1e-8) & (w > 1e-8)
    s = np.ones(len(alive))
    if alive.any():
        s[alive] = x[alive] ** alpha / w[alive] ** (1 - alpha)
        s[alive] *= (x[alive] / s[alive]).max() / x[alive].max()
    return s


def _chosen(
    candidates: Sequence[NDArray[np.float64]], products: Sequence[_Product], spec: QuantSpec, alpha: float | None
) -> NDArray[np.float64] | None:
    """The candidate with the least error; None where none is better than to leave everything as it is."""
    if alpha is not None:
        return candidates[0]
    errors = [sum(_error(p, s, spec) for p in products) for s in candidates]
    as_it_is = sum(_error(p, np.ones_like(candidates[0]), spec) for p in products)
    best = int(np.argmin(errors))
    return candidates[best] if errors[best] < as_it_is else None


def _error(product: _Product, s: NDArray[np.float64], spec: QuantSpec) -> float:
    """|Q(X / s) Q(s W) - X W|² / |X W|² on the rows that were kept, X rounded by the range of all."""
    x, by = product.x, s[product.channels]
    p = activation_params(float((x.low / by).min()), float((x.high / by).max()), spec)
    steps = np.clip(np.rint(x.rows / by / p.scale) + float(p.zero_point), *p.limits) - float(p.zero_point)
    weight = np.asarray(product.weight * by[:, None], np.float32)
    scale = weight_scale(weight, 1, spec, None, 1.0)
    rounded = (steps * p.scale).astype(np.float32) @ (round_weight(weight, scale, 1, spec) * scale)
    exact = x.rows @ product.weight.astype(np.float32)
    power = float(np.square(exact, dtype=np.float64).sum())
    return float(np.square(rounded - exact, dtype=np.float64).sum()) / max(power, 1e-300)


def _observe(graph: FloatGraph, names: Sequence[str], data: DataSet) -> dict[str, _Seen]:
    """Extremes per channel over all samples, and evenly spaced rows of every sample."""
    run, each = exposing(graph.model, names), -(-ROWS // len(data))
    low: dict[str, NDArray[np.float32]] = {}
    high: dict[str, NDArray[np.float32]] = {}
    kept: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}
    batch = graph.batch or 1
    for samples in track(data.batches(batch), "measuring channels", total=-(-len(data) // batch)):
        for name, array in run(samples.inputs).items():
            rows = array.reshape(-1, array.shape[-1])
            low[name] = np.minimum(low.get(name, rows[0]), rows.min(axis=0))
            high[name] = np.maximum(high.get(name, rows[0]), rows.max(axis=0))
            count = min(each * batch, len(rows))
            kept[name].append(rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)])
    return {name: _Seen(low[name], high[name], np.concatenate(kept[name])) for name in names}


def _rows(node: ir.Node) -> NDArray[np.float64]:
    """W ``[k, o]``."""
    weight = np.array(constant(node.inputs[1]), np.float64)
    return weight.T if input_axis(node) == 1 else weight


def _apply(graph: ir.Graph, nodes: Mapping[str, ir.Node], group: Group, s: NDArray[np.float64]) -> None:
    """Divides the source's constants, multiplies its readers' weights."""
    for name, position, axis in group.parameters:
        _multiply(graph, nodes[name], position, 1 / s, axis)
    for reader in group.readers:
        node = nodes[reader.node]
        _multiply(graph, node, 1, s[reader.channels], input_axis(node))


def _multiply(graph: ir.Graph, node: ir.Node, position: int, by: NDArray[np.float64], axis: int) -> None:
    """Multiplies a constant along one axis; one that others read too gets a copy."""
    value = node.inputs[position]
    held = constant(value)
    assert value is not None and held is not None
    along = [-1 if i == axis % held.ndim else 1 for i in range(held.ndim)]
    scaled = (held * by.reshape(along)).astype(np.float32)
    if len(list(value.uses())) == 1:
        value.const_value = ir.tensor(scaled, name=value.name)
    else:
        node.replace_input_with(position, add_initializer(graph, f"{name_of(node)}.{position}", scaled))
