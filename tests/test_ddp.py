"""Training under ``accelerate launch``: two processes learn as one does, and go on together where they were killed."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("accelerate") is None:
    pytest.skip("training needs the extra 'train'", allow_module_level=True)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys, time
from pathlib import Path
import numpy as np, torch
from torch import nn
from accelerate import PartialState
from deploykit.core import journal
from deploykit.core.data import DataSet
from deploykit.core.recipe import TrainSettings
from deploykit.losses import cross_entropy
from deploykit.training.trainer import Trainer

torch.set_num_threads(1)
journal.EVERY, journal.SHARE = 0.0, 1e9
out, batch, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
draw = np.random.default_rng(0)
y = np.arange(96) % 3
data = DataSet.of({"x": (draw.normal(size=(96, 4)) + 2 * np.eye(4)[y]).astype(np.float32)}, y)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.drop, self.out = nn.Linear(4, 16), nn.Dropout(float(sys.argv[4])), nn.Linear(16, 3)
        self.behind = nn.Linear(16, 3)  # what the loss does not reach

    def forward(self, x):
        return self.out(self.drop(torch.relu(self.hidden(x))))

def loss(outputs, batch):
    time.sleep(pause)
    return cross_entropy(outputs, batch)

torch.manual_seed(0)
net = Net()
kept = journal.Journal(Path(sys.argv[5])) if len(sys.argv) > 5 else journal.NOTHING_KEPT
losses = Trainer(TrainSettings(batch=batch, learning_rate=1e-2), journal=kept).fit(
    net, data, loss, steps=40, holdout=data.take(slice(0, 30))
)
state = PartialState()
torch.save({**net.state_dict(), "losses": torch.tensor(losses)}, f"{out}.{state.process_index}.{state.num_processes}")
"""
TWO = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip
"""``--multi_gpu`` starts one process per device; with ACCELERATE_USE_CPU these are CPUs, which talk by gloo."""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def run(command: list[str], folder: Path) -> str:
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, env=environment())
    assert ran.returncode == 0, ran.stderr
    return ran.stderr


def saved(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path


def test_two_processes_have_the_losses_and_weights_of_one_with_twice_the_batch(desk: Path) -> None:
    run([sys.executable, "train.py", "one", "16", "0", "0"], desk)
    said = run([*TWO, "train.py", "two", "8", "0", "0"], desk)
    one, first, second = (saved(desk / name) for name in ("one.0.1", "two.0.2", "two.1.2"))
    assert "training" not in said  # no terminal, no progress
    for key in one:
        torch.testing.assert_close(one[key], first[key], rtol=1e-4, atol=1e-5)
        assert torch.equal(first[key], second[key])
    assert one["losses"][-5:].mean() < 0.5 * one["losses"][0]


def test_two_processes_that_were_killed_go_on_together(desk: Path) -> None:
    """With dropout, so that each has random numbers of its own."""
    run([*TWO, "train.py", "whole", "8", "0", "0.3"], desk)
    journal = desk / "journal"
    command = [*TWO, "train.py", "found", "8", "0.02", "0.3", "journal"]
    with subprocess.Popen(
        command, cwd=desk, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:  # fmt: skip
        ends = time.monotonic() + 120
        while process.poll() is None and not list(journal.glob("*.kept")) and time.monotonic() < ends:
            time.sleep(0.01)
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGKILL)
    assert not (desk / "found.0.2").exists()
    assert "training goes on after step" in run(command, desk)
    for rank in (0, 1):
        found, whole = saved(desk / f"found.{rank}.2"), saved(desk / f"whole.{rank}.2")
        assert all(torch.equal(found[key], whole[key]) for key in whole)
