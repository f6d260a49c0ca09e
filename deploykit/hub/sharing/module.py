"""A float graph whose weights share values as a torch module, so that those values can be trained.

The gradient of a shared value is the sum of those of all its weights (Han et al. 2016, "Deep Compression", section
3.3), which is what reading them out of a codebook gives. Codes stay, and so do zeros and weights that share nothing;
biases and normalisation are trained along. As in `deploykit.hub.training.module` parameters count in units in which a
step of an optimizer means the same for all, and start at 0, where the graph is as it came.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from deploykit.hub.graph import FloatGraph
from deploykit.hub.operators import PRODUCTS
from deploykit.hub.sharing.codebooks import Codebook, with_weights
from deploykit.hub.training.graph import as_tensor, key, read_nodes
from deploykit.hub.training.module import PARAMETER_READERS
from deploykit.hub.training.operators import MEANING, refuse_untrainable


class SharedModule(nn.Module):
    """Runs a float graph in torch; called with inputs by name, returns outputs by name.

    Args:
        graph: not changed.
        books: by initializer, of the weights whose values are trained.

    Raises:
        DeploykitError: operators without a meaning in torch (all of them are named).
    """

    def __init__(self, graph: FloatGraph, books: Mapping[str, Codebook]) -> None:
        """Builds parameters and constants from the graph."""
        super().__init__()
        self.graph, self.books = graph, dict(books)
        model = onnx.load_model_from_string(graph.bytes).graph
        self.nodes = read_nodes(model)
        refuse_untrainable((n.operator for n in self.nodes), "shared values")
        self.outputs = [o.name for o in model.output]
        arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.initializer}
        readers = {i for n in self.nodes if n.operator in PARAMETER_READERS for i in n.inputs}
        weights = {n.inputs[1] for n in self.nodes if n.operator in PRODUCTS}  # not shared: they stay as they are
        readers -= weights | set(books)
        self.free = [n for n, a in arrays.items() if n in readers and a.dtype == np.float32 and a.ndim >= 1]
        self.constants = [n for n in arrays if n not in self.books and n not in self.free]
        self.move = nn.ParameterDict()
        """How far values have moved, in their units."""
        for name, own in self.books.items():
            self._parameter(name, own.book, (own.book != 0).astype(np.float32))
            self._buffer(f"{name}.codes", own.codes)
        for name in self.free:
            held = graph.masks.get(name, np.ones_like(arrays[name], bool))
            self._parameter(name, arrays[name], (held & np.isfinite(arrays[name])).astype(np.float32))
        for name in self.constants:
            self._buffer(name, arrays[name])

    def _parameter(self, name: str, start: Any, moves: Any) -> None:
        """``moves``: 1 where it may, 0 where it stays."""
        size = np.sqrt(np.mean(np.square(start[moves > 0], dtype=np.float64))) if moves.any() else 0.0
        self.move[key(name)] = nn.Parameter(torch.zeros(start.shape))
        self._buffer(f"{name}.start", start)
        self._buffer(f"{name}.unit", moves * np.float32(min(size or 1.0, 1.0)))

    def _buffer(self, name: str, array: Any) -> None:
        self.register_buffer(key(name), as_tensor(array), persistent=False)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Outputs by name for inputs by name, each ``[n, ...]`` float32."""
        values: dict[str, Any] = {"": None, **inputs}
        values.update({name: getattr(self, key(name)) for name in self.constants})
        values.update({name: self.parameter(name) for name in self.free})
        values.update({name: self.weight(name) for name in self.books})
        for node in self.nodes:
            found = MEANING[node.operator](node.attributes, *[values.get(n) for n in node.inputs])
            for name, value in zip(node.outputs, found if isinstance(found, tuple) else (found,), strict=False):
                values[name] = value
        return {name: values[name] for name in self.outputs}

    def parameter(self, name: str) -> Tensor:
        """A free parameter, or the values of a codebook, as they are now."""
        start, unit = getattr(self, key(f"{name}.start")), getattr(self, key(f"{name}.unit"))
        found: Tensor = start + unit * self.move[key(name)]
        return found

    def weight(self, name: str) -> Tensor:
        """A shared weight as it is now."""
        codes: Tensor = getattr(self, key(f"{name}.codes"))
        return self.parameter(name).index_select(0, codes.reshape(-1)).reshape(codes.shape)

    def to_graph(self) -> FloatGraph:
        """The graph with the trained values; structure and codes unchanged."""
        with torch.no_grad():
            found = {name: self.weight(name).numpy() for name in self.books}
            found |= {name: self.parameter(name).numpy() for name in self.free}
        return with_weights(self.graph, found)
