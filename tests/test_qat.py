"""Training the hub: what it learns, what it must not change, and which state is kept."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from graphs import graph, images, measured, normal, residual
from numpy.typing import NDArray
from torch import Tensor, nn

from deploykit import targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.recipe import TrainSettings
from deploykit.core.target import QuantSpec
from deploykit.hub.bits import with_bits
from deploykit.hub.graph import FloatGraph, Hub
from deploykit.hub.quantize import BIAS_LIMIT, quantize
from deploykit.hub.running import session
from deploykit.hub.training.graph import held_by, read_nodes
from deploykit.hub.training.module import HubModule
from deploykit.losses import TrainBatch, distill_kl
from deploykit.passes.qat import Qat
from deploykit.retraining import split
from deploykit.training.trainer import Trainer

if importlib.util.find_spec("accelerate") is None:
    pytest.skip("training needs the extra 'train'", allow_module_level=True)

FOUR_BITS = QuantSpec(weight_bits=4, activation_bits=4)


def network(**by: float) -> FloatGraph:
    """The residual network with answers that are not sure, and other weights multiplied by what is asked."""
    model = residual().copy()
    for name, factor in {"wc": 0.1, "bc": 0.1, **by}.items():
        held = model.graph.initializers[name]
        assert held.const_value is not None
        held.const_value = ir.tensor(held.const_value.numpy() * np.float32(factor), name=name)
    return FloatGraph(model)


class Teacher(nn.Module):
    """Answers what a float graph answers, as the original model would."""

    def __init__(self, made: FloatGraph, gain: float = 1.0) -> None:
        super().__init__()
        self.module, self.gain = HubModule(Hub(made, QuantSpec(), made.model)), gain
        self.name = made.model.graph.outputs[0].name

    def forward(self, **inputs: Tensor) -> Tensor:
        found: Tensor = self.module(**inputs)[self.name]
        return found * self.gain


def trained(
    hub: Hub, data: DataSet, teacher: nn.Module | None = None, holdout: DataSet | None = None, **options: Any
) -> Hub:
    found = {"train": data} | ({"holdout": holdout} if holdout is not None else {})
    context = Context(
        targets.load("x86"), found, original=teacher or Teacher(hub.graph),  # type: ignore[arg-type]
        trainer=Trainer(TrainSettings(batch=16)), loss=options.pop("loss", None),
    )  # fmt: skip
    return Qat(**({"steps": 12, "learning_rate": 1e-2} | options))(hub, context)


def arrays(hub: Hub) -> dict[str, NDArray[Any]]:
    assert hub.quantized is not None
    return {n: v.const_value.numpy() for n, v in hub.quantized.graph.initializers.items() if v.const_value is not None}


def divergence(hub: Hub, data: DataSet) -> float:
    inputs = next(data.batches(len(data))).inputs
    models = (onnx.load_model_from_string(m) for m in (hub.bytes, hub.graph.bytes))
    student, teacher = (torch.from_numpy(session(m).run(None, inputs)[0]) for m in models)
    return float(distill_kl()(student, TrainBatch({}, teacher=teacher)))


# ------------------------------------------------------------------ scales


def test_scales_are_learned_and_stay_what_can_be_stored() -> None:
    made, data = network(), images(64)
    hub = quantize(made, measured(made, data), FOUR_BITS)
    before, after = arrays(hub), arrays(trained(hub, data))
    scales = [name for name in before if name.endswith("_scale")]
    assert sum(not np.array_equal(before[n], after[n]) for n in scales) > 5
    for name in scales:
        assert after[name].dtype == np.float32 and after[name].shape == before[name].shape
        assert (after[name] > 0).all() and np.isfinite(after[name]).all()


def test_zero_points_and_ports_of_other_widths_stay() -> None:
    made, data = network(), images(64)
    hub = quantize(made, measured(made, data), replace(FOUR_BITS, port_bits=8))
    before, after = arrays(hub), arrays(trained(hub, data))
    zeros = [name for name in before if name.endswith("_zero")]
    assert zeros and all(before[n].tobytes() == after[n].tobytes() for n in zeros)
    assert all(before[n].dtype == after[n].dtype for n in before)


def test_a_bias_is_stored_in_steps_of_the_two_scales_beside_it() -> None:
    made, data = network(), images(64)
    hub = trained(quantize(made, measured(made, data), QuantSpec(weight_bits=4)), data)
    proto = onnx.load_model_from_string(hub.bytes)
    found = arrays(hub)
    held = held_by(read_nodes(proto.graph), found)
    biases = [h for h in held.values() if h.is_bias]
    assert len(biases) == 3
    for bias in biases:
        expected = found[bias.input_scale] * found[held[bias.weight].scale]
        assert np.array_equal(found[bias.scale], expected)


def concatenation(seed: int = 0) -> FloatGraph:
    return graph(
        """(float[batch,3,8,8] x) => (float[batch,4] y) {
            a = Conv<pads=[1,1,1,1]>(x, wa, ba)
            b = Conv<pads=[1,1,1,1]>(x, wb, bb)
            c = Concat<axis=1>(a, b)
            p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(c)
            m = ReduceMean<keepdims=0>(p, axes)
            z = Gemm<transB=1>(m, wc, bc)
            y = Softmax<axis=-1>(z)
        }""",
        wa=normal(seed, 2, 3, 3, 3), ba=normal(seed + 1, 2), wb=normal(seed + 2, 3, 3, 3, 3), bb=normal(seed + 3, 3),
        wc=normal(seed + 4, 4, 5), bc=normal(seed + 5, 4), axes=np.array([2, 3]),
    )  # fmt: skip


def test_scales_that_operators_share_are_still_one_scale() -> None:
    made, data = concatenation(), images(64)
    hub = trained(quantize(made, measured(made, data), QuantSpec(weight_bits=4)), data)
    assert hub.quantized is not None
    nodes = {node.name: node for node in hub.quantized.graph}
    (concat,) = (n for n in nodes.values() if n.op_type == "Concat")
    names = {v.producer().inputs[1].name for v in concat.inputs}  # type: ignore[union-attr]
    assert len(names) == 1
    quantizers = [n for n in nodes.values() if n.op_type == "QuantizeLinear" and n.inputs[1].name in names]  # type: ignore[union-attr]
    assert len(quantizers) >= 4  # both branches, what is joined, and what the pool makes of it


def test_what_kernels_want_as_it_is_stays() -> None:
    """The output of a softmax has 256 steps, whatever would suit the training better."""
    made, data = concatenation(), images(64)
    hub = quantize(made, measured(made, data), QuantSpec(weight_bits=4))
    before, after = arrays(hub), arrays(trained(hub, data))
    fixed = [n for n in before if n.endswith("_scale") and before[n].ndim == 0 and before[n] == np.float32(1 / 256)]
    assert fixed and all(after[n] == before[n] for n in fixed)


@pytest.mark.parametrize("options", [{"scales": "fixed"}, {"scales": "learned"}])
def test_powers_of_two_stay_and_fixed_scales_stay(options: dict[str, str]) -> None:
    made, data = network(), images(64)
    spec = QuantSpec(weight_bits=3, scale="power_of_two" if options["scales"] == "learned" else "float")
    hub = quantize(made, measured(made, data), spec)
    before, after = arrays(hub), arrays(trained(hub, data, steps=40, **options))
    changed = [n for n in before if before[n].tobytes() != after[n].tobytes()]
    assert changed and [n for n in changed if "_scale" in n] == []


def test_one_scale_per_tensor_stays_one() -> None:
    made, data = network(), images(64)
    spec = QuantSpec(weight_bits=4, weight_granularity="tensor")
    hub = quantize(made, measured(made, data), spec)
    before, after = arrays(hub), arrays(trained(hub, data))
    for name in ("wa_q_scale", "wb_q_scale", "wc_q_scale"):
        assert len(set(after[name].tolist())) == 1 and after[name][0] != before[name][0]


def test_a_scale_leaves_the_bias_its_room() -> None:
    """Where weights are all but dead their scale is what their bias dictates."""
    made, data = network(wa=1e-12), images(64)
    hub = trained(quantize(made, measured(made, data), QuantSpec()), data)
    found = arrays(hub)
    assert all(np.abs(a.astype(np.int64)).max() <= BIAS_LIMIT + 1 for a in found.values() if a.dtype == np.int32)


def test_bits_of_single_layers_are_respected() -> None:
    made, data = network(), images(64)
    hub = with_bits(quantize(made, measured(made, data), QuantSpec()), {"a": 2, "b": 4})
    after = trained(hub, data)
    assert after.bits == hub.bits
    assert [int(np.abs(arrays(after)[n]).max()) for n in ("wa_q", "wb_q")] == [1, 7]
    assert np.abs(arrays(after)["wc_q"]).max() > 7


# ------------------------------------------------------------------ what training is good for


def test_learned_scales_come_closer_to_the_teacher_than_fixed_ones() -> None:
    made, data = network(), images(256)
    hub = quantize(made, measured(made, data), FOUR_BITS)
    start = divergence(hub, data)
    found = {kind: divergence(trained(hub, data, steps=60, scales=kind), data) for kind in ("learned", "fixed")}
    assert found["learned"] < 0.8 * start
    assert found["learned"] < found["fixed"]


# ------------------------------------------------------------------ which state is kept


def test_training_never_makes_the_held_out_samples_worse() -> None:
    """A learning rate out of all reason: the hub comes back as it went in."""
    made, data, held = network(), images(64), images(16, seed=1)
    hub = quantize(made, measured(made, data), QuantSpec())
    assert trained(hub, data, holdout=held, learning_rate=5.0).bytes == hub.bytes


def test_the_best_state_is_kept_not_the_last() -> None:
    made, data, held = network(), images(64), images(64, seed=1)
    hub = quantize(made, measured(made, data), FOUR_BITS)
    for rate in (1e-3, 3e-2, 0.3):
        assert divergence(trained(hub, data, holdout=held, learning_rate=rate), held) <= divergence(hub, held) * 1.01


def failing(after: int) -> Callable[[Any, TrainBatch], Tensor]:
    """A loss that is NaN from a step on, where gradients are asked for."""
    steps = [0]

    def loss(outputs: Any, batch: TrainBatch) -> Tensor:
        value = distill_kl()(outputs, batch)
        if not value.requires_grad:
            return value
        steps[0] += 1
        return value * float("nan") if steps[0] > after else value

    return loss


@pytest.mark.parametrize(("after", "kept"), [(0, "before training"), (8, "after step")])
def test_after_nan_the_last_good_state_is_kept_and_the_user_told(
    after: int, kept: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made, data, held = network(), images(64), images(16, seed=1)
    hub = quantize(made, measured(made, data), FOUR_BITS)
    found = trained(hub, data, holdout=held, loss=failing(after), steps=20)
    assert (found.bytes == hub.bytes) == (after == 0)
    assert all(np.isfinite(a).all() for a in arrays(found).values() if a.dtype.kind == "f")
    said = capsys.readouterr().err
    assert f"the loss became nan at step {after + 1} of 20" in said and kept in said and "learning_rate below" in said


def test_without_a_good_state_nan_is_an_error() -> None:
    made, data = network(), images(8)  # too few to keep one out
    hub = quantize(made, measured(made, data), QuantSpec())
    with pytest.raises(DeploykitError, match="the loss became nan at step 1 of 12"):
        trained(hub, data, loss=failing(0))


def test_what_is_held_out() -> None:
    data, held = images(100), images(10, seed=1)
    assert split(data, held) == (data, held)
    train, kept = split(data, None)
    assert kept is not None and kept.index == tuple(range(9, 100, 10)) and not set(kept.index) & set(train.index)
    labelled = DataSet.of({"x": normal(0, 100, 3)}, np.arange(100))
    train, kept = split(labelled, held)  # a loss that wants labels finds none in the calibration data
    assert kept is not None and len(train) + len(kept) == 100
    assert split(images(9), None)[1] is None
    many = DataSet(data.sample, tuple(range(100_000)))
    assert len(split(many, None)[1] or ()) == 500
