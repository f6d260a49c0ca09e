"""Mixed precision: bits chosen by what they lose, beside few bits for the largest layers first, at equal bytes.

Both assignments are rounded alike and cost the same or less. Agreement is that of the artifact with fp32, run in ONNX
Runtime on evaluation data; bits are chosen on calibration data alone.

    python -m benchmarks.mixed
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks import choices, data
from benchmarks.choices import Case, in_memory
from benchmarks.rows import Row, main
from deploykit import passes
from deploykit.check import answer
from deploykit.core.context import apart
from deploykit.core.data import DataSet
from deploykit.core.recipe import Step
from deploykit.exporters import to_onnx
from deploykit.hub.analysis.measures import MEASURES, divergence
from deploykit.hub.bits import held_weights, with_bits
from deploykit.hub.fitting.rounding import gptq, to_nearest
from deploykit.hub.graph import Hub
from deploykit.hub.mixed.assignment import assign, cost
from deploykit.hub.mixed.sensitivity import sensitivities
from deploykit.hub.quantize import quantize
from deploykit.hub.running import session
from deploykit.hub.slices import Slicer
from deploykit.passes.mixed import Mixed

COMMAND = "python -m benchmarks.mixed"
RESNET = "ResNet-20, 512 JPEG CIFAR-10 training images calibrate, all 10,000 JPEG test images evaluate"
CLAIMED = 0.7
"""Share of the weights' bytes in int8."""
STEPS = ("gptq", "bias_correct", "")
"""Ways of rounding; empty: to nearest."""
RANDOM = {"gptq": 12, "bias_correct": 40}
"""Assignments drawn for `headroom` and, with gptq, for `prediction`."""
NEAR = 0.015
"""By how much of the int8 bytes they may miss `CLAIMED`."""


@dataclass(frozen=True)
class Setting:
    """A network, the bits its weights may have, and how they are rounded."""

    case: Case
    bits: tuple[int, ...] = (4, 8)
    step: str = "gptq"
    """The correction; empty: plain rounding to nearest."""

    @cached_property
    def start(self) -> Hub:
        """All weights in 8 bits, rounded to nearest."""
        return quantize(self.case.graph, self.case.ranges, choices.SPEC)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Weights by layer."""
        return {h.name: h.size for h in held_weights(Slicer(onnx.load_model_from_string(self.start.bytes)))}

    @property
    def costs(self) -> dict[str, dict[int, float]]:
        """Shares of the bytes in int8."""
        whole = 8 * sum(self.sizes.values())
        return {name: {b: size * b / whole for b in range(2, 9)} for name, size in self.sizes.items()}

    def losses(self, measure: str = "squared") -> dict[str, dict[int, float]]:
        """What the step mixed measures, on the calibration samples."""
        fitted, judged = apart(self.case.context, "mixed")
        rounding = gptq if self.step == "gptq" else to_nearest
        return sensitivities(self.start, fitted, judged.spread(Mixed().samples), self.bits, measure, rounding)  # type: ignore[arg-type]

    def largest_first(self, budget: float) -> dict[str, int]:
        """Few bits for the largest layers, one after another, until the budget is met."""
        found = dict.fromkeys(self.sizes, max(self.bits))
        for name in sorted(self.sizes, key=lambda n: -self.sizes[n]):
            if cost(self.costs, found) <= budget:
                break
            found[name] = min(self.bits)
        return found

    def hub(self, bits: Mapping[str, int]) -> Hub:
        """The hub with these bits, rounded."""
        found = with_bits(self.start, bits)
        return passes.build(Step(self.step))(found, self.case.context) if self.step else found

    def drawn(self, count: int) -> list[dict[str, int]]:
        """Random assignments that cost about `CLAIMED`."""
        random, found = np.random.default_rng(1), []
        while len(found) < count:
            share = random.uniform(0.2, 0.95)
            bits = {name: 4 if random.random() < share else 8 for name in self.sizes}
            if abs(cost(self.costs, bits) - CLAIMED) < NEAR and bits not in found:
                found.append(bits)
        return found

    def compared(self, budgets: Sequence[float]) -> tuple[dict[str, float], dict[float, float]]:
        """Agreement of both assignments by their bytes, and by budget what choosing by loss gains."""
        values = {f"all in {b} bits": self.case.agreement(self.hub(dict.fromkeys(self.sizes, b))) for b in self.bits}
        losses, gains = self.losses(), {}
        for budget in budgets:
            simple = self.largest_first(budget)
            share = cost(self.costs, simple)
            ours = assign(losses, self.costs, share)
            first = self.case.agreement(self.hub(simple))
            second = first if ours == simple else self.case.agreement(self.hub(ours))
            values |= {f"{share:.3f}, largest first": first, f"{share:.3f}, mixed": second}
            gains[budget] = second - first
            print(self.case.name, self.step, self.bits, values, flush=True)
        return values, gains


def mobilenet() -> Case:
    return choices.mobilenetv1()


def resnet() -> Case:
    calibration, evaluation = in_memory(data.cifar("train", 512)), in_memory(data.cifar("test", 10_000))
    return Case("ResNet-20", RESNET, data.resnet20(), calibration, evaluation)


def row(part: str, setting: Setting, budgets: Sequence[float], note: str = "") -> Row:
    values, gains = setting.compared(budgets)
    bits = " or ".join(map(str, setting.bits))
    how = setting.step or "rounding to nearest"
    claim = f"{setting.case.name}, weights in {bits} bits at {CLAIMED} of the int8 bytes, {how}"
    return Row(
        f"{claim}: agreement above largest layers first (points)", gains[CLAIMED], 2.0, "higher", setting.case.about,
        f"{COMMAND} {part}", [0], values, note=note,
    )  # fmt: skip


def mobilenetv1() -> list[Row]:
    case = mobilenet()
    return [row("mobilenetv1", Setting(case, step=step), (CLAIMED,)) for step in STEPS]


def resnet20() -> list[Row]:
    case = resnet()
    return [row("resnet20", Setting(case, step=step), (CLAIMED,)) for step in STEPS]


def lower() -> list[Row]:
    return [row("lower", Setting(resnet(), (2, 8)), (0.8, CLAIMED, 0.6, 0.5, 0.4))]


def widths() -> list[Row]:
    """Widths between 4 and 8, as hardware with its own storage has them: files here store these in 8."""
    found = []
    for case in (mobilenet(), resnet()):
        simple, setting = Setting(case), Setting(case, (2, 3, 4, 5, 6, 7, 8))
        bits = simple.largest_first(CLAIMED)
        share = cost(simple.costs, bits)
        first = case.agreement(simple.hub(bits))
        second = case.agreement(setting.hub(assign(setting.losses(), setting.costs, share)))
        found.append(
            Row(
                f"{case.name}, weights in 2 to 8 bits at {CLAIMED} of the int8 bytes, gptq: agreement above 4 bits for "
                "the largest layers first (points)", second - first, 2.0, "higher", case.about, f"{COMMAND} widths",
                [0], {f"{share:.3f}, largest first": first, f"{share:.3f}, mixed": second},
                note="5 to 7 bits are counted as such; files here would store them in 8",
            )
        )  # fmt: skip
    return found


def headroom() -> list[Row]:
    """What choosing layers could gain at all: the best of many random assignments, beside the largest layers first."""
    found = []
    for case in (mobilenet(), resnet()):
        for step, count in RANDOM.items():
            setting = Setting(case, step=step)
            simple = setting.largest_first(CLAIMED)
            first = case.agreement(setting.hub(simple))
            others = [case.agreement(setting.hub(bits)) for bits in setting.drawn(count)]
            values = {
                "all in 8 bits": case.agreement(setting.hub(dict.fromkeys(setting.sizes, 8))),
                f"{cost(setting.costs, simple):.3f}, largest first": first, "best drawn": max(others),
                "median drawn": float(np.median(others)), "worst drawn": min(others),
            }  # fmt: skip
            print(case.name, step, values, flush=True)
            claim = f"{case.name}, weights in 4 or 8 bits at about {CLAIMED} of the int8 bytes, {step}"
            found.append(
                Row(f"{claim}: best of {count} random assignments above largest layers first (points)",
                    max(others) - first, None, "higher", case.about, f"{COMMAND} headroom", [1], values,
                    note="chosen on the evaluation data: what choosing could gain, not a result")
            )  # fmt: skip
    return found


def narrowed(hub: Hub, narrow: Hub, names: Collection[str]) -> onnx.ModelProto:
    """The hub with inputs of some products on the steps that they have in another, of 4-bit activations.

    In floats, by operators that every runtime has: what an integer kernel with 4 bits on both sides would compute.
    """
    slicer, steps = (Slicer(onnx.load_model_from_string(each.bytes)) for each in (hub, narrow))
    readers = {layer.name: held.name for held in held_weights(slicer) for layer in held.layers if held.name in names}
    inputs = {layer.name: layer.x for held in held_weights(steps) for layer in held.layers}
    nodes: list[onnx.NodeProto] = []
    for node in slicer.model.graph.node:
        if node.name in readers:
            scale, zero = (float(steps.array(i)) for i in steps.producer[inputs[node.name]].input[1:3])
            held = {"s": scale, "low": -zero, "high": 15.0 - zero}
            for what, value in held.items():
                slicer.model.graph.initializer.append(
                    onnx.numpy_helper.from_array(np.float32(value), f"{node.name}.{what}")
                )
            name = node.input[0]
            for operator, others in (("Div", ["s"]), ("Round", []), ("Clip", ["low", "high"]), ("Mul", ["s"])):
                made = f"{node.name}.{operator}"
                nodes.append(onnx.helper.make_node(operator, [name, *(f"{node.name}.{o}" for o in others)], [made]))
                name = made
            node.input[0] = name
        nodes.append(node)
    del slicer.model.graph.node[:]
    slicer.model.graph.node.extend(nodes)
    return slicer.model


def scores(model: onnx.ModelProto, source: DataSet) -> NDArray[np.float32]:
    """The first output on all samples."""
    run = session(model)
    return np.concatenate([run.run(None, dict(batch.inputs))[0] for batch in source.batches(50)])


def side_by_side(case: Case) -> Row:
    """Layers of 4 bits whose inputs have 4 bits, too, as HAWQ-V3 has them (Yao et al. 2021), beside layers of 8."""
    setting, few = Setting(case), case.calibration.spread(Mixed().samples)
    narrow = quantize(case.graph, case.ranges, replace(choices.SPEC, activation_bits=4, port_bits=8), "mse")
    steps, whole = (Slicer(onnx.load_model_from_string(each)) for each in (narrow.bytes, case.graph.bytes))
    # of what reads the network's input, that has 8 bits
    first = {h.name for h in held_weights(steps) if steps.producer[h.layers[0].x].input[0] in steps.inputs}
    losses = {name: dict(row) for name, row in setting.losses().items()}
    exact = scores(whole.model, few)
    plain = scores(onnx.load_model_from_string(setting.start.bytes), few)
    for name in set(losses) - first:
        moved = scores(narrowed(setting.start, narrow, {name}), few) - plain
        losses[name][4] += float(np.square(moved).sum() / np.square(exact).sum())
    right = scores(whole.model, case.evaluation).argmax(1)

    def agreement(bits: Mapping[str, int]) -> float:
        made = narrowed(setting.hub(bits), narrow, {name for name, b in bits.items() if b == 4} - first)
        return 100 * float((scores(made, case.evaluation).argmax(1) == right).mean())

    simple = setting.largest_first(CLAIMED)
    share = cost(setting.costs, simple)
    values = {
        f"{share:.3f}, largest first": agreement(simple),
        f"{share:.3f}, mixed": agreement(assign(losses, setting.costs, share)),
    }
    print(case.name, values, flush=True)
    before, after = values.values()
    claim = f"{case.name}, weights and inputs of a layer in 4 or in 8 bits at {CLAIMED} of the int8 bytes, gptq"
    return Row(
        f"{claim}: agreement above largest layers first (points)", after - before, 2.0, "higher", case.about,
        f"{COMMAND} both_sides", [0], values,
        note="inputs of 4 bits are computed in floats: no file has them layer by layer",
    )  # fmt: skip


def both_sides() -> list[Row]:
    return [side_by_side(case) for case in (mobilenet(), resnet())]


def prediction() -> list[Row]:
    """How well summed losses put random assignments of equal bytes into the order of their true loss."""
    setting = Setting(resnet())
    drawn = setting.drawn(RANDOM["gptq"])
    exact = answer(to_onnx.runner(session(setting.case.graph.bytes)), setting.case.evaluation, "fp32")
    true = []
    for bits in drawn:
        found = answer(to_onnx.runner(session(setting.hub(bits).bytes)), setting.case.evaluation, "random")
        true.append(divergence([(found.outputs, exact.outputs)]))
        print(len(true), true[-1], flush=True)
    values = {}
    for measure in MEASURES:
        losses = setting.losses(measure)
        values[measure] = float(spearmanr([cost(losses, bits) for bits in drawn], true).statistic)
    claim = "predicted and true loss (divergence from fp32), rank correlation"
    return [
        Row(f"ResNet-20, {len(drawn)} random assignments of 4 or 8 bits at {CLAIMED} of the int8 bytes: {claim}",
            values["squared"], 0.8, "higher", RESNET, f"{COMMAND} prediction", [1], values)
    ]  # fmt: skip


if __name__ == "__main__":
    main(__doc__, "mixed", [mobilenetv1, resnet20, lower, widths, headroom, both_sides, prediction])
