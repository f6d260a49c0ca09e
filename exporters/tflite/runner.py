"""Runs a .tflite file that this project wrote, through whichever LiteRT interpreter is installed."""

from __future__ import annotations

import importlib
import json
import os
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.artifact import Arrays, Runner
from deploykit.core.errors import DeploykitError, MissingExtra

if TYPE_CHECKING:
    from numpy.typing import NDArray

METADATA = "deploykit"
"""Name of the metadata entry that says how inputs and outputs are stored."""

GREETING = b"Created TensorFlow Lite XNNPACK delegate"
PACKAGES = ("ai_edge_litert", "tflite_runtime")
"""Python packages with a LiteRT interpreter, the preferred one first."""

# Positions of fields in the schema's tables Model, Metadata and Buffer; they are fixed for good by the format.
OPERATOR_CODES, BUFFERS, MODEL_METADATA = 1, 4, 6
NAME, BUFFER = 0, 1
DATA = 0


def open_runner(path: Path, threads: int) -> Runner:
    """Loads a file. The runner takes float arrays ``[n, ...]`` by the model's input names, in the model's own layout
    (images channels-first), and returns its outputs likewise; integer files are fed and read by their own scales.

    The file's batch is 1: a larger one is run sample by sample.

    Raises:
        DeploykitError: the file is damaged, was not written by deploykit, or is refused by the runtime.
        MissingExtra: no interpreter is installed.
    """
    data = path.read_bytes()
    described = _described(data, path)
    try:
        interpreter = _interpreter_class()(model_content=data, num_threads=threads)
        if _greeted.is_set():
            interpreter.allocate_tensors()
        else:
            ungreeted(interpreter.allocate_tensors)
    except (ValueError, RuntimeError) as error:
        raise DeploykitError(f"{path}: the LiteRT runtime refuses this file: {error}") from None
    inputs = list(zip(described["inputs"], interpreter.get_input_details(), strict=True))
    outputs = list(zip(described["outputs"], interpreter.get_output_details(), strict=True))

    def run(arrays: Arrays) -> dict[str, NDArray[Any]]:
        counts = {len(arrays[d["name"]]) for d, _ in inputs if d["batched"]} or {1}
        if len(counts) != 1:
            raise DeploykitError(f"the inputs have different batch sizes: {sorted(counts)}")
        count = counts.pop()
        collected: dict[str, list[NDArray[Any]]] = {d["name"]: [] for d, _ in outputs}
        for i in range(count):
            for description, tensor in inputs:
                array = np.asarray(arrays[description["name"]])
                sample = array[i : i + 1] if description["batched"] else array
                sample = np.ascontiguousarray(sample.transpose(description["order"]))
                interpreter.set_tensor(tensor["index"], _to_integer(sample, tensor))
            interpreter.invoke()
            for description, tensor in outputs:
                stored = _to_real(interpreter.get_tensor(tensor["index"]), tensor)
                collected[description["name"]].append(stored.transpose(np.argsort(description["order"])))
        return {name: np.concatenate(parts) if count > 1 else parts[0] for name, parts in collected.items()}

    return run


def ungreeted(call: Callable[[], object]) -> None:
    """Runs the call without LiteRT's greeting.

    LiteRT says once per process, on file descriptor 2, that it created its delegate, and nothing keeps it from that:
    it exports no switch and does not heed TF_CPP_MIN_LOG_LEVEL. The descriptor is the whole process's, so files are
    opened this way only until the greeting was heard, and by one thread at a time: two that exchange the descriptor
    would put back each other's.
    """
    with _redirecting, _without_greeting():
        call()


_redirecting, _greeted = threading.Lock(), threading.Event()


@contextmanager
def _without_greeting() -> Iterator[None]:
    """Holds back what is written to file descriptor 2 in the block; behind it all but the greeting comes through, also
    where the block raises."""
    try:
        stderr = os.dup(2)
    except OSError:
        stderr = None
    if stderr is None:  # closed: there is nobody to be spared
        yield
        return
    try:
        with tempfile.TemporaryFile() as said:
            os.dup2(said.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(stderr, 2)
                said.seek(0)
                lines = said.readlines()
                rest = [line for line in lines if GREETING not in line]
                if len(rest) < len(lines):
                    _greeted.set()
                with suppress(OSError):  # whoever listened has gone; what the block raised counts
                    os.write(2, b"".join(rest))
    finally:
        os.close(stderr)


def _to_integer(array: NDArray[Any], tensor: dict[str, Any]) -> NDArray[Any]:
    """ONNX's QuantizeLinear: halves to even, saturating. Floats and pixels are taken as they are."""
    if tensor["dtype"] not in (np.int8, np.int16):
        return array.astype(tensor["dtype"], copy=False)
    scale, zero_point = tensor["quantization"]
    ends = np.iinfo(tensor["dtype"])
    steps = np.clip(np.rint(array.astype(np.float32) / np.float32(scale)) + zero_point, ends.min, ends.max)
    return np.asarray(steps, tensor["dtype"])


def _to_real(array: NDArray[Any], tensor: dict[str, Any]) -> NDArray[Any]:
    if tensor["dtype"] == np.float32:
        return array
    scale, zero_point = tensor["quantization"]
    real: NDArray[Any] = (array.astype(np.int32) - zero_point).astype(np.float32) * np.float32(scale)
    return real


def interpreter_package() -> str:
    """Name and version of the installed interpreter, e.g. ``"ai-edge-litert 2.3.0"``."""
    package = _interpreter_class().__module__.partition(".")[0].replace("_", "-")
    return f"{package} {version(package)}"


def _interpreter_class() -> Any:
    for package in PACKAGES:
        try:
            return importlib.import_module(f"{package}.interpreter").Interpreter
        except ImportError:
            continue
    raise MissingExtra("running .tflite files", "tflite")


def describe(path: Path) -> Any:
    """How a file stores its inputs and outputs: ``{"inputs": [{"name", "order", "batched"}, ...], "outputs": ...}``.

    Raises:
        DeploykitError: the file is damaged, or was not written by deploykit.
    """
    return _described(path.read_bytes(), path)


def _described(data: bytes, path: Path) -> Any:
    """The metadata entry that tells names, orders of axes and which inputs have a batch."""
    try:
        if data[4:8] != b"TFL3":
            raise DeploykitError(f"{path} is not a .tflite file")
        model = _follow(data, 0)
        # operator codes lie at the file's end: reading them finds a truncated file, on which tflite-runtime would crash
        for code in _items(data, _field(data, model, OPERATOR_CODES)):
            _field(data, code, 0)
        buffers = _items(data, _field(data, model, BUFFERS))
        for entry in _items(data, _field(data, model, MODEL_METADATA)):
            if _bytes(data, _field(data, entry, NAME)) == METADATA.encode():
                index = _field(data, entry, BUFFER)
                number = struct.unpack_from("<I", data, index)[0] if index else 0
                return json.loads(_bytes(data, _field(data, buffers[number], DATA)))
    except (struct.error, IndexError, ValueError) as error:
        raise DeploykitError(f"{path} is damaged: {error}") from None
    raise DeploykitError(f"{path} was not written by deploykit: it does not say how its inputs and outputs are stored")


def _follow(data: bytes, position: int) -> int:
    return position + int(struct.unpack_from("<I", data, position)[0])


def _field(data: bytes, table: int, number: int) -> int:
    """Position of a table's field, 0 where it is absent (FlatBuffers: the table points back to its list of offsets)."""
    offsets = table - struct.unpack_from("<i", data, table)[0]
    size = struct.unpack_from("<H", data, offsets)[0]
    at = 4 + 2 * number
    offset = struct.unpack_from("<H", data, offsets + at)[0] if at < size else 0
    return table + offset if offset else 0


def _items(data: bytes, field: int) -> list[int]:
    """Positions of the tables in a vector."""
    if not field:
        return []
    vector = _follow(data, field)
    count = struct.unpack_from("<I", data, vector)[0]
    return [_follow(data, vector + 4 + 4 * i) for i in range(count)]


def _bytes(data: bytes, field: int) -> bytes:
    """A string or a vector of bytes."""
    if not field:
        return b""
    vector = _follow(data, field)
    size = struct.unpack_from("<I", data, vector)[0]
    return data[vector + 4 : vector + 4 + size]
