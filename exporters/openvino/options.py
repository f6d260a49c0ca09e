"""The ``[options]`` table of an OpenVINO target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deploykit.core.tables import from_table
from deploykit.core.target import Target


@dataclass(frozen=True)
class Options:
    """What the exporter must know beyond the numbers."""

    device: Literal["CPU", "GPU", "NPU"] = "CPU"
    """OpenVINO's name of the device the files are for. They run on the CPU here, whatever it is."""
    batch: int = 1
    """The batch that is bound in the files."""
    driver: str = ""
    """What OpenVINO needs beside itself to find the device."""

    def __post_init__(self) -> None:
        """Refuses a batch without samples."""
        if self.batch < 1:
            raise ValueError(f"batch must be 1 or more; given {self.batch}")

    @property
    def untimed(self) -> str:
        """Why times taken on a CPU say nothing about the device; empty for the CPU."""
        return "" if self.device == "CPU" else f"needs the {self.device}; the files were checked on the CPU"

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever runs the files on the device should know; nothing for the CPU."""
        if self.device == "CPU":
            return ()
        measured = (
            f"accuracy and answers are those of OpenVINO's kernels for the CPU; the {self.device} has kernels of its "
            "own, which compute in float16 what is not int8"
        )
        need = f"OpenVINO needs {self.driver}; where it finds no {self.device}, infer.py says so and runs on the CPU"
        return (measured, need) if self.driver else (measured,)


def options(target: Target) -> Options:
    """The target's options, validated.

    Raises:
        DeploykitError: an unknown key or a wrong value.
    """
    return from_table(Options, target.options, f"target {target.name} [options]")
