"""Which single weights live."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deploykit.hub.structure import attach_mask, bake
from deploykit.pruning.masks import fits, layer_by_layer, n_of_m, network_wide


def everything(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in found.items()}


def scores(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {"a": torch.rand(4, 8, 3, 3), "b": torch.rand(5, 6), "c": torch.rand(3, 4)}


@given(st.integers(0, 99), st.floats(0, 1))
@settings(deadline=None, max_examples=30)
def test_one_threshold_takes_the_smallest_of_all(seed: int, share: float) -> None:
    found = scores(seed)
    lives = network_wide(found, everything(found), share)
    every = np.sort(torch.cat([s.flatten() for s in found.values()]))
    dead = torch.cat([found[n][~lives[n]] for n in found])
    np.testing.assert_array_equal(np.sort(dead), every[: round(share * len(every))])


def test_layer_by_layer_every_layer_loses_the_same_share() -> None:
    found = scores(0)
    lives = layer_by_layer(found, everything(found), 0.5)
    assert [int((~mask).sum()) for mask in lives.values()] == [144, 15, 6]
    assert all(found[n][~lives[n]].max() < found[n][lives[n]].min() for n in found)


def test_the_dead_count_and_never_come_back() -> None:
    found = scores(1)
    first = network_wide(found, everything(found), 0.3)
    second = network_wide({n: -s for n, s in found.items()}, first, 0.5)
    assert all(not bool((second[n] & ~first[n]).any()) for n in found)
    assert sum(int((~m).sum()) for m in second.values()) == round(0.5 * (288 + 30 + 12))
    assert all(torch.equal(m, first[n]) for n, m in network_wide(found, first, 0.1).items())


def test_two_of_four_neighbours_along_the_inputs_live_the_larger_two() -> None:
    found = scores(2)
    lives = n_of_m(found, everything(found), 2, 4)
    by_hand = np.asarray(found["a"])
    for o, r, s in np.ndindex(4, 3, 3):
        for c in (0, 4):
            largest = set(np.argsort(by_hand[o, c : c + 4, r, s])[2:] + c)
            assert set(np.flatnonzero(lives["a"][o, c : c + 4, r, s]) + c) == largest
    assert torch.equal(lives["c"].sum(1), torch.full((3,), 2))


def test_layers_whose_inputs_do_not_come_in_fours_keep_their_weights() -> None:
    found = scores(3)
    assert bool(n_of_m(found, everything(found), 2, 4)["b"].all()) and not fits(found["b"], 4)


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_without_masks_is_refused_and_one_with_them_is_taken(strict: bool) -> None:
    dense, pruned, again = (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)) for _ in range(3))
    for net in (pruned, again):
        attach_mask(net[0], "weight", torch.arange(12).reshape(3, 4) % 2 == 0)
    with pytest.raises(RuntimeError, match=r"the zeros of 0\.weight are held by a mask, and the state dict has none"):
        pruned.load_state_dict(dense.state_dict(), strict=strict)
    again.load_state_dict(pruned.state_dict(), strict=strict)
    assert torch.equal(again[0].weight, pruned[0].weight)
    plain, _ = bake(again)
    plain.load_state_dict(dense.state_dict(), strict=strict)
    assert torch.equal(plain[0].weight, dense[0].weight)
