from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deploykit.core.errors import DeploykitError
from deploykit.core.files import folder_in_place, no_such_file, refuse_existing, refuse_taken, write_in_place


def write(destination: Path, text: str, overwrite: bool = False) -> None:
    with folder_in_place(destination, overwrite) as work:
        (work / "f").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_folder_appears_complete_and_alone(tmp_path: Path) -> None:
    with folder_in_place(tmp_path / "deep" / "out") as work:
        (work / "f").write_text("new")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "f").read_text() == "new"
    assert names(tmp_path / "deep") == ["out"]


def test_an_existing_destination_is_refused_without_overwrite(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(DeploykitError, match="already exists"):
        write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "f").read_text() == "old"


def test_overwrite_replaces_everything(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "more").write_text("old")
    write(tmp_path / "out", "new", overwrite=True)
    assert names(tmp_path / "out") == ["f"] and (tmp_path / "out" / "f").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(ZeroDivisionError), folder_in_place(tmp_path / "out", overwrite=True) as work:
        (work / "f").write_text("half")
        _ = 1 / 0
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "f").read_text() == "old"


def test_a_file_is_never_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(DeploykitError, match="is a file"):
        write(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out").read_text() == "precious"


def test_a_folder_of_somebody_elses_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "precious")
    with pytest.raises(DeploykitError, match=r"has files that deploykit did not write \(f\)"):
        refuse_taken(out, overwrite=True)
    refuse_taken(out, overwrite=True, written=["f", "g"])
    (out / "manifest.json").write_text("{}")
    refuse_taken(out, overwrite=True)
    refuse_taken(tmp_path, overwrite=True)  # nothing but folders of ours
    (tmp_path / "note").write_text("precious")
    with pytest.raises(DeploykitError, match=r"\(note\)"):
        refuse_taken(tmp_path, overwrite=True)
    (tmp_path / "empty").mkdir()
    refuse_taken(tmp_path / "empty", overwrite=True)


def test_a_link_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "real", "old")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    write(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out").is_symlink() and (tmp_path / "real" / "f").read_text() == "new"
    assert names(tmp_path) == ["out", "real"]


def test_a_full_disk_is_the_users_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DeploykitError, match="No space left on device"), folder_in_place(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(tmp_path) == []


def test_a_file_that_cannot_be_read_elsewhere_is_not_blamed_on_the_destination(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), folder_in_place(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/weights")


def test_a_destination_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(DeploykitError, match="cannot write"):
        write(tmp_path / "f" / "out", "new")


KILLED = """
import os, signal, sys
from pathlib import Path
from deploykit.core.files import folder_in_place
real, calls = os.rename, 0
def rename(*a, **k):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(*a, **k)
os.rename = rename
with folder_in_place(Path(sys.argv[1]), overwrite=True) as work:
    (work / "f").write_text("new")
    if sys.argv[2] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("kill_at", "left"), [(0, "old"), (1, "old"), (2, None)])
def test_a_killed_process_leaves_old_or_nothing_and_the_next_run_tidies_up(
    tmp_path: Path, kill_at: int, left: str | None
) -> None:
    """0: killed while writing; 1: before the old folder is moved aside; 2: before the new one is moved in."""
    out = tmp_path / "out"
    write(out, "old")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(out), str(kill_at)], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert (out / "f").read_text() == left if left else not out.exists()
    with pytest.raises(DeploykitError, match="already exists"):  # the old one is back, and still protected
        refuse_existing(out, overwrite=False)
    assert names(tmp_path) == ["out"] and (out / "f").read_text() == "old"
    write(out, "newer", overwrite=True)
    assert names(tmp_path) == ["out"] and (out / "f").read_text() == "newer"


def test_only_our_own_leftovers_are_tidied_up(tmp_path: Path) -> None:
    mine = [".out.backup", ".out.d", ".out.1", ".out.deploykit-notes", ".out2.deploykit-abcdefgh.999999999"]
    for name in mine:
        (tmp_path / name).mkdir()
    (tmp_path / f".out.deploykit-abcdefgh.{os.getpid()}").mkdir()  # its process lives
    (tmp_path / ".out.deploykit-abcdefgh.999999999").mkdir()
    write(tmp_path / "out", "new")
    assert names(tmp_path) == sorted([*mine, f".out.deploykit-abcdefgh.{os.getpid()}", "out"])


@pytest.mark.parametrize("name", ["out[1]", "a*b", "ä ö", "out.v2", "-x"])
def test_any_name_may_be_a_destination(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, "old")
    write(tmp_path / name, "new", overwrite=True)
    assert names(tmp_path) == [name]


def test_a_text_file_appears_complete(tmp_path: Path) -> None:
    write_in_place(tmp_path / "deep" / "r.json", "{}")
    write_in_place(tmp_path / "deep" / "r.json", "ä")
    assert (tmp_path / "deep" / "r.json").read_text(encoding="utf-8") == "ä" and names(tmp_path / "deep") == ["r.json"]
    with pytest.raises(DeploykitError, match="cannot write"):
        write_in_place(tmp_path / "deep", "x")
    assert names(tmp_path) == ["deep"]


def test_a_missing_file_is_answered_with_the_nearest_of_its_kind(tmp_path: Path) -> None:
    for name in ("resnet.py", "resnet.pt"):
        (tmp_path / name).write_text("")
    assert str(no_such_file(tmp_path / "resnett.py")).endswith("resnett.py. Did you mean 'resnet.py'?")
    assert str(no_such_file(tmp_path / "zzz.py")).endswith("zzz.py.")
    assert "there is no folder" in str(no_such_file(tmp_path / "no" / "resnet.py"))


def test_a_missing_folder_is_answered_with_the_nearest_folder(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    assert str(no_such_file(tmp_path / "sample")) == f"no file or folder {tmp_path}/sample. Did you mean 'samples'?"


@pytest.mark.parametrize("name", ["nope.toml", "nosuch.safetensors"])
def test_names_that_only_share_their_kind_are_not_suggested(tmp_path: Path, name: str) -> None:
    for other in ("p1.toml", "net.safetensors"):
        (tmp_path / other).write_text("")
    assert "Did you mean" not in str(no_such_file(tmp_path / name))
