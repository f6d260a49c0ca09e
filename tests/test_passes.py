"""Each pass does what its paper says, and keeps what a pass must keep."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import onnx
import pytest
import torch
from graphs import conv_relu_conv, graph, images, measured, normal, residual, run

from deploykit import passes, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.recipe import TrainSettings
from deploykit.core.target import QuantSpec
from deploykit.hub.lower import lower
from deploykit.hub.quantize import quantize
from deploykit.hub.structure import bake
from deploykit.hub.training.module import HubModule
from deploykit.passes.bias_correct import BiasCorrect
from deploykit.passes.equalize import Equalize
from deploykit.passes.qat import Qat
from deploykit.passes.sparsify import Sparsify
from deploykit.training.trainer import Trainer

X86 = targets.load("x86")
LINEAR_INPUTS = QuantSpec(
    activation_signed=True, activation_symmetric=True, bias="float", placement="linear_inputs",
    weight_scale_floor=2.0**-14,
)  # fmt: skip


def context(data: DataSet, **more) -> Context:
    return Context(X86, {"calibration": data, "train": data}, **more)


@pytest.mark.parametrize("name", [n for n in passes.names() if passes.load(n).stage == "hub"])
def test_a_hub_step_does_not_look_at_the_target(name: str) -> None:
    """Targets with equal specs share one hub: what a step made of it must not depend on which of them came first."""
    assert "context.target" not in inspect.getsource(inspect.getmodule(passes.load(name)))


class SmallNet(torch.nn.Module):
    """Convolution, BN, ReLU6, depthwise convolution, BN, ReLU, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(8)
        self.depthwise = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(8)
        self.head = torch.nn.Linear(8, 5)
        self.train()
        with torch.no_grad():
            for _ in range(5):
                self(torch.randn(32, 3, 8, 8))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.relu6(self.bn1(self.conv(x)))
        y = torch.relu(self.bn2(self.depthwise(y)))
        return self.head(y.mean((2, 3)))


# --- bias correction


def pre_activation_means(hub, data, tensor):
    """Mean per channel of a product's output in the hub, with every Q/DQ computed in float."""
    from deploykit.hub.running import session
    from deploykit.hub.slices import Slicer

    slicer = Slicer(onnx.load_model_from_string(hub.bytes))
    model = slicer.cut([tensor], [])
    (y,) = session(model, optimize=False).run(None, next(data.batches(len(data))).inputs)
    return y.mean(axis=(0, 2, 3)) if y.ndim == 4 else y.mean(axis=0)


@pytest.mark.parametrize("spec", [QuantSpec(weight_bits=3), LINEAR_INPUTS])
def test_bias_correction_restores_every_channels_mean(spec) -> None:
    made, data = residual(), images(24)
    ranges = measured(made, data)
    hub = quantize(made, ranges, spec)
    corrected = BiasCorrect()(hub, context(data))
    for tensor in ("a", "b"):
        expected = ranges.means[tensor]
        before = np.abs(pre_activation_means(hub, data, tensor) - expected).max()
        after = np.abs(pre_activation_means(corrected, data, tensor) - expected).max()
        assert after < max(0.2 * before, 2e-3), tensor


def test_bias_correction_changes_biases_and_nothing_else() -> None:
    made, data = residual(), images()
    hub = quantize(made, measured(made, data), QuantSpec(weight_bits=4))
    corrected = BiasCorrect()(hub, context(data))
    before = {t.name: t for t in onnx.load_model_from_string(hub.bytes).graph.initializer}
    after = {t.name: t for t in onnx.load_model_from_string(corrected.bytes).graph.initializer}
    changed = [n for n in before if before[n] != after[n]]
    assert before.keys() == after.keys()
    assert changed
    assert all(onnx.numpy_helper.to_array(before[n]).dtype == np.int32 for n in changed)


def test_bias_correction_does_not_depend_on_where_activations_wait(monkeypatch) -> None:
    made, data = residual(), images()
    hub = quantize(made, measured(made, data), QuantSpec(weight_bits=4))
    in_memory = BiasCorrect()(hub, context(data)).bytes
    monkeypatch.setattr("deploykit.hub.fitting.activations.IN_MEMORY", 1)
    assert BiasCorrect()(hub, context(data)).bytes == in_memory


# --- cross-layer equalization


def uneven(activation: str) -> tuple[str, dict]:
    weights = {"wa": normal(0, 4, 3, 3, 3), "ba": 0.1 * normal(1, 4), "wb": normal(2, 5, 4, 3, 3), "bb": normal(3, 5)}
    # the same function as with even weights, but the channels of the first layer differ by a factor of 1000
    spread = np.array([10, 1, 0.1, 0.01], np.float32)
    weights["wa"] *= spread[:, None, None, None] * 0.2
    weights["ba"] *= spread * 0.2
    weights["wb"] /= spread[None, :, None, None]
    text = f"""(float[batch,3,8,8] x) => (float[batch,5,8,8] y) {{
        a = Conv<pads=[1,1,1,1]>(x, wa, ba)
        r = {activation}
        y = Conv<pads=[1,1,1,1]>(r, wb, bb)
    }}"""
    return text, weights


def test_equalization_makes_neighbouring_channel_ranges_equal_and_keeps_the_function() -> None:
    text, weights = uneven("Relu(a)")
    made, data = graph(text, **weights), images()
    equal = Equalize()(made, context(data))
    wa, wb = (equal.model.graph.initializers[n].const_value.numpy() for n in ("wa", "wb"))
    np.testing.assert_allclose(np.abs(wa).max(axis=(1, 2, 3)), np.abs(wb).max(axis=(0, 2, 3)), rtol=1e-2)
    np.testing.assert_allclose(run(equal.bytes, data)[0], run(made.bytes, data)[0], atol=1e-4)


def test_equalization_under_relu6_keeps_the_function_on_the_calibration_data() -> None:
    text, weights = uneven("Clip(a, low, high)")
    limits = {"low": np.float32(0), "high": np.float32(6)}
    made, data = graph(text, **weights, **limits), images()
    equal = Equalize()(made, context(data))
    assert equal.bytes != made.bytes
    np.testing.assert_allclose(run(equal.bytes, data)[0], run(made.bytes, data)[0], atol=1e-4)


def test_equalization_leaves_a_layer_alone_that_two_others_read() -> None:
    made = residual()
    assert Equalize()(made, context(images())).bytes == made.bytes


def test_equalization_helps_per_tensor_weights() -> None:
    text, weights = uneven("Relu(a)")
    made, data = graph(text, **weights), images(32)
    spec = QuantSpec(weight_granularity="tensor")
    (expected,) = run(made.bytes, data)

    def error(g) -> float:
        return float(np.square(run(quantize(g, measured(g, data), spec).bytes, data)[0] - expected).mean())

    assert error(Equalize()(made, context(data))) < 0.5 * error(made)


# --- pruning


@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_pruning_removes_the_smallest_weights_of_the_whole_network(sparsity) -> None:
    net = SmallNet()
    weights = torch.cat([p.flatten() for n, p in net.named_parameters() if p.ndim > 1])
    plain, masks = bake(Sparsify(sparsity)(net, context(images())))
    left = torch.cat([p.flatten() for n, p in plain.named_parameters() if p.ndim > 1])
    removed = np.concatenate([~m.flatten() for m in masks.values()])
    assert removed.mean() == pytest.approx(sparsity, abs=0.01)
    assert weights[torch.from_numpy(removed)].abs().max() <= left[left != 0].abs().min()


def test_pruning_takes_exactly_the_share_also_among_equal_magnitudes() -> None:
    layer = torch.nn.Linear(10, 10)
    torch.nn.init.constant_(layer.weight, 0.5)
    _, masks = bake(Sparsify(0.1)(torch.nn.Sequential(layer).eval(), context(images())))
    assert sum(int((~m).sum()) for m in masks.values()) == 10


def test_a_pruned_model_is_in_the_mode_it_came_in() -> None:
    assert not any(m.training for m in Sparsify(0.5)(SmallNet(), context(images())).modules())


def test_the_mask_of_a_transposed_weight_is_followed() -> None:
    """A Linear on [n, t, c] becomes a MatMul with the transposed weight under another name."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 6)).eval()
    pruned = Sparsify(0.5)(net, context(images()))
    made = lower(pruned, {"input": normal(0, 2, 3, 4)})
    (mask,) = made.masks.values()
    (name,) = made.masks
    assert mask.sum() == 12
    assert not made.model.graph.initializers[name].const_value.numpy()[~mask].any()


def test_zeros_of_layers_left_in_float_survive_training_too() -> None:
    net, data = SmallNet(), images(32)
    here = context(data, original=net, trainer=Trainer(TrainSettings(batch=8)))
    made = lower(Sparsify(0.6)(net, here), {"x": normal(0, 2, 3, 8, 8)})
    hub = quantize(made, measured(made, data), QuantSpec(), keep_float=["conv"])
    trained = Qat(steps=3, learning_rate=1e-2)(hub, here)
    weight = trained.quantized.graph.initializers["conv.weight"].const_value.numpy()
    assert not weight[~made.masks["conv.weight"]].any()


def test_pruning_leaves_the_original_alone() -> None:
    net = SmallNet()
    before = copy.deepcopy(net.state_dict())
    Sparsify(0.5)(net, context(images()))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_zeros_survive_every_later_stage_of_a_network_with_normalisation() -> None:
    """prune -> lower (BN folded) -> equalize -> quantize -> bias correction -> qat."""
    net, data = SmallNet(), images(32)
    here = context(data, original=net, trainer=Trainer(TrainSettings(batch=8)))
    pruned = Sparsify(0.6)(net, here)
    made = lower(pruned, {"x": normal(0, 2, 3, 8, 8)})
    assert set(made.masks) == {"conv.weight", "depthwise.weight", "head.weight"}

    def holds(model) -> None:
        arrays = {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}
        for name, mask in made.masks.items():
            assert not arrays[name if name in arrays else f"{name}_q"][~mask].any(), name

    holds(made.model)
    equal = Equalize()(made, here)
    holds(equal.model)
    hub = quantize(equal, measured(equal, data), QuantSpec(weight_bits=4))
    holds(hub.quantized)
    hub = BiasCorrect()(hub, here)
    holds(hub.quantized)
    trained = Qat(steps=5, learning_rate=1e-2)(hub, here)
    assert trained.bytes != hub.bytes
    holds(trained.quantized)


# --- training the hub


def test_the_hub_in_torch_computes_what_onnx_runtime_computes() -> None:
    made, data = residual(), images()
    for spec in (QuantSpec(), LINEAR_INPUTS):
        hub = quantize(made, measured(made, data), spec)
        x = next(data.batches(16)).inputs["x"]
        ours = HubModule(hub)(x=torch.from_numpy(x))["y"].detach().numpy()
        (theirs,) = run(hub.bytes, data, optimize=False)
        step = np.abs(theirs).max() / 100
        assert np.abs(ours - theirs).max() < step  # a rounding tie may fall the other way


def test_a_hub_that_is_not_trained_comes_back_unchanged() -> None:
    made, data = residual(), images()
    for spec in (QuantSpec(), QuantSpec(weight_bits=4), LINEAR_INPUTS):
        hub = BiasCorrect()(quantize(made, measured(made, data), spec), context(data))
        assert HubModule(hub).to_hub().bytes == hub.bytes


def test_every_weight_and_bias_gets_a_gradient() -> None:
    made, data = residual(), images()
    module = HubModule(quantize(made, measured(made, data), QuantSpec()))
    module(x=torch.from_numpy(normal(1, 4, 3, 8, 8)))["y"].square().sum().backward()
    assert len(list(module.parameters())) == 6
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_qat_brings_four_bit_weights_closer_to_the_teacher() -> None:
    net, data = SmallNet(), images(256)
    made = lower(net, {"x": normal(0, 2, 3, 8, 8)})
    hub = quantize(made, measured(made, data), QuantSpec(weight_bits=3))
    here = context(data, original=net, trainer=Trainer(TrainSettings(batch=32)))
    trained = Qat(steps=60, learning_rate=3e-3)(hub, here)
    (teacher,) = run(made.bytes, data)

    def divergence(h) -> float:
        p = torch.log_softmax(torch.from_numpy(teacher), 1)
        q = torch.log_softmax(torch.from_numpy(run(h.bytes, data)[0]), 1)
        return float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean"))

    assert divergence(trained) < 0.5 * divergence(hub)


def test_qat_without_a_teacher_says_so() -> None:
    made, data = conv_relu_conv(), images()
    with pytest.raises(DeploykitError, match="teacher"):
        Qat()(quantize(made, measured(made, data), QuantSpec()), context(data))


# --- every pass


@pytest.mark.parametrize("name", passes.names())
def test_every_pass_says_its_stage_needs_and_when_it_pays(name) -> None:
    kind = passes.load(name)
    assert kind.stage in ("model", "graph", "hub")
    assert isinstance(kind.needs, tuple)
    assert kind.pays_if
    assert kind.__doc__
