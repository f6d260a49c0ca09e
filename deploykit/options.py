"""The options that several commands share, and what is read from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploykit.core.errors import DeploykitError, unknown

if TYPE_CHECKING:
    from deploykit.core.context import Role
    from deploykit.core.recipe import Recipe
    from deploykit.core.target import Target

Model = Annotated[
    str,
    typer.Argument(help="pkg.module:factory, file.py:factory, a .pt2, an .onnx, or a folder that `compress` wrote"),
]
Calib = Annotated[
    str | None,
    typer.Option(
        "--calib",
        help="Sample data: a folder of images, .npy, .npz, file.py:loader; or 'synthetic' or 'random', made up here",
        metavar="DATA",
    ),
]
Train = Annotated[str | None, typer.Option("--train", help="Training data, for steps that train", metavar="DATA")]
Eval = Annotated[str | None, typer.Option("--eval", help="Data (with labels) to score the files on", metavar="DATA")]
Weights = Annotated[Path | None, typer.Option(help="Weights for a factory: .safetensors, or .pt read weights-only")]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="Steps: TOML, or prune, dsd, sparse_2_4, deep_compression, small_file; 'default': the target's",
        metavar="RECIPE",
    ),
]
PreprocessFile = Annotated[
    Path | None, typer.Option("--preprocess", help="TOML with resize, crop, scale, mean, std, layout, channels")
]
Resize = Annotated[int | None, typer.Option(help="Shorter side of images after resizing, pixels")]
Crop = Annotated[int | None, typer.Option(help="Side of the centre crop, pixels")]
Mean = Annotated[str | None, typer.Option(help="Per channel, after scaling to 0..1: 0.485,0.456,0.406")]
Std = Annotated[str | None, typer.Option(help="Per channel, after scaling to 0..1: 0.229,0.224,0.225")]
Scale = Annotated[float | None, typer.Option(help="Factor on 0..255 pixel values, default 1/255")]
InputShape = Annotated[
    list[str] | None, typer.Option("--input", help="Input without sample data: x=1x3x224x224 or x=1x128:int64")
]
Thresholds = Annotated[
    str, typer.Option(help="How ranges are chosen: minmax, moving_average, percentile, mse, entropy")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON")]
Device = Annotated[
    str | None,
    typer.Option(help="Run the files there: local, ssh://[user@]host[:port] or adb://serial", metavar="ADDRESS"),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Output folder")]


def read_recipe(name: str | None, chosen: Sequence[Target]) -> Recipe:
    """The recipe of that name or in that file; without one, no steps."""
    from deploykit import recipes
    from deploykit.core.recipe import Recipe

    return Recipe() if name is None else recipes.load(name, chosen)


def typed(path: Path | None) -> str | None:
    """A path as it was typed."""
    return None if path is None else str(path)


def given(**sources: str | None) -> dict[Role, str]:
    """Data by role, as far as it was given."""
    return {role: spec for role, spec in sources.items() if spec is not None}  # type: ignore[misc]


def declared_preprocess(
    path: Path | None, resize: int | None, crop: int | None, mean: str | None, std: str | None, scale: float | None
) -> Any:
    """The declared preprocessing: a TOML file, flags over it, or nothing."""
    from deploykit.sources import load_preprocess

    flags: dict[str, Any] = {"resize": resize, "crop": crop, "scale": scale}
    flags |= {name: None if text is None else _numbers(name, text) for name, text in (("mean", mean), ("std", std))}
    flags = {k: v for k, v in flags.items() if v is not None}
    if path is None and not flags:
        return None
    return load_preprocess(path if path is not None else {}, flags)


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise DeploykitError(f"--{name} takes numbers separated by commas, given '{text}'") from None


def known_name(kind: str, name: str, known: Any) -> str:
    """The name, if it is one of those known; else an error with the nearest."""
    if name not in known:
        raise unknown(kind, name, known)
    return name


def threshold_methods() -> list[str]:
    """What ``--thresholds`` takes."""
    from deploykit.calibration.thresholds import METHODS

    return list(METHODS)
