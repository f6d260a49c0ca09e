from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorrt_graphs import model, samples

from deploykit.core.errors import DeploykitError
from deploykit.exporters.tensorrt.opset import NEWEST, OLDEST, RULES, _types_only, lower_opset, verify_opset

X = "float[2,16,8,8] x"


def lowered(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    changed = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    lower_opset(changed, opset)
    result = ir.to_proto(changed)
    verify_opset(result, opset)
    return result


def run(proto: onnx.ModelProto, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    (y,) = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )
    return np.asarray(y)


SAME: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mean": ("y = ReduceMean<keepdims=0>(x, axes)", "float[2,16] y", {"axes": np.array([2, 3])}),
    "max over all": ("y = ReduceMax<keepdims=0>(x)", "float y", {}),
    "sum of squares": ("y = ReduceSumSquare(x, axes)", "float[2,16,8,1] y", {"axes": np.array([-1])}),
    "uneven split": ("y, z, w = Split<axis=1, num_outputs=3>(x)", "float[2,6,8,8] y", {}),
    "pad two axes": (
        "y = Pad(x, pads, zero, axes)", "float[2,16,8,11] y",
        {"pads": np.array([0, 1, 0, 2]), "zero": 0.0, "axes": np.array([1, -1])},
    ),
    "pad all": ("y = Pad<mode=\"edge\">(x, pads)", "float[2,16,9,8] y", {"pads": np.array([0, 0, 1, 0, 0, 0, 0, 0])}),
    "resize": (
        "y = Resize<mode=\"nearest\", antialias=0>(x, , scales)", "float[2,16,16,16] y",
        {"scales": [1.0, 1.0, 2.0, 2.0]},
    ),
    "pool": (
        "y = AveragePool<kernel_shape=[2,2], strides=[2,2], dilations=[1,1]>(x)", "float[2,16,4,4] y", {}
    ),
    "gelu": ("y = Gelu(x)", "float[2,16,8,8] y", {}),
    "tanh gelu": ("y = Gelu<approximate=\"tanh\">(x)", "float[2,16,8,8] y", {}),
    "gelu inside": ("g = Gelu(x) y = Add(g, x)", "float[2,16,8,8] y", {}),
    "cast": ("h = Cast<to=10, saturate=1>(x) y = Cast<to=1>(h)", "float[2,16,8,8] y", {}),
    "reshape": ("s = Shape(x) y = Reshape(x, s)", "float[2,16,8,8] y", {}),
}  # fmt: skip


@pytest.mark.parametrize("opset", [17, 19])
@pytest.mark.parametrize("what", SAME)
def test_a_lowered_graph_computes_the_same(what: str, opset: int) -> None:
    body, y, arrays = SAME[what]
    proto = model(body, X, y, 20, **arrays)
    x = samples(2, 16, 8, 8)
    result = lowered(proto, opset)
    assert result.ir_version == {17: 8, 19: 9}[opset]
    np.testing.assert_allclose(run(result, x), run(proto, x), rtol=0, atol=2e-6)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=3), st.permutations([-1, 2, 1, 0])
)
def test_pads_of_some_axes_land_on_those_axes(amounts: list[tuple[int, int]], axes: list[int]) -> None:
    shape = [2, 3, 4, 5]
    chosen = axes[: len(amounts)]
    full = [(0, 0)] * 4
    for axis, pair in zip(chosen, amounts, strict=True):
        full[axis] = pair
    pads = np.array([a for a, _ in amounts] + [b for _, b in amounts])
    out = ",".join(str(n + a + b) for n, (a, b) in zip(shape, full, strict=True))
    proto = model("y = Pad(x, pads, zero, axes)", "float[2,3,4,5] x", f"float[{out}] y", 20,
                  pads=pads, zero=1.0, axes=np.array(chosen))  # fmt: skip
    x = samples(2, 3, 4, 5)
    np.testing.assert_array_equal(run(lowered(proto, 17), x), np.pad(x, full, constant_values=1.0))


def test_all_operators_without_an_equivalent_are_named_at_once() -> None:
    proto = model(
        "a = Mish(x) b = Pad<mode=\"wrap\">(a, pads) c = Resize<antialias=1, mode=\"linear\">(b, , scales) "
        "d = ReduceMean<noop_with_empty_axes=1>(c) y = Relu(d)",
        X, "float[2,16,16,16] y", 20, pads=np.zeros(8, np.int64), scales=[1.0, 1.0, 2.0, 2.0],
    )  # fmt: skip
    with pytest.raises(DeploykitError) as error:
        lowered(proto, 17)
    message = str(error.value)
    assert "operator set 17" in message
    for part in (
        "Mish (layer 'a') is defined since 18",
        "Pad (layer 'b'): mode 'wrap'",
        "Resize (layer 'c'): antialias = 1",
        "ReduceMean (layer 'd')",
    ):
        assert part in message
    assert "Relu" not in message


def test_computed_axes_and_foreign_domains_are_refused() -> None:
    proto = model("axes = Cast<to=7>(k) m = ReduceMean(x, axes) y = Relu(m)", X, "float[2,16,1,8] y", 20, k=[2.0])
    proto.graph.node[2].domain = "com.example"
    proto.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    with pytest.raises(DeploykitError, match=r"its axes are computed.*Relu \(layer 'y'\) of the domain com\.example"):
        lowered(proto, 17)


@pytest.mark.parametrize(("source", "asked"), [(17, 19), (21, 17), (20, 13)])
def test_only_covered_operator_sets_are_lowered(source: int, asked: int) -> None:
    with pytest.raises(DeploykitError, match=f"operator set {source} and the file would have {asked}"):
        lowered(model("y = Relu(x)", opset=source), asked)


def test_a_file_of_another_operator_set_does_not_pass_for_the_one_asked() -> None:
    with pytest.raises(AssertionError, match="asked for operator set 17"):
        verify_opset(model("y = Relu(x)", opset=18), 17)


@pytest.mark.parametrize("operator", [op for op, rule in RULES.items() if rule is _types_only])
def test_operators_that_are_only_relabelled_gained_types_and_nothing_else(operator: str) -> None:
    old = onnx.defs.get_schema(operator, max_inclusive_version=OLDEST)
    new = onnx.defs.get_schema(operator, max_inclusive_version=NEWEST)
    assert set(new.attributes) - set(old.attributes) <= {"saturate"}
    assert [i.name for i in new.inputs] == [i.name for i in old.inputs]
    assert [o.name for o in new.outputs] == [o.name for o in old.outputs]
