"""Every form of data becomes a `DataSet`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.artifact import TensorSpec
from deploykit.core.context import Role
from deploykit.core.data import DataSet, Preprocess, Sample
from deploykit.core.errors import DeploykitError, unknown
from deploykit.core.files import no_such_file
from deploykit.core.progress import say, track
from deploykit.core.seeds import seeded
from deploykit.core.user_code import call, load_function
from deploykit.sources.checks import check_values, checked
from deploykit.sources.images import fitting, image_folder, only_input, pixels_of, preprocess_image

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch.utils.data import DataLoader

LABELS = ("y", "labels", "label")
"""Keys that hold labels, unless an input has that name."""


def load_data(
    spec: str, inputs: Sequence[TensorSpec], preprocess: Preprocess | None, role: Role, seed: int = 0
) -> DataSet:
    """The data behind ``--calib``, ``--eval`` or ``--train``.

    Args:
        spec: one of

            * a folder of images; if it has subfolders, they are the classes and their sorted names the labels 0, 1, …
            * ``x.npy``: samples ``[n, ...]`` of the only input;
            * ``x.npz``: samples by input name (any name if the model has one input), labels under ``y``, ``labels`` or
              ``label``;
            * ``file.py:loader``: a function without arguments that returns anything `from_python` takes.
        inputs: the model's inputs; shape ``()`` and dtype ``""`` stand for unknown.
        preprocess: what is done to images: to the files of a folder (decoded to ``channels``, so grey files may feed
            an RGB network) and to uint8 arrays ``[n, h, w, c]`` (RGB; or grey ``[n, h, w]`` where ``channels = "L"``).
            Arrays are never guessed to be grey or colour: their channels must be those declared. Floats, and what a
            loader returns, are taken as they come.
        role: calibration data must differ from sample to sample.
        seed: seeds Python's, NumPy's and torch's random numbers while a loader runs.

    Raises:
        DeploykitError: missing, empty, damaged, constant, or not what the model takes; says which sample and why.
    """
    origin = f"{role} data {spec}"
    path = Path(spec)
    if ":" in spec and not path.exists():
        with seeded(seed):
            found = call(f"loader {spec}", load_function(spec, "loader"))
        return from_python(found, inputs, role=role, seed=seed, origin=origin)
    if path.is_dir():
        if preprocess is None:
            preprocess = Preprocess()
            say(f"note: {origin}: no [preprocess] is declared; pixels are scaled to 0..1, RGB, {preprocess.layout}")
        data = image_folder(path, inputs, preprocess, origin)
    elif path.suffix in (".npy", ".npz"):
        arrays, labels = _read_arrays(path, inputs, origin)
        data = uint8_images(arrays, labels, preprocess, origin)
    elif not path.exists():
        raise no_such_file(path)
    else:
        raise DeploykitError(f"{origin}: expected a folder of images, a .npy, a .npz or file.py:loader")
    return checked(data, inputs, role)


def from_python(
    data: Any,
    inputs: Sequence[TensorSpec],
    labels: Any = None,
    role: Role = "calibration",
    seed: int = 0,
    origin: str = "data",
) -> DataSet:
    """The data behind a Python object.

    Args:
        data: a DataSet; a torch DataLoader or Dataset; an array or tensor ``[n, ...]``, or a dict of them by input
            name; a tuple (inputs, labels) of whole arrays; or an iterable (a list, a generator) of batches. A batch is
            an array, a dict by input name (labels under ``y``, ``labels``, ``label``), or (inputs, labels) where
            inputs is an array, a dict, or a tuple in the forward's order. A Dataset's samples are the same without
            the leading dimension.
        inputs: the model's inputs; shape ``()`` and dtype ``""`` stand for unknown.
        labels: one per sample, instead of those in the data.
        role: calibration data must differ from sample to sample.
        seed: seeds a DataLoader's shuffling.
        origin: what to call it in messages.

    Raises:
        DeploykitError: as `load_data`.
    """
    import torch
    from torch.utils.data import DataLoader, Dataset, IterableDataset

    looked_at = False
    if isinstance(data, DataSet):
        found = data
    elif (
        isinstance(data, DataLoader)
        and not isinstance(data.dataset, IterableDataset)
        and data.batch_sampler is not None
    ):
        # its own sampler and collate function, one sample at a time: shuffles and subsets are kept, workers are not
        with seeded(seed):
            order = [int(i) for batch in data.batch_sampler for i in batch]
        found, looked_at = _dataset(partial(_collated, data), order, inputs, origin), True
    elif isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        try:
            order = list(range(len(data)))  # type: ignore[arg-type]
        except TypeError:
            raise DeploykitError(f"{origin}: {type(data).__name__} has no length") from None
        found, looked_at = _dataset(data.__getitem__, order, inputs, origin), True
    elif isinstance(data, (np.ndarray, torch.Tensor, Mapping, tuple)):
        arrays, own = _split(data, inputs, origin)
        found = DataSet.of(arrays, own, origin)
    elif isinstance(data, Iterable):
        with seeded(seed):
            found = _in_memory(data, inputs, origin)
    else:
        raise DeploykitError(f"{origin}: {type(data).__name__} is no data; expected a DataLoader, batches or arrays")
    if labels is not None:
        own = _labels(labels, origin)
        if len(own) != len(found):
            raise DeploykitError(f"{origin}: {len(found)} samples, but {len(own)} labels")
        found = replace(found, labels=own)
    return checked(found, inputs, role, looked_at)


def _read_arrays(
    path: Path, inputs: Sequence[TensorSpec], origin: str
) -> tuple[dict[str, NDArray[Any]], NDArray[Any] | None]:
    if not path.is_file():
        raise no_such_file(path)
    try:
        if path.suffix == ".npy":
            name = only_input(inputs, origin, "a .npy; give a .npz with one array per input")
            return {name: np.load(path, mmap_mode="r", allow_pickle=False)}, None
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except DeploykitError:
        raise
    except Exception as error:  # zipfile, zlib, EOF, ValueError for pickles: all mean the same to the user
        raise DeploykitError(f"{origin}: damaged, or Python objects instead of arrays ({error})") from None
    return _split(arrays, inputs, origin)


def uint8_images(
    arrays: Mapping[str, NDArray[Any]], labels: NDArray[Any] | None, preprocess: Preprocess | None, origin: str
) -> DataSet:
    """Arrays as they are, but that uint8 images ``[n, h, w, c]`` are preprocessed where something is declared.

    Raises:
        DeploykitError: images of another kind than declared; single numbers.
    """
    from PIL import Image

    for name, array in arrays.items():
        if array.ndim == 0:
            raise DeploykitError(f"{origin}: '{name}' is a single number; samples [n, ...] are expected")
    plain = DataSet.of(arrays, labels, origin)
    images = [n for n, a in arrays.items() if a.dtype == np.uint8 and a.ndim >= 3]
    if preprocess is None or not images:
        return plain
    p = preprocess
    for name in images:
        shape = arrays[name].shape[1:]
        is_grey = len(shape) == 2 and p.depth == 1
        if not is_grey and not (len(shape) == 3 and shape[2] == p.depth):
            raise DeploykitError(f"{origin}: '{name}' {_no_image(shape, p)}")
        fitting((shape[1], shape[0]), p, f"{origin}: '{name}'")

    def read(i: int, prepare: Callable[[Image.Image, Preprocess], NDArray[Any]]) -> Sample:
        found = dict(plain.sample(i))
        for name in images:
            array = found[name].squeeze(-1) if found[name].shape[-1] == 1 and found[name].ndim == 3 else found[name]
            found[name] = prepare(Image.fromarray(np.ascontiguousarray(array)), p)
        return found

    sample, pixels = partial(read, prepare=preprocess_image), partial(read, prepare=pixels_of)
    return replace(plain, sample=sample, preprocess=p, pixels=pixels)


def _no_image(shape: tuple[int, ...], p: Preprocess) -> str:
    """Why a uint8 sample is no image of the declared kind."""
    start = f"has uint8 samples {list(shape)}; [preprocess] declares channels = '{p.channels}', so images "
    expected = f"[height, width, {p.depth}]" + (" or [height, width]" if p.depth == 1 else "") + " are expected. "
    if len(shape) == 3 and shape[0] == p.depth:
        return f"{start}{expected}Put the channels last: array.transpose(0, 2, 3, 1)."
    if len(shape) == 2 or shape[-1] == 1:
        return (
            f"{start}{expected}These are grey: set channels = 'L', or repeat the channel if the network takes colour."
        )
    if len(shape) == 3 and shape[-1] == 3:
        return f"{start}{expected}These have colour: set channels = 'RGB'."
    return start + expected.strip()


def _dataset(item: Callable[[int], Any], order: Sequence[int], inputs: Sequence[TensorSpec], origin: str) -> DataSet:
    """Samples asked for one at a time; one pass now collects the labels and looks at the values."""

    def split(i: int) -> tuple[dict[str, NDArray[Any]], NDArray[Any] | None]:
        where = f"{origin}: sample {i}"
        return _split(call(where, item, i), inputs, where)

    labels, first = [], None
    for i in track(order, "looking at samples"):
        arrays, label = split(i)
        first = first or arrays
        check_values(arrays, first, f"{origin}: sample {i}")
        labels += [] if label is None else [label]
    if labels and len(labels) != len(order):
        raise DeploykitError(f"{origin}: only {len(labels)} of {len(order)} samples have a label")
    return DataSet(lambda i: split(i)[0], tuple(order), np.stack(labels) if labels else None, origin)


def _collated(loader: DataLoader[Any], i: int) -> Any:
    """Sample ``i`` as the loader would put it into a batch."""
    return _first(loader.collate_fn([loader.dataset[i]]))


def _in_memory(batches: Iterable[Any], inputs: Sequence[TensorSpec], origin: str) -> DataSet:
    parts = [_split(batch, inputs, f"{origin}: batch {k}") for k, batch in enumerate(call(origin, list, batches))]
    if not parts:
        raise DeploykitError(f"{origin}: it yields nothing")
    labels = [own for _, own in parts if own is not None]
    if labels and len(labels) != len(parts):
        raise DeploykitError(f"{origin}: only {len(labels)} of {len(parts)} batches have labels")
    try:
        arrays = {name: np.concatenate([a[name] for a, _ in parts]) for name in parts[0][0]}
        return DataSet.of(arrays, np.concatenate(labels) if labels else None, origin)
    except ValueError as error:
        raise DeploykitError(f"{origin}: the batches do not go together: {error}") from None


def _split(item: Any, inputs: Sequence[TensorSpec], where: str) -> tuple[dict[str, NDArray[Any]], NDArray[Any] | None]:
    """Inputs by name, and labels, from any accepted form of a sample, a batch or a whole set."""
    labels = None
    names = [spec.name for spec in inputs]
    if isinstance(item, Mapping):
        key = next((k for k in LABELS if k in item and k not in names), None)
        labels = None if key is None else item[key]
        item = {k: v for k, v in item.items() if k != key}
        if len(item) == 1 and len(names) == 1:
            item = {names[0]: next(iter(item.values()))}
    elif isinstance(item, (tuple, list)):
        if len(item) not in (1, 2):
            raise DeploykitError(
                f"{where}: a tuple of {len(item)}; expected (inputs, labels). Several inputs without labels are a dict "
                f"by name: {', '.join(names)}."
            )
        item, labels = item if len(item) == 2 else (item[0], None)
    if not isinstance(item, Mapping):
        item = {names[0]: item} if len(names) == 1 else item
    if not isinstance(item, Mapping):
        if not isinstance(item, (tuple, list)) or len(item) != len(names):
            count = len(item) if isinstance(item, (tuple, list)) else 1
            raise DeploykitError(f"{where}: {count} input(s), the model takes {len(names)}: {', '.join(names)}")
        item = dict(zip(names, item, strict=True))
    for key in item:
        if key not in names:
            raise DeploykitError(f"{where}: {unknown('input', str(key), names)}")
    missing = [name for name in names if name not in item]
    if missing:
        raise DeploykitError(f"{where}: no data for {', '.join(missing)}; the model takes {', '.join(names)}")
    arrays = {name: _array(item[name], where) for name in names}
    return arrays, None if labels is None else _labels(labels, where)


def _array(value: Any, where: str) -> NDArray[Any]:
    try:
        array = np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
    except (TypeError, ValueError) as error:
        raise DeploykitError(f"{where}: {type(value).__name__} is no array: {error}") from None
    if array.dtype.kind not in "biuf":
        raise DeploykitError(f"{where}: {type(value).__name__} is no array of numbers")
    return array


def _labels(value: Any, where: str) -> NDArray[Any]:
    array = _array(value, f"{where}, labels")
    return array.astype(np.int64) if array.dtype.kind in "biu" else array


def _first(batch: Any) -> Any:
    """The only sample of a batch of one."""
    if isinstance(batch, Mapping):
        return {key: _first(value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(_first(value) for value in batch)
    return batch[0]
