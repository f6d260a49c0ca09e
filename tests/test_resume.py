"""Training that was cut goes on where it was and ends with the same weights, bit for bit; another training does not."""

from __future__ import annotations

import importlib.util
import io
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deploykit import passes, pipeline, targets
from deploykit.core import journal as journals
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.journal import Journal, Pace
from deploykit.core.recipe import Recipe, Step, TrainSettings
from deploykit.losses import TrainBatch, cross_entropy
from deploykit.models import load_model
from deploykit.pipeline.steps import remembering
from deploykit.training.trainer import Trainer

if importlib.util.find_spec("accelerate") is None:
    pytest.skip("training needs the extra 'train'", allow_module_level=True)

ROOT = Path(__file__).parents[1]
SETTINGS = TrainSettings(batch=8, augment=("flip", "crop"), learning_rate=1e-2)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A note after every step."""
    monkeypatch.setattr(journals, "EVERY", 0.0)
    monkeypatch.setattr(journals, "SHARE", 1e9)


def pictures(n: int = 52, seed: int = 0) -> DataSet:
    draw = np.random.default_rng(seed)
    y = np.arange(n) % 3
    x = (draw.normal(size=(n, 2, 8, 8)) + y[:, None, None, None]).astype(np.float32)
    return DataSet.of({"x": x}, y)


class Net(nn.Module):
    """All that has a state: weights, batch norm, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.dropout, self.head = nn.Dropout(0.3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(torch.relu(self.norm(self.conv(x))).mean((2, 3))))  # type: ignore[no-any-return]


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


class Loss:
    """Cross-entropy with noise of every generator, that counts its calls while training, and cuts the run at one."""

    def __init__(self, cut: int = 0, factor: float = 1.0) -> None:
        self.calls, self.cut, self.factor = 0, cut, factor

    def __call__(self, outputs: Any, batch: TrainBatch) -> Tensor:
        if torch.is_grad_enabled():
            self.calls += 1
            if self.calls == self.cut:
                raise KeyboardInterrupt
            noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
        else:
            noise = 0.0
        return self.factor * cross_entropy(outputs, batch) * (1 + 0.1 * noise)


def fit(folder: Path | None, loss: Loss, module: nn.Module | None = None, **more: Any) -> tuple[bytes, list[float]]:
    module = module or net()
    trainer = Trainer(more.pop("settings", SETTINGS), seed=more.pop("seed", 1), journal=Journal(folder))
    losses = trainer.fit(
        module, more.pop("data", pictures()), loss, **{"holdout": pictures(20, 5), "steps": 20, **more}
    )
    return held(module), losses


def held(module: nn.Module) -> bytes:
    return b"".join(t.numpy().tobytes() for t in module.state_dict().values())


def cut(folder: Path, at: int = 13, **more: Any) -> None:
    """A run that leaves what it knows after so many steps."""
    with pytest.raises(KeyboardInterrupt):
        fit(folder, Loss(cut=at), **more)


# ------------------------------------------------------------------ the same weights


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("at", [2, 7, 13, 20])
def test_a_training_that_was_cut_ends_with_the_same_weights(at: int, tmp_path: Path) -> None:
    whole = fit(None, Loss())
    cut(tmp_path, at)
    again = Loss()
    assert fit(tmp_path, again) == whole
    assert again.calls == 1 + 20 - (at - 1)  # the first step tells that it is the same training


@pytest.mark.usefixtures("always")
def test_a_training_that_was_cut_again_and_again_gets_there(tmp_path: Path) -> None:
    for _ in range(4):
        cut(tmp_path, 6)
    again = Loss()
    assert fit(tmp_path, again) == fit(None, Loss())
    assert again.calls == 1 + 20 - (5 + 3 * 4)


@pytest.mark.usefixtures("always")
def test_a_training_that_was_finished_is_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = fit(tmp_path, Loss())
    again = Loss()
    assert fit(tmp_path, again) == whole and again.calls == 1
    assert "training goes on after step 20 of 20" in capsys.readouterr().err


@pytest.mark.usefixtures("always")
def test_samples_that_were_seen_are_not_read_again(tmp_path: Path) -> None:
    asked: list[int] = []

    def watched() -> DataSet:
        data = pictures()
        return DataSet(lambda i: (asked.append(i), data.sample(i))[1], data.index, data.labels)

    cut(tmp_path, data=watched())
    asked.clear()
    fit(tmp_path, Loss(), data=watched())
    assert len(asked) == 8 * (1 + 20 - 12)


@pytest.mark.usefixtures("always")
def test_what_is_called_after_every_step_is_called_for_those_that_were_left(tmp_path: Path) -> None:
    first, second = list[int](), list[int]()
    cut(tmp_path, on_step=lambda step, _: first.append(step))
    fit(tmp_path, Loss(), on_step=lambda step, _: second.append(step))
    assert second and second[-1] == 19 and second == list(range(second[0], 20))
    assert set(first) | set(second) == set(range(20))


# ------------------------------------------------------------------ another training


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    "other",
    [
        {"module": lambda: net(3)}, {"seed": 2}, {"steps": 21}, {"learning_rate": 2e-2},
        {"settings": TrainSettings(batch=8, learning_rate=1e-2)}, {"data": lambda: pictures(52, 9)},
        {"loss": lambda: Loss(factor=1.001)},
    ],
    ids=["weights", "seed", "steps", "learning rate", "augmentation", "data", "loss"],
)  # fmt: skip
def test_another_training_picks_nothing_up(other: dict[str, Any], tmp_path: Path) -> None:
    cut(tmp_path)
    made = [{k: v() if callable(v) else v for k, v in other.items()} for _ in range(2)]
    losses = [one.pop("loss", None) or Loss() for one in made]
    assert fit(tmp_path, losses[0], **made[0]) == fit(None, losses[1], **made[1])
    assert losses[0].calls == made[1].get("steps", 20)


@pytest.mark.usefixtures("always")
def test_trainings_of_one_step_are_told_apart(tmp_path: Path) -> None:
    trainer = Trainer(SETTINGS, journal=Journal(tmp_path))
    for _ in range(2):  # the same twice
        trainer.fit(net(), pictures(), Loss(), steps=3)
    assert Journal(tmp_path).results() == 2


@pytest.mark.usefixtures("always")
def test_a_note_that_is_damaged_is_no_note(tmp_path: Path) -> None:
    cut(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-40])
    assert fit(tmp_path, Loss()) == fit(None, Loss())


# ------------------------------------------------------------------ what it costs


def test_short_trainings_leave_no_note_and_ask_for_no_hash(tmp_path: Path) -> None:
    def asked() -> str:
        raise AssertionError("nobody needs to know yet")

    trainer = Trainer(SETTINGS, journal=Journal(tmp_path / "journal").of(asked))
    trainer.fit(net(), pictures(), Loss(), steps=3)
    assert list(tmp_path.iterdir()) == []


def test_notes_that_take_long_are_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace = Pace()
    assert not pace.due
    now[0] += 30
    assert pace.due
    with pace.working():
        now[0] += 3
    now[0] += 149
    assert not pace.due  # 3 s are 2 % of 150 s
    now[0] += 1
    assert pace.due


# ------------------------------------------------------------------ every step that trains


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    "step",
    [
        Step("finetune", {"steps": 8}), Step("distill", {"steps": 8}), Step("l0", {"steps": 8}),
        Step("distill", {"steps": 8, "layers": {"conv": "conv"}}), Step("variational_dropout", {"steps": 8}),
        Step("iterate", {"amount": 0.5, "rounds": 2, "steps": 4}),
    ],
    ids=lambda step: str(step),
)  # fmt: skip
def test_a_step_goes_on_without_knowing_about_it(step: Step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, example = pictures(), next(pictures().batches(2)).inputs
    whole = Context(targets.load("x86"), {"train": data, "calibration": data}, example, original=net(1),
                    trainer=Trainer(TrainSettings(batch=8)))  # fmt: skip
    made = passes.build(step)
    expected = held(made(net(), whole))
    calls, write = [0], journals._write

    def interrupted(path: Path, content: bytes) -> None:
        write(path, content)
        calls[0] += 1
        if calls[0] == 6:
            raise KeyboardInterrupt

    here = remembering(whole, Journal(tmp_path), made)
    with monkeypatch.context() as patched:
        patched.setattr(journals, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made(net(), here)
    assert here.journal.results() >= 1
    assert held(made(net(), remembering(whole, Journal(tmp_path), made))) == expected


# ------------------------------------------------------------------ kill -9

SCRIPT = """
import sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
from deploykit.core import journal
journal.EVERY, journal.SHARE = 0.0, 1e9
import test_resume as t

class Slow(t.Loss):
    def __call__(self, outputs, batch):
        time.sleep(0.01)
        return super().__call__(outputs, batch)

folder, out = map(Path, sys.argv[1:])
found, _ = t.fit(folder, Slow(), steps=60)
out.write_bytes(found)
"""


def killed(command: list[str], when: Callable[[], bool], **more: Any) -> str:
    """Starts a process, kills it at a moment, and returns what it said."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **more) as process:
        ends = time.monotonic() + 120
        while process.poll() is None and not when() and time.monotonic() < ends:
            time.sleep(0.002)
        process.kill()
        _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said
    return str(said)


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_moment_ends_with_the_same_weights(tmp_path: Path) -> None:
    script, journal = tmp_path / "train.py", tmp_path / "journal"
    script.write_text(SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests")))
    command = [sys.executable, str(script), str(journal), str(tmp_path / "found")]
    draw = random.Random(0)
    for _ in range(3):
        before = {p: p.stat().st_mtime_ns for p in journal.iterdir()} if journal.exists() else {}
        moment = [0.0]

        def when(before: dict[Path, int] = before, moment: list[float] = moment) -> bool:
            """A random while after the first note of this run."""
            there = {p: p.stat().st_mtime_ns for p in journal.glob(f"*{journals.SUFFIX}")}
            if not moment[0] and there and there != before:
                moment[0] = time.monotonic() + draw.random() * 0.15
            return bool(moment[0]) and time.monotonic() >= moment[0]

        killed(command, when)
    ran = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "training goes on after step" in ran.stderr
    whole, _ = fit(None, Loss(), steps=60)
    assert (tmp_path / "found").read_bytes() == whole


def build() -> nn.Module:
    """A factory."""
    return Net()


COMMAND = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
from deploykit.core import journal
journal.EVERY, journal.SHARE = 0.0, 1e9
from deploykit.cli import main
main(sys.argv[1:])
"""
RECIPE = """
[[step]]
name = "finetune"
steps = 40

[[step]]
name = "qat"
steps = {steps}

[train]
batch = 8
loss = "ce"
"""


@pytest.mark.slow
@pytest.mark.parametrize("step", ["Finetune", "Qat"])
def test_an_export_that_is_killed_while_a_step_trains_goes_on_by_the_same_command(step: str, tmp_path: Path) -> None:
    data = pictures(64)
    (tmp_path / "run.py").write_text(COMMAND.format(root=str(ROOT), tests=str(ROOT / "tests")))
    (tmp_path / "net.py").write_text("from test_resume import build\n")
    (tmp_path / "recipe.toml").write_text(RECIPE.format(steps=25))
    np.savez(tmp_path / "train.npz", x=next(data.batches(64)).inputs["x"], y=data.labels)

    def command(out: str) -> list[str]:
        return [
            sys.executable, "run.py", "export", "net.py:build", "--target", "x86", "--calib", "train.npz", "--train",
            "train.npz", "--recipe", "recipe.toml", "--no-benchmark", "--precision", "int8", "-o", out,
        ]  # fmt: skip

    journal = tmp_path / ".out.deploykit-journal"
    notes: list[float] = []

    def when() -> bool:
        """Some notes of that step are there: the first step's file, then the second's."""
        wanted = 1 if step == "Finetune" else 2
        if len(list(journal.glob(f"*{journals.SUFFIX}"))) >= wanted:
            notes.append(time.monotonic())
        return bool(notes) and time.monotonic() > notes[0] + 0.05

    killed(command("out"), when, cwd=tmp_path)
    assert not (tmp_path / "out").exists() and journal.exists()
    runs = [
        subprocess.run(command(o), cwd=tmp_path, capture_output=True, text=True, timeout=240) for o in ("out", "whole")
    ]
    # 3: the original is untrained, so that files that learned do not agree with it
    assert [r.returncode for r in runs] == [3, 3], runs[0].stderr + runs[1].stderr
    assert "going on where a run was cut" in runs[0].stderr and "training goes on after step" in runs[0].stderr
    assert "training goes on" not in runs[1].stderr
    files = [(tmp_path / out / "model.int8.onnx").read_bytes() for out in ("out", "whole")]
    assert files[0] == files[1] and not journal.exists()


@pytest.mark.usefixtures("always")
def test_compress_goes_on_too_and_with_other_data_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text("from test_resume import build\n")
    recipe = Recipe((Step("finetune", {"steps": 12}),), TrainSettings(batch=8, loss="ce"))

    def compress(out: str, data: DataSet) -> bytes:
        model = load_model(f"{tmp_path / 'net.py'}:build")
        prepared = pipeline.prepare(model, {"train": data, "calibration": data}, None)
        pipeline.compress(prepared, pipeline.Settings(recipe), None, tmp_path / out)
        return (tmp_path / out / "model.safetensors").read_bytes()

    def interrupted(path: Path, content: bytes) -> None:
        write(path, content)
        written.append(path)
        if len(written) == 7:
            raise KeyboardInterrupt

    whole, other = compress("whole", pictures()), compress("other", pictures(52, 4))
    write = journals._write
    for out, data, expected in (("again", pictures(), whole), ("elsewhere", pictures(52, 4), other)):
        written: list[Path] = []
        with monkeypatch.context() as patched:
            patched.setattr(journals, "_write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                compress(out, pictures())
        capsys.readouterr()
        assert compress(out, data) == expected
        assert ("training goes on after step 7 of 12" in capsys.readouterr().err) == (out == "again")


# ------------------------------------------------------------------ what is shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_progress_loss_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Terminal()
    monkeypatch.setattr(sys, "stderr", seen)
    monkeypatch.setenv("COLUMNS", "100")
    losses = Trainer(SETTINGS).fit(net(), pictures(), cross_entropy, steps=5)
    text = seen.getvalue()
    assert "training" in text and f"loss {losses[-1]:.4g}" in text and "100%" in text and "0:00:00" in text
