"""What a Q/DQ graph consists of, as the hub in torch sees it: nodes, integer weights, biases, scales to be learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from deploykit.core.target import QuantSpec
from deploykit.hub.operators import FIXED_OUTPUT, PRODUCTS
from deploykit.hub.training.operators import Attributes


@dataclass(frozen=True)
class Node:
    """One operator."""

    operator: str
    attributes: Attributes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Held:
    """An integer weight or bias: what stands behind the output of one DequantizeLinear."""

    stored: str
    """Initializer that holds the integers."""
    scale: str
    """Initializer of the scale."""
    axis: int
    weight: str = ""
    """Of a bias: the weight it stands beside (its DequantizeLinear's output). Of a weight: empty."""
    input_scale: str = ""
    """Of a bias: the scale of what the weight is multiplied with."""

    @property
    def is_bias(self) -> bool:
        """Whether it is an int32 bias."""
        return bool(self.weight)


def read_nodes(graph: onnx.GraphProto) -> list[Node]:
    """The nodes of a graph in order, with attributes as Python values."""
    return [Node(n.op_type, _attributes(n), tuple(n.input), tuple(n.output)) for n in graph.node]


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()}


def held_by(nodes: Sequence[Node], arrays: Mapping[str, Any]) -> dict[str, Held]:
    """Integer weights and biases of products, by the output of their DequantizeLinear."""
    dequantizers = {n.outputs[0]: n for n in nodes if n.operator == "DequantizeLinear"}
    constant = {out for out, n in dequantizers.items() if n.inputs[0] in arrays}
    products = {n.outputs[0]: n for n in nodes if n.operator in PRODUCTS and n.inputs[1] in constant}
    found: dict[str, Held] = {}

    def hold(name: str, weight: str = "", input_scale: str = "") -> None:
        stored, scale = dequantizers[name].inputs[:2]
        found[name] = Held(stored, scale, dequantizers[name].attributes.get("axis", 1), weight, input_scale)

    for node in products.values():
        hold(node.inputs[1])
    for node in nodes:
        product = products.get(node.outputs[0])
        if node.operator == "Add":  # the bias of a MatMul
            product = next((products[i] for i in node.inputs if i in products), None)
        if product is None or product.inputs[0] not in dequantizers:
            continue
        for name in set(node.inputs) & constant - set(product.inputs[:2]):
            if arrays[dequantizers[name].inputs[0]].dtype == np.int32:
                hold(name, product.inputs[1], dequantizers[product.inputs[0]].inputs[1])
    return found


def learnable_scales(
    nodes: Sequence[Node], arrays: Mapping[str, Any], held: Mapping[str, Held], spec: QuantSpec
) -> list[str]:
    """The scales of activations and weights that may change.

    Powers of two stay, and so do scales that kernels want as they are (outputs of softmax and its like), and those that
    an operator's inputs share with a constant, whose integers would have to change with them.
    """
    if spec.scale != "float":
        return []
    producer = {out: n for n in nodes for out in n.outputs}
    stays: set[str] = set()
    for node in nodes:
        if node.operator == "QuantizeLinear":
            source = producer.get(node.inputs[0])
            if source is not None and source.operator in FIXED_OUTPUT and not spec.activation_symmetric:
                stays.add(node.inputs[1])
        if node.operator in spec.shared_scale:
            read = [producer[i] for i in node.inputs if i in producer and producer[i].operator == "DequantizeLinear"]
            if any(n.inputs[0] in arrays for n in read):
                stays |= {n.inputs[1] for n in read}
    activations = [n.inputs[1] for n in nodes if n.operator == "QuantizeLinear"]
    weights = [h.scale for h in held.values() if not h.is_bias]
    return [name for name in dict.fromkeys([*activations, *weights]) if name in arrays and name not in stays]


def along(vector: Any, rank: int, axis: int) -> Any:
    """A per-channel vector (array or tensor) shaped to broadcast along ``axis`` of something of that rank; a single
    number stays one."""
    if vector.ndim == 0:
        return vector
    return vector.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


RANGES = {
    "int4": (-8, 7), "uint4": (0, 15), "int8": (-128, 127), "uint8": (0, 255), "int16": (-(2**15), 2**15 - 1),
    "uint16": (0, 2**16 - 1),
}  # fmt: skip
"""Where the types of activations saturate."""


def limits(zero_point: Any) -> tuple[float, float]:
    """Fewest and most steps that integers of the type of a zero point can stand for."""
    low, high = RANGES[str(zero_point.dtype)]
    return low - float(zero_point), high - float(zero_point)


def as_tensor(array: Any) -> Tensor:
    """A copy of an array; integers that torch does not know (of 4 bits) become wider ones."""
    known = array.dtype.kind in "fiub" and array.dtype != np.uint16
    return torch.from_numpy(np.array(array if known else array.astype(np.int32)))


def key(name: str) -> str:
    """Torch does not allow dots in parameter names."""
    return name.replace(".", "·")
