"""Where the weights are within the files of each runtime."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from deploykit.core.errors import DeploykitError
from deploykit.core.files import no_such_file
from deploykit.dkz.weights import Extent, File, Indices, Shape

LEAST = 64
"""Weights that are worth a codebook."""
LARGE = 64
"""Positions from which on a kernel is looked at as a matrix."""


def files_of(path: Path) -> list[File]:
    """A model's file, and those that belong to it, with the places of their weights.

    Args:
        path: ``.onnx`` (with its external data), ``.xml`` of OpenVINO (with its ``.bin``), ``.tflite``; of any other
            file no weights are known, and it is packed as it is.

    Raises:
        DeploykitError: a file that is not there, or is not what its suffix says.
    """
    if not path.is_file():
        raise no_such_file(path)
    if path.suffix.lower() in KNOWN and not path.stat().st_size:
        raise DeploykitError(f"{path} is empty")
    try:
        found = KNOWN.get(path.suffix.lower(), _other)(path)
        for file in found:
            for e in file.extents:
                if e.start < 0 or e.start + e.bytes > len(file.data):
                    raise DeploykitError(f"{file.name} is shorter than {path} says: '{e.name}' lies beyond its end")
        return found
    except DeploykitError:
        raise
    except Exception as error:  # parsers of other people's formats raise whatever they like
        raise DeploykitError(f"{path} cannot be read as a {path.suffix} file: {error}") from None


def _other(path: Path) -> list[File]:
    return [File(path.name, path.read_bytes(), ())]


def _onnx(path: Path) -> list[File]:
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    data = path.read_bytes()
    graph = onnx.load_from_string(data).graph
    indices = _indices(graph)
    own, beside, at = list[Extent](), dict[str, list[Extent]](), 0
    for name, tensor in _tensors(graph):
        bits, shape = _bits(tensor.data_type), list(tensor.dims)
        if uses_external_data(tensor):
            info = ExternalDataInfo(tensor)
            place = _extent(info.offset or 0, info.length or 0, bits, name, shape)
            beside.setdefault(info.location, []).append(place)
        elif (found := data.find(tensor.raw_data, at)) >= 0 and 8 * len(tensor.raw_data) >= LEAST * bits:
            place = _extent(found, len(tensor.raw_data), bits, name, shape)
            codes = indices.get(name)  # a node may hold a tensor of that name, too
            own.append(replace(place, indices=codes if codes is not None and codes.codes.size == place.count else None))
            at = found + len(tensor.raw_data)
    others = [File(file, (path.parent / file).read_bytes(), _apart(places)) for file, places in sorted(beside.items())]
    return [File(path.name, data, _apart(own)), *others]


def _tensors(graph: Any) -> Iterator[tuple[str, Any]]:
    """Constants and their names, in the order in which they are written: what nodes hold comes before initializers."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t.name or node.output[0], attribute.t
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _tensors(inner)
    yield from ((tensor.name, tensor) for tensor in graph.initializer)


def _indices(graph: Any) -> dict[str, Indices]:
    """Initializers within the file that are indices of a codebook, as `deploykit.exporters.codebooks` writes them."""
    from onnx import TensorProto, numpy_helper

    kinds = TensorProto.UINT4, TensorProto.UINT8
    held = {tensor.name: tensor for tensor in graph.initializer if tensor.raw_data}
    cast = {
        node.output[0]: held[node.input[0]] for node in graph.node if node.op_type == "Cast" and node.input[0] in held
    }
    found = {}
    for node in graph.node:
        book, codes = (held.get(node.input[0]), cast.get(node.input[1])) if node.op_type == "Gather" else (None, None)
        if book is None or codes is None or codes.data_type not in kinds or book.data_type != TensorProto.FLOAT:
            continue
        values, own = numpy_helper.to_array(book), numpy_helper.to_array(codes).astype(np.uint8).reshape(-1)
        if values.ndim == 1 and own.size and own.max() < len(values):
            found[codes.name] = Indices(book.name, values, own)
    return found


def _bits(kind: int) -> int:
    """Of one element; wide ones are taken in halves."""
    import onnx

    if kind in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return 4
    return 8 if kind == onnx.TensorProto.STRING else 8 * min(4, onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)


def _extent(start: int, length: int, bits: int, name: str, dims: Sequence[int], last: bool = True) -> Extent:
    """Weights of so many bytes.

    Args:
        start: byte.
        length: bytes.
        bits: of one.
        name: in its file.
        dims: of the tensor.
        last: whether positions of a kernel are its last dimensions, else they are those behind the first.
    """
    count, whole = 8 * length // bits, math.prod(dims)
    if bits == 4 and count != whole:  # half a byte is left
        return Extent(start, length, 8, name)
    known = count == whole and min(dims, default=0) > 0
    return Extent(start, count, bits, name, shape=_shape(dims, last) if known else None)


def _shape(dims: Sequence[int], last: bool) -> Shape | None:
    """How weights lie, if they are a matrix or kernels."""
    if len(dims) < 2:
        return None
    kernel = math.prod(dims[2:] if last else dims[1:-1])
    if 1 < kernel < LARGE:
        return Shape(dims[0], dims[1] if last else 1, kernel)
    return Shape(dims[0], math.prod(dims[1:]))


def _openvino(path: Path) -> list[File]:
    data = path.with_suffix(".bin").read_bytes()
    places = []
    for layer in ElementTree.parse(path).iter("layer"):
        told = layer.find("data")
        if told is not None and "offset" in told.attrib and "element_type" in told.attrib:
            digits = int("".join(c for c in told.attrib["element_type"] if c.isdigit()) or "8")
            bits = min(32, digits) if digits in (4, 8, 16, 32, 64) else 8
            told_dims = [n.strip() for n in told.attrib.get("shape", "").split(",")]
            dims = [int(n) for n in told_dims] if all(n.isdecimal() for n in told_dims) else []
            if len(dims) == 5:  # groups, then what each of them has
                dims = [dims[0] * dims[1], *dims[2:]]
            start, length = int(told.attrib["offset"]), int(told.attrib["size"])
            places.append(_extent(start, length, bits, layer.attrib.get("name", ""), dims))
    return [File(path.name, path.read_bytes(), ()), File(path.with_suffix(".bin").name, data, _apart(places))]


def _tflite(path: Path) -> list[File]:
    from deploykit.exporters.tflite.schema import schema

    data, kinds = path.read_bytes(), schema.TensorType
    wide = {kinds.FLOAT32: 32, kinds.INT32: 32, kinds.INT64: 32, kinds.FLOAT16: 16, kinds.INT16: 16, kinds.INT4: 4}
    model = schema.Model.GetRootAs(data, 0)
    held = {}
    for g in range(model.SubgraphsLength()):
        for t in range(model.Subgraphs(g).TensorsLength()):
            tensor = model.Subgraphs(g).Tensors(t)
            dims = [tensor.Shape(i) for i in range(tensor.ShapeLength())]
            held[tensor.Buffer()] = wide.get(tensor.Type(), 8), (tensor.Name() or b"").decode(), dims
    places = []
    for i, (bits, name, dims) in held.items():
        table = model.Buffers(i)._tab
        vector = table.Offset(4)
        if vector:
            places.append(_extent(table.Vector(vector), table.VectorLen(vector), bits, name, dims, last=False))
    return [File(path.name, data, _apart(places))]


def _apart(places: list[Extent]) -> list[Extent]:
    """In order, without those that are small or lie within others: tensors may share bytes."""
    found, end = list[Extent](), 0
    for extent in sorted(places, key=lambda e: (e.start, -e.bytes)):
        if extent.start >= end and extent.count >= LEAST:
            found.append(extent)
            end = extent.start + extent.bytes
    return found


KNOWN = {".onnx": _onnx, ".xml": _openvino, ".tflite": _tflite}
"""Suffixes of the files whose weights are known."""
