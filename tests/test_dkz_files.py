"""Containers of files on disk: what belongs to a model, names and places, the command line."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from commands import enter
from test_dkz import shared

from deploykit.core.errors import DeploykitError
from deploykit.dkz.container import File, pack, packed
from deploykit.dkz.extents import files_of
from deploykit.dkz.files import pack_file, unpack_file
from deploykit.dkz.stages import REST, stages

# ------------------------------------------------------------------ files of the runtimes


def model(folder: Path, external: bool = False) -> Path:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = {"a": shared(64 * 32, 0.1, 8).reshape(64, 32), "b": shared(32 * 16, 0.3, 4, 1).reshape(32, 16)}
    inner = numpy_helper.from_array(shared(200, 0.5, 4, 2), "held")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "a"], ["y"]), helper.make_node("MatMul", ["y", "b"], ["z"]),
         helper.make_node("Constant", [], ["c"], value=inner)],
        "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 16])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = folder / "net.onnx"
    onnx.save_model(made, path, save_as_external_data=external, location="net.data", size_threshold=0)
    return path


@pytest.mark.parametrize("external", [False, True])
def test_an_onnx_file_comes_back_with_what_belongs_to_it(tmp_path: Path, external: bool) -> None:
    path = model(tmp_path, external)
    assert {e.name for file in files_of(path) for e in file.extents} >= {"a", "b"}
    packed = pack_file(path)
    unpack_file(packed.path, tmp_path / "again")
    for file in files_of(path):
        assert (tmp_path / "again" / file.name).read_bytes() == file.data
    assert packed.stored == packed.path.stat().st_size < packed.whole


def test_the_command_line_packs_and_unpacks(tmp_path: Path) -> None:
    path = model(tmp_path)
    said = enter("pack", path, "-o", tmp_path / "net.dkz").out
    assert "times smaller), decoded in" in said and len(said.splitlines()) == 1
    told = json.loads(enter("pack", path, "-o", tmp_path / "net.dkz", "--overwrite", "--json").out)
    found = json.loads(enter("unpack", tmp_path / "net.dkz", "-o", tmp_path / "out", "--json").out)
    assert found["names"] == told["names"] == ["net.onnx"]
    assert [found[key] for key in ("stored", "whole", "peak")] == [told[key] for key in ("stored", "whole", "peak")]
    assert (tmp_path / "net.dkz").stat().st_size == sum(row["coded"] for row in told["layers"])
    assert (tmp_path / "out" / "net.onnx").read_bytes() == path.read_bytes()


def test_layers_are_a_table_on_the_command_line(tmp_path: Path) -> None:
    path = model(tmp_path)
    said = enter("pack", path, "-o", tmp_path / "net.dkz", "--layers")
    lines = [line.split() for line in said.out.splitlines()]
    rows = stages(files_of(path), packed(files_of(path)))
    assert "2,048" in next(line for line in lines if line[:1] == ["a"])
    assert next(line for line in lines if line[:2] == REST.split())[-1] == f"{rows[-1].coded:,}"
    assert f"{(tmp_path / 'net.dkz').stat().st_size:,}" in next(line for line in lines if line[:1] == ["all"])


def test_an_empty_file_is_no_container(tmp_path: Path) -> None:
    (tmp_path / "net.dkz").touch()
    with pytest.raises(DeploykitError, match="too short"):
        unpack_file(tmp_path / "net.dkz", tmp_path / "out")


def test_what_is_there_is_not_replaced_and_nothing_half_written_is_left(tmp_path: Path) -> None:
    path = model(tmp_path)
    packed = pack_file(path).path
    with pytest.raises(DeploykitError, match="already exists"):
        pack_file(path)
    data = bytearray(packed.read_bytes())
    data[-3] ^= 255
    packed.write_bytes(bytes(data))
    with pytest.raises(DeploykitError):
        unpack_file(packed, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "net.onnx.dkz"]


def test_names_that_lead_elsewhere_are_not_written(tmp_path: Path) -> None:
    (tmp_path / "bad.dkz").write_bytes(pack([File("../outside", b"x", ())]))
    with pytest.raises(DeploykitError, match="could land anywhere"):
        unpack_file(tmp_path / "bad.dkz", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ files in odd places


def test_external_data_in_a_folder_below_comes_back_and_elsewhere_is_refused(tmp_path: Path) -> None:
    path = model(tmp_path, external=True)
    whole = onnx.load(path)
    (tmp_path / "data").mkdir()
    onnx.save_model(whole, tmp_path / "sub.onnx", save_as_external_data=True, location="data/w.bin", size_threshold=0)
    packed_ = pack_file(tmp_path / "sub.onnx")
    unpack_file(packed_.path, tmp_path / "again")
    for name in ("sub.onnx", "data/w.bin"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    proto = onnx.load(tmp_path / "sub.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../w.bin"
    (tmp_path / "deep").mkdir()
    (tmp_path / "w.bin").write_bytes((tmp_path / "data" / "w.bin").read_bytes())
    (tmp_path / "deep" / "bad.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(DeploykitError, match="not below its folder"):
        pack_file(tmp_path / "deep" / "bad.onnx")


def test_data_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    path = model(tmp_path, external=True)
    (data,) = (p for p in tmp_path.iterdir() if p != path)
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(DeploykitError, match="is shorter than"):
        pack_file(path)


def test_nothing_that_is_packed_or_unpacked_is_replaced(tmp_path: Path) -> None:
    path = model(tmp_path)
    with pytest.raises(DeploykitError, match="is packed itself"):
        pack_file(path, path, overwrite=True)
    container = pack_file(path).path
    with pytest.raises(DeploykitError, match="would be replaced as a whole"):
        unpack_file(container, tmp_path, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").write_text("precious")
    with pytest.raises(DeploykitError, match=r"did not write \(note\)"):
        unpack_file(container, tmp_path / "mine", overwrite=True)
    for odd in (tmp_path, Path(".")):
        with pytest.raises(DeploykitError, match="is a folder"):
            pack_file(path, odd, overwrite=True)
    assert path.is_file() and container.is_file()


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "a\nb", "..\\a", "c:x", "a//b", "/a"])
def test_names_that_are_no_good_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "odd.dkz").write_bytes(pack([File(name, b"12345", ())]))
    with pytest.raises(DeploykitError, match="could land anywhere"):
        unpack_file(tmp_path / "odd.dkz", tmp_path / "out")
    (tmp_path / "twice.dkz").write_bytes(pack([File("a", b"1", ()), File("A", b"2", ())]))
    with pytest.raises(DeploykitError, match="one name"):
        unpack_file(tmp_path / "twice.dkz", tmp_path / "out")
    assert not (tmp_path / "out").exists()
