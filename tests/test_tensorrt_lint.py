from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorrt_graphs import BROKEN, CONV, conv, hub, model, residual, samples, small_net, weights

from deploykit import targets
from deploykit.exporters.tensorrt.lint import lint, read, runs_in_8_bits
from deploykit.hub.graph import serialize


def test_a_graph_as_tensorrt_likes_it_breaks_no_rule() -> None:
    onnx.checker.check_model(residual(), full_check=True)
    assert lint(residual()) == ()
    products = [n for n in read(residual()).graph if n.op_type in ("Conv", "Gemm")]
    assert [runs_in_8_bits(n) for n in products] == [True, True, True]


@pytest.mark.parametrize("wrong", BROKEN)
def test_each_rule_is_found_alone(wrong: str) -> None:
    rule, severity, proto = BROKEN[wrong]
    assert {(f.rule, f.severity) for f in lint(proto)} == {(rule, severity)}


def test_a_release_that_lacks_an_operator_is_named_and_one_that_has_it_is_not() -> None:
    proto = model("c = Cast<to=1>(x) y = GridSample(c, g)", "uint8[1,16,8,8] x", g=np.zeros((1, 8, 8, 2), np.float32))

    def said(oldest: tuple[int, int], newest: tuple[int, int]) -> list[tuple[str, str, str]]:
        return [(f.severity, f.node, f.sentence) for f in lint(proto, (oldest, newest))]

    assert said((8, 5), (8, 5)) == said((10, 0), (11, 4)) == []
    assert said((8, 2), (8, 2)) == [
        ("E", "x", "TensorRT 8.2 has no uint8 inputs"), ("E", "y", "TensorRT 8.2 has no GridSample"),
    ]  # fmt: skip
    later = "since 8.5; older ones will not build this file"
    assert said((8, 2), (10, 0)) == [
        ("I", "x", f"TensorRT has uint8 inputs {later}"), ("I", "y", f"TensorRT has GridSample {later}"),
    ]  # fmt: skip


def test_sums_of_what_is_scattered_are_read_since_10() -> None:
    body = 'y = ScatterElements<reduction="add", axis=1>(x, i, u)'
    proto = model(body, i=np.zeros((1, 1, 8, 8), np.int64), u=np.ones((1, 1, 8, 8), np.float32))
    assert [f.severity for f in lint(proto, ((8, 5), (8, 5)))] == ["E"]
    assert [f.severity for f in lint(proto, ((8, 5), (10, 0)))] == ["I"]


def test_a_finding_names_the_layer_and_says_what_is_wrong() -> None:
    (finding,) = lint(conv(s=0.05, b=np.zeros(16, np.float16)))
    assert str(finding) == "Q8 at 'y': its inputs mix float and float16"


@pytest.mark.parametrize(("operator", "axis", "wrong"), [("MatMul", 1, 0), ("Gemm", 1, 0), ("Gemm<transB=1>", 0, 1)])
def test_weight_scales_must_lie_along_the_output_channels(operator: str, axis: int, wrong: int) -> None:
    for chosen, rules in ((axis, set()), (wrong, {"Q10"})):
        body = CONV.replace("<axis=0>", f"<axis={chosen}>").replace(
            "Conv<pads=[1,1,1,1]>(d, wd, b)", f"{operator}(d, wd)"
        )
        proto = model(
            body, "float[4,16] x", "float[4,16] y", s=0.05, z=np.int8(0), **weights(16, 16, axis=chosen)
        )  # fmt: skip
        assert {f.rule for f in lint(proto)} == rules


def test_both_branches_of_an_add_quantized_keep_it_from_fusing() -> None:
    body = CONV.replace("y =", "c =") + " cq = QuantizeLinear(c, s, z) cd = DequantizeLinear(cq, s, z) y = Add(cd, d)"
    (finding,) = lint(conv(body))
    assert finding.rule == "Q14"
    assert "skip branch" in finding.sentence


def test_an_add_of_two_convolutions_may_have_one_branch_quantized() -> None:
    body = CONV.replace("y =", "c =") + (
        " cq = QuantizeLinear(c, s, z) cd = DequantizeLinear(cq, s, z) e = Conv<pads=[1,1,1,1]>(d, wd) y = Add(cd, e)"
    )
    assert lint(conv(body)) == ()


def test_a_quantized_model_output_is_found() -> None:
    body = CONV.replace("y =", "c =") + " cq = QuantizeLinear(c, s, z) y = DequantizeLinear(cq, s, z)"
    assert [f.rule for f in lint(conv(body))] == ["Q14"]


def test_per_tensor_and_blocked_weights_are_fine() -> None:
    assert lint(conv(CONV.replace("<axis=0>", ""), ws=0.01, wz=np.int8(0))) == ()


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["jetson", "gpu-t4", "rtx-4090"]),
    st.integers(1, 3).map(lambda n: 2**n),
    st.lists(st.sampled_from(["conv", "relu", "clip", "skip", "pool", "depthwise"]), min_size=1, max_size=6),
)
def test_the_hub_of_a_tensorrt_target_breaks_no_rule(target: str, channels: int, layers: list[str]) -> None:
    random = np.random.default_rng(channels)
    shape, body, here = f"float[batch,{channels},8,8]", [], "x"
    arrays: dict[str, Any] = {}
    for i, layer in enumerate(layers):
        arrays[f"w{i}"] = random.standard_normal((channels, 1 if layer == "depthwise" else channels, 3, 3)).astype("f")
        body.append(
            {
                "conv": f"v{i} = Conv<pads=[1,1,1,1]>({here}, w{i})",
                "depthwise": f"v{i} = Conv<pads=[1,1,1,1], group={channels}>({here}, w{i})",
                "relu": f"v{i} = Relu({here})",
                "clip": f"v{i} = Clip({here}, low, high)",
                "skip": f"t{i} = Conv<pads=[1,1,1,1]>({here}, w{i}) v{i} = Add(t{i}, {here})",
                "pool": f"v{i} = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>({here})",
            }[layer]
        )
        here = f"v{i}"
    last = " y = Conv<pads=[1,1,1,1]>(" + here + ", w)"
    w = random.standard_normal((channels, channels, 3, 3)).astype("f")
    proto = model(" ".join(body) + last, f"{shape} x", f"{shape} y", 20, w=w, low=0.0, high=6.0, **arrays)
    found = hub(proto, targets.load(target).quant, {"x": samples(4, channels, 8, 8)})
    assert found.quantized is not None
    quantized = onnx.load_model_from_string(serialize(found.quantized))
    assert lint(quantized) == ()
    assert all(runs_in_8_bits(n) for n in read(quantized).graph if n.op_type == "Conv")


def test_canonical_quantization_is_refused_by_the_rules() -> None:
    found = hub(small_net(), targets.load("x86").quant, {"x": samples()})
    assert found.quantized is not None
    rules = {f.rule for f in lint(ir.to_proto(found.quantized))}
    assert {"Q1", "Q2", "Q7"} <= rules
