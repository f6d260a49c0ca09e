"""Spells a `Program` in C: ``model.c`` and ``model.h``, the constants as data and the network as a list of calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.exporters.c99.memory import Plan
from deploykit.exporters.c99.names import comment, identifier
from deploykit.exporters.c99.program import (
    Add,
    AveragePool,
    Concat,
    Conv,
    ConvTranspose,
    Dense,
    MaxPool,
    Mean,
    Multiply,
    Operation,
    Pad,
    Port,
    Product,
    Program,
    Resize,
    Shape,
    Slice,
    Softmax,
    Table,
    Tensor,
    Transpose,
)
from deploykit.exporters.c99.rounding import Rescale

if TYPE_CHECKING:
    from numpy.typing import NDArray

AXES = 6
"""DK_AXES: axes a strided kernel loops over, after merging."""
WIDTH = 112


def spell_source(program: Program, plan: Plan) -> str:
    """``model.c``."""
    return _Source(program, plan).text()


def port_names(ports: Sequence[Port]) -> list[str]:
    """Each port's name in macros, in capitals."""
    taken: set[str | None] = set()
    return [identifier(port.name.upper(), taken, front="N") for port in ports]


def spell_header(program: Program, plan: Plan) -> str:
    """``model.h``: the arena, where inputs and outputs lie in it, their scales, and the one function."""
    lines = [
        "/* Written by deploykit. An integer network: fill the inputs, call model_run, read the outputs. */",
        "#ifndef MODEL_H",
        "#define MODEL_H",
        "",
        "#include <stdint.h>",
        "",
        "/* Working memory, inputs and outputs included. The caller owns it; nothing survives in it between runs. */",
        f"#define MODEL_ARENA_BYTES {plan.bytes}",
        "",
        "/* real = SCALE * (integer - ZERO). Inputs and outputs lie in the arena, the last axis fastest. model_run",
        " * may overwrite inputs. */",
    ]
    for side, ports in (("INPUT", program.inputs), ("OUTPUT", program.outputs)):
        for port, name in zip(ports, port_names(ports), strict=True):
            macro = f"MODEL_{side}_{name}"
            shape = "".join(f"[{port.shape[a]}]" for a in port.order)
            axes = ", ".join(str(a) for a in port.order)
            pixels = ": pixels as they are, 0 to 255, written as (int8_t)pixel" if port.unsigned else ""
            lines += [
                "",
                f"/* {comment(port.name)}: {shape}, axes {axes} of the model's{pixels} */",
                f"#define {macro}(arena) ((arena) + {plan.offsets[port.tensor]})",
                f"#define {macro}_OFFSET {plan.offsets[port.tensor]}",
                f"#define {macro}_COUNT {port.tensor.size}",
            ]
            if not port.unsigned:
                lines += [
                    f"#define {macro}_SCALE {_float(port.tensor.quant.scale)}",
                    f"#define {macro}_ZERO ({port.tensor.quant.zero_point})",
                ]
    lines += [
        "",
        "void model_run(int8_t *arena);",
        "",
        "#ifdef MODEL_FLOAT_HELPERS",
        "/* Only for callers that have floats: nearest integer, halves to even, saturated. */",
        "static inline int8_t model_quantize(float real, float scale, int32_t zero)",
        "{",
        "    const float steps = real / scale;",
        "    if (!(steps > -1000.0f && steps < 1000.0f)) {",
        "        return steps > 0.0f ? INT8_MAX : INT8_MIN;",
        "    }",
        "    int32_t nearest = (int32_t)steps;",
        "    const float rest = steps - (float)nearest;",
        "    if (rest > 0.5f || (rest == 0.5f && nearest % 2 != 0)) {",
        "        nearest++;",
        "    } else if (rest < -0.5f || (rest == -0.5f && nearest % 2 != 0)) {",
        "        nearest--;",
        "    }",
        "    nearest += zero;",
        "    return (int8_t)(nearest < INT8_MIN ? INT8_MIN : nearest > INT8_MAX ? INT8_MAX : nearest);",
        "}",
        "",
        "static inline float model_dequantize(int8_t integer, float scale, int32_t zero)",
        "{",
        "    return scale * (float)(integer - zero);",
        "}",
        "#endif",
        "",
        "#endif",
        "",
    ]
    return "\n".join(lines)


class _Source:
    """The text of ``model.c`` as it grows: constants, structures, calls."""

    def __init__(self, program: Program, plan: Plan) -> None:
        self.program, self.plan = program, plan
        self.taken: set[str | None] = set()
        self.declared: dict[tuple[str, bytes], str] = {}
        self.data: list[str] = []
        self.calls: list[str] = []

    def text(self) -> str:
        for operation in self.program.operations:
            name = identifier(operation.layer, self.taken)
            self.calls.append(f"    /* {comment(operation.layer)} */")
            self.calls += [f"    {call};" for call in self.spell(operation, name)]
        head = [
            "/* Written by deploykit; the kernels and what they compute are in dk_kernels.h. */",
            '#include "model.h"',
            *(['#include "dk_decode.h"'] if self.program.coded else []),
            '#include "dk_kernels.h"',
            "",
        ]
        body = ["", "void model_run(int8_t *arena)", "{", *self.calls, "}", ""]
        return "\n".join([*head, *self.data, *body])

    def spell(self, op: Operation, name: str) -> list[str]:
        """The calls of one operation."""
        y = self.at(op.y)
        if isinstance(op, Product):
            decode, weights = self.weights(op, name)
            kernel = "dk_dense" if isinstance(op, Dense) else "dk_conv"
            kernel = "dk_conv_transpose" if isinstance(op, ConvTranspose) else kernel
            kernel = "dk_depthwise" if isinstance(op, Conv) and op.depthwise else kernel
            made = self.dense(op, name) if isinstance(op, Dense) else self.conv(op, name)
            return [*decode, f"{kernel}(&{made}, {weights}, {self.at(op.x)}, {y})"]
        if isinstance(op, (Add, Multiply)):
            made = self.add(op, name) if isinstance(op, Add) else self.multiply(op, name)
            kernel = "dk_add" if isinstance(op, Add) else "dk_multiply"
            return [f"{kernel}(&{made}, {self.at(op.a)}, {self.at(op.b)}, {y})"]
        if isinstance(op, (MaxPool, AveragePool)):
            kernel = "dk_max_pool" if isinstance(op, MaxPool) else "dk_average_pool"
            return [f"{kernel}(&{self.pool(op, name)}, {self.at(op.x)}, {y})"]
        if isinstance(op, Mean):
            fields: dict[str, Any] = dict(zip(("outer", "n", "inner"), op.shape, strict=True)) | {
                "rescale": self.rescale(f"{name}_rescale", op.rescale), "offset": op.offset,
                "x_zero": op.x.quant.zero_point, "y_zero": op.y.quant.zero_point,
            }  # fmt: skip
            return [f"dk_mean(&{self.structure('dk_mean_t', name, fields)}, {self.at(op.x)}, {y})"]
        if isinstance(op, Softmax):
            fields = dict(zip(("outer", "n", "inner"), op.shape, strict=True)) | {
                "exponentials": self.array(f"{name}_exponentials", op.exponentials), "one": f"{op.one}u",
                "y_zero": op.y.quant.zero_point,
            }  # fmt: skip
            return [f"dk_softmax(&{self.structure('dk_softmax_t', name, fields)}, {self.at(op.x)}, {y})"]
        if isinstance(op, Table):
            sizes = f"{len(op.values)}, {op.inner}, {op.x.size}"
            return [f"dk_table({self.array(f'{name}_table', op.values)}, {sizes}, {self.at(op.x)}, {y})"]
        if isinstance(op, Resize):
            return [f"dk_resize(&{self.resize(op, name)}, {self.at(op.x)}, {y})"]
        return self.moves(op, name)

    # ------------------------------------------------------------------ structures

    def conv(self, op: Conv | ConvTranspose, name: str) -> str:
        _, kernel_height, kernel_width, _ = op.weights.shape
        fields = dict(zip(("height", "width", "channels"), op.x_shape, strict=True))
        fields |= dict(zip(("out_height", "out_width", "out_channels"), op.y_shape, strict=True))
        return self.structure(
            "dk_conv_t",
            name,
            fields
            | {
                "kernel_height": kernel_height, "kernel_width": kernel_width,
                "stride_y": op.strides[0], "stride_x": op.strides[1],
                "dilation_y": op.dilations[0], "dilation_x": op.dilations[1],
                "pad_top": op.pads[0], "pad_left": op.pads[1], "groups": op.groups,
            }
            | self.product(op, name),
        )  # fmt: skip

    def dense(self, op: Dense, name: str) -> str:
        out, ins = op.weights.shape
        return self.structure("dk_dense_t", name, {"rows": op.rows, "in": ins, "out": out} | self.product(op, name))

    def product(self, op: Product, name: str) -> dict[str, Any]:
        return {
            "bias": self.array(f"{name}_bias", op.bias), "rescale": self.rescale(f"{name}_rescale", op.rescale),
            "x_zero": op.x.quant.zero_point, "y_zero": op.y.quant.zero_point, "low": op.low, "high": op.high,
        }  # fmt: skip

    def add(self, op: Add, name: str) -> str:
        fields: dict[str, Any] = {"pair": self.pair(op)} | {
            f"{side}_rescale": self.rescale(f"{name}_{side}_rescale", rescale)
            for side, rescale in (("a", op.a_rescale), ("b", op.b_rescale), ("y", op.y_rescale))
        }
        fields |= {"lift": op.lift, "offset": op.offset, "subtract": int(op.subtract)}
        return self.structure("dk_add_t", name, fields | _limits(op))

    def multiply(self, op: Multiply, name: str) -> str:
        fields = {"pair": self.pair(op), "rescale": self.rescale(f"{name}_rescale", op.rescale), "offset": op.offset}
        return self.structure("dk_multiply_t", name, fields | _limits(op))

    def pair(self, op: Add | Multiply) -> str:
        strides = [
            tuple(0 if size == 1 else stride for size, stride in zip(shape, contiguous(shape), strict=True))
            for shape in (op.a_shape, op.b_shape)
        ]
        shape, a, b = merged(op.y_shape, *strides)
        return f"{{{_braced(shape)}, {_braced(a)}, {_braced(b)}}}"

    def pool(self, op: MaxPool | AveragePool, name: str) -> str:
        pads = op.pads if isinstance(op, AveragePool) else (*op.pads, 0, 0)
        dilations = op.dilations if isinstance(op, MaxPool) else (1, 1)
        fields = dict(zip(("height", "width", "channels"), op.x_shape, strict=True)) | {
            "out_height": op.y_shape[0], "out_width": op.y_shape[1],
            "kernel_height": op.kernel[0], "kernel_width": op.kernel[1],
            "stride_y": op.strides[0], "stride_x": op.strides[1],
            "dilation_y": dilations[0], "dilation_x": dilations[1],
        } | dict(zip(("pad_top", "pad_left", "pad_bottom", "pad_right"), pads, strict=True))  # fmt: skip
        if isinstance(op, AveragePool):
            fields |= {"counts_padding": int(op.counts_padding), "x_zero": op.x.quant.zero_point}
        return self.structure("dk_pool_t", name, fields)

    def resize(self, op: Resize, name: str) -> str:
        _, width, channels = op.x_shape
        fields = {
            "width": width, "channels": channels, "out_height": len(op.rows), "out_width": len(op.columns),
            "rows": self.array(f"{name}_rows", np.asarray(op.rows, np.uint16)),
            "columns": self.array(f"{name}_columns", np.asarray(op.columns, np.uint16)),
        }  # fmt: skip
        return self.structure("dk_resize_t", name, fields)

    def moves(self, op: Operation, name: str) -> list[str]:
        """Transpose, Slice, Pad and Concat are copies between two arrangements."""
        if isinstance(op, Transpose):
            strides = contiguous(op.x_shape)
            shape = tuple(op.x_shape[a] for a in op.axes)
            return [self.copy(name, shape, tuple(strides[a] for a in op.axes), contiguous(shape), op.x, op.y)]
        if isinstance(op, Slice):
            strides = contiguous(op.x_shape)
            start = sum(b * s for b, s in zip(op.begin, strides, strict=True))
            steps = tuple(a * b for a, b in zip(op.step, strides, strict=True))
            return [self.copy(name, op.y_shape, steps, contiguous(op.y_shape), op.x, op.y, start)]
        if isinstance(op, Pad):
            strides = contiguous(op.y_shape)
            start = sum(b * s for b, s in zip(op.before, strides, strict=True))
            fill = f"dk_fill({op.y.size}, {op.x.quant.zero_point}, {self.at(op.y)})"
            return [fill, self.copy(name, op.x_shape, contiguous(op.x_shape), strides, op.x, op.y, 0, start)]
        assert isinstance(op, Concat)
        calls, start, whole = [], 0, op.y.size // op.outer
        for i, part in enumerate(op.parts):
            block = part.size // op.outer
            part_name = name if i == 0 else identifier(f"{name}_part", self.taken)
            calls.append(self.copy(part_name, (op.outer, block), (block, 1), (whole, 1), part, op.y, 0, start))
            start += block
        return calls

    def copy(
        self, name: str, shape: Shape, x_strides: Shape, y_strides: Shape, x: Tensor, y: Tensor, x_start: int = 0,
        y_start: int = 0,
    ) -> str:  # fmt: skip
        names = ("shape", "x_strides", "y_strides")
        fields = {n: _braced(v) for n, v in zip(names, merged(shape, x_strides, y_strides), strict=True)}
        made = self.structure("dk_copy_t", name, fields)
        return f"dk_copy(&{made}, {self.at(x, x_start)}, {self.at(y, y_start)})"

    # ------------------------------------------------------------------ words

    def weights(self, op: Product, name: str) -> tuple[list[str], str]:
        """The call that decodes an operation's weights, if they are coded, and where they lie."""
        if op not in self.program.coded:
            return [], self.array(f"{name}_weights", op.weights)
        held, place = self.array(f"{name}_coded", self.program.coded[op]), f"arena + {self.plan.offsets[op]}"
        # damage goes as unnoticed as in plain weights: what is in flash was compared when the self-test ran there
        return [f"(void)dk_decode({held}, sizeof {held}, {op.weights.size}, {place})"], place

    def at(self, tensor: Tensor, start: int = 0) -> str:
        """Where a tensor lies: in the arena, or a constant."""
        if tensor.data is not None:
            held = self.array(identifier(tensor.name, self.taken), tensor.data)
            return f"{held} + {start}" if start else held
        return f"arena + {self.plan.offsets[tensor] + start}"

    def rescale(self, name: str, rescale: Rescale) -> str:
        multiplier = "0" if rescale.multiplier is None else self.array(f"{name}_multiplier", rescale.multiplier)
        return f"{{{multiplier}, {self.array(f'{name}_shift', rescale.shift)}}}"

    def array(self, name: str, values: NDArray[Any]) -> str:
        """Declares a constant array, once for equal ones; returns its name."""
        key = values.dtype.str, values.tobytes()
        if key not in self.declared:
            self.declared[key] = name
            self.data.append(declaration(name, values))
        return self.declared[key]

    def structure(self, kind: str, name: str, fields: Mapping[str, Any]) -> str:
        lines = [f"    .{field} = {value}," for field, value in fields.items()]
        self.data += [f"static const {kind} {name} = {{", *lines, "};"]
        return name


def declaration(name: str, values: NDArray[Any]) -> str:
    """``static const int8_t name[9] = {...};``, wrapped."""
    suffix = "u" if values.dtype.kind == "u" else ""
    flat = values.ravel().tolist()
    # the smallest int32 has no literal of its own
    texts = [f"{v}{suffix}" if v != -(2**31) else "(-2147483647 - 1)" for v in flat]
    lines: list[str] = []
    line: list[str] = []
    width = 0
    for text in texts:
        if width + len(text) + 1 > WIDTH and line:
            lines.append("    " + ",".join(line) + ",")
            line, width = [], 0
        line.append(text)
        width += len(text) + 1
    lines.append("    " + ",".join(line))
    return f"static const {values.dtype.name}_t {name}[{len(flat)}] = {{\n" + "\n".join(lines) + "\n};"


def contiguous(shape: Shape) -> Shape:
    """The strides of a tensor that is stored without gaps."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def merged(shape: Shape, *strides: Shape) -> list[Shape]:
    """Shape and strides with as few axes as possible, padded with axes of size 1 to `AXES`."""
    axes: list[list[int]] = []  # size, then the stride of each operand
    for size, *steps in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if axes and all(outer == inner * size for outer, inner in zip(axes[-1][1:], steps, strict=True)):
            axes[-1] = [axes[-1][0] * size, *steps]
        else:
            axes.append([size, *steps])
    if len(axes) > AXES:
        raise ValueError(f"{len(axes)} axes in another order are more than the copy kernel's {AXES}")
    axes = [[1, *(0 for _ in strides)]] * (AXES - len(axes)) + axes
    return [tuple(axis[k] for axis in axes) for k in range(1 + len(strides))]


def _limits(op: Add | Multiply) -> dict[str, int]:
    zeros = {f"{side}_zero": tensor.quant.zero_point for side, tensor in (("a", op.a), ("b", op.b), ("y", op.y))}
    return zeros | {"low": op.low, "high": op.high}


def _braced(values: Shape) -> str:
    return "{" + ", ".join(str(v) for v in values) + "}"


def _float(value: float) -> str:
    text = f"{np.float32(value):.9g}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"
