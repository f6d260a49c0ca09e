"""Weight bits product by product: mixed precision. What else a hub holds stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

from deploykit.core.errors import unknown
from deploykit.hub.graph import Hub, attribute, constant
from deploykit.hub.layers import Layer, layers
from deploykit.hub.operators import bias_of, weight_axis
from deploykit.hub.plan import name_of
from deploykit.hub.quantize import round_bias, round_weight, weight_scale
from deploykit.hub.slices import Slicer

if TYPE_CHECKING:
    from numpy.typing import NDArray


ONE_STEP = 1
"""By which a bias may differ that was moved to other steps of the same size."""


@dataclass(frozen=True)
class Held:
    """One stored weight and the products that read it: they have the same bits."""

    layers: tuple[Layer, ...]
    """In the network's order."""
    size: int
    """How many integers."""

    @property
    def name(self) -> str:
        """Of the first product."""
        return self.layers[0].name

    @property
    def weight(self) -> str:
        """Initializer of the integers."""
        return self.layers[0].weight

    def real(self, slicer: Slicer) -> NDArray[np.float32]:
        """What the integers of a hub stand for."""
        dequantizer = slicer.producer[self.layers[0].node.input[1]]
        axis = next((a.i for a in dequantizer.attribute if a.name == "axis"), 1)
        integers, scale = slicer.array(self.weight), slicer.array(self.layers[0].weight_scale)
        return np.asarray(integers * scale.reshape([-1 if i == axis else 1 for i in range(integers.ndim)]), np.float32)


def held_weights(slicer: Slicer) -> list[Held]:
    """The integer weights of a hub's products, in the order in which they are first read."""
    readers: dict[str, list[Layer]] = {}
    for layer in layers(slicer):
        readers.setdefault(layer.weight, []).append(layer)
    return [Held(tuple(found), slicer.array(weight).size) for weight, found in readers.items()]


def with_bits(hub: Hub, bits: Mapping[str, int]) -> Hub:
    """The hub with other weight bits for some products.

    Integers, scales and the steps of biases are those that `deploykit.hub.quantize.quantize` makes of the float weight
    under a spec with these bits; what steps made of them before is lost. Where products share a stored weight the most
    bits asked for hold for all of them.

    Args:
        hub: quantized; not changed.
        bits: name of a product -> 2 to 8. The others keep what they have.

    Raises:
        DeploykitError: no product with integer weights has one of those names.
    """
    slicer = Slicer(onnx.load_model_from_string(hub.bytes))
    found = held_weights(slicer)
    _refuse_unknown(bits, (layer.name for held in found for layer in held.layers))
    nodes = {name_of(node): node for node in hub.graph.model.graph}
    changed = dict(hub.bits)
    for held in found:
        asked = [bits[layer.name] for layer in held.layers if layer.name in bits]
        if asked:
            changed[held.weight] = max(asked)
            _store(slicer, held, replace(hub, bits=changed), nodes)
    kept = {weight: b for weight, b in changed.items() if b != hub.spec.weight_bits}
    return replace(hub, quantized=ir.from_proto(slicer.model), bits=kept)


def is_plain(hub: Hub) -> bool:
    """Whether integers, scales and biases of all products are those that quantizing the float network makes: no step
    chose others."""
    slicer = Slicer(onnx.load_model_from_string(hub.bytes))
    held = held_weights(slicer)
    anew = with_bits(hub, {each.name: hub.spec_of(each.weight).weight_bits for each in held})
    plain = Slicer(onnx.load_model_from_string(anew.bytes))

    def same(name: str, steps: float) -> bool:
        return not name or bool(np.abs(slicer.array(name).astype(np.float64) - plain.array(name)).max() <= steps)

    return all(
        same(layer.weight, 0) and same(layer.weight_scale, 0) and (not layer.bias_scale or same(layer.bias, ONE_STEP))
        for each in held
        for layer in each.layers
    )


def _refuse_unknown(names: Iterable[str], known: Iterable[str]) -> None:
    there = set(known)
    for name in names:
        if name not in there:
            raise unknown("product with integer weights", name, there)


def _store(slicer: Slicer, held: Held, hub: Hub, nodes: Mapping[str, ir.Node]) -> None:
    """Writes integers, scales and biases of one weight and its readers, from the float network."""
    spec = hub.spec_of(held.weight)
    weight = constant(hub.graph.model.graph.initializers[hub.weights[held.weight]])
    assert weight is not None
    axis = weight_axis(nodes[held.name])
    scales = []
    for layer in held.layers:
        # the groups of a transposed convolution share the scales of their channels
        largest = np.abs(_bias(nodes[layer.name])).reshape(-1, weight.shape[axis]).max(axis=0) if layer.bias else None
        scales.append(weight_scale(weight, axis, spec, largest, _input_scale(slicer, layer)))
    scale = np.maximum.reduce(scales)
    slicer.set_array(held.weight, round_weight(weight, scale, axis, spec))
    slicer.set_array(held.layers[0].weight_scale, scale)
    for layer in held.layers:
        if layer.bias_scale:
            bias = _bias(nodes[layer.name])
            steps = np.tile(np.float32(_input_scale(slicer, layer)) * scale, bias.size // scale.size)
            slicer.set_array(layer.bias, round_bias(bias, steps))
            slicer.set_array(layer.bias_scale, steps)


def _bias(node: ir.Node) -> NDArray[np.float32]:
    """The float bias of a product ``[c]``; zeros where it has none."""
    holder, position = bias_of(node)
    held = constant(holder.inputs[position]) if len(holder.inputs) > position else None
    if held is not None:
        return held.reshape(-1)
    group = attribute(node, "group", 1) if node.op_type == "ConvTranspose" else 1
    weight = constant(node.inputs[1])
    assert weight is not None
    return np.zeros(weight.shape[weight_axis(node)] * group, np.float32)


def _input_scale(slicer: Slicer, layer: Layer) -> float:
    return float(slicer.array(slicer.producer[layer.x].input[1]))
