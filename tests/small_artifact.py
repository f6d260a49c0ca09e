"""A whole artifact folder in half a second: a residual net on 3 x 8 x 8 images, float and int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphs import images, measured, residual

from deploykit import exporters, targets
from deploykit.core.artifact import Check
from deploykit.core.manifest import Manifest, Score, Source, stored_files
from deploykit.core.request import Request
from deploykit.hub.graph import specs
from deploykit.hub.quantize import quantize
from deploykit.report import write_usage


def small_artifact(folder: Path, target: str = "x86", **changes: Any) -> Manifest:
    """Writes the artifact; ``changes`` are fields of its manifest."""
    folder.mkdir()
    profile = targets.load(target)
    graph, data = residual(), images()
    hub = quantize(graph, measured(graph, data), profile.quant)
    files = exporters.load(profile.exporter).export(dict.fromkeys(profile.precisions, hub), profile, folder)
    scores = [
        Score(p, 16, "eval", a, g, None, {"y": 30.0}) for p, a, g in (("original", 80.0, 100.0), ("int8", 79.5, 98.0))
    ]
    fields: dict[str, Any] = {
        "target": target,
        "exporter": profile.exporter,
        "model": "nets.py:small",
        "request": Request("nets.py:small", target),
        "steps": ("BiasCorrect(samples=64)",),
        "graph": graph.hash,
        "inputs": specs(list(graph.model.graph.inputs)),
        "outputs": specs(list(graph.model.graph.outputs)),
        "files": files,
        "data": {"calibration": Source("images", 16, data.hash)},
        "checks": (Check("agrees", "int8", 98.0, 90.0, True, "16 samples"),),
        "scores": tuple(scores),
        "versions": {"deploykit": "0.1.0"},
    }
    fields |= changes
    write_usage(folder, Manifest(stored=(), **fields))
    manifest = Manifest(stored=stored_files(folder), **fields)
    manifest.save(folder)
    return manifest
