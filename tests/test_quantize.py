from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from graphs import conv_relu_conv, graph, images, measured, normal, residual, run
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.core.errors import DeploykitError
from deploykit.core.target import QuantSpec
from deploykit.hub.quantize import BIAS_LIMIT, activation_params, quantize, weight_scale
from deploykit.hub.slices import Slicer

EVERYWHERE = QuantSpec()
LINEAR_INPUTS = QuantSpec(
    activation_signed=True, activation_symmetric=True, bias="float", placement="linear_inputs",
    weight_scale_floor=2.0**-14,
)  # fmt: skip


def hub_of(made, spec=EVERYWHERE, data=None, **options):
    data = data or images()
    return quantize(made, measured(made, data, options.get("method", "minmax")), spec, **options)


def nodes(hub, kind):
    return [n for n in onnx.load_model_from_string(hub.bytes).graph.node if n.op_type == kind]


def producer_types(hub, kind):
    """For every node of a kind: the operator types its inputs come from."""
    slicer = Slicer(onnx.load_model_from_string(hub.bytes))
    return [[slicer.producer[i].op_type if i in slicer.producer else "" for i in n.input] for n in nodes(hub, kind)]


def test_a_convolution_reads_integers_and_writes_integers() -> None:
    hub = hub_of(conv_relu_conv())
    assert producer_types(hub, "Conv") == [["DequantizeLinear"] * 3] * 2
    assert len(nodes(hub, "QuantizeLinear")) == 3  # x, r, y; nothing between a convolution and its Relu


def test_the_quantized_graph_is_valid_onnx_and_keeps_its_inputs_and_outputs() -> None:
    for spec in (EVERYWHERE, LINEAR_INPUTS):
        model = onnx.load_model_from_string(hub_of(residual(), spec).bytes)
        onnx.checker.check_model(model, full_check=True)
        assert [i.name for i in model.graph.input] == ["x"]
        assert [o.name for o in model.graph.output] == ["y"]


@pytest.mark.parametrize("spec", [EVERYWHERE, LINEAR_INPUTS, QuantSpec(weight_bits=7)])
def test_eight_bits_are_close_to_float(spec) -> None:
    made, data = residual(), images()
    (expected,), (found,) = run(made.bytes, data), run(hub_of(made, spec).bytes, data)
    signal = 10 * np.log10(np.square(expected).sum() / np.square(expected - found).sum())
    assert signal > 28


def test_inputs_only_placement_leaves_outputs_of_products_in_float() -> None:
    hub = hub_of(residual(), LINEAR_INPUTS)
    slicer = Slicer(onnx.load_model_from_string(hub.bytes))
    readers = {i: n.op_type for n in slicer.model.graph.node for i in n.input}
    assert [readers[n.output[0]] for n in nodes(hub, "Conv")] == ["Relu", "Add"]


def test_inputs_only_placement_quantizes_the_skip_branch_of_a_residual_add_and_not_the_other() -> None:
    (sources,) = producer_types(hub_of(residual(), LINEAR_INPUTS), "Add")
    assert sorted(sources) == ["Conv", "DequantizeLinear"]


def test_quantizing_does_not_change_the_float_graph() -> None:
    made = residual()
    before = made.bytes
    hub_of(made)
    assert type(made)(made.model).bytes == before


def test_the_same_inputs_give_the_same_bytes() -> None:
    assert hub_of(residual()).bytes == hub_of(residual()).bytes


def test_ranges_of_another_graph_are_refused() -> None:
    with pytest.raises(DeploykitError, match="another graph"):
        quantize(residual(0), measured(residual(1), images()), EVERYWHERE)


def test_ranges_that_lack_a_tensor_are_refused_by_its_name() -> None:
    made, data = residual(), images()
    whole = measured(made, data)
    for name in ("x", "y"):
        holed = replace(whole, tensors={k: v for k, v in whole.tensors.items() if k != name})
        with pytest.raises(DeploykitError, match=f"no tensor '{name}'; calibrate again"):
            quantize(made, holed, EVERYWHERE)


def test_a_dead_channel_does_not_saturate_its_bias() -> None:
    weight, bias = normal(0, 4, 3, 3, 3), np.array([5.0, 0, 0, 0], np.float32)
    weight[0] = 1e-12
    made = graph("(float[batch,3,8,8] x) => (float[batch,4,6,6] y) { y = Conv(x, w, b) }", w=weight, b=bias)
    hub = hub_of(made)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load_model_from_string(hub.bytes).graph.initializer}
    integers = np.concatenate([a for a in stored.values() if a.dtype == np.int32])
    assert np.abs(integers).max() <= BIAS_LIMIT * 1.001
    (found,), (expected,) = run(hub.bytes, images()), run(made.bytes, images())
    assert np.abs(found - expected)[:, 0].max() < 0.1


def test_concat_converts_all_branches_to_one_scale() -> None:
    made = graph(
        """(float[batch,3,8,8] x) => (float[batch,8,8,8] y) {
            a = Conv<pads=[1,1,1,1]>(x, wa, b)
            c = Conv<pads=[1,1,1,1]>(x, wc, b)
            y = Concat<axis=1>(a, c)
        }""",
        wa=normal(0, 4, 3, 3, 3), wc=10 * normal(1, 4, 3, 3, 3), b=np.zeros(4, np.float32),
    )  # fmt: skip
    hub = hub_of(made)
    slicer = Slicer(onnx.load_model_from_string(hub.bytes))
    (concat,) = nodes(hub, "Concat")
    scales = {float(slicer.array(slicer.producer[i].input[1])) for i in concat.input}
    (output,) = [n for n in nodes(hub, "DequantizeLinear") if n.output[0] == "y"]
    assert scales == {float(slicer.array(output.input[1]))}


def test_sigmoid_writes_a_256th_per_step_and_is_converted_where_it_meets_other_scales() -> None:
    made = graph(
        """(float[batch,3,8,8] x) => (float[batch,6,8,8] y) {
            a = Conv<pads=[1,1,1,1]>(x, w, b)
            s = Sigmoid(a)
            y = Concat<axis=1>(s, a)
        }""",
        w=normal(0, 3, 3, 3, 3), b=np.zeros(3, np.float32),
    )  # fmt: skip
    data = images()
    hub = hub_of(made, data=data)
    slicer = Slicer(onnx.load_model_from_string(hub.bytes))
    quantizers = {n.input[0]: float(slicer.array(n.input[1])) for n in nodes(hub, "QuantizeLinear")}
    assert quantizers["s"] == 2.0**-8
    (concat,) = nodes(hub, "Concat")
    assert len({float(slicer.array(slicer.producer[i].input[1])) for i in concat.input}) == 1
    (found,), (expected,) = run(hub.bytes, data), run(made.bytes, data)
    assert np.abs(found - expected).max() < 0.3


def test_moving_data_keeps_its_scale() -> None:
    made = graph(
        """(float[batch,3,8,8] x) => (float[batch,192] y) {
            p = MaxPool<kernel_shape=[1,1]>(x)
            y = Reshape(p, shape)
        }""",
        shape=np.array([0, -1]),
    )  # fmt: skip
    hub = hub_of(made)
    slicer = Slicer(onnx.load_model_from_string(hub.bytes))
    assert len({float(slicer.array(n.input[1])) for n in nodes(hub, "QuantizeLinear")}) == 1
    x = next(images().batches(16)).inputs["x"]
    (found,) = run(hub.bytes, images())
    scale = float(slicer.array(nodes(hub, "QuantizeLinear")[0].input[1]))
    assert np.abs(found - x.reshape(16, -1)).max() <= scale * 0.51


def test_a_constant_factor_is_quantized_with_a_scale_of_its_own() -> None:
    made = graph(
        "(float[batch,3,8,8] x) => (float[batch,3,8,8] y) { y = Mul(x, k) }", k=np.full((3, 1, 1), 0.25, np.float32)
    )
    (found,), (expected,) = run(hub_of(made).bytes, images()), run(made.bytes, images())
    assert np.abs(found - expected).max() < 0.02


def test_operators_without_a_rule_stay_float_and_are_named() -> None:
    made = graph(
        """(float[batch,3,8,8] x) => (float[batch,3,8,8] y) {
            a = Conv<pads=[1,1,1,1]>(x, w, b)
            e = Erf(a)
            y = Add(e, a)
        }""",
        w=normal(0, 3, 3, 3, 3), b=np.zeros(3, np.float32),
    )  # fmt: skip
    islands = hub_of(made).islands()
    assert [(i.operator, i.layer) for i in islands] == [("Erf", "e")]
    assert "no quantization rule" in islands[0].why


def test_layers_named_by_the_user_stay_float() -> None:
    hub = hub_of(conv_relu_conv(), keep_float=["y"])
    assert producer_types(hub, "Conv")[1] == ["DequantizeLinear", "", ""]
    assert hub.counts() == {"Conv": 1}
    assert "on request" in hub.islands()[0].why


def test_a_layer_stays_float_with_what_would_run_together_with_it() -> None:
    hub = hub_of(conv_relu_conv(), keep_float=["r"])
    assert hub.counts() == {"Conv": 1} and producer_types(hub, "Conv")[0][0] != "DequantizeLinear"
    assert "on request" in hub.islands()[0].why


def test_a_name_that_keeps_nothing_in_float_is_an_error() -> None:
    with pytest.raises(DeploykitError, match=r"no layer 'yy'\. Did you mean 'y'"):
        hub_of(conv_relu_conv(), keep_float=["yy"])


def test_seven_bit_weights_stay_within_63() -> None:
    hub = hub_of(conv_relu_conv(), QuantSpec(weight_bits=7))
    arrays = [onnx.numpy_helper.to_array(t) for t in onnx.load_model_from_string(hub.bytes).graph.initializer]
    weights = [a for a in arrays if a.dtype == np.int8 and a.ndim == 4]
    assert {int(np.abs(w).max()) for w in weights} == {63}


def test_masked_zeros_stay_zero() -> None:
    made = conv_relu_conv()
    weight = made.model.graph.initializers["wa"].const_value.numpy().copy()
    mask = np.abs(weight) > 0.5
    masked = graph(
        "(float[batch,3,8,8] x) => (float[batch,4,6,6] y) { y = Conv(x, w, b) }",
        w=weight * mask, b=np.ones(4, np.float32),
    )  # fmt: skip
    held = type(masked)(masked.model, {"w": mask})
    hub = hub_of(held)
    arrays = [onnx.numpy_helper.to_array(t) for t in onnx.load_model_from_string(hub.bytes).graph.initializer]
    (stored,) = [a for a in arrays if a.dtype == np.int8 and a.ndim == 4]
    assert not stored[~mask].any()


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.sampled_from([EVERYWHERE, QuantSpec(activation_signed=True)]))
@settings(max_examples=400)
def test_activation_parameters_cover_the_range_and_represent_zero(a, b, spec) -> None:
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    p = activation_params(low, high, spec)
    bottom, top = spec.activation_range
    tolerance = 1e-5 * max(-low, high, 1e-6)
    assert (bottom - int(p.zero_point)) * float(p.scale) <= low + tolerance
    assert (top - int(p.zero_point)) * float(p.scale) >= high - tolerance
    assert bottom <= int(p.zero_point) <= top
    if high - low > 1e-3:
        # the scale of the exact, unrounded zero point is widened by one step in 254 at most
        assert float(p.scale) <= (high - low) / 254 * 1.0001


def test_pixels_normalised_to_plus_minus_one_do_not_lie_on_rounding_ties() -> None:
    p = activation_params(-1.0, 1.0, EVERYWHERE)
    pixels = (np.arange(256) - 127.5) / 127.5
    distance = np.abs(pixels / float(p.scale) % 1.0 - 0.5)
    assert (distance < 1e-4).sum() <= 2


def test_power_of_two_scales_are_powers_of_two() -> None:
    spec = QuantSpec(scale="power_of_two")
    p = activation_params(-0.3, 1.7, spec)
    w = weight_scale(normal(0, 4, 3, 3, 3), 0, spec, None, float(p.scale))
    for scale in (float(p.scale), *w.tolist()):
        assert np.log2(scale) == round(np.log2(scale))


@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from(["channel", "tensor"]))
@settings(max_examples=30)
def test_weight_scales_cover_every_weight(channels, inputs, granularity) -> None:
    weight = normal(channels * 7 + inputs, channels, inputs, 3, 3)
    scale = weight_scale(weight, 0, QuantSpec(weight_granularity=granularity), None, 1.0)
    assert scale.shape == (channels,)
    assert (np.abs(weight) <= 127.0001 * scale[:, None, None, None]).all()
    if granularity == "tensor":
        assert len(set(scale.tolist())) == 1


@pytest.mark.parametrize("name", ["a_q", "a_dq", "a_scale", "y_float"])
def test_a_layer_may_be_called_like_what_quantizing_adds(name) -> None:
    made = graph(
        f"""(float[batch,3,8,8] x) => (float[batch,5,4,4] y) {{
            a = Conv(x, wa, ba)
            {name} = Relu(a)
            y = Conv({name}, wb, bb)
        }}""",
        wa=normal(0, 4, 3, 3, 3), ba=normal(1, 4), wb=normal(2, 5, 4, 3, 3), bb=normal(3, 5),
    )  # fmt: skip
    (found,), (expected,) = run(hub_of(made).bytes, images()), run(made.bytes, images())
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_nodes_without_a_name_or_with_the_same_are_planned_one_by_one() -> None:
    from deploykit.hub.lower import from_proto

    text = "(float[batch,3,8,8] x) => (float[batch,4,1,1] y) { a = Conv(x, w, b) r = Relu(a) y = GlobalAveragePool(r) }"
    for name in ("", "same"):
        proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> test {text}')
        for node in proto.graph.node:
            node.name = name
        weights = {"w": normal(0, 4, 3, 3, 3), "b": normal(1, 4)}
        proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in weights.items())
        assert hub_of(from_proto(proto, "test")).counts() == {"Conv": 1, "GlobalAveragePool": 1}


def test_a_weight_used_twice_is_stored_once() -> None:
    made = graph(
        """(float[batch,3,8,8] x) => (float[batch,3,8,8] y) {
            a = Conv<pads=[1,1,1,1]>(x, w)
            y = Conv<pads=[1,1,1,1]>(a, w)
        }""",
        w=normal(0, 3, 3, 3, 3),
    )  # fmt: skip
    arrays = [onnx.numpy_helper.to_array(t) for t in onnx.load_model_from_string(hub_of(made).bytes).graph.initializer]
    assert sum(a.dtype == np.int8 and a.ndim == 4 for a in arrays) == 1


def test_the_factors_of_a_gemm_go_into_its_constants() -> None:
    made = graph(
        "(float[batch,4] x) => (float[batch,5] y) { y = Gemm<alpha=0.5, beta=0.25, transB=1>(x, w, b) }",
        w=normal(0, 5, 4), b=normal(1, 5),
    )  # fmt: skip
    data = images(shape=(4,))
    x = next(data.batches(16)).inputs["x"]
    expected = 0.5 * x @ normal(0, 5, 4).T + 0.25 * normal(1, 5)
    np.testing.assert_allclose(run(made.bytes, data)[0], expected, atol=1e-5)
    assert np.abs(run(hub_of(made, data=data).bytes, data)[0] - expected).max() < 0.1
