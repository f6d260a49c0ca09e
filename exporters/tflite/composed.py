"""ONNX operators that LiteRT has no operator for, or none in the same form: written as several, in float."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.exporters import layout
from deploykit.exporters.layout import Order, View, identity, permuted, stored
from deploykit.exporters.one_sample import Unsupported
from deploykit.exporters.tflite.operation import Constant, Operation
from deploykit.exporters.tflite.writer import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Steps:
    """Writes float operators one after the other under the name of the ONNX operator they make up."""

    op: Operation

    def __call__(self, kind: str, *inputs: Tensor, shape: Sequence[int] | None = None, **options: Any) -> Tensor:
        """One operator; its result has the shape of its inputs broadcast, where none is given."""
        made = tuple(np.broadcast_shapes(*(t.shape for t in inputs))) if shape is None else tuple(shape)
        return self.op.writer.write(kind, inputs, f"{self.op.name}.{kind.lower()}", made, **options)

    def number(self, value: float) -> Tensor:
        """A number."""
        return self.op.writer.constant(f"{self.op.name}.number", np.asarray([value], np.float32))

    def reduced(self, kind: str, x: Tensor, axes: Sequence[int]) -> Tensor:
        """MEAN or SUM over axes, which stay as axes of size 1."""
        indices = self.op.writer.indices(f"{self.op.name}.axes", sorted(axes))
        shape = [1 if i in axes else size for i, size in enumerate(x.shape)]
        return self(kind, x, indices, shape=shape, keepDims=True)

    def parameter(self, index: int, order: Order, shape: tuple[int, ...]) -> Tensor:
        """A constant operand that is broadcast against ``shape``, stored in ``order``."""
        operand = self.op.operands[index]
        if not isinstance(operand, Constant):
            raise Unsupported(f"its input {index} is computed at run time; it has to be a constant")
        values = operand.real
        full = values.reshape((1,) * (len(shape) - values.ndim) + values.shape).transpose(order)
        return self.op.float_constant(f"{self.op.name}.{index}", full)


def layer_normalization(op: Operation) -> View:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias over the last axes (Ba et al. 2016)."""
    shape, order, write = op.shape(0), op.natural(0), Steps(op)
    first = op.axis(op.attribute("axis", -1))
    if any(output.uses() for output in op.node.outputs[1:]):
        raise Unsupported("mean and deviation of a LayerNormalization are not available")
    axes = [order.index(a) for a in range(first, len(shape))]
    x = op.read(0, order)
    centred = write("SUB", x, write.reduced("MEAN", x, axes))
    square = write("MUL", centred, centred)
    variance = write("ADD", write.reduced("MEAN", square, axes), write.number(op.attribute("epsilon", 1e-5)))
    y = write("MUL", centred, write("RSQRT", variance))
    y = write("MUL", y, write.parameter(1, order, shape))
    if len(op.operands) > 2 and op.operands[2] is not None:
        y = write("ADD", y, write.parameter(2, order, shape))
    return stored(y, shape, order)


def batch_normalization(op: Operation) -> View:
    """s x + t per channel, where no product could take it in."""
    shape, order, write = op.shape(0), op.natural(0), Steps(op)
    gamma, beta, mean, variance = (_values(op, i) for i in range(1, 5))
    s = gamma / np.sqrt(variance + op.attribute("epsilon", 1e-5))
    channels = permuted((1, -1, *(1,) * (len(shape) - 2)), order)
    factor = op.float_constant(f"{op.name}.factor", s.astype(np.float32).reshape(channels))
    summand = op.float_constant(f"{op.name}.summand", (beta - mean * s).astype(np.float32).reshape(channels))
    return stored(write("ADD", write("MUL", op.read(0, order), factor), summand), shape, order)


def _values(op: Operation, index: int) -> NDArray[np.float64]:
    operand = op.operands[index]
    if not isinstance(operand, Constant):
        raise Unsupported(f"its input {index} is computed at run time; it has to be a constant")
    return operand.real.astype(np.float64)


def norm(op: Operation) -> View:
    """ReduceL2: the square root of the sum of squares."""
    shape, order, write = op.shape(0), op.natural(0), Steps(op)
    given = op.parameter(1)
    axes = [op.axis(a) for a in (range(len(shape)) if given is None else given.tolist())]
    x = op.read(0, order)
    made = write("SQRT", write.reduced("SUM", write("MUL", x, x), [order.index(a) for a in axes]))
    kept = tuple(1 if i in axes else size for i, size in enumerate(shape))
    found = layout.reshape(stored(made, kept, order), op.output_shape())
    assert found is not None
    return found


def power(op: Operation) -> View:
    """POW, by a constant."""
    order = op.natural(0)
    write = Steps(op)
    return stored(write("POW", op.read(0, order), write.parameter(1, order, op.shape(0))), op.shape(0), order)


def product(op: Operation) -> View:
    """MatMul of two activations: BATCH_MATMUL, which reads its second operand transposed where it lies that way."""
    out, write = op.output_shape(), Steps(op)
    rank = len(op.shape(1))
    if min(len(op.shape(0)), rank) < 2:
        raise Unsupported("a vector as an operand; give it a second axis")
    swapped = (*range(rank - 2), rank - 1, rank - 2)
    view = op.view(1)
    turned = layout.arrangement(view, swapped) == view.order != layout.arrangement(view, identity(rank))
    y = op.read(1, swapped if turned else identity(rank))
    made = write("BATCH_MATMUL", op.read(0, identity(len(op.shape(0)))), y, shape=out, adjX=False, adjY=turned)
    return stored(made, out, identity(len(out)))


def rows(op: Operation) -> View:
    """Gather: GATHER of rows of a table, or of chosen positions along an axis."""
    axis = op.attribute("axis", 0) % len(op.shape(0))
    shape = op.shape(0)
    held = op.parameter_or_none(1)
    if held is not None:
        index = op.writer.indices(f"{op.name}.positions", held % shape[axis])
        index_shape: tuple[int, ...] = held.shape
    else:
        index_shape = op.shape(1)
        index = op.read(1, identity(len(index_shape)))
        if index.dtype != "int32":
            raise Unsupported("positions have to be whole numbers")
    table = op.operands[0]
    if isinstance(table, Constant) and table.quant is None and table.values.dtype == np.int8:
        x = op.writer.constant(f"{op.name}.table", table.values)  # its rows become floats after they were read
    else:
        x = op.constant(0) if isinstance(table, Constant) else op.read(0, identity(len(shape)))
    out = (*shape[:axis], *index_shape, *shape[axis + 1 :])
    if not prod(out):
        raise Unsupported("it gathers nothing")
    made = op.writer.write("GATHER", [x, index], op.name, out, x.quant, dtype=x.dtype, axis=axis, batchDims=0)
    return stored(made, out, identity(len(out)))
