from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from families import FAMILIES, example
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorrt_graphs import OPERATORS, SINCE_16, model, samples

from deploykit.core.errors import DeploykitError
from deploykit.exporters.tensorrt.opset import BODIES, NEWEST, OLDEST, RULES, _types_only, lower_opset, verify_opset
from deploykit.exporters.tensorrt.parsers import unread

X = "float[2,16,8,8] x"
IR_VERSIONS = {13: 7, 17: 8, 19: 9}


def lowered(proto: onnx.ModelProto, opset: int, without: tuple[str, ...] = ()) -> onnx.ModelProto:
    changed = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    lower_opset(changed, opset, without)
    result = ir.to_proto(changed)
    verify_opset(result, opset)
    return result


def run(proto: onnx.ModelProto, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # its optimizer (1.31) moves a Transpose past a Pad whose axes are counted from the end and loses count
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (y,) = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )
    return np.asarray(y)


ROUNDING = 1e-5
"""Of answers of about 1: a normalisation divides by deviations, which makes the last bits of what it reads larger."""


def assert_same(proto: onnx.ModelProto, opset: int, x: np.ndarray[Any, Any], without: tuple[str, ...] = ()) -> None:
    """The lowered graph has exactly that operator set, passes the checker and computes what the graph computed."""
    result = lowered(proto, opset, without)
    assert result.ir_version == IR_VERSIONS[opset]
    assert not {n.op_type for n in result.graph.node} & set(without)
    np.testing.assert_allclose(run(result, x), run(proto, x), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("opset", [13, 17, 19])
@pytest.mark.parametrize("what", OPERATORS)
def test_a_lowered_graph_computes_the_same(what: str, opset: int) -> None:
    body, y, arrays = OPERATORS[what]
    assert_same(model(body, X, y, 20, **arrays), opset, samples(2, 16, 8, 8))


@pytest.mark.parametrize("what", SINCE_16)
def test_what_13_has_no_words_for_is_said_in_17_and_refused_in_13(what: str) -> None:
    body, y, arrays = SINCE_16[what]
    proto = model(body, X, y, 20, **arrays)
    assert_same(proto, 17, samples(2, 16, 8, 8))
    operator = proto.graph.node[0].op_type
    with pytest.raises(DeploykitError, match=rf"operator set 13: {operator} \(layer 'y'\)"):
        lowered(proto, 13)


@pytest.mark.parametrize(
    ("version", "opset", "missing"),
    [
        ((8, 2), 13, ["Gelu", "HardSwish", "LayerNormalization", "Mish", "Reciprocal"]),
        ((8, 5), 17, ["Gelu", "LayerNormalization", "Mish"]),
        ((10, 0), 19, ["Gelu", "Mish"]),
    ],
)
def test_operators_that_a_parser_does_not_read_are_written_out(
    version: tuple[int, ...], opset: int, missing: list[str]
) -> None:
    assert sorted(unread(version) & set(BODIES)) == missing
    body = """a = Mish(x) n = LayerNormalization(a, scale) h = HardSwish(n) q = Mul(h, h) o = Add(q, one)
              r = Reciprocal(o) y = Add(r, h)"""
    proto = model(body, X, X.replace(" x", " y"), 20, scale=np.ones(8, np.float32), one=1.0)
    assert_same(proto, opset, samples(2, 16, 8, 8), tuple(missing))


def test_names_that_are_taken_are_not_given_again() -> None:
    proto = model("g = Gelu(x) h = Gelu(g) y = Add(g, h)", X, X.replace(" x", " y"), 20)
    proto.graph.node[1].output[0] = proto.graph.node[2].input[1] = "g.1"
    assert_same(proto, 13, samples(2, 16, 8, 8))


@pytest.mark.parametrize(("steps", "operator"), [(1, "LSTM"), (2, "LSTM"), (1, "GRU"), (2, "GRU")])
@pytest.mark.parametrize("opset", [13, 17])
def test_recurrent_layers_keep_their_answers(steps: int, operator: str, opset: int) -> None:
    gates, directions, hidden = {"LSTM": 4, "GRU": 3}[operator], steps, 5
    random = np.random.default_rng(0)
    way = "bidirectional" if directions == 2 else "forward"
    body = f'y = {operator}<hidden_size={hidden}, direction="{way}", layout=0>(x, w, r, b)'
    arrays = {
        "w": random.standard_normal((directions, gates * hidden, 3)).astype(np.float32),
        "r": random.standard_normal((directions, gates * hidden, hidden)).astype(np.float32),
        "b": random.standard_normal((directions, 2 * gates * hidden)).astype(np.float32),
    }
    proto = model(body, "float[6,2,3] x", f"float[6,{directions},2,{hidden}] y", 20, **arrays)
    assert_same(proto, opset, samples(6, 2, 3))


PIECES = {
    "Conv": "Conv<pads=[1,1,1,1]>({x}, w)",
    "Gelu": "Gelu({x})",
    "HardSwish": "HardSwish({x})",
    "LayerNormalization": "LayerNormalization({x}, scale)",
    "Mish": "Mish({x})",
    "Clip": "Clip({x}, low, high)",
    "Softmax": "Softmax({x})",
    "Sigmoid": "Sigmoid({x})",
    "Relu": "Relu({x})",
    "ReduceMean": "ReduceMean({x}, axes)",
    "ReduceMax": "ReduceMax({x}, axes)",
    "Transpose": "Transpose<perm=[0,1,3,2]>({x})",
    "Reshape": "Reshape<allowzero=0>({x}, shape)",
    "Resize": 'Resize<mode="linear">({x}, , , sizes)',
    "AveragePool": "AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], dilations=[1,1]>({x})",
    "MaxPool": "MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>({x})",
    "Concat and Split": None,
    "Add": "Add({x}, x)",
    "Pad": "Pad({x}, pads, low, last)",
}
"""Operators on [2, 4, 4, 4]; what they make of it is resized to that again."""


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=7), st.sampled_from([13, 17, 19]))
def test_networks_of_any_operators_keep_their_answers(names: list[str], opset: int) -> None:
    body, here = "", "x"
    for i, name in enumerate(names):
        piece = PIECES[name]
        if piece is None:
            body += f"c{i} = Concat<axis=1>({here}, x) a{i}, v{i} = Split<axis=1, num_outputs=2>(c{i}) "
        else:
            body += f"a{i} = {piece.format(x=here)} "
            grown = name in ("ReduceMean", "ReduceMax", "Pad")
            body += f'v{i} = Resize<mode="nearest">(a{i}, , , sizes) ' if grown else f"v{i} = Identity(a{i}) "
        here = f"v{i}"
    w = np.random.default_rng(1).standard_normal((4, 4, 3, 3)).astype(np.float32) / 6
    arrays = {
        "w": w, "scale": np.linspace(0.5, 1, 4, dtype=np.float32), "low": 0.0, "high": 6.0, "axes": np.array([3]),
        "shape": np.array([0, 4, -1, 4]), "sizes": np.array([2, 4, 4, 4]), "pads": np.array([1, 2]),
        "last": np.array([-1]),
    }  # fmt: skip
    used = {k: v for k, v in arrays.items() if f" {k})" in body or f" {k}," in body}
    proto = model(body + f"y = Identity({here})", "float[2,4,4,4] x", "float[2,4,4,4] y", 20, **used)
    assert_same(proto, opset, samples(2, 4, 4, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_networks_is_said_in_13_and_17(name: str) -> None:
    from deploykit.exporters.to_onnx import runner
    from deploykit.hub.lower import lower
    from deploykit.hub.running import session

    found = example(name)
    inputs = next(found.data.batches(2)).inputs
    graph = lower(found.module, inputs)
    expected = runner(session(graph.bytes))(inputs)
    for opset, release in ((13, (8, 2)), (17, (8, 5)), (19, (10, 0))):
        changed = graph.copy()
        lower_opset(changed, opset, unread(release))
        proto = ir.to_proto(changed)
        verify_opset(proto, opset)
        assert not {n.op_type for n in proto.graph.node} & unread(release)
        answers = runner(session(proto.SerializeToString()))(inputs)
        for output, array in expected.items():
            np.testing.assert_allclose(answers[output], array, rtol=1e-4, atol=1e-4, err_msg=f"{opset} {output}")


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
        "a = CenterCropPad(x, size) b = Pad<mode=\"wrap\">(a, pads) "
        "c = Resize<antialias=1, mode=\"linear\">(b, , scales) d = ReduceMean<noop_with_empty_axes=1>(c) y = Relu(d)",
        X, "float[2,16,16,16] y", 20, pads=np.zeros(8, np.int64), scales=[1.0, 1.0, 2.0, 2.0],
        size=np.array([2, 16, 8, 8]),
    )  # fmt: skip
    with pytest.raises(DeploykitError) as error:
        lowered(proto, 17)
    message = str(error.value)
    assert "operator set 17" in message
    for part in (
        "CenterCropPad (layer 'a') is defined since 18",
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


@pytest.mark.parametrize(("source", "asked"), [(17, 19), (21, 17), (20, 12)])
def test_only_covered_operator_sets_are_lowered(source: int, asked: int) -> None:
    with pytest.raises(DeploykitError, match=f"operator set {source} and the file would have {asked}"):
        lowered(model("y = Relu(x)", opset=source), asked)


def test_a_file_of_another_operator_set_does_not_pass_for_the_one_asked() -> None:
    with pytest.raises(AssertionError, match="asked for operator set 17"):
        verify_opset(model("y = Relu(x)", opset=18), 17)


@pytest.mark.parametrize("operator", [op for op, rule in RULES.items() if rule is _types_only])
def test_operators_that_are_only_relabelled_gained_types_and_nothing_else(operator: str) -> None:
    old = onnx.defs.get_schema(operator, max_inclusive_version=OLDEST if operator != "CastLike" else 15)
    new = onnx.defs.get_schema(operator, max_inclusive_version=NEWEST)
    assert set(new.attributes) - set(old.attributes) <= {"saturate"}
    assert [i.name for i in new.inputs] == [i.name for i in old.inputs]
    assert [o.name for o in new.outputs] == [o.name for o in old.outputs]


def test_a_type_that_the_older_operator_does_not_take_is_refused() -> None:
    proto = model("i = Cast<to=6>(x) r = Relu(i) y = Cast<to=1>(r)", X, X.replace(" x", " y"), 20)
    assert_same(proto, 17, samples(2, 16, 8, 8))
    with pytest.raises(DeploykitError, match=r"Relu \(layer 'r'\): it does not take int32 there"):
        lowered(proto, 13)


REFUSED = {
    "AffineGrid", "Bernoulli", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "BlackmanWindow", "CenterCropPad",
    "Col2Im", "DFT", "DeformConv", "GroupNormalization", "HammingWindow", "HannWindow", "If", "ImageDecoder", "Loop",
    "LpPool", "MelWeightMatrix", "Optional", "OptionalGetElement", "OptionalHasElement", "RegexFullMatch", "RoiAlign",
    "STFT", "Scan", "SequenceMap", "StringConcat", "StringSplit", "Trilu",
}  # fmt: skip


def test_every_operator_that_changed_is_rewritten_or_refused() -> None:
    changed = {
        s.name
        for s in onnx.defs.get_all_schemas_with_history()
        if s.domain == "" and OLDEST < s.since_version <= NEWEST
    }
    assert changed - set(RULES) - set(BODIES) == REFUSED
    assert not REFUSED & (set(RULES) | set(BODIES))
