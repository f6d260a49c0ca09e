"""A real OpenSSH server on this machine's loopback, run by whoever runs the tests, with keys made on the spot."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
MISSING = [name for name in ("ssh", "ssh-keygen") if shutil.which(name) is None] + (["sshd"] if SSHD is None else [])
WHY_NOT = f"no {', '.join(MISSING)} here: apt-get install openssh-server openssh-client" if MISSING else ""


@dataclass
class Server:
    """A running server, and what a client of this machine needs to log in."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def client(self) -> str:
        """For DEPLOYKIT_SSH."""
        return f"ssh -F {self.folder / 'client'}"

    def address(self, work: Path, **options: object) -> str:
        """Of this server, keeping files in a folder of the test's."""
        more = "".join(f"&{k}={v}" for k, v in options.items())
        return f"ssh://{pwd.getpwuid(os.getuid()).pw_name}@127.0.0.1:{self.port}?dir={work}{more}"

    def kill(self) -> None:
        """Kills the server and all its connections, as a pulled plug would; commands it started live on."""
        for pid in [*_sshd_below(self.process.pid), self.process.pid]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """Ends it."""
        if self.process.poll() is None:
            self.kill()


def start(folder: Path, before: str = "", port: int = 0, shell: str = "") -> Server:
    """Starts a server; its keys are made where the folder holds none yet.

    Args:
        folder: for keys, configuration and log.
        before: a line of shell that it and its children inherit from, like ``ulimit -f 8``.
        port: 0 takes a free one.
        shell: a program that is given every command, as a login shell would be; the user's own without.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("host_key", "user_key"):
        if not (folder / name).exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", port))
        port = free.getsockname()[1]
    host_key = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}")
    (folder / "client").write_text(
        f"Host *\n  IdentityFile {folder}/user_key\n  IdentitiesOnly yes\n  IdentityAgent none\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  GlobalKnownHostsFile /dev/null\n"
    )
    (folder / "server").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n"
        "SetEnv SHLVL=2\n"  # bash then leaves out ~/.bashrc, whatever the tester has in it
        + (f'ForceCommand exec {shell} -c "$SSH_ORIGINAL_COMMAND"\n' if shell else "")
    )
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd, as root, locks its helper in
    argv = [str(SSHD), "-D", "-e", "-f", str(folder / "server")]
    with (folder / "log").open("ab") as log:
        started = ["sh", "-c", f'{before}; exec "$@"', "sh", *argv] if before else argv
        process = subprocess.Popen(started, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    server = Server(folder, port, process)
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server
        if process.poll() is not None:
            break
        time.sleep(0.02)
    server.stop()
    raise RuntimeError(f"sshd did not start: {(folder / 'log').read_text()}")


def _sshd_below(pid: int) -> list[int]:
    """The server's own processes, one per connection; not the commands these run."""
    parents: dict[int, tuple[int, str]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue
        name = text[text.index("(") + 1 : text.rindex(")")]
        parents[int(path.parent.name)] = int(text[text.rindex(")") + 2 :].split()[1]), name
    found, level = [], [pid]
    while level:
        level = [p for p, (parent, name) in parents.items() if parent in level and name.startswith("sshd")]
        found += level
    return found
