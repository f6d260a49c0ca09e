"""The step `distill`: students come near to their teachers, and what does not fit is refused before any work."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deploykit import passes, pipeline, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError, GateFailed
from deploykit.core.manifest import load_manifest
from deploykit.core.recipe import Recipe, Step, TrainSettings
from deploykit.core.request import Gate
from deploykit.distillation.answers import FEW
from deploykit.losses import TrainBatch, cross_entropy
from deploykit.models import accept_module
from deploykit.passes.distill import Distill
from deploykit.passes.sparsify import Sparsify
from deploykit.training.trainer import Trainer

pytest.importorskip("accelerate")


def points(count: int = 256, seed: int = 0, labels: bool = True) -> DataSet:
    """Three classes on rings about the origin, in two of four dimensions."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 3, count)
    angle = random.random(count) * 2 * np.pi
    radius = 1 + y + 0.2 * random.standard_normal(count)
    x = np.column_stack([radius * np.cos(angle), radius * np.sin(angle), *random.standard_normal((2, count))])
    return DataSet.of({"x": x.astype(np.float32)}, y if labels else None)


class Net(nn.Module):
    """``[n, 4]`` -> logits ``[n, classes]``."""

    def __init__(self, width: int, classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.hidden, self.out = nn.Linear(4, width), nn.Linear(width, classes)
        self.spare = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(x)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    torch.set_num_threads(1)
    net = Net(64)
    Trainer(TrainSettings(batch=64)).fit(net, points(2000), cross_entropy, steps=400, learning_rate=1e-2)
    return net.eval()


@pytest.fixture
def taught(teacher: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the teacher as an .onnx."""
    from deploykit.hub.lower import lower

    monkeypatch.chdir(tmp_path)
    Path("wide.onnx").write_bytes(lower(teacher, next(points(2).batches(2)).inputs).bytes)
    yield tmp_path


def student() -> nn.Module:
    return Net(24, seed=1).eval()


def context(original: nn.Module | None, data: DataSet | None = None, **more: Any) -> Context:
    settings = more.pop("settings", TrainSettings(batch=32))
    given = {"train": data or points(labels=False)}
    return Context(targets.load("x86"), given, original=original, trainer=Trainer(settings), **more)  # type: ignore[arg-type]


def answer(net: nn.Module, count: int = 1000) -> Tensor:
    with torch.no_grad():
        return net(torch.from_numpy(next(points(count, seed=9).batches(count)).inputs["x"]))  # type: ignore[no-any-return]


def agreement(net: nn.Module, teacher: nn.Module) -> float:
    return float((answer(net).argmax(1) == answer(teacher).argmax(1)).float().mean())


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


# ------------------------------------------------------------------ learning


@pytest.mark.parametrize("loss", ["soft", "logits", "noisy"])
def test_a_student_comes_near_to_its_teacher_without_labels(loss: Any, teacher: nn.Module) -> None:
    small = student()
    before = copy.deepcopy(small)
    step = Distill(loss=loss, sigma=0.2, steps=400, learning_rate=1e-2)
    found = step(small, context(teacher, points(1000, labels=False)))
    assert agreement(small, teacher) < 0.5 < 0.8 < agreement(found, teacher)
    assert same(small, before) and not found.training


def test_a_file_teaches_as_the_module_does(teacher: nn.Module, taught: Path) -> None:
    by_file = Distill(teacher="wide.onnx", steps=20)(student(), context(student()))
    by_module = Distill(steps=20)(student(), context(teacher))
    torch.testing.assert_close(answer(by_file), answer(by_module), rtol=1e-3, atol=1e-3)


def test_two_teachers_teach_their_mean(teacher: nn.Module, taught: Path) -> None:
    Path("flat.py").write_text("import torch\n\ndef build():\n    return lambda x: torch.zeros(len(x), 3)\n")
    found = Distill(teacher=("wide.onnx", "flat.py:build"), loss="logits", steps=300, learning_rate=1e-2)(
        Net(64, seed=2), context(student())
    )
    half = answer(teacher) / 2
    assert (answer(found) - half).square().mean() < 0.1 * half.square().mean()


def test_a_folder_of_images_without_classes_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    from deploykit.core.artifact import TensorSpec
    from deploykit.sources import load_data

    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (24, 6, 6, 3), np.uint8)):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    data = load_data(str(tmp_path), [TensorSpec("input", (), "")], None, "train")
    assert data.labels is None
    torch.manual_seed(0)
    large, small = (nn.Sequential(nn.Flatten(), nn.Linear(108, 4)).eval() for _ in range(2))
    found = Distill(steps=150, learning_rate=1e-2)(small, context(large, data, settings=TrainSettings(batch=8)))
    x = torch.from_numpy(next(data.batches(24)).inputs["input"])
    with torch.no_grad():
        apart = [float((net(x).softmax(1) - large(x).softmax(1)).abs().mean()) for net in (small, found)]
    assert apart[1] < 0.3 * apart[0]


def test_labels_have_the_rest_of_the_weight(teacher: nn.Module) -> None:
    """At alpha = 0 it is plain training, step by step."""
    data = points()
    found = Distill(alpha=0.0, steps=12)(student(), context(teacher, data))
    plain = Distill(steps=12)(student(), context(teacher, data, loss=cross_entropy))
    assert same(found, plain)


def test_with_munge_a_student_sees_more_than_there_is(teacher: nn.Module) -> None:
    few = context(teacher, points(30, labels=False))
    plain, munged = (Distill(munge=k, munge_p=0.3, steps=300, learning_rate=1e-2)(student(), few) for k in (0, 20))
    assert agreement(munged, teacher) > agreement(plain, teacher)


def test_zeros_stay_zero_behind_a_step_that_prunes(teacher: nn.Module) -> None:
    here = context(teacher)
    sparse: Any = Sparsify(0.5)(teacher, here)
    found: Any = Distill(steps=30)(sparse, here)
    dead = sparse.hidden.weight == 0
    assert dead.any() and not found.hidden.weight[dead].any() and not same(found, sparse)


# ------------------------------------------------------------------ layers


def test_a_thin_layer_learns_to_tell_what_a_wide_one_writes(teacher: Any) -> None:
    """FitNets' first stage: only what is in front of the hint learns, and the regressor is left behind."""
    small: Any = student()
    found: Any = Distill(loss="none", layers={"hidden": "hidden"}, steps=200, learning_rate=1e-2)(
        small, context(teacher)
    )
    assert found.state_dict().keys() == small.state_dict().keys()
    torch.testing.assert_close(found.out.weight, small.out.weight)
    x = torch.from_numpy(next(points(1000, seed=9).batches(1000)).inputs["x"])

    def unexplained(net: Any) -> float:
        """Of the teacher's features, after the best linear map."""
        with torch.no_grad():
            a, b = np.column_stack([net.hidden(x).numpy(), np.ones(1000)]), teacher.hidden(x).numpy()
        return float(np.square(b - a @ np.linalg.lstsq(a, b)[0]).sum())

    assert unexplained(found) < unexplained(small) + 1e-3


class Maps(nn.Module):
    """``[n, 1, 6, 6]`` -> logits ``[n, 2]``."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.out = nn.Conv2d(1, width, 3, padding=1), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("features", ["hints", "attention"])
def test_layers_follow_the_teachers_beside_the_answers(features: Any) -> None:
    from deploykit.distillation.attention import attention

    x = np.random.default_rng(0).standard_normal((128, 1, 6, 6)).astype(np.float32)
    large, small = Maps(8, 0).eval(), Maps(3, 1).eval()
    step = Distill(layers={"conv": "conv"}, features=features, beta=10.0, steps=150, learning_rate=1e-2)
    found: Any = step(small, context(large, DataSet.of({"x": x})))

    def apart(net: Any) -> float:
        with torch.no_grad():
            maps = [n.conv(torch.from_numpy(x)) for n in (net, large)]
        return float(attention((maps[0],), TrainBatch({}, teacher=(maps[1],))))

    assert found.state_dict().keys() == small.state_dict().keys()
    if features == "attention":
        assert apart(found) < 0.5 * apart(small)


def test_layers_are_compared_as_they_were_written_before_what_comes_behind_writes_in_place() -> None:
    from deploykit.distillation.features import Watched

    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    x = torch.randn(5, 4)
    outputs, (written,) = Watched(net, ["0"])(input=x)
    torch.testing.assert_close(written, net[0](x))
    torch.testing.assert_close(outputs, written.relu())


# ------------------------------------------------------------------ asked once, or every time


class Counting(nn.Module):
    """A teacher that counts the samples it is asked about."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.asked = net, []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(len(x))
        return self.net(x)  # type: ignore[no-any-return]


LOOKS = 3 * 2 + 1
"""A look at two samples: asked twice, and once more as one teacher, and about the first alone; and compared with the
student."""


def test_a_teacher_is_asked_once_about_every_sample(teacher: nn.Module) -> None:
    counting = Counting(teacher).eval()
    Distill(steps=40)(student(), context(counting))
    assert sum(counting.asked) - 256 in (LOOKS, LOOKS + 2)


def test_answers_in_a_folder_serve_the_next_run(teacher: nn.Module, tmp_path: Path) -> None:
    counting = Counting(teacher).eval()
    step = Distill(cache=str(tmp_path / "kept"), steps=10)
    first = step(student(), context(counting))
    asked = sum(counting.asked)
    assert asked > 256
    second = step(student(), context(counting))
    assert sum(counting.asked) - asked <= LOOKS + 2 + 2 * FEW and same(first, second)


def test_answers_of_a_teacher_that_changed_where_nobody_looks_are_not_taken(teacher: nn.Module, tmp_path: Path) -> None:
    class Scaled(Net):
        """Holds what is no parameter, and parts in a plain list."""

        factor, inner = torch.ones(()), [teacher]

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * self.inner[0](x)  # type: ignore[no-any-return]

    scaled, step = Scaled(4).eval(), Distill(cache=str(tmp_path / "kept"), steps=10)
    first = step(student(), context(scaled))
    scaled.factor = torch.full((), 3.0)
    assert not same(first, step(student(), context(scaled)))
    assert same(step(student(), context(scaled)), Distill(steps=10)(student(), context(scaled)))


def test_a_file_of_answers_without_a_byte_is_asked_for_again(teacher: nn.Module, tmp_path: Path) -> None:
    step = Distill(cache=str(tmp_path / "kept"), steps=10)
    first = step(student(), context(teacher))
    for file in tmp_path.glob("kept/*/*.npy"):
        file.write_bytes(b"")
    assert same(first, step(student(), context(teacher)))


def test_it_does_not_matter_whether_answers_are_kept(teacher: nn.Module) -> None:
    """A trainer without known settings may do anything with the samples, so the teacher is asked with every batch."""

    class Own:
        def fit(self, *given: Any, **more: Any) -> list[float]:
            assert more["teacher"] is not None
            return Trainer(TrainSettings(batch=32)).fit(*given, **more)

    kept = Distill(steps=20)(student(), context(teacher))
    asked = Distill(steps=20)(student(), replace(context(teacher), trainer=Own()))
    torch.testing.assert_close(answer(kept), answer(asked), rtol=1e-4, atol=1e-5)


def test_augmented_samples_are_asked_about_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.random.default_rng(0).standard_normal((64, 1, 8, 8)).astype(np.float32)
    counting = Counting(Maps(4, 0)).eval()
    here = context(counting, DataSet.of({"x": x}), settings=TrainSettings(batch=16, augment=("flip",)))
    Distill(cache=str(tmp_path / "kept"), steps=20)(Maps(4, 1).eval(), here)
    assert sum(counting.asked) > 20 * 16 and not (tmp_path / "kept").exists()
    assert "samples are augmented, so the teacher is asked anew every time" in capsys.readouterr().err


def test_a_few_steps_do_not_ask_about_all(teacher: nn.Module) -> None:
    counting = Counting(teacher).eval()
    Distill(steps=2)(student(), context(counting, points(5000, labels=False)))
    assert sum(counting.asked) < 5000


# ------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"alpha": 1.5},
        {"munge": -1},
        {"loss": "none"},
        {"loss": "logits", "alpha": 0.5},
        {"munge": 2, "alpha": 0.5},
        {"cache": "kept", "layers": {"a": "b"}},
        {"los": "soft"},
        {"loss": "softer"},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DeploykitError, match="step 'distill'"):
        passes.build(Step("distill", options))


def test_a_misspelt_choice_is_named_with_the_nearest() -> None:
    with pytest.raises(DeploykitError, match=r"no choice 'softt'. Did you mean 'soft'"):
        passes.build(Step("distill", {"loss": "softt"}))


def test_a_recipe_names_one_teacher_or_several() -> None:
    assert passes.build(Step("distill", {"teacher": "wide.onnx"})) == Distill("wide.onnx")
    assert passes.build(Step("distill", {"teacher": ["a.onnx", "b.py:build"]})) == Distill(("a.onnx", "b.py:build"))


def refused(step: Distill, here: Context, why: str) -> None:
    """Before anything runs, and again by the step itself."""
    with pytest.raises(DeploykitError, match=why):
        step.foresee(here)
    with pytest.raises(DeploykitError, match=why):
        step(student(), here)


def test_a_loss_that_sees_no_teacher_is_said(teacher: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    Distill(steps=2)(student(), context(teacher, points(), loss=cross_entropy))
    assert "labels alone teach" in capsys.readouterr().err


def test_other_class_counts_are_refused_at_once(taught: Path) -> None:
    here = context(Net(4, classes=5).eval())
    with pytest.raises(DeploykitError, match="the student tells 3 classes apart, its teacher 5"):
        Distill()(student(), here)
    with pytest.raises(DeploykitError, match="the student tells 5 classes apart, its teacher 3"):
        Distill(teacher="wide.onnx").foresee(here)


def test_labels_that_are_missing_are_named_at_once(teacher: nn.Module) -> None:
    refused(Distill(alpha=0.9), context(teacher), r"loss 'soft' with alpha = 0.9 needs labels, and memory has none")
    refused(Distill(), context(teacher, loss=cross_entropy), "loss 'ce' needs labels, and memory has none")
    refused(Distill(munge=1), context(teacher, points(), loss=cross_entropy), "munge makes up samples without")


def test_layers_that_are_not_there_are_refused_with_the_nearest(teacher: nn.Module) -> None:
    here = context(teacher)
    refused(Distill(layers={"hiden": "hidden"}), here, r"the student: no layer 'hiden'. Did you mean 'hidden'")
    refused(Distill(layers={"hidden": "outt"}), here, r"the teacher: no layer 'outt'. Did you mean 'out'")
    refused(Distill(layers={"spare": "hidden"}), here, "layer 'spare' does not run")
    refused(Distill(layers={"hidden": "hidden"}, features="attention"), here, r"this one writes \[2, \d+\]")


def test_layers_are_followed_in_one_module_only(teacher: nn.Module, taught: Path) -> None:
    step = Distill(teacher="wide.onnx", layers={"hidden": "hidden"})
    refused(step, context(teacher), "a single teacher that is a PyTorch module")


def test_a_teacher_in_training_mode_is_refused_at_once(teacher: nn.Module) -> None:
    refused(Distill(), context(copy.deepcopy(teacher).train()), "the teacher is in training mode")


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_a_teacher_in_training_mode_is_refused_behind_a_function_too(shape: tuple[int, ...]) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, shape), nn.BatchNorm1d(3), nn.Flatten()).train()

    class Behind(nn.Module):
        nets = (net,)

        def forward(self, x: Tensor) -> Any:
            return self.nets[0](x)

    refused(Distill(), context(Behind().eval()), "differently by itself than beside others: is it in training mode")


def test_a_teacher_that_answers_no_numbers_is_refused_at_once() -> None:
    broken = Net(4).eval()
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    refused(Distill(), context(broken), "the teacher's answers are not finite")


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (np.full(256, 3), "label 3 is no class of this model, which has 3 of them, 0 to 2"),
        (np.full(256, -1), "label -1 is no class of this model"),
        (np.zeros((256, 1), np.int64), r"labels \[25, 1\] do not fit class scores \[25, 3\]"),
        (np.ones(256, np.float32), "takes whole numbers for labels, or a probability for each of the 3 classes"),
    ],
)
def test_labels_that_do_not_fit_are_named(teacher: nn.Module, labels: Any, why: str) -> None:
    with pytest.raises(DeploykitError, match=why):
        Distill(alpha=0.5, steps=2)(student(), context(teacher, replace(points(), labels=labels)))


def test_without_a_teacher_there_is_nothing_to_learn() -> None:
    with pytest.raises(DeploykitError, match="distill needs a teacher"):
        Distill()(student(), context(None))


def test_a_student_with_a_softmax_is_refused(teacher: nn.Module) -> None:
    with pytest.raises(DeploykitError, match="leave out its softmax"):
        Distill()(nn.Sequential(student(), nn.Softmax(1)).eval(), context(teacher))


def test_a_single_output_has_no_classes_to_compare() -> None:
    with pytest.raises(DeploykitError, match=r"the student answers \[1\] to a sample. Take loss = 'logits'"):
        Distill()(Net(4, classes=1), context(Net(8, classes=1).eval()))
    assert Distill(loss="logits", steps=3)(Net(4, classes=1), context(Net(8, classes=1).eval())) is not None


def breaking(after: int) -> Any:
    """A loss that is good for some steps and then NaN."""
    steps = iter(range(10**6))

    def loss(outputs: Tensor, batch: TrainBatch) -> Tensor:
        value = (outputs - batch.teacher[0]).square().mean()
        return value * float("nan") if torch.is_grad_enabled() and next(steps) >= after else value

    return loss


def test_where_the_loss_breaks_the_last_good_state_is_kept_and_the_step_is_named(
    teacher: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    small = student()
    found = Distill(steps=100, learning_rate=1e-2)(small, context(teacher, loss=breaking(57)))
    assert "training stopped: the loss became nan at step 58 of 100" in capsys.readouterr().err
    assert all(torch.isfinite(p).all() for p in found.parameters())
    assert (answer(found) - answer(teacher)).square().mean() < (answer(small) - answer(teacher)).square().mean()


def test_without_held_out_samples_a_broken_loss_is_an_error_that_names_the_step(teacher: nn.Module) -> None:
    here = context(teacher, points(8, labels=False), loss=breaking(3))
    with pytest.raises(DeploykitError, match=r"the loss became nan at step 4 of 100; try a learning_rate below 0\.001"):
        Distill(steps=100, learning_rate=1e-3)(student(), here)


# ------------------------------------------------------------------ behind it


def test_files_and_later_steps_are_compared_with_the_student_as_it_was_taught(taught: Path, tmp_path: Path) -> None:
    """An untrained student is nothing to compare with: files would fail every check."""
    recipe = Recipe(
        (
            Step("distill", {"teacher": "wide.onnx", "steps": 200, "learning_rate": 1e-2}),
            Step("finetune", {"steps": 40}),
        ),
        TrainSettings(batch=32),
    )
    roles = {"train": points(), "calibration": points(64, 1, labels=False), "eval": points(200, 2)}
    prepared = pipeline.prepare(accept_module(student().eval()), roles, None)  # type: ignore[arg-type]
    settings = pipeline.Settings(recipe, benchmark=False)
    pipeline.export(prepared, [targets.load("x86")], [tmp_path / "out"], settings, Gate())
    manifest = load_manifest(tmp_path / "out")
    found = {score.precision: score.metric or 0.0 for score in manifest.scores}
    untaught = 100 * float((answer(student(), 200).argmax(1).numpy() == points(200).labels).mean())
    assert found["original"] > 90 > untaught and found["int8"] > found["original"] - 3
    assert manifest.passed and any("which followed another one" in note for note in manifest.notes)


def test_what_is_said_of_the_data_is_not_lost_where_the_student_takes_the_models_place(
    taught: Path, tmp_path: Path
) -> None:
    recipe = Recipe((Step("distill", {"teacher": "wide.onnx", "steps": 20}),), TrainSettings(batch=32))
    roles = {"train": points(), "calibration": points(64, 1, labels=False), "eval": points(40, 2, labels=False)}
    prepared = pipeline.prepare(accept_module(student().eval()), roles, None)  # type: ignore[arg-type]
    with contextlib.suppress(GateFailed):
        pipeline.export(
            prepared, [targets.load("x86")], [tmp_path / "out"], pipeline.Settings(recipe, benchmark=False), Gate()
        )
    assert [note for note in load_manifest(tmp_path / "out").notes if "the evaluation data has no labels" in note]
