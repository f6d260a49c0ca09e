"""Milliseconds operator by operator, where the runtime of this machine tells them: ONNX Runtime does.

Its profile names every kernel after the node it came from. A QuantizeLinear or DequantizeLinear that is left over turns
numbers from one kind into the other beside the operator that it is named after.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit import targets
from deploykit.core.artifact import File
from deploykit.core.manifest import Manifest

if TYPE_CHECKING:
    from numpy.typing import NDArray

RUNS, WARM = 20, 3
CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")
FUSED = ("Relu", "Clip")
LARGE = 0.05
"""Share of the whole call: conversions that take less are not worth a word."""


@dataclass(frozen=True)
class Own:
    """The time of one operator."""

    ms: float | None
    converting_ms: float
    runs_in: str
    """``"float"``, ``"integer"`` or empty: it has no kernel of its own."""
    whole_ms: float

    def slow(self, is_float: bool) -> list[str]:
        """Why it is slower than it could be."""
        found = []
        if self.runs_in == "float" and not is_float:
            found.append("the runtime has no integer kernel for it and runs it in float")
        if self.converting_ms >= LARGE * self.whole_ms:
            share = 100 * self.converting_ms / self.whole_ms
            found.append(f"{share:.0f} % of the call converts what it reads or writes")
        return found


@dataclass(frozen=True)
class Times:
    """What one call takes, kernel by kernel."""

    where: str
    kernels: Mapping[str, tuple[float, str]]
    """Layer -> milliseconds and what it computes in."""
    conversions: Mapping[str, float]
    """Layer -> milliseconds."""

    @property
    def whole_ms(self) -> float:
        """Of all kernels."""
        return sum(ms for ms, _ in self.kernels.values()) + sum(self.conversions.values())

    def of(self, layer: str) -> Own:
        """One operator's part."""
        ms, kind = self.kernels.get(layer, (None, ""))
        return Own(ms, self.conversions.get(layer, 0.0), kind, self.whole_ms)


def times(manifest: Manifest, file: File, folder: Path, inputs: Mapping[str, NDArray[Any]]) -> Times | None:
    """Of one sample on one thread; None: the file runs in another runtime, or times taken here are not the target's.

    Args:
        manifest: of the artifact.
        file: one of its files.
        folder: where it lies.
        inputs: samples as the file takes them; the first is run.
    """
    here = targets.load(manifest.target).measured_here if manifest.target in targets.names() else ""
    if manifest.exporter != "onnx" or not here:
        return None
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as work:
        options.profile_file_prefix = str(Path(work) / "profile")
        session = ort.InferenceSession(str(folder / file.path), options, providers=["CPUExecutionProvider"])
        for _ in range(RUNS + WARM):
            session.run(None, {i.name: inputs[i.name][:1] for i in session.get_inputs()})
        events = json.loads(Path(session.end_profiling()).read_text())
    return _read(
        events,
        _beside(folder / file.path),
        f"onnxruntime {ort.__version__} on this machine, 1 thread, median of {RUNS} calls",
    )


def _read(events: list[dict[str, Any]], beside: Mapping[str, str], where: str) -> Times:
    """Times from a profile's events; ``beside``: conversion -> the operator it stands beside."""
    durations: dict[tuple[str, str, str], list[float]] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        name = re.sub(r"(_token_\d+|_nchwc)?_kernel_time$", "", event["name"])
        read = event["args"].get("input_type_shape") or [{}]
        key = name, event["args"]["op_name"], next(iter(read[0]), "")
        durations.setdefault(key, []).append(event["dur"] / 1000.0)
    kernels: dict[str, tuple[float, str]] = {}
    conversions: dict[str, float] = {}
    for (name, kind, read_type), found in durations.items():
        ms = statistics.median(found[WARM:] or found)
        if kind in CONVERSIONS:
            layer = beside.get(name, name)
            conversions[layer] = conversions.get(layer, 0.0) + ms
        else:
            before, _ = kernels.get(name, (0.0, ""))
            kernels[name] = before + ms, "float" if read_type.startswith("float") else "integer"
    return Times(where, kernels, conversions)


def _beside(path: Path) -> dict[str, str]:
    """Conversion -> the operator that computes in float beside it: what wrote its floats, or what reads them."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    writer = {name: node for node in graph.node for name in node.output}
    reader: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        for name in node.input:
            reader.setdefault(name, node)

    def wrote(name: str) -> str:
        node = writer.get(name)
        while node is not None and node.op_type in (*CONVERSIONS, *FUSED):
            node = writer.get(node.input[0])
        return node.name if node is not None else ""

    def reads(name: str) -> str:
        node = reader.get(name)
        while node is not None and node.op_type in CONVERSIONS:
            node = reader.get(node.output[0])
        return node.name if node is not None else ""

    found = {}
    for node in graph.node:
        if node.op_type in CONVERSIONS:
            near = (wrote(node.input[0]), reads(node.output[0]))
            found[node.name] = next(filter(None, near if node.op_type == "QuantizeLinear" else near[::-1]), node.name)
    return found
