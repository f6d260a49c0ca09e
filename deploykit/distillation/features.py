"""What layers write, beside what the network answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deploykit.core.errors import DeploykitError, unknown
from deploykit.core.seeds import seeded
from deploykit.distillation.attention import attention
from deploykit.distillation.hints import regressor
from deploykit.layerwise.watching import evaluating, hooked
from deploykit.losses import Loss, TrainBatch, tensors

if TYPE_CHECKING:
    from torch import Tensor

    from deploykit.distillation.teachers import Ensemble


class Watched(nn.Module):
    """A network that answers ``(outputs, features)``: what it answers anyway, and what some of its layers write."""

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[str],
        inside: nn.Module | None = None,
        regressors: Sequence[nn.Module] = (),
    ) -> None:
        """Watches a network, which stays as it is.

        Args:
            network: shared, not copied.
            layers: paths of its layers.
            inside: the part of it that the paths start from; None: the network itself.
            regressors: what the features go through, layer by layer, trained with the network; empty: they stay as they
                are written.

        Raises:
            DeploykitError: there is no such layer.
        """
        super().__init__()
        self.network, self.regressors = network, nn.ModuleList(regressors)
        known = dict((inside or network).named_modules())
        for name in layers:
            if not name or name not in known:
                raise unknown("layer", name, [path for path in known if path])
        self.watched = tuple((name, known[name]) for name in layers)

    def forward(self, **inputs: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
        """Inputs by name -> (outputs, the features of every layer; of one that runs several times the last).

        Raises:
            DeploykitError: a layer did not run.
        """
        found: dict[str, Tensor] = {}

        def watch(name: str, layer: nn.Module) -> Any:
            def note(_layer: nn.Module, _given: Any, y: Any) -> None:
                found[name] = tensors(y)[0].clone()  # what comes behind may write in place

            return layer.register_forward_hook(note)

        with hooked(watch(name, layer) for name, layer in self.watched):
            outputs = self.network(**inputs)
        silent = [name for name, _ in self.watched if name not in found]
        if silent:
            raise DeploykitError(f"layer '{silent[0]}' does not run, so there is nothing to follow")
        features = [found[name] for name, _ in self.watched]
        if self.regressors:
            features = [r(x) for r, x in zip(self.regressors, features, strict=True)]
        return outputs, tuple(features)


def followed(answers: Loss | None, features: Loss, beta: float) -> Loss:
    """The loss of two `Watched` networks: on what they answer, plus β times that on what their layers write.

    Args:
        answers: sees the outputs of both; None: only the features count.
        features: sees the features of both.
        beta: β.
    """

    def loss(outputs: Any, batch: TrainBatch) -> Tensor:
        (answered, written), (expected, shown) = outputs, batch.teacher
        total = beta * features(written, TrainBatch(batch.inputs, batch.labels, shown))
        return total if answers is None else total + answers(answered, TrainBatch(batch.inputs, batch.labels, expected))

    return loss


def watched_pair(
    student: nn.Module,
    teacher: Ensemble,
    layers: Mapping[str, str],
    regress: bool,
    few: Mapping[str, Tensor],
    seed: int,
) -> tuple[Watched, Watched]:
    """Student and teacher with the layers that are compared.

    Args:
        student: shared, not copied.
        teacher: a single one.
        layers: the student's, and which of the teacher's each follows.
        regress: whether the student's features go through regressors; else they must be maps.
        few: some samples by name, which tell the shapes.
        seed: of the regressors' first weights.

    Raises:
        DeploykitError: a layer that is not there or does not run, features that cannot be compared, or a teacher that
            cannot be looked into.
    """
    network = teacher.teachers[0]
    if len(teacher.teachers) > 1 or not isinstance(network, nn.Module):
        raise DeploykitError("distill: layers can be followed in a single teacher that is a PyTorch module")
    try:
        own = Watched(student, list(layers))
    except DeploykitError as error:
        raise DeploykitError(f"distill, the student: {error}") from None
    try:
        theirs = Watched(teacher, list(layers.values()), inside=network)
    except DeploykitError as error:
        raise DeploykitError(f"distill, the teacher: {error}") from None
    with evaluating(own), evaluating(theirs), torch.no_grad():
        (_, written), (_, shown) = own(**few), theirs(**few)
    if not regress:
        attention(written, TrainBatch(dict(few), teacher=shown))
        return own, theirs
    with seeded(seed):
        between = [regressor(s.shape, t.shape) for s, t in zip(written, shown, strict=True)]
    return Watched(student, list(layers), regressors=between), theirs
