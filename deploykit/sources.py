"""Data in: a folder of images, arrays in a file, or whatever a loader gives; checked once, before any long work.

An image is decoded when it is asked for, a ``.npy`` is memory-mapped, a torch Dataset (alone or behind a DataLoader) is
asked sample by sample; only batches from another iterable are kept in memory.
"""

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
from deploykit.core.tables import from_table, read_toml
from deploykit.core.user_code import call, load_function

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image
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
        data = _image_folder(path, inputs, preprocess, origin)
    elif path.suffix in (".npy", ".npz"):
        arrays, labels = _read_arrays(path, inputs, origin)
        data = _array_data(arrays, labels, preprocess, origin)
    elif not path.exists():
        raise no_such_file(path)
    else:
        raise DeploykitError(f"{origin}: expected a folder of images, a .npy, a .npz or file.py:loader")
    return _checked(data, inputs, role)


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
    return _checked(found, inputs, role, looked_at)


def load_preprocess(source: Path | Mapping[str, Any], flags: Mapping[str, Any] | None = None) -> Preprocess:
    """What is declared about images.

    Args:
        source: a TOML file or a table, with the keys in ``[preprocess]`` or at the top.
        flags: keys that replace those of the source.

    Raises:
        DeploykitError: unreadable, an unknown key, or a value that cannot be applied.
    """
    table = source if isinstance(source, Mapping) else read_toml(source)
    where = "[preprocess]" if isinstance(source, Mapping) else f"{source} [preprocess]"
    if "preprocess" in table:
        for key in table:
            if key != "preprocess":
                raise DeploykitError(f"{where}: {unknown('table', key, ['preprocess'])}")
        table = table["preprocess"]
    if isinstance(table, Mapping):
        table = {**table, **(flags or {})}
    return from_table(Preprocess, table, where)


def check_labels(data: DataSet, classes: int) -> None:
    """Refuses labels that are no class numbers of a model with that many classes; data without labels passes.

    Raises:
        DeploykitError: labels that are no integers ``[n]``, or outside 0..classes-1, or from another set of class
            folders.
    """
    if data.labels is None:
        return
    if data.labels.ndim != 1 or data.labels.dtype.kind != "i":
        given = f"{data.labels.dtype} {list(data.labels.shape)}"
        raise DeploykitError(
            f"{data.origin}: labels must be class numbers, int64 [{len(data)}]; given {given}. "
            "Labels of another kind need a metric that reads them."
        )
    wrong = np.flatnonzero((data.labels < 0) | (data.labels >= classes))
    if len(wrong):
        label = int(data.labels[wrong[0]])
        shifted = int(data.labels.min()) == 1 and int(data.labels.max()) == classes
        hint = " They seem to start at 1: subtract 1." if shifted else ""
        raise DeploykitError(
            f"{data.origin}: sample {data.index[wrong[0]]} has label {label}; the model has {classes} classes, "
            f"0..{classes - 1}.{hint}"
        )
    if data.classes and len(data.classes) != classes:
        raise DeploykitError(
            f"{data.origin}: {len(data.classes)} class folders, the model has {classes} classes. Labels are positions "
            f"in the sorted folder names, so every class needs its folder (it may be empty)."
        )


def preprocess_image(image: Image, p: Preprocess) -> NDArray[np.float32]:
    """One image as the network wants it: float32 ``[c, h, w]`` (NCHW) or ``[h, w, c]`` (NHWC)."""
    from PIL.Image import Resampling

    image = image.convert("L" if p.channels == "L" else "RGB")
    size = _resized(image.size, p)
    if size != image.size:
        image = image.resize(size, Resampling.BILINEAR)
    crop = _crop(p)
    if crop is not None:
        top, left = round((size[1] - crop[0]) / 2), round((size[0] - crop[1]) / 2)
        image = image.crop((left, top, left + crop[1], top + crop[0]))
    x: Any = np.asarray(image, np.float32).reshape(image.height, image.width, p.depth)
    x = x[..., ::-1] if p.channels == "BGR" else x
    x = x * np.float32(p.scale)
    if p.mean:
        x = x - np.asarray(p.mean, np.float32)
    if p.std:
        x = x / np.asarray(p.std, np.float32)
    return np.ascontiguousarray(x.transpose(2, 0, 1) if p.layout == "NCHW" else x)


def _resized(size: tuple[int, int], p: Preprocess) -> tuple[int, int]:
    """(width, height) after resizing the shorter side."""
    short, long = sorted(size)
    if p.resize is None or p.resize == short:
        return size
    other = p.resize * long // short
    return (p.resize, other) if size[0] <= size[1] else (other, p.resize)


def _crop(p: Preprocess) -> tuple[int, int] | None:
    return (p.crop, p.crop) if isinstance(p.crop, int) else p.crop


# ------------------------------------------------------------------ folders


def _image_folder(folder: Path, inputs: Sequence[TensorSpec], p: Preprocess, origin: str) -> DataSet:
    from PIL import Image

    name = _only(inputs, origin, "a folder of images")
    files, labels, classes = _list_images(folder, origin)
    sizes: dict[tuple[int, int], Path] = {}
    for file in track(files, "looking at images"):
        try:
            with Image.open(file) as image:
                size, mode = image.size, image.mode
        except OSError:
            raise DeploykitError(f"{origin}: {file} is not an image that Pillow can read") from None
        if mode == "F" or mode.startswith("I"):
            raise DeploykitError(f"{origin}: {file} has more than 8 bits per channel; convert it to 8 bits")
        sizes.setdefault(_fitting(size, p, f"{origin}: {file}"), file)
        if len(sizes) > 1:
            (a, first), (b, other) = sizes.items()
            raise DeploykitError(
                f"{origin}: images of different sizes: {first.name} is {a[0]} x {a[1]}, {other.name} {b[0]} x {b[1]} "
                f"(width x height). Set resize and crop in [preprocess]."
            )

    def sample(i: int) -> Sample:
        try:
            with Image.open(files[i]) as image:
                return {name: preprocess_image(image, p)}
        except (OSError, SyntaxError):  # Pillow raises SyntaxError for broken PNG chunks
            raise DeploykitError(f"{origin}: {files[i]} is damaged") from None

    return DataSet(sample, tuple(range(len(files))), labels, origin, p, classes)


def _list_images(folder: Path, origin: str) -> tuple[list[Path], NDArray[np.int64] | None, tuple[str, ...]]:
    entries = _visible(folder)
    classes = [e for e in entries if e.is_dir()]
    loose = [e for e in entries if not e.is_dir()]
    if classes and loose:
        raise DeploykitError(
            f"{origin}: {loose[0].name} lies beside the class folders ({classes[0].name}, …). Put images either in "
            f"one flat folder (no labels) or in one subfolder per class."
        )
    by_class = [_visible(c) for c in classes]
    files = [file for group in by_class for file in group] if classes else loose
    if not files:
        raise DeploykitError(f"{origin}: the folder holds no images")
    labels = np.repeat(np.arange(len(classes)), [len(group) for group in by_class]) if classes else None
    return files, labels, tuple(c.name for c in classes)


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _fitting(size: tuple[int, int], p: Preprocess, where: str) -> tuple[int, int]:
    """The (width, height) that comes out, given the one that goes in."""
    crop, (width, height) = _crop(p), _resized(size, p)
    if crop is None:
        return width, height
    if crop[0] > height or crop[1] > width:
        raise DeploykitError(
            f"{where} is {width} x {height} (width x height) where {crop[1]} x {crop[0]} are to be cut out; "
            f"set resize in [preprocess] to at least {max(crop)}"
        )
    return crop[1], crop[0]


# ------------------------------------------------------------------ arrays


def _read_arrays(
    path: Path, inputs: Sequence[TensorSpec], origin: str
) -> tuple[dict[str, NDArray[Any]], NDArray[Any] | None]:
    if not path.is_file():
        raise no_such_file(path)
    try:
        if path.suffix == ".npy":
            name = _only(inputs, origin, "a .npy; give a .npz with one array per input")
            return {name: np.load(path, mmap_mode="r", allow_pickle=False)}, None
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except DeploykitError:
        raise
    except Exception as error:  # zipfile, zlib, EOF, ValueError for pickles: all mean the same to the user
        raise DeploykitError(f"{origin}: damaged, or Python objects instead of arrays ({error})") from None
    return _split(arrays, inputs, origin)


def _array_data(
    arrays: Mapping[str, NDArray[Any]], labels: NDArray[Any] | None, preprocess: Preprocess | None, origin: str
) -> DataSet:
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
        _fitting((shape[1], shape[0]), p, f"{origin}: '{name}'")

    def sample(i: int) -> Sample:
        found = dict(plain.sample(i))
        for name in images:
            pixels = found[name].squeeze(-1) if found[name].shape[-1] == 1 and found[name].ndim == 3 else found[name]
            found[name] = preprocess_image(Image.fromarray(np.ascontiguousarray(pixels)), p)
        return found

    return replace(plain, sample=sample, preprocess=p)


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


# ------------------------------------------------------------------ loaders


def _dataset(item: Callable[[int], Any], order: Sequence[int], inputs: Sequence[TensorSpec], origin: str) -> DataSet:
    """Samples asked for one at a time; one pass now collects the labels and looks at the values."""

    def split(i: int) -> tuple[dict[str, NDArray[Any]], NDArray[Any] | None]:
        where = f"{origin}: sample {i}"
        return _split(call(where, item, i), inputs, where)

    labels, first = [], None
    for i in track(order, "looking at samples"):
        arrays, label = split(i)
        first = first or arrays
        _check_values(arrays, first, f"{origin}: sample {i}")
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


# ------------------------------------------------------------------ checks


def _only(inputs: Sequence[TensorSpec], origin: str, what: str) -> str:
    if len(inputs) != 1:
        names = ", ".join(spec.name for spec in inputs)
        raise DeploykitError(f"{origin}: the model has {len(inputs)} inputs ({names}), which cannot come from {what}")
    return inputs[0].name


def _checked(data: DataSet, inputs: Sequence[TensorSpec], role: Role, looked_at: bool = False) -> DataSet:
    """The data set, if every sample can be fed to the model; ``looked_at``: its values are known to be good."""
    if len(data) < 2:
        raise DeploykitError(f"{data.origin}: {len(data)} sample; at least 2 are needed")
    first = data.sample(data.index[0])
    for spec in inputs:
        if spec.name not in first:
            raise DeploykitError(f"{data.origin}: no data for {spec.name}; it has {', '.join(first)}")
        _check_dtype(spec, first[spec.name], data)
        _check_shape(spec, first[spec.name].shape, data)
    if data.preprocess is None and not looked_at:  # pixels are finite, their sizes known from the headers
        for number, i in enumerate(data.index):
            _check_values(data.sample(i), first, f"{data.origin}: sample {number}")
    if role == "calibration" and all(_equal(data.sample(i), first) for i in data.index[1:]):
        raise DeploykitError(f"{data.origin}: all {len(data)} samples are identical; nothing can be learned from them")
    return data


def _check_dtype(spec: TensorSpec, array: NDArray[Any], data: DataSet) -> None:
    expected = spec.dtype or ("float32" if array.dtype.kind == "f" else array.dtype)
    if array.dtype == np.dtype(expected):
        return
    if array.dtype == np.uint8 and data.preprocess is None:
        hint = "If these are images [n, height, width, channels], declare [preprocess]."
    else:
        hint = f"Save it as {np.dtype(expected)}: array.astype('{np.dtype(expected)}')."
    raise DeploykitError(f"{data.origin}: '{spec.name}' is {array.dtype}, the model takes {expected}. {hint}")


def _check_shape(spec: TensorSpec, given: tuple[int, ...], data: DataSet) -> None:
    if not spec.shape:
        return
    expected = spec.shape[1:]
    if len(given) == len(expected) and all(isinstance(e, str) or e == g for e, g in zip(expected, given, strict=True)):
        return
    wanted = "[" + ", ".join(str(e) for e in expected) + "]"
    hint = _shape_hint(expected, given, data.preprocess)
    raise DeploykitError(
        f"{data.origin}: '{spec.name}' has samples {list(given)}, the model takes {wanted}. {hint}".rstrip()
    )


def _shape_hint(expected: tuple[int | str, ...], given: tuple[int, ...], p: Preprocess | None) -> str:
    """What to change so that the shapes agree."""
    if len(expected) != 3 or len(given) != 3:
        return ""
    moved_first, moved_last = (given[2], given[0], given[1]), (given[1], given[2], given[0])
    if p is None:
        if given[0] == 1 and given[1:] == expected[1:]:
            return f"These are grey: repeat the channel, array.repeat({expected[0]}, axis=1)."
        if moved_first == expected:
            return "Put the channels first: array.transpose(0, 3, 1, 2)."
        return "Put the channels last: array.transpose(0, 2, 3, 1)." if moved_last == expected else ""
    if (moved_first if p.layout == "NHWC" else moved_last) == expected:
        return f"Set layout = '{'NCHW' if p.layout == 'NHWC' else 'NHWC'}' in [preprocess]."
    depth, *size = expected if p.layout == "NCHW" else (expected[2], *expected[:2])
    if depth != p.depth and depth in (1, 3):
        return f"Set channels = '{'L' if depth == 1 else 'RGB'}' in [preprocess]."
    if all(isinstance(s, int) for s in size):
        crop = size[0] if size[0] == size[1] else size
        return f"Set crop = {crop} (and resize, if the images are smaller) in [preprocess]."
    return ""


def _check_values(sample: Sample, first: Sample, where: str) -> None:
    for name, array in sample.items():
        if array.shape != first[name].shape or array.dtype != first[name].dtype:
            raise DeploykitError(
                f"{where}: '{name}' is {array.dtype} {list(array.shape)}, "
                f"the first sample {first[name].dtype} {list(first[name].shape)}"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            what = "NaN" if np.isnan(array).any() else "inf"
            raise DeploykitError(f"{where}: '{name}' holds {what}")


def _equal(a: Sample, b: Sample) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in b)
