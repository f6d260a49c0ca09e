"""`Operation`: one ONNX operator on its way into the program, with what a rule needs to lower it."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf, prod
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from deploykit.exporters import layout
from deploykit.exporters.c99 import program
from deploykit.exporters.c99.program import Quant, Shape, Tensor
from deploykit.exporters.c99.rounding import Rescale, Rounding, folded_half, rescaling
from deploykit.exporters.layout import Order, View
from deploykit.exporters.one_sample import Unsupported, counted_axis, parameter, static_shape
from deploykit.hub.graph import attribute, take_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOWEST, HIGHEST = -128, 127


@dataclass(frozen=True)
class Constant:
    """A constant operand: float32 values, or integers with their scales. Axes in ONNX order."""

    values: NDArray[Any]
    scales: NDArray[np.float32] | None = None
    """One, or one per index of ``axis``; None for float values."""
    zero_point: int = 0
    axis: int = 0

    @property
    def real(self) -> NDArray[np.float32]:
        """The values as float32."""
        if self.scales is None:
            return self.values.astype(np.float32)
        shape = [-1 if i == self.axis and self.scales.size > 1 else 1 for i in range(self.values.ndim)]
        scales = self.scales.reshape(shape) if self.values.ndim else self.scales[0]
        return np.asarray((self.values.astype(np.int32) - self.zero_point).astype(np.float32) * scales, np.float32)


@dataclass(frozen=True)
class Curve:
    """A float function of one int8 tensor that nobody computes at run time: its value for each of the 256 integers."""

    view: View[Tensor]
    values: NDArray[np.float32]
    """``[256, channels]``, for -128 .. 127; one column where all channels have the same function."""
    axis: int = 0
    """The ONNX axis of the channels, where there are several."""


@dataclass
class Builder:
    """The program as far as it has been lowered."""

    rounding: Rounding
    layer: str = ""
    """The operator that is being lowered, under the name its user knows."""
    operations: list[program.Operation] = field(default_factory=list)
    names: set[str | None] = field(default_factory=set)

    def tensor(self, name: str, shape: Shape, quant: Quant, data: NDArray[np.int8] | None = None) -> Tensor:
        """A new tensor under a name of its own."""
        return Tensor(take_name(name, self.names), shape, quant, data)

    def read(self, view: View[Tensor], order: Order) -> Tensor:
        """The tensor of a view with its axes stored in ``order``; elements move only where they have to."""
        if layout.arrangement(view, order) == view.order:
            return view.tensor
        taken, axes = layout.movement(view, order)
        x = view.tensor
        y = self.tensor(f"{x.name}_transposed", layout.permuted(view.shape, order), x.quant)
        self.operations.append(program.Transpose(self.layer, x, y, taken, axes))
        return y

    def table(self, curve: Curve, quant: Quant, name: str) -> View[Tensor]:
        """The curve, quantized."""
        view, channels = curve.view, curve.values.shape[1]
        found = np.clip(quant.integer(curve.values), LOWEST, HIGHEST).astype(np.int8).T
        if quant == view.tensor.quant and np.array_equal(found, np.arange(LOWEST, HIGHEST + 1)[None]):
            return view
        inner = 1
        if channels > 1:
            order = layout.natural(view)
            if order is None:
                order = layout.identity(len(view.shape))
                view = layout.stored(self.read(view, order), view.shape, order)
            inner = prod(view.shape[a] for a in order[order.index(curve.axis) + 1 :])
        x = view.tensor
        y = self.tensor(name, x.shape, quant)
        self.operations.append(program.Table(self.layer, x, y, np.ascontiguousarray(found), inner))
        return view.on(y)


@dataclass(frozen=True)
class Operation:
    """An operator whose operands are all integer."""

    node: ir.Node
    name: str
    """What the result is called."""
    builder: Builder
    operands: tuple[View[Tensor] | Constant | None, ...]
    quant: Quant
    """Of the result."""
    limits: tuple[float, float] = (-inf, inf)
    """Smallest and largest real value that the fused Relu or Clip lets through."""

    @property
    def layer(self) -> str:
        """The operator's own name. What it is fused with has the result, and so its name, but not the weights."""
        return self.builder.layer

    @property
    def clamp(self) -> tuple[int, int]:
        """The limits as integers. Rounding is monotonic, so limiting the integers is limiting before rounding."""
        low, high = (
            bound if abs(limit) == inf else min(max(int(self.quant.integer(limit)), LOWEST), HIGHEST)
            for limit, bound in zip(self.limits, (LOWEST, HIGHEST), strict=True)
        )
        return low, high

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute of the ONNX node."""
        return attribute(self.node, name, default)

    def parameter(self, index: int) -> NDArray[Any] | None:
        """The constant behind an input that is a shape, axes, limits; None where it is left out.

        Raises:
            Unsupported: it is computed while the model runs.
        """
        return parameter(self.node, index)

    def axis(self, axis: int) -> int:
        """An axis of operand 0, counted from the front.

        Raises:
            Unsupported: it is the batch, of which a program holds one sample.
        """
        return counted_axis(self.node, axis, len(self.shape(0)))

    def shape(self, index: int) -> Shape:
        """The ONNX shape of an operand, batch 1."""
        operand = self.operands[index]
        assert operand is not None
        return operand.shape if isinstance(operand, View) else tuple(operand.values.shape)

    def output_shape(self, index: int = 0) -> Shape:
        """The ONNX shape of a result, batch 1."""
        return static_shape(self.node.outputs[index])

    def view(self, index: int) -> View[Tensor]:
        """An operand as it is stored; a constant becomes a tensor in ONNX order."""
        operand = self.operands[index]
        assert operand is not None
        if isinstance(operand, View):
            return operand
        if operand.scales is None or operand.scales.size > 1 or operand.values.dtype != np.int8:
            raise Unsupported(f"its constant input {index} has no scale of its own")
        quant = Quant(float(operand.scales[0]), operand.zero_point)
        data = np.ascontiguousarray(operand.values)
        held = self.builder.tensor(f"{self.name}_constant", data.shape, quant, data)
        return layout.stored(held, data.shape, layout.identity(data.ndim))

    def natural(self, index: int) -> Order:
        """An order of an operand's axes that costs nothing, or ONNX's own."""
        return layout.natural(self.view(index)) or layout.identity(len(self.shape(index)))

    def read(self, index: int, order: Order) -> Tensor:
        """An operand with its axes stored in ``order``."""
        return self.builder.read(self.view(index), order)

    def weights(self, index: int) -> Constant:
        """A constant operand in integers.

        Raises:
            Unsupported: it is computed at run time, or is float.
        """
        operand = self.operands[index]
        if not isinstance(operand, Constant):
            raise Unsupported("both its inputs are computed at run time; it needs constant weights")
        if operand.scales is None:
            raise Unsupported("its weights are float")
        return operand

    def result(self, shape: Shape, order: Order) -> tuple[Tensor, View[Tensor]]:
        """The tensor to be written, and the view of it as an ONNX tensor of ``shape``."""
        y = self.builder.tensor(self.name, layout.permuted(shape, order), self.quant)
        return y, layout.stored(y, shape, order)

    def rescaling(self, factors: NDArray[np.float64] | float) -> tuple[Rescale, NDArray[np.int64]]:
        """Factors in integer form, and the half that goes into the sum before rescaling.

        Raises:
            Unsupported: the rounding mode cannot express them.
        """
        try:
            found = rescaling(factors, self.builder.rounding)
        except ValueError as error:
            raise Unsupported(str(error)) from None
        return found, folded_half(found, self.builder.rounding)

    def emit(self, operation: program.Operation) -> None:
        """Adds an operation to the program."""
        self.builder.operations.append(operation)


def require_room(largest: NDArray[np.int64] | int, rescale: Rescale) -> None:
    """Sums of that size, and shifted left where the factor asks for it, have to stay within 32 bits.

    Raises:
        Unsupported: they can leave them.
    """
    reached = np.asarray(largest, np.int64) << np.maximum(-rescale.shift.astype(np.int64), 0)
    if reached.max() >= 2**31:
        raise Unsupported(
            f"its sums can reach {reached.max():.2e}, more than 32 bits hold; split the layer in two, or give its "
            "output a larger range (other calibration data or thresholds)"
        )


def elements(shape: Shape) -> int:
    """Number of elements."""
    return prod(shape)
