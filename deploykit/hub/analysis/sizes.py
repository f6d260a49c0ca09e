"""How large operators are: channels and weights, as the float network has them."""

from __future__ import annotations

import onnx_ir as ir

from deploykit.core.manifest import Layer
from deploykit.hub.graph import Hub, attribute, constant
from deploykit.hub.operators import role, weight_axis
from deploykit.hub.plan import name_of


def described(hub: Hub) -> tuple[Layer, ...]:
    """The operators that quantizing decided about, in order, with the sizes of those that are products."""
    products = {name_of(node): node for node in hub.graph.model.graph if role(node) == "linear"}
    return tuple(
        _product(products[d.layer]) if d.layer in products else Layer(d.layer, d.operator) for d in hub.decisions
    )


def positions(node: ir.Node) -> list[int | None]:
    """How often a product with constant weights uses each of them for one sample, by axis; None: that axis is free."""
    value = node.inputs[0] if node.op_type == "ConvTranspose" else node.outputs[0]
    assert value is not None
    sizes = list(value.shape) if value.shape is not None else [None, None, None]
    outer = sizes[2:] if node.op_type in ("Conv", "ConvTranspose") else sizes[1:-1]
    return [size if isinstance(size, int) else None for size in outer]


def _product(node: ir.Node) -> Layer:
    weight = constant(node.inputs[1])
    if weight is None:  # of two activations
        return Layer(name_of(node), node.op_type)
    channels = weight.shape[weight_axis(node)]
    if node.op_type == "Conv":
        inputs, outputs = weight.shape[1], channels
    elif node.op_type == "ConvTranspose":
        inputs, outputs = weight.shape[0] // attribute(node, "group", 1), channels * attribute(node, "group", 1)
    else:
        inputs, outputs = weight.size // channels, channels
    return Layer(name_of(node), node.op_type, int(inputs), int(outputs), int(weight.size))
