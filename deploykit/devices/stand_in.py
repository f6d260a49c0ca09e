"""Whether a device is what a target is made for. Others may be timed too, but their times say so."""

from __future__ import annotations

from deploykit import targets
from deploykit.core.device import Facts

SAME = {"arm64": "aarch64", "amd64": "x86_64"}
"""As macOS and the BSDs call what Linux calls otherwise."""
MICROCONTROLLER = "c99"
"""It writes for processors without a shell: no device is one, unless the target names an architecture."""


def fact(target: str, name: str) -> str:
    """What a target says about its hardware; empty: nothing, or its profile is not here."""
    found = targets.load(target).facts.get(name) if target in targets.names() else None
    return "" if found is None else str(found.value)


def other_machine(facts: Facts, target: str) -> bool:
    """Whether the target names another architecture than the device's."""
    wanted = fact(target, "architecture")
    return bool(wanted) and wanted != SAME.get(facts.machine, facts.machine)


def stand_in(facts: Facts, exporter: str, target: str, capability: str = "") -> str:
    """``x86_64 stands in for mobile-arm (aarch64)``; empty: the device is one that the target is made for, or nobody
    knows.

    Args:
        facts: of the device.
        exporter: what wrote the files.
        target: what for.
        capability: the compute capability of the GPU that ran it, where one did and it is known.
    """
    machine, gpu = fact(target, "architecture"), fact(target, "compute_capability")
    if other_machine(facts, target):
        return f"{facts.machine} stands in for {target} ({machine})"
    if exporter == MICROCONTROLLER and not machine:
        return f"{facts.machine} stands in for {target}"
    if capability and gpu and capability != gpu:
        return f"compute capability {capability} stands in for {target} ({gpu})"
    return ""
