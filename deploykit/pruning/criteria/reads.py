"""What layers read while a model runs, with its gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from deploykit.core.errors import DeploykitError
from deploykit.layerwise.watching import entered


@contextmanager
def reads(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """While open, collects the first input of every call of these layers, as the very tensors of the computation.

    A tensor that several layers read appears once for each, as views of their own: gradients are kept apart.
    """
    read: dict[str, list[Tensor]] = {}

    def note(name: str) -> Any:
        def hook(_layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            x = entered(given, named)
            own = x.view_as(x)
            read.setdefault(name, []).append(own)
            return instead(given, named, own)

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True) for name in layers]
    try:
        yield read
    finally:
        for hook in hooks:
            hook.remove()


def instead(given: tuple[Any, ...], named: Mapping[str, Any], x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a layer is called with, another tensor in the place of its first input (`watching.entered`)."""
    if given:
        return (x, *given[1:]), dict(named)
    return given, {**named, next(iter(named)): x}


def by_example(t: Tensor, axis: int, n: int) -> Tensor:
    """``[n, channels, positions]`` of what a layer read.

    Args:
        t: its first dimension counts examples, or parts of them one example after the other.
        axis: the dimension that counts channels.
        n: how many examples there are.

    Raises:
        DeploykitError: the first dimension does not.
    """
    if t.ndim < 2 or len(t) % n:
        raise DeploykitError(f"a layer reads {tuple(t.shape)}, which cannot be told apart by its {n} examples")
    channels = t.movedim(axis, 1).flatten(2) if t.ndim > 2 else t[:, :, None]
    # [n, parts, channels, positions] -> [n, channels, parts and positions]
    return channels.reshape(n, -1, *channels.shape[1:]).transpose(1, 2).flatten(2)
