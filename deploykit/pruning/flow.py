"""Runs a model in which layers write what they are told to: so it shows where their channels go.

Nothing needs to be known of the operations between layers (adds, concatenations, pads, slices, shuffles, attention):
they are executed. And nothing is multiplied, so a run costs little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from traceback import extract_tb
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from deploykit.core.errors import DeploykitError
from deploykit.layerwise.channels import is_channelwise, mixes
from deploykit.layerwise.watching import entered, evaluating, hooked
from deploykit.losses import tensors

Inputs = Mapping[str, Tensor]


@dataclass
class Flow:
    """What was read in one run."""

    read: dict[str, list[Tensor]] = field(default_factory=dict)
    """What each layer read, once for every time it was called."""
    outputs: list[Tensor] = field(default_factory=list)


def written(model: nn.Module, inputs: Inputs) -> dict[str, list[torch.Size]]:
    """The shapes of what each mixing layer writes, in order of its calls.

    Raises:
        DeploykitError: the model does not run on these inputs.
    """
    shapes: dict[str, list[torch.Size]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _layer, _inputs, output: shapes.setdefault(name, []).append(output.shape)

    hooks = [layer.register_forward_hook(note(name)) for name, layer in model.named_modules() if mixes(layer)]
    try:
        _run(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def called(model: nn.Module, layers: Mapping[str, nn.Module], inputs: Inputs) -> list[str]:
    """Those of some layers whose forward runs: of others the model reads the weight itself (attention's projections).

    Raises:
        DeploykitError: the model does not run on these inputs.
    """
    seen: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: seen.add(name)

    with (
        evaluating(model),
        hooked(layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()),
    ):
        _run(model, inputs)
    return [name for name in layers if name in seen]


def follow(model: nn.Module, inputs: Inputs, write: Callable[[str, int], Tensor]) -> Flow:
    """One run in which mixing layers do not compute.

    Args:
        model: in eval mode; the same when this returns.
        inputs: by forward-argument name.
        write: what a layer (its name, the number of the call) writes instead.

    Raises:
        DeploykitError: an operation between layers cannot take it; says where.
    """
    flow = Flow()
    with _replaced(model, write, flow):
        flow.outputs = [t.detach() for t in tensors(_run(model, inputs))]
    return flow


@contextmanager
def _replaced(model: nn.Module, write: Callable[[str, int], Tensor], flow: Flow) -> Iterator[None]:
    def stand_in(name: str) -> Callable[..., Tensor]:
        def forward(*given: Any, **named: Any) -> Tensor:
            calls = flow.read.setdefault(name, [])
            calls.append(entered(given, named).detach())
            return write(name, len(calls) - 1)

        return forward

    def note(name: str) -> Callable[..., None]:
        return lambda _layer, given, named: flow.read.setdefault(name, []).append(entered(given, named).detach())

    own: list[tuple[nn.Module, Any]] = []
    hooks = []
    try:
        for name, layer in model.named_modules():
            if mixes(layer):
                own.append((layer, vars(layer).get("forward")))
                layer.forward = stand_in(name)
            elif is_channelwise(layer):
                hooks.append(layer.register_forward_pre_hook(note(name), with_kwargs=True))
        yield
    finally:
        for layer, forward in own:
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
        for hook in hooks:
            hook.remove()


def _run(model: nn.Module, inputs: Inputs) -> Any:
    # fused encoder layers would read weights behind their layers' backs, and fused attention swallows NaN
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return model(**inputs)
    except Exception as error:  # the user's code and torch raise whatever they like
        frames = [f for f in extract_tb(error.__traceback__) if "/torch/" not in f.filename.replace("\\", "/")]
        line = frames[-1].line if frames else ""
        what = next((text.strip() for text in str(error).splitlines() if text.strip()), type(error).__name__)
        raise DeploykitError(f"the channels of the model cannot be followed through `{line}`: {what}") from None
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
