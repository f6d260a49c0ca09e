"""Devices over ssh: a real OpenSSH server on loopback, with keys made here. Nothing leaves this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import sshd
from commands import Said, contents, enter
from small_artifact import small_artifact

from deploykit import trial
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import load_manifest
from deploykit.devices import Lost, answers, connect, parse, read_facts
from deploykit.devices.on_ssh import Ssh

pytestmark = [pytest.mark.ssh, pytest.mark.skipif(bool(sshd.WHY_NOT), reason=sshd.WHY_NOT)]

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ssh") / "out"
    small_artifact(folder)
    return folder


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[sshd.Server]:
    running = sshd.start(tmp_path / "sshd")
    monkeypatch.setenv("DEPLOYKIT_SSH", running.client)
    yield running
    running.stop()


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """Where the device keeps its files."""
    return tmp_path / "there"


def data(count: int) -> DataSet:
    random = np.random.default_rng(0)
    x = random.standard_normal((count, 3, 8, 8)).astype(np.float32)
    return DataSet.of({"x": x}, random.integers(0, 4, count), "samples")


def evaluation(folder: Path, count: int = 60) -> Path:
    (batch,) = data(count).batches(count)
    np.savez(folder / "eval.npz", x=batch.inputs["x"], y=batch.labels)
    return folder / "eval.npz"


def when(true: Callable[[], object], then: Callable[[], None]) -> threading.Thread:
    """Does something the moment that something is true."""

    def watch() -> None:
        for _ in range(20_000):
            if true():
                then()
                return
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def wait(true: Callable[[], object]) -> bool:
    for _ in range(500):
        if true():
            return True
        time.sleep(0.01)
    return False


def running_below(folder: Path) -> list[str]:
    """Command lines of processes that mention a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line and "deploykit_run" in line:
            found.append(line)
    return found


def parts(folder: Path) -> list[Path]:
    return list(folder.rglob("*.part")) + list(folder.rglob(".*.part"))


def all_whole(folder: Path) -> bool:
    """Every archive of inputs or answers below a folder can be read to its end."""
    for path in [*folder.rglob("*.npz"), *folder.rglob("answers/*")]:
        with np.load(path) as archive:
            assert all(archive[name].size for name in archive.files)
    return True


# ------------------------------------------------------------------ the road


def test_export_over_ssh_builds_checks_and_times_there_in_one_command(
    server: sshd.Server, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    evaluation(tmp_path)
    address = server.address(there, python=sys.executable)
    said = enter(f"export net.py:build --target x86 --calib eval.npz --eval eval.npz --device {address} -o out --json")
    assert said.code in (0, 3), said.err  # random weights: the accuracy gate may fail, the device's may not
    manifest = load_manifest(tmp_path / "out")
    assert manifest.device is not None and manifest.device.address == parse(address).text
    name = parse(address).name
    assert [m.where.startswith(f"{name}: ") for m in manifest.measurements] == [True, True]
    answered = [s for s in manifest.scores if s.data.endswith(f"eval.npz, answered on {name}")]
    assert [s.precision for s in answered] == ["fp32", "int8"]
    assert all(s.metric is not None and s.agreement is not None for s in answered)
    assert [c.passed for c in manifest.checks if c.name == trial.SAME_HERE] == [True, True]
    (summary,) = json.loads(said.out)
    assert summary["results"][-1]["measurement"]["where"].startswith(f"{name}: ")
    assert enter("report out").code == 0
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert name in page and "answered on" in page


def test_a_second_run_copies_nothing_and_answers_nothing_again(
    server: sshd.Server, there: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[str] = []
    put = Ssh.put

    def counted(self: Ssh, source: Path, destination: str) -> None:
        copied.append(destination)
        put(self, source, destination)

    monkeypatch.setattr(Ssh, "put", counted)
    address = server.address(there, python=sys.executable)
    for expected in (True, False):
        found = trial.try_out(address, [artifact], exams=[trial.Exam(data(20), "samples")], runs=2)
        assert bool(copied) is expected, copied
        assert found.scores[0][0].metric is not None
        copied.clear()
    assert not parts(there)


def test_two_artifacts_are_timed_there_in_one_run(
    server: sshd.Server, there: Path, artifact: Path, tmp_path: Path
) -> None:
    small_artifact(tmp_path / "other")
    address = server.address(there, python=sys.executable)
    said = enter(f"benchmark --runs 3 --json --device {address} --against", tmp_path / "other", artifact)
    assert said.code == 0, said.err
    result = json.loads(said.out)
    assert len(result["files"]) == 4
    assert {"of": "out int8", "over": "other int8"}.items() <= result["ratios"][-1].items()


# ------------------------------------------------------------------ shells

PICKY = """\
#!/bin/sh
# stand-in for csh and fish: refuses what they read otherwise than sh between quotes
case $2 in
    *'!'*) echo "x: Event not found." >&2; exit 1;;
    *'
'*) echo "Unmatched '." >&2; exit 1;;
    *'\\\\'*) echo "two backslashes" >&2; exit 1;;
esac
exec sh "$@"
"""
COMMANDS = (
    "echo one; echo 'two'\necho \"three\" >&2\nexit 3",
    "printf '%s\\n' 'a\\\\b' \"it's\" '!x !! a!b' '$HOME `id`' 'tab\there ü € 100%d' '{a,b} ~ * [x (y) ^a^b #no;&|<>'",
    "# a comment\nset -e\nfalse\necho not here",
    "cat",
)


@pytest.mark.parametrize("shell", ["csh", "tcsh", "fish", "stand-in"])
def test_commands_mean_the_same_whatever_shell_the_user_logs_in_with(
    shell: str, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = shutil.which(shell)
    if shell == "stand-in":
        (tmp_path / "picky").write_text(PICKY)
        (tmp_path / "picky").chmod(0o755)
        program = str(tmp_path / "picky")
    if program is None:
        pytest.skip(f"no {shell} here")
    server = sshd.start(tmp_path / "sshd", shell=program)
    monkeypatch.setenv("DEPLOYKIT_SSH", server.client)
    try:
        with connect(parse(server.address(there, python=sys.executable))) as device:
            for command in COMMANDS:
                expected = subprocess.run(["sh", "-c", command], input=b"fed", capture_output=True)
                ran = device.run(command, b"fed")
                assert (ran.code, ran.out, ran.err) == (
                    expected.returncode, expected.stdout.decode(), expected.stderr.decode()
                )  # fmt: skip
            assert read_facts(device).python == sys.executable
            (tmp_path / "sent").write_bytes(bytes(range(256)))
            device.put(tmp_path / "sent", f"{there}/it's there! \\\\")
            device.get(f"{there}/it's there! \\\\", tmp_path / "back")
            assert (tmp_path / "back").read_bytes() == bytes(range(256))
    finally:
        server.stop()


# ------------------------------------------------------------------ doors that do not open


def refused(address: str, artifact: Path, tmp_path: Path, *said: str) -> Said:
    """The command ends with 2 and those words, and leaves nothing behind here."""
    before = contents(artifact)
    found = enter(f"benchmark --device {address}", artifact)
    assert found.code == 2, found.err
    for words in said:
        assert words in found.err, found.err
    assert contents(artifact) == before
    assert found.out == ""
    return found


def test_nobody_answers(server: sshd.Server, there: Path, artifact: Path, tmp_path: Path) -> None:
    address = server.address(there)
    server.stop()
    refused(address, artifact, tmp_path, "cannot be reached", "Connection refused", "does sshd run", "ssh -p")
    refused("ssh://no-such-host.invalid", artifact, tmp_path, "no host of that name")


def test_an_unknown_host_key_is_no_reason_to_trust(
    server: sshd.Server, there: Path, artifact: Path, tmp_path: Path
) -> None:
    known = tmp_path / "sshd" / "known_hosts"
    known.write_text("")
    refused(server.address(there), artifact, tmp_path, "host key", "not known here", "Log in once by hand", "ssh -p")
    assert known.read_text() == ""
    assert not there.exists()


def test_a_host_key_that_has_changed_is_an_alarm(
    server: sshd.Server, there: Path, artifact: Path, tmp_path: Path
) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
    known = tmp_path / "sshd" / "known_hosts"
    known.write_text(f"[127.0.0.1]:{server.port} {(tmp_path / 'other.pub').read_text()}")
    refused(server.address(there), artifact, tmp_path, "another host key", "ssh-keygen -R '[127.0.0.1]:")


def test_a_key_that_is_not_accepted_is_named_without_asking_for_a_password(
    server: sshd.Server, there: Path, artifact: Path, tmp_path: Path
) -> None:
    (tmp_path / "sshd" / "authorized_keys").write_text("")
    refused(server.address(there), artifact, tmp_path, "accepts none of our keys", "ssh-copy-id")


def test_an_export_is_refused_before_any_work_if_the_device_is(
    server: sshd.Server, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    evaluation(tmp_path)
    address = server.address(there, python=sys.executable)
    lacking = enter(f"export net.py:build --target jetson --calib eval.npz --device {address} -o out")
    assert lacking.code == 2 and "sudo apt install tensorrt" in lacking.err
    server.stop()
    gone = enter(f"export net.py:build --target x86 --calib eval.npz --device {address} -o out")
    assert gone.code == 2 and "cannot be reached" in gone.err
    assert not Path("out").exists() and not [p for p in tmp_path.iterdir() if "deploykit" in p.name]


def test_a_device_without_a_runtime_says_what_to_install_for_each_artifact(
    server: sshd.Server, there: Path, artifact: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "python3"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # no site-packages
    bare.chmod(0o755)
    small_artifact(tmp_path / "phone", "mobile-arm")
    address = server.address(there, python=bare)
    found = refused(
        f"{address} --against {tmp_path / 'phone'}", artifact, tmp_path,
        f"{artifact} (onnx): ", "pip install numpy onnxruntime", "(tflite): ", "pip install numpy ai-edge-litert",
    )  # fmt: skip
    assert "Traceback" not in found.err
    assert [p for p in there.rglob("*") if p.is_file()] == []


def test_a_full_disk_there_is_an_error_and_keeps_no_part(
    there: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a full disk: the server may write no file of more than 4 kB (ulimit -f)."""
    server = sshd.start(tmp_path / "sshd", before="ulimit -f 8")
    monkeypatch.setenv("DEPLOYKIT_SSH", server.client)
    try:
        refused(
            server.address(there, python=sys.executable), artifact, tmp_path, "cannot take", "No part of it stays there"
        )
    finally:
        server.stop()
    assert not parts(there)
    assert "deploykit_run.py" not in {p.name for p in there.rglob("*")}  # it has more


# ------------------------------------------------------------------ the cable


def test_a_copy_that_is_cut_leaves_nothing_under_its_name(server: sshd.Server, there: Path, tmp_path: Path) -> None:
    there.mkdir()
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(400_000_000)
    with connect(parse(server.address(there))) as device:
        watching = when(lambda: parts(there), server.kill)
        with pytest.raises(Lost, match="No file is half-written"):
            device.put(large, f"{there}/model")
        watching.join()
    assert wait(lambda: not any(there.iterdir())), list(there.iterdir())


def test_an_evaluation_that_is_cut_goes_on_where_it_stopped(
    server: sshd.Server, there: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "SAMPLES", 10)
    folder = tmp_path / "out"
    small_artifact(folder)
    before = contents(folder)
    path = evaluation(tmp_path, 40)
    command = f"benchmark --runs 2 --record --eval {path} --device "

    def done() -> list[Path]:
        return sorted(p for p in there.rglob("answers/*") if p.suffix != ".part")

    watching = when(lambda: len(done()) >= 3, server.kill)
    said = enter(command + server.address(there, python=sys.executable), folder)
    watching.join()
    assert said.code == 2, said.err
    assert "ended before the work was done" in said.err and "Run the same command again" in said.err
    assert contents(folder) == before  # nothing half-written here,
    assert wait(lambda: not parts(there) and not running_below(there))  # nor there, and nothing runs on
    assert all_whole(there)
    first = {p: p.stat().st_mtime_ns for p in done()}
    assert 3 <= len(first) < 8

    again = sshd.start(tmp_path / "sshd")
    monkeypatch.setenv("DEPLOYKIT_SSH", again.client)
    try:
        said = enter(command + again.address(there, python=sys.executable), folder)
    finally:
        again.stop()
    assert said.code == 0, said.err
    assert len(done()) == 8
    assert {p: p.stat().st_mtime_ns for p in first} == first  # what was done was not done again
    whole = trial.try_out(f"local?dir={tmp_path / 'here'}", [folder], exams=[trial.Exam(data(40), "x")], time=False)
    answered = [s for s in load_manifest(folder).scores if "answered on" in s.data]
    assert [s.metric for s in answered] == [s.metric for s in whole.scores[0]]


def test_an_export_that_is_cut_keeps_what_was_made_here_and_says_how_to_go_on(
    server: sshd.Server, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    evaluation(tmp_path)
    address = server.address(there, python=sys.executable)
    watching = when(lambda: list(there.rglob("model.*")), server.kill)
    said = enter(f"export net.py:build --target x86 --calib eval.npz --eval eval.npz --device {address} -o out")
    watching.join()
    assert said.code == 2
    assert "written and checked on this machine" in said.err
    assert f"deploykit benchmark out --device '{address}' --record" in said.err
    assert load_manifest(tmp_path / "out").device is None
    assert not [p for p in tmp_path.iterdir() if "deploykit" in p.name]

    again = sshd.start(tmp_path / "sshd")
    monkeypatch.setenv("DEPLOYKIT_SSH", again.client)
    try:
        said = enter(f"benchmark out --runs 2 --record --device {again.address(there, python=sys.executable)}")
    finally:
        again.stop()
    assert said.code == 0, said.err
    manifest = load_manifest(tmp_path / "out")
    assert manifest.device is not None
    assert [s.precision for s in manifest.scores if "eval.npz, answered on" in s.data] == ["fp32", "int8"]
    assert all(s.agreement is not None for s in manifest.scores)


def test_a_connection_that_nobody_holds_any_more_ends_what_runs_there(
    server: sshd.Server, there: Path, artifact: Path
) -> None:
    """The process that asked is killed in the middle of a sustained run."""
    address = server.address(there, python=sys.executable)
    argv = [sys.executable, "-m", "deploykit", "benchmark", str(artifact), "--sustained", "5", "--device", address]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    asking = subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert any(wait(lambda: running_below(there)) for _ in range(6))
    finally:
        asking.kill()
        asking.wait()
    assert wait(lambda: not running_below(there))


def test_an_answer_of_the_device_itself_is_no_lost_connection(server: sshd.Server, there: Path) -> None:
    with connect(parse(server.address(there))) as device:
        assert device.run("echo out; echo err >&2; exit 3").code == 3
        assert device.run("cat", b"fed").out == "fed"
        with pytest.raises(DeploykitError, match="No such file"):
            device.get(f"{there}/nothing", there.parent / "nothing")
    assert not (there.parent / "nothing").exists()
