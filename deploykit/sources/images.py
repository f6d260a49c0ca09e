"""Images: a folder of them as a data set, and what is done to one before the network sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.artifact import TensorSpec
from deploykit.core.data import DataSet, Preprocess, Sample
from deploykit.core.errors import DeploykitError, unknown
from deploykit.core.progress import track
from deploykit.core.tables import from_table, read_toml

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image


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


def pixels_of(image: Image, p: Preprocess) -> NDArray[np.uint8]:
    """One image resized and cropped, ``[h, w, c]`` uint8, channels in the declared order."""
    from PIL.Image import Resampling

    image = image.convert("L" if p.channels == "L" else "RGB")
    size = resized(image.size, p)
    if size != image.size:
        image = image.resize(size, Resampling.BILINEAR)
    crop = crop_of(p)
    if crop is not None:
        top, left = round((size[1] - crop[0]) / 2), round((size[0] - crop[1]) / 2)
        image = image.crop((left, top, left + crop[1], top + crop[0]))
    x = np.asarray(image, np.uint8).reshape(image.height, image.width, p.depth)
    return x[..., ::-1] if p.channels == "BGR" else x


def preprocess_image(image: Image, p: Preprocess) -> NDArray[np.float32]:
    """One image as the network wants it: float32 ``[c, h, w]`` (NCHW) or ``[h, w, c]`` (NHWC)."""
    x: Any = pixels_of(image, p).astype(np.float32) * np.float32(p.scale)
    if p.mean:
        x = x - np.asarray(p.mean, np.float32)
    if p.std:
        x = x / np.asarray(p.std, np.float32)
    return np.ascontiguousarray(x.transpose(2, 0, 1) if p.layout == "NCHW" else x)


def image_folder(folder: Path, inputs: Sequence[TensorSpec], p: Preprocess, origin: str) -> DataSet:
    """The images of a folder, decoded when they are asked for; class subfolders are the labels."""
    from PIL.Image import open as open_image

    name = only_input(inputs, origin, "a folder of images")
    files, labels, classes = _list_images(folder, origin)
    sizes: dict[tuple[int, int], Path] = {}
    for file in track(files, "looking at images"):
        try:
            with open_image(file) as image:
                size, mode = image.size, image.mode
        except OSError:
            raise DeploykitError(f"{origin}: {file} is not an image that Pillow can read") from None
        if mode == "F" or mode.startswith("I"):
            raise DeploykitError(f"{origin}: {file} has more than 8 bits per channel; convert it to 8 bits")
        sizes.setdefault(fitting(size, p, f"{origin}: {file}"), file)
        if len(sizes) > 1:
            (a, first), (b, other) = sizes.items()
            raise DeploykitError(
                f"{origin}: images of different sizes: {first.name} is {a[0]} x {a[1]}, {other.name} {b[0]} x {b[1]} "
                f"(width x height). Set resize and crop in [preprocess]."
            )

    def read(i: int, prepare: Callable[[Image, Preprocess], NDArray[Any]]) -> Sample:
        try:
            with open_image(files[i]) as image:
                return {name: prepare(image, p)}
        except (OSError, SyntaxError):  # Pillow raises SyntaxError for broken PNG chunks
            raise DeploykitError(f"{origin}: {files[i]} is damaged") from None

    sample, pixels = partial(read, prepare=preprocess_image), partial(read, prepare=pixels_of)
    return DataSet(sample, tuple(range(len(files))), labels, origin, p, classes, pixels)


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


def fitting(size: tuple[int, int], p: Preprocess, where: str) -> tuple[int, int]:
    """The (width, height) that comes out, given the one that goes in."""
    crop, (width, height) = crop_of(p), resized(size, p)
    if crop is None:
        return width, height
    if crop[0] > height or crop[1] > width:
        raise DeploykitError(
            f"{where} is {width} x {height} (width x height) where {crop[1]} x {crop[0]} are to be cut out; "
            f"set resize in [preprocess] to at least {max(crop)}"
        )
    return crop[1], crop[0]


def resized(size: tuple[int, int], p: Preprocess) -> tuple[int, int]:
    """(width, height) after resizing the shorter side."""
    short, long = sorted(size)
    if p.resize is None or p.resize == short:
        return size
    other = p.resize * long // short
    return (p.resize, other) if size[0] <= size[1] else (other, p.resize)


def crop_of(p: Preprocess) -> tuple[int, int] | None:
    """(height, width) of the centre crop."""
    return (p.crop, p.crop) if isinstance(p.crop, int) else p.crop


def only_input(inputs: Sequence[TensorSpec], origin: str, what: str) -> str:
    """The name of the only input, for data that can feed just one."""
    if len(inputs) != 1:
        names = ", ".join(spec.name for spec in inputs)
        raise DeploykitError(f"{origin}: the model has {len(inputs)} inputs ({names}), which cannot come from {what}")
    return inputs[0].name
