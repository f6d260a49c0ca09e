"""The ``[options]`` table of a TensorRT target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deploykit.core.errors import DeploykitError
from deploykit.core.precision import FORMATS, Precision
from deploykit.core.tables import from_table
from deploykit.core.target import Target
from deploykit.exporters.tensorrt.device.build import parser_opset
from deploykit.exporters.tensorrt.opset import OLDEST

FP16_SCALES_OPSET = 19
"""QuantizeLinear and DequantizeLinear take float16 scales from here on."""
STRONG_TYPING = (10, 0)
"""The first TensorRT that can be told to take the file's types for the kernels' types."""


@dataclass(frozen=True)
class Options:
    """What the exporter must know about the TensorRT of a device."""

    trt: tuple[str, str]
    """Oldest and newest TensorRT the device's software releases bring, e.g. ``["8.5", "10.16"]``."""
    opset_weak: int
    """Operator set of fp32 and int8 files, for the oldest TensorRT (weak typing: it picks the kernels' types)."""
    batch: tuple[int, int, int]
    """Smallest, best and largest batch. Three equal numbers: the batch is bound in the files."""
    opset_strong: int | None = None
    """Operator set of the float16 files, for TensorRT 10 (strong typing: the file's types are the kernels').
    Absent where every TensorRT of the range is older: fp16 files then have ``opset_weak``."""

    def __post_init__(self) -> None:
        """Refuses what no TensorRT of the range could read."""
        if self.oldest > self.newest:
            raise ValueError(f"trt = {list(self.trt)} must go from the oldest to the newest version")
        highest = parser_opset(self.oldest)
        if not OLDEST <= self.opset_weak <= highest:
            raise ValueError(f"opset_weak must be between {OLDEST} and {highest}, what TensorRT {self.trt[0]} reads")
        if (self.opset_strong is not None) != (self.newest >= STRONG_TYPING):
            raise ValueError(
                "opset_strong belongs to targets with TensorRT 10 or later, which has strong typing; "
                f"this one has {self.trt[0]} to {self.trt[1]}"
            )
        if self.opset_strong is not None and not FP16_SCALES_OPSET <= self.opset_strong <= parser_opset(STRONG_TYPING):
            raise ValueError(
                f"opset_strong must be between {FP16_SCALES_OPSET} (float16 scales) and {parser_opset(STRONG_TYPING)} "
                "(the first TensorRT with strong typing)"
            )
        low, best, high = self.batch
        if not 1 <= low <= best <= high:
            raise ValueError("batch must be three rising numbers from 1: smallest, best, largest")

    @property
    def oldest(self) -> tuple[int, ...]:
        """The oldest TensorRT as numbers."""
        return version(self.trt[0])

    @property
    def newest(self) -> tuple[int, ...]:
        """The newest TensorRT as numbers."""
        return version(self.trt[1])

    @property
    def bound(self) -> int | None:
        """The batch that is bound in the files; None where it stays free."""
        return self.batch[0] if len(set(self.batch)) == 1 else None

    def typing(self, precision: Precision) -> Literal["weak", "strong"]:
        """What a file is written for: strong, its types are the kernels'; weak, flags allow more types."""
        half = precision == "fp16" or FORMATS[precision].half
        return "strong" if half and self.opset_strong is not None else "weak"

    def readers(self, precision: Precision) -> tuple[int, tuple[int, ...]]:
        """A file's operator set, and the oldest TensorRT that shall read it."""
        if self.opset_strong is not None and self.typing(precision) == "strong":
            return self.opset_strong, max(self.oldest, STRONG_TYPING)
        return self.opset_weak, self.oldest


def version(text: str) -> tuple[int, ...]:
    """``"10.3"`` as (10, 3).

    Raises:
        ValueError: not numbers with dots.
    """
    try:
        return tuple(int(part) for part in text.split("."))
    except ValueError:
        raise ValueError(f"'{text}' is not a version like 10.3") from None


def options(target: Target) -> Options:
    """The target's options, validated.

    Raises:
        DeploykitError: an unknown or missing key, a wrong value, an operator set above the target's own, a precision
            that needs another TensorRT.
    """
    found = from_table(Options, target.options, f"target {target.name} [options]")
    highest = max(found.opset_weak, found.opset_strong or 0)
    if highest > target.opset:
        raise DeploykitError(
            f"target {target.name} [options]: operator set {highest} is above its opset = {target.opset}"
        )
    for precision in (*target.precisions, *target.on_request):
        if found.opset_strong is None and FORMATS[precision].half:
            raise DeploykitError(
                f"target {target.name}: {precision} files need strong typing, which begins with TensorRT 10; "
                f"this target has {found.trt[0]} to {found.trt[1]}. Leave {precision} out of its precisions."
            )
    return found
