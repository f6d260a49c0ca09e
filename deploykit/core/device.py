"""`Facts`: what a device says about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Facts:
    """What was readable there when the device was asked. Empty or None: it did not say."""

    address: str
    """``local``, ``ssh://user@host:port`` or ``adb://serial``."""
    name: str
    """For sentences: ``"this machine"``, ``"pi@10.0.0.7"``."""
    machine: str
    """Architecture as ``uname -m`` says it: ``aarch64``, ``x86_64``."""
    system: str = ""
    board: str = ""
    cpu: str = ""
    cores: int | None = None
    memory_mb: float | None = None
    clock_mhz: float | None = None
    """Mean over the cores when it was asked."""
    clock_max_mhz: float | None = None
    governor: str = ""
    temperatures: Mapping[str, float] = field(default_factory=dict)
    """Degrees Celsius by thermal zone."""
    power_mode: str = ""
    """Jetson's nvpmodel."""
    python: str = ""
    """Path of the interpreter that runs files there."""
    python_version: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Versions of numpy and of the runtimes that this Python has."""
    tools: Mapping[str, str] = field(default_factory=dict)
    """Paths of programs: cc, trtexec, benchmark_model."""
    folder: str = ""
    """Where deploykit keeps its files there."""
    free_mb: float | None = None
    """Of the disk that folder lies on."""

    @property
    def text(self) -> str:
        """One line on where a measurement was taken; up to the first colon stands the name."""
        clock = f" up to {self.clock_max_mhz:.0f} MHz" if self.clock_max_mhz else ""
        cores = f"{self.cores} x " if self.cores else ""
        parts = [
            self.board,
            f"{cores}{self.cpu or 'cpu'} ({self.machine}){clock}",
            f"governor {self.governor}" if self.governor else "",
            self.power_mode,
            self.system,
        ]
        return f"{self.name}: " + ", ".join(part for part in parts if part)
