"""`reproduce` of the demo's manifests, in a fresh clone: which files are not byte-identical."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.rows import Row, record

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "python -m benchmarks.wide_reproduce"


def fresh_clone(folder: Path) -> Path:
    """The last commit, cloned; what is not committed is not in it."""
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(folder)], check=True)
    return folder


def deploykit(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line of the clone, with this interpreter's packages; two threads of torch, as by default here."""
    environment = {**os.environ, "PYTHONPATH": str(clone)}
    command = [sys.executable, "-P", "-m", "deploykit", *arguments]
    return subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)


def differing(clone: Path, manifest: Path) -> list[str]:
    """What is not the same when a manifest is reproduced.

    Raises:
        RuntimeError: it could not be made again.
    """
    ran = deploykit(clone, "reproduce", str(manifest), "--json")
    if ran.returncode not in (0, 3):
        raise RuntimeError(f"{manifest}: {ran.stderr}")
    return list(json.loads(ran.stdout)["differing"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--here", action="store_true", help="this working tree instead of a clone; records nothing")
    here = parser.parse_args().here
    with tempfile.TemporaryDirectory() as folder:
        clone = ROOT if here else fresh_clone(Path(folder) / "clone")
        made = Path(folder) / "demo"
        demo = deploykit(clone, "demo", "-o", str(made))
        if demo.returncode:
            raise SystemExit(demo.stderr)
        found = {p.parent.name: differing(clone, p) for p in sorted(made.glob("*/manifest.json"))}
        files = {t: len(json.loads((made / t / "manifest.json").read_text())["stored"]) for t in found}
    for target, names in found.items():
        print(
            f"{target}: {len(names)} of {files[target]} files differ{': ' if names else ''}{'; '.join(names)}",
            flush=True,
        )
    if here:
        return
    record(
        "wide",
        [
            Row(
                "reproduce of the demo's manifests in a fresh clone: files that differ",
                float(sum(len(names) for names in found.values())), 0.0, "lower",
                "the demo's network, trained again for every manifest", COMMAND, [0],
                {f"files compared, {target}": float(n) for target, n in files.items()},
                note="every file of every artifact by its SHA-256, and the manifest without its timings",
            )
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
