"""`local`: this machine, through the same door as any other device."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from deploykit.devices.address import Address
from deploykit.devices.device import Ran, call, cannot_write


@dataclass(frozen=True)
class Local:
    """Commands in a shell, copies on this disk."""

    address: Address

    def run(self, command: str, feed: bytes | None = None) -> Ran:
        """Runs a line of shell."""
        return call(["sh", "-c", command], feed)

    def put(self, source: Path, destination: str) -> None:
        """Copies a file."""
        part = Path(f"{destination}.{os.getpid()}.part")
        try:
            shutil.copyfile(source, part)
            part.replace(destination)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            raise cannot_write(self.address, destination, source.stat().st_size, error.strerror or "") from None

    def get(self, source: str, destination: Path) -> None:
        """Copies a file."""
        part = Path(f"{destination}.{os.getpid()}.part")
        try:
            shutil.copyfile(source, part)
            part.replace(destination)
        except OSError:
            part.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def connect(address: Address) -> Iterator[Local]:
    """This machine; files are run by the Python that runs deploykit."""
    yield Local(replace(address, python=address.python or sys.executable))
