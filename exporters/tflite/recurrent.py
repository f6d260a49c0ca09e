"""LSTM and GRU, written out step by step, in float.

LiteRT has an operator for a whole LSTM, but it keeps its state from one call to the next, and an application that
forgets to reset it gets wrong answers. Written out there is no state; the weights are stored once. Names and gates
follow the ONNX operators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from deploykit.exporters.layout import View, stored
from deploykit.exporters.one_sample import Unsupported
from deploykit.exporters.tflite.composed import Steps
from deploykit.exporters.tflite.operation import Constant, Operation
from deploykit.exporters.tflite.writer import Tensor

LONGEST = 256
"""Steps that are written out; a file of thousands of operators serves nobody."""


@dataclass(frozen=True)
class Cell:
    """One direction: what is needed to compute a step."""

    write: Steps
    r: Tensor
    """[gates * units, units]"""
    rb: Tensor
    """[gates * units]: bias of the recurrent product."""
    units: int

    def product(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        """x W^T + b."""
        return self.write("FULLY_CONNECTED", x, w, b, shape=(x.shape[0], w.shape[0]), keepNumDims=False)

    def gate(self, x: Tensor, number: int, count: int = 1) -> Tensor:
        """The part of [1, gates * units] that belongs to a gate."""
        return columns(self.write, x, number * self.units, (number + count) * self.units)


def lstm(op: Operation) -> list[View]:
    """it, ot, ft = σ, ct = tanh of Xt W^T + Wb + Ht-1 R^T + Rb;  Ct = ft Ct-1 + it ct;  Ht = ot tanh(Ct)."""
    if op.attribute("input_forget", 0):
        raise Unsupported("coupled input and forget gates")
    if len(op.node.inputs) > 7 and op.node.inputs[7] is not None:
        raise Unsupported("peepholes")
    return _layer(op, 4, _lstm_step, states=2)


def gru(op: Operation) -> list[View]:
    """zt, rt = σ of Xt W^T + Wb + Ht-1 R^T + Rb;  ht = tanh(Xt Wh^T + Wbh + rt (Ht-1 Rh^T + Rbh));
    Ht = (1 - zt) ht + zt Ht-1."""
    if not op.attribute("linear_before_reset", 0):
        raise Unsupported("a GRU whose reset gate comes before the product; torch's comes behind it")
    return _layer(op, 3, _gru_step, states=1)


def _lstm_step(cell: Cell, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    write = cell.write
    gates = write("ADD", x, cell.product(state[0], cell.r, cell.rb))
    i, o, f = (write("LOGISTIC", cell.gate(gates, k)) for k in range(3))
    c = write("ADD", write("MUL", f, state[1]), write("MUL", i, write("TANH", cell.gate(gates, 3))))
    return write("MUL", o, write("TANH", c)), c


def _gru_step(cell: Cell, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    write, h = cell.write, state[0]
    recurrent = cell.product(h, cell.r, cell.rb)
    gates = write("LOGISTIC", write("ADD", cell.gate(x, 0, 2), cell.gate(recurrent, 0, 2)))
    z, r = cell.gate(gates, 0), cell.gate(gates, 1)
    new = write("TANH", write("ADD", cell.gate(x, 2), write("MUL", r, cell.gate(recurrent, 2))))
    return (write("ADD", new, write("MUL", z, write("SUB", h, new))),)


Step = Callable[[Cell, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def _layer(op: Operation, gates: int, step: Step, states: int) -> list[View]:
    """All directions of a layer: Y [steps, directions, 1, units], and the last states [directions, 1, units]."""
    _require_plain(op)
    length, batch, inputs = op.shape(0)
    if length > LONGEST or batch != 1:
        raise Unsupported(f"{length} steps of {batch} sequences; up to {LONGEST} steps of one are written out")
    write, x = Steps(op), op.read(0, (1, 0, 2))
    x = write("RESHAPE", x, op.writer.indices(f"{op.name}.shape", (length, inputs)), shape=(length, inputs))
    reverse = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
    outputs, last = [], []
    for number, backwards in enumerate(reverse[op.attribute("direction", "forward")]):
        w, r = (op.constant(i, itemgetter(number)) for i in (1, 2))
        units = r.shape[1]
        wb, rb = _biases(op, number, gates * units)
        cell = Cell(write, r, rb, units)
        projected = cell.product(x, w, wb)
        zero = op.writer.constant(f"{op.name}.zero", np.zeros((1, units), np.float32))
        state: tuple[Tensor, ...] = (zero,) * states
        written: dict[int, Tensor] = {}
        for t in reversed(range(length)) if backwards else range(length):
            state = step(cell, _row(write, projected, t), state)
            written[t] = state[0]
        outputs.append(write("CONCATENATION", *(written[t] for t in range(length)), shape=(length, units), axis=0))
        last.append(state)
    units, count = outputs[0].shape[1], len(outputs)
    y = outputs[0] if count == 1 else write("CONCATENATION", *outputs, shape=(length, count * units), axis=1)
    made = [stored(y, (length, count, 1, units), (0, 1, 2, 3))]
    for k in range(states):
        ends = [state[k] for state in last]
        end = ends[0] if count == 1 else write("CONCATENATION", *ends, shape=(count, units), axis=0)
        made.append(stored(end, (count, 1, units), (0, 1, 2)))
    return made


def _require_plain(op: Operation) -> None:
    given = op.node.inputs
    if any(len(given) > i and given[i] is not None for i in (4, 5, 6)):
        raise Unsupported("sequences of different lengths and initial states other than zero")
    if any(a in op.node.attributes for a in ("activations", "clip")) or op.attribute("layout", 0):
        raise Unsupported("other activations than the usual ones, clipping, or the batch in front")


def _biases(op: Operation, number: int, size: int) -> tuple[Tensor, Tensor]:
    """Wb and Rb of a direction, each [gates * units]; zeros where there are none."""
    operand = op.operands[3] if len(op.operands) > 3 else None
    both = operand.real[number] if isinstance(operand, Constant) else np.zeros(2 * size, np.float32)
    return tuple(
        op.float_constant(f"{op.name}.{n}", both[k * size : (k + 1) * size]) for k, n in enumerate(("wb", "rb"))
    )  # type: ignore[return-value]


def columns(write: Steps, x: Tensor, start: int, end: int) -> Tensor:
    """Columns of [1, n]."""
    return _part(write, x, (0, start), (x.shape[0], end))


def _row(write: Steps, x: Tensor, number: int) -> Tensor:
    return _part(write, x, (number, 0), (number + 1, x.shape[1]))


def _part(write: Steps, x: Tensor, begin: tuple[int, int], end: tuple[int, int]) -> Tensor:
    name, shape = f"{write.op.name}.part", (end[0] - begin[0], end[1] - begin[1])
    corners = [write.op.writer.indices(f"{name}_{n}", v) for n, v in (("begin", begin), ("end", end), ("step", (1, 1)))]
    return write("STRIDED_SLICE", x, *corners, shape=shape)
