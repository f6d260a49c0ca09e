"""What every operator of the table means in torch, differentiably: ONNX operator -> function(attributes, *inputs).

Functions take the node's attributes as a dict and its inputs as tensors (None where an optional input is absent).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deploykit.core.errors import DeploykitError

Attributes = Mapping[str, Any]


def ints(tensor: Tensor) -> list[int]:
    """A shape, axes or pads tensor as a list."""
    return [int(v) for v in tensor.reshape(-1).tolist()]


def pad_onnx(x: Tensor, pads: Sequence[int], axes: Sequence[int] | None = None, value: float = 0.0) -> Tensor:
    """Constant padding in ONNX order: all begins, then all ends, for ``axes`` (default: all)."""
    axes = list(range(x.ndim)) if axes is None else [a % x.ndim for a in axes]
    begin, end = dict.fromkeys(range(x.ndim), 0), dict.fromkeys(range(x.ndim), 0)
    for i, axis in enumerate(axes):
        begin[axis], end[axis] = int(pads[i]), int(pads[i + len(axes)])
    return F.pad(x, [n for axis in reversed(range(x.ndim)) for n in (begin[axis], end[axis])], value=value)


def _conv(a: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    rank = w.ndim - 2
    pads = a.get("pads") or [0] * (2 * rank)
    if pads[:rank] != pads[rank:]:
        x, pads = pad_onnx(x, [0, 0, *pads[:rank], 0, 0, *pads[rank:]]), [0] * (2 * rank)
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    strides, dilations = a.get("strides") or [1] * rank, a.get("dilations") or [1] * rank
    y: Tensor = function(x, w, b, strides, pads[:rank], dilations, a.get("group", 1))
    return y


def _conv_transpose(a: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    rank = w.ndim - 2
    pads = a.get("pads") or [0] * (2 * rank)
    strides, dilations = a.get("strides") or [1] * rank, a.get("dilations") or [1] * rank
    extra = a.get("output_padding") or [0] * rank
    # unequal pads: compute without padding, then cut each side
    function: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    y: Tensor = function(x, w, b, strides, 0, extra, a.get("group", 1), dilations)
    for axis in range(rank):
        y = y.narrow(2 + axis, pads[axis], y.shape[2 + axis] - pads[axis] - pads[rank + axis])
    return y


def _gemm(a: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    x = x.transpose(0, 1) if a.get("transA") else x
    y: Tensor = a.get("alpha", 1.0) * (x @ (w.transpose(0, 1) if a.get("transB") else w))
    return y if b is None else y + a.get("beta", 1.0) * b


def _clip(a: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    x = x if low is None else torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def _max_pool(a: Attributes, x: Tensor) -> Tensor:
    rank = x.ndim - 2
    pads = a.get("pads") or [0] * (2 * rank)
    x = pad_onnx(x, [0, 0, *pads[:rank], 0, 0, *pads[rank:]], value=float("-inf"))
    function: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
    strides, dilations = a.get("strides") or [1] * rank, a.get("dilations") or [1] * rank
    y: Tensor = function(x, a["kernel_shape"], strides, 0, dilations, bool(a.get("ceil_mode", 0)))
    return y


def _average_pool(a: Attributes, x: Tensor) -> Tensor:
    """Average over the window; padding counts only if the attribute says so."""
    rank = x.ndim - 2
    pads = a.get("pads") or [0] * (2 * rank)
    widths = [0, 0, *pads[:rank], 0, 0, *pads[rank:]]
    function: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
    window, strides, ceil = a["kernel_shape"], a.get("strides") or [1] * rank, bool(a.get("ceil_mode", 0))
    y: Tensor = function(pad_onnx(x, widths), window, strides, 0, ceil)
    if any(pads) and not a.get("count_include_pad", 0):
        share: Tensor = function(pad_onnx(torch.ones_like(x), widths), window, strides, 0, ceil)
        y = y / share
    return y


def _pad(a: Attributes, x: Tensor, pads: Tensor, fill: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
    if a.get("mode", "constant") != "constant":
        raise DeploykitError(f"Pad in mode {a['mode']} has no torch meaning here; the hub cannot be trained")
    value = 0.0 if fill is None else float(fill)
    return pad_onnx(x, ints(pads), None if axes is None else ints(axes), value)


def _slice(
    a: Attributes, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    begins, stops = ints(starts), ints(ends)
    where = range(len(begins)) if axes is None else ints(axes)
    strides = [1] * len(begins) if steps is None else ints(steps)
    for begin, stop, axis, stride in zip(begins, stops, where, strides, strict=True):
        size = x.shape[axis]
        # numpy's rules, also for negative strides, by way of an index
        index = torch.arange(size)[:: 1 if stride > 0 else -1]
        if stride > 0:
            index = index[slice(begin, min(stop, size), stride)]
        else:
            kept = range(*slice(begin, None if stop < -size else stop, stride).indices(size))
            index = torch.tensor(list(kept), dtype=torch.long)
        x = x.index_select(axis % x.ndim, index.to(x.device))
    return x


def _reshape(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    wanted = ints(shape)
    if not a.get("allowzero", 0):
        wanted = [x.shape[i] if v == 0 else v for i, v in enumerate(wanted)]
    return x.reshape(wanted)


def _flatten(a: Attributes, x: Tensor) -> Tensor:
    axis = a.get("axis", 1) % (x.ndim + 1)
    rows = 1
    for size in x.shape[:axis]:
        rows *= size
    return x.reshape(rows, -1)


def _squeeze(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(ints(axes)))


def _unsqueeze(a: Attributes, x: Tensor, axes: Tensor) -> Tensor:
    rank = x.ndim + axes.numel()
    for axis in sorted(i % rank for i in ints(axes)):
        x = x.unsqueeze(axis)
    return x


def _reduced(by: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
        where = ints(axes) if axes is not None else list(range(x.ndim))
        return by(x, where, keepdim=bool(a.get("keepdims", 1)))

    return reduce


def _resize(
    a: Attributes, x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    rank = x.ndim - 2
    if sizes is not None and sizes.numel():
        size = ints(sizes)[-rank:]
    else:
        assert scales is not None
        size = [int(n * float(s)) for n, s in zip(x.shape[2:], scales.tolist()[-rank:], strict=True)]
    mode = a.get("mode", "nearest")
    if mode not in ("nearest", "linear") or a.get("antialias", 0):
        raise DeploykitError(f"Resize in mode {mode} has no torch meaning here; the hub cannot be trained")
    if mode == "nearest":
        return F.interpolate(x, size=size, mode="nearest")
    names = {1: "linear", 2: "bilinear", 3: "trilinear"}
    corners = a.get("coordinate_transformation_mode", "half_pixel") == "align_corners"
    return F.interpolate(x, size=size, mode=names[rank], align_corners=corners)


def _depth_to_space(a: Attributes, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    b = a["blocksize"]
    if a.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, b)
    return x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // (b * b), h * b, w * b)


def _layer_norm(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, x.shape[a.get("axis", -1) % x.ndim :], weight, bias, a.get("epsilon", 1e-5))


def _gather(a: Attributes, x: Tensor, index: Tensor) -> Tensor:
    axis = a.get("axis", 0) % x.ndim
    picked = x.index_select(axis, index.reshape(-1).long() % x.shape[axis])
    return picked.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _shape(a: Attributes, x: Tensor) -> Tensor:
    return torch.tensor(x.shape[a.get("start", 0) : a.get("end", x.ndim)])


def _expand(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(ints(shape))))  # type: ignore[no-untyped-call]


def _split(a: Attributes, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = a.get("axis", 0)
    if sizes is not None:
        return torch.split(x, ints(sizes), axis)
    return torch.split(x, -(-x.shape[axis] // a["num_outputs"]), axis)


def _hard_sigmoid(a: Attributes, x: Tensor) -> Tensor:
    y: Tensor = a.get("alpha", 0.2) * x + a.get("beta", 0.5)
    return y.clamp(0, 1)


def _batch_norm(a: Attributes, x: Tensor, g: Tensor, b: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return F.batch_norm(x, mean, variance, g, b, eps=a.get("epsilon", 1e-5))


def _norm(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    where = ints(axes) if axes is not None else list(range(x.ndim))
    return x.square().sum(where, keepdim=bool(a.get("keepdims", 1))).sqrt()


Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(Xt W^T + Wb, Ht-1 R^T + Rb, Ht-1, Ct-1) -> (Ht, Ct)."""


def _lstm_step(x: Tensor, r: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, o, f, g = (x + r).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_step(x: Tensor, r: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    (xz, xr, xh), (rz, rr, rh) = x.chunk(3, -1), r.chunk(3, -1)
    z = torch.sigmoid(xz + rz)
    return (1 - z) * torch.tanh(xh + torch.sigmoid(xr + rr) * rh) + z * h, c


def _recurrent(step: Step) -> Callable[..., tuple[Tensor, ...]]:
    """A layer without initial states: Y [steps, directions, n, units], Y_h and Y_c [directions, n, units]."""

    def layer(
        a: Attributes, x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, *rest: Any
    ) -> tuple[Tensor, ...]:
        if any(v is not None for v in rest) or (step is _gru_step and not a.get("linear_before_reset", 0)):
            raise DeploykitError(
                "a recurrent layer with initial states, lengths or another order of gates has no torch meaning here; "
                "the hub cannot be trained"
            )
        every, last_h, last_c = [], [], []
        for d in range(w.shape[0]):
            backwards = a.get("direction", "forward") == "reverse" or d == 1
            wb, rb = (torch.zeros(2, w.shape[1]) if b is None else b[d].reshape(2, -1)).unbind(0)
            h = c = x.new_zeros(x.shape[1], r.shape[2])
            steps = []
            for sample in x.flip(0) if backwards else x:
                h, c = step(sample @ w[d].T + wb, h @ r[d].T + rb, h, c)
                steps.append(h)
            y = torch.stack(steps)
            every.append(y.flip(0) if backwards else y)
            last_h.append(h)
            last_c.append(c)
        return torch.stack(every, 1), torch.stack(last_h), torch.stack(last_c)

    return layer


_CAST = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float16, 11: torch.float64}

MEANING: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    # the operators that can be integer (`operators.ROLES`)
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": lambda a, x, y: x @ y,
    "Add": lambda a, x, y: x + y,
    "Sub": lambda a, x, y: x - y,
    "Mul": lambda a, x, y: x * y,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda a, x: x.mean(list(range(2, x.ndim)), keepdim=True),
    "ReduceMean": _reduced(torch.mean),
    "ReduceMax": _reduced(torch.amax),
    "ReduceMin": _reduced(torch.amin),
    "ReduceSum": _reduced(torch.sum),
    "Concat": lambda a, *xs: torch.cat(xs, a["axis"]),
    "Elu": lambda a, x: F.elu(x, a.get("alpha", 1.0)),
    "Gather": _gather,
    "HardSwish": lambda a, x: F.hardswish(x),
    "LeakyRelu": lambda a, x: F.leaky_relu(x, a.get("alpha", 0.01)),
    "PRelu": lambda a, x, slope: torch.where(x < 0, x * slope, x),
    "Tanh": lambda a, x: torch.tanh(x),
    "LSTM": _recurrent(_lstm_step),
    "GRU": _recurrent(_gru_step),
    "HardSigmoid": _hard_sigmoid,
    "Sigmoid": lambda a, x: torch.sigmoid(x),
    "Softmax": lambda a, x: x.softmax(a.get("axis", -1)),
    "Resize": _resize,
    "MaxPool": _max_pool,
    "Pad": _pad,
    "Slice": _slice,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": lambda a, x: x.permute(a.get("perm") or tuple(reversed(range(x.ndim)))),
    "DepthToSpace": _depth_to_space,
    "Split": _split,
    "Expand": _expand,
    "Identity": lambda a, x: x,
    "Relu": lambda a, x: F.relu(x),
    "Clip": _clip,
    # operators that stay in float beside them
    "Div": lambda a, x, y: x / y,
    "Sqrt": lambda a, x: x.sqrt(),
    "Pow": lambda a, x, y: x**y,
    "Erf": lambda a, x: torch.erf(x),
    "Exp": lambda a, x: x.exp(),
    "Gelu": lambda a, x: F.gelu(x, approximate=a.get("approximate", "none")),
    "LayerNormalization": _layer_norm,
    "BatchNormalization": _batch_norm,
    "ReduceL2": _norm,
    "Shape": _shape,
    "Cast": lambda a, x: x.to(_CAST[a["to"]]),
}


def refuse_untrainable(operators: Iterable[str], what: str) -> None:
    """Raises for operators without a meaning in torch.

    Args:
        operators: of the graph that is to be trained.
        what: is trained.

    Raises:
        DeploykitError: names them all.
    """
    unknown = sorted(set(operators) - set(MEANING) - {"QuantizeLinear", "DequantizeLinear"})
    if unknown:
        raise DeploykitError(f"training {what} is not possible: no torch meaning for {', '.join(unknown)}")
