"""Block reconstruction: the roundings of all weights of a block are learned together, for the block's output.

Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction". A block reads what the
quantized network feeds it and shall give what the float network computes there,

    min over V  E ‖z - ẑ(V)‖²  +  λ f_reg(V)

with z the float output, ẑ the block's, and the roundings h(V) of `deploykit.hub.fitting.soft_rounding`. (The paper
weighs z - ẑ by a diagonal Fisher matrix; here all outputs count alike.)

Where the paper begins with the trained weights, a block begins where gptq puts its layers on the inputs that it has by
then: a rounding chosen for other inputs would make good errors that are there no more. From there a weight may move by
one integer, towards the trained weight; biases are fitted with it. Samples held out decide whether a block keeps what
it learned.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from deploykit.core.data import DataSet, held_out
from deploykit.core.journal import NOTHING_KEPT, Journal
from deploykit.core.progress import track
from deploykit.hub.fitting.activations import Activations
from deploykit.hub.fitting.blocks import Block, blocks
from deploykit.hub.fitting.refit import refit
from deploykit.hub.fitting.rounding import gptq
from deploykit.hub.fitting.soft_rounding import LEARNING_RATE, behind, pressure, rectified_sigmoid, undecided
from deploykit.hub.graph import Hub, constant
from deploykit.hub.slices import Slicer
from deploykit.hub.training.graph import along, key
from deploykit.hub.training.module import HubModule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

MOST_MOVED = 0.2
"""Where h starts at most from the integer that was there."""
BIAS_RATE = 1e-3
"""Learning rate of biases, in `HubModule`'s units; V has that of `soft_rounding`."""
SPOOLED = 4
"""How many samples run at once between blocks."""


class SoftBlock(HubModule):
    """A piece of a hub whose weights lie between two integers each while it is trained; in evaluation they are rounded.

    Args:
        hub: that the piece is from.
        piece: a block of its Q/DQ graph.
        learned: the integer weights and biases (initializers) that may change.
    """

    def __init__(self, hub: Hub, piece: onnx.ModelProto, learned: Collection[str]) -> None:
        """Starts where the hub is."""
        super().__init__(hub, piece=piece)
        arrays = {t.name: onnx.numpy_helper.to_array(t) for t in piece.graph.initializer}
        self.v = nn.ParameterDict()
        """V of every weight that may move."""
        for name in self.free:
            self.move[key(name)].requires_grad_(name in learned)
        for output, held in self.held.items():
            self.move[key(output)].requires_grad_(held.is_bias and held.stored in learned)
            origin = hub.weights.get(held.stored, "")
            if held.is_bias or held.stored not in learned or not origin:
                continue
            trained, stored = constant(hub.graph.model.graph.initializers[origin]), arrays[held.stored]
            assert trained is not None
            away = trained / along(arrays[held.scale], stored.ndim, held.axis) - stored.astype(np.float32)
            h = np.where(away < 0, 1.0, 0.0) + np.clip(away, -MOST_MOVED, MOST_MOVED)
            self._buffer(f"{output}.down", stored.astype(np.float32) - (away < 0))
            self.v[key(output)] = nn.Parameter(behind(torch.from_numpy(h.astype(np.float32))))

    def weight(self, output: str) -> Tensor:
        """What the device multiplies with or adds; in training, something between two such weights."""
        if key(output) not in self.v:
            return super().weight(output)
        held, top = self.held[output], self._top(self.held[output])
        h = rectified_sigmoid(self.v[key(output)])
        down: Tensor = getattr(self, key(f"{output}.down"))
        steps = (down + (h if self.training else (h >= 0.5).float())).clamp(-top, top)
        mask: Tensor | None = getattr(self, key(f"{output}.mask"), None)
        s: Tensor = along(self.scale(output), steps.ndim, held.axis)
        return (steps if mask is None else steps * mask) * s

    def undecided(self) -> Tensor:
        """f_reg: its mean over all weights."""
        every = [undecided(rectified_sigmoid(v)) for v in self.v.values()]
        return sum((u.sum() for u in every), torch.zeros(())) / max(sum(u.numel() for u in every), 1)


def reconstruct(
    hub: Hub,
    data: DataSet,
    *,
    size: int,
    steps: int,
    batch: int,
    positions: int,
    seed: int,
    journal: Journal = NOTHING_KEPT,
) -> Hub:
    """The hub with weights, their scales and biases chosen block after block.

    Weights and biases that several layers share are not learned.

    Args:
        hub: quantized; not changed.
        data: calibration samples; every fifth is held out.
        size: least number of layers in a block.
        steps: of gradient descent, per block.
        batch: samples per step.
        positions: as `refit` takes them.
        seed: which positions, and which samples a step sees.
        journal: what was chosen for blocks, of a run that was cut.

    Raises:
        DeploykitError: operators without a meaning in torch.
    """
    HubModule(hub)  # refuses what has no gradient before anything is learned
    slicer, floats = Slicer(onnx.load_model_from_string(hub.bytes)), Slicer(ir.to_proto(hub.graph.model))
    found = blocks(slicer, size)
    readers = Counter(name for block in found for layer in block.layers for name in (layer.weight, layer.bias))
    learned = {name for name, count in readers.items() if count == 1}
    spooled = hub.graph.batch or SPOOLED
    with contextlib.ExitStack() as stack:
        inputs = Activations(slicer, [block.input for block in found if block.input], data, spooled)
        stack.callback(inputs.close)
        targets = Activations(floats, [name for block in found for name in block.outputs.values()], data, spooled)
        stack.callback(targets.close)

        def learn(i: int, block: Block) -> Arrays:
            who = f"reconstruct: block {i + 1} of {len(found)}"
            now = replace(hub, quantized=ir.from_proto(slicer.model))
            only = {layer.name for layer in block.layers}
            _take(slicer, block, refit(now, data, who, gptq, positions=positions, only=only, seed=seed))
            x = _inputs(block, inputs, data, slicer)
            z = {name: stacked(targets.batches(behind), len(data)) for name, behind in block.outputs.items()}
            piece = slicer.cut(list(block.outputs), [block.input] if block.input else [])
            module = SoftBlock(hub, piece, learned)
            random = np.random.default_rng([seed, i])
            chosen = {name: slicer.array(name) for name in _held(block)}
            return chosen | (module.trained() if fit(module, x, z, steps, batch, random, who) else {})

        for i, block in enumerate(found):
            for name, array in journal.once(f"block {i}", partial(learn, i, block)).items():
                slicer.set_array(name, np.array(array, order="C"))
    return replace(hub, quantized=ir.from_proto(slicer.model))


def _take(slicer: Slicer, block: Block, other: Hub) -> None:
    """Takes over what another hub holds of a block's layers."""
    held = {t.name: t for t in onnx.load_model_from_string(other.bytes).graph.initializer}
    for name in _held(block):
        slicer.set_array(name, onnx.numpy_helper.to_array(held[name]))


def _held(block: Block) -> list[str]:
    """The initializers that are a block's own: integers, scales, biases."""
    every = (n for la in block.layers for n in (la.weight, la.weight_scale, la.bias, la.bias_scale))
    return [name for name in every if name]


def fit(
    module: SoftBlock, x: Arrays, z: Arrays, steps: int, batch: int, random: np.random.Generator, who: str = "fit"
) -> bool:
    """Learns a block's roundings and biases; whether it is better for it on samples held out. It ends in evaluation.

    Args:
        module: the block.
        x: its inputs on all samples ``[n, ...]``.
        z: what it should put out.
        steps: of gradient descent.
        batch: samples per step.
        random: draws them.
        who: what is shown beside the progress bar.
    """
    judged = held_out(len(next(iter(x.values()))))
    training, judging = np.flatnonzero(~judged), np.flatnonzero(judged)
    alone = module.hub.graph.batch == 1

    def loss(chosen: NDArray[Any]) -> Tensor:
        errors = []
        for part in chosen[:, None] if alone else chosen[None]:
            found = module(**{name: torch.from_numpy(array[part]) for name, array in x.items()})
            errors += [(found[name] - torch.from_numpy(array[part])).square().mean() for name, array in z.items()]
        return torch.stack(errors).mean()

    def rounded(samples: NDArray[Any]) -> float:
        module.eval()
        parts = np.array_split(samples, -(-len(samples) // batch))
        with torch.no_grad():
            return sum(float(loss(part)) * len(part) for part in parts) / len(samples)

    biases = [p for p in module.move.values() if p.requires_grad]
    if not (biases or module.v):
        return False
    before, unit = rounded(judging), max(rounded(training), 1e-12)
    optimizer = torch.optim.Adam(
        [{"params": [*module.v.values()], "lr": LEARNING_RATE}, {"params": biases, "lr": BIAS_RATE}]
    )
    module.train()
    for step in track(range(steps), who, total=steps):
        chosen = np.sort(random.choice(training, min(batch, len(training)), replace=False))
        value = loss(chosen) / unit + pressure(step, steps) * module.undecided()
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return rounded(judging) < before


def _inputs(block: Block, inputs: Activations, data: DataSet, slicer: Slicer) -> Arrays:
    """What a block reads on all samples."""
    if block.input:
        return {block.input: stacked(inputs.batches(block.input), len(data))}
    names = [name for name in slicer.inputs if name not in slicer.initializers]
    return {name: stacked((b.inputs[name] for b in data.batches(SPOOLED)), len(data)) for name in names}


def stacked(batches: Iterable[NDArray[Any]], count: int) -> NDArray[Any]:
    """Batches ``[n, ...]`` as one array ``[count, ...]`` that lies in a file and is read where it is looked at."""
    found: NDArray[Any] | None = None
    with tempfile.TemporaryFile() as file:
        for i, part in _numbered(batches):
            if found is None:
                found = np.memmap(file, part.dtype, "w+", shape=(count, *part.shape[1:]))
            found[i : i + len(part)] = part
    assert found is not None
    return found


def _numbered(batches: Iterable[NDArray[Any]]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Batches, each with the number of samples before it."""
    done = 0
    for part in batches:
        yield done, part
        done += len(part)
