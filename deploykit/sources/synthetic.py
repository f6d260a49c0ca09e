"""Calibration without data: inputs made up, for models whose data may not leave the house.

``synthetic``: inputs on which every batch normalisation of the network reads what it read in training. Its running mean
μ and standard deviation σ are all that is left of the training data in the network (Cai et al. 2020, "ZeroQ: A Novel
Zero Shot Quantization Framework", section 3.1):

    min over x   Σ_l  | (mean_l(x) - μ_l) / σ_l |²  +  | std_l(x) / σ_l - 1 |²        by gradient descent on x

``random``: images of noise whose amplitudes fall with frequency as those of natural images do (Field 1987, "Relations
between the statistics of natural images and the response properties of cortical cells"). The others start from them,
too: then few steps are enough. What came out is rounded to 8-bit pixels, as images are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.artifact import TensorSpec
from deploykit.core.context import Role
from deploykit.core.data import DataSet, Preprocess
from deploykit.core.errors import DeploykitError
from deploykit.core.progress import track
from deploykit.core.seeds import seeded
from deploykit.sources.checks import checked
from deploykit.sources.images import crop_of, only_input
from deploykit.sources.load import load_data, uint8_images

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

KINDS = {
    "synthetic": "synthetic inputs, made to match the batch normalisation of the network",
    "random": "random images",
}
"""What is made up -> what it is called in messages, manifest and report."""
SAMPLES, BATCH = 32, 16
"""How many are made, and how many at once."""
STEPS, RATE = 30, 0.05
"""Of Adam; the rate is a share of the range of pixels."""
UNBOUNDED = (-2.0, 2.0)
"""Where random values begin that no preprocessing bounds."""


def is_made_up(spec: str) -> bool:
    """Whether DATA names inputs to be made up; a file or folder of that name is real data."""
    return spec in KINDS and not Path(spec).exists()


def data_of(
    spec: str,
    inputs: Sequence[TensorSpec],
    preprocess: Preprocess | None,
    role: Role,
    seed: int = 0,
    module: nn.Module | None = None,
    example: Mapping[str, NDArray[Any]] | None = None,
) -> DataSet:
    """The data behind ``--calib``, ``--eval`` or ``--train``, where that may be ``synthetic`` or ``random``, too.

    Args:
        spec, inputs, preprocess, role, seed: as for `deploykit.sources.load_data`.
        module: the network in PyTorch; None: there is only a file of it.
        example: what tells the inputs' shapes, if neither ``inputs`` nor a declared crop do.

    Raises:
        DeploykitError: as `load_data`; or nothing can be made up for this network, role or kind of input.
    """
    if not is_made_up(spec):
        return load_data(spec, inputs, preprocess, role, seed)
    if role != "calibration":
        raise DeploykitError(f"{role} data '{spec}': made-up inputs can calibrate; they teach and judge nothing")
    shapes = {i.name: _shape(i, len(inputs), preprocess, example or {}, spec) for i in inputs}
    with seeded(seed):
        if spec == "synthetic":
            arrays = _matched(module, shapes, preprocess)
        else:
            name = only_input(inputs, spec, "random images")
            if preprocess is None or not _is_image(shapes[name], preprocess):
                raise DeploykitError(f"random: {_why_no_images(name, shapes[name], preprocess)}")
            arrays = {name: _noise(shapes[name], preprocess)}
    data = DataSet.of(arrays, origin=KINDS[spec])
    if preprocess is not None and len(shapes) == 1 and _is_image(next(iter(shapes.values())), preprocess):
        (name,) = shapes
        plain = replace(preprocess, resize=None, crop=None)  # they have their size
        pixels = {name: _pixels(arrays[name], preprocess)}
        data = replace(uint8_images(pixels, None, plain, KINDS[spec]), preprocess=preprocess)
    return replace(checked(data, inputs, role), synthetic=True)


def _matched(
    module: nn.Module | None, shapes: Mapping[str, tuple[int, ...]], preprocess: Preprocess | None
) -> dict[str, NDArray[np.float32]]:
    """Inputs that every batch normalisation reads as it read the training data, ``[SAMPLES, ...]`` by name."""
    import torch

    from deploykit.hub.analysis.norms import norms, reading

    if module is None or not norms(module):
        what = "no PyTorch model" if module is None else "no batch normalisation with statistics"
        images = len(shapes) == 1 and all(map(_declaration, shapes.values()))
        raise DeploykitError(
            f"synthetic: inputs are made from what batch normalisation kept of the training data, and there is {what}. "
            + ("--calib random takes random images." if images else "Give sample data.")
        )
    bounds = {name: _bounds(shape, preprocess) for name, shape in shapes.items()}
    found: dict[str, list[NDArray[np.float32]]] = {name: [] for name in shapes}
    losses: list[Tensor] = []

    def see(name: str, norm: Any, x: Tensor) -> None:
        axes = [i for i in range(x.ndim) if i != 1]
        sigma = (norm.running_var + norm.eps).sqrt()
        mean, std = x.mean(axes), (x.var(axes, unbiased=False) + norm.eps).sqrt()
        losses.append(((mean - norm.running_mean) / sigma).square().mean() + (std / sigma - 1).square().mean())

    rounds = [(first, step) for first in range(0, SAMPLES, BATCH) for step in range(STEPS)]
    x: dict[str, Tensor] = {}
    for _, step in track(rounds, "synthesising inputs"):
        if step == 0:
            started = {name: _noise(shape, preprocess, BATCH) for name, shape in shapes.items()}
            x = {name: torch.from_numpy(array).requires_grad_(True) for name, array in started.items()}
            groups = [{"params": [x[n]], "lr": RATE * float((high - low).max())} for n, (low, high) in bounds.items()]
            adam = torch.optim.Adam(groups)
        losses.clear()
        with torch.enable_grad(), reading(module, see):
            module(**x)
            gradients = torch.autograd.grad(torch.stack(losses).sum(), list(x.values()))
        for value, gradient in zip(x.values(), gradients, strict=True):
            value.grad = gradient
        adam.step()
        with torch.no_grad():
            for name, (low, high) in bounds.items():
                if preprocess is not None:
                    x[name].clamp_(torch.from_numpy(low), torch.from_numpy(high))
        if step == STEPS - 1:
            for name, value in x.items():
                found[name].append(value.detach().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _noise(shape: tuple[int, ...], preprocess: Preprocess | None, count: int = SAMPLES) -> NDArray[np.float32]:
    """Random inputs ``[count, ...]``: images ``[c, h, w]`` or ``[h, w, c]`` of every brightness and contrast, their
    amplitudes as 1/f, little colour; everything else is white noise."""
    low, high = _bounds(shape, preprocess)
    random = np.random.default_rng(np.random.randint(2**31))
    if len(shape) != 3:
        return low + (high - low) * random.random((count, *shape), np.float32)
    last = preprocess is not None and preprocess.layout == "NHWC"
    c, h, w = (shape[2], *shape[:2]) if last else shape
    f = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w))
    f[0, 0] = 1.0
    white = 0.9 * random.normal(size=(count, 1, h, w)) + 0.3 * random.normal(size=(count, c, h, w))
    pink = np.fft.ifft2(np.fft.fft2(white) / f).real
    pink = (pink - pink.mean((2, 3), keepdims=True)) / np.maximum(pink.std((2, 3), keepdims=True), 1e-9)
    contrast, brightness = random.uniform(0.1, 0.3, (count, 1, 1, 1)), random.normal(0.5, 0.15, (count, 1, 1, 1))
    unit = np.clip(brightness + contrast * pink, 0.0, 1.0).astype(np.float32)
    return np.asarray(low + (high - low) * (unit.transpose(0, 2, 3, 1) if last else unit))


def _bounds(shape: tuple[int, ...], preprocess: Preprocess | None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What becomes of pixels 0 and 255; shaped to go with ``[n, ...]``."""
    if preprocess is None or not _is_image(shape, preprocess):
        return np.full((1,) * (len(shape) + 1), UNBOUNDED[0], np.float32), np.full(1, UNBOUNDED[1], np.float32)
    scale, mean, std = _normalisation(preprocess)
    low, high = ((np.float32(pixel) * scale - mean) / std for pixel in (0, 255))
    return low, high


def _normalisation(p: Preprocess) -> tuple[np.float32, NDArray[np.float32], NDArray[np.float32]]:
    """Scale, mean and standard deviation, shaped to go with ``[n, c, h, w]`` or ``[n, h, w, c]``."""
    shape = (1, -1, 1, 1) if p.layout == "NCHW" else (1, 1, 1, -1)
    mean, std = np.asarray(p.mean or 0.0, np.float32), np.asarray(p.std or 1.0, np.float32)
    return np.float32(p.scale), mean.reshape(shape), std.reshape(shape)


def _pixels(x: NDArray[np.float32], p: Preprocess) -> NDArray[np.uint8]:
    """The images ``[n, h, w, c]``, RGB or grey, that preprocessing makes ``x`` of."""
    scale, mean, std = _normalisation(p)
    pixels = np.clip(np.rint((x * std + mean) / scale), 0, 255).astype(np.uint8)
    last = pixels.transpose(0, 2, 3, 1) if p.layout == "NCHW" else pixels
    return np.ascontiguousarray(last[..., ::-1] if p.channels == "BGR" else last)


def _is_image(shape: tuple[int, ...], p: Preprocess) -> bool:
    return len(shape) == 3 and shape[0 if p.layout == "NCHW" else 2] == p.depth


def _declaration(shape: tuple[int, ...]) -> tuple[str, str] | None:
    """Channels and layout by which a shape is one of images; None: there are none."""
    if len(shape) == 3:
        for layout, depth in (("NCHW", shape[0]), ("NHWC", shape[2])):
            if depth in (1, 3):
                return "L" if depth == 1 else "RGB", layout
    return None


def _why_no_images(name: str, shape: tuple[int, ...], p: Preprocess | None) -> str:
    """Why random images cannot be drawn for an input, and what to declare so that they can."""
    it = f"'{name}' [{_listed(shape)}]"
    fitting = _declaration(shape)
    if fitting is None:
        return (
            f"{it} takes no images, grey or of three channels, and nothing else is drawn at random. Give sample data, "
            "or --calib synthetic where the network has batch normalisation."
        )
    if p is None and fitting == ("RGB", "NCHW"):
        return (
            f"the pixels of images are drawn between 0 and 255, and what {it} takes of them is not declared. Say what "
            "is done to images: --scale, --mean, --std or --preprocess."
        )
    channels, layout = fitting
    declared = "nothing is" if p is None else f"{'grey images' if p.depth == 1 else p.channels}, {p.layout}, are"
    return (
        f"{it} takes {'grey images' if channels == 'L' else 'images of three channels'}, {layout}, and {declared} "
        f'declared. Say what is done to images in a --preprocess file, with channels = "{channels}" and layout = '
        f'"{layout}".'
    )


def _shape(
    spec: TensorSpec, count: int, p: Preprocess | None, example: Mapping[str, NDArray[Any]], kind: str
) -> tuple[int, ...]:
    """Of one sample: as the example has it, as the model declares it, or as images are cropped."""
    if spec.dtype and not spec.dtype.startswith("float"):
        raise DeploykitError(f"{kind}: '{spec.name}' is {spec.dtype}; only inputs of real numbers can be made up")
    if spec.name in example:
        return tuple(example[spec.name].shape[1:])
    declared = spec.shape[1:]
    if declared and all(isinstance(d, int) for d in declared):
        return tuple(int(d) for d in declared)
    crop = None if p is None or count > 1 else crop_of(p)
    if p is None or crop is None:
        raise DeploykitError(
            f"{kind}: what does '{spec.name}' look like? Give its shape, e.g. --input {spec.name}=1x3x224x224, or say "
            "how images are cut (--crop)."
        )
    return (p.depth, *crop) if p.layout == "NCHW" else (*crop, p.depth)


def _listed(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
