"""Activation ranges chosen by what they do to the network's outputs.

A threshold that suits a tensor need not suit the network: what is cut off may be what decides, and the error of the
next operator misleads as well. So every candidate is tried: the float network goes on from the tensor, quantized with
the candidate, and its outputs are compared with those of the untouched one. One tensor is quantized at a time: errors
of different tensors are independent enough to be made small one by one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from deploykit.core.data import DataSet
from deploykit.core.journal import NOTHING_KEPT, Journal
from deploykit.core.progress import track
from deploykit.core.target import QuantSpec
from deploykit.hub.fitting.activations import Activations
from deploykit.hub.graph import Hub
from deploykit.hub.layers import layers
from deploykit.hub.operators import FIXED_OUTPUT, ROLES
from deploykit.hub.quantize import QParams, activation_params, round_bias
from deploykit.hub.running import session
from deploykit.hub.slices import Slicer

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST = 0.7
"""By how much a range is shrunk at most, as a share of itself."""
COARSE = 0.1
FINE = 0.05
BATCH = 8


@dataclass(frozen=True)
class _Root:
    """A tensor of the float graph whose scale is its own, up to tensors that hold its values moved around."""

    name: str
    scale: str
    """Initializer in the hub."""
    zero: str


def search_ranges(hub: Hub, data: DataSet, who: str, journal: Journal = NOTHING_KEPT) -> Hub:
    """The hub with activation ranges as wide as serves its outputs best, and biases in the new steps.

    Graph outputs, operators with an output range of their own (softmax, sigmoid) and tensors that share a scale with
    others that are computed (branches of a Concat) keep theirs.

    Args:
        hub: quantized; not changed.
        data: the samples that candidates are judged by.
        who: the step's name, for the progress bar.
        journal: what was found for tensors, of a run that was cut.
    """
    quantized, floats = (Slicer(onnx.load_model_from_string(b)) for b in (hub.bytes, hub.graph.bytes))
    roots = _roots(quantized, floats)
    batch = hub.graph.batch or BATCH
    inner = [root.name for root in roots if root.name not in floats.inputs]
    outputs = list(dict.fromkeys(o.name for o in floats.model.graph.output))
    with contextlib.closing(Activations(floats, [*inner, *outputs], data, batch)) as values:
        expected = _expected(floats, outputs, data, batch)

        def best(i: int, root: _Root) -> dict[str, NDArray[Any]]:
            known = [r.name for r in roots[: i + 1] if r.name not in floats.inputs]
            judge = _Judge(floats, root.name, known, outputs, expected, values)
            spec = hub.spec.ports if root.name in floats.inputs else hub.spec
            found = _narrowed(_range(quantized, root, spec), judge, spec)
            return {"scale": np.asarray(found.scale), "zero": found.zero_point.astype(np.int64)}

        for i, root in enumerate(track(roots, f"{who}: tensors")):
            found = journal.once(root.name, partial(best, i, root))
            quantized.set_array(root.scale, found["scale"])
            quantized.set_array(root.zero, found["zero"].astype(quantized.array(root.zero).dtype))
    _rescale_biases(quantized)
    return replace(hub, quantized=ir.from_proto(quantized.model))


def _roots(quantized: Slicer, floats: Slicer) -> list[_Root]:
    groups: dict[tuple[str, str], list[str]] = {}
    for node in quantized.model.graph.node:
        if node.op_type == "QuantizeLinear":
            name = quantized.renamed.get(node.input[0], node.input[0])
            if name in floats.producer or name in floats.inputs:  # not a conversion between two scales
                groups.setdefault((node.input[1], node.input[2]), []).append(name)
    outputs = {o.name for o in floats.model.graph.output}
    found = []
    for (scale, zero), names in groups.items():
        computed = [n for n in names if n in floats.inputs or ROLES.get(floats.producer[n].op_type) != "moves"]
        fixed = any(
            n in outputs or (n in floats.producer and floats.producer[n].op_type in FIXED_OUTPUT) for n in names
        )
        if len(computed) == 1 and not fixed:
            found.append(_Root(computed[0], scale, zero))
    at = {r.name: floats.position[id(floats.producer[r.name])] if r.name in floats.producer else -1 for r in found}
    return sorted(found, key=lambda r: at[r.name])


def _expected(floats: Slicer, outputs: Sequence[str], data: DataSet, batch: int) -> list[list[NDArray[Any]]]:
    """What the float network answers, batch by batch."""
    run = session(floats.cut(outputs, []))
    needed = floats.boundary(outputs, [])
    return [run.run(outputs, {n: b.inputs[n] for n in needed}) for b in data.batches(batch)]


class _Judge:
    """Squared error of the outputs, each relative to its power, with one tensor replaced by its quantized self."""

    def __init__(
        self,
        floats: Slicer,
        name: str,
        known: Sequence[str],
        outputs: Sequence[str],
        expected: Sequence[Sequence[NDArray[Any]]],
        values: Activations,
    ) -> None:
        self._name, self._outputs, self._expected, self._values = name, outputs, expected, values
        stops = [*known, name]
        self._needed = floats.boundary(outputs, stops)
        self._run = session(floats.cut(outputs, stops))
        self._power = [sum(float(np.square(y[o]).sum()) for y in expected) or 1.0 for o in range(len(outputs))]

    def __call__(self, params: QParams, spec: QuantSpec) -> float:
        low, high = spec.activation_range
        zero, scale, total = params.zero_point.astype(np.float32), params.scale, 0.0
        for expected, arrays in zip(self._expected, self._values.named(self._needed), strict=True):
            integers = np.clip(np.rint(arrays[self._name] / scale) + zero, low, high)
            found = self._run.run(self._outputs, {**arrays, self._name: (integers - zero) * scale})
            total += sum(
                float(np.square(f - e).sum()) / p for f, e, p in zip(found, expected, self._power, strict=True)
            )
        return total


def _range(quantized: Slicer, root: _Root, spec: QuantSpec) -> tuple[float, float]:
    """What a tensor's scale and zero point cover now."""
    bottom, top = spec.activation_range
    scale, zero = float(quantized.array(root.scale)), int(quantized.array(root.zero))
    return (bottom - zero) * scale, (top - zero) * scale


def _narrowed(limits: tuple[float, float], judge: Callable[[QParams, QuantSpec], float], spec: QuantSpec) -> QParams:
    """The best of ranges that begin at the whole one and shrink: above, then below; both at once if symmetric.

    Errors jump about with what falls on ties, so the search does not stop at the first that grows: it looks at all
    coarse steps and then around the best of them.
    """
    best = activation_params(*limits, spec)
    cost, shrunk = judge(best, spec), (0.0, 0.0)  # below, above
    sides = [(1.0, 1.0)] if spec.activation_symmetric else [(0.0, 1.0), (1.0, 0.0)]
    for below, above in sides:
        if not (below * limits[0] or above * limits[1]):
            continue
        start = shrunk
        coarse = [COARSE * k for k in range(1, round(MOST / COARSE) + 1)]
        for round_ in (coarse, (-FINE, FINE)):
            centre = max(shrunk[0] - start[0], shrunk[1] - start[1]) if round_ is not coarse else 0.0
            for share in (centre + step for step in round_ if centre + step > 0):
                tried = (start[0] + below * share, start[1] + above * share)
                params = activation_params(limits[0] * (1 - tried[0]), limits[1] * (1 - tried[1]), spec)
                found = judge(params, spec)
                if found < cost:
                    best, cost, shrunk = params, found, tried
    return best


def _rescale_biases(quantized: Slicer) -> None:
    """Biases in the steps of their layers' new input scales."""
    for layer in layers(quantized):
        if not layer.bias_scale:
            continue
        before = quantized.array(layer.bias_scale)
        weight_scale = quantized.array(layer.weight_scale).reshape(-1)
        after = quantized.array(quantized.producer[layer.x].input[1]) * weight_scale
        after = np.resize(after, before.shape)  # the groups of a transposed convolution share their scales
        bias = quantized.array(layer.bias) * before.astype(np.float64)
        quantized.set_array(layer.bias, round_bias(bias, after))
        quantized.set_array(layer.bias_scale, after)
