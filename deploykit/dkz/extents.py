"""Where the weights are within the files of each runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from deploykit.core.errors import DeploykitError
from deploykit.core.files import no_such_file
from deploykit.dkz.container import Extent, File, Indices

LEAST = 64
"""Weights that are worth a codebook."""
SIZES = (1, 2, 4)


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
                if e.start < 0 or e.start + e.count * e.size > len(file.data):
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
        size = _item(tensor.data_type)
        if uses_external_data(tensor):
            info = ExternalDataInfo(tensor)
            length = info.length or 0
            beside.setdefault(info.location, []).append(Extent(info.offset or 0, length // size, size, name))
        elif (found := data.find(tensor.raw_data, at)) >= 0 and len(tensor.raw_data) >= LEAST * size:
            own.append(Extent(found, len(tensor.raw_data) // size, size, name, indices.get(name)))
            at = found + len(tensor.raw_data)
    others = [File(file, (path.parent / file).read_bytes(), _apart(places)) for file, places in sorted(beside.items())]
    return [File(path.name, data, _apart(own)), *others]


def _tensors(graph: Any) -> Iterator[tuple[str, Any]]:
    """Initializers and their names, in the order in which they are written: what nodes hold comes first."""
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


def _item(kind: int) -> int:
    """Bytes of one element; packed ones are taken byte by byte, wide ones in halves."""
    import onnx

    if kind in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.STRING):
        return 1
    return min(4, int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize))


def _openvino(path: Path) -> list[File]:
    data = path.with_suffix(".bin").read_bytes()
    places = []
    for layer in ElementTree.parse(path).iter("layer"):
        told = layer.find("data")
        if told is not None and "offset" in told.attrib and "element_type" in told.attrib:
            digits = "".join(c for c in told.attrib["element_type"] if c.isdigit()) or "8"
            size = min(4, max(1, int(digits) // 8))
            start, length = int(told.attrib["offset"]), int(told.attrib["size"])
            places.append(Extent(start, length // size, size, layer.attrib.get("name", "")))
    return [File(path.name, path.read_bytes(), ()), File(path.with_suffix(".bin").name, data, _apart(places))]


def _tflite(path: Path) -> list[File]:
    from deploykit.exporters.tflite.schema import schema

    data = path.read_bytes()
    model = schema.Model.GetRootAs(data, 0)
    held = {}
    for g in range(model.SubgraphsLength()):
        for t in range(model.Subgraphs(g).TensorsLength()):
            tensor = model.Subgraphs(g).Tensors(t)
            size = {
                schema.TensorType.FLOAT32: 4, schema.TensorType.INT32: 4, schema.TensorType.INT64: 4,
                schema.TensorType.FLOAT16: 2, schema.TensorType.INT16: 2,
            }.get(tensor.Type(), 1)  # fmt: skip
            held[tensor.Buffer()] = size, (tensor.Name() or b"").decode()
    places = []
    for i, (size, name) in held.items():
        table = model.Buffers(i)._tab
        vector = table.Offset(4)
        if vector:
            places.append(Extent(table.Vector(vector), table.VectorLen(vector) // size, size, name))
    return [File(path.name, data, _apart(places))]


def _apart(places: list[Extent]) -> list[Extent]:
    """In order, without those that are small or lie within others: tensors may share bytes."""
    found, end = list[Extent](), 0
    for extent in sorted(places, key=lambda e: (e.start, -e.count * e.size)):
        if extent.start >= end and extent.count >= LEAST:
            found.append(extent)
            end = extent.start + extent.count * extent.size
    return found


KNOWN = {".onnx": _onnx, ".xml": _openvino, ".tflite": _tflite}
"""Suffixes of the files whose weights are known."""
