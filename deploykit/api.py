"""The Python face: the same road as the command line, with Python objects for model and data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit import pipeline, recipes, targets
from deploykit.asked import files_read
from deploykit.core.artifact import Artifact
from deploykit.core.context import Role
from deploykit.core.data import DataSet, Preprocess
from deploykit.core.errors import DeploykitError
from deploykit.core.ranges import load_ranges
from deploykit.core.recipe import Recipe
from deploykit.core.request import Gate, Request, Settings
from deploykit.core.tables import from_table
from deploykit.exporters import open_artifact
from deploykit.models import Model, accept_module, input_specs, load_model
from deploykit.sources import data_of, from_python

if TYPE_CHECKING:
    from torch import nn

__all__ = ["export", "load", "open_artifact"]


def export(
    model: nn.Module | str | Path,
    target: str,
    calibration: Any = None,
    *,
    train: Any = None,
    evaluation: Any = None,
    weights: str | Path | None = None,
    recipe: Recipe | str | Path | None = None,
    preprocess: Preprocess | None = None,
    example: Mapping[str, Any] | None = None,
    metric: Callable[[Mapping[str, Any], Any], float] | None = None,
    ranges: str | Path | None = None,
    out: str | Path = "out",
    gate: Gate | None = None,
    device: str | None = None,
    **settings: Any,
) -> Artifact:
    """Writes checked files for a device and returns them, callable.

    Args:
        model: an nn.Module in eval mode, or a MODEL argument as on the command line.
        target: a name from ``deploykit targets``, or a ``.toml`` of your own.
        calibration: sample inputs: a DataLoader, a list of batches, an array or tensor ``[n, ...]``, a dict of arrays
            by forward-argument name, or a path as on the command line, where ``"synthetic"`` or ``"random"`` inputs can
            be made up, too. Without it only float files are written.
        train: like ``calibration``, for steps that train.
        evaluation: like ``calibration``, with labels: ``(inputs, labels)`` batches.
        weights: for a factory.
        recipe: a `Recipe`, a TOML file, or the name of one that ships: ``"prune"``, ``"dsd"``, ``"sparse_2_4"``,
            ``"deep_compression"``, ``"small_file"``; ``"default"`` is the target's own.
        preprocess: what is done to images read from files.
        example: arrays ``[n, ...]`` by input name, where there is no sample data.
        metric: ``metric(outputs, labels) -> percent``, higher is better; default: top-1 accuracy.
        ranges: a file that ``deploykit calibrate`` wrote.
        out: folder to write.
        gate: the bounds the files must meet.
        device: address of a device on which the files are timed and answer the evaluation data, e.g.
            ``"ssh://pi@10.0.0.7"``.
        settings: fields of `deploykit.core.request.Settings`, e.g. ``thresholds="mse"``, ``overwrite=True``.

    Raises:
        DeploykitError: something about the request or its inputs that you can mend.
        GateFailed: the files were written but failed a check.
    """
    asked = from_table(Settings, settings, "settings")
    loaded = load_model(str(model), None if weights is None else Path(weights)) if _is_spec(model) else None
    if loaded is None:
        loaded = accept_module(model)
        if weights is not None:
            raise DeploykitError("weights are for factories; load them into the module yourself")
    given: dict[Role, Any] = {"calibration": calibration, "train": train, "eval": evaluation}
    data = {role: _data(s, loaded, preprocess, role, asked.seed, example) for role, s in given.items() if s is not None}
    prepared = pipeline.prepare(loaded, data, example)
    profile = targets.load(target)
    steps = (
        recipe if isinstance(recipe, Recipe) else Recipe() if recipe is None else recipes.load(str(recipe), [profile])
    )
    known = load_ranges(Path(ranges)) if ranges is not None else None
    named = [("model", model), ("example", example), ("metric", metric), *given.items()]
    request = Request(
        model=loaded.origin,
        target=target,
        weights=None if weights is None else str(weights),
        data={role: str(source) for role, source in given.items() if _is_spec(source)},
        preprocess=preprocess,
        ranges=None if ranges is None else str(ranges),
        settings=replace(asked, recipe=steps),
        gate=gate or Gate(),
        objects=tuple(f"{n} ({type(s).__name__})" for n, s in named if s is not None and not _is_spec(s)),
    )
    request = replace(request, read=files_read(request))
    folder = Path(out)
    pipeline.export(prepared, [profile], [folder], request.settings, request.gate, metric, known, [request], device)
    return open_artifact(folder)


def load(folder: str | Path) -> nn.Module:
    """The module in a folder that ``deploykit compress`` wrote, its zeros held.

    Raises:
        DeploykitError: not such a folder, or its factory is gone.
    """
    module = load_model(str(folder)).module
    if module is None:
        raise DeploykitError(f"{folder} holds no PyTorch module")
    return module


def _is_spec(model: Any) -> bool:
    return isinstance(model, (str, Path))


def _data(
    source: Any,
    model: Model,
    preprocess: Preprocess | None,
    role: Role,
    seed: int,
    example: Mapping[str, Any] | None,
) -> DataSet:
    if _is_spec(source):
        return data_of(str(source), input_specs(model), preprocess, role, seed, model.module, example)
    return from_python(source, input_specs(model), role=role, seed=seed, origin=f"{role} data")
