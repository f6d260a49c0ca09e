"""ABOUT"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

# region settings
FILES = {"int8": "model.int8.onnx"}
INPUTS: dict[str, tuple[tuple[int | str, ...], str]] = {"x": (("batch", 3, 224, 224), "float32")}
CLASSES: tuple[str, ...] = ()
PREPROCESS: dict[str, Any] | None = None
# endregion

LABELS = ("y", "labels", "label")

if TYPE_CHECKING:
    Arrays = dict[str, np.ndarray[Any, Any]]


# region runtime
def open_model(path: Path, threads: int) -> Callable[[Arrays], Arrays]:
    """Opens a file: arrays of one sample ``[1, ...]`` by input name in, by output name out."""
    raise NotImplementedError


# endregion


def load_image(path: Path, steps: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """An image file as the network takes it, ``[3, height, width]`` or ``[height, width, 3]`` float32."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = opened.convert("L" if steps["channels"] == "L" else "RGB")
    except (OSError, SyntaxError):  # Pillow raises SyntaxError for broken PNG chunks
        stop(f"{path} is damaged, or no image that Pillow can read")
    return prepare(image, steps, str(path))


def prepare(image: Any, steps: Mapping[str, Any], what: str) -> np.ndarray[Any, Any]:
    """A PIL image as the network takes it."""
    from PIL import Image

    if steps["resize"]:
        short, side = min(image.size), steps["resize"]
        width, height = (side * length // short for length in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    if steps["crop"]:
        height, width = steps["crop"]
        if width > image.width or height > image.height:
            stop(f"{what} is {image.width} x {image.height}; the network looks at {width} x {height} (width x height)")
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
    x: np.ndarray[Any, Any] = np.asarray(image, np.float32)
    x = x[:, :, None] if x.ndim == 2 else x
    if steps["channels"] == "BGR":
        x = x[:, :, ::-1]
    x = x * np.float32(steps["scale"])
    if steps["mean"]:
        x = x - np.asarray(steps["mean"], np.float32)
    if steps["std"]:
        x = x / np.asarray(steps["std"], np.float32)
    return np.ascontiguousarray(x.transpose(2, 0, 1) if steps["layout"] == "NCHW" else x)


def read_inputs(paths: list[Path]) -> Arrays:
    """Every input ``[n, ...]`` by name: from one .npz, or from images."""
    if paths[0].suffix == ".npz":
        arrays = load_arrays(paths[0])
    elif PREPROCESS is None:
        stop(f"this network does not take image files: give an .npz with {', '.join(INPUTS)}; given: {paths[0]}")
    else:
        name = next(iter(INPUTS))
        images = [fit(name, {name: load_image(path, PREPROCESS)}, f": resize or crop {path}") for path in paths]
        arrays = {name: np.concatenate(images)}
    return {name: fit(name, arrays) for name in INPUTS}


def load_arrays(path: Path) -> Arrays:
    """The arrays of an .npz by input name, without labels; uint8 images ``[n, height, width, 3]`` preprocessed."""
    try:
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in archive.files if name in INPUTS or name not in LABELS}
    except Exception as error:  # zipfile, zlib, EOF, ValueError for pickles: all mean the same
        stop(f"{path} is damaged, or no .npz ({error})")
    if len(INPUTS) == len(arrays) == 1:  # then its name does not matter
        arrays = {next(iter(INPUTS)): next(iter(arrays.values()))}
    if PREPROCESS is None:
        return arrays
    return {n: load_pixels(a, PREPROCESS) if a.dtype == np.uint8 and a.ndim == 4 else a for n, a in arrays.items()}


def load_pixels(array: np.ndarray[Any, Any], steps: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Images ``[n, height, width, 3]``, or 1 channel if the network looks at grey ones, as the network takes them."""
    from PIL import Image

    depth = 1 if steps["channels"] == "L" else 3
    if array.shape[3] != depth:
        stop(f"uint8 images are expected as [n, height, width, {depth}]; given: {list(array.shape)}")
    images = [Image.fromarray(pixels[:, :, 0] if depth == 1 else pixels) for pixels in array]
    return np.stack([prepare(image, steps, f"image {i}") for i, image in enumerate(images)])


def fit(name: str, arrays: Arrays, mend: str = "") -> np.ndarray[Any, Any]:
    """One input with its batch dimension and type; stops if the shape is wrong, with what mends it."""
    shape, dtype = INPUTS[name]
    if name not in arrays:
        stop(f"the network takes {', '.join(INPUTS)}; given: {', '.join(arrays) or 'nothing'}")
    array = np.asarray(arrays[name], dtype)
    if array.ndim == len(shape) - 1:
        array = array[None]
    fixed = [isinstance(d, int) and d != n for d, n in zip(shape[1:], array.shape[1:])]
    if array.ndim != len(shape) or any(fixed):
        stop(f"input {name} has the shape {list(array.shape)}; the network takes {list(shape)}{mend}")
    return array


def show(name: str, row: np.ndarray[Any, Any], is_scores: bool) -> None:
    """The five best classes, or what is in an output."""
    if not is_scores:
        print(f"  {name} {list(row.shape)}: min {row.min():.5g}, mean {row.mean():.5g}, max {row.max():.5g}")
        return
    for best in np.argsort(-row, kind="stable")[:5]:
        label = CLASSES[best] if best < len(CLASSES) else f"class {best}"
        print(f"  {positive_zero(row[best], 4):10.4f}  {label}")


def positive_zero(value: float, digits: int) -> float:
    """Rounded, and 0 where only a minus is left of it."""
    return round(float(value), digits) + 0.0


def stop(message: str) -> NoReturn:
    """Ends with a sentence instead of a traceback."""
    sys.exit(f"infer.py: {message}")


def main() -> None:
    """Reads the command line, runs every sample, prints what comes out."""
    parser = argparse.ArgumentParser(description="Runs the network on images, or on the arrays of an .npz file.")
    parser.add_argument(
        "inputs", nargs="+", type=Path,
        help="image files, or one .npz: arrays by input name, or uint8 images [n, height, width, channels]",
    )  # fmt: skip
    parser.add_argument("--precision", choices=list(FILES), default=list(FILES)[-1], help="which file to run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", type=Path, help="write all outputs to this .npz")
    options = parser.parse_args()
    for path in options.inputs:
        if path.is_dir():
            stop(f"{path} is a folder; give the files in it: {path}/*")
        if not path.exists():
            stop(f"no file {path}")
        if not path.is_file():
            stop(f"{path} is no regular file")
    arrays = read_inputs(options.inputs)
    file = Path(__file__).resolve().parent / FILES[options.precision]
    try:
        model = open_model(file, options.threads)
    except Exception as error:  # runtimes have no error in common
        why = str(error).strip().splitlines() or [""]
        stop(f"cannot open {file}: {type(error).__name__}: {why[0]}")
    count = len(next(iter(arrays.values())))
    results = [model({name: array[i : i + 1] for name, array in arrays.items()}) for i in range(count)]
    for i, result in enumerate(results):
        print(f"{options.inputs[i] if len(options.inputs) == count else f'sample {i}'}:")
        for position, (name, value) in enumerate(result.items()):
            show(name, value[0], is_scores=position == 0 and value.ndim == 2 and value.shape[1] > 1)
    if options.save:
        outputs: dict[str, Any] = {name: np.concatenate([r[name] for r in results]) for name in results[0]}
        np.savez(options.save, **outputs)


if __name__ == "__main__":
    main()
