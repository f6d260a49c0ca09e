"""Each rewrite leaves fewer kinds of operators, and a graph that computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graphs import graph, measured, normal, run
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.target import QuantSpec
from deploykit.hub.graph import FloatGraph
from deploykit.hub.lower import from_proto, lower
from deploykit.hub.quantize import quantize
from deploykit.hub.running import session

few = settings(max_examples=20, deadline=None, derandomize=True, database=None)


def kinds(made: FloatGraph) -> list[str]:
    return [node.op_type for node in made.model.graph]


def original(text: str, **weights: NDArray[Any]) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> test {text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items())
    return proto


def assert_same(text: str, expected: Sequence[str], x: NDArray[Any], **weights: NDArray[Any]) -> FloatGraph:
    """The rewritten graph has those operators and computes what the original computes."""
    made = graph(text, **weights)
    assert kinds(made) == list(expected)
    before = session(original(text, **weights), optimize=False).run(None, {"x": x})
    for ours, theirs in zip(session(made.bytes).run(None, {"x": x}), before, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    return made


def norm_weights(n: int) -> dict[str, NDArray[Any]]:
    return {"g": normal(1, n), "b": normal(2, n), "m": normal(3, n), "v": np.abs(normal(4, n)) + np.float32(0.1)}


@few
@given(rank=st.integers(1, 2), channels=st.integers(1, 5), batch=st.integers(1, 3))
def test_a_batch_norm_alone_is_a_depthwise_convolution(rank: int, channels: int, batch: int) -> None:
    sizes = ",".join(["4"] * rank)
    text = f"""(float[n,{channels},{sizes}] x) => (float[n,{channels},{sizes}] y) {{
        r = Relu(x)
        y = BatchNormalization(r, g, b, m, v)
    }}"""
    made = assert_same(text, ["Relu", "Conv"], normal(0, batch, channels, *[4] * rank), **norm_weights(channels))
    assert made.model.graph[1].attributes["group"].value == channels


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_batch_norm_on_features_goes_into_the_product_behind_it(transposed: int) -> None:
    weight = normal(5, 3, 6) if transposed else normal(5, 6, 3)
    text = f"""(float[n,6] x) => (float[n,3] y) {{
        r = Relu(x)
        a = BatchNormalization(r, g, b, m, v)
        y = Gemm<transB={transposed}>(a, w, c)
    }}"""
    assert_same(text, ["Relu", "Gemm"], normal(0, 4, 6), w=weight, c=normal(6, 3), **norm_weights(6))


def test_a_batch_norm_in_front_keeps_its_place_and_fits_into_float16() -> None:
    weights = norm_weights(6) | {"m": 2000 * np.ones(6, np.float32), "v": 1e6 * np.ones(6, np.float32)}
    text = "(float[n,6] x) => (float[n,6] y) { y = BatchNormalization(x, g, b, m, v) }"
    made = assert_same(text, ["BatchNormalization"], 2000 + 1000 * normal(0, 4, 6), **weights)
    assert max(float(np.abs(v.const_value.numpy()).max()) for v in made.model.graph.initializers.values()) < 100


def test_a_square_is_a_product_and_a_division_by_a_constant_a_factor() -> None:
    text = "(float[n,4] x) => (float[n,4] y) { s = Pow(x, two)  y = Div(s, c) }"
    assert_same(text, ["Mul", "Mul"], normal(0, 3, 4), two=np.float32(2), c=normal(1, 4))


@pytest.mark.parametrize("at", [0, 2, -1])
def test_picking_one_position_is_a_slice(at: int) -> None:
    text = "(float[n,4,3] x) => (float[n,3] y) { y = Gather<axis=1>(x, i) }"
    assert_same(text, ["Slice", "Squeeze"], normal(0, 2, 4, 3), i=np.int64(at))


def test_a_reshape_to_a_computed_shape_has_a_constant_one() -> None:
    text = """(float[n,4,6] x) => (float[n,2,12] y) {
        s = Shape(x)
        b = Slice(s, zero, one)
        t = Concat<axis=0>(b, rest)
        y = Reshape(x, t)
    }"""
    weights = {"zero": np.array([0]), "one": np.array([1]), "rest": np.array([2, 12])}
    assert_same(text, ["Reshape"], normal(0, 3, 4, 6), **weights)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("both", [False, True])
def test_shapes_that_are_known_once_others_are_become_constants_too(kind: type[nn.Module], both: bool) -> None:
    """The second layer of a recurrent network takes its shape from the first."""

    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = kind(8, 6, num_layers=3, batch_first=True, bidirectional=both)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)[0][:, -1]

    torch.manual_seed(0)
    net, x = Stacked().eval(), normal(0, 3, 5, 8)
    made = lower(net, {"x": x})
    assert "Shape" not in kinds(made)
    found = session(made.bytes).run(None, {"x": x})[0]
    np.testing.assert_allclose(found, net(torch.from_numpy(x)).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(float[n,4,6] x) => (float[n,4] y) { y = ReduceMax<keepdims=0>(x, a) }", ["MaxPool", "Squeeze"]),
        ("(float[n,4,6] x) => (float[n,4] y) { m = ReduceMax<keepdims=1>(x, a) y = Squeeze(m, a) }",
         ["MaxPool", "Squeeze"]),
        ("(float[n,4,6] x) => (float[n,1,6] y) { y = ReduceMax<keepdims=1>(x, b) }", ["ReduceMax"]),
    ],
)  # fmt: skip
def test_the_largest_of_an_image_is_a_window_as_large_as_the_image(text: str, expected: list[str]) -> None:
    used = {"a": np.array([-1])} if "a)" in text else {"b": np.array([1])}
    assert_same(text, expected, normal(0, 3, 4, 6), **used)


def test_the_largest_of_every_channel_is_a_window_too() -> None:
    text = "(float[n,3,4,6] x) => (float[n,3,1,1] y) { m = GlobalMaxPool(x) y = Relu(m) }"
    assert "GlobalMaxPool" not in kinds(assert_same(text, ["MaxPool", "Relu"], normal(0, 2, 3, 4, 6)))


def test_repeating_what_is_broadcast_anyway_is_left_out() -> None:
    text = """(float[n,4,6] x) => (float[n,4,6] y) {
        m = ReduceMean(x, last)
        s = Shape(x)
        e = Expand(m, s)
        y = Sub(x, e)
    }"""
    assert_same(text, ["ReduceMean", "Sub"], normal(0, 3, 4, 6), last=np.array([-1]))


def test_resizing_to_a_computed_size_is_resizing_by_a_factor() -> None:
    text = """(float[n,3,4,6] x) => (float[n,3,8,9] y) {
        s = Shape<start=0, end=2>(x)
        t = Concat<axis=0>(s, size)
        y = Resize<mode="linear", coordinate_transformation_mode="half_pixel">(x, , , t)
    }"""
    assert_same(text, ["Resize"], normal(0, 2, 3, 4, 6), size=np.array([8, 9]))


def test_rewriting_again_changes_nothing() -> None:
    text = """(float[n,6] x) => (float[n,6] y) {
        a = BatchNormalization(x, g, b, m, v)
        s = Pow(a, two)
        y = Div(s, c)
    }"""
    made = graph(text, two=np.float32(2), c=normal(1, 6), **norm_weights(6))
    assert from_proto(onnx.load_model_from_string(made.bytes), "again").hash == made.hash


def test_a_model_that_branches_is_refused_by_name() -> None:
    text = """(float[n,4] x, bool c) => (float[n,4] y) {
        y = If (c) <
            then_branch = one () => (float[n,4] a) { a = Relu(x) },
            else_branch = two () => (float[n,4] b) { b = Neg(x) }
        >
    }"""
    with pytest.raises(DeploykitError, match=r"If 'y'.*torch\.where"):
        graph(text)


def test_an_output_that_is_an_input_is_refused() -> None:
    proto = original("(float[n,4] x) => (float[n,4] y) { y = Relu(x) }")
    proto.graph.output.append(proto.graph.input[0])
    with pytest.raises(DeploykitError, match="output 'x' of the model is its own input"):
        from_proto(proto, "test")


def test_a_constant_branch_of_a_concat_has_the_scale_of_all() -> None:
    made = graph(
        """(float[n,3,8,8] x) => (float[n,5,6,6] y) {
            a = Conv(x, w, b)
            y = Concat<axis=1>(a, k)
        }""",
        w=normal(0, 4, 3, 3, 3), b=normal(1, 4), k=100 * np.abs(normal(2, 1, 1, 6, 6)),
    )  # fmt: skip
    data = DataSet.of({"x": normal(9, 1, 3, 8, 8)})
    hub = quantize(made, measured(made, data), QuantSpec())
    (concat,) = [n for n in hub.quantized.graph if n.op_type == "Concat"]
    scales = {float(v.producer().inputs[1].const_value.numpy()) for v in concat.inputs}
    assert len(scales) == 1
    (expected,), (found,) = run(made.bytes, data), run(hub.bytes, data)
    assert np.abs(found - expected).max() <= 0.6 * scales.pop()


def test_the_bias_of_a_grouped_transposed_convolution_is_int32() -> None:
    made = graph(
        "(float[n,4,5,5] x) => (float[n,6,10,10] y) { y = ConvTranspose<group=2, strides=[2,2]>(x, w, b) }",
        w=normal(0, 4, 3, 2, 2), b=10 * normal(1, 6),
    )  # fmt: skip
    data = DataSet.of({"x": normal(9, 8, 4, 5, 5)})
    hub = quantize(made, measured(made, data), QuantSpec())
    (node,) = [n for n in hub.quantized.graph if n.op_type == "ConvTranspose"]
    assert node.inputs[2].producer().inputs[0].const_value.dtype.name == "INT32"
    (expected,), (found,) = run(made.bytes, data), run(hub.bytes, data)
    assert 10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum()) > 35


# ------------------------------------------------------------------ what windows and products do by themselves


@few
@given(
    n=st.integers(4, 9), k=st.integers(1, 4), s=st.integers(1, 3), d=st.integers(1, 2),
    mode=st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"]),
    operator=st.sampled_from(["Conv", "MaxPool", "AveragePool"]),
)  # fmt: skip
def test_padding_is_written_down_and_windows_compute_the_same(
    n: int, k: int, s: int, d: int, mode: str, operator: str
) -> None:
    d = d if mode == "VALID" and (k - 1) * d < n else 1  # ONNX Runtime has no dilated windows that pad by themselves
    w = {"w": normal(0, 3, 2, k, k)} if operator == "Conv" else {}
    window = f'auto_pad="{mode}", kernel_shape=[{k},{k}], strides=[{s},{s}], dilations=[{d},{d}]'
    made = assert_same(
        f"(float[batch,2,{n},{n}] x) => (float[batch,c,h,v] y) {{ y = {operator}<{window}>(x{', w' if w else ''}) }}",
        [operator], normal(1, 3, 2, n, n), **w,
    )  # fmt: skip
    assert "auto_pad" not in made.model.graph[0].attributes


def test_padding_of_a_free_size_stays_to_be_worked_out() -> None:
    made = assert_same(
        '(float[batch,2,h,v] x) => (float[batch,3,i,j] y) { y = Conv<auto_pad="SAME_UPPER">(x, w) }',
        ["Conv"], normal(1, 3, 2, 7, 7), w=normal(0, 3, 2, 3, 3),
    )  # fmt: skip
    assert "auto_pad" in made.model.graph[0].attributes


def test_an_input_that_a_product_turns_is_turned_in_front_of_it() -> None:
    made = assert_same(
        "(float[batch,6] x) => (float[batch,5] y) { t = Transpose<perm=[1,0]>(x) y = Gemm<transA=1>(t, w, b) }",
        ["Transpose", "Transpose", "Gemm"], normal(1, 3, 6), w=normal(0, 6, 5), b=normal(2, 5),
    )  # fmt: skip
    assert all(node.name for node in made.model.graph)
