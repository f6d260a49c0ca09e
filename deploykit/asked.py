"""What was asked for, done: a `Request` becomes files. The command line, the demo and `reproduce` all go this way."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit import pipeline, targets, trial
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError, unknown
from deploykit.core.files import refuse_taken
from deploykit.core.manifest import Manifest, load_intact
from deploykit.core.ranges import load_ranges
from deploykit.core.request import Request
from deploykit.core.user_code import load_function, source_files
from deploykit.devices import Lost
from deploykit.models import factory_of, input_specs, load_model
from deploykit.pipeline import Prepared
from deploykit.planning import precisions
from deploykit.sources import data_of, load_data
from deploykit.trial import Exam, Trial

if TYPE_CHECKING:
    from numpy.typing import NDArray

FUNCTION = re.compile(r"(.+\.py|[^\W\d]\w*(\.[^\W\d]\w*)*):[^\W\d]\w*")
"""``file.py:function`` or ``package.module:function``."""


def prepare(request: Request, hold_out: bool = True) -> Prepared:
    """Model and data, read from where the request says; see `deploykit.pipeline.prepare`.

    Raises:
        DeploykitError: one of them is missing, damaged or not what it should be.
    """
    model = load_model(request.model, None if request.weights is None else Path(request.weights))
    inputs, seed = input_specs(model), request.settings.seed
    example = dict(example_input(text) for text in request.inputs) or None
    data = {
        role: data_of(spec, inputs, request.preprocess, role, seed, model.module, example)
        for role, spec in request.data.items()
    }
    return pipeline.prepare(model, data, example, hold_out)


def export(requests: Sequence[Request], folders: Sequence[Path], device: str | None = None) -> None:
    """Writes one artifact per request; the requests are equal but for their targets.

    Args:
        requests: what was asked for.
        folders: where to, one per request.
        device: address of a device that the files are tried out on.

    Raises:
        DeploykitError: something about the requests that can be mended; nothing is left behind.
        GateFailed: the files were written but failed a check.
    """
    request = requests[0]
    chosen = [targets.load(asked.target) for asked in requests]
    for folder in folders:
        refuse_taken(folder, request.settings.overwrite)
    calibrated = "calibration" in request.data or request.ranges is not None
    for target in chosen:  # missing sample data is said before the shapes that it would show are asked for
        precisions(target, request.settings.precisions, calibrated)
    prepared = prepare(request)
    ranges = None if request.ranges is None else load_ranges(Path(request.ranges))
    metric = None if request.metric is None else load_function(request.metric, "metric")
    asked = [replace(r, read=files_read(r)) for r in requests]
    pipeline.export(prepared, chosen, folders, request.settings, request.gate, metric, ranges, asked, device)


def try_out(
    folders: Sequence[Path],
    device: str,
    *,
    evaluation: str | None = None,
    metric: str | None = None,
    record: bool = False,
    runs: int,
    threads: int = 1,
    minutes: float = 0.0,
) -> Trial:
    """Times finished artifacts on a device; with evaluation data they answer it there.

    Args:
        folders: the artifacts.
        device: address.
        evaluation: DATA; with ``record``, that of the export if none is given.
        metric: of the user's; that of the export if none is given.
        record: keep what was found in the manifests.
        runs: rounds at least.
        threads: of the runtimes there.
        minutes: go on that long without a pause.

    Raises:
        DeploykitError: the device cannot be reached or lacks something; not an artifact; no such data.
    """
    manifests = [load_intact(folder) for folder in folders]
    exams = []
    if evaluation is not None or record:
        trial.refuse(device, folders)
        exams = _exams(manifests, evaluation, metric)
    if len(exams) != len(folders):  # nothing to answer for one of them: all are only timed
        exams = []
    try:
        found = trial.try_out(device, folders, None, exams, runs=runs, threads=threads, minutes=minutes)
    except Lost as error:
        raise DeploykitError(f"{error}. Run the same command again: it goes on from there.") from None
    for i, folder in enumerate(folders if record else ()):
        trial.record(folder, found, i)
    return found


def _exams(manifests: Sequence[Manifest], evaluation: str | None, metric: str | None) -> list[Exam]:
    """What each artifact's files shall answer; artifacts of one export share the model and its answers."""
    known: dict[str, Exam | None] = {}
    found = []
    for manifest in manifests:
        key = repr(replace(manifest.request, target="", read={}))
        if key not in known or evaluation is not None:
            known[key] = _exam(manifest, evaluation, metric)
        found.append(known[key])
    return [exam for exam in found if exam is not None]


def _exam(manifest: Manifest, evaluation: str | None, metric: str | None) -> Exam | None:
    """The data given, or that of the artifact's export."""
    asked = manifest.request
    if evaluation is not None:
        pixels = asked.settings.uint8_input  # then declared as floats between 0 and 255, and turned into pixels again
        specs = [replace(s, dtype="float32") if s.dtype == "uint8" and pixels else s for s in manifest.inputs]
        data = load_data(evaluation, specs, manifest.preprocess, "eval", asked.settings.seed)
        data = data.as_pixels() if pixels else data
        metric = metric or asked.metric
        return Exam(_as_taken(data, manifest), data.origin, None if metric is None else load_function(metric, "metric"))
    if asked.objects or not asked.data:
        return None
    judge = None if asked.metric is None else load_function(asked.metric, "metric")
    return pipeline.exam(prepare(asked), asked.settings, asked.gate, judge)


def _as_taken(data: DataSet, manifest: Manifest) -> DataSet:
    """The samples in the types that the files take: pixels are whole numbers."""
    types = {spec.name: spec.dtype for spec in manifest.inputs}
    sample = data.sample
    return replace(data, sample=lambda i: {name: np.asarray(a, types[name]) for name, a in sample(i).items()})


def files_read(request: Request) -> dict[str, str]:
    """The files that a request names, and the user's Python that it leads to, with their hashes.

    Options of steps count: whatever text among them is a file, or names a function, as `distill` names its teachers.
    Sample data is not among them: what came out of it is hashed. Files that are not there are left out.
    """
    loss = request.settings.recipe.train.loss
    folder = Path(request.model)
    compressed = (folder / "structure.json").is_file()
    model = factory_of(folder) if compressed else request.model
    functions = [model, *request.data.values(), request.metric or "", loss]
    options = [text for step in request.settings.recipe.steps for text in _texts(step.options)]
    named = [request.model, request.weights, request.ranges, request.target, *options]
    found = {path: Path(path) for path in named if path}
    if compressed:
        found |= {f"{request.model}/{name}": folder / name for name in ("structure.json", "model.safetensors")}
    for spec in functions:
        if ":" in spec and not Path(spec).exists():
            found |= source_files(spec)
    for text in options:
        if FUNCTION.fullmatch(text):
            with contextlib.suppress(DeploykitError):  # the step says what is wrong with it, if it is a function
                found |= source_files(text)
    return {name: file_hash(path) for name, path in sorted(found.items()) if path.is_file()}


def _texts(options: Any) -> Iterator[str]:
    """All texts among the options of a step, however deep."""
    if isinstance(options, str):
        yield options
    elif isinstance(options, Mapping):
        yield from _texts(list(options.values()))
    elif isinstance(options, (list, tuple)):
        for option in options:
            yield from _texts(option)


def file_hash(path: Path) -> str:
    """The first 16 digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def example_input(text: str) -> tuple[str, NDArray[Any]]:
    """``x=1x3x224x224`` or ``ids=1x128:int64`` as a name and an example array.

    Raises:
        DeploykitError: written otherwise, or an unknown dtype.
    """
    found = re.fullmatch(r"(\w+)=([1-9]\d*(?:x[1-9]\d*)*)(?::(\w+))?", text)
    if found is None:
        raise DeploykitError(f"--input takes NAME=1x3x224x224 or NAME=1x128:int64, given '{text}'")
    name, shape, dtype = found[1], [int(d) for d in found[2].split("x")], found[3] or "float32"
    try:
        kind = np.dtype(dtype)
    except TypeError:
        raise unknown("dtype", dtype, ("float32", "int64", "int32", "bool")) from None
    random = np.random.default_rng(0)
    return name, (random.standard_normal(shape) if kind.kind == "f" else random.integers(0, 2, shape)).astype(kind)
