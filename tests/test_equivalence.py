"""The hub in torch computes what ONNX Runtime computes, operator by operator, and its gradients are those of the paper.

Random graphs of all operators that train; every operator is fed the same integers in both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graphs import images, measured, normal, residual
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deploykit import exporters, targets
from deploykit.check import check_operators
from deploykit.core.errors import MissingExtra
from deploykit.core.request import Gate
from deploykit.core.target import QuantSpec
from deploykit.hub.graph import FloatGraph, Hub
from deploykit.hub.lower import from_proto
from deploykit.hub.quantize import quantize
from deploykit.hub.running import session
from deploykit.hub.slices import OperatorSlice, Slicer, operator_slices
from deploykit.hub.training import fake_quant
from deploykit.hub.training.fake_quant import fake_quantize
from deploykit.hub.training.module import HubModule

SIGNED = QuantSpec(activation_signed=True, activation_symmetric=True)
SPECS = {
    "8 bits": QuantSpec(),
    "4-bit weights": QuantSpec(weight_bits=4),
    "4 bits": QuantSpec(weight_bits=4, activation_bits=4),
    "4 bits, ports in 8": QuantSpec(weight_bits=4, activation_bits=4, port_bits=8),
    "signed": SIGNED,
    "powers of two, one scale per tensor": QuantSpec(scale="power_of_two", weight_granularity="tensor"),
}


# ------------------------------------------------------------------ random graphs


@dataclass
class Net:
    """A graph in the making: its last value ``[n, channels, side, side]`` and what can be added to or put beside it."""

    random: np.random.Generator
    channels: int = 3
    side: int = 9
    value: str = "x"
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, NDArray[Any]] = field(default_factory=dict)
    before: list[tuple[str, int, int]] = field(default_factory=list)

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{operator.lower()}{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        spread = 1 / np.sqrt(max(1, np.prod(shape[1:])))
        self.weights[name] = self.random.normal(scale=spread, size=shape).astype(np.float32)
        return name

    def conv(self, channels: int, kernel: int, stride: int, depthwise: bool) -> None:
        group = self.channels if depthwise else 1
        channels = self.channels if depthwise else channels
        pad = kernel // 2
        w, b = self.weight(channels, self.channels // group, kernel, kernel), self.weight(channels)
        self.value = self.add(
            "Conv", self.value, w, b, kernel_shape=[kernel] * 2, pads=[pad] * 4, strides=[self.stride(stride)] * 2,
            group=group,
        )  # fmt: skip
        self.channels = channels

    def activation(self, kind: str) -> None:
        if kind == "Relu":
            self.value = self.add("Relu", self.value)
        elif kind == "Clip":
            low, high = f"low{len(self.nodes)}", f"high{len(self.nodes)}"
            self.weights |= {low: np.asarray(0, np.float32), high: np.asarray(self.random.uniform(0.5, 6), np.float32)}
            self.value = self.add("Clip", self.value, low, high)

    def pool(self, kind: str) -> None:
        """Windows of nine, padding counted: means of an even number often lie between two integers, where every kernel
        rounds in its own way."""
        counted = {"count_include_pad": 1} if kind == "AveragePool" else {}
        self.value = self.add(
            kind, self.value, kernel_shape=[3, 3], strides=[self.stride(2)] * 2, pads=[1] * 4, **counted
        )

    def stride(self, wanted: int) -> int:
        """1 where the side would become even: 9, 5, 3."""
        if wanted == 1 or self.side == 3:
            return 1
        self.side = (self.side + 1) // 2
        return 2

    def join(self, kind: str) -> None:
        """With an earlier value of the same shape, or (joined along channels) of the same size."""
        fits = [v for v, c, side in self.before if side == self.side and (c == self.channels or kind == "Concat")]
        if not fits or (kind == "Concat" and self.channels > 6):
            return
        other = fits[int(self.random.integers(len(fits)))]
        count = next(c for v, c, _ in self.before if v == other)
        self.value = self.add(kind, self.value, other, **({"axis": 1} if kind == "Concat" else {}))
        self.channels += count if kind == "Concat" else 0

    def head(self) -> FloatGraph:
        pooled = self.add("GlobalAveragePool", self.value)
        flat = self.add("Flatten", pooled, axis=1)
        self.nodes.append(onnx.helper.make_node(
            "Gemm", [flat, self.weight(5, self.channels), self.weight(5)], ["y"], name="y", transB=1
        ))  # fmt: skip
        inputs = [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 3, 9, 9])]
        outputs = [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 5])]
        constants = [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in self.weights.items()]
        made = onnx.helper.make_graph(self.nodes, "random", inputs, outputs, constants)
        opset = [onnx.helper.make_opsetid("", 20)]
        return from_proto(onnx.helper.make_model(made, opset_imports=opset, ir_version=10), "random")


@st.composite
def networks(draw: st.DrawFn) -> FloatGraph:
    """Convolutions (plain and depthwise), activations, pools, sums and concatenations, in any order; a classifier."""
    net = Net(np.random.default_rng(draw(st.integers(0, 2**32 - 1))))
    for _ in range(draw(st.integers(1, 5))):
        net.before.append((net.value, net.channels, net.side))
        kind = draw(st.sampled_from(["conv", "conv", "depthwise", "MaxPool", "AveragePool", "Add", "Concat"]))
        if kind in ("conv", "depthwise"):
            same = draw(st.booleans())  # so that something can be added
            channels = net.channels if same else draw(st.integers(1, 6))
            net.conv(channels, draw(st.sampled_from([1, 3])), 1 if same else draw(st.integers(1, 2)), kind != "conv")
        elif kind in ("Add", "Concat"):
            net.join(kind)
        else:
            net.pool(kind)
        net.activation(draw(st.sampled_from(["Relu", "Clip", ""])))
    return net.head()


@dataclass(frozen=True)
class Difference:
    """Of one operator's output in two runtimes, in steps of its scale."""

    layer: str
    most: float
    """The largest."""
    at_ties: int
    """Of the differing values, those that lie halfway between two integers before they are rounded."""
    elsewhere: int
    count: int

    @property
    def agrees(self) -> bool:
        """Whether no value is off by more than a step, and no more than 0.1 % by one, ties apart."""
        return self.most <= 1 and self.elsewhere <= self.count // 1000


def compared(hub: Hub, inputs: dict[str, NDArray[Any]], optimize: bool) -> list[Difference]:
    """Every operator in torch and in ONNX Runtime, on the same integers.

    Ties are counted apart: ``x + x`` on a grid twice as coarse has one at every odd value, and a kernel that adds an
    odd zero point before it rounds to even goes the other way than QuantizeLinear, which adds it afterwards.
    """
    model = onnx.load_model_from_string(hub.bytes)
    slicer, found = Slicer(model), []
    for part in operator_slices(hub):
        given = {
            name: inputs[name]
            if name in inputs
            else session(slicer.cut([name], []), optimize=False).run(None, inputs)[0]
            for name in part.inputs
        }
        (theirs,) = session(part.model, optimize=optimize).run(None, given)
        with torch.no_grad():
            module = HubModule(hub, piece=part.model)
            ours = module(**{n: torch.from_numpy(a) for n, a in given.items()})[part.output].numpy()
        steps = np.abs(np.rint((ours - theirs) / part.scale))
        halfway = np.abs(np.abs(unrounded(part, given) / part.scale % 1) - 0.5) < 1e-3
        differ = steps > 0
        at_ties = int((differ & halfway).sum())
        found.append(Difference(part.layer, float(steps.max()), at_ties, int(differ.sum()) - at_ties, steps.size))
    return found


def unrounded(part: OperatorSlice, given: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """The operator's output before it is quantized."""
    piece = Slicer(part.model)
    quantizer = piece.producer[piece.producer[part.output].input[0]]
    (real,) = session(piece.cut([quantizer.input[0]], []), optimize=False).run(None, given)
    return np.asarray(real, np.float64)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(made=networks())
def test_every_operator_computes_the_same_integers_in_torch_and_in_onnx_runtime(
    spec: QuantSpec, made: FloatGraph
) -> None:
    data = images(32, shape=(3, 9, 9))
    hub = quantize(made, measured(made, data), spec)
    for optimize in (False, True):
        for found in compared(hub, next(data.batches(32)).inputs, optimize):
            assert found.agrees, (optimize, found)


@pytest.mark.parametrize("name", ["mobile-arm", "x86", "x86-openvino", "cortex-m7"])
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(made=networks())
def test_every_operator_of_a_file_computes_the_integers_of_the_hub(name: str, made: FloatGraph) -> None:
    """Within a step, and as many products off by one as the runtime's kernels round otherwise: 10 % in LiteRT."""
    target = targets.load(name)
    exporter = exporters.load(target.exporter)
    try:
        exporter.runtime()
    except MissingExtra as missing:
        pytest.skip(str(missing))
    data = images(32, shape=(3, 9, 9))
    hub = quantize(made, measured(made, data), target.quant)
    checks, _ = check_operators(hub, exporter, target, data, Gate())
    assert all(check.passed for check in checks), checks
    limits = [check.bound for check in checks if "differing" in check.name]
    assert max(limits, default=0) <= 10


# ------------------------------------------------------------------ gradients


def test_the_gradient_of_a_step_is_that_of_the_paper() -> None:
    """Esser et al. 2020, equation 3 and section 2.2, written out in numpy for 3-bit weights: -3..3."""
    v = np.array([[-2.1, -0.4, 0.3, 0.75, 5.0], [0.2, 0.05, -0.7, 0.9, -0.31]], np.float32)
    s = np.array([[0.5], [0.2]], np.float32)
    upstream = normal(0, 2, 5)
    by_step = np.where(v / s <= -3, -3, np.where(v / s >= 3, 3, np.rint(v / s) - v / s))
    g = 1 / np.sqrt(5 * 3)

    weights, steps = torch.from_numpy(v).requires_grad_(), torch.from_numpy(s).requires_grad_()
    quantized = fake_quantize(weights, steps, -3, 3, count=5)
    quantized.backward(torch.from_numpy(upstream))

    np.testing.assert_allclose(quantized.detach(), np.clip(np.rint(v / s), -3, 3) * s, rtol=1e-6)
    assert steps.grad is not None and weights.grad is not None
    np.testing.assert_allclose(steps.grad, (upstream * by_step).sum(1, keepdims=True) * g, rtol=1e-5)
    np.testing.assert_allclose(weights.grad, upstream * (np.abs(v / s) <= 3))


def test_a_zero_point_moves_the_ends() -> None:
    """Unsigned 4 bits with zero point 3: -3 .. 12 steps."""
    x = torch.tensor([-1.0, -0.2, 0.26, 1.19, 9.0], requires_grad=True)
    step = torch.tensor(0.1, requires_grad=True)
    y = fake_quantize(x, step, 0 - 3, 15 - 3, count=1)
    y.sum().backward()
    assert y.tolist() == pytest.approx([-0.3, -0.2, 0.3, 1.2, 1.2])
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 0]
    assert step.grad is not None
    assert float(step.grad) == pytest.approx((-3 + 0 + 0.4 + 0.1 + 12) / np.sqrt(12), rel=1e-4)


@pytest.mark.parametrize("spec", [QuantSpec(weight_bits=4, activation_bits=4), SIGNED], ids=["4 bits", "signed"])
def test_gradients_are_the_slopes_of_the_network_without_rounding(
    spec: QuantSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Straight through means: rounding left out, clipping kept. There finite differences can be taken."""
    monkeypatch.setattr(fake_quant, "nearest", lambda x: x)
    monkeypatch.setattr(fake_quant, "gradient_scale", lambda *_: 1.0)
    made, data = residual(), images(16)
    module = HubModule(quantize(made, measured(made, data.take(slice(0, 4))), spec), learn_scales=True).double()
    scatter(module, 0.02)  # the largest weights lie just where they are cut
    x = torch.from_numpy(next(data.batches(16)).inputs["x"]).double()

    def loss() -> torch.Tensor:
        return module(x=x)["y"].square().sum()

    loss().backward()
    random = torch.Generator().manual_seed(0)
    slopes = 0
    for name, parameter in module.named_parameters():
        direction = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        ends = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(step * direction)
                ends.append(float(loss()))
                parameter.sub_(step * direction)
        assert parameter.grad is not None
        expected = float((parameter.grad * direction).sum())
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(expected, rel=1e-3, abs=1e-4), name
        slopes += expected != 0
    assert slopes > 10


def test_a_softened_rounding_has_the_slope_that_is_used() -> None:
    """The mean over shifts of a staircase is the line: averaged finite differences of real rounding give the same."""
    x, width = torch.linspace(-0.7, 1.4, 22), 1e-3
    shifts = (torch.arange(1000) + 0.5) / 1000
    rises = [torch.round(x / 0.1 + width + t) - torch.round(x / 0.1 - width + t) for t in shifts]
    slope = torch.stack(rises).mean(0) / (2 * width)
    probe = x.clone().requires_grad_()
    fake_quantize(probe, torch.tensor(0.1), -100, 100, 1).sum().backward()
    assert probe.grad is not None
    torch.testing.assert_close(slope, probe.grad, atol=0.5, rtol=0)
    assert float(slope.mean()) == pytest.approx(1.0, abs=0.02)


def scatter(module: torch.nn.Module, by: float) -> None:
    """Moves all parameters at random, as training might."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=random, dtype=parameter.dtype))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_trained_hub_computes_what_it_computed_while_it_trained(spec: QuantSpec) -> None:
    """Scales, integers and biases as they are written back."""
    made, data = residual(), images(64)
    module = HubModule(quantize(made, measured(made, data), spec), learn_scales=True)
    scatter(module, 0.1)
    hub, inputs = module.to_hub(), next(data.batches(64)).inputs
    for found in compared(hub, inputs, optimize=True):
        assert found.agrees, found
    with torch.no_grad():
        ours, back = (m(x=torch.from_numpy(inputs["x"]))["y"] for m in (module, HubModule(hub)))
    assert float((ours != back).float().mean()) < 0.1  # biases were not rounded to their steps while training
    assert float((ours - back).abs().max()) < 0.05 * float(ours.abs().max())
