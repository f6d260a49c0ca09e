"""Every form of MODEL, weights that fit and do not, and compressed folders that come back bit for bit."""

from __future__ import annotations

import copy
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from deploykit.core.errors import DeploykitError
from deploykit.hub.structure import attach_mask, bake
from deploykit.models import accept_module, input_specs, load_model, save_compressed

NET = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))

def wide(width, depth=3):
    return build()

def nothing():
    return [1, 2]

def fails():
    raise ValueError("no such width\\nsecond line")

model = build()
"""


@pytest.fixture(autouse=True)
def _forget_user_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("net", "broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def net(tmp_path: Path) -> Path:
    file = tmp_path / "net.py"
    file.write_text(NET)
    return file


def refused(spec: object, weights: Path | None = None) -> str:
    with pytest.raises(DeploykitError) as error:
        load_model(str(spec), weights)
    return str(error.value)


# ------------------------------------------------------------------ factories


def test_factory_in_a_file_gives_a_module_in_eval_mode(net: Path) -> None:
    model = load_model(f"{net}:build")
    assert model.module is not None and not any(m.training for m in model.module.modules())
    assert model.program is None and model.onnx is None and model.origin == f"{net}:build"


def test_factory_in_a_package_is_found_in_the_working_directory(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pkg_of_nets").mkdir()
    (tmp_path / "pkg_of_nets" / "__init__.py").write_text("")
    shutil.copy(net, tmp_path / "pkg_of_nets" / "small.py")
    monkeypatch.chdir(tmp_path)
    assert isinstance(load_model("pkg_of_nets.small:build").module, nn.Sequential)


def test_a_factory_may_import_its_neighbours(net: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("from net import build as make\n")
    assert isinstance(load_model(f"{tmp_path / 'broken.py'}:make").module, nn.Sequential)


def test_two_files_of_one_name_are_two_modules(net: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "net.py").write_text("from torch import nn\ndef build(): return nn.Linear(1, 1)\n")
    assert isinstance(load_model(f"{net}:build").module, nn.Sequential)
    assert isinstance(load_model(f"{tmp_path / 'other' / 'net.py'}:build").module, nn.Linear)


def test_a_wrong_factory_name_is_answered_with_the_nearest(net: Path) -> None:
    assert "no factory 'biuld'. Did you mean 'build'?" in refused(f"{net}:biuld")


def test_a_wrong_file_name_is_answered_with_the_nearest(net: Path) -> None:
    assert "nett.py. Did you mean 'net.py'?" in refused(f"{net.parent / 'nett.py'}:build")


def test_a_missing_package_is_named() -> None:
    assert "No module named 'nowhere'" in refused("nowhere.at_all:build")


def test_a_factory_that_raises_is_one_line_with_its_place(net: Path) -> None:
    line = NET.splitlines().index("def fails():") + 2
    assert refused(f"{net}:fails").endswith(f"raised ValueError: no such width (net.py, line {line})")


def test_a_factory_that_needs_arguments_names_them(net: Path) -> None:
    message = refused(f"{net}:wide")
    assert "needs arguments (width)" in message and "def build()" in message


def test_a_factory_that_returns_something_else_says_what(net: Path) -> None:
    assert "returned list, no nn.Module" in refused(f"{net}:nothing")


def test_a_module_instead_of_a_factory_is_refused(net: Path) -> None:
    assert "is a model, not a function" in refused(f"{net}:model")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def build(:\n", "SyntaxError"),
        ("import no_such_library\n", "No module named 'no_such_library' (broken.py, line 1)"),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3 (broken.py, line 2)"),
    ],
)
def test_a_file_that_cannot_be_imported_says_where(tmp_path: Path, code: str, expected: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(code)
    assert expected in refused(f"{file}:build")


def test_a_file_without_a_factory_name_says_what_is_missing(net: Path) -> None:
    assert f"{net}:build" in refused(net)


def test_nothing_there_lists_the_forms() -> None:
    message = refused("no_such_thing")
    assert "no_such_thing" in message and ".onnx" in message and "file.py:factory" in message


# ------------------------------------------------------------------ weights


def fresh(net: Path) -> nn.Module:
    module = load_model(f"{net}:build").module
    assert module is not None
    return module


@pytest.mark.parametrize("form", ["safetensors", "pt", "pth", "nested"])
def test_weights_in_every_form_give_the_same_outputs(net: Path, tmp_path: Path, form: str) -> None:
    source = fresh(net)
    x = torch.randn(2, 3, 8, 8)
    file = tmp_path / ("w.pt" if form == "nested" else f"w.{form}")
    if form == "safetensors":
        save_file(source.state_dict(), file)
    else:
        torch.save({"state_dict": source.state_dict(), "epoch": 3} if form == "nested" else source.state_dict(), file)
    torch.manual_seed(1)
    loaded = load_model(f"{net}:build", file).module
    assert loaded is not None
    assert torch.equal(loaded(x), source(x))


def test_only_counters_of_batch_norm_may_be_absent(net: Path, tmp_path: Path) -> None:
    state = {k: v for k, v in fresh(net).state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "w.safetensors")
    load_model(f"{net}:build", tmp_path / "w.safetensors")


def test_weights_that_do_not_fit_name_every_key(net: Path, tmp_path: Path) -> None:
    state = fresh(net).state_dict()
    del state["4.bias"]
    state["5.bias"] = torch.zeros(2)
    state["0.weight"] = torch.zeros(8, 3, 3, 3)
    save_file(state, tmp_path / "w.safetensors")
    message = refused(f"{net}:build", tmp_path / "w.safetensors")
    assert "missing: 4.bias" in message
    assert "not in the model: 5.bias" in message
    assert "wrong shape: 0.weight (8, 3, 3, 3) instead of (4, 3, 3, 3)" in message


def test_the_prefix_of_data_parallel_is_taken_off_aloud(
    net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = fresh(net)
    torch.save({f"module.{k}": v for k, v in source.state_dict().items()}, tmp_path / "w.pt")
    loaded = load_model(f"{net}:build", tmp_path / "w.pt").module
    assert loaded is not None and torch.equal(loaded[0].weight, source[0].weight)  # type: ignore[index]
    assert "DataParallel" in capsys.readouterr().err


class Bomb:
    """Running a pickle of it leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.file,))


def test_a_pickle_that_is_more_than_weights_is_refused_and_not_run(net: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "bomb": Bomb(tmp_path / "ran")}, tmp_path / "w.pt")
    message = refused(f"{net}:build", tmp_path / "w.pt")
    assert "would run code" in message and "torch.save(model.state_dict()" in message
    assert not (tmp_path / "ran").exists()


def test_a_whole_pickled_model_is_refused_and_its_class_named(net: Path, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "w.pt")
    assert "torch.nn.modules.linear.Linear" in refused(f"{net}:build", tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", pickle.dumps([1, 2, 3])])
def test_files_that_are_no_weights_are_named(net: Path, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert name in refused(f"{net}:build", tmp_path / name)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_truncated_weights_are_said_to_be_damaged(net: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    state = fresh(net).state_dict()
    save_file(state, file) if name.endswith("s") else torch.save(state, file)
    file.write_bytes(file.read_bytes()[:-200])
    assert "damaged" in refused(f"{net}:build", file)


def test_a_checkpoint_without_a_state_dict_lists_its_keys(net: Path, tmp_path: Path) -> None:
    torch.save({"epoch": 3, "net": {"a": torch.zeros(1)}}, tmp_path / "w.pt")
    assert "its keys are epoch, net" in refused(f"{net}:build", tmp_path / "w.pt")


def test_missing_weights_are_answered_with_the_nearest_name(net: Path, tmp_path: Path) -> None:
    save_file(fresh(net).state_dict(), tmp_path / "weights.safetensors")
    message = refused(f"{net}:build", tmp_path / "wieghts.safetensors")
    assert "Did you mean 'weights.safetensors'?" in message


def test_weights_given_for_the_model_are_explained(net: Path, tmp_path: Path) -> None:
    save_file(fresh(net).state_dict(), tmp_path / "w.safetensors")
    assert "--weights" in refused(tmp_path / "w.safetensors")


# ------------------------------------------------------------------ modules, programs, graphs


def test_a_module_in_training_mode_is_refused(tiny_cnn: nn.Module) -> None:
    with pytest.raises(DeploykitError, match=r"training mode: call \.eval\(\)"):
        accept_module(tiny_cnn.train())


def test_the_first_submodule_in_training_mode_is_named(tiny_cnn: nn.Module) -> None:
    tiny_cnn.get_submodule("norm2").train()
    with pytest.raises(DeploykitError, match=r"'norm2' \(BatchNorm2d\) is in training mode"):
        accept_module(tiny_cnn)


def test_a_module_in_eval_mode_is_taken_as_it_is(tiny_cnn: nn.Module) -> None:
    assert accept_module(tiny_cnn).module is tiny_cnn


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(DeploykitError, match="given dict"):
        accept_module({})


def test_inputs_of_a_module_are_named_by_its_forward() -> None:
    class Two(nn.Module):
        def forward(self, image: torch.Tensor, tokens: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return image

    assert [(s.name, s.shape) for s in input_specs(accept_module(Two().eval()))] == [("image", ()), ("tokens", ())]


def test_an_exported_program_knows_its_inputs(tiny_mlp: nn.Module, tmp_path: Path) -> None:
    batch = torch.export.Dim.DYNAMIC
    program = torch.export.export(tiny_mlp, (torch.zeros(2, 4),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "m.pt2")
    model = load_model(str(tmp_path / "m.pt2"))
    (spec,) = input_specs(model)
    assert (spec.name, spec.shape[1:], spec.dtype) == ("x", (4,), "float32") and isinstance(spec.shape[0], str)
    assert model.program is not None
    x = torch.randn(3, 4)
    assert torch.equal(model.program.module()(x), tiny_mlp(x))


def test_a_program_exported_in_training_mode_is_refused(tiny_cnn: nn.Module, tmp_path: Path) -> None:
    program = torch.export.export(tiny_cnn.train(), (torch.zeros(2, 3, 16, 16),))
    torch.export.save(program, tmp_path / "m.pt2")
    message = refused(tmp_path / "m.pt2")
    assert "training mode" in message and "batch_norm" in message


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut short"])
def test_a_damaged_program_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.pt2").write_bytes(content)
    assert "m.pt2 is damaged or no exported program" in refused(tmp_path / "m.pt2")


def test_an_onnx_file_is_kept_as_a_path_and_knows_its_inputs(tmp_path: Path) -> None:
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 4])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), tmp_path / "m.onnx")
    model = load_model(str(tmp_path / "m.onnx"))
    assert model.onnx == tmp_path / "m.onnx"
    assert [(s.name, s.shape[1:], s.dtype) for s in input_specs(model)] == [("x", (4,), "float32")]


@pytest.mark.parametrize("name", ["m.pt2", "m.onnx"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    assert f"no file {tmp_path / name}" in refused(tmp_path / name)


def test_weights_beside_a_file_that_has_its_own_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").touch()
    assert "brings its own weights" in refused(tmp_path / "m.onnx", tmp_path / "w.safetensors")


# ------------------------------------------------------------------ masks and compressed folders


def half_masked(module: nn.Module) -> nn.Module:
    """The smaller half of every kernel and matrix is zero for good."""
    for layer in module.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim > 1:
            attach_mask(layer, "weight", weight.abs() > weight.abs().median())
    return module


def train_a_step(module: nn.Module, x: torch.Tensor) -> None:
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    module.train()(x).square().sum().backward()
    optimizer.step()
    module.eval()


def test_a_mask_is_its_weight_times_the_mask_and_survives_training(tiny_cnn: nn.Module) -> None:
    original = tiny_cnn.conv.weight.detach().clone()
    half_masked(tiny_cnn)
    mask = original.abs() > original.abs().median()
    assert torch.equal(tiny_cnn.conv.weight, original * mask)
    train_a_step(tiny_cnn, torch.randn(4, 3, 16, 16))
    assert not tiny_cnn.conv.weight[~mask].any()
    assert (tiny_cnn.conv.weight[mask] != original[mask]).any()


def test_a_second_mask_brings_no_weight_back(tiny_mlp: nn.Module) -> None:
    first = torch.rand(16, 4) > 0.5
    attach_mask(tiny_mlp.hidden, "weight", first)
    second = torch.rand(16, 4) > 0.5
    attach_mask(tiny_mlp.hidden, "weight", second)
    assert torch.equal(tiny_mlp.hidden.weight != 0, first & second)
    assert len(tiny_mlp.hidden.parametrizations["weight"]) == 1


def test_a_copy_and_its_original_do_not_touch_each_other(tiny_mlp: nn.Module) -> None:
    attach_mask(tiny_mlp.hidden, "weight", torch.rand(16, 4) > 0.5)
    x = torch.randn(5, 4)
    before = tiny_mlp(x)
    student = copy.deepcopy(tiny_mlp)
    attach_mask(student.hidden, "bias", torch.zeros(16, dtype=torch.bool))
    bake(student)
    assert torch.equal(tiny_mlp(x), before)
    assert not student.hidden.bias.any() and tiny_mlp.hidden.bias.any()


def test_bake_gives_plain_parameters_and_leaves_the_teacher_alone(tiny_cnn: nn.Module) -> None:
    names = [name for name, _ in tiny_cnn.named_parameters()]
    half_masked(tiny_cnn)
    x = torch.randn(2, 3, 16, 16)
    expected = tiny_cnn(x)
    plain, masks = bake(tiny_cnn)
    assert torch.equal(plain(x), expected) and torch.equal(tiny_cnn(x), expected)
    assert sorted(names) == sorted(name for name, _ in plain.named_parameters())
    assert type(plain.get_submodule("conv")) is nn.Conv2d
    assert set(masks) == {"stem.weight", "conv.weight", "head.weight"}
    for name, mask in masks.items():
        assert mask.dtype == np.bool_ and np.array_equal(mask, plain.get_parameter(name).detach().numpy() != 0)


def test_bake_also_bakes_parametrizations_of_others() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    x = torch.randn(4, 3)
    plain, masks = bake(layer)
    assert masks == {} and type(plain) is nn.Linear
    assert torch.equal(plain(x), layer(x))


def test_bake_of_a_plain_module_changes_nothing(tiny_cnn: nn.Module) -> None:
    plain, masks = bake(tiny_cnn)
    assert masks == {} and plain is not tiny_cnn
    for (name, a), (_, b) in zip(tiny_cnn.state_dict().items(), plain.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.fixture
def compressed(net: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    save_compressed(half_masked(fresh(net)), folder, f"{net}:build")
    return folder


def test_a_compressed_folder_comes_back_bit_for_bit(net: Path, tmp_path: Path) -> None:
    module = half_masked(fresh(net))
    x = torch.randn(2, 3, 8, 8)
    train_a_step(module, x)
    (tmp_path / "small").mkdir()
    save_compressed(module, tmp_path / "small", f"{net}:build")
    model = load_model(str(tmp_path / "small"))
    assert model.module is not None and not model.module.training
    assert torch.equal(model.module(x), module(x))


def test_masks_of_a_compressed_folder_hold_under_training(compressed: Path) -> None:
    module = load_model(str(compressed)).module
    assert module is not None
    masks = bake(module)[1]
    train_a_step(module, torch.randn(2, 3, 8, 8))
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == {"0.weight": 54, "4.weight": 144}
    for name, mask in masks.items():
        layer = module.get_submodule(name.removesuffix(".weight"))
        assert not layer.weight.detach().numpy()[~mask].any()


def test_the_same_module_gives_the_same_bytes(compressed: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    module = load_model(str(compressed)).module
    assert module is not None
    save_compressed(module, again, str(compressed))  # from a folder, not from the factory
    for name in ("model.safetensors", "structure.json"):
        assert (again / name).read_bytes() == (compressed / name).read_bytes()


def test_a_compressed_folder_and_its_factory_move_together(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(tmp_path / "net.py", moved / "net.py")
    shutil.move(compressed, moved / "small")
    sys.modules.pop("net", None)
    monkeypatch.chdir("/")
    assert load_model(str(moved / "small")).module is not None


def test_a_compressed_folder_without_its_factory_says_where_it_was(compressed: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").unlink()
    message = refused(compressed)
    assert str(tmp_path / "net.py") in message and "structure.json" in message


def test_a_factory_that_changed_since_does_not_fit(compressed: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\ndef build(): return nn.Linear(1, 1)\n")
    sys.modules.pop("net", None)
    assert "does not fit" in refused(compressed)


def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    assert "no structure.json" in refused(tmp_path)


def test_an_exports_output_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert "what an export wrote" in refused(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"format": "deploykit-structure-9", "model": "net.py:build"}', '{"format": 3}',
     '{"format": "deploykit-structure-1", "model": "../net.py:build", "parameters": {"0.weight": "magic"}}'],
)  # fmt: skip
def test_a_damaged_structure_file_is_named(compressed: Path, text: str) -> None:
    (compressed / "structure.json").write_text(text)
    assert "structure.json" in refused(compressed)


def test_a_structure_that_names_a_foreign_parameter_is_refused(compressed: Path) -> None:
    file = compressed / "structure.json"
    file.write_text(file.read_text().replace("4.weight", "9.weight"))
    assert "no parameter '9.weight'" in refused(compressed)


def test_a_module_without_a_factory_cannot_be_saved(tiny_cnn: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(DeploykitError, match="only models from a factory"):
        save_compressed(tiny_cnn, tmp_path, accept_module(tiny_cnn).origin)


def test_a_masked_weight_that_two_layers_share_cannot_be_saved(net: Path, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    attach_mask(module[0], "weight", module[0].weight > 0)
    with pytest.raises(DeploykitError, match="one shared weight"):
        save_compressed(module, tmp_path, f"{net}:build")


def test_a_masked_weight_with_weight_norm_cannot_be_saved(net: Path, tmp_path: Path) -> None:
    module = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    attach_mask(module[0], "weight", module[0].weight > 0)
    with pytest.raises(DeploykitError, match=r"0\.weight was parametrized"):
        save_compressed(module, tmp_path, f"{net}:build")
