"""The files of an artifact packed beside themselves, and what that saves, for its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deploykit.core import artifact
from deploykit.core.manifest import Finding
from deploykit.core.progress import say, status
from deploykit.dkz.extents import KNOWN
from deploykit.dkz.files import Packed, pack_file

STEP = "pack"


def pack_artifact(folder: Path, files: Sequence[artifact.File]) -> tuple[Finding, ...]:
    """Writes ``NAME.dkz`` beside every file whose weights are known.

    Returns:
        What each takes stored, decoded and while it is decoded; and of each its weights after pruning, sharing and
        coding. Nothing, with a line on stderr, where no file is of such a kind.
    """
    paths = [folder / file.path for file in files if Path(file.path).suffix in KNOWN]
    if not paths:
        written = ", ".join(file.path for file in files)
        say(
            f"{written} is not packed: weights are known of {', '.join(KNOWN)} files. C keeps them coded with "
            'weights = "coded" in the [options] of a target.'
        )
        return ()
    made = []
    for path in paths:
        with status(f"packing {path.name}"):
            made.append(pack_file(path))
    return _sizes(made), *(_stages(packed) for packed in made)


def _sizes(made: Sequence[Packed]) -> Finding:
    rows = tuple(
        (p.path.name, p.stored, p.whole, p.whole / max(1, p.stored), p.peak, ", ".join(_coders(p))) for p in made
    )
    columns = "file", "bytes stored", "bytes decoded", "times smaller", "bytes of memory while decoding", "coder"
    summary = "packed without loss: " + ", ".join(
        f"{name} {size:,} bytes ({times:.1f}x)" for name, size, _, times, *_ in rows
    )
    return Finding(
        STEP, "Packed without loss: `deploykit unpack` gives the same bytes back", columns, rows, summary=summary
    )


def _coders(packed: Packed) -> list[str]:
    return sorted({stage.coder for stage in packed.layers if stage.coder})


def _stages(packed: Packed) -> Finding:
    rows = tuple(
        (s.name, s.count, s.kept, s.before, s.index_bits, s.code_bits, s.pruned, s.shared, s.coded, s.coder)
        for s in packed.layers
    )
    columns = (
        "weight", "values", "not zero %", "bytes", "gap bits", "code bits", "pruned", "+ shared", "+ coded", "coder",
    )  # fmt: skip
    before, *sums = (sum(getattr(s, name) for s in packed.layers) for name in ("before", "pruned", "shared", "coded"))
    times = " -> ".join(f"{before / max(1, size):.1f}x" for size in sums)
    title = f"{packed.path.name}: pruned -> + sharing -> + coding: {times}"
    return Finding(STEP, title, columns, rows)
