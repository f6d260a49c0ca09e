"""The hub as a torch module: the same Q/DQ graph, differentiable, so that training sees what the device will compute.

Rounding passes gradients straight through (Bengio et al. 2013); clipping stops them
(`deploykit.hub.training.fake_quant`). Each integer weight has a float v behind it, ``w_q = clamp(round(mask * v /
s))``, and each scale s can be learned; `HubModule.to_hub` writes integers, scales and biases back into the hub.

Optimizers like Adam move every parameter by about the learning rate, whatever it stands for. So parameters count in
units in which that means the same for all: weights as a share of what their channel can hold, biases as a share of what
one weight and the largest input can give, scales as the logarithm of how they changed (Jain et al. 2020, "Trained
Quantization Thresholds", section 4.2), which also keeps them above 0. All start at 0, where the hub is as it came.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from deploykit.hub.graph import Hub
from deploykit.hub.operators import PRODUCTS
from deploykit.hub.quantize import BIAS_LIMIT, round_bias
from deploykit.hub.training.fake_quant import fake_quantize
from deploykit.hub.training.graph import (
    Held,
    Node,
    along,
    as_tensor,
    held_by,
    key,
    learnable_scales,
    limits,
    read_nodes,
)
from deploykit.hub.training.operators import MEANING, refuse_untrainable

PARAMETER_READERS = frozenset({*PRODUCTS, "LayerNormalization", "Add", "Mul"})


class HubModule(nn.Module):
    """Runs a hub in torch; called with inputs by name, returns outputs by name.

    Args:
        hub: with a quantized graph; not changed.
        learn_scales: whether scales are parameters too, of activations and of weights. Those that integer kernels want
            as they are stay: outputs of softmax and its like, powers of two.
        piece: a part of the Q/DQ graph to run instead of the whole; inputs that it has as integers are given as such.

    Raises:
        DeploykitError: operators without a meaning in torch (all of them are named).
    """

    def __init__(self, hub: Hub, learn_scales: bool = False, piece: onnx.ModelProto | None = None) -> None:
        """Builds parameters and constants from the hub."""
        super().__init__()
        self.hub = hub
        graph = (piece or onnx.load_model_from_string(hub.bytes)).graph
        self.nodes = read_nodes(graph)
        refuse_untrainable((n.operator for n in self.nodes), "the hub")
        self.outputs = [o.name for o in graph.output]
        arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        self.limits = {n.outputs[0]: limits(arrays[n.inputs[2]]) for n in self.nodes if n.operator == "QuantizeLinear"}
        self.held = held_by(self.nodes, arrays)
        self.move = nn.ParameterDict()
        """How far weights and biases have moved, in their units."""
        self.log_scale = nn.ParameterDict()
        """ln(scale / scale as it came): one number, or one per channel."""
        self.free = self._float_parameters(arrays)
        self._integer_parameters(arrays)
        stored = {held.stored for held in self.held.values()}
        self.constants = [n for n in arrays if n not in stored and n not in self.free]
        for name in self.constants:
            self._buffer(name, arrays[name])
        self.learned = learnable_scales(self.nodes, arrays, self.held, hub.spec) if learn_scales else []
        for name in self.learned:
            one = hub.spec.weight_granularity == "tensor"
            self.log_scale[key(name)] = nn.Parameter(torch.zeros(() if one else arrays[name].shape))

    def _float_parameters(self, arrays: Mapping[str, Any]) -> list[str]:
        """Adds weights of layers that stayed in float, float biases, normalisation; their names."""
        readers = {i for n in self.nodes if n.operator in PARAMETER_READERS for i in n.inputs}
        found = [n for n, a in arrays.items() if n in readers and a.dtype == np.float32 and a.ndim >= 1]
        for name in found:
            finite = np.abs(arrays[name][np.isfinite(arrays[name])])  # a mask may hold -inf
            self._parameter(name, arrays[name], np.float32(min(finite.max(initial=0.0) or 1.0, 1.0)), name)
        return found

    def _integer_parameters(self, arrays: Mapping[str, Any]) -> None:
        """Adds the floats behind integers."""
        spec, initializers = self.hub.spec, self.hub.graph.model.graph.initializers
        floats = {name: v.const_value.numpy() for name, v in initializers.items() if v.const_value}
        for output, held in self.held.items():
            origin, stored = self.hub.weights.get(held.stored, ""), arrays[held.stored]
            scale = along(arrays[held.scale], stored.ndim, held.axis)
            if held.is_bias:
                start = stored * scale.astype(np.float64)
                largest = self._top(self.held[held.weight]) * (spec.activation_range[1] - spec.activation_range[0])
            else:
                largest = self._top(held)
                start = _behind(stored, scale, floats.get(origin), largest)
            self._parameter(output, start.astype(np.float32), np.float32(largest) * scale, origin)

    def _parameter(self, name: str, start: Any, unit: Any, origin: str) -> None:
        self.move[key(name)] = nn.Parameter(torch.zeros(start.shape))
        self._buffer(f"{name}.start", start)
        self._buffer(f"{name}.unit", unit)
        if origin in self.hub.graph.masks:
            self._buffer(f"{name}.mask", self.hub.graph.masks[origin])

    def _buffer(self, name: str, array: Any) -> None:
        self.register_buffer(key(name), as_tensor(array), persistent=False)

    def _top(self, held: Held) -> int:
        return self.hub.spec_of(held.stored).weight_max

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Outputs by name for inputs by name, each ``[n, ...]`` float32."""
        values: dict[str, Any] = {"": None, **inputs}
        values.update({name: self.constant(name) for name in self.constants})
        values.update({name: self.parameter(name) for name in self.free})
        for node in self.nodes:
            arguments: list[Any] = [values.get(n) for n in node.inputs]
            if node.operator == "QuantizeLinear":  # the real numbers at once: DequantizeLinear has nothing left to do
                x, scale, _ = arguments
                found: Any = fake_quantize(x, scale, *self.limits[node.outputs[0]], x[:1].numel())
            elif node.operator == "DequantizeLinear":
                found = self._dequantized(node, *arguments)
            else:
                found = MEANING[node.operator](node.attributes, *arguments)
            for name, value in zip(node.outputs, found if isinstance(found, tuple) else (found,), strict=False):
                values[name] = value
        return {name: values[name] for name in self.outputs}

    def _dequantized(self, node: Node, x: Any, scale: Any, zero: Any = None) -> Tensor:
        if node.outputs[0] in self.held:
            return self.weight(node.outputs[0])
        if node.inputs[0] in self.limits:
            return x  # type: ignore[no-any-return]
        axis = node.attributes.get("axis", 1)
        steps = x.float() if zero is None else x.float() - along(zero.float(), x.ndim, axis)
        return steps * along(scale, x.ndim, axis)  # type: ignore[no-any-return]

    def constant(self, name: str) -> Tensor:
        """A constant of the graph; a scale that is learned, as it is now."""
        value: Tensor = getattr(self, key(name))
        return value * self.log_scale[key(name)].exp() if name in self.learned else value

    def parameter(self, name: str) -> Tensor:
        """The float behind a weight or bias, its zeros held."""
        start, unit = getattr(self, key(f"{name}.start")), getattr(self, key(f"{name}.unit"))
        v: Tensor = start + unit * self.move[key(name)]
        mask = getattr(self, key(f"{name}.mask"), None)
        return v if mask is None else v * mask

    def scale(self, output: str) -> Tensor:
        """Of a weight or bias, as it is now; a weight's is never so small that a bias saturates."""
        held = self.held[output]
        if held.is_bias and self.learned:
            sums = self.constant(held.input_scale) * self.scale(held.weight)
            return sums.repeat(self.move[key(output)].numel() // sums.numel())
        s = self.constant(held.scale)
        if held.scale not in self.learned:
            return s
        with torch.no_grad():
            least = torch.full_like(s, self.hub.spec.weight_scale_floor)
            for name, bias in self.held.items():
                if bias.weight == output:
                    b = self.parameter(name).abs().reshape(-1, s.numel()).amax(0)
                    least = torch.maximum(least, b / (self.constant(bias.input_scale) * BIAS_LIMIT))
            if self.hub.spec.weight_granularity == "tensor":
                least = least.max().expand_as(least)
        return torch.maximum(s, least)

    def weight(self, output: str) -> Tensor:
        """What the device multiplies with or adds: integers times scale."""
        held, v = self.held[output], self.parameter(output)
        s = along(self.scale(output), v.ndim, held.axis)
        if held.is_bias:
            return fake_quantize(v, s.detach(), -(2.0**31), 2.0**31, 1)
        top = self._top(held)
        return fake_quantize(v, s, -top, top, v.numel() // s.numel())

    def trained(self) -> dict[str, Any]:
        """The initializers as they are now, by name: those that training may have changed."""
        found: dict[str, Any] = {}
        with torch.no_grad():
            found |= {name: self.constant(name).numpy() for name in self.learned}
            for output, held in self.held.items():
                s, v = self.scale(output), self.parameter(output)
                if held.is_bias:
                    stored = round_bias(v.numpy(), s.numpy())
                else:
                    stored = (self.weight(output) / along(s, v.ndim, held.axis)).round().numpy().astype(np.int8)
                found |= {held.stored: stored, held.scale: s.numpy()}
            found |= {name: self.parameter(name).numpy() for name in self.free}
        return found

    def to_hub(self) -> Hub:
        """The hub with the trained weights, biases and scales; structure unchanged."""
        model = onnx.load_model_from_string(self.hub.bytes)
        tensors = {t.name: t for t in model.graph.initializer}
        for name, array in self.trained().items():
            tensors[name].CopyFrom(onnx.numpy_helper.from_array(np.array(array, order="C"), name))
        return replace(self.hub, quantized=ir.from_proto(model))


def _behind(stored: Any, scale: Any, original: Any, top: int) -> Any:
    """The float weight where it rounds to the hub's integer, the integer's value where some step chose another."""
    value = stored.astype(np.float64) * scale
    if original is not None and original.shape == stored.shape:
        steps = np.rint(original / scale)  # float32, as the forward pass will round
        value = np.where(np.clip(steps, -top, top) == stored, original, value)
    return value
