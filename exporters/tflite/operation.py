"""`Operation`: one ONNX operator on its way into the file, with what a translation rule needs to write it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf, prod
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from deploykit.exporters import layout
from deploykit.exporters.layout import Order, View
from deploykit.exporters.one_sample import Limits, Unsupported, counted_axis, parameter, static_shape
from deploykit.hub.graph import attribute, constant

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deploykit.exporters.tflite.writer import Quant, Tensor, Writer

FUSED_ACTIVATION: dict[Limits, str] = {(0.0, inf): "RELU", (0.0, 6.0): "RELU6", (-1.0, 1.0): "RELU_N1_TO_1"}
HALF_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Constant:
    """A constant operand: float32 values, or integers (int8, int16, int32) with their quantization.

    Axes are in ONNX's order.
    """

    values: NDArray[Any]
    quant: Quant | None = None

    @property
    def real(self) -> NDArray[np.float32]:
        """The values as float32."""
        if self.quant is None:
            return self.values.astype(np.float32)
        shape = [-1 if i == self.quant.axis else 1 for i in range(self.values.ndim)]
        scales = np.array(self.quant.scales, np.float32)
        scales = scales.reshape(shape) if scales.size > 1 else scales[0]
        return ((self.values.astype(np.int32) - self.quant.zero_point).astype(np.float32) * scales).astype(np.float32)


@dataclass(frozen=True)
class Operation:
    """An operator with its operands: all integers where ``quant`` is set, otherwise all float32."""

    node: ir.Node
    name: str
    """What the result is called."""
    writer: Writer
    operands: tuple[View | Constant | None, ...]
    quant: Quant | None = None
    """Of the result."""
    limits: Limits | None = None
    """Of the Relu or Clip that runs together with this operator."""
    half: bool = False
    """Float weights are stored as float16."""
    dynamic: bool = False
    """Products in float read integer weights as they are, and their kernels round what is multiplied with them."""

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute of the ONNX node."""
        return attribute(self.node, name, default)

    def parameter(self, index: int) -> NDArray[Any] | None:
        """The constant behind an input that is a shape, axes, limits; None where it is left out.

        Raises:
            Unsupported: it is computed while the model runs.
        """
        return parameter(self.node, index)

    def parameter_or_none(self, index: int) -> NDArray[Any] | None:
        """The constant behind an input; None where it is computed."""
        return constant(self.node.inputs[index])

    def axis(self, axis: int) -> int:
        """An axis of operand 0, counted from the front.

        Raises:
            Unsupported: it is the batch, of which the file holds one sample.
        """
        return counted_axis(self.node, axis, len(self.shape(0)))

    def shape(self, index: int) -> tuple[int, ...]:
        """The ONNX shape of an operand, batch 1."""
        operand = self.operands[index]
        assert operand is not None
        return operand.shape if isinstance(operand, View) else tuple(operand.values.shape)

    def output_shape(self, index: int = 0) -> tuple[int, ...]:
        """The ONNX shape of a result, batch 1."""
        return static_shape(self.node.outputs[index])

    def view(self, index: int) -> View:
        """An operand as it is stored; a constant one is stored in ONNX order."""
        operand = self.operands[index]
        assert operand is not None
        if isinstance(operand, View):
            return operand
        return layout.stored(self.constant(index), self.shape(index), layout.identity(len(self.shape(index))))

    def natural(self, index: int) -> Order:
        """An order of an operand's axes that costs nothing, or ONNX's own."""
        return layout.natural(self.view(index)) or layout.identity(len(self.shape(index)))

    def read(self, index: int, order: Order) -> Tensor:
        """An operand with its axes stored in ``order``."""
        return read(self.writer, self.view(index), order)

    def constant(
        self,
        index: int,
        arrange: Callable[[NDArray[Any]], NDArray[Any]] = np.asarray,
        axis: int = 0,
        narrow: bool = False,
    ) -> Tensor:
        """A constant operand's stored tensor.

        Args:
            index: position of the operand.
            arrange: from ONNX's order of the axes to the stored one.
            axis: the stored axis that per-channel scales belong to.
            narrow: LiteRT's kernel reads it from 4 bits too, and as integers beside floats.
        """
        operand = self.operands[index]
        if not isinstance(operand, Constant):
            raise Unsupported(f"its input {index} is computed at run time; only constant weights can be written")
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        name = (value.name if value is not None else None) or f"{self.name}.{index}"
        if operand.quant is None or (operand.values.dtype not in (np.int8, np.int16) and self.quant is None):
            return self.float_constant(name, arrange(operand.real))
        quant = replace(operand.quant, axis=axis)
        if quant.dtype == "int4" and not (narrow and self.quant is not None and self.quant.dtype == "int8"):
            quant = replace(quant, dtype="int8")
        stored = self.writer.constant(name, arrange(operand.values), quant)
        if self.quant is not None or (self.dynamic and narrow and axis == 0):  # depthwise: XNNPACK has no such kernel
            return stored
        return self.writer.write("DEQUANTIZE", [stored], f"{name}_real", stored.shape)

    def float_constant(self, name: str, values: NDArray[np.float32]) -> Tensor:
        """Float weights, as the file stores them."""
        if not self.half:
            return self.writer.constant(name, values.astype(np.float32))
        if np.abs(values).max(initial=0) > HALF_MAX:
            raise Unsupported(f"'{name}' holds values above {HALF_MAX:.0f}, the largest float16; leave fp16 out")
        stored = self.writer.constant(f"{name}_half", values.astype(np.float16))
        return self.writer.write("DEQUANTIZE", [stored], name, values.shape)

    def emit(
        self,
        kind: str,
        inputs: Sequence[Tensor],
        shape: tuple[int, ...],
        order: Order,
        fuses: bool = False,
        **options: Any,
    ) -> View:
        """Writes the operator that makes the result, within the limits it has to keep.

        Args:
            kind: builtin operator.
            inputs: its tensors.
            shape: ONNX shape of the result.
            order: in which its axes are stored.
            fuses: the operator has a fused activation.
            options: by the schema's names.
        """
        left = uncovered(self.limits, self.quant)
        if fuses:
            fused = FUSED_ACTIVATION.get(self.limits, "NONE") if self.limits else "NONE"
            options["fusedActivationFunction"] = fused
            left = left if fused == "NONE" else None
        made = self.writer.write(kind, inputs, self.name, layout.permuted(shape, order), self.quant, **options)
        if left is not None:
            made = limit(self.writer, made, left)
        return layout.stored(made, shape, order)

    def elementwise(self, kind: str, quant: Quant | None = None, **options: Any) -> View:
        """Writes an operator on the one operand, however that is arranged."""
        view = self.view(0)
        return view.on(self.writer.write(kind, [view.tensor], self.name, view.tensor.shape, quant, **options))


def read(writer: Writer, view: View, order: Order) -> Tensor:
    """The stored tensor of a view with its axes in ``order``; elements move only where they have to."""
    tensor, shape = view.tensor, layout.permuted(view.shape, order)
    if layout.arrangement(view, order) != view.order:
        now = layout.natural(view)
        if now is not None and tensor.shape == layout.permuted(view.shape, now):
            taken, axes = tensor.shape, tuple(now.index(a) for a in order)
        else:
            taken, axes = layout.movement(view, order)
        tensor = as_shape(writer, tensor, taken)
        name = f"{view.tensor.name}_transposed"
        indices = writer.indices(f"{name}_axes", axes)
        shape_now = [taken[a] for a in axes]
        tensor = writer.write("TRANSPOSE", [tensor, indices], name, shape_now, tensor.quant, dtype=tensor.dtype)
    return as_shape(writer, tensor, shape)


def canonical(writer: Writer, view: View) -> View:
    """The view of the same ONNX tensor with its elements stored in ONNX's order."""
    order = layout.identity(len(view.shape))
    made = layout.stored(read(writer, view, order), view.shape, order)
    return replace(made, factors=(prod(view.shape),), order=(0,)) if made.factors else made


def as_shape(writer: Writer, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The same elements under another stored shape."""
    if tensor.shape == shape:
        return tensor
    name = f"{tensor.name}_reshaped"
    indices = writer.indices(f"{name}_shape", shape)
    return writer.write(
        "RESHAPE", [tensor, indices], name, shape, tensor.quant, dtype=tensor.dtype, newShape=list(shape)
    )


def requantize(writer: Writer, tensor: Tensor, quant: Quant, name: str) -> Tensor:
    """The tensor under another scale: QUANTIZE from float32, or from integers with rescaling."""
    return tensor if tensor.quant == quant else writer.write("QUANTIZE", [tensor], name, tensor.shape, quant)


def uncovered(limits: Limits | None, quant: Quant | None) -> Limits | None:
    """The limits that still have to be kept: integers saturate, so those at or beyond their ends are kept already.

    Rounding is monotonic, so limiting the integers at the rounded limits is the same as limiting before rounding.
    """
    if limits is None or quant is None:
        return limits
    (low, high), (bottom, top) = limits, quant.ends
    if low == -inf or quant.to_integer(low) <= bottom:
        low = -inf
    if high == inf or quant.to_integer(high) >= top:
        high = inf
    return None if (low, high) == (-inf, inf) else (low, high)


def limit(writer: Writer, tensor: Tensor, limits: Limits) -> Tensor:
    """Writes the operators that keep a tensor within limits; its quantization stays."""
    low, high = limits
    activation = {(0.0, inf): "RELU", (0.0, 6.0): "RELU6"}.get(limits)
    if activation:
        return writer.write(activation, [tensor], f"{tensor.name}_limited", tensor.shape, tensor.quant)
    for kind, bound in (("MAXIMUM", low), ("MINIMUM", high)):
        if abs(bound) == inf:
            continue
        if tensor.quant is None:
            values: NDArray[Any] = np.array([bound], np.float32)
        else:
            values = np.array([np.clip(tensor.quant.to_integer(bound), *tensor.quant.ends)], tensor.quant.dtype)
        held = writer.constant(f"{tensor.name}_{kind.lower()}", values, tensor.quant)
        tensor = writer.write(kind, [tensor, held], f"{tensor.name}_limited", tensor.shape, tensor.quant)
    return tensor
