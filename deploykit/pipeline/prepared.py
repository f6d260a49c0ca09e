"""`Prepared`: model and data, checked against each other, with the samples that files will be judged on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.context import Role
from deploykit.core.data import DataSet, Preprocess, held_out
from deploykit.core.errors import DeploykitError, unknown
from deploykit.core.target import Need
from deploykit.planning import available
from deploykit.sources import check_magnitudes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deploykit.models import Model

HELD_OUT_LABEL = "every fifth calibration sample, held out"


@dataclass(frozen=True)
class Prepared:
    """What one run shares between its targets."""

    model: Model
    data: Mapping[Role, DataSet]
    example: Mapping[str, NDArray[Any]]
    preprocess: Preprocess | None
    held_out: bool
    """Whether the evaluation data was taken from the calibration data."""

    @property
    def evaluation(self) -> DataSet | None:
        """What the files are scored on."""
        return self.data.get("eval") or self.data.get("holdout")

    @property
    def judged(self) -> DataSet:
        """What the files are run on: evaluation data, or else the calibration data, or the example."""
        found = self.evaluation or self.data.get("calibration")
        return found or DataSet.of(dict(self.example), origin="the example inputs")

    @property
    def made_up(self) -> list[str]:
        """That calibration used no real data."""
        data = self.data.get("calibration")
        if data is None or not data.synthetic:
            return []
        return [f"calibrated without real data, on {len(data)} {data.origin}: judge the files on samples of your own"]

    @property
    def have(self) -> list[Need]:
        """What there is of what passes may need."""
        return available(self.data, teacher=self.model.onnx is None)

    def as_pixels(self) -> Prepared:
        """The same samples as raw pixels, for the files.

        Raises:
            DeploykitError: there are no images, or no declared preprocessing.
        """
        pixels: dict[Role, DataSet] = {role: d.as_pixels() for role, d in self.data.items() if role != "train"}
        if not pixels:
            raise DeploykitError("files that take uint8 pixels need image data: give --calib or --eval")
        source = next(iter(pixels.values()))
        return replace(self, data=pixels, example=next(source.batches(2)).inputs, preprocess=source.preprocess)


def prepare(
    model: Model, data: Mapping[Role, DataSet], example: Mapping[str, NDArray[Any]] | None, hold_out: bool = True
) -> Prepared:
    """Splits off evaluation data where none was given (unless nobody will evaluate), and takes an example batch.

    Raises:
        DeploykitError: there is neither calibration data nor an example input.
    """
    _same_shapes(data)
    check_magnitudes(list(data.values()))
    taken = False
    given = dict(data)
    calibration = given.get("calibration")
    if hold_out and calibration is not None and "eval" not in given and not calibration.synthetic:
        judged = held_out(len(calibration))
        if judged.any():
            given["holdout"] = calibration.pick(np.flatnonzero(judged))
            given["calibration"] = calibration.pick(np.flatnonzero(~judged))
            taken = True
    source = given.get("calibration") or given.get("eval") or given.get("train")
    if source is not None:
        example = next(source.batches(2)).inputs
    elif example is None:
        example = _example(model)
    else:
        _check_example(example, model)
    if len(next(iter(example.values()))) == 1:
        example = {name: np.concatenate([a, a]) for name, a in example.items()}
    preprocess = None if source is None else source.preprocess
    return Prepared(model, given, example, preprocess, taken)


def _same_shapes(data: Mapping[Role, DataSet]) -> None:
    """Refuses data sets whose samples differ in shape: a network is exported for one."""
    known: dict[str, tuple[tuple[int, ...], str]] = {}
    for found in data.values():
        for name, array in found.sample(found.index[0]).items():
            shape, origin = known.setdefault(name, (array.shape, found.origin))
            if array.shape != shape:
                raise DeploykitError(
                    f"{found.origin}: samples of '{name}' are {_sides(array.shape)}, "
                    f"those of {origin} {_sides(shape)}; both must have one shape"
                )


def _sides(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "single numbers"


def _check_example(example: Mapping[str, NDArray[Any]], model: Model) -> None:
    """Refuses example inputs that a .pt2 or .onnx does not have; a module's forward is asked when it is lowered."""
    if model.module is not None:
        return
    from deploykit.models import input_specs

    names = [spec.name for spec in input_specs(model)]
    for name in [*example, *names]:
        if name not in names:
            raise unknown("input", name, names)
        if name not in example:
            raise DeploykitError(f"{model.origin} takes {', '.join(names)}; there is no example for {name}")


def _example(model: Model) -> dict[str, NDArray[Any]]:
    """Random inputs of the shapes a .pt2 or .onnx declares, for a model without sample data."""
    from deploykit.models import input_specs

    random = np.random.default_rng(0)
    found = {}
    for spec in input_specs(model):
        if not spec.dtype:
            raise DeploykitError(
                f"what does '{spec.name}' look like? Give sample data (--calib) or the shape, "
                f"e.g. --input {spec.name}=1x3x224x224"
            )
        if any(isinstance(d, str) for d in spec.shape[1:]):
            raise DeploykitError(f"input '{spec.name}' has free dimensions {spec.shape}: give --input {spec.name}=...")
        shape = [d if isinstance(d, int) else 2 for d in spec.shape]
        whole = not spec.dtype.startswith("float")
        array = random.integers(0, 2, shape) if whole else random.standard_normal(shape)
        found[spec.name] = array.astype(spec.dtype)
    return found
