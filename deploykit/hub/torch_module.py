"""The hub as a torch module: the same Q/DQ graph, differentiable, so that training sees what the device will compute.

Rounding passes gradients straight through (Bengio et al. 2013); clipping stops them. Each integer weight has a float
parameter behind it, ``w_q = clamp(round(mask * v / s))``; `HubModule.to_hub` rounds it back into the hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from deploykit.core.errors import DeploykitError
from deploykit.hub.graph import Hub
from deploykit.hub.operators import PRODUCTS
from deploykit.hub.quantize import round_bias
from deploykit.hub.torch_operators import MEANING, Attributes

STORED = {"int8": (-128, 127), "uint8": (0, 255)}
PARAMETER_READERS = frozenset({*PRODUCTS, "LayerNormalization", "Add", "Mul"})


def round_through(x: Tensor) -> Tensor:
    """Nearest integer, halves to even, with the gradient of the identity."""
    return x + (x.round() - x).detach()


@dataclass(frozen=True)
class _Weight:
    """An integer weight or bias of the hub."""

    stored: str
    """Initializer that holds the integers."""
    scale: str
    axis: int
    is_bias: bool


class HubModule(nn.Module):
    """Runs a hub in torch; called with inputs by name, returns outputs by name.

    Args:
        hub: with a quantized graph; not changed.

    Raises:
        DeploykitError: operators without a meaning in torch (all of them are named).
    """

    def __init__(self, hub: Hub) -> None:
        """Builds parameters and constants from the hub."""
        super().__init__()
        self.hub = hub
        graph = onnx.load_model_from_string(hub.bytes).graph
        self.nodes = [(n.op_type, _attributes(n), list(n.input), list(n.output)) for n in graph.node]
        unknown = sorted({op for op, *_ in self.nodes} - set(MEANING) - {"QuantizeLinear", "DequantizeLinear"})
        if unknown:
            raise DeploykitError(f"training the hub is not possible: no torch meaning for {', '.join(unknown)}")
        self.outputs = [o.name for o in graph.output]
        arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        self.weights = _integer_weights(self.nodes, arrays)
        floats = {
            name: v.const_value.numpy() for name, v in hub.graph.model.graph.initializers.items() if v.const_value
        }
        self.latent = nn.ParameterDict()
        for output, weight in self.weights.items():
            original = floats.get(hub.weights.get(weight.stored, ""))
            start = _latent(weight, arrays, original, hub.spec_of(weight.stored).weight_max)
            self.latent[_key(output)] = nn.Parameter(torch.from_numpy(start))
        readers = {i for op, _, inputs, _ in self.nodes if op in PARAMETER_READERS for i in inputs}
        held = {w.stored for w in self.weights.values()}
        for name, array in arrays.items():
            if name in readers and array.dtype == np.float32 and array.ndim >= 1:
                self.latent[_key(name)] = nn.Parameter(torch.from_numpy(array.copy()))
            elif name not in held:
                self.register_buffer(_key(name), torch.from_numpy(array.copy()), persistent=False)
        self.constants = [n for n in arrays if n not in held and _key(n) not in self.latent]
        self.free = [n for n in arrays if _key(n) in self.latent]
        origins = {output: hub.weights.get(weight.stored, "") for output, weight in self.weights.items()}
        for name, origin in (origins | {name: name for name in self.free}).items():
            if origin in hub.graph.masks:
                self.register_buffer(_key(f"{name}.mask"), torch.from_numpy(hub.graph.masks[origin]), persistent=False)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Outputs by name for inputs by name, each ``[n, ...]`` float32."""
        values: dict[str, Any] = {"": None, **inputs}
        values.update({name: getattr(self, _key(name)) for name in self.constants})
        values.update({name: self._masked(name) for name in self.free})
        for op, attributes, names, results in self.nodes:
            if results[0] in self.weights:
                values[results[0]] = self._weight(results[0])
                continue
            arguments: list[Any] = [values.get(n) for n in names]
            if op == "QuantizeLinear":
                found: Any = _quantize(*arguments)
            elif op == "DequantizeLinear":
                found = _dequantize(attributes, *arguments)
            else:
                found = MEANING[op](attributes, *arguments)
            for name, value in zip(results, found if isinstance(found, tuple) else (found,), strict=False):
                values[name] = value
        return {name: values[name] for name in self.outputs}

    def _weight(self, output: str) -> Tensor:
        """What the device multiplies with: integers times scale."""
        v: Tensor = self.latent[_key(output)]
        weight = self.weights[output]
        if weight.is_bias:
            return v  # int32 steps are far finer than float32 training resolves
        v = self._masked(output)
        scale = _along(getattr(self, _key(weight.scale)), v, weight.axis)
        top = self.hub.spec_of(weight.stored).weight_max
        integers: Tensor = torch.clamp(round_through(v / scale), -top, top)
        return integers * scale

    def _masked(self, name: str) -> Tensor:
        """The parameter behind a weight, its zeros held."""
        v: Tensor = self.latent[_key(name)]
        mask = getattr(self, _key(f"{name}.mask"), None)
        return v if mask is None else v * mask

    def to_hub(self) -> Hub:
        """The hub with the trained weights and biases, rounded; scales and structure unchanged."""
        model = onnx.load_model_from_string(self.hub.bytes)
        tensors = {t.name: t for t in model.graph.initializer}
        for output, weight in self.weights.items():
            scale = onnx.numpy_helper.to_array(tensors[weight.scale])
            v = self.latent[_key(output)].detach().numpy()
            if weight.is_bias:
                stored: Any = round_bias(v, scale)
            else:
                steps = self._weight(output).detach() / _along(
                    torch.from_numpy(scale.copy()), torch.from_numpy(v), weight.axis
                )
                stored = steps.round().numpy().astype(np.int8)
            tensors[weight.stored].CopyFrom(onnx.numpy_helper.from_array(stored, weight.stored))
        for name in self.free:
            array = self._masked(name).detach().numpy()
            tensors[name].CopyFrom(onnx.numpy_helper.from_array(array, name))
        return replace(self.hub, quantized=ir.from_proto(model))


def _integer_weights(
    nodes: Sequence[tuple[str, Attributes, list[str], list[str]]], arrays: dict[str, Any]
) -> dict[str, _Weight]:
    """DequantizeLinear outputs that stand for weights and biases of products."""
    found: dict[str, _Weight] = {}
    dequantizers = {out[0]: (a, ins) for op, a, ins, out in nodes if op == "DequantizeLinear" and ins[0] in arrays}
    for op, _, inputs, _ in nodes:
        held = [name for name in inputs if name in dequantizers]
        if op == "Add":  # the bias of a MatMul
            held = [name for name in held if arrays[dequantizers[name][1][0]].dtype == np.int32]
        elif op in PRODUCTS:
            held = [name for name in held if name != inputs[0]]
        else:
            continue
        for name in held:
            attributes, (stored, scale, *_) = dequantizers[name]
            is_bias = bool(arrays[stored].dtype == np.int32)
            found[name] = _Weight(stored, scale, attributes.get("axis", 1), is_bias)
    return found


def _latent(weight: _Weight, arrays: dict[str, Any], original: Any, top: int) -> Any:
    """The float weight where it rounds to the hub's integer, the integer's value where some step chose another."""
    stored, scale = arrays[weight.stored], arrays[weight.scale].astype(np.float64)
    shape = [-1 if i == weight.axis else 1 for i in range(stored.ndim)]
    value = stored.astype(np.float64) * scale.reshape(shape)
    if original is not None and not weight.is_bias and original.shape == stored.shape:
        steps = np.rint(original / arrays[weight.scale].reshape(shape))  # float32, as the forward pass will round
        same = np.clip(steps, -top, top) == stored
        value = np.where(same, original, value)
    return value.astype(np.float32)


def _quantize(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    low, high = STORED[str(zero.dtype).removeprefix("torch.")]
    return torch.clamp(round_through(x / scale) + zero.float(), low, high)


def _dequantize(attributes: Attributes, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    axis = attributes.get("axis", 1)
    offset = 0.0 if zero is None else _along(zero.float(), x, axis)
    return (x.float() - offset) * _along(scale, x, axis)


def _along(vector: Tensor, like: Tensor, axis: int) -> Tensor:
    """A per-channel vector shaped to broadcast along ``axis``; scalars stay scalars."""
    if vector.ndim == 0:
        return vector
    return vector.reshape([-1 if i == axis % like.ndim else 1 for i in range(like.ndim)])


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()}


def _key(name: str) -> str:
    """Torch does not allow dots in parameter names."""
    return name.replace(".", "·")
