"""From an ONNX graph to OpenVINO's own, through its ONNX frontend, the same bytes every time."""

from __future__ import annotations

import io
import json
from typing import Any

import onnx
import onnx_ir as ir

from deploykit.core.artifact import Port
from deploykit.core.errors import DeploykitError
from deploykit.exporters.openvino.library import openvino
from deploykit.exporters.openvino.options import Options
from deploykit.exporters.openvino.rewrite import rewrite
from deploykit.hub.graph import serialize

ABOUT = ["deploykit", "about"]
"""Where a file says in JSON which device it is for and which axis of each input and output is the batch, if any."""
SEQUENCES = ("LSTMSequence", "GRUSequence", "RNNSequence")
WITHOUT_BIAS = "/WithoutBiases"
"""What the frontend appends to the name of a product whose bias it adds in an operator of its own."""


def convert(model: ir.Model, settings: Options) -> Any:
    """An ``openvino.Model`` with the batch bound.

    Weights stay int8, behind a Convert and a Multiply; each Q/DQ pair becomes a FakeQuantize, from which the device's
    plugin makes integer kernels again.

    Args:
        model: float or Q/DQ; not changed.
        settings: the batch takes the place of the free first dimension. With a free one OpenVINO 2026.4 computes
            garbage, silently, in a transformer whose patches are quantized before they are rearranged.

    Raises:
        DeploykitError: operators that OpenVINO has no counterpart of (it names them).
        MissingExtra: OpenVINO is not installed.
    """
    ov = openvino()
    proto = onnx.load_model_from_string(serialize(rewrite(model)))
    axes = _bind_batch(proto, settings.batch)
    try:
        made = ov.convert_model(io.BytesIO(proto.SerializeToString(deterministic=True)))
    except Exception as error:  # the frontend raises several kinds without a common base
        raise DeploykitError(f"OpenVINO cannot convert this network: {reason(error)}") from None
    _hide_recurrent_weights(made)
    _name(made, proto)
    read = [parameter.get_friendly_name() for parameter in made.get_parameters()]  # inputs that nobody reads are gone
    axes["inputs"] = {name: axes["inputs"][name] for name in read}
    made.set_rt_info(json.dumps({"device": settings.device, **axes}), ABOUT)
    return made


def ports(made: Any) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """What the inputs and outputs of a converted model hold, the batch bound."""
    about = json.loads(made.get_rt_info(ABOUT).value)

    def side(named: dict[str, Any], tensors: list[Any]) -> tuple[Port, ...]:
        return tuple(
            Port(name, tuple(d.to_string() if d.is_dynamic else d.get_length() for d in t.partial_shape),
                 t.element_type.to_dtype().name)
            for name, t in zip(named, tensors, strict=True)
        )  # fmt: skip

    return side(about["inputs"], made.inputs), side(about["outputs"], made.outputs)


def _bind_batch(proto: onnx.ModelProto, batch: int) -> dict[str, dict[str, int | None]]:
    """Fixes the free first dimension of the inputs wherever its name stands; returns the axes where it stood.

    Where the network takes so many samples and no other number, the batch is the first axis of whatever has that many.
    """
    inputs, outputs = ([(i.name, i.type.tensor_type) for i in side] for side in (proto.graph.input, proto.graph.output))
    first = [t.shape.dim[0] for _, t in inputs if t.shape.dim]
    free = {dim.dim_param for dim in first} - {""} or {"batch"}  # one operator alone may get its samples further back
    axes = {
        side: {name: next((i for i, d in enumerate(t.shape.dim) if d.dim_param in free), None) for name, t in found}
        for side, found in (("inputs", inputs), ("outputs", outputs))
    }
    if all(axis is None for axis in axes["inputs"].values()):
        fixed = next((dim.dim_value for dim in first), 0)
        for side, found in (("inputs", inputs), ("outputs", outputs)):
            axes[side] = {name: 0 if t.shape.dim and t.shape.dim[0].dim_value == fixed else None for name, t in found}
    else:
        for name, t in outputs:  # shape inference does not know every output
            unknown = not t.HasField("shape") or (t.shape.dim and not t.shape.dim[0].dim_value)
            axes["outputs"][name] = 0 if axes["outputs"][name] is None and unknown else axes["outputs"][name]
    for dim in (dim for _, t in [*inputs, *outputs] for dim in t.shape.dim if dim.dim_param in free):
        dim.dim_value = batch
    del proto.graph.value_info[:]  # they name the free batch; the frontend infers shapes again
    return axes


def _hide_recurrent_weights(made: Any) -> None:
    """Widens the int8 weights of recurrent layers in two steps, int8 -> int32 -> float32.

    In one step the CPU plugin (2026.4) takes them for the weights of an integer layer, of which it has none, and does
    not compile where anything else in the network is quantized. In two it folds them into floats when it loads them.
    """
    ov = openvino()
    for operator in made.get_ordered_ops():
        if operator.get_type_name() not in SEQUENCES:
            continue
        weights = operator.inputs()[-3:-1]  # W and R; the bias stands behind them
        for widening in {n.get_name(): n for i in weights for n in _widenings(i)}.values():
            first = widening.input(0)
            first.replace_source_output(ov.opset1.convert(first.get_source_output(), "i32").output(0))


def _widenings(taken: Any) -> list[Any]:
    """The operators that make floats of int8 constants, on the way to an input that is computed from constants."""
    node = taken.get_source_output().get_node()
    if node.get_type_name() == "Convert" and taken.get_element_type() != node.input(0).get_element_type():
        return [node] if node.input(0).get_element_type().get_type_name() == "i8" else []
    return [found for i in node.inputs() for found in _widenings(i)]


def _name(made: Any, proto: onnx.ModelProto) -> None:
    """Operators keep the names they have in the graph; the others, whose names come from a counter that runs as long as
    the process, get names by their place."""
    known = {node.name for node in proto.graph.node}
    known |= {name for node in proto.graph.node for name in (*node.input, *node.output)}
    known |= {value.name for value in proto.graph.input}
    for place, operator in enumerate(made.get_ordered_ops()):
        name = operator.get_friendly_name()
        if name.removesuffix(WITHOUT_BIAS) not in known and operator.get_type_name() != "Result":
            operator.set_friendly_name(f"{operator.get_type_name()}.{place}")


def reason(error: Exception) -> str:
    """The sentence of OpenVINO's message that is for users; the rest are lines of its source."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(("Check ", "Exception from", "[", "While "))]
    return " ".join(said) or type(error).__name__
