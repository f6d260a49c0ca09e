"""The trainer against hand-written steps, its promises (seeds, modes), and the losses against their formulas."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deploykit.core.context import Trainer as TrainerProtocol
from deploykit.core.data import DataSet, Preprocess
from deploykit.core.errors import DeploykitError, MissingExtra
from deploykit.core.recipe import TrainSettings
from deploykit.hub.structure import attach_mask
from deploykit.losses import TrainBatch, cross_entropy, distill_kl, load_loss
from deploykit.training.augmentation import augment
from deploykit.training.trainer import CLIP, Trainer, schedule

if importlib.util.find_spec("accelerate") is None:
    pytest.skip("training needs the extra 'train'", allow_module_level=True)


def points(n: int = 96) -> DataSet:
    """Three classes in four dimensions, easy to tell apart."""
    random = np.random.default_rng(0)
    y = np.arange(n) % 3
    x = random.standard_normal((n, 4)) * 0.3 + 2 * np.eye(4)[y]
    return DataSet.of({"x": x.astype(np.float32)}, y.astype(np.int64))


def accuracy(net: nn.Module, data: DataSet) -> float:
    batch = next(data.batches(len(data)))
    with torch.no_grad():
        return float((net(torch.from_numpy(batch.inputs["x"])).argmax(1).numpy() == batch.labels).mean())


def weights(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def trained(net: nn.Module, seed: int = 0, **settings: Any) -> nn.Module:
    Trainer(TrainSettings(batch=16), seed).fit(net, points(), cross_entropy, **settings)
    return net


# ------------------------------------------------------------------ fitting


def test_training_learns(tiny_mlp: nn.Module) -> None:
    settings = TrainSettings(epochs=10, learning_rate=1e-2, batch=16)
    losses = Trainer(settings).fit(tiny_mlp, points(), cross_entropy)
    assert len(losses) == 60 and losses[-1] < 0.2 * losses[0]
    assert accuracy(tiny_mlp, points()) == 1.0


def followed(
    net: nn.Module, settings: TrainSettings, step: Callable[[int, str, nn.Parameter, torch.Tensor, float], None]
) -> None:
    """Trains for three steps on eight points, and beside it a twin by hand; both must end with the same weights.

    Args:
        net: trained in place.
        settings: of the trainer.
        step: changes a parameter in place; given the number of the step, name, parameter, gradient and norm of all.
    """
    data, twin = points(8), type(net)()
    twin.load_state_dict(net.state_dict())
    Trainer(settings, seed=3).fit(net, data, cross_entropy, steps=3)
    random, everything = np.random.default_rng(3), next(data.batches(8))
    assert everything.labels is not None
    for number in range(3):
        order = random.permutation(8)
        x, y = torch.from_numpy(everything.inputs["x"][order]), torch.from_numpy(everything.labels[order])
        twin.zero_grad()
        (-twin(x).log_softmax(1)[torch.arange(8), y].mean()).backward()
        gradients = [p.grad for p in twin.parameters() if p.grad is not None]
        norm = float(torch.sqrt(torch.stack([(g**2).sum() for g in gradients]).sum()))
        with torch.no_grad():
            for (name, p), g in zip(twin.named_parameters(), gradients, strict=True):
                step(number, name, p, g, norm)
    for (name, a), (_, b) in zip(net.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_steps_are_adams(tiny_mlp: nn.Module) -> None:
    """AdamW, decay on matrices only, clipped gradients, the schedule's learning rate."""
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in tiny_mlp.named_parameters()}

    def step(number: int, name: str, p: nn.Parameter, g: torch.Tensor, norm: float) -> None:
        lr = 0.01 * schedule(number, 3)
        g = g * min(1.0, CLIP / norm)
        if p.ndim > 1:
            p -= lr * 0.1 * p
        m, v = moments[name]
        m.mul_(0.9).add_(0.1 * g)
        v.mul_(0.999).add_(0.001 * g**2)
        p -= lr * (m / (1 - 0.9 ** (number + 1))) / ((v / (1 - 0.999 ** (number + 1))).sqrt() + 1e-8)

    followed(tiny_mlp, TrainSettings(batch=8, learning_rate=0.01, weight_decay=0.1), step)


def test_steps_are_nesterovs_where_sgd_is_asked_for(tiny_mlp: nn.Module) -> None:
    """Sutskever et al. 2013, as torch has it: decay is a part of the gradient, and nothing is clipped."""
    with torch.no_grad():
        for p in tiny_mlp.parameters():
            p *= 4  # for gradients that would be clipped
    velocity = {n: torch.zeros_like(p) for n, p in tiny_mlp.named_parameters()}
    norms = []

    def step(number: int, name: str, p: nn.Parameter, g: torch.Tensor, norm: float) -> None:
        norms.append(norm)
        g = g + 0.1 * p if p.ndim > 1 else g
        velocity[name] = 0.9 * velocity[name] + g
        p -= 2.0 * schedule(number, 3) * (g + 0.9 * velocity[name])

    followed(tiny_mlp, TrainSettings(batch=8, learning_rate=2.0, weight_decay=0.1, optimizer="sgd"), step)
    assert max(norms) > CLIP


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    curve = [schedule(step, 100) for step in range(100)]
    assert curve[0] == pytest.approx(1 / 6) and curve[5] == 1.0
    assert curve[:6] == sorted(curve[:6]) and curve[5:] == sorted(curve[5:], reverse=True)
    assert 0 < curve[99] < 1e-3 and schedule(100, 100) == pytest.approx(0)
    assert all(0 < schedule(s, t) <= 1 for t in range(1, 30) for s in range(t))


def test_the_same_seed_gives_the_same_weights(tiny_cnn: nn.Module) -> None:
    random = np.random.default_rng(0)
    x, y = random.standard_normal((24, 3, 16, 16)).astype(np.float32), np.arange(24) % 10
    start = weights(tiny_cnn)
    results = []
    for seed in (1, 1, 2):
        tiny_cnn.load_state_dict(start)
        torch.rand(7)  # the state of the global generator does not matter
        net = nn.Sequential(nn.Dropout(0.1), tiny_cnn)
        settings = TrainSettings(batch=8, augment=("flip", "crop"))
        Trainer(settings, seed).fit(net, DataSet.of({"input": x}, y), cross_entropy)
        results.append(weights(tiny_cnn))
    assert all(torch.equal(results[0][n], results[1][n]) for n in start)
    assert any(not torch.equal(results[0][n], results[2][n]) for n in start)


def test_training_leaves_the_global_generators_alone(tiny_mlp: nn.Module) -> None:
    state, array = torch.get_rng_state(), np.random.get_state()[1]
    trained(tiny_mlp)
    assert torch.equal(state, torch.get_rng_state()) and np.array_equal(array, np.random.get_state()[1])


def test_every_part_of_the_module_comes_back_in_its_mode(tiny_cnn: nn.Module) -> None:
    tiny_cnn.train()
    tiny_cnn.get_submodule("norm").eval()
    modes: list[bool] = []
    hook = tiny_cnn.get_submodule("norm").register_forward_hook(lambda m, *_: modes.append(m.training))
    data = DataSet.of({"x": np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)}, np.arange(4))
    Trainer(TrainSettings(batch=4)).fit(tiny_cnn, data, cross_entropy)
    hook.remove()
    assert modes == [True]
    assert tiny_cnn.training and tiny_cnn.get_submodule("norm2").training
    assert not tiny_cnn.get_submodule("norm").training


def test_a_failing_loss_still_gives_the_module_back(tiny_mlp: nn.Module) -> None:
    with pytest.raises(ZeroDivisionError):
        trained_with = Trainer(TrainSettings(batch=16))
        trained_with.fit(tiny_mlp, points(), lambda outputs, batch: 1 / 0)  # type: ignore[arg-type,return-value]
    assert not tiny_mlp.training


def test_masked_weights_stay_zero(tiny_mlp: nn.Module) -> None:
    mask = torch.rand(16, 4) > 0.5
    attach_mask(tiny_mlp.get_submodule("hidden"), "weight", mask)
    trained(tiny_mlp, learning_rate=0.1)
    weight = tiny_mlp.get_submodule("hidden").weight
    assert not weight[~mask].any() and weight[mask].all()


@pytest.mark.parametrize(("epochs", "batch", "expected"), [(1, 16, 6), (0.5, 16, 3), (2, 64, 3), (0.001, 64, 1)])
def test_epochs_become_steps(tiny_mlp: nn.Module, epochs: float, batch: int, expected: int) -> None:
    assert len(Trainer(TrainSettings(epochs=epochs, batch=batch)).fit(tiny_mlp, points(), cross_entropy)) == expected


def test_steps_and_settings_may_be_given_for_one_run(tiny_mlp: nn.Module) -> None:
    seen: list[tuple[int, float]] = []
    start = weights(tiny_mlp)
    losses = Trainer(TrainSettings(batch=16)).fit(
        tiny_mlp, points(), cross_entropy, steps=3, learning_rate=1e-12, on_step=lambda k, v: seen.append((k, v))
    )
    assert [k for k, _ in seen] == [0, 1, 2] and [v for _, v in seen] == losses
    assert all(torch.allclose(start[n], t, atol=1e-6) for n, t in tiny_mlp.state_dict().items())


def test_an_epoch_shows_every_sample_once(tiny_mlp: nn.Module) -> None:
    seen: list[float] = []

    def loss(outputs: torch.Tensor, batch: TrainBatch) -> torch.Tensor:
        seen.extend(batch.inputs["x"][:, 0].tolist())
        return cross_entropy(outputs, batch)

    Trainer(TrainSettings(batch=16)).fit(tiny_mlp, points(), loss)
    assert sorted(seen) == sorted(next(points().batches(96)).inputs["x"][:, 0].tolist())


def test_fewer_samples_than_a_batch_are_one_batch(tiny_mlp: nn.Module) -> None:
    assert len(Trainer(TrainSettings(batch=64)).fit(tiny_mlp, points(5), cross_entropy, steps=4)) == 4


def test_no_gradients_are_left_behind(tiny_mlp: nn.Module) -> None:
    assert all(p.grad is None for p in trained(tiny_mlp).parameters())


def test_training_says_nothing_on_stderr(tiny_mlp: nn.Module, capfd: pytest.CaptureFixture[str]) -> None:
    trained(tiny_mlp)
    assert capfd.readouterr() == ("", "")


def test_a_student_follows_its_teacher_and_the_teacher_stays(tiny_mlp: nn.Module) -> None:
    teacher = trained(tiny_mlp, learning_rate=1e-2, epochs=10.0)
    before = weights(teacher)
    torch.manual_seed(5)
    student = type(tiny_mlp)()
    unlabelled = DataSet.of({"x": next(points().batches(96)).inputs["x"]})
    settings = TrainSettings(epochs=10, learning_rate=1e-2, batch=16)
    losses = Trainer(settings).fit(student, unlabelled, distill_kl(2.0), teacher=teacher)
    assert losses[-1] < 0.1 * losses[0] and accuracy(student, points()) == 1.0
    assert all(torch.equal(before[n], t) for n, t in teacher.state_dict().items())


def test_the_trainer_is_what_a_context_expects() -> None:
    trainer: TrainerProtocol = Trainer()
    assert trainer.fit is not None


# ------------------------------------------------------------------ held-out samples


def flipped(n: int = 48) -> DataSet:
    """The points under wrong classes: what is learned elsewhere only makes them worse."""
    data = points(n)
    return DataSet.of(next(data.batches(n)).inputs, (np.arange(n) + 1) % 3)


def test_of_all_states_the_one_is_kept_that_does_best_on_held_out_samples(tiny_mlp: nn.Module) -> None:
    before = weights(tiny_mlp)
    trained(tiny_mlp, learning_rate=1e-2, epochs=5, holdout=points(48))
    assert accuracy(tiny_mlp, points(48)) == 1.0
    tiny_mlp.load_state_dict(before)
    trained(tiny_mlp, learning_rate=1e-2, epochs=5, holdout=flipped())
    assert all(torch.equal(before[n], t) for n, t in tiny_mlp.state_dict().items())


def test_held_out_samples_are_judged_in_evaluation_mode_and_not_learned_from(tiny_cnn: nn.Module) -> None:
    modes: list[tuple[bool, bool]] = []
    hook = tiny_cnn.register_forward_hook(lambda m, *_: modes.append((m.training, torch.is_grad_enabled())))
    x = np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)
    data = DataSet.of({"x": x}, np.arange(8))
    Trainer(TrainSettings(batch=4)).fit(tiny_cnn, data, cross_entropy, holdout=data, steps=2)
    hook.remove()
    assert modes == [(False, False)] * 2 + ([(True, True)] + [(False, False)] * 2) * 2


def test_training_stops_where_it_runs_away(tiny_mlp: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tiny_mlp, learning_rate=1e-2, epochs=10)
    before = weights(tiny_mlp)
    losses = Trainer(TrainSettings(batch=16)).fit(
        tiny_mlp, flipped(), cross_entropy, holdout=points(48), steps=400, learning_rate=0.1
    )
    assert len(losses) < 400
    assert all(torch.equal(before[n], t) for n, t in tiny_mlp.state_dict().items())
    said = capsys.readouterr().err
    assert "the held-out loss went from" in said and "The state before training is kept" in said


# ------------------------------------------------------------------ what cannot be trained


def test_a_loss_that_is_not_finite_says_when_and_what_to_try(tiny_mlp: nn.Module) -> None:
    with pytest.raises(DeploykitError, match=r"the loss became nan at step 1 of 6; try a learning_rate below 0\.001"):
        Trainer(TrainSettings(batch=16)).fit(tiny_mlp, points(), lambda o, b: o.sum() * float("nan"))


def test_a_loss_that_is_no_scalar_says_what_it_returned(tiny_mlp: nn.Module) -> None:
    with pytest.raises(DeploykitError, match=r"it returned Tensor \(16, 3\)"):
        Trainer(TrainSettings(batch=16)).fit(tiny_mlp, points(), lambda outputs, batch: outputs)


def test_augmenting_what_is_no_image_is_refused(tiny_mlp: nn.Module) -> None:
    with pytest.raises(DeploykitError, match=r"augment is for models with one image input; the inputs are x \[16, 4\]"):
        Trainer(TrainSettings(batch=16, augment=("flip",))).fit(tiny_mlp, points(), cross_entropy)


def test_without_accelerate_the_extra_is_named(tiny_mlp: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtra, match=r"deploykit\[train\]"):
        trained(tiny_mlp)


# ------------------------------------------------------------------ augmentation


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_augmented_images_are_mirrored_windows_of_the_padded_ones(layout: str) -> None:
    x = torch.arange(1.0, 1 + 20 * 3 * 16 * 24).reshape(20, 3, 16, 24)
    given = x if layout == "NCHW" else x.permute(0, 2, 3, 1)
    out = augment({"x": given, "k": torch.zeros(20, 2)}, ("flip", "crop"), layout, torch.Generator().manual_seed(0))
    assert out["x"].shape == given.shape and not out["k"].any()
    y = out["x"] if layout == "NCHW" else out["x"].permute(0, 3, 1, 2)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (2, 2), (3, 3)))
    kinds = set()
    for i in range(20):
        places = [
            (flip, top, left)
            for flip in (False, True) for top in range(5) for left in range(7)
            if np.array_equal(
                (np.flip(padded[i], -1) if flip else padded[i])[:, top : top + 16, left : left + 24], y[i].numpy()
            )
        ]  # fmt: skip
        assert len(places) == 1
        kinds.add(places[0])
    assert len({f for f, _, _ in kinds}) == 2 and len({t for _, t, _ in kinds}) > 2 and len({c for *_, c in kinds}) > 3


def test_without_augmentation_inputs_stay_as_they_are() -> None:
    inputs = {"x": torch.zeros(1, 4)}
    assert augment(inputs, (), "NCHW", torch.Generator()) is inputs


def test_the_layout_of_the_data_is_used(tiny_mlp: nn.Module) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            widths.append(x.shape)
            result: torch.Tensor = self.out(x.mean((1, 2)))
            return result

    widths: list[torch.Size] = []
    x = np.random.default_rng(0).standard_normal((8, 16, 24, 3)).astype(np.float32)
    base = DataSet.of({"x": x}, np.arange(8) % 2)
    data = DataSet(base.sample, base.index, base.labels, preprocess=Preprocess(layout="NHWC"))
    Trainer(TrainSettings(batch=8, augment=("crop",))).fit(Flat(), data, cross_entropy)
    assert widths == [torch.Size((8, 16, 24, 3))]


# ------------------------------------------------------------------ losses


def test_cross_entropy_is_minus_the_mean_log_probability() -> None:
    z, y = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    p = np.exp(z.numpy().astype(np.float64))
    p /= p.sum(1, keepdims=True)
    expected = -np.log(p[np.arange(5), y.numpy()]).mean()
    for outputs in (z, (z,), {"logits": z}):
        assert float(cross_entropy(outputs, TrainBatch({}, y))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_t_squared_times_the_divergence(temperature: float) -> None:
    z, v = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)

    def softmax(a: Any) -> Any:
        e = np.exp(a.astype(np.float64) / temperature)
        return e / e.sum(1, keepdims=True)

    p, q = softmax(v.numpy()), softmax(z.detach().numpy())
    expected = temperature**2 * (p * np.log(p / q)).sum(1).mean()
    value = distill_kl(temperature)({"output": z}, TrainBatch({}, teacher=v))
    assert float(value.detach()) == pytest.approx(expected, rel=1e-5)
    value.backward()  # Hinton 2015, section 2.1: the gradient is T (q - p) / n after the factor T²
    np.testing.assert_allclose(z.grad.numpy(), temperature * (q - p) / 6, atol=1e-6)  # type: ignore[union-attr]


def test_the_gradient_of_a_perfect_student_is_zero() -> None:
    z = torch.randn(4, 3, requires_grad=True)
    value = distill_kl(3.0)((z, z), TrainBatch({}, teacher={"a": z.detach(), "b": z.detach()}))
    value.backward()
    assert abs(float(value.detach())) < 1e-6 and z.grad is not None and z.grad.abs().max() < 1e-6


def test_losses_say_what_they_miss() -> None:
    z = torch.zeros(2, 3)
    with pytest.raises(DeploykitError, match="needs labels"):
        cross_entropy(z, TrainBatch({}))
    with pytest.raises(DeploykitError, match="the model has 2"):
        cross_entropy((z, z), TrainBatch({}, torch.zeros(2, dtype=torch.int64)))
    with pytest.raises(DeploykitError, match="the student has 1 outputs, its teacher 0"):
        distill_kl()(z, TrainBatch({}))


def test_a_loss_may_be_the_users(tmp_path: Path, tiny_mlp: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    file = tmp_path / "my_losses.py"
    file.write_text(
        "def square(outputs, batch):\n    return (outputs ** 2).mean()\n\ndef fails(outputs, batch):\n    1 / 0\n"
    )
    losses = Trainer(TrainSettings(batch=16, learning_rate=0.01)).fit(tiny_mlp, points(), load_loss(f"{file}:square"))
    assert losses[-1] < losses[0]
    with pytest.raises(
        DeploykitError, match=r"fails raised ZeroDivisionError: division by zero \(my_losses.py, line 5\)"
    ):
        Trainer(TrainSettings(batch=16)).fit(tiny_mlp, points(), load_loss(f"{file}:fails"))
    with pytest.raises(DeploykitError, match="Did you mean 'square'"):
        load_loss(f"{file}:squares")
    with pytest.raises(DeploykitError, match="no loss 'cross'; write 'ce' or"):
        load_loss("cross")
    assert load_loss("ce") is cross_entropy


# ------------------------------------------------------------------ several processes


SCRIPT = """
import os, sys, numpy as np, torch
from deploykit.core.data import DataSet
from deploykit.core.recipe import TrainSettings
from deploykit.losses import cross_entropy
from deploykit.training.trainer import Trainer
torch.set_num_threads(1)
torch.manual_seed(0)
random = np.random.default_rng(0)
x, y = random.standard_normal((64, 4)).astype(np.float32), np.arange(64) % 3
net = torch.nn.Linear(4, 3)
losses = Trainer(TrainSettings(batch=int(sys.argv[2]), epochs=2)).fit(net, DataSet.of({"input": x}, y), cross_entropy)
torch.save({"losses": torch.tensor(losses), **net.state_dict()}, f"{sys.argv[1]}.{os.environ.get('RANK', '0')}")
"""


def test_distillation_of_maps_is_a_mean_over_positions_as_cross_entropy_is() -> None:
    z, v = torch.randn(4, 3), torch.randn(4, 3)
    flat = distill_kl(2.0)(z, TrainBatch({}, None, v))
    maps = [y[:, :, None, None].expand(4, 3, 5, 6) for y in (z, v)]
    torch.testing.assert_close(distill_kl(2.0)(maps[0], TrainBatch({}, None, maps[1])), flat)


def test_one_sample_at_a_time_is_too_few_for_batch_normalisation() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    data = DataSet.of({"input": np.zeros((8, 4), np.float32)}, np.zeros(8, np.int64))
    with pytest.raises(DeploykitError, match="give a larger batch"):
        Trainer(TrainSettings(batch=1)).fit(net, data, cross_entropy, steps=2)


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    """``accelerate launch`` starts processes through torch's launcher; on CPUs that launcher is called itself."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "ACCELERATE_USE_CPU": "true"}
    for launch, name, batch in (([sys.executable], "one", "16"), (two, "two", "8")):
        command = [*launch, str(script), str(tmp_path / name), batch]
        subprocess.run(command, check=True, timeout=120, capture_output=True, env=environment)
    one, first, second = (torch.load(tmp_path / n, weights_only=True) for n in ("one.0", "two.0", "two.1"))
    for key in one:
        torch.testing.assert_close(one[key], first[key], rtol=1e-4, atol=1e-5)
        assert torch.equal(first[key], second[key])
