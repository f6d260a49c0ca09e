"""Builds one .tflite model: tensors, constants and operators in, flatbuffer bytes out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.coding import nibbles
from deploykit.exporters.tflite.schema import flatbuffers, schema
from deploykit.exporters.tflite.versions import operator_version

if TYPE_CHECKING:
    from numpy.typing import NDArray

OPTIONS = {
    "ADD": "AddOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "BATCH_MATMUL": "BatchMatMulOptions",
    "BROADCAST_TO": "BroadcastToOptions",
    "CAST": "CastOptions",
    "CONCATENATION": "ConcatenationOptions",
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "DEQUANTIZE": "DequantizeOptions",
    "DIV": "DivOptions",
    "EXP": "ExpOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "GATHER": "GatherOptions",
    "GELU": "GeluOptions",
    "HARD_SWISH": "HardSwishOptions",
    "LEAKY_RELU": "LeakyReluOptions",
    "MAXIMUM": "MaximumMinimumOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "MEAN": "ReducerOptions",
    "MINIMUM": "MaximumMinimumOptions",
    "MIRROR_PAD": "MirrorPadOptions",
    "MUL": "MulOptions",
    "PAD": "PadOptions",
    "PADV2": "PadV2Options",
    "POW": "PowOptions",
    "QUANTIZE": "QuantizeOptions",
    "RESHAPE": "ReshapeOptions",
    "RESIZE_BILINEAR": "ResizeBilinearOptions",
    "RESIZE_NEAREST_NEIGHBOR": "ResizeNearestNeighborOptions",
    "SOFTMAX": "SoftmaxOptions",
    "STRIDED_SLICE": "StridedSliceOptions",
    "SUB": "SubOptions",
    "SUM": "ReducerOptions",
    "TRANSPOSE": "TransposeOptions",
    "TRANSPOSE_CONV": "TransposeConvOptions",
}
"""The options table of each operator that has one."""

ENUMS = {
    "padding": "Padding",
    "fusedActivationFunction": "ActivationFunctionType",
    "mode": "MirrorPadMode",
    "inDataType": "TensorType",
    "outDataType": "TensorType",
}
"""Options that are given by the name of an enumeration's member."""

DTYPES = {
    "float32": "FLOAT32", "float16": "FLOAT16", "int4": "INT4", "int8": "INT8", "uint8": "UINT8", "int16": "INT16",
    "int32": "INT32", "int64": "INT64",
}  # fmt: skip

SCHEMA_VERSION = 3


@dataclass(frozen=True)
class Quant:
    """real = scales[c] * (integer - zero_point); one scale, or one per index c of ``axis`` (then zero_point is 0)."""

    scales: tuple[float, ...]
    zero_point: int = 0
    axis: int = 0
    dtype: str = "int8"
    """What the integers are stored in."""

    @property
    def ends(self) -> tuple[int, int]:
        """The smallest and the largest integer."""
        half = 2 ** (int(self.dtype.removeprefix("int")) - 1)
        return -half, half - 1

    def to_integer(self, real: float) -> int:
        """The nearest integer (halves to even), not limited to what the type holds."""
        return int(np.rint(np.float32(real) / np.float32(self.scales[0]))) + self.zero_point


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file: its index, what it is called there, stored shape, numpy dtype name and quantization."""

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    quant: Quant | None = None
    constant: bool = False


class Writer:
    """Collects the model. Operators are pure, so asking for the same one twice gives the same tensor."""

    def __init__(self, reserved: Sequence[str] = ()) -> None:
        """An empty model; buffer 0 is the empty one, as the format wants. ``reserved`` names are left to `rename`."""
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.buffers: list[Any] = [schema.BufferT()]
        self.codes: dict[tuple[str, int], int] = {}
        self._buffer_of: dict[bytes, int] = {}
        self._known: dict[Any, Tensor] = {}
        self._names = set(reserved)
        self._quantizations: dict[Quant, _Quantization] = {}
        self._zero_points: dict[tuple[int, int], int] = {}

    def tensor(self, name: str, shape: Sequence[int], dtype: str, quant: Quant | None = None) -> Tensor:
        """A new tensor whose values are computed or fed."""
        return self._tensor(name, tuple(shape), dtype, quant, buffer=0)

    def constant(self, name: str, array: NDArray[Any], quant: Quant | None = None) -> Tensor:
        """A tensor with stored values, int8 ones in 4 bits where the quantization says so; equal values are stored
        once."""
        dtype = "int4" if quant is not None and quant.dtype == "int4" else array.dtype.name
        stored = nibbles.packed(array) if dtype == "int4" else array
        data = np.ascontiguousarray(stored).astype(stored.dtype.newbyteorder("<"), copy=False).tobytes()
        key = ("constant", array.shape, dtype, data, quant)
        if key not in self._known:
            self._known[key] = self._tensor(name, array.shape, dtype, quant, self._buffer(data))
        return self._known[key]

    def indices(self, name: str, values: Any) -> Tensor:
        """An int32 constant: a shape, axes, paddings."""
        return self.constant(name, np.asarray(values, np.int32))

    def write(
        self,
        kind: str,
        inputs: Sequence[Tensor],
        name: str,
        shape: Sequence[int],
        quant: Quant | None = None,
        dtype: str | None = None,
        **options: Any,
    ) -> Tensor:
        """Appends an operator and returns its output: integer where it has a quantization, otherwise float32."""
        key = (kind, tuple(t.index for t in inputs), tuple(shape), quant, dtype, repr(sorted(options.items())))
        if key in self._known:
            return self._known[key]
        output = self.tensor(name, shape, dtype or (quant.dtype if quant else "float32"), quant)
        code = (kind, operator_version(kind, inputs, output, options))
        made = schema.OperatorT()
        made.opcodeIndex = self.codes.setdefault(code, len(self.codes))
        made.inputs = np.array([t.index for t in inputs], np.int32)
        made.outputs = np.array([output.index], np.int32)
        if kind in OPTIONS:
            made.builtinOptionsType = getattr(schema.BuiltinOptions, OPTIONS[kind])
            made.builtinOptions = _filled(OPTIONS[kind], options)
        self.operators.append(made)
        self._known[key] = output
        return output

    def rename(self, tensor: Tensor, name: str) -> None:
        """Gives a tensor the name the user knows."""
        self.tensors[tensor.index].name = name.encode()

    def finish(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], metadata: Mapping[str, Any]) -> bytes:
        """The file. Inputs and outputs are listed under their names in the signature ``serving_default``.

        Args:
            inputs: fed tensors, in the model's order.
            outputs: computed tensors, in the model's order.
            metadata: entry name -> what is stored there as JSON.
        """
        names = {t.index: self.tensors[t.index].name for t in [*inputs, *outputs]}
        graph = schema.SubGraphT()
        graph.name = b"main"
        graph.tensors, graph.operators = self.tensors, self.operators
        graph.inputs = np.array([t.index for t in inputs], np.int32)
        graph.outputs = np.array([t.index for t in outputs], np.int32)
        signature = schema.SignatureDefT()
        signature.signatureKey = b"serving_default"
        signature.inputs = [_named(names[t.index], t.index) for t in inputs]
        signature.outputs = [_named(names[t.index], t.index) for t in outputs]
        model = schema.ModelT()
        model.version = SCHEMA_VERSION
        model.description = b"deploykit"
        model.subgraphs, model.signatureDefs = [graph], [signature]
        model.metadata = []
        for name, content in metadata.items():
            entry = schema.MetadataT()
            entry.name = name.encode()
            entry.buffer = self._buffer(json.dumps(content, sort_keys=True).encode())
            model.metadata.append(entry)
        model.buffers = self.buffers
        model.operatorCodes = [_code(kind, version) for kind, version in self.codes]
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: str, quant: Quant | None, buffer: int) -> Tensor:
        unique, number = name, 1
        while unique in self._names:
            number += 1
            unique = f"{name}_{number}"
        self._names.add(unique)
        made = schema.TensorT()
        made.name = unique.encode()
        made.shape = np.array(shape, np.int32)
        made.type = getattr(schema.TensorType, DTYPES[dtype])
        made.buffer = buffer
        if quant is not None:
            made.quantization = self._quantizations.setdefault(quant, _Quantization(quant, self._zero_points))
        self.tensors.append(made)
        return Tensor(len(self.tensors) - 1, unique, shape, dtype, quant, constant=buffer != 0)

    def _buffer(self, data: bytes) -> int:
        if data not in self._buffer_of:
            buffer = _AlignedBuffer()
            buffer.data = np.frombuffer(data, np.uint8)
            self.buffers.append(buffer)
            self._buffer_of[data] = len(self.buffers) - 1
        return self._buffer_of[data]


class _AlignedBuffer(schema.BufferT):  # type: ignore[misc]
    """The schema asks for 16-byte alignment of stored data (``force_align: 16``); the Python packer forgets it."""

    def Pack(self, builder: Any) -> int:
        """Writes the data vector and the buffer's table; returns the table's offset."""
        data = self.data.tobytes()
        builder.StartVector(1, len(data), 16)
        builder.head -= len(data)
        builder.Bytes[builder.head : builder.head + len(data)] = data
        vector = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, vector)
        return int(schema.BufferEnd(builder))


class _Quantization(schema.QuantizationParametersT):  # type: ignore[misc]
    """Quantization parameters, stored once however many tensors have them.

    The format wants an int64 zero point per channel, here always 0; vectors of the same length are one vector, which
    takes about 5 % off a file with per-channel weights.
    """

    def __init__(self, quant: Quant, zero_points: dict[tuple[int, int], int]) -> None:
        super().__init__()
        self.quant, self.zero_points, self.offset = quant, zero_points, 0

    def Pack(self, builder: Any) -> int:
        """Writes the table the first time; returns its offset."""
        if self.offset:
            return self.offset
        count, zero = len(self.quant.scales), self.quant.zero_point
        if (count, zero) not in self.zero_points:
            self.zero_points[count, zero] = builder.CreateNumpyVector(np.full(count, zero, np.int64))
        scales = builder.CreateNumpyVector(np.array(self.quant.scales, np.float32))
        schema.QuantizationParametersStart(builder)
        schema.QuantizationParametersAddScale(builder, scales)
        schema.QuantizationParametersAddZeroPoint(builder, self.zero_points[count, zero])
        schema.QuantizationParametersAddQuantizedDimension(builder, self.quant.axis)
        self.offset = int(schema.QuantizationParametersEnd(builder))
        return self.offset


def _filled(table: str, options: Mapping[str, Any]) -> Any:
    made = getattr(schema, f"{table}T")()
    for name, value in options.items():
        assert hasattr(made, name), f"{table} has no {name}"
        setattr(made, name, getattr(getattr(schema, ENUMS[name]), value) if name in ENUMS else value)
    return made


def _named(name: bytes, index: int) -> Any:
    made = schema.TensorMapT()
    made.name, made.tensorIndex = name, index
    return made


def _code(kind: str, version: int) -> Any:
    made = schema.OperatorCodeT()
    made.builtinCode = getattr(schema.BuiltinOperator, kind)
    made.deprecatedBuiltinCode = min(made.builtinCode, schema.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES)
    made.version = version
    return made
