"""Teachers: whatever answers to the inputs of the student. Several of them answer as one.

A teacher is a callable ``teacher(inputs) -> outputs``: tensors ``[n, ...]`` in, logits ``[n, classes]`` (or other
outputs of the student's shape) out. Several inputs come by name. It must not learn while it teaches, and must give the
same answer twice.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deploykit.core.errors import DeploykitError
from deploykit.core.files import no_such_file
from deploykit.core.seeds import seeded
from deploykit.core.user_code import call, load_function
from deploykit.losses import tensors, unlike

Teacher = Callable[..., Any]

LEAST = 1e-6
"""Smaller probabilities count as this when their logarithm is taken."""


def load_teacher(spec: str) -> Teacher:
    """The teacher behind a name.

    Args:
        spec: ``file.py:factory`` (or ``package.module:factory``): a function without arguments that returns an
            nn.Module with its weights, which is put into eval mode as a MODEL's is, or any other callable; or
            ``x.onnx``.

    Raises:
        DeploykitError: nothing there, a factory that fails or returns no callable, a file that does not run.
    """
    if spec.endswith(".onnx"):
        return OnnxTeacher(Path(spec))
    if ":" not in spec:
        raise DeploykitError(f"'{spec}' is no teacher; expected file.py:factory, package.module:factory or an .onnx")
    factory = load_function(spec, "factory")
    if isinstance(factory, nn.Module):
        raise DeploykitError(f"{spec} is a model, not a function that makes one: write `def build(): return ...`")
    with seeded(0):  # as a MODEL's factory
        made = call(f"factory {spec}", factory)
    if not callable(made):
        raise DeploykitError(f"factory {spec} returned {type(made).__name__}; a teacher is an nn.Module or a callable")
    return made.eval() if isinstance(made, nn.Module) else made


class OnnxTeacher:
    """An ``.onnx`` file that answers through ONNX Runtime, on the CPU."""

    def __init__(self, path: Path) -> None:
        """Opens it.

        Raises:
            DeploykitError: no such file, not valid, or exported in training mode.
        """
        import onnx

        from deploykit.hub.running import session

        if not path.is_file():
            raise no_such_file(path)
        self.path = path
        try:
            graph = onnx.load(path, load_external_data=False).graph
            for node in graph.node:
                if any(a.name == "training_mode" and a.i for a in node.attribute):
                    what = node.name or node.op_type
                    raise DeploykitError(
                        f"teacher {path} was exported in training mode ({what}): export it after .eval()"
                    )
            self.session = session(str(path))
        except DeploykitError:
            raise
        except Exception as error:  # protobuf and the runtime raise what they like
            why = str(error).strip() or type(error).__name__
            raise DeploykitError(f"teacher {path} does not run: {why.splitlines()[0]}") from None
        self.inputs = [port.name for port in self.session.get_inputs()]
        self.batch = self.session.get_inputs()[0].shape[0]

    def __call__(self, *given: Tensor, **named: Tensor) -> tuple[Tensor, ...]:
        """Its outputs in their order, on the device of the inputs.

        Raises:
            DeploykitError: inputs of other names, or a fixed batch of more than one sample.
        """
        inputs = dict(zip(self.inputs, given, strict=False)) | named
        if sorted(inputs) != sorted(self.inputs):
            raise DeploykitError(f"teacher {self.path} takes {', '.join(self.inputs)}; the student {', '.join(inputs)}")
        device = next(iter(inputs.values())).device
        arrays = {name: x.cpu().numpy() for name, x in inputs.items()}
        if not isinstance(self.batch, int):
            parts = [self.session.run(None, arrays)]
        elif self.batch == 1:
            count = len(next(iter(arrays.values())))
            parts = [self.session.run(None, {k: x[i : i + 1] for k, x in arrays.items()}) for i in range(count)]
        else:
            raise DeploykitError(f"teacher {self.path} takes {self.batch} samples at once: export it with a free batch")
        return tuple(torch.from_numpy(np.concatenate(output)).to(device) for output in zip(*parts, strict=True))

    @property
    def hash(self) -> str:
        """SHA-256 of the file, and of those beside it that hold its weights."""
        import onnx
        from onnx.external_data_helper import ExternalDataInfo, uses_external_data

        digest = hashlib.sha256(self.path.read_bytes())
        constants = onnx.load(self.path, load_external_data=False).graph.initializer
        for name in sorted({ExternalDataInfo(t).location for t in constants if uses_external_data(t)}):
            digest.update((self.path.parent / name).read_bytes())
        return digest.hexdigest()


class Ensemble(nn.Module):
    """One or more teachers that answer as one: the mean of their logits.

    That is the geometric mean of their distributions (Hinton et al. 2015, section 1, leaves the choice between it and
    the arithmetic one), and what Ba & Caruana 2014 regress on, so the same answers serve every loss. Where a teacher
    answers probabilities their logarithms take part: they are logits of the same distribution.
    """

    def __init__(self, teachers: Sequence[Teacher], probabilities: Sequence[bool] = ()) -> None:
        """Of teachers that are used as they are.

        Args:
            teachers: modules among them move to a device with the ensemble.
            probabilities: which of them answer probabilities; empty: none.
        """
        super().__init__()
        self.teachers = list(teachers)
        self.probabilities = list(probabilities) or [False] * len(teachers)
        self.parts = nn.ModuleList(t for t in teachers if isinstance(t, nn.Module))

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Inputs by the student's names -> every output, ``[n, ...]`` float32, averaged over the teachers.

        Raises:
            DeploykitError: teachers that do not answer alike.
        """
        answers = [ask(t, inputs) for t in self.teachers]
        answers = [
            [y.clamp_min(LEAST).log() for y in answer] if probable else answer
            for answer, probable in zip(answers, self.probabilities, strict=True)
        ]
        for other in answers[1:]:
            if [y.shape for y in other] != [y.shape for y in answers[0]]:
                shapes = " and ".join(str([list(y.shape[1:]) for y in a]) for a in (answers[0], other))
                raise DeploykitError(f"teachers that answer as one must answer alike; theirs are {shapes} to a sample")
        return tuple(torch.stack(same).mean(0) if len(same) > 1 else same[0] for same in zip(*answers, strict=True))


def ask(teacher: Teacher, inputs: Mapping[str, Tensor], who: str = "the teacher") -> list[Tensor]:
    """What a teacher (or a student) answers, without gradients, in float32 on the device of the inputs.

    A single input is given by position, since its name in the teacher may be another one.

    Raises:
        DeploykitError: it fails, or answers no tensors or arrays.
    """
    first = next(iter(inputs.values()))
    with torch.no_grad():
        outputs = call(who, teacher, first) if len(inputs) == 1 else call(who, partial(teacher, **inputs))
    found = tensors(_as_tensors(outputs))
    if not found or any(y.ndim == 0 or len(y) != len(first) for y in found):
        raise DeploykitError(f"{who} must answer every sample; to {len(first)} it answered {_kinds(outputs)}")
    return [y.detach().to(first.device).float() for y in found]


def examined(teachers: Sequence[Teacher], inputs: Mapping[str, Tensor]) -> Ensemble:
    """The teachers as one, after a look at each.

    Args:
        teachers: one or more.
        inputs: a few samples by name.

    Raises:
        DeploykitError: a teacher (or a part of it) is in training mode, answers differently the second time, or fails;
            or teachers do not answer alike.
    """
    probable = []
    for teacher in teachers:
        if isinstance(teacher, nn.Module):
            for name, part in teacher.named_modules():
                if part.training:
                    what = f"'{name}' ({type(part).__name__}) of the teacher" if name else "the teacher"
                    raise DeploykitError(f"{what} is in training mode: call .eval() on the whole teacher first")
        answers, again = ask(teacher, inputs), ask(teacher, inputs)
        if not all(
            torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True) for a, b in zip(answers, again, strict=True)
        ):
            raise DeploykitError("the teacher answers differently when it is asked again: is it in training mode?")
        if not all(bool(torch.isfinite(y).all()) for y in answers):
            raise DeploykitError("the teacher's answers are not finite: it cannot teach")
        if not _answers_alone(teacher, inputs, answers):
            raise DeploykitError(
                "the teacher answers a sample differently by itself than beside others: is it in training mode?"
            )
        probable.append(are_probabilities(answers))
    ensemble = Ensemble(teachers, probable).eval()
    ensemble(**inputs)
    return ensemble


def _answers_alone(teacher: Teacher, inputs: Mapping[str, Tensor], answers: Sequence[Tensor]) -> bool:
    """Whether it answers the first sample alone as it did beside others, which batch statistics would not.

    One that takes no single samples is believed, unless it says that it is training.
    """
    try:
        alone = ask(teacher, {name: x[:1] for name, x in inputs.items()})
    except DeploykitError as error:
        return "when training" not in str(error)
    return all(
        torch.allclose(a, b[:1], rtol=1e-2, atol=1e-3 * float(b.abs().max()))
        for a, b in zip(alone, answers, strict=True)
        if a.shape[1:] == b.shape[1:]
    )


def are_probabilities(answers: Sequence[Tensor]) -> bool:
    """Whether it is one output ``[n, classes]`` that came out of a softmax: nothing negative, and rows sum to 1."""
    if len(answers) != 1 or answers[0].ndim != 2 or answers[0].shape[1] < 2:
        return False
    return bool((answers[0] >= 0).all() and ((answers[0].sum(1) - 1).abs() < 1e-3).all())


def refuse_unlike(student: Sequence[Tensor], teacher: Sequence[Tensor], classes: bool) -> None:
    """Raises unless a student can be compared with a teacher, number by number.

    Args:
        student: its outputs for a few samples.
        teacher: the teacher's.
        classes: whether the loss compares probabilities of classes.

    Raises:
        DeploykitError: another number of outputs or classes; a student with a softmax, or with fewer than 2 classes.
    """
    if len(student) != len(teacher):
        raise DeploykitError(f"the student has {len(student)} outputs, its teacher {len(teacher)}")
    for z, v in zip(student, teacher, strict=True):
        if z.shape[1:] != v.shape[1:]:
            raise DeploykitError(
                f"{unlike(z, v)}: take a teacher for the same task, or give the student as many outputs"
            )
        if classes and (z.ndim < 2 or z.shape[1] < 2):
            raise DeploykitError(
                f"loss 'soft' compares probabilities of classes; the student answers {list(z.shape[1:])} to a sample. "
                "Take loss = 'logits'."
            )
    if are_probabilities(student):
        raise DeploykitError(
            "the student answers probabilities (rows sum to 1); distill compares logits: leave out its softmax"
        )


def fingerprint(teacher: Teacher) -> str | None:
    """A hash of all that a teacher's answers depend on; None where that cannot be seen.

    Of an ``.onnx`` its bytes; of a module its parts, their code, plain attributes, parameters and buffers. What a
    module keeps elsewhere is not looked into: answers to a few samples tell it apart
    (`deploykit.distillation.answers`). Other callables cannot be told apart.
    """
    if isinstance(teacher, OnnxTeacher):
        return teacher.hash
    if isinstance(teacher, Ensemble):
        found = [fingerprint(t) for t in teacher.teachers]
        return None if None in found else hashlib.sha256(repr((found, teacher.probabilities)).encode()).hexdigest()
    if not isinstance(teacher, nn.Module):
        return None
    digest = hashlib.sha256()
    for name, part in teacher.named_modules():
        plain = {k: v for k, v in vars(part).items() if isinstance(v, (bool, int, float, str, tuple)) and k[0] != "_"}
        digest.update(repr((name, type(part).__qualname__, sorted(plain.items()), part.extra_repr())).encode())
    for kind in sorted({type(part) for part in teacher.modules()}, key=lambda k: (k.__module__, k.__qualname__)):
        digest.update(_source(kind).encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
        digest.update(
            array.flatten().view(torch.uint8).numpy().tobytes() if array.ndim else repr(array.item()).encode()
        )
    return digest.hexdigest()


def _source(kind: type) -> str:
    if kind.__module__.partition(".")[0] == "torch":
        return torch.__version__
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # typed in, or written in C
        return kind.__qualname__


def _as_tensors(outputs: Any) -> Any:
    """Arrays among the outputs as tensors."""
    if isinstance(outputs, np.ndarray):
        return torch.from_numpy(outputs)
    if isinstance(outputs, Mapping):
        return {name: _as_tensors(value) for name, value in outputs.items()}
    return [_as_tensors(value) for value in outputs] if isinstance(outputs, (tuple, list)) else outputs


def _kinds(outputs: Any) -> str:
    found = tensors(_as_tensors(outputs))
    return ", ".join(str(list(y.shape)) for y in found) if found else type(outputs).__name__
