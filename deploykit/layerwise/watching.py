"""A network that runs while somebody watches its layers, and is left as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

BATCH = 32


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and as it was afterwards, module by module."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Hooks that are taken away afterwards; made one by one, as they are asked for."""
    held = list(handles)
    try:
        yield
    finally:
        for handle in held:
            handle.remove()


def entered(given: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """What a layer with one input was given, by position or by name."""
    x = given[0] if given else next(iter(named.values()))
    assert isinstance(x, Tensor)
    return x


class Stop(Exception):
    """What was wanted has been computed."""


def watch(layer: nn.Module, found: list[tuple[Tensor, Tensor]], calls: int) -> Any:
    """Notes input and output of every call of a layer; returns the hook's handle.

    Args:
        layer: the layer.
        found: filled.
        calls: after so many the model need not go on: it raises `Stop`.
    """

    def note(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], y: Tensor) -> None:
        found.append((entered(given, named).detach(), y.detach()))
        if len(found) == calls:
            raise Stop

    return layer.register_forward_hook(note, with_kwargs=True)
