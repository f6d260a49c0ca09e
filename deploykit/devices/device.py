"""`Device`: run a command there, put a file there, get a file from there."""

from __future__ import annotations

import importlib
import os
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, cast

from deploykit.core.errors import DeploykitError
from deploykit.devices.address import Address


@dataclass(frozen=True)
class Ran:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


class Device(Protocol):
    """A place with a POSIX shell. `put` and `get` write whole files or none."""

    @property
    def address(self) -> Address:
        """Where it is."""
        ...

    def run(self, command: str, feed: bytes | None = None) -> Ran:
        """Runs a line of shell; ``feed`` is its input.

        Without ``feed`` the input stays open as long as we and the connection live: a command that watches it can end
        itself when nobody waits for it any more.

        Raises:
            Lost: the connection ended.
        """
        ...

    def put(self, source: Path, destination: str) -> None:
        """Copies a file there; its folder exists.

        Raises:
            Lost: the connection ended.
            DeploykitError: it cannot be written there, most often because the disk is full.
        """
        ...

    def get(self, source: str, destination: Path) -> None:
        """Copies a file from there.

        Raises:
            Lost: the connection ended.
        """
        ...


class Lost(DeploykitError):
    """The connection ended in the middle of something."""

    def __init__(self, address: Address, why: str) -> None:
        """``why``: the last thing that the transport said."""
        super().__init__(
            f"the connection to {address.text} ended before the work was done ({why or 'the other end is gone'}). "
            "No file is half-written, here or there; what was copied and computed is kept there"
        )


def connect(address: Address) -> AbstractContextManager[Device]:
    """Opens a device; `with connect(parse(text)) as device`.

    Raises:
        DeploykitError: it cannot be reached, or does not let us in.
    """
    opener = importlib.import_module(f"deploykit.devices.on_{address.scheme}")
    return cast(AbstractContextManager[Device], opener.connect(address))


def call(argv: Sequence[str], source: bytes | IO[bytes] | None = None, sink: IO[bytes] | None = None) -> Ran:
    """Runs a program of this machine, with its input from bytes, a file or a pipe that stays open until it ends."""
    reader = writer = None
    if source is None:
        reader, writer = os.pipe()
    try:
        done = subprocess.run(
            argv,
            input=source if isinstance(source, bytes) else None,
            stdin=reader if source is None else source if not isinstance(source, bytes) else None,
            stdout=subprocess.PIPE if sink is None else sink,
            stderr=subprocess.PIPE,
        )
    finally:
        for end in (reader, writer):
            if end is not None:
                os.close(end)
    out = b"" if done.stdout is None else done.stdout
    return Ran(done.returncode, out.decode(errors="replace"), done.stderr.decode(errors="replace"))


def cannot_write(address: Address, destination: str, size: int, why: str) -> DeploykitError:
    """The error for a file that the device would not take."""
    said = why.strip().splitlines()[-1] if why.strip() else "no reason given"
    return DeploykitError(
        f"{address.text} cannot take {destination} ({size / 1e6:.1f} MB): {said}. No part of it stays there; "
        "files copied before do, for the next try. Free some space there, or name another folder: "
        "--device ADDRESS?dir=PATH"
    )
