"""Losses that follow a teacher: hand-worked numbers, the papers' formulas in NumPy, finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deploykit.core.errors import DeploykitError
from deploykit.distillation.attention import attended, attention
from deploykit.distillation.detection import decode, detection, suppressed, taught
from deploykit.distillation.hints import hints, regressor
from deploykit.distillation.logits import logits
from deploykit.distillation.noisy import disturbed, noisy
from deploykit.distillation.soft import soft
from deploykit.losses import Loss, TrainBatch


def value(loss: Loss, outputs: Any, teacher: Any, labels: Tensor | None = None) -> float:
    return float(loss(outputs, TrainBatch({}, labels, teacher)).detach())


def softmax(a: Any, temperature: float) -> Any:
    e = np.exp(a.numpy().astype(np.float64) / temperature)
    return e / e.sum(1, keepdims=True)


# ------------------------------------------------------------------ logits


def test_regression_on_logits_is_half_the_squared_distance_of_a_sample() -> None:
    g, z = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    assert value(logits, g, z) == (1 + 0 + 4 + 1) / (2 * 2)
    assert value(logits, {"a": g, "b": g}, (z, z)) == 2 * 1.5


# ------------------------------------------------------------------ soft targets


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.5), (4.0, 0.9), (20.0, 0.0)])
def test_soft_targets_and_labels_share_the_weight(temperature: float, alpha: float) -> None:
    z, v, y = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5), torch.tensor([0, 4, 2, 1, 1, 3])
    p, q, q1 = softmax(v, temperature), softmax(z.detach(), temperature), softmax(z.detach(), 1.0)
    divergence = (p * np.log(p / q)).sum(1).mean()
    expected = alpha * temperature**2 * divergence - (1 - alpha) * np.log(q1[np.arange(6), y]).mean()
    found = soft(temperature, alpha)(z, TrainBatch({}, y, v))
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    found.backward()
    gradient = alpha * temperature * (q - p) + (1 - alpha) * (q1 - np.eye(5)[y])
    assert z.grad is not None
    np.testing.assert_allclose(z.grad.numpy(), gradient / 6, atol=1e-6)


def test_at_high_temperatures_soft_targets_are_regression_on_logits() -> None:
    """Hinton et al. 2015, section 2.1: for logits of mean zero the gradient is (z - v)/c, in this loss per sample."""
    z, v = (x - x.mean(1, keepdim=True) for x in (torch.randn(4, 10), torch.randn(4, 10)))
    assert value(soft(100.0), z, v) == pytest.approx(value(logits, z, v) / 10, rel=1e-2)


def test_without_weight_on_labels_none_are_needed() -> None:
    z, v = torch.randn(3, 4), torch.randn(3, 4)
    assert value(soft(2.0), z, v) > 0
    with pytest.raises(DeploykitError, match="needs labels"):
        value(soft(2.0, 0.9), z, v)


# ------------------------------------------------------------------ a noisy teacher


def test_noise_multiplies_every_logit_of_a_fraction_of_the_samples() -> None:
    torch.manual_seed(0)
    z = torch.rand(4000, 5) + 1
    xi = (disturbed(z, 0.3, 0.25) / z - 1).numpy()
    touched = (np.abs(xi) > 1e-6).any(1)
    assert touched.mean() == pytest.approx(0.25, abs=0.03)
    assert (np.abs(xi[touched]) > 1e-7).mean() > 0.99
    assert xi[touched].mean() == pytest.approx(0.0, abs=0.02) and xi[touched].std() == pytest.approx(0.3, rel=0.05)
    assert np.abs(np.corrcoef(xi[touched].T) - np.eye(5)).max() < 0.15


def test_a_noisy_teacher_is_another_one_every_time_but_the_same_in_every_run() -> None:
    g, z = torch.randn(8, 3), torch.randn(8, 3)
    loss = noisy(0.5, 1.0)

    def draws(seed: int) -> list[float]:
        torch.manual_seed(seed)  # as a trainer does
        return [value(loss, g, z) for _ in range(3)]

    assert len(set(draws(1))) == 3 and draws(1) == draws(1)
    assert draws(1)[0] != draws(2)[0]


def test_held_out_samples_are_judged_by_what_the_teacher_means() -> None:
    g, z = torch.randn(8, 3), torch.randn(8, 3)
    with torch.no_grad():
        assert value(noisy(0.5, 1.0), g, z) == value(logits, g, z)


# ------------------------------------------------------------------ hints


def test_hints_are_half_the_mean_square_summed_over_layers() -> None:
    r, u = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert value(hints, (r,), (u,)) == (1 + 4) / 2 / 2
    maps = torch.ones(2, 3, 4, 4)
    assert value(hints, (r, maps), (u, 3 * maps)) == 1.25 + 4 / 2


def test_a_regressor_is_as_large_as_it_must_be() -> None:
    thin = torch.randn(2, 4, 8, 6)
    assert regressor(thin.shape, (2, 16, 8, 6))(thin).shape == (2, 16, 8, 6)
    made: Any = regressor(thin.shape, (2, 16, 5, 4))
    assert made.kernel_size == (4, 3) and made(thin).shape == (2, 16, 5, 4)  # FitNets: h - k + 1 = h'
    assert regressor((2, 7, 3), (2, 7, 9))(torch.randn(2, 7, 3)).shape == (2, 7, 9)


@pytest.mark.parametrize(
    ("student", "teacher"), [((2, 4, 4, 4), (2, 4, 8, 8)), ((2, 5, 3), (2, 7, 3)), ((2, 3), (2, 3, 1))]
)
def test_features_that_cannot_be_compared_are_refused(student: Any, teacher: Any) -> None:
    with pytest.raises(DeploykitError, match="cannot follow one that writes"):
        regressor(student, teacher)


# ------------------------------------------------------------------ attention


def test_attention_is_one_minus_the_cosine_of_the_maps() -> None:
    student = torch.tensor([[[[3.0, 4.0]]]])  # one channel: 9, 16
    teacher = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])  # two channels: 1, 1
    assert attended(student).tolist() == [[[9.0, 16.0]]] and attended(teacher).tolist() == [[[1.0, 1.0]]]
    cosine = (9 + 16) / (math.sqrt(81 + 256) * math.sqrt(2))
    assert value(attention, (student,), (teacher,)) == pytest.approx(1 - cosine, rel=1e-5)
    assert value(attention, (student, student), (teacher, teacher)) == pytest.approx(2 * (1 - cosine), rel=1e-5)


def test_how_strongly_a_layer_writes_is_no_attention() -> None:
    a = torch.randn(3, 4, 5, 5)
    assert value(attention, (7 * a,), (a,)) == pytest.approx(0.0, abs=1e-6)


def test_a_map_of_another_size_is_resampled() -> None:
    coarse = torch.rand(2, 3, 4, 4) + 0.1
    fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    moved = fine.flip(3)
    assert value(attention, (coarse,), (fine,)) < 0.3 * value(attention, (coarse,), (moved,))


def test_what_is_no_map_has_no_attention() -> None:
    with pytest.raises(DeploykitError, match=r"this one writes \[2, 5\]"):
        value(attention, (torch.zeros(2, 5),), (torch.zeros(2, 5),))


# ------------------------------------------------------------------ detection


def head(*cells: tuple[float, list[float]], anchors: int = 1) -> Tensor:
    """A head ``[1, anchors, 5 + c, 1, w]`` of cells in a row: objectness (a probability) and class logits."""
    columns = [[0.0, 0.0, 0.0, 0.0, math.log(o / (1 - o)), *classes] for o, classes in cells]
    return torch.tensor(columns).T.reshape(1, 1, -1, 1, len(cells)).repeat(1, anchors, 1, 1, 1)


A, B = [5.0, 0.0], [0.0, 5.0]
STUDENT = torch.zeros(1, 1, 7, 1, 1)
"""x = y = 0.5, t_w = t_h = 0, objectness 0.5, classes 0.5 and 0.5."""
TEACHER = torch.tensor([0.0, 0.0, 0.0, 2.0, math.log(3), math.log(3), 0.0]).reshape(1, 1, 7, 1, 1)
"""x = y = 0.5, t_w = 0, t_h = 2, objectness 0.75, classes 0.75 and 0.25."""
LABEL = torch.tensor([0.5, 0.25, 1.0, 0.0, 1.0, 1.0, 0.0]).reshape(1, 1, 7, 1, 1)
LABELLED = 0.25 + (0.25 + 0.25) + 5 * (0.0625 + 1)
OBJECTNESS = (0.5 + 0.5 * 0.75) * 0.0625
SCALED = OBJECTNESS + 0.75 * (0.125 + 5 * 4)


def test_a_cell_of_a_detector_by_hand() -> None:
    assert value(detection(), STUDENT, TEACHER) == pytest.approx(SCALED)
    assert value(detection(), STUDENT, TEACHER, LABEL) == pytest.approx(LABELLED + SCALED)
    assert value(detection(weight=2.0), STUDENT, TEACHER, LABEL) == pytest.approx(LABELLED + 2 * SCALED)
    assert value(detection(scaled=False), STUDENT, TEACHER) == pytest.approx(OBJECTNESS + 0.125 + 20)


def test_background_counts_half_and_teaches_neither_class_nor_box() -> None:
    background = LABEL * torch.tensor([1, 1, 1, 1, 0.0, 1, 1]).reshape(1, 1, 7, 1, 1)
    silent = TEACHER.clone()
    silent[:, :, 4] = -30.0  # objectness 0
    found = value(detection(), STUDENT, silent, background)
    assert found == pytest.approx(2 * 0.5 * 0.25)


def test_images_without_labels_among_others_learn_from_the_teacher_alone() -> None:
    unknown = LABEL.clone()
    unknown[:, :, 4] = -1.0
    both = [torch.cat([t, t]) for t in (STUDENT, TEACHER)]
    found = value(detection(), *both, torch.cat([LABEL, unknown]))  # type: ignore[arg-type]
    assert found == pytest.approx((LABELLED + SCALED + SCALED) / 2)


def test_of_neighbouring_cells_that_see_one_class_the_surest_stays() -> None:
    cells = head((0.9, A), (0.8, A), (0.3, B), (0.7, A))
    torch.testing.assert_close(suppressed(decode(cells)).flatten(), torch.tensor([0.9, 0.0, 0.3, 0.7]))


def test_neighbours_are_the_eight_around_a_cell() -> None:
    objectness = torch.full((5, 5), 0.1)
    objectness[2, 2], objectness[2, 4] = 0.9, 0.8
    cells = torch.zeros(1, 1, 7, 5, 5)
    cells[0, 0, 4], cells[0, 0, 5] = torch.logit(objectness), 5.0
    kept = suppressed(decode(cells))[0, 0]
    assert kept[1:4, 1:4].count_nonzero() == 1 and kept[2, 2] == pytest.approx(0.9)
    assert kept[2, 4] == pytest.approx(0.8) and kept[1, 4] == kept[3, 4] == 0
    assert kept[0, 0] > 0  # two cells away


def test_of_the_anchors_of_a_cell_the_surest_stays() -> None:
    cells = head((0.9, A), anchors=2)
    cells[0, 1, 4] = math.log(0.6 / 0.4)
    torch.testing.assert_close(suppressed(decode(cells)).flatten(), torch.tensor([0.9, 0.0]))
    cells[0, 1, 5:] = torch.tensor(B)[:, None, None]
    torch.testing.assert_close(suppressed(decode(cells)).flatten(), torch.tensor([0.9, 0.6]))


def test_the_student_sees_the_teacher_after_suppression() -> None:
    student, teacher = head((0.5, A), (0.5, A)), head((0.9, A), (0.8, A))
    alone = float(taught(decode(student), decode(teacher)))
    assert alone == pytest.approx((0.5 + 0.45) * 0.4**2 + 0.5 * 0.5**2, rel=1e-5)
    assert value(detection(nms=False), student, teacher) == pytest.approx(0.95 * 0.4**2 + 0.9 * 0.3**2, rel=1e-5)


def test_what_is_no_head_is_refused() -> None:
    z = torch.zeros(2, 7, 3, 3)
    with pytest.raises(DeploykitError, match=r"a detector's head is \[n, anchors, 5 \+ classes, h, w\]"):
        value(detection(), z, z)
    with pytest.raises(DeploykitError, match=r"labels are \[2\], the head is"):
        value(detection(), STUDENT, TEACHER, torch.zeros(2))


# ------------------------------------------------------------------ all of them


@pytest.mark.parametrize(
    ("loss", "shape", "labels"),
    [
        (logits, (3, 4), None),
        (soft(3.0, 0.6), (3, 4), torch.tensor([0, 3, 1])),
        (hints, (3, 4, 2, 2), None),
        (attention, (3, 4, 2, 2), None),
        (detection(), (1, 2, 7, 2, 3), None),
    ],
    ids=["logits", "soft", "hints", "attention", "detection"],
)
def test_gradients_are_finite_differences(loss: Loss, shape: tuple[int, ...], labels: Tensor | None) -> None:
    teacher = torch.randn(shape, dtype=torch.float64)
    of: Callable[[Tensor], Tensor] = lambda z: loss((z,), TrainBatch({}, labels, (teacher,)))  # noqa: E731
    assert torch.autograd.gradcheck(of, (torch.randn(shape, dtype=torch.float64, requires_grad=True),))


@pytest.mark.parametrize("loss", [logits, soft(), noisy(0.5, 0.5), hints], ids=["logits", "soft", "noisy", "hints"])
def test_other_class_counts_are_refused_by_every_loss(loss: Loss) -> None:
    with pytest.raises(DeploykitError, match="the student tells 3 classes apart, its teacher 5"):
        value(loss, torch.zeros(2, 3), torch.zeros(2, 5))
    with pytest.raises(DeploykitError, match="the student has 1 outputs, its teacher 0"):
        value(loss, torch.zeros(2, 3), None)
