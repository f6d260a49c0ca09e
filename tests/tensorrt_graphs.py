"""Graphs for the TensorRT tests: each breaks one rule of the lint, or none."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from deploykit.core.data import DataSet
from deploykit.core.target import QuantSpec
from deploykit.hub.graph import Hub
from deploykit.hub.lower import from_proto
from deploykit.hub.quantize import quantize
from deploykit.pipeline import calibrate

RANDOM = np.random.default_rng(0)
F16 = np.float16


def model(
    body: str, x: str = "float[1,16,8,8] x", y: str = "float[1,16,8,8] y", opset: int = 17, **arrays: Any
) -> onnx.ModelProto:
    """A model from ONNX's text form; the arrays are its initializers, Python numbers are float32."""
    ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    text = f'<ir_version: {ir_version}, opset_import: ["": {opset}]> test ({x}) => ({y}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for name, value in arrays.items():
        array = np.asarray(value, np.float32) if isinstance(value, (float, list)) else np.asarray(value)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for node in proto.graph.node:
        node.name = node.output[0]
    return proto


def weights(*shape: int, axis: int = 0) -> dict[str, Any]:
    """An int8 weight ``w`` with its scales ``ws`` and zero points ``wz`` along an axis."""
    w = RANDOM.integers(-127, 128, shape).astype(np.int8)
    scales = (0.001 + 0.001 * RANDOM.random(shape[axis])).astype(np.float32)
    return {"w": w, "ws": scales, "wz": np.zeros(shape[axis], np.int8)}


PAIR = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
WEIGHT = "wd = DequantizeLinear<axis=0>(w, ws, wz)"
CONV = f"{PAIR} {WEIGHT} y = Conv<pads=[1,1,1,1]>(d, wd, b)"


def conv(body: str = CONV, **changes: Any) -> onnx.ModelProto:
    """A quantized convolution, changed."""
    usual: dict[str, Any] = {"s": 0.05, "z": np.int8(0), **weights(16, 16, 3, 3), "b": np.zeros(16, np.float32)}
    return model(body, **{**usual, **changes})


def residual() -> onnx.ModelProto:
    """Everything as TensorRT likes it: a residual block whose skip branch is quantized, a pool and a product."""
    return conv(
        """
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
        wd = DequantizeLinear<axis=0>(w, ws, wz)
        c = Conv<pads=[1,1,1,1]>(d, wd, b)
        r = Relu(c)
        rq = QuantizeLinear(r, s, z) rd = DequantizeLinear(rq, s, z)
        c2 = Conv<pads=[1,1,1,1]>(rd, wd, b)
        a = Add(c2, rd)
        r2 = Relu(a)
        p = GlobalAveragePool(r2)
        f = Flatten(p)
        fq = QuantizeLinear(f, s, z) fd = DequantizeLinear(fq, s, z)
        vd = DequantizeLinear<axis=0>(v, vs, vz)
        y = Gemm<transB=1>(fd, vd)
        """,
        y="float[1,10] y",
        **{"v" + k[1:]: a for k, a in weights(10, 16).items()},
    )


BROKEN: dict[str, tuple[str, str, onnx.ModelProto]] = {
    "zero point 3": ("Q1", "E", conv(z=np.int8(3))),
    "weight zero point 2": ("Q1", "E", conv(wz=np.full(16, 2, np.int8))),
    "uint8": ("Q2", "S", conv(z=np.uint8(0))),
    "no zero point": ("Q3", "S", conv(CONV.replace(", s, z)", ", s)"))),
    "int16": ("Q4", "E", conv(z=np.int16(0), opset=21)),
    "scale 0": ("Q5", "E", conv(s=0.0)),
    "scale -0.05": ("Q5", "E", conv(s=-0.05)),
    "computed scale": (
        "Q6",
        "E",
        conv("m = ReduceMax<keepdims=0>(x) s = Mul(m, k) " + CONV, k=1 / 127, s=np.zeros(0, np.float32)),
    ),
    "int32 bias": (
        "Q7",
        "E",
        conv(
            CONV.replace(", b)", ", bd)").replace("y =", "bd = DequantizeLinear<axis=0>(b, bs, bz) y ="),
            b=np.full(16, 100, np.int32), bs=np.full(16, 1e-4, np.float32), bz=np.zeros(16, np.int32),
        ),
    ),
    "int8 bias": (
        "Q7",
        "S",
        conv(
            CONV.replace(", b)", ", bd)").replace("y =", "bd = DequantizeLinear<axis=0>(b, bs, bz) y ="),
            b=np.full(16, 5, np.int8), bs=np.full(16, 1e-4, np.float32), bz=np.zeros(16, np.int8),
        ),
    ),
    "half weight scales": ("Q8", "E", conv(ws=np.full(16, 0.01, F16), opset=19)),
    "half bias": ("Q8", "E", conv(b=np.zeros(16, F16))),
    "activation per channel": (
        "Q9",
        "S",
        conv(CONV.replace("Linear(", "Linear<axis=1>("), s=np.full(16, 0.05, np.float32), z=np.zeros(16, np.int8)),
    ),
    "conv weight axis 1": ("Q10", "S", conv(CONV.replace("<axis=0>", "<axis=1>"))),
    "float weight": (
        "Q11",
        "S",
        conv(f"{PAIR} y = Conv<pads=[1,1,1,1]>(d, wf)", wf=np.ones((16, 16, 3, 3), np.float32)),
    ),
    "float input": ("Q11", "S", conv(f"{WEIGHT} y = Conv<pads=[1,1,1,1]>(x, wd)")),
    "transposed conv": (
        "Q12",
        "S",
        conv(CONV.replace("Conv", "ConvTranspose").replace("<axis=0>", "<axis=1>")),
    ),
    "integer operator": (
        "Q13",
        "E",
        conv("q, s, z = DynamicQuantizeLinear(x) y = Identity(x)", s=np.zeros(0, np.float32), z=np.zeros(0, np.int8)),
    ),
    "pair before relu": (
        "Q14",
        "S",
        conv(CONV.replace("y =", "c =") + " cq = QuantizeLinear(c, s, z) cd = DequantizeLinear(cq, s, z) y = Relu(cd)"),
    ),
    "pool with dilations": (
        "Q26", "E", model("y = MaxPool<kernel_shape=[2,2], dilations=[2,2]>(x)", y="float[1,16,6,6] y")
    ),
    "pool with indices": (
        "Q26", "E", model("y, i = MaxPool<kernel_shape=[2,2]>(x)", y="float[1,16,7,7] y, int64[1,16,7,7] i")
    ),
    "crop and resize": (
        "Q26", "E",
        model(
            'y = Resize<mode="linear", coordinate_transformation_mode="tf_crop_and_resize">(x, roi, scales)',
            y="float[1,16,16,16] y", scales=[1.0, 1.0, 2.0, 2.0], roi=[0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0],
        ),
    ),
    "scattered sums": (
        "Q26", "E",
        model('y = ScatterND<reduction="add">(x, i, u)', i=np.array([[0, 1, 2, 3]]), u=np.ones(1, np.float32)),
    ),
    "half scales in operator set 17": (
        "Q23",
        "E",
        conv(
            x="float16[1,16,8,8] x", y="float16[1,16,8,8] y",
            s=F16(0.05), ws=np.full(16, 0.01, F16), b=np.zeros(16, F16),
        ),
    ),
}  # fmt: skip
"""What is wrong -> the one rule it breaks, its severity, the graph."""
for _, _, proto in BROKEN.values():  # computed names are no initializers
    made = {o for node in proto.graph.node for o in node.output}
    kept = [i for i in proto.graph.initializer if i.name not in made]
    used = {i for node in proto.graph.node for i in node.input}
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(i for i in kept if i.name in used)


OPERATORS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mean": ("y = ReduceMean<keepdims=0>(x, axes)", "float[2,16] y", {"axes": np.array([2, 3])}),
    "max over all": ("y = ReduceMax<keepdims=0>(x)", "float y", {}),
    "sum": ("y = ReduceSum(x, axes)", "float[2,1,8,8] y", {"axes": np.array([1])}),
    "sum of squares": ("y = ReduceSumSquare(x, axes)", "float[2,16,8,1] y", {"axes": np.array([-1])}),
    "norm": ("y = ReduceL2(x, axes)", "float[2,16,8,1] y", {"axes": np.array([-1])}),
    "uneven split": ("y, z, w = Split<axis=1, num_outputs=3>(x)", "float[2,6,8,8] y", {}),
    "split of sizes": ("z, y = Split<axis=1>(x, sizes)", "float[2,13,8,8] y", {"sizes": np.array([3, 13])}),
    "squeeze": (
        "a = Slice(x, start, end, axis) b = Squeeze(a, axis) y = Unsqueeze(b, axis)", "float[2,1,8,8] y",
        {"start": np.array([3]), "end": np.array([4]), "axis": np.array([1])},
    ),
    "pad two axes": (
        "y = Pad(x, pads, zero, axes)", "float[2,16,8,11] y",
        {"pads": np.array([0, 1, 0, 2]), "zero": 0.0, "axes": np.array([1, -1])},
    ),
    "pad all": ("y = Pad<mode=\"edge\">(x, pads)", "float[2,16,9,8] y", {"pads": np.array([0, 0, 1, 0, 0, 0, 0, 0])}),
    "resize": (
        "y = Resize<mode=\"nearest\", antialias=0>(x, , scales)", "float[2,16,16,16] y",
        {"scales": [1.0, 1.0, 2.0, 2.0]},
    ),
    "bilinear": (
        "y = Resize<mode=\"linear\", coordinate_transformation_mode=\"align_corners\">(x, , , sizes)",
        "float[2,16,12,5] y", {"sizes": np.array([2, 16, 12, 5])},
    ),
    "pool": (
        "y = AveragePool<kernel_shape=[2,2], strides=[2,2], dilations=[1,1]>(x)", "float[2,16,4,4] y", {}
    ),
    "batch normalisation": (
        "y = BatchNormalization<training_mode=0>(x, s, b, m, v)", "float[2,16,8,8] y",
        {n: np.linspace(0.5, 1.5, 16, dtype=np.float32) for n in "sbmv"},
    ),
    "gelu": ("y = Gelu(x)", "float[2,16,8,8] y", {}),
    "tanh gelu": ("y = Gelu<approximate=\"tanh\">(x)", "float[2,16,8,8] y", {}),
    "gelu inside": ("g = Gelu(x) y = Add(g, x)", "float[2,16,8,8] y", {}),
    "hard swish": ("y = HardSwish(x)", "float[2,16,8,8] y", {}),
    "mish": ("y = Mish(x)", "float[2,16,8,8] y", {}),
    "reciprocal root": ("a = Abs(x) b = Add(a, one) r = Sqrt(b) y = Reciprocal(r)", "float[2,16,8,8] y", {"one": 1.0}),
    "normalised columns": (
        "y = LayerNormalization(x, scale, bias)", "float[2,16,8,8] y",
        {"scale": np.linspace(0.5, 2, 8, dtype=np.float32), "bias": np.linspace(-1, 1, 8, dtype=np.float32)},
    ),
    "normalised images": (
        "y = LayerNormalization<axis=1, epsilon=0.1>(x, scale)", "float[2,16,8,8] y",
        {"scale": np.ones((16, 8, 8), np.float32)},
    ),
    "cast": ("h = Cast<to=10, saturate=1>(x) y = Cast<to=1>(h)", "float[2,16,8,8] y", {}),
    "reshape": ("s = Shape(x) y = Reshape(x, s)", "float[2,16,8,8] y", {}),
    "reshape, no zeros": (
        "y = Reshape<allowzero=1>(x, s)", "float[4,512] y", {"s": np.array([4, 512])}
    ),
    "part of a shape": (
        "s = Shape<start=1, end=-1>(x) c = Cast<to=1>(s) y = Mul(c, k)", "float[2] y", {"k": 2.0}
    ),
    "rest of a shape": ("s = Shape<start=-3>(x) c = Cast<to=1>(s) y = Mul(c, k)", "float[3] y", {"k": 2.0}),
    "scatter": (
        "y = ScatterND<reduction=\"none\">(x, i, u)", "float[2,16,8,8] y",
        {"i": np.array([[0, 1, 2, 3]]), "u": np.array([9.0], np.float32)},
    ),
    "where": ("c = GreaterOrEqual(x, k) p = PRelu(x, k) y = Where(c, x, p)", "float[2,16,8,8] y", {"k": 0.25}),
    "powers": (
        "a = Mul(x, x) b = Pow(a, k) c = Sub(b, x) d = Div(c, k) y = LeakyRelu(d)", "float[2,16,8,8] y", {"k": 2.0}
    ),
}  # fmt: skip
"""What changed between operator sets 13 and 20: the body over ``x`` [2, 16, 8, 8], the output, the constants."""
SINCE_16: dict[str, tuple[str, str, dict[str, Any]]] = {
    "grid sample": (
        'y = GridSample<mode="linear">(x, g)',
        "float[2,16,3,2] y",
        {"g": np.random.default_rng(3).uniform(-1, 1, (2, 3, 2, 2)).astype(np.float32)},
    ),
    "scattered sums": (
        'y = ScatterElements<reduction="add", axis=1>(x, i, u)',
        "float[2,16,8,8] y",
        {"i": np.zeros((2, 1, 8, 8), np.int64), "u": np.ones((2, 1, 8, 8), np.float32)},
    ),
    "lower triangle": ("y = Trilu<upper=0>(x)", "float[2,16,8,8] y", {}),
}
"""What operator set 13 cannot say."""


def small_net(operator: str = "Conv") -> onnx.ModelProto:
    """A float residual net over ``x`` [batch, 3, 8, 8] with a pool and a Gemm, as the hub gets it."""
    w = {n: (0.3 * RANDOM.standard_normal(s)).astype(np.float32) for n, s in _SHAPES.items()}
    body = f"""
        c1 = Conv<pads=[1,1,1,1]>(x, w1, b1) r1 = Relu(c1)
        c2 = {operator}<pads=[1,1,1,1]>(r1, w2, b2)
        a = Add(c2, r1) r2 = Clip(a, low, high)
        p = ReduceMean<keepdims=0>(r2, axes)
        y = Gemm<transB=1>(p, w3, b3)
    """
    return model(body, "float[batch,3,8,8] x", "float[batch,10] y", 20, axes=np.array([2, 3]), low=0.0, high=6.0, **w)


_SHAPES = {"w1": (16, 3, 3, 3), "b1": (16,), "w2": (16, 16, 3, 3), "b2": (16,), "w3": (10, 16), "b3": (10,)}


def samples(count: int = 8, *shape: int) -> NDArray[np.float32]:
    """Normal numbers ``[count, *shape]``, 3x8x8 unless told."""
    return np.random.default_rng(1).standard_normal((count, *(shape or (3, 8, 8)))).astype(np.float32)


def hub(
    proto: onnx.ModelProto, spec: QuantSpec, data: dict[str, NDArray[Any]], keep_float: tuple[str, ...] = ()
) -> Hub:
    """Calibrated and quantized."""
    graph = from_proto(proto, "test")
    return quantize(graph, calibrate(graph, DataSet.of(data)), spec, keep_float=keep_float)
