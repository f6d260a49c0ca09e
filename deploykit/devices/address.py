"""`Address`: where a device is, as the user wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit

from deploykit.core.errors import DeploykitError, unknown

FORMS = "local, ssh://[user@]host[:port] or adb://serial"
OPTIONS = ("dir", "python")


@dataclass(frozen=True)
class Address:
    """``SCHEME://[user@]host[:port][?python=PATH&dir=PATH]``."""

    scheme: str
    host: str = ""
    """Empty: this machine, or the only Android device there is."""
    user: str = ""
    port: int | None = None
    python: str = ""
    """Interpreter to run files with there, e.g. of a venv; empty: ``python3``."""
    folder: str = ""
    """Where to keep files there; empty: the user's cache folder."""

    @property
    def name(self) -> str:
        """For sentences."""
        if self.scheme == "local":
            return "this machine"
        return f"{self.user}@{self.host}" if self.user else self.host or "the Android device"

    @property
    def text(self) -> str:
        """The address without options."""
        if self.scheme == "local":
            return "local"
        port = f":{self.port}" if self.port else ""
        return f"{self.scheme}://{f'{self.user}@' if self.user else ''}{self.host}{port}"


def parse(text: str) -> Address:
    """Reads an address.

    Raises:
        DeploykitError: no such form, a password in it, an unknown option.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise DeploykitError(f"--device {text}: {error}. Expected: {FORMS}.") from None
    scheme = parts.scheme or parts.path
    named = bool(parts.netloc) or scheme != "ssh"
    if scheme not in ("local", "ssh", "adb") or not named or (parts.scheme and parts.path not in ("", "/")):
        raise DeploykitError(f"a device is {FORMS}; given: {text}")
    if parts.password is not None:
        raise DeploykitError("deploykit logs in by key only: no password in --device; `man ssh-copy-id` says how")
    options = dict(parse_qsl(parts.query))
    for key in options:
        if key not in OPTIONS:
            raise unknown("option of a device", key, OPTIONS)
    host, user = parts.hostname or "", parts.username or ""
    if scheme == "adb":  # serials are case-sensitive and may hold a port: adb://192.168.1.5:5555
        host, port, user = parts.netloc, None, ""
    if host.startswith("-") or user.startswith("-"):
        raise DeploykitError(f"a device is {FORMS}; given: {text}")
    return Address(scheme, host, user, port, options.get("python", ""), options.get("dir", ""))
