"""Weights in files beside an ``.onnx`` (external data): they stay there, and are mapped while somebody looks."""

from __future__ import annotations

from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import external_data_helper as helper

from deploykit.hub.graph import LARGE


def load_small(proto: onnx.ModelProto, folder: Path) -> None:
    """Reads the small external constants, such as shapes, and sees whether the large ones are there.

    Raises:
        ValueError: a file is missing, too short, or outside the model's folder.
    """
    constants = [*proto.graph.initializer, *helper._get_attribute_tensors(proto)]
    for place, tensor in enumerate(constants):
        if not helper.uses_external_data(tensor):
            continue
        _refuse_foreign(tensor, folder)
        if place >= len(proto.graph.initializer) or not _may_stay(tensor):
            helper.load_external_data_for_tensor(tensor, str(folder))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]


def leave_outside(graph: ir.Graph, folder: Path) -> None:
    """External weights become tensors that map their file at every look and hold nothing in between."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            path, offset = folder.absolute() / tensor.location, tensor.offset or 0
            read = partial(_mapped, path, offset, tensor.dtype, tuple(tensor.shape.numpy()))
            value.const_value = ir.LazyTensor(read, tensor.dtype, tensor.shape, cache=False, name=tensor.name)


def _mapped(path: Path, offset: int, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.TensorProtocol:
    array = np.memmap(path, dtype.numpy(), "r", offset, shape)
    return ir.Tensor(array.view(np.ndarray), dtype)


def _may_stay(tensor: onnx.TensorProto) -> bool:
    """Whether it may stay outside: large, and of a type that can be mapped."""
    return prod(tensor.dims) > LARGE and ir.DataType(tensor.data_type).bitwidth >= 8


def _refuse_foreign(tensor: onnx.TensorProto, folder: Path) -> None:
    info = helper.ExternalDataInfo(tensor)
    path = (folder / info.location).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"the weights '{tensor.name}' lie outside its folder, in {info.location}")
    if not path.is_file():
        raise ValueError(f"the file {info.location} with the weights '{tensor.name}' is missing")
    needed = -(-prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth // 8)
    if path.stat().st_size < (info.offset or 0) + needed or (info.length or needed) != needed:
        raise ValueError(f"the file {info.location} is too short for the weights '{tensor.name}'")
