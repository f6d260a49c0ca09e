from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from tensorrt_graphs import hub, model, residual, samples, small_net

from deploykit import targets
from deploykit.core.errors import DeploykitError
from deploykit.exporters.half import bake_half
from deploykit.exporters.tensorrt.lint import lint
from deploykit.exporters.tensorrt.opset import verify_opset

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


def baked(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    changed = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    notes = bake_half(changed)
    result = ir.to_proto(changed)
    del result.graph.value_info[:]
    verify_opset(result, proto.opset_import[0].version)
    return result, notes


def types(proto: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    found = {v.name: v.type.tensor_type.elem_type for v in [*graph.value_info, *graph.input, *graph.output]}
    return found | {i.name: i.data_type for i in graph.initializer}


def reference(proto: onnx.ModelProto, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(ReferenceEvaluator(proto).run(None, {"x": x})[0])


def test_inputs_and_outputs_stay_float_and_nothing_else_does() -> None:
    proto = small_net()
    result, notes = baked(proto)
    floats = {name for name, t in types(result).items() if t == FLOAT}
    assert floats == {"x", "y"}
    assert notes == ()
    x = samples(2)
    np.testing.assert_allclose(reference(result, x), reference(proto, x), atol=0.02)


def test_quantized_graphs_get_half_scales_and_keep_their_integers() -> None:
    proto = residual()
    proto.opset_import[0].version = 19
    result, _ = baked(proto)
    assert {name for name, t in types(result).items() if t == FLOAT} == {"x", "y"}
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in result.graph.initializer}
    before = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
    np.testing.assert_array_equal(weights["w"], before["w"])
    np.testing.assert_array_equal(weights["ws_half"], before["ws"].astype(np.float16))
    assert lint(result) == ()


def test_constants_an_operator_takes_in_float_only_stay() -> None:
    body = 'r = Resize<mode="nearest">(x, , scales) y = Mul(r, k)'
    proto = model(body, y="float[1,16,16,16] y", opset=19, scales=[1.0, 1.0, 2.0, 2.0], k=[0.5])
    result, _ = baked(proto)
    found = types(result)
    assert found["scales"] == FLOAT
    assert found["k_half"] == HALF


def test_a_constant_with_readers_of_both_kinds_is_kept_in_both_types() -> None:
    body = 'r = Resize<mode="nearest">(x, , scales) y = Mul(r, scales)'
    proto = model(body, "float[1,4,8,4] x", "float[1,4,8,4] y", 19, scales=[1.0, 1.0, 1.0, 1.0])
    found = types(baked(proto)[0])
    assert (found["scales"], found["scales_half"]) == (FLOAT, HALF)


def test_operators_without_a_half_form_are_all_named() -> None:
    body = "b = Reshape(x, s) k = NonMaxSuppression(b, p) n = NonMaxSuppression(b, p) y = Add(k, n)"
    proto = model(body, "float[1,6,4] x", "int64[m,3] y", 19, s=np.array([1, 6, 4]), p=np.zeros((1, 1, 6), np.float32))
    with pytest.raises(DeploykitError, match=r"NonMaxSuppression \(layer 'k'\); NonMaxSuppression \(layer 'n'\)"):
        baked(proto)


def test_masks_beyond_half_are_cut_and_said() -> None:
    proto = model("y = Add(x, mask)", opset=19, mask=[-3.4e38])
    result, notes = baked(proto)
    assert notes == ("1 values of 'mask' are beyond what float16 holds and became ±65504",)
    assert onnx.numpy_helper.to_array(result.graph.initializer[0])[0] == -65504


def test_infinite_constants_stay_infinite() -> None:
    result, notes = baked(model("y = Add(x, mask)", opset=19, mask=[-np.inf]))
    assert notes == ()
    assert onnx.numpy_helper.to_array(result.graph.initializer[0])[0] == -np.inf


def test_scales_that_lose_precision_are_said() -> None:
    proto = model("q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)", opset=19, s=3e-5, z=np.int8(0))
    assert baked(proto)[1] == ("the scales of q are below 2^-14, where float16 loses precision",)


def test_a_scale_that_becomes_zero_is_an_error_of_the_lint() -> None:
    proto = model("q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)", opset=19, s=1e-8, z=np.int8(0))
    assert {f.rule for f in lint(baked(proto)[0])} == {"Q5"}


def test_weight_scales_of_the_hub_are_normal_numbers_in_half() -> None:
    tiny = small_net()
    for i in tiny.graph.initializer:
        if i.name == "w1":
            i.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(i) * np.float32(1e-4), "w1"))
    found = hub(tiny, targets.load("jetson").quant, {"x": samples()}).quantized
    assert found is not None
    scales = [
        v.const_value.numpy() for n, v in found.graph.initializers.items() if n.endswith("_q_scale") and v.const_value
    ]
    assert scales
    assert min(s.min() for s in scales) >= 2.0**-14


def test_casts_inside_go_to_half() -> None:
    result, _ = baked(model("i = Cast<to=7>(x) f = Cast<to=1>(i) y = Relu(f)", opset=19))
    found = types(result)
    assert (found["i"], found["f"], found["y"]) == (onnx.TensorProto.INT64, HALF, FLOAT)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_half_graphs_are_close_for_any_shape(batch: int, height: int, width: int, keep: bool) -> None:
    proto = model(
        f"m = ReduceMean<keepdims={int(keep)}>(x, axes) y = Relu(m)",
        f"float[n,3,{height},{width}] x", "float[n,3,1,1] y" if keep else "float[n,3] y", 19, axes=np.array([2, 3]),
    )  # fmt: skip
    x = samples(batch, 3, height, width)
    np.testing.assert_allclose(reference(baked(proto)[0], x), reference(proto, x), atol=4e-3)
