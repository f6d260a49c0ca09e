"""Asks a device what it is."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Sequence
from importlib import resources

from deploykit.core.device import Facts
from deploykit.core.errors import DeploykitError
from deploykit.devices.device import Device


def read_facts(device: Device) -> Facts:
    """Architecture, processor, clocks, temperatures, runtimes and tools, as far as they are readable there.

    Raises:
        DeploykitError: no POSIX shell there, or no folder to write to.
        Lost: the connection ended.
    """
    address = device.address
    script = (resources.files("deploykit.devices.there") / "probe.sh").read_bytes()
    ran = device.run(f"sh -s -- {shlex.quote(address.folder)} {shlex.quote(address.python)}", script)
    said: dict[str, list[str]] = defaultdict(list)
    for line in ran.out.splitlines():
        key, tab, value = line.partition("\t")
        if tab and value.strip():
            said[key].append(value.strip())
    if "machine" not in said:
        words = (ran.err or ran.out).strip().splitlines() or ["no answer"]
        raise DeploykitError(f"{address.text} has no POSIX shell that we can use: {words[-1]}")
    if "folder" not in said:
        raise DeploykitError(
            f"{address.text}: {_one(said, 'trouble')}. Name a folder to write to: --device ADDRESS?dir=PATH"
        )
    if address.python and "python" not in said:
        raise DeploykitError(f"{address.text} has no Python interpreter '{address.python}'")
    if address.python and "python_version" not in said:
        words = ran.err.strip().splitlines() or ["it said nothing"]
        raise DeploykitError(
            f"{address.text}: '{address.python}' cannot be run there as a Python interpreter: {words[-1]}. "
            "Name another: --device ADDRESS?python=PATH"
        )
    clocks = [float(c) / 1e3 for c in said["clock_khz"]]
    return Facts(
        address=address.text,
        name=address.name,
        machine=_one(said, "machine"),
        system=_one(said, "system") or _one(said, "kernel"),
        board=_one(said, "board"),
        cpu=re.sub(r"\(R\)|\(TM\)", "", _one(said, "cpu")),
        cores=_whole(said["cores"]),
        memory_mb=_scaled(said["memory_kb"], 1024 / 1e6),
        clock_mhz=sum(clocks) / len(clocks) if clocks else None,
        clock_max_mhz=max((float(c) / 1e3 for c in said["clock_max_khz"]), default=None),
        governor="/".join(dict.fromkeys(said["governor"])),
        temperatures=_temperatures(said),
        power_mode=_one(said, "power_mode").removeprefix("NV Power Mode: "),
        python=_one(said, "python"),
        python_version=_one(said, "python_version"),
        packages={key.partition(" ")[2]: v[0] for key, v in said.items() if key.startswith("package ")},
        tools={key.partition(" ")[2]: v[0] for key, v in said.items() if key.startswith("tool ")},
        folder=_one(said, "folder"),
        free_mb=_scaled(said["free_kb"], 1024 / 1e6),
    )


def _one(said: dict[str, list[str]], key: str) -> str:
    return said[key][0] if said[key] else ""


def _whole(values: Sequence[str]) -> int | None:
    return int(values[0]) if values and values[0].isdigit() else None


def _scaled(values: Sequence[str], factor: float) -> float | None:
    whole = _whole(values)
    return None if whole is None else whole * factor


def _temperatures(said: dict[str, list[str]]) -> dict[str, float]:
    """Millidegrees per zone; several zones of one type are numbered."""
    found = {}
    for key, values in said.items():
        if key.startswith("temperature"):
            zone = key.partition(" ")[2] or "zone"
            for i, value in enumerate(values):
                if value.lstrip("-").isdigit():
                    found[zone if i == 0 else f"{zone} {i + 1}"] = int(value) / 1e3
    return found
