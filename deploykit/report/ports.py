"""What the files' own inputs and outputs are, which need not be the model's: order of axes, integers, a bound batch."""

from __future__ import annotations

from dataclasses import dataclass

from deploykit.core.manifest import Manifest
from deploykit.report.words import shape


@dataclass(frozen=True)
class Held:
    """One input or output in words; empty where there is nothing to say."""

    files: tuple[str, ...]
    """Those that hold it alike."""
    way: str
    """in or out."""
    name: str
    shape: str
    dtype: str
    scale: str
    """Nine digits, which tell a float32 from every other."""
    zero_point: str


def ports(manifest: Manifest) -> tuple[Held, ...]:
    """Every distinct input and output, in the files' order; nothing where files take what the model takes."""
    pixels = {s.name for s in manifest.inputs if s.dtype == "uint8"}
    found: dict[tuple[str, ...], list[str]] = {}
    for file in manifest.files:
        for way, side in (("in", file.inputs), ("out", file.outputs)):
            for p in side:
                # bytes as they are; a scale in the file is for the network, which reads them as normalised
                plain = p.scale is None or (p.name in pixels and p.dtype == "uint8")
                scale = "" if plain else f"{p.scale:.9g}"
                zero_point = "" if plain or p.zero_point is None else str(p.zero_point)
                found.setdefault((way, p.name, shape(p.shape), p.dtype, scale, zero_point), []).append(file.path)
    return tuple(Held(tuple(files), *words) for words, files in found.items())
