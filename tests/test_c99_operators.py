"""Every operator of the c99 exporter on random shapes: the compiled C against the numpy oracle bit for bit, and against
the hub, every Q and DQ on its own in ONNX Runtime, within one step; under both rounding rules."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from operator_cases import CASES, Case, Draw, image, index, number, samples, weights
from tflite_graphs import Node, graph, quantized, reference, steps

from deploykit import targets
from deploykit.exporters import to_c99
from deploykit.exporters.c99.compiled import Compiled
from deploykit.exporters.c99.execute import execute
from deploykit.exporters.c99.golden import to_integers, to_reals
from deploykit.exporters.c99.lower import lower
from deploykit.exporters.c99.operators import TABLE
from deploykit.hub.graph import Hub

if not any(shutil.which(cc) for cc in ("cc", "gcc", "clang")):
    pytest.skip("no C compiler: what the c99 exporter writes is not run here", allow_module_level=True)

MCU, FPGA = targets.load("cortex-m4"), targets.load("fpga-int8")
LSB = 1.01
"""Least significant bits that a result may be off the hub's."""


def conv1d(draw: Draw) -> Case:
    c, length, kernel, groups = number(draw, 1, 4), number(draw, 4, 12), number(draw, 1, 3), number(draw, 1, 2)
    options = {
        "strides": [number(draw, 1, 2)], "dilations": [number(draw, 1, 2)], "group": groups,
        "pads": [number(draw, 0, kernel - 1), number(draw, 0, kernel - 1)],
    }  # fmt: skip
    nodes: list[Node] = [("Conv", ["x", "w", "b"], ["c"], options), ("MaxPool", ["c"], ["y"], {"kernel_shape": [2]})]
    assume(length >= 2 * kernel + 3)
    constants = {"w": weights(draw, 2 * groups, c, kernel, size=1.0), "b": weights(draw, 2 * groups)}
    return nodes, {"x": (c * groups, length)}, constants


def any_transposed(draw: Draw) -> Case:
    """Uneven strides and paddings, dilated, grouped: more than LiteRT can."""
    groups, kernel = number(draw, 1, 2), [number(draw, 1, 3), number(draw, 2, 3)]
    options = {
        "strides": [number(draw, 1, 3), number(draw, 1, 3)], "dilations": [number(draw, 1, 2), 1], "group": groups,
        "pads": [number(draw, 0, 1), number(draw, 0, 1), number(draw, 0, 1), 0],
    }  # fmt: skip
    c, out = number(draw, 1, 3), number(draw, 1, 3)
    constants = {"w": weights(draw, c * groups, out, *kernel), "b": weights(draw, out * groups)}
    nodes: list[Node] = [("ConvTranspose", ["x", "w", "b"], ["y"], options)]
    return nodes, {"x": (c * groups, number(draw, 3, 5), number(draw, 3, 5))}, constants


def pools(draw: Draw) -> Case:
    """Dilated, uneven padding, windows beyond the end."""
    kind = draw(st.sampled_from(["MaxPool", "AveragePool"]))
    options: dict[str, Any] = {
        "kernel_shape": [3, 2], "strides": [number(draw, 1, 3), number(draw, 1, 2)],
        "pads": [number(draw, 0, 1), number(draw, 0, 1), number(draw, 0, 1), 0], "ceil_mode": number(draw, 0, 1),
    }  # fmt: skip
    if kind == "MaxPool":
        options["dilations"] = [number(draw, 1, 2), 1]
    else:
        options["count_include_pad"] = number(draw, 0, 1)
    return [(kind, ["x"], ["y"], options)], {"x": image(draw)}, {}


def squeeze_and_excite(draw: Draw) -> Case:
    c = number(draw, 1, 6)
    nodes: list[Node] = [
        ("GlobalAveragePool", ["x"], ["m"], {}),
        ("Conv", ["m", "w"], ["c"], {}),
        ("HardSigmoid", ["c"], ["h"], {"alpha": 1 / 6, "beta": 0.5}),
        ("Mul", ["x", "h"], ["y"], {}),
    ]
    return nodes, {"x": (c, number(draw, 2, 5), number(draw, 2, 5))}, {"w": weights(draw, c, c, 1, 1, size=1.0)}


def float_functions(draw: Draw) -> Case:
    """Float operators between integer ones: one table in all, with a shape changed on the way."""
    c, h, w = image(draw, 2)
    nodes: list[Node] = [
        ("Conv", ["x", "w"], ["c"], {}),
        ("Elu", ["c"], ["e"], {}),
        ("Exp", ["e"], ["p"], {}),
        ("Conv", ["p", "v"], ["y"], {}),
    ]
    return nodes, {"x": (c, h, w)}, {"w": weights(draw, 3, c, 1, 1), "v": weights(draw, 2, 3, 1, 1)}


def constant_summand(draw: Draw) -> Case:
    return [("Mul", ["x", "k"], ["m"], {}), ("Add", ["m", "b"], ["y"], {})], {"x": image(draw, 2)}, {
        "k": np.float32(number(draw, -3, 3) + 0.5), "b": np.float32(1.5),
    }  # fmt: skip


def shuffle(draw: Draw) -> Case:
    """Channels in another order: a transposition in six axes, of which three move."""
    groups, part = number(draw, 2, 3), number(draw, 2, 3)
    h, w = number(draw, 2, 4), number(draw, 2, 4)
    nodes: list[Node] = [
        ("Reshape", ["x", "s"], ["a"], {}),
        ("Transpose", ["a"], ["t"], {"perm": [0, 2, 1, 3, 4]}),
        ("Reshape", ["t", "r"], ["u"], {}),
        ("Conv", ["u", "w"], ["y"], {"group": groups}),
    ]
    constants = {
        "s": index(0, groups, part, h, w), "r": index(0, groups * part, h, w),
        "w": weights(draw, groups, part, 1, 1, size=1.0),
    }  # fmt: skip
    return nodes, {"x": (groups * part, h, w)}, constants


def prelu(draw: Draw) -> Case:
    """One slope per channel: one table per channel."""
    c, h, w = image(draw, 2)
    return [("PRelu", ["x", "s"], ["y"], {})], {"x": (c, h, w)}, {"s": np.abs(weights(draw, c, 1, 1))}


def dense_with_bias(draw: Draw) -> Case:
    """A MatMul, its bias and a Relu run together."""
    n, k = number(draw, 2, 9), number(draw, 1, 30)
    nodes: list[Node] = [
        ("MatMul", ["x", "w"], ["m"], {}),
        ("Add", ["m", "b"], ["a"], {}),
        ("Relu", ["a"], ["y"], {}),
    ]
    return nodes, {"x": (number(draw, 1, 5), k)}, {"w": weights(draw, k, n), "b": weights(draw, n)}


OWN: dict[str, Callable[[Draw], Case]] = {
    "Conv 1-D": conv1d,
    "ConvTranspose of any kind": any_transposed,
    "pools of any kind": pools,
    "squeeze and excite": squeeze_and_excite,
    "float functions": float_functions,
    "constant summand": constant_summand,
    "channel shuffle": shuffle,
    "PRelu": prelu,
    "MatMul with bias": dense_with_bias,
}
REFUSED = {"Resize bilinear", "Div"}
"""Cases of other exporters that have no integer form here."""
ALL = {name: case for name, case in {**CASES, **OWN}.items() if name not in REFUSED}

many = settings(
    max_examples=3, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip


def test_every_operator_of_the_table_has_a_case() -> None:
    assert set(TABLE) <= {name.split()[0] for name in ALL}


def both(hub: Hub, target: Any, fed: Mapping[str, NDArray[Any]], folder: Path) -> tuple[Any, ...]:
    """The C's and the oracle's integers, the oracle's reals, and the `File`."""
    (file,) = to_c99.export({"int8": hub}, target, folder)
    assert hub.quantized is not None
    program = lower(hub.quantized, target.options["rounding"]).program
    integers = {port.name: to_integers(port, fed[port.name]) for port in program.inputs}
    oracle = execute(program, integers)
    compiled = Compiled(folder / file.path).run(integers)
    (port,) = program.outputs
    return compiled[port.name], oracle[port.name], to_reals(port, oracle[port.name]), file


@pytest.mark.parametrize("name", ALL)
@many
@given(data=st.data())
def test_c_equals_the_oracle_and_is_at_most_one_step_off_the_hub(name: str, data: Any, tmp_path: Path) -> None:
    nodes, inputs, constants = ALL[name](data.draw)
    fed = samples(data.draw, inputs)
    target = data.draw(st.sampled_from([MCU, FPGA]))
    # every operand is a tensor of its own scale except where an operator needs one for all
    hub = quantized(graph(nodes, inputs, constants), fed, target.quant)
    expected = reference(hub.bytes, fed)["y"]
    assume(expected.any())  # a result that is always zero has no scale to speak of
    compiled, oracle, found, file = both(hub, replace(target, name=name), fed, tmp_path)
    np.testing.assert_array_equal(compiled, oracle)
    assert found.shape == expected.shape
    assert not file.islands
    several = len([n for n in nodes if n[0] not in ("Relu", "Clip", "Flatten", "Reshape", "Squeeze", "Unsqueeze")])
    if several == 1 or name in ("Split", "MatMul with bias"):
        assert float(np.abs(found - expected).max()) <= LSB * steps(hub)
    else:  # a step off in one operator is more behind the next
        assert float(np.abs(found - expected).max()) <= 6 * steps(hub)
