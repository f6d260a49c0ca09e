"""The ``[options]`` table of a TensorRT target."""

from __future__ import annotations

from dataclasses import dataclass

from deploykit.core.errors import DeploykitError
from deploykit.core.tables import from_table
from deploykit.core.target import Target
from deploykit.exporters.tensorrt.device.build import parser_opset
from deploykit.exporters.tensorrt.opset import OLDEST

FP16_SCALES_OPSET = 19
"""QuantizeLinear and DequantizeLinear take float16 scales from here on."""


@dataclass(frozen=True)
class Options:
    """What the exporter must know about the TensorRT of a device."""

    trt: tuple[str, str]
    """Oldest and newest TensorRT the device's software releases bring, e.g. ``["8.5", "10.16"]``."""
    opset_weak: int
    """Operator set of fp32 and int8 files, for the oldest TensorRT (weak typing: it picks the kernels' types)."""
    opset_strong: int
    """Operator set of fp16 and int8-fp16 files, for TensorRT 10 (strong typing: the file's types are the kernels')."""
    batch: tuple[int, int, int]
    """Smallest, best and largest batch. Three equal numbers: the batch is bound in the files."""

    def __post_init__(self) -> None:
        """Refuses what no TensorRT of the range could read."""
        oldest, newest = (version(v) for v in self.trt)
        if oldest > newest:
            raise ValueError(f"trt = {list(self.trt)} must go from the oldest to the newest version")
        if not OLDEST <= self.opset_weak <= parser_opset(oldest):
            raise ValueError(
                f"opset_weak must be between {OLDEST} and {parser_opset(oldest)}, what TensorRT {self.trt[0]} reads"
            )
        if not FP16_SCALES_OPSET <= self.opset_strong <= parser_opset((10, 0)):
            raise ValueError(
                f"opset_strong must be between {FP16_SCALES_OPSET} (float16 scales) and {parser_opset((10, 0))} "
                "(the first TensorRT with strong typing)"
            )
        low, best, high = self.batch
        if not 1 <= low <= best <= high:
            raise ValueError("batch must be three rising numbers from 1: smallest, best, largest")

    @property
    def bound(self) -> int | None:
        """The batch that is bound in the files; None where it stays free."""
        return self.batch[0] if len(set(self.batch)) == 1 else None


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
        DeploykitError: an unknown or missing key, a wrong value, an operator set above the target's own.
    """
    found = from_table(Options, target.options, f"target {target.name} [options]")
    highest = max(found.opset_weak, found.opset_strong)
    if highest > target.opset:
        raise DeploykitError(
            f"target {target.name} [options]: operator set {highest} is above its opset = {target.opset}"
        )
    return found
