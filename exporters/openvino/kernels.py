"""Which kernels the CPU plugin chose: what a file says about integers is one thing, what runs is another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploykit.core.artifact import Island
from deploykit.exporters.openvino.convert import WITHOUT_BIAS
from deploykit.hub.graph import Decision
from deploykit.hub.operators import PRODUCTS

INTEGERS = ("u8", "i8")
APPENDED = (WITHOUT_BIAS, "/Dequantization")
"""What the frontend and the plugin hang on to the names of operators they split."""


@dataclass(frozen=True)
class Kernel:
    """One node of the compiled network."""

    kind: str
    """OpenVINO's name, e.g. ``FullyConnected``; ``Subgraph`` is code generated for several operators at once."""
    reads: tuple[str, ...]
    """Types of what flows in: ``u8``, ``f32``."""
    writes: tuple[str, ...]
    weights: tuple[str, ...]
    """Types of the constants it reads."""

    @property
    def multiplies_integers(self) -> bool:
        """The first input decides; generated code multiplies integers where its weights still are some."""
        inner = self.kind == "Subgraph" and any(t in INTEGERS for t in self.weights)
        return inner or (bool(self.reads) and self.reads[0] in INTEGERS)

    @property
    def touches_integers(self) -> bool:
        """Whether integers flow in or out."""
        return any(t in INTEGERS for t in (*self.reads, *self.writes))


def kernels(compiled: Any) -> dict[str, Kernel]:
    """The kernel of every operator that the compiled network still has, by the operator's name in the file."""
    found: dict[str, Kernel] = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        about = {key: value.value for key, value in node.get_rt_info().items()}
        if about["layerType"] in ("Const", "Input", "Output"):
            continue
        sources = [(_type(i), _is_constant(i)) for i in node.inputs()]
        kernel = Kernel(
            str(about["layerType"]),
            tuple(t for t, held in sources if not held),
            tuple(str(about["outputPrecisions"]).split(",")),
            tuple(t for t, held in sources if held),
        )
        for name in str(about["originalLayersNames"]).split(","):
            for mark in APPENDED:
                name = name.partition(mark)[0]
            found.setdefault(name, kernel)
    return found


def judge(decisions: Sequence[Decision], run: Mapping[str, Kernel]) -> tuple[dict[str, int], tuple[Island, ...]]:
    """How many of the hub's operators run on integers, and why the others do not.

    Operators that were folded into their neighbours, as reshapes are, count as neither.
    """
    counts: Counter[str] = Counter()
    islands = []
    for d in decisions:
        kernel = run.get(d.layer)
        if not d.quantized:
            islands.append(Island(d.operator, d.layer, d.why))
        elif kernel is None:
            if d.operator in PRODUCTS:
                islands.append(Island(d.operator, d.layer, "OpenVINO's CPU plugin replaced it by something else"))
        elif kernel.multiplies_integers if d.operator in PRODUCTS else kernel.touches_integers:
            counts[d.operator] += 1
        else:
            islands.append(Island(d.operator, d.layer, "OpenVINO's CPU plugin computes it in float"))
    return dict(sorted(counts.items())), tuple(islands)


def _is_constant(tensor: Any) -> bool:
    about = tensor.get_source_output().get_node().get_rt_info()
    return bool(about["layerType"].value == "Const")


def _type(tensor: Any) -> str:
    short: str = tensor.get_element_type().get_type_name()
    return short
