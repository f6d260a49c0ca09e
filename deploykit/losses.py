"""Losses: what training makes small. A loss is ``loss(outputs, batch) -> scalar``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deploykit.core.errors import DeploykitError
from deploykit.core.user_code import call, load_function

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TrainBatch:
    """What a loss may look at besides the outputs."""

    inputs: dict[str, Tensor]
    """``[n, ...]`` by forward-argument name, augmented."""
    labels: Tensor | None = None
    """``[n]`` int64, or whatever the data brought."""
    teacher: Any = None
    """What the teacher returned for these inputs, without gradients; None without a teacher."""


Loss = Callable[[Any, TrainBatch], "Tensor"]


def load_loss(spec: str) -> Loss:
    """The loss of a ``[train]`` table.

    Args:
        spec: ``ce`` or ``file.py:function`` (``package.module:function``).

    Raises:
        DeploykitError: no such loss.
    """
    if spec == "ce":
        return cross_entropy
    if ":" not in spec:
        raise DeploykitError(f"no loss '{spec}'; write 'ce' or file.py:function(outputs, batch)")
    return functools.partial(call, f"loss {spec}", load_function(spec, "loss"))


IGNORED = -100
"""The label of what torch's cross-entropy passes over."""


def cross_entropy(outputs: Any, batch: TrainBatch) -> Tensor:
    """Mean cross-entropy of logits ``[n, classes, ...]`` with labels ``[n, ...]``.

    Raises:
        DeploykitError: the data has no labels, or others than the model has classes, or the model has several outputs.
    """
    import torch

    if batch.labels is None:
        raise DeploykitError("loss 'ce' needs labels, and the training data has none; see file.py:function for others")
    logits = tensors(outputs)
    if len(logits) != 1:
        raise DeploykitError(
            f"loss 'ce' is for one output, the model has {len(logits)}; give loss = 'file.py:function'"
        )
    refuse_labels(logits[0], batch.labels, "loss 'ce'", "loss = 'file.py:function' for other tasks")
    return torch.nn.functional.cross_entropy(logits[0], batch.labels)


def refuse_labels(scores: Tensor, labels: Tensor, who: str, instead: str) -> None:
    """Refuses labels that are neither classes of the scores ``[n, classes, ...]`` nor a probability for each of them.

    Args:
        scores: of classes.
        labels: of the same samples.
        who: computes cross-entropy with them.
        instead: what to give where that is not wanted.

    Raises:
        DeploykitError: says what was expected.
    """
    classes = scores.shape[1] if scores.ndim > 1 else 1
    if labels.is_floating_point() and labels.shape != scores.shape:
        raise DeploykitError(
            f"{who} takes whole numbers for labels, or a probability for each of the {classes} classes; given "
            f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}. Give {instead}"
        )
    if labels.is_floating_point():
        return
    if labels.shape != scores.shape[:1] + scores.shape[2:]:
        raise DeploykitError(
            f"{who} takes one label for each answer: labels {list(labels.shape)} do not fit class scores "
            f"{list(scores.shape)}. Give {instead}"
        )
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise DeploykitError(
            f"{who}: label {int(wrong[0])} is no class of this model, which has {classes} of them, 0 to {classes - 1}. "
            f"Give other labels, or {instead}"
        )


def distill_kl(temperature: float = 1.0) -> Loss:
    """Distillation: follow the teacher's softened probabilities (Hinton et al. 2015, section 2).

    With logits z (student), v (teacher) ``[n, classes, ...]`` and p = softmax(v/T), q = softmax(z/T):

        L = T² · mean over n (and positions) of  sum_c p_c (log p_c - log q_c)

    T² keeps the size of the gradients when T changes. Several outputs are summed.

    Raises:
        DeploykitError: (the loss) as `pairs`.
    """

    def loss(outputs: Any, batch: TrainBatch) -> Tensor:
        import torch.nn.functional as F

        divergences = [
            F.kl_div(
                F.log_softmax(z / temperature, dim=1), F.log_softmax(v / temperature, dim=1),
                reduction="none", log_target=True,
            ).sum(1).mean()
            for z, v in pairs(outputs, batch)
        ]  # fmt: skip
        return sum(divergences[1:], divergences[0]) * temperature**2

    return loss


def pairs(outputs: Any, batch: TrainBatch) -> list[tuple[Tensor, Tensor]]:
    """What the student answered and what its teacher answered, output by output.

    Raises:
        DeploykitError: there is no teacher, or it has another number of outputs or outputs of another shape.
    """
    student, teacher = tensors(outputs), tensors(batch.teacher)
    if not student or len(student) != len(teacher):
        raise DeploykitError(f"the student has {len(student)} outputs, its teacher {len(teacher)}")
    for z, v in zip(student, teacher, strict=True):
        if z.shape[1:] != v.shape[1:]:
            raise DeploykitError(f"{unlike(z, v)}; a loss compares them number by number")
    return list(zip(student, teacher, strict=True))


def unlike(z: Tensor, v: Tensor) -> str:
    """How the outputs of a student ``[n, ...]`` and of its teacher ``[n, ...]`` differ."""
    if z.ndim == v.ndim == 2:
        return f"the student tells {z.shape[1]} classes apart, its teacher {v.shape[1]}"
    return f"the student answers {list(z.shape[1:])} to a sample, its teacher {list(v.shape[1:])}"


def as_tensors(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """Inputs by name as tensors, on the arrays' own memory."""
    import torch

    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def tensors(outputs: Any) -> list[Tensor]:
    """What a model returned (a tensor, or a tuple or dict of tensors), as a list in the model's order."""
    import torch

    if isinstance(outputs, torch.Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        return [t for value in outputs.values() for t in tensors(value)]
    if isinstance(outputs, (tuple, list)):
        return [t for value in outputs for t in tensors(value)]
    return []
