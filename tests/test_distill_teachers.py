"""Teachers of every form, several as one, and what they answered, kept on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.distillation.answers import FEW, answers, looked_up, numbered
from deploykit.distillation.teachers import Ensemble, OnnxTeacher, ask, examined, fingerprint, load_teacher
from deploykit.hub.lower import lower
from deploykit.losses import TrainBatch

FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.out, self.drop = nn.Linear(4, 3), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.out(x)) * FACTOR

FACTOR = 1

def build():
    torch.manual_seed(0)
    return Net()

def forest():
    return lambda x: (x.numpy()[:, :3] * 2).astype("float64")

def number():
    return 7

net = Net()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taught.py").write_text(FILE)
    yield tmp_path
    sys.modules.pop("taught", None)


def x(n: int = 5) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((n, 4)).astype(np.float32))


def written(net: nn.Module, path: Path, count: int = 2) -> Path:
    path.write_bytes(lower(net, {"x": x(count).numpy()}).bytes)
    return path


# ------------------------------------------------------------------ forms


def test_what_a_factory_makes_teaches_in_evaluation_mode(folder: Path) -> None:
    teacher: Any = load_teacher("taught.py:build")
    assert not any(part.training for part in teacher.modules())
    torch.testing.assert_close(ask(teacher, {"input": x()})[0], x() @ teacher.out.weight.T + teacher.out.bias)


def test_a_teacher_may_be_any_callable_that_takes_tensors_and_gives_arrays(folder: Path) -> None:
    (found,) = ask(load_teacher("taught.py:forest"), {"whatever": x()})
    torch.testing.assert_close(found, 2 * x()[:, :3])


def test_an_onnx_file_answers_what_its_runtime_answers(tiny_mlp: nn.Module, tmp_path: Path) -> None:
    path = written(tiny_mlp, tmp_path / "wide.onnx")
    expected = ort.InferenceSession(path.read_bytes()).run(None, {"x": x().numpy()})[0]
    (found,) = ask(load_teacher(str(path)), {"input": x()})
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def small_onnx(path: Path, node: onnx.NodeProto, batch: Any, **constants: Any) -> Path:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 4]) for name in ("x", "y")]
    weights = [onnx.numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items()]
    made = helper.make_model(
        helper.make_graph([node], "g", ports[:1], ports[1:], weights), opset_imports=[helper.make_opsetid("", 17)]
    )
    made.ir_version = 8
    onnx.save(made, path)
    return path


def test_a_file_that_takes_one_sample_is_asked_sample_by_sample(tmp_path: Path) -> None:
    path = small_onnx(tmp_path / "one.onnx", helper.make_node("Relu", ["x"], ["y"]), 1)
    torch.testing.assert_close(ask(OnnxTeacher(path), {"x": x()})[0], x().relu())
    path = small_onnx(tmp_path / "two.onnx", helper.make_node("Relu", ["x"], ["y"]), 2)
    with pytest.raises(DeploykitError, match="takes 2 samples at once"):
        ask(OnnxTeacher(path), {"x": x()})


def test_a_file_exported_in_training_mode_is_refused(tmp_path: Path) -> None:
    ones = dict.fromkeys(["a", "b", "c", "d"], np.ones(4, np.float32))
    node = helper.make_node("BatchNormalization", ["x", *ones], ["y", "m", "v"], training_mode=1)
    path = small_onnx(tmp_path / "training.onnx", node, "n", **ones)
    with pytest.raises(DeploykitError, match=r"training.onnx was exported in training mode \(BatchNormalization\)"):
        load_teacher(str(path))


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("taught.py:biuld", "Did you mean 'build'"),
        ("taught.py:number", "factory taught.py:number returned int"),
        ("taught.py:net", "is a model, not a function that makes one"),
        ("taught.py", "'taught.py' is no teacher; expected file.py:factory"),
        ("missing.onnx", "no file missing.onnx"),
        ("damaged.onnx", "teacher damaged.onnx does not run"),
    ],
)
def test_what_is_no_teacher_says_what_would_be(spec: str, why: str, folder: Path) -> None:
    (folder / "damaged.onnx").write_bytes(b"no graph")
    with pytest.raises(DeploykitError, match=why):
        load_teacher(spec)


def test_a_failing_teacher_is_one_line() -> None:
    with pytest.raises(DeploykitError, match="the teacher raised RuntimeError"):
        ask(nn.Linear(9, 2), {"x": x()})
    with pytest.raises(DeploykitError, match=r"must answer every sample; to 5 it answered \[2, 4\]"):
        ask(lambda x: x[:2], {"x": x()})
    with pytest.raises(DeploykitError, match="to 5 it answered NoneType"):
        ask(lambda x: None, {"x": x()})


# ------------------------------------------------------------------ several as one, and a look at each


def test_an_ensemble_answers_the_mean_of_the_logits() -> None:
    """And so the geometric mean of the distributions."""
    teachers = [nn.Linear(4, 3).eval(), nn.Linear(4, 3).eval()]
    (found,) = Ensemble(teachers)(x=x())
    first, second = (t(x()).detach() for t in teachers)
    torch.testing.assert_close(found, (first + second) / 2)
    geometric = (first.softmax(1) * second.softmax(1)).sqrt()
    torch.testing.assert_close(found.softmax(1), geometric / geometric.sum(1, keepdim=True))


def test_several_inputs_come_by_name() -> None:
    teacher = Ensemble([lambda a, b: a - b, lambda b, a: a + b])
    torch.testing.assert_close(teacher(a=2 * x(), b=x())[0], 2 * x())


def test_probabilities_take_part_as_logarithms() -> None:
    net = nn.Linear(4, 3).eval()
    teacher = examined([nn.Sequential(net, nn.Softmax(1)).eval()], {"x": x()})
    torch.testing.assert_close(teacher(x=x())[0].softmax(1), net(x()).softmax(1).detach())
    certain = examined([lambda x: np.eye(3)[[0] * len(x)]], {"x": x()})
    assert torch.isfinite(certain(x=x())[0]).all()


def test_teachers_must_answer_alike() -> None:
    with pytest.raises(DeploykitError, match=r"theirs are \[\[3\]\] and \[\[5\]\]"):
        examined([nn.Linear(4, 3).eval(), nn.Linear(4, 5).eval()], {"x": x()})


def test_a_teacher_left_in_training_mode_is_named() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Dropout())
    with pytest.raises(DeploykitError, match=r"the teacher is in training mode: call .eval\(\)"):
        examined([net], {"x": x()})
    net.eval()[1].train()
    with pytest.raises(DeploykitError, match=r"'1' \(Dropout\) of the teacher is in training mode"):
        examined([net], {"x": x()})
    hidden = nn.Dropout()
    with pytest.raises(DeploykitError, match="answers differently when it is asked again"):
        examined([lambda x: hidden(x)], {"x": x()})


# ------------------------------------------------------------------ what they answered


class Counting(nn.Module):
    """Answers twice its input, and counts the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.asked = nn.Parameter(torch.tensor(2.0)), []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(len(x))
        return x * self.weight  # type: ignore[no-any-return]


def table(teacher: nn.Module, data: DataSet, folder: Path, known: bool = True) -> Any:
    ensemble = Ensemble([teacher]).eval()
    return answers(ensemble, data, folder, fingerprint(ensemble) if known else None, torch.device("cpu"))


def test_a_second_run_asks_about_a_few_samples_alone(tmp_path: Path) -> None:
    data, teacher = DataSet.of({"x": x(150).numpy()}), Counting().eval()
    (first,) = table(teacher, data, tmp_path / "kept")
    assert sum(teacher.asked) == 150 + FEW
    (second,) = table(teacher, data, tmp_path / "kept")
    assert sum(teacher.asked) == 150 + 2 * FEW
    np.testing.assert_array_equal(first, 2 * x(150).numpy())
    np.testing.assert_array_equal(second, first)


@pytest.mark.parametrize("change", ["weight", "attribute", "data", "labels", "damage"])
def test_answers_are_those_of_this_teacher_to_these_samples(change: str, tmp_path: Path) -> None:
    data, teacher = DataSet.of({"x": x(9).numpy()}), Counting().eval()
    table(teacher, data, tmp_path)
    teacher.asked.clear()
    if change == "weight":
        nn.init.constant_(teacher.weight, 3.0)
    elif change == "attribute":
        teacher.margin = 0.5  # type: ignore[assignment]
    elif change == "data":
        data = DataSet.of({"x": x(9).numpy() + 1})
    elif change == "labels":  # answers do not hang on them
        data = DataSet.of({"x": x(9).numpy()}, np.arange(9))
    else:
        (file,) = tmp_path.rglob("*.npy")
        file.write_bytes(file.read_bytes()[:150])
    (found,) = table(teacher, data, tmp_path)
    assert sum(teacher.asked) == (0 if change == "labels" else 9) + FEW
    np.testing.assert_allclose(found, teacher.weight.item() * next(data.batches(9)).inputs["x"])


def test_modules_and_files_are_known_by_what_is_in_them_and_other_callables_are_not(
    tiny_mlp: nn.Module, tmp_path: Path
) -> None:
    path = written(tiny_mlp, tmp_path / "a.onnx")
    first = fingerprint(OnnxTeacher(path))
    same = fingerprint(OnnxTeacher(written(tiny_mlp, tmp_path / "b.onnx")))
    nn.init.zeros_(tiny_mlp.get_parameter("out.bias"))
    other = fingerprint(OnnxTeacher(written(tiny_mlp, path)))
    assert first == same != other
    assert fingerprint(nn.Sequential(nn.ReLU())) != fingerprint(nn.Sequential(nn.ReLU6()))
    assert fingerprint(lambda x: x) is None and fingerprint(Ensemble([tiny_mlp, lambda x: x])) is None
    assert fingerprint(Ensemble([tiny_mlp])) not in (None, fingerprint(Ensemble([tiny_mlp, tiny_mlp])))


def test_an_answer_that_is_not_finite_names_the_sample(tmp_path: Path) -> None:
    values = x(100).numpy()
    values[77, 1] = np.inf
    with pytest.raises(DeploykitError, match="answer to sample 77 of memory is not finite"):
        table(Counting().eval(), DataSet.of({"x": values}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_loss_sees_the_labels_and_answers_of_its_samples(tmp_path: Path) -> None:
    values = x(12).numpy()
    sets = [DataSet.of({"x": values[:8]}, np.arange(8) + 10), DataSet.of({"x": values[8:]}, np.arange(4) + 20)]
    tables = [table(Counting().eval(), d, tmp_path, known=False) for d in sets]
    seen: list[TrainBatch] = []
    loss = looked_up(lambda outputs, batch: seen.append(batch) or torch.zeros(()), sets, tables)
    train, holdout = numbered(sets)
    for d, order in ((train, np.array([6, 0, 3])), (holdout, np.array([2, 0]))):
        (batch,) = d.batches(9, order)
        loss(None, TrainBatch({"x": torch.from_numpy(batch.inputs["x"])}, torch.from_numpy(batch.labels)))
    assert [b.labels.tolist() for b in seen if b.labels is not None] == [[16, 10, 13], [22, 20]]
    for batch in seen:
        torch.testing.assert_close(batch.teacher[0], 2 * batch.inputs["x"])
