"""`adb://serial`: an Android device, through the Android SDK's ``adb``. ``adb://`` is the only one that is attached."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from deploykit.core.errors import DeploykitError, some
from deploykit.devices.address import Address
from deploykit.devices.device import Lost, Ran, call, cannot_write

FOLDER = "/data/local/tmp/deploykit"
"""The one place of an Android device where a shell may write and run programs."""
GONE = ("no devices/emulators found", "device offline", "not found", "closed", "device unauthorized")
"""What adb itself says, on stderr, when there is no device (any more)."""


@dataclass(frozen=True)
class Adb:
    """Commands in the device's shell, files by ``adb push`` and ``adb pull``."""

    address: Address
    argv: tuple[str, ...]

    def run(self, command: str, feed: bytes | None = None) -> Ran:
        """Runs a line of shell there."""
        return self._checked(call([*self.argv, "shell", f"sh -c {shlex.quote(command)}"], feed))

    def put(self, source: Path, destination: str) -> None:
        """Copies a file there."""
        folder, _, name = destination.rpartition("/")
        part = f"{folder}/.{name}.{os.getpid()}.part"
        ran = self._checked(call([*self.argv, "push", str(source), part], b""))
        if not ran.code:
            ran = self.run(f"mv {shlex.quote(part)} {shlex.quote(destination)}")
        if ran.code:
            self.run(f"rm -f {shlex.quote(part)}")
            raise cannot_write(self.address, destination, source.stat().st_size, ran.err or ran.out)

    def get(self, source: str, destination: Path) -> None:
        """Copies a file from there."""
        part = destination.with_name(f".{destination.name}.part")
        try:
            ran = self._checked(call([*self.argv, "pull", source, str(part)], b""))
            if ran.code:
                raise DeploykitError(f"{self.address.text}: {(ran.err or ran.out).strip()}")
            part.replace(destination)
        finally:
            with contextlib.suppress(FileNotFoundError):
                part.unlink()

    def _checked(self, ran: Ran) -> Ran:
        lines = [line for line in ran.err.splitlines() if line.startswith(("error:", "adb:"))]
        if ran.code and any(word in line for line in lines for word in GONE):
            raise Lost(self.address, lines[-1])
        return ran


@contextlib.contextmanager
def connect(address: Address) -> Iterator[Adb]:
    """The device of that serial.

    Raises:
        DeploykitError: no adb here, no such device, several and no serial, or one that does not trust this computer.
    """
    if shutil.which("adb") is None:
        raise DeploykitError(f"{address.text} needs Android's adb here (platform-tools); there is no such program")
    listed = call(["adb", "devices"], b"")
    if listed.code:
        raise DeploykitError(f"adb does not work here: {listed.err.strip() or listed.out.strip()}")
    rows = [line.split("\t") for line in listed.out.splitlines() if "\t" in line]
    states = {row[0]: row[1].strip() for row in rows}
    serial = address.host or (next(iter(states)) if len(states) == 1 else "")
    known = f"attached: {some(sorted(states))}" if states else "none is attached"
    if not serial:
        raise DeploykitError(f"which Android device? Give adb://SERIAL; {known}")
    if serial not in states:
        raise DeploykitError(f"no Android device '{serial}'; {known}. Is USB debugging on? See `adb devices`")
    if states[serial] != "device":
        raise DeploykitError(
            f"the Android device '{serial}' is {states[serial]}: accept this computer's key on its screen, or attach "
            "it again; `adb devices` must say 'device'"
        )
    yield Adb(replace(address, host=serial, folder=address.folder or FOLDER), ("adb", "-s", serial))
