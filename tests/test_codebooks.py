"""Weights that share few values are stored as codebook and indices in the float file, and mean the same bit by bit."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import graph, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto
from test_int4 import optimized

from deploykit import targets
from deploykit.core.artifact import File
from deploykit.core.target import QuantSpec, Target
from deploykit.dkz.files import pack_file
from deploykit.exporters import to_onnx
from deploykit.exporters.codebooks import MOST, store_codebooks
from deploykit.hub.graph import LARGE, FloatGraph, Hub
from deploykit.hub.running import session
from deploykit.hub.sharing.codebooks import LOOK, codebook

X86 = targets.load("x86")


def with_values(count: int, shape: tuple[int, ...], zero: bool = True, seed: int = 0) -> NDArray[np.float32]:
    """A weight with exactly so many values, each in it at least once; zero among them or not."""
    random = np.random.default_rng(seed)
    values = np.unique(random.normal(size=2 * count).astype(np.float32))[:count]
    values = random.permutation(values)
    if zero:
        values[0] = 0
    index = np.concatenate([np.arange(count), random.integers(0, count, int(np.prod(shape)) - count)])
    return values[random.permutation(index)].reshape(shape)


def network(weight: NDArray[np.float32]) -> FloatGraph:
    """x [n,3,8,8] -> Conv -> Relu -> Conv with the weight [c,16,3,3] -> y."""
    return graph(
        f"""(float[batch,3,8,8] x) => (float[batch,{len(weight)},6,6] y) {{
            a = Conv<pads=[1,1,1,1]>(x, first)  r = Relu(a)  y = Conv(r, w)
        }}""",
        first=normal(1, 16, 3, 3, 3), w=weight,
    )  # fmt: skip


def written(made: FloatGraph, folder: Path, target: Target = X86) -> tuple[onnx.ModelProto, File]:
    (file,) = to_onnx.export({"fp32": Hub(made, QuantSpec())}, target, folder)
    return onnx.load(folder / file.path), file


def assert_same_outputs(plain: bytes, stored: bytes) -> None:
    x = {"x": normal(5, 4, 3, 8, 8)}
    for optimize in (False, True):
        expected, found = (session(data, optimize=optimize).run(None, x)[0] for data in (plain, stored))
        assert found.tobytes() == expected.tobytes()


@settings(max_examples=40, deadline=None)
@given(
    count=st.one_of(st.integers(1, 257), st.sampled_from([16, 17, 256, 257])),
    shape=st.lists(st.integers(1, 12), max_size=3).map(lambda dims: (*dims, 1100)),
    zero=st.booleans(), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_a_codebook_has_the_values_in_order_and_zero_first(
    count: int, shape: tuple[int, ...], zero: bool, seed: int
) -> None:
    weight = with_values(count, shape, zero, seed)
    found = codebook(weight, MOST)
    if count > 256:
        assert found is None
        return
    assert found is not None
    values, indices = found.book, found.codes
    expected = np.unique(weight)
    assert (values[0] == 0) == zero
    assert values[int(zero) :].tolist() == expected[expected != 0].tolist()
    assert indices.shape == shape and values[indices].tobytes() == weight.tobytes()


def test_zeros_of_both_signs_and_what_is_no_number_come_back_bit_by_bit() -> None:
    odd = np.asarray([0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 1e-45, -1.5], np.float32)
    weight = np.resize(odd, (3, 1000))
    found = codebook(weight, MOST)
    assert found is not None and len(found.book) == 8
    assert found.book[0].tobytes() == bytes(4) and found.weight.tobytes() == weight.tobytes()


@settings(max_examples=25, deadline=None)
@given(
    count=st.one_of(st.integers(1, 257), st.sampled_from([16, 17, 256])), channels=st.integers(8, 40),
    zero=st.booleans(), opset=st.sampled_from([20, 21]), seed=st.integers(0, 999),
)  # fmt: skip
def test_a_file_with_codebooks_computes_what_the_plain_one_does(
    count: int, channels: int, zero: bool, opset: int, seed: int
) -> None:
    weight = with_values(count, (channels, 16, 3, 3), zero, seed)
    made = network(weight)
    with tempfile.TemporaryDirectory() as folder:
        model, file = written(made, Path(folder), replace(X86, opset=opset))
    narrow = count <= 16 and opset == 21
    if count <= 256:
        indices = next(t for t in model.graph.initializer if t.name == "w_indices")
        assert indices.data_type == (TensorProto.UINT4 if narrow else TensorProto.UINT8)
        assert len(indices.raw_data) == (-(-weight.size // 2) if narrow else weight.size)
        assert file.notes and len(model.SerializeToString()) < len(made.bytes)
    else:
        assert not file.notes and model == _bare(made)
    assert model.opset_import[0].version == (21 if narrow else 20)
    assert_same_outputs(made.bytes, model.SerializeToString())


def _bare(made: FloatGraph) -> onnx.ModelProto:
    model = onnx.load_model_from_string(made.bytes)
    del model.graph.value_info[:]
    return model


@pytest.mark.parametrize("count", [16, 256])
def test_the_runtime_folds_codebooks_when_it_loads_the_file(count: int, tmp_path: Path) -> None:
    written(network(with_values(count, (32, 16, 3, 3))), tmp_path)
    (tmp_path / "plain.onnx").write_bytes(network(with_values(count, (32, 16, 3, 3))).bytes)
    found = optimized(tmp_path / "model.fp32.onnx", tmp_path)
    assert found == optimized(tmp_path / "plain.onnx", tmp_path)
    assert not Counter(("Gather", "Cast")) & found


def test_sixteen_values_take_an_eighth_of_the_file(tmp_path: Path) -> None:
    made = network(with_values(16, (256, 16, 3, 3)))
    model, file = written(made, tmp_path)
    assert (tmp_path / "model.fp32.onnx").stat().st_size < len(made.bytes) / 6.5  # the first layer is ordinary
    own = [part for part in (*model.graph.initializer, *model.graph.node) if part.name.startswith("w_")]
    assert [part.name for part in own] == ["w_codebook", "w_indices", "w_index", "w_values"]
    after = sum(part.ByteSize() for part in own)
    before = next(t.ByteSize() for t in _bare(made).graph.initializer if t.name == "w")
    assert file.notes == (
        f"1 weights with at most 256 values each are stored as codebooks and indices, {after:,} of {before:,} bytes; "
        "ONNX Runtime widens them to float when it loads the file: smaller on disk, neither faster nor smaller in "
        "memory",
    )


def test_ordinary_small_and_integer_constants_are_left_alone() -> None:
    model = _bare(network(normal(0, 8, 16, 3, 3)))
    more = {
        "small": np.zeros(LARGE, np.float32), "integers": np.zeros(9999, np.int64),
        "late": np.concatenate([np.zeros((LOOK * MOST), np.float32), normal(3, 300)]),
    }  # fmt: skip
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in more.items())
    before = model.SerializeToString()
    assert store_codebooks(model, 21) == () and model.SerializeToString() == before


def test_a_default_that_callers_may_replace_is_left_alone() -> None:
    model = _bare(network(with_values(4, (8, 16, 3, 3))))
    model.graph.input.append(onnx.helper.make_tensor_value_info("w", TensorProto.FLOAT, [8, 16, 3, 3]))
    assert store_codebooks(model, 21) == ()


def test_names_that_are_taken_are_not_taken_again() -> None:
    model = _bare(network(with_values(4, (8, 16, 3, 3))))
    for initializer in model.graph.initializer:
        if initializer.name == "first":
            initializer.name = "w_indices"
    model.graph.node[0].input[1] = "w_indices"
    plain = model.SerializeToString()
    assert store_codebooks(model, 21)
    onnx.checker.check_model(model)
    assert_same_outputs(plain, model.SerializeToString())


def test_other_precisions_have_no_codebooks(tmp_path: Path) -> None:
    made = network(with_values(4, (32, 16, 3, 3)))
    (file,) = to_onnx.export({"fp16": Hub(made, QuantSpec())}, X86, tmp_path)
    assert "Gather" not in {n.op_type for n in onnx.load(tmp_path / file.path).graph.node}


@pytest.mark.parametrize("values", [7, 16, 17, 200])
def test_what_steps_saved_is_told_from_the_floats_that_indices_stand_for(tmp_path: Path, values: int) -> None:
    # an odd number of indices of 4 bits ends in half a byte
    kept = np.random.default_rng(1).random((5, 16, 3, 3)) < 0.3
    weight = np.where(kept, with_values(values, (5, 16, 3, 3)), np.float32(0))
    weight = np.concatenate([weight, weight[:, :, ::-1]])[:9].astype(np.float32)
    made = network(weight)
    (tmp_path / "plain.onnx").write_bytes(made.bytes)
    written(made, tmp_path)
    plain, coded = (
        {row.name: row for row in pack_file(tmp_path / name).layers} for name in ("plain.onnx", "model.fp32.onnx")
    )
    row, same = coded["w_indices"], plain["w"]
    assert (row.count, row.before) == (weight.size, 4 * weight.size) == (same.count, same.before)
    assert row.kept == pytest.approx(100 * np.count_nonzero(weight) / weight.size)
    assert row.pruned == same.pruned
    assert row.shared == same.shared if same.code_bits else row.shared < same.shared
    assert "w_codebook" not in coded
    assert sum(own.coded for own in coded.values()) == (tmp_path / "model.fp32.onnx.dkz").stat().st_size
