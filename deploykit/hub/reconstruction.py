"""Block reconstruction: the roundings of all weights of a block are learned together, for the block's output.

Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction". A block reads what the
quantized network feeds it and shall give what the float network computes there,

    min over V  E[ F (z - ẑ(V))² ]  +  f_reg(V)

with the roundings h(V) of `deploykit.hub.soft_rounding`. A weight may move by one integer from where it is, towards the
trained weight; with it biases, and scales of activations inside the block, are fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from deploykit.core.data import DataSet
from deploykit.core.progress import track
from deploykit.hub.activations import Activations
from deploykit.hub.blocks import Block, blocks
from deploykit.hub.graph import Hub
from deploykit.hub.slices import Slicer
from deploykit.hub.soft_rounding import annealed, behind, rectified_sigmoid, undecided
from deploykit.hub.torch_graph import along, key
from deploykit.hub.torch_module import HubModule

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_MOVED = 0.45
"""Where h starts at most from the integer that was there."""
HELD_OUT = 5
"""Every so many samples one is held out: it decides whether a block keeps what was learned."""


@dataclass(frozen=True)
class Settings:
    """How a block is fitted."""

    steps: int = 300
    batch: int = 16
    rounding_rate: float = 0.03
    other_rate: float = 1e-3
    weight: float = 3.0
    scales: bool = True


class SoftBlock(HubModule):
    """A piece of the hub whose weights lie between two integers each; in evaluation mode they are rounded.

    Args:
        hub: that the piece is from.
        piece: a block of its Q/DQ graph.
        fixed: integer weights (initializers) that keep what they have.
    """

    def __init__(self, hub: Hub, piece: onnx.ModelProto, fixed: set[str], scales: bool) -> None:
        """Starts where the hub is."""
        super().__init__(hub, learn_scales=scales, piece=piece)
        arrays = {t.name: onnx.numpy_helper.to_array(t) for t in piece.graph.initializer}
        floats = hub.graph.model.graph.initializers
        self.v = nn.ParameterDict()
        for output, held in self.held.items():
            if held.is_bias:
                continue
            self.move[key(output)].requires_grad_(False)
            if held.scale in self.learned:
                self.log_scale[key(held.scale)].requires_grad_(False)
            origin = hub.weights.get(held.stored, "")
            if held.stored in fixed or not origin:
                continue
            stored = arrays[held.stored].astype(np.float32)
            trained = floats[origin].const_value.numpy() / along(arrays[held.scale], stored.ndim, held.axis)
            away = trained - stored
            self._buffer(f"{output}.down", stored - (away < 0))
            h = np.where(away < 0, 1 - np.clip(-away, 0, MOST_MOVED), np.clip(away, 0, MOST_MOVED))
            self.v[key(output)] = nn.Parameter(behind(torch.from_numpy(h.astype(np.float32))))

    def up(self, output: str) -> Tensor:
        """h of a weight."""
        h = rectified_sigmoid(self.v[key(output)])
        return h if self.training else (h >= 0.5).float()

    def weight(self, output: str) -> Tensor:
        """What the device multiplies with or adds; while fitted, something between two such weights."""
        if key(output) not in self.v:
            return super().weight(output)
        held, top = self.held[output], self._top(self.held[output])
        mask = getattr(self, key(f"{output}.mask"), None)
        steps = (getattr(self, key(f"{output}.down")) + self.up(output)).clamp(-top, top)
        steps = steps if mask is None else steps * mask
        return steps * along(self.scale(output), steps.ndim, held.axis)

    def undecided(self, beta: float) -> Tensor:
        """f_reg, its mean over all weights."""
        every = [undecided(rectified_sigmoid(v), beta) for v in self.v.values()]
        return sum((u.sum() for u in every), torch.zeros(())) / sum(u.numel() for u in every)


def fit(module: SoftBlock, x: Mapping[str, Any], y: Mapping[str, Any], f: Mapping[str, Tensor], how: Settings, seed: int) -> tuple[float, float]:
    """Learns a block. Returns the error on held-out samples, as a share of the float outputs' size, before and after."""
    count = len(next(iter(x.values())))
    held = np.arange(count) % HELD_OUT == HELD_OUT - 1
    train, judged = np.flatnonzero(~held), np.flatnonzero(held)
    random = np.random.default_rng(seed)

    def loss(chosen: NDArray[Any]) -> Tensor:
        found = module(**{name: torch.from_numpy(array[chosen]) for name, array in x.items()})
        return sum(((found[o] - torch.from_numpy(t[chosen])).square() * f[o]).mean() for o, t in y.items())

    def hard(chosen: NDArray[Any]) -> float:
        module.eval()
        with torch.no_grad():
            total = sum(float(loss(part)) * len(part) for part in np.array_split(chosen, -(-len(chosen) // how.batch)))
        module.train()
        return total / len(chosen)

    before, unit = hard(judged), hard(train)
    trained = [p for p in (*module.move.values(), *module.log_scale.values()) if p.requires_grad]
    optimizer = torch.optim.Adam([
        {"params": list(module.v.values()), "lr": how.rounding_rate}, {"params": trained, "lr": how.other_rate},
    ])
    for step in range(how.steps):
        chosen = random.choice(train, min(how.batch, len(train)), replace=False)
        beta = annealed(step, how.steps)
        value = loss(np.sort(chosen)) / unit
        if beta is not None:
            value = value + how.weight * module.undecided(beta)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    print('   train', unit, '->', hard(train), flush=True)
    return before, hard(judged)


def reconstruct(hub: Hub, data: DataSet, size: int, how: Settings, seed: int, fisher=None) -> Hub:
    slicer = Slicer(onnx.load_model_from_string(hub.bytes))
    floats = Slicer(ir.to_proto(hub.graph.model))
    found = blocks(slicer, size)
    inputs = Activations(slicer, [b.input for b in found if b.input], data, 4)
    targets = Activations(floats, [t for b in found for t in b.outputs.values()], data, 4)
    for block in found:
        import time
        t0 = time.time(); c0 = time.process_time()
        if block.input:
            x = {block.input: np.concatenate(list(inputs.batches(block.input)))}
        else:
            x = next(data.batches(len(data))).inputs
        y = {o: np.concatenate(list(targets.batches(t))) for o, t in block.outputs.items()}
        piece = slicer.cut(list(block.outputs), [block.input] if block.input else [])
        module = SoftBlock(hub, piece, set(), how.scales)
        f = {o: torch.ones(()) if fisher is None else fisher[t] for o, t in block.outputs.items()}
        before, after = fit(module, x, y, f, how, seed)
        print(block.name, f'held-out {before:.5g} -> {after:.5g}', 'kept' if after < before else 'NOT kept', f'{time.process_time()-c0:.0f}s cpu {time.time()-t0:.0f} wall', flush=True)
        if after < before:
            module.eval()
            for name, array in module.trained().items():
                slicer.set_array(name, np.array(array, order="C"))
    return replace(hub, quantized=ir.from_proto(slicer.model))
