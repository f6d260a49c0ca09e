"""Operator versions: the lowest that covers what a file uses, so that an older runtime refuses it, never miscomputes.

The rules are those of LiteRT's own converter (tflite/converter/tools/versioning/op_version.cc), for the operators,
number formats and options that this exporter writes; where they are too lenient a comment says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploykit.exporters.tflite.writer import Tensor

SECOND_FOR_INT8 = frozenset(
    {
        "ADD", "AVERAGE_POOL_2D", "CONCATENATION", "GATHER", "GELU", "LOGISTIC", "MAXIMUM", "MAX_POOL_2D", "MEAN",
        "MINIMUM", "MIRROR_PAD", "MUL", "PAD", "PADV2", "RELU", "RELU6", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR",
        "SOFTMAX", "STRIDED_SLICE", "SUB", "TANH", "TRANSPOSE",
    }
)  # fmt: skip
"""Operators whose int8 form came with version 2."""

FOR_INT16 = {
    "ADD": 3, "AVERAGE_POOL_2D": 3, "BATCH_MATMUL": 3, "BROADCAST_TO": 3, "CONCATENATION": 3, "GATHER": 4,
    "LEAKY_RELU": 2, "LOGISTIC": 3, "MAXIMUM": 4, "MAX_POOL_2D": 3, "MEAN": 3, "MINIMUM": 4, "MIRROR_PAD": 3, "MUL": 4,
    "PAD": 3, "PADV2": 3, "QUANTIZE": 2, "RELU": 3, "RELU6": 3, "RESIZE_BILINEAR": 4, "RESIZE_NEAREST_NEIGHBOR": 4,
    "SOFTMAX": 3, "STRIDED_SLICE": 4, "SUB": 5, "TANH": 3, "TRANSPOSE": 5,
}  # fmt: skip
"""The version with which operators that compute in or move 16 bits got that form."""

FOURTH_ABOVE_4D = frozenset({"PAD", "PADV2", "STRIDED_SLICE", "TRANSPOSE"})
THIRD_WHEN_BROADCAST_ABOVE_4D = frozenset({"SUB", "MAXIMUM", "MINIMUM"})


def operator_version(kind: str, inputs: Sequence[Tensor], output: Tensor, options: Mapping[str, Any]) -> int:
    """The version to write for one operator.

    Args:
        kind: builtin operator name.
        inputs: in the operator's order, absent optional ones left out.
        output: its only output; int8 or int16 where the operator is integer.
        options: its options, by the schema's names.
    """
    integer, wide = output.dtype == "int8", output.dtype == "int16"
    narrow = len(inputs) > 1 and inputs[1].dtype == "int4"
    rank = max(len(t.shape) for t in inputs)
    broadcast = len(inputs) > 1 and inputs[0].shape != inputs[1].shape
    if kind == "CONV_2D":
        grouped = inputs[0].shape[3] != inputs[1].shape[3]
        return 7 if narrow else 6 if grouped else 4 if wide else 3 if integer else 1
    if kind == "DEPTHWISE_CONV_2D":
        dilated = (options["dilationHFactor"], options["dilationWFactor"]) != (1, 1)
        return 7 if narrow else 5 if wide else 3 if integer else 2 if dilated else 1
    if kind == "FULLY_CONNECTED":
        return _fully_connected(inputs, output.dtype, options)
    if kind == "TRANSPOSE_CONV":
        return 3 if len(inputs) == 4 else 2 if integer else 1
    if kind == "DEQUANTIZE":
        per_channel = inputs[0].quant is not None and len(inputs[0].quant.scales) > 1
        return 5 if per_channel else 3 if inputs[0].dtype in ("float16", "int16") else 2
    if kind == "BROADCAST_TO":
        return 3 if integer else 2
    if kind == "MUL" and integer and _product_rescale(inputs, output) >= 1:
        return 3
    if wide and kind.startswith("RESIZE_"):
        return FOR_INT16[kind]
    if kind == "RESIZE_BILINEAR" and options["halfPixelCenters"]:
        return 3
    if kind == "RESIZE_NEAREST_NEIGHBOR" and (options["halfPixelCenters"] or options["alignCorners"]):
        return 3
    if kind == "TRANSPOSE" and rank > 5:
        return 6
    if wide and kind in FOR_INT16 and not (kind in FOURTH_ABOVE_4D and rank > 4):
        return FOR_INT16[kind]
    if kind in FOURTH_ABOVE_4D and rank > 4:
        return max(4, FOR_INT16[kind]) if wide else 4
    if kind in THIRD_WHEN_BROADCAST_ABOVE_4D and broadcast and rank > 4:
        return 3
    if kind == "DIV" and broadcast and rank > 4:
        return 2
    return 2 if integer and kind in SECOND_FOR_INT8 else 1


def _fully_connected(inputs: Sequence[Tensor], computes: str, options: Mapping[str, Any]) -> int:
    weights, integer = inputs[1], computes in ("int8", "int16")
    if weights.dtype == "int4":
        return 10
    if integer and weights.quant is not None and len(weights.quant.scales) > 1:
        # The converter says 4, but runtimes from before per-channel weights take such a file and use one scale for
        # all channels. 10 came with 2.11; 2.14 is the oldest that was seen to compute it right.
        return 10
    if computes == "int16":
        return 7
    if options["keepNumDims"]:
        return 5
    return 4 if integer else 1


def _product_rescale(inputs: Sequence[Tensor], output: Tensor) -> float:
    a, b, y = (t.quant.scales[0] if t.quant else 1.0 for t in (*inputs, output))
    return a * b / y
