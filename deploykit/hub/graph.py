"""`FloatGraph` and `Hub`: the two graphs of the project, as values."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from deploykit.core.artifact import Island, TensorSpec
from deploykit.core.manifest import Finding
from deploykit.core.ranges import Ranges
from deploykit.core.target import QuantSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray


OPSET, IR_VERSION = 21, 10
"""The first operator set with integers of 4 and 16 bits and with blocks, and the version of files that goes with it."""
LARGE = 1024
"""Constants with more elements than this are weights, never shapes."""


@dataclass(frozen=True)
class FloatGraph:
    """A float ONNX graph, BN folded, constants folded, nodes in topological order. Never changed in place.

    ``masks``: weight initializer name -> where the weight lives (False: a zero that stays zero).
    """

    model: ir.Model
    masks: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> bytes:
        """The serialized model, the same for equal graphs."""
        return serialize(self.model)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over weights and structure, first 16 hex digits; the same for equal graphs."""
        digest = hashlib.sha256()
        structure = self.model.clone()
        for name, value in sorted(self.model.graph.initializers.items()):
            array = constant(value)
            assert array is not None
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
            structure.graph.initializers[name].const_value = None
        structure.graph.initializers.clear()
        digest.update(serialize(structure))
        return digest.hexdigest()[:16]

    @property
    def batch(self) -> int | None:
        """How many samples it takes at once; None: any number."""
        first = [v.shape[0] for v in self.model.graph.inputs if v.shape is not None and len(v.shape) > 0]
        return next((d for d in first if isinstance(d, int)), None)

    def copy(self) -> ir.Model:
        """A model that may be changed."""
        copied = self.model.clone()
        copied.graph.meta.pop(NAMES, None)
        return copied


@dataclass(frozen=True)
class Decision:
    """What became of one operator when the graph was quantized."""

    operator: str
    layer: str
    quantized: bool
    why: str = ""
    """Why it stayed in float; empty for integer operators and for those that only move data."""


@dataclass(frozen=True)
class Hub:
    """The one quantized graph of a `QuantSpec`, with the float graph and the ranges it came from.

    ``quantized`` is the Q/DQ graph (None: nothing was calibrated, only float files can be written). Its form:

    * activations: ``v -> QuantizeLinear -> v_q -> DequantizeLinear -> v_dq -> consumers``, scalar scale and zero point;
    * weights: int8 initializer ``-> DequantizeLinear(axis)``; biases: int32 initializer ``-> DequantizeLinear(axis 0)``
      with scale s_x*s_w (or a float initializer, where the spec says so);
    * an operator and the Relu or Clip fused with it stand between one DequantizeLinear and one QuantizeLinear.
    """

    graph: FloatGraph
    spec: QuantSpec
    quantized: ir.Model | None = None
    ranges: Ranges | None = None
    decisions: tuple[Decision, ...] = ()
    weights: Mapping[str, str] = field(default_factory=dict)
    """Integer weight initializer -> the float graph's weight it came from."""
    bits: Mapping[str, int] = field(default_factory=dict)
    """Integer weight initializer -> its bits, where they are not the spec's (mixed precision)."""
    findings: tuple[Finding, ...] = ()
    """What the steps that it went through found out, for the report."""
    samples: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """A few real inputs by name, stacked, for exporters that ship inputs with expected outputs; may be empty."""

    @property
    def bytes(self) -> bytes:
        """The serialized Q/DQ model."""
        if self.quantized is None:
            raise ValueError("this hub has no quantized graph")
        return serialize(self.quantized)

    def spec_of(self, weight: str) -> QuantSpec:
        """The spec as it holds for one integer weight initializer."""
        return replace(self.spec, weight_bits=self.bits[weight]) if weight in self.bits else self.spec

    def counts(self) -> dict[str, int]:
        """How many operators of each kind are integer."""
        return dict(sorted(Counter(d.operator for d in self.decisions if d.quantized).items()))

    def islands(self) -> tuple[Island, ...]:
        """The operators that stayed in float, and why."""
        return tuple(Island(d.operator, d.layer, d.why) for d in self.decisions if not d.quantized)


def serialize(model: ir.Model) -> bytes:
    """Protobuf bytes, deterministic."""
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The array behind an initializer (or Constant node), or None."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


NAMES = "deploykit.names"
"""Where a graph that is being changed keeps the set of its names."""


def fresh_name(graph: ir.Graph, wanted: str) -> str:
    """The wanted name, or that name with a number: nothing else in the graph is called so."""
    if NAMES not in graph.meta:
        values = [*graph.inputs, *(v for node in graph for v in node.outputs)]
        graph.meta[NAMES] = {v.name for v in values} | {node.name for node in graph} | set(graph.initializers)
    return take_name(wanted, graph.meta[NAMES])


def take_name(wanted: str, taken: set[str | None]) -> str:
    """The wanted name, or that name with the first free number; it is added to ``taken``."""
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    taken.add(name)
    return name


def add_initializer(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """Registers an array under a name that is not taken yet, and returns its value."""
    return register(graph, name, ir.Tensor(np.asarray(array)))


def register(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Registers a constant under a name that is not taken yet, and returns its value."""
    tensor.name = fresh_name(graph, name)
    value = ir.Value(
        name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy())
    )
    graph.register_initializer(value)
    return value


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The Python value of an attribute; ints stay ints, lists become lists, strings str."""
    found = node.attributes.get(name)
    if found is None:
        return default
    value = found.value
    return list(value) if isinstance(value, (tuple, list)) else value


def specs(values: Iterator[ir.Value] | list[ir.Value]) -> tuple[TensorSpec, ...]:
    """Names, shapes and dtypes of graph inputs or outputs."""
    found = []
    for v in values:
        shape = tuple(d if isinstance(d, int) else str(d) for d in v.shape) if v.shape is not None else ()
        dtype = v.dtype.numpy().name if v.dtype is not None else "float32"
        found.append(TensorSpec(v.name or "", shape, dtype))
    return tuple(found)


def drop_unused(graph: ir.Graph) -> None:
    """Removes nodes nobody reads, then initializers nobody reads."""
    outputs = {id(o) for o in graph.outputs}
    for node in reversed(list(graph)):
        if not any(id(v) in outputs or list(v.uses()) for v in node.outputs):
            graph.remove(node, safe=True)
    for name in [n for n, v in graph.initializers.items() if not list(v.uses()) and id(v) not in outputs]:
        del graph.initializers[name]
