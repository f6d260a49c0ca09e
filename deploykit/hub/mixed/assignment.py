"""Which layer gets how many bits: the least loss that a budget allows, by integer programming.

With x_lb = 1 where layer l gets b bits, d_lb what that loses and c_lb what it costs:

    min  Σ d_lb x_lb      subject to      Σ_b x_lb = 1 for every l,      Σ c_lb x_lb ≤ budget

(Hubara et al. 2021, "Accurate Post Training Quantization With Small Calibration Sets", section 4). HiGHS solves it
through SciPy, in milliseconds for hundreds of layers.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from deploykit.core.errors import DeploykitError, MissingExtra

Table = Mapping[str, Mapping[int, float]]
"""Layer -> bits -> a number."""
TOLERANCE = 1e-6
"""Of the budget: sums of floats, and the solver's own."""


class OverBudget(DeploykitError):
    """No assignment is within the budget.

    Args:
        budget: what was allowed.
        least: what the cheapest assignment costs.
    """

    def __init__(self, budget: float, least: float) -> None:
        """Names both."""
        super().__init__(f"no assignment of bits costs {budget:.6g} or less; the least possible is {least:.6g}")
        self.least = least


def assign(losses: Table, costs: Table, budget: float) -> dict[str, int]:
    """Bits by layer, with the least summed loss among all assignments within the budget.

    Args:
        losses: what a layer loses at some bits; finite.
        costs: for the same layers and bits; finite and at least 0.
        budget: on the sum of the costs, in their unit.

    Raises:
        OverBudget: even the cheapest assignment costs more.
        MissingExtra: SciPy is not installed.
    """
    require_solver()
    from scipy.optimize import LinearConstraint, milp

    if not within(least := cheapest(costs), budget):
        raise OverBudget(budget, least)
    pairs = [(layer, bits) for layer, row in losses.items() for bits in row]
    d = np.asarray([losses[layer][bits] for layer, bits in pairs], np.float64)
    c = np.asarray([costs[layer][bits] for layer, bits in pairs], np.float64)
    unit = max(c.max(), 1e-300)
    one_each = np.asarray([[own == layer for own, _ in pairs] for layer in losses], np.float64)
    with _speechless():
        found = milp(
            d / max(np.abs(d).max(), 1e-300) * 1e3,  # far above the gap, 1e-6, at which the solver stops
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(c[None] / unit, ub=budget / unit * (1 + TOLERANCE)),
            ],
            integrality=np.ones(len(pairs)),
            bounds=(0, 1),
            options={"mip_rel_gap": 0.0},
        )
    assert found.x is not None, found.message
    return {layer: bits for (layer, bits), x in zip(pairs, found.x, strict=True) if x > 0.5}


@contextlib.contextmanager
def _speechless() -> Iterator[None]:
    """Where nothing is printed: HiGHS writes a line of debugging now and then, past Python and all its options.

    Other threads cannot print either, for the milliseconds that it takes.
    """

    def flush() -> None:
        """What C holds back for the present standard output."""
        if sys.stdout is not None:
            sys.stdout.flush()
        with contextlib.suppress(OSError, TypeError, AttributeError):  # no such library by that name elsewhere
            ctypes.CDLL(None).fflush(None)

    flush()
    try:
        kept = os.dup(1)
    except OSError:  # it is closed: nothing can be printed
        yield
        return
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        flush()
        os.dup2(kept, 1)
        os.close(kept)


def cost(costs: Table, bits: Mapping[str, int]) -> float:
    """Of an assignment."""
    return float(sum(costs[layer][b] for layer, b in bits.items()))


def cheapest(costs: Table) -> float:
    """What the assignment costs that spares most; no other costs less."""
    return float(sum(min(row.values()) for row in costs.values()))


def within(cost: float, budget: float) -> bool:
    """Whether a cost is within a budget, but for rounding."""
    return cost <= budget * (1 + TOLERANCE)


def require_solver() -> None:
    """Refuses to start where the solver is missing.

    Raises:
        MissingExtra: SciPy is not installed.
    """
    from importlib.util import find_spec

    if find_spec("scipy") is None:
        raise MissingExtra("choosing bits by integer programming", "mixed")
