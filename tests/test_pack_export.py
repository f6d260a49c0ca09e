"""``export --pack``: a .dkz beside every file whose weights are known, and what it saves in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import enter

from deploykit.core.manifest import Finding, Manifest, load_manifest
from deploykit.dkz.files import unpack_file

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    ).eval()
"""
RECIPE = """
[[step]]
name = "sparsify"
sparsity = 0.8

[[step]]
name = "share"
bits = 3
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("packed_net.py").write_text(NET)
    Path("small.toml").write_text(RECIPE)
    np.savez("calib.npz", input=np.random.default_rng(0).normal(size=(24, 3, 8, 8)).astype(np.float32))
    return tmp_path


def stages(manifest: Manifest, file: str) -> Finding:
    (found,) = (f for f in manifest.findings if f.step == "pack" and f.title.startswith(f"{file}.dkz"))
    return found


def column(found: Finding, name: str) -> list[Any]:
    return [row[found.columns.index(name)] for row in found.rows]


def test_files_are_packed_beside_themselves_and_the_report_has_every_stage(workplace: Path) -> None:
    said = enter("export packed_net.py:build --target x86 --calib calib.npz --pack --no-benchmark --recipe small.toml")
    assert said.code in (0, 3), said.err  # random weights with four fifths gone may fail the gate
    manifest = load_manifest(Path("out"))
    for file in manifest.files:
        packed = Path("out") / f"{file.path}.dkz"
        assert packed.name in {stored.path for stored in manifest.stored}
        unpack_file(packed, Path("again") / file.precision)
        assert (Path("again") / file.precision / file.path).read_bytes() == (Path("out") / file.path).read_bytes()
        found = stages(manifest, file.path)
        assert sum(column(found, "+ coded")) == packed.stat().st_size
    (sizes,) = (f for f in manifest.findings if f.title.startswith("Packed"))
    floats = next(row for row in sizes.rows if row[0] == "model.fp32.onnx.dkz")
    assert floats[1:3] == (Path("out/model.fp32.onnx.dkz").stat().st_size, Path("out/model.fp32.onnx").stat().st_size)
    assert enter("report out").code == 0
    assert "model.fp32.onnx.dkz" in (Path("out") / "report.html").read_text()
    assert enter("verify out").code in (0, 3)


def test_zeros_and_few_values_make_the_container_a_tenth_of_what_it_would_be(workplace: Path) -> None:
    enter(
        "export packed_net.py:build --target x86 --precision fp32 --input input=1x3x8x8 --pack --no-benchmark -o whole"
    )
    enter(
        "export packed_net.py:build --target x86 --precision fp32 --input input=1x3x8x8 --pack --no-benchmark -o small "
        "--recipe small.toml"
    )
    whole, small = (Path(name) / "model.fp32.onnx.dkz" for name in ("whole", "small"))
    assert small.stat().st_size < whole.stat().st_size / 8


def test_steps_that_make_files_smaller_pay_once_files_are_packed(workplace: Path) -> None:
    refused = enter("export packed_net.py:build --target jetson-orin-nano --calib calib.npz --recipe small.toml")
    assert refused.code == 2 and "cannot pay" in refused.err
    told = [
        {row["step"].split("(")[0]: row["applies"] for row in json.loads(enter(f"plan {pack} --json {rest}").out)}
        for pack in ("", "--pack")
        for rest in ["packed_net.py:build --target jetson-orin-nano --calib calib.npz --recipe small.toml"]
    ]
    assert [(t["Sparsify"], t["Share"]) for t in told] == [(False, False), (True, True)]


def test_c_is_not_packed_and_the_message_says_what_does_it_there(workplace: Path) -> None:
    said = enter("export packed_net.py:build --target cortex-m4 --calib calib.npz --pack --no-benchmark")
    assert said.code in (0, 3)
    assert "is not packed" in said.err and 'weights = "coded"' in said.err
    assert not list(Path("out").glob("*.dkz"))
