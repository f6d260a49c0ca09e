"""`ssh://[user@]host[:port]`: the system's OpenSSH client, so that keys, jump hosts and known hosts are the user's own.

Files go through ``cat`` at the other end and are renamed there once their size is right: small boards run dropbear,
which has no sftp server. One connection carries all commands (ControlMaster). Why no library: docs/decisions/009.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deploykit.core.errors import DeploykitError
from deploykit.devices.address import Address
from deploykit.devices.device import Lost, Ran, call, cannot_write

PROGRAM = "DEPLOYKIT_SSH"
"""Environment variable with the client and its options, e.g. ``ssh -F other_config`` (as git's GIT_SSH_COMMAND)."""
OPTIONS = (
    "BatchMode=yes",  # never ask: a question would hang a script
    "ConnectTimeout=10",
    "ServerAliveInterval=5",
    "ServerAliveCountMax=3",  # a pulled cable is noticed within 15 s
)
IDLE_SECONDS = 60
"""A connection nobody uses any more closes itself, should this process be killed."""
NO_CONNECTION = 255
"""OpenSSH's exit code for its own failures."""
REFUSED = 73
"""Our shell's exit code for a file that could not be written (EX_CANTCREAT of sysexits.h)."""


@dataclass(frozen=True)
class Ssh:
    """Commands in a shell at the other end of one connection."""

    address: Address
    argv: tuple[str, ...]
    """The client with its options, up to the host."""

    def run(self, command: str, feed: bytes | None = None) -> Ran:
        """Runs a line of shell there."""
        return self._checked(call([*self.argv, _shell(command)], feed))

    def put(self, source: Path, destination: str) -> None:
        """Copies a file there; what is left of an aborted copy is removed by the shell that wrote it."""
        size = source.stat().st_size
        with source.open("rb") as file:
            ran = self._checked(call([*self.argv, _shell(receive(destination, size))], file))
        if ran.code:
            raise cannot_write(self.address, destination, size, ran.err)

    def get(self, source: str, destination: Path) -> None:
        """Copies a file from there."""
        part = destination.with_name(f".{destination.name}.part")
        try:
            with part.open("wb") as file:
                ran = self._checked(call([*self.argv, _shell(f"cat {shlex.quote(source)}")], b"", file))
            if ran.code:
                raise DeploykitError(f"{self.address.text}: {ran.err.strip()}")
            part.replace(destination)
        finally:
            with contextlib.suppress(FileNotFoundError):
                part.unlink()

    def _checked(self, ran: Ran) -> Ran:
        if ran.code == NO_CONNECTION:
            raise Lost(self.address, _said(ran.err))
        return ran


@contextlib.contextmanager
def connect(address: Address) -> Iterator[Ssh]:
    """Opens one connection for all that follows.

    Raises:
        DeploykitError: no client here, no such host, nobody answers there, a host key that is unknown or has changed,
            a key that is not accepted. Each says what to do.
    """
    client = shlex.split(os.environ.get(PROGRAM, "ssh"))
    if not client or shutil.which(client[0]) is None:
        raise DeploykitError(f"{address.text} needs an OpenSSH client here; there is no program '{' '.join(client)}'")
    folder = tempfile.mkdtemp(prefix="dk-", dir="/tmp" if os.path.isdir("/tmp") else None)  # sockets need short paths
    argv = [*client, *(f"-o{o}" for o in OPTIONS), f"-oControlPath={folder}/%C"]
    argv += [f"-p{address.port}"] if address.port else []
    argv += [f"-l{address.user}"] if address.user else []
    host = ["--", address.host]
    try:
        _open([*argv, "-oControlMaster=yes", f"-oControlPersist={IDLE_SECONDS}", "-Nf", *host], address)
        yield Ssh(address, (*argv, *host))
    finally:
        subprocess.run([*argv, "-Oexit", *host], stdin=subprocess.DEVNULL, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def _open(argv: list[str], address: Address) -> None:
    with tempfile.TemporaryFile() as said:  # no pipe: the process that stays behind would hold it open
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        said.seek(0)
        words = said.read().decode(errors="replace")
    if done.returncode:
        raise _refusal(address, words)


def _refusal(address: Address, words: str) -> DeploykitError:
    """What OpenSSH said, as what is wrong and what to do."""
    port = f"-p {address.port} " if address.port else ""
    login = f"ssh {port}{f'{address.user}@' if address.user else ''}{address.host}"
    if "HOST IDENTIFICATION HAS CHANGED" in words:
        return DeploykitError(
            f"{address.text} shows another host key than the one in known_hosts: another machine answers, or it was "
            f"set up anew. If you know why, remove the old key (ssh-keygen -R '{_known_name(address)}') and log in "
            f"once by hand: {login}"
        )
    if "Host key verification failed" in words or "host key is known" in words:
        return DeploykitError(
            f"the host key of {address.text} is not known here, so nobody can tell whether this is your device. Log in "
            f"once by hand and compare the fingerprint: {login}"
        )
    if "Permission denied" in words or "Too many authentication failures" in words:
        return DeploykitError(
            f"{address.text} accepts none of our keys (deploykit never asks for passwords). Put your public key there "
            f"(ssh-copy-id {port}{f'{address.user}@' if address.user else ''}{address.host}), or name the right key or "
            "user in ~/.ssh/config"
        )
    if "Could not resolve" in words:
        return DeploykitError(f"{address.text}: no host of that name; check the spelling, or give its IP address")
    return DeploykitError(
        f"{address.text} cannot be reached: {_said(words)}. Is it switched on, on this network, and does sshd run "
        f"there? Try: {login}"
    )


def _known_name(address: Address) -> str:
    return f"[{address.host}]:{address.port}" if address.port else address.host


def _said(words: str) -> str:
    """The last line that is no warning."""
    lines = [line.strip() for line in words.splitlines() if line.strip() and not line.startswith("Warning:")]
    return lines[-1] if lines else ""


def _shell(command: str) -> str:
    """The command as a line that sh, csh and fish read alike, whichever the user logs in with.

    Between single quotes csh still takes ``!`` for history and refuses a new line, fish still reads backslashes: these
    travel as octal numbers, and sh makes the command of them.
    """
    plain = (chr(b) if 32 <= b < 127 and chr(b) not in "'\\!" else f"\\0{b:03o}" for b in command.encode())
    return f"""exec sh -c 'eval "$(printf %b "$1")"' sh '{"".join(plain)}'"""


def receive(destination: str, size: int) -> str:
    """A line of shell that writes its input to a file: whole under its name, or not at all.

    When the connection ends, ``cat`` sees the end of its input like that of a file, so the size decides.
    """
    final = shlex.quote(destination)
    folder, _, name = destination.rpartition("/")
    part = f"{shlex.quote(f'{folder}/.{name}')}.$$.part"
    return (
        f'p={part}; cat > "$p" && [ "$(wc -c < "$p")" -eq {size} ] && mv "$p" {final} '
        f'|| {{ rm -f "$p"; exit {REFUSED}; }}'
    )
