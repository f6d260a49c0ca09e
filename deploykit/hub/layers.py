"""The products of a hub (convolutions, Gemm, MatMul with constant weights) as steps see them: where integers are kept,
what stood there in float, and the product as a matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from deploykit.calibration.observe import channel_mean
from deploykit.hub.operators import PRODUCTS, channel_axis
from deploykit.hub.quantize import BIAS_LIMIT
from deploykit.hub.running import session

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deploykit.hub.slices import Slicer


@dataclass(frozen=True)
class Layer:
    """One product with an integer input and integer weights."""

    node: onnx.NodeProto
    x: str
    """The integer tensor it reads (a QuantizeLinear output). In 8-bit floating point, of which ONNX Runtime's Python
    side makes no arrays, the real values behind it."""
    y: str
    """What its output, bias included, is called in the float graph."""
    weight: str
    """Initializer of its integer weight."""
    weight_scale: str
    """Initializer of the weight's scale: ``[channels]``, or one number."""
    holder: onnx.NodeProto | None
    """The node that reads its bias: itself, or the Add behind a MatMul; None: there is no bias."""
    bias: str
    """The bias: int32 or float32 initializer; empty where there is none."""
    bias_scale: str
    """Initializer of the bias's scale; empty where the bias is float."""

    @property
    def name(self) -> str:
        """Of the node."""
        return str(self.node.name)


def layers(slicer: Slicer) -> list[Layer]:
    """Every product of a Q/DQ model with integer input and weights, in order."""
    return [layer for node in slicer.model.graph.node if (layer := _layer(node, slicer)) is not None]


def float_layers(slicer: Slicer) -> list[Layer]:
    """Every product of a float32 model with a constant weight that has a `MatrixForm`, in order.

    ``x`` is what it reads, and there are no scales. A bias that others read too is none of its own. Products of what
    does not depend on the model's inputs are left out.
    """
    reads = Counter(name for node in slicer.model.graph.node for name in node.input)
    found = []
    for node in slicer.model.graph.node:
        if node.op_type in PRODUCTS and [name in slicer.initializers for name in node.input[:2]] == [False, True]:
            (x, weight), (holder, bias) = node.input[:2], _bias(node, slicer)
            shape = slicer.array(weight).shape
            if slicer.array(weight).dtype == np.float32 and has_form(node, shape) and slicer.boundary([x], ()):
                channels = MatrixForm.of_node(node, shape).channels
                held = slicer.array(bias) if bias in slicer.initializers and reads[bias] == 1 else None
                own = held is not None and held.shape[-1:] == (channels,) and held.size == channels
                found.append(Layer(node, x, (holder or node).output[0], weight, "", holder, bias if own else "", ""))
    return found


def has_form(node: onnx.NodeProto, shape: tuple[int, ...]) -> bool:
    """Whether there is a `MatrixForm` of a product with a weight of that shape."""
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "MatMul":
        return len(shape) == 2
    return not values.get("transA", 0) and values.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")


def _layer(node: onnx.NodeProto, slicer: Slicer) -> Layer | None:
    if node.op_type not in PRODUCTS:
        return None
    x, w = (_dequantizer(name, slicer) for name in node.input[:2])
    if x is None or w is None or x.input[0] not in slicer.producer or w.input[0] not in slicer.initializers:
        return None
    holder, bias = _bias(node, slicer)
    dequantizer = _dequantizer(bias, slicer)
    output = (holder or node).output[0]
    y = str(slicer.renamed.get(output, output))
    stored, scale = (bias, "") if dequantizer is None else (dequantizer.input[0], dequantizer.input[1])
    is_float8 = slicer.initializers[w.input[0]].data_type == onnx.TensorProto.FLOAT8E4M3FN
    return Layer(node, x.output[0] if is_float8 else x.input[0], y, w.input[0], w.input[1], holder, stored, scale)


def _dequantizer(name: str, slicer: Slicer) -> onnx.NodeProto | None:
    found = slicer.producer.get(name)
    return found if found is not None and found.op_type == "DequantizeLinear" else None


def _bias(node: onnx.NodeProto, slicer: Slicer) -> tuple[onnx.NodeProto | None, str]:
    """Who reads a product's bias, and under which name."""
    if node.op_type != "MatMul":
        return (node, node.input[2]) if len(node.input) > 2 else (None, "")
    readers = [n for n in slicer.model.graph.node if node.output[0] in n.input]
    if len(readers) != 1 or readers[0].op_type != "Add":
        return None, ""
    other = next((name for name in readers[0].input if name != node.output[0]), "")
    dequantizer = _dequantizer(other, slicer)
    held = dequantizer.input[0] if dequantizer is not None else other
    weight = node.input[1] if node.input[1] in slicer.initializers else slicer.producer[node.input[1]].input[0]
    width = slicer.array(weight).shape[-1]
    if held not in slicer.initializers or slicer.array(held).size != width:
        return None, ""
    return readers[0], other


def mean_output(slicer: Slicer, layer: Layer, mean_x: NDArray[np.float32]) -> NDArray[np.float64]:
    """E[W_q x_q + b] per channel ``[c]``, from the mean input, ``[1, ...]`` or ``[features]``: a layer is linear."""
    output = (layer.holder or layer.node).output[0]
    model = slicer.cut([output], [layer.node.input[0]])
    (y,) = session(model, optimize=False).run(None, {layer.node.input[0]: as_entered(mean_x, model)})
    return channel_mean(y, channel_axis(layer.node.op_type)).astype(np.float64)


def as_entered(mean_x: NDArray[np.float32], model: onnx.ModelProto) -> NDArray[np.float32]:
    """A mean as a piece of a graph takes it: features are the same at every position of a shape that may be fixed."""
    if mean_x.ndim > 1:
        return mean_x
    sizes = model.graph.input[0].type.tensor_type.shape.dim
    return np.broadcast_to(mean_x, [*(d.dim_value or 1 for d in sizes[:-1]), len(mean_x)])


def shift_bias(slicer: Slicer, layer: Layer, delta: NDArray[np.float64]) -> None:
    """Adds ``delta`` [c] to a layer's bias, in its integer steps where it has them."""
    held = slicer.array(layer.bias)
    if not layer.bias_scale:
        slicer.set_array(layer.bias, (held + delta.reshape(held.shape)).astype(held.dtype))
        return
    steps = held + np.rint(delta / slicer.array(layer.bias_scale).astype(np.float64))
    slicer.set_array(layer.bias, np.clip(steps, -BIAS_LIMIT, BIAS_LIMIT).astype(np.int32))


@dataclass(frozen=True)
class MatrixForm:
    """A product as ``y = W x`` at every output position: W is ``[g, o, k]``, x ``[g, k, n]``, y ``[g, o, n]``.

    g are the groups of a convolution (the channels of a depthwise one), o the outputs and k the inputs of one group,
    n positions (of all samples). Convolutions have no padding value but zero, the real zero of their input.
    """

    operator: str
    attributes: Mapping[str, Any]
    shape: tuple[int, ...]
    """Of the weight."""

    @staticmethod
    def of(layer: Layer, shape: tuple[int, ...]) -> MatrixForm:
        """The form of a layer whose weight has that shape. There is none for ConvTranspose."""
        return MatrixForm.of_node(layer.node, shape)

    @staticmethod
    def of_node(node: onnx.NodeProto, shape: tuple[int, ...]) -> MatrixForm:
        """The same, by its node."""
        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        return MatrixForm(node.op_type, values, shape)

    @property
    def group(self) -> int:
        """How many products stand side by side."""
        return int(self.attributes.get("group", 1)) if self.operator == "Conv" else 1

    @property
    def channels(self) -> int:
        """How many outputs there are at a position."""
        return self.shape[-1] if self._transposed() else self.shape[0]

    @property
    def inputs_per_output(self) -> int:
        """k."""
        return prod(self.shape[1:]) if self.operator == "Conv" or not self._transposed() else self.shape[0]

    def _transposed(self) -> bool:
        return self.operator == "MatMul" or (self.operator == "Gemm" and not self.attributes.get("transB", 0))

    def matrix(self, weight: NDArray[Any]) -> NDArray[Any]:
        """``[g, o, k]`` of a weight as it is stored."""
        rows = weight.T if self._transposed() else weight
        return rows.reshape(self.group, len(rows) // self.group, -1)

    def weight(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """The weight as it is stored, of ``[g, o, k]``."""
        rows = matrix.reshape(-1, matrix.shape[-1])
        return np.ascontiguousarray(rows.T if self._transposed() else rows.reshape(self.shape))

    def per_input(self, channels: NDArray[Any]) -> NDArray[Any]:
        """``[g, k, 1]`` of one number per input channel."""
        kernel = prod(self.shape[2:]) if self.operator == "Conv" else 1
        return np.repeat(channels, kernel).reshape(self.group, -1, 1)

    @property
    def images(self) -> bool:
        """Whether positions are those of every sample's image (convolutions), not rows of a batch."""
        return self.operator == "Conv"

    def positions(self, y: tuple[int, ...]) -> int:
        """How many output positions there are, from the shape of a batch's output: of each image, or all rows."""
        return prod(y[2:]) if self.images else prod(y[:-1])

    def outputs(self, y: NDArray[Any]) -> NDArray[Any]:
        """``[g, o, n]``, from a batch's output at some positions: of images ``[samples, channels, positions]``, or rows
        ``[positions, channels]``."""
        channels = y.swapaxes(0, 1).reshape(y.shape[1], -1) if self.images else y.T
        return channels.reshape(self.group, -1, channels.shape[1])

    def inputs(self, x: NDArray[Any], y: tuple[int, ...], chosen: NDArray[np.int64], padding: float) -> NDArray[Any]:
        """``[g, k, n]``: what a batch's output is computed from at some positions, ordered as `outputs` are.

        Args:
            x: the batch's input.
            y: shape of its output.
            chosen: positions in the output.
            padding: what stands beyond the border of x.
        """
        if not self.images:
            return np.ascontiguousarray(x.reshape(-1, x.shape[-1])[chosen].T)[None]
        kernel = self.shape[2:]
        rank = len(kernel)
        strides = self.attributes.get("strides") or [1] * rank
        dilations = self.attributes.get("dilations") or [1] * rank
        pads = self.attributes.get("pads") or [0] * (2 * rank)
        sides = [(0, 0), (0, 0), *((pads[i], pads[rank + i]) for i in range(rank))]
        images = np.pad(x, sides, constant_values=padding) if any(pads) else x
        corner = np.unravel_index(chosen, y[2:])
        offset = np.unravel_index(np.arange(prod(kernel)), kernel)
        where = [corner[i][None, :] * strides[i] + offset[i][:, None] * dilations[i] for i in range(rank)]
        flat = np.ravel_multi_index(where, images.shape[2:])  # [kernel, positions]
        patches = images.reshape(*images.shape[:2], -1)[:, :, flat]  # [samples, channels, kernel, positions]
        return patches.transpose(1, 2, 0, 3).reshape(self.group, -1, len(x) * len(chosen))
