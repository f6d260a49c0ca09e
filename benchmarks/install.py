"""What a newcomer meets: the size of the base install, the time of ``--help``, and the README's two commands.

python -m benchmarks.install base help     # minutes
python -m benchmarks.install fresh         # clones the repository, runs `make demo` and `make test` there
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.rows import Row, record

REPOSITORY = Path(__file__).resolve().parents[1]
COMMAND = "python -m benchmarks.install"
HELP = (
    "import sys\nfrom deploykit.cli import main\n"
    "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
    "print('LOADED', *[m for m in ('torch', 'onnx', 'onnxruntime') if m in sys.modules])"
)


def base() -> None:
    """Megabytes and packages that the base install adds to torch and numpy, in a fresh environment."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [f"{folder}/bin/pip", "install", "--quiet", "--constraint", str(REPOSITORY / "constraints.txt")]
        subprocess.run([*pip, "torch", "numpy"], check=True)
        before = _installed(Path(folder))
        clone = f"{folder}/clone"  # building leaves files behind
        subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), clone], check=True)
        subprocess.run([*pip, clone], check=True)
        after = _installed(Path(folder))
    added = sorted(set(after[1]) - set(before[1]) - {"deploykit"})
    megabytes = (after[0] - before[0]) / 1e6
    record(
        "road",
        [
            Row("Base install over torch and numpy: MB", megabytes, 160.0, "lower", "fresh venv", f"{COMMAND} base",
                neighbour="ONNX Runtime's tools 113, NNCF 454, Olive 468, modelopt[onnx] 1048"),
            Row("Base install over torch and numpy: packages", float(len(added)), 22.0, "lower", "fresh venv",
                f"{COMMAND} base", note=", ".join(added)),
        ],
    )  # fmt: skip


def _installed(folder: Path) -> tuple[int, list[str]]:
    """Bytes on disk of the packages (their bytecode not counted twice), and their names."""
    packages = next(folder.glob("lib/python*/site-packages"))
    size = sum(p.stat().st_size for p in packages.rglob("*") if p.is_file() and not p.is_symlink())
    listing = subprocess.run(
        [f"{folder}/bin/pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    )
    return size, [line.partition("==")[0] for line in listing.stdout.splitlines()]


def help_() -> None:
    """CPU seconds of ``deploykit --help`` (median of 7), and how many heavy packages it loads."""
    seconds, loaded = [], 0
    for _ in range(7):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, cwd=REPOSITORY, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        loaded = len(done.stdout.splitlines()[-1].split()) - 1
    record(
        "road",
        [
            Row("deploykit --help: CPU seconds", sorted(seconds)[3], 0.3, "lower", "7 runs", f"{COMMAND} help"),
            Row("deploykit --help: of torch, onnx and onnxruntime, loaded", float(loaded), 0.0, "lower", "7 runs",
                f"{COMMAND} help"),
        ],
    )  # fmt: skip


def fresh() -> None:
    """Minutes of ``make demo`` (with the install) and then of ``make test``, in a fresh clone."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "deploykit"
        subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(clone)], check=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "MAKE"))}
        for command, claim in (
            ("demo", "make demo in a fresh clone, install included: minutes"),
            ("test", "make test after the install: minutes"),
        ):
            started = time.perf_counter()
            subprocess.run(["make", command], cwd=clone, check=True, env=environment)
            minutes = (time.perf_counter() - started) / 60
            record("road", [Row(claim, minutes, 10.0, "lower", "fresh clone", f"{COMMAND} fresh")])


PARTS = {"base": base, "help": help_, "fresh": fresh}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    for part in parser.parse_args().parts:
        PARTS[part]()


if __name__ == "__main__":
    main()
