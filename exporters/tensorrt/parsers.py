"""Which standard ONNX operators TensorRT's parser reads, and since when.

From the parser's repository: its operator tables at 8.4, 8.5, 9.2 and 10.15 and its changelog. An operator that is
missing below has been read since 8.2. Where only the tables speak, the operator may be a little older than said here;
the later release is the careful answer.
"""

from __future__ import annotations

from deploykit.exporters.tensorrt.device.build import Version

NEVER: Version = (99, 0)
"""No release up to 10.15."""

FIRST_READ: dict[str, Version] = {
    "Shrink": (8, 4),
    **dict.fromkeys(
        ("GridSample", "HardSwish", "MeanVarianceNormalization", "Mod", "NonZero", "OneHot", "RandomNormal",
         "RandomNormalLike", "Reciprocal", "RoiAlign", "Trilu"), (8, 5),
    ),
    **dict.fromkeys(("GroupNormalization", "IsInf", "LayerNormalization"), (8, 6)),
    **dict.fromkeys(("CastLike", "Hardmax"), (10, 0)),
    "DeformConv": (10, 1),
    **dict.fromkeys(("BlackmanWindow", "HammingWindow", "HannWindow"), (10, 4)),
    "STFT": (10, 5),
    **dict.fromkeys(("Gelu", "Mish"), (10, 15)),
    **dict.fromkeys(
        ("AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CenterCropPad",
         "Col2Im", "Compress", "DFT", "Det", "MaxRoiPool", "MaxUnpool", "MelWeightMatrix", "Multinomial", "Optional",
         "OptionalGetElement", "OptionalHasElement", "SequenceAt", "SequenceConstruct", "SequenceEmpty",
         "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap", "SplitToSequence", "StringNormalizer",
         "TfIdfVectorizer", "Unique"), NEVER,
    ),
}  # fmt: skip
"""Operator -> the first TensorRT whose parser reads it."""
UINT8_INPUTS: Version = (8, 5)
"""The first TensorRT whose parser reads networks with uint8 inputs."""
SCATTER_REDUCTION: Version = (10, 0)
"""The first TensorRT whose parser reads ScatterElements with a reduction."""
FLOAT16_WEIGHTS: Version = (8, 4)
"""The first TensorRT whose parser takes float16 initializers as they are."""


def unread(oldest: Version) -> frozenset[str]:
    """The operators that the parser of that TensorRT does not read."""
    return frozenset(operator for operator, first in FIRST_READ.items() if oldest < first)
