"""What `doctor` finds: by metadata and PATH alone, and with the command that brings what is missing."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
from commands import enter

from deploykit import doctor, targets
from deploykit.core import machine
from deploykit.doctor import PACKAGES, TOOLS, diagnose, fitting_target

ROOT = Path(__file__).parents[1]
CASCADE_LAKE = "processor\t: 0\nmodel name\t: Xeon\nflags\t\t: fpu avx2 avx512f avx512_vnni\n\nprocessor\t: 1\n"
HASWELL = "processor\t: 0\nmodel name\t: Core i7\nflags\t\t: fpu sse2 avx2\n"
PI = "processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm asimdhp asimddp\n"


def on(monkeypatch: pytest.MonkeyPatch, cpuinfo: str) -> None:
    """As if Linux told this about the processor."""

    def read(path: Path, **_: object) -> str:
        assert str(path) == "/proc/cpuinfo"
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read)


@pytest.mark.parametrize(
    ("cpuinfo", "features"),
    [(CASCADE_LAKE, ("avx2", "avx512", "avx512-vnni")), (HASWELL, ("avx2",)), (PI, ("neon", "dotprod", "fp16"))],
)
def test_vector_extensions_are_read_from_linux(
    monkeypatch: pytest.MonkeyPatch, cpuinfo: str, features: tuple[str, ...]
) -> None:
    on(monkeypatch, cpuinfo)
    assert machine.features() == features
    assert machine.processor() in ("Xeon", "Core i7") or cpuinfo == PI


@pytest.mark.parametrize(
    ("where", "features", "target"),
    [
        ("x86_64", ("avx2", "avx512", "avx512-vnni"), "x86"),
        ("x86_64", ("avx2", "avx-vnni"), "x86"),
        ("x86_64", ("avx2", "avx512"), "x86-avx2"),  # Skylake-X: AVX-512 without VNNI saturates too
        ("x86_64", ("avx2",), "x86-avx2"),
        ("x86_64", (), "x86-avx2"),
        ("aarch64", ("neon",), ""),
    ],
)
def test_the_target_that_fits_does_not_saturate(where: str, features: tuple[str, ...], target: str) -> None:
    found, why = fitting_target(where, features)
    assert found == target
    assert bool(why) == bool(target)
    assert not target or target in targets.names()


def test_what_is_missing_comes_with_what_it_enables_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    said = enter("doctor")
    assert said.code == 0
    _, _, missing = said.out.partition(
        "\nnot here (pip adds an extra to the deploykit of this environment, from any folder):\n"
    )
    assert len(missing.splitlines()) == len(PACKAGES) + len(TOOLS)
    assert any(line.startswith("adb ") and line.endswith(": apt install adb") for line in missing.splitlines())
    assert any("accelerate" in line and "pip install 'deploykit[train]'" in line for line in missing.splitlines())
    found = json.loads(enter("doctor --json").out)
    assert all(f["found"] is None and f["enables"] and f["get"] for f in found["packages"] + found["tools"])


def test_every_extra_that_is_named_exists() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for wanted in PACKAGES:
        _, _, extra = wanted.get.partition("deploykit[")
        assert not extra or f"\n{extra.rstrip(chr(39)).rstrip(']')} = [" in project


def test_every_extra_that_is_named_is_in_the_table_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    extras = [w.get.partition("deploykit[")[2].partition("]")[0] for w in PACKAGES if "deploykit[" in w.get]
    assert [e for e in extras if f"| `{e}` | " not in readme] == []


def test_any_name_of_a_tool_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/clang" if name == "clang" else None)
    tools = {f.name: f.found for f in diagnose().tools}
    assert tools["cc"] == "/usr/bin/clang" and tools["adb"] == ""
