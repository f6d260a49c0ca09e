"""2:4 zeros: which layers have them, so that sparse tensor cores can skip what is zero.

Of four neighbouring inputs of an output, at every position of the kernel, at most two may have a weight (Mishra et al.
2021, "Accelerating Sparse Deep Neural Networks", section 3).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from deploykit.hub.graph import Hub, attribute, constant
from deploykit.hub.plan import name_of

ALIVE, OF = 2, 4


def sparse_layers(graph: ir.Graph) -> tuple[str, ...]:
    """Names of the convolutions and matrix products whose constant weights have 2:4 zeros, in graph order."""
    weights = ((node, _weight(node)) for node in graph)
    return tuple(name_of(node) for node, weight in weights if weight is not None and _has_zeros(node, weight))


def lost_zeros(graph: ir.Graph, hub: Hub) -> tuple[str, ...]:
    """Layers that were pruned to 2:4 and do not have these zeros in a file."""
    masks = hub.graph.masks
    pruned = [
        name_of(node)
        for node in hub.graph.model.graph
        if _weight(node) is not None
        and name_of(node.inputs[1]) in masks
        and _has_zeros(node, masks[name_of(node.inputs[1])])
    ]
    there = set(sparse_layers(graph))
    return tuple(name for name in pruned if name not in there)


def _weight(node: ir.Node) -> NDArray[Any] | None:
    """The constant weight of a convolution or matrix product, integers where it is stored as such."""
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return None
    value = node.inputs[1]
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear":
        value = producer.inputs[0]
    return constant(value)


def _has_zeros(node: ir.Node, weight: NDArray[Any]) -> bool:
    """Whether a weight, or the mask of one, has the pattern along its inputs."""
    transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not attribute(node, "transB", 0))
    last = np.moveaxis(weight, -2 if transposed else 1, -1)
    if last.shape[-1] % OF:
        return False
    return bool((np.count_nonzero(last.reshape(-1, OF), axis=1) <= ALIVE).all())
