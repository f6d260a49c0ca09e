"""Images changed at random while they are trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploykit.core.errors import DeploykitError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def augment(
    inputs: dict[str, Tensor], kinds: tuple[str, ...], layout: str, random: torch.Generator
) -> dict[str, Tensor]:
    """Flips and crops at random, each sample by itself.

    Args:
        inputs: with one image input ``[n, c, h, w]`` (or ``[n, h, w, c]`` in layout NHWC); the others stay.
        kinds: ``flip`` mirrors half of the samples left to right; ``crop`` pads each side by an eighth with zeros and
            cuts a window of the old size out of it.
        layout: NCHW or NHWC.
        random: a generator on the CPU, so that devices do not differ.

    Raises:
        DeploykitError: there is not exactly one image input.
    """
    import torch

    if not kinds:
        return inputs
    images = [name for name, x in inputs.items() if x.ndim == 4 and x.is_floating_point()]
    if len(images) != 1:
        given = ", ".join(f"{name} {list(x.shape)}" for name, x in inputs.items())
        raise DeploykitError(f"augment is for models with one image input; the inputs are {given}")
    x = inputs[images[0]]
    x = x if layout == "NHWC" else x.permute(0, 2, 3, 1)
    n, h, w, _ = x.shape
    if "flip" in kinds:
        flipped = torch.rand(n, generator=random) < 0.5
        x = torch.where(flipped.to(x.device)[:, None, None, None], x.flip(2), x)
    if "crop" in kinds:
        rows = torch.randint(0, 2 * (h // 8) + 1, (n, 1), generator=random) + torch.arange(h)
        columns = torch.randint(0, 2 * (w // 8) + 1, (n, 1), generator=random) + torch.arange(w)
        padded = torch.nn.functional.pad(x, (0, 0, w // 8, w // 8, h // 8, h // 8))
        x = padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return {**inputs, images[0]: (x if layout == "NHWC" else x.permute(0, 3, 1, 2)).contiguous()}
