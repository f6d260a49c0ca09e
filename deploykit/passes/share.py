"""Weight sharing: the weights of a layer take only a few different values, and a file keeps a short code for each.

Han et al. 2016, "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and Huffman
Coding", section 3: k-means over the weights of a layer, zeros left out, which stay zero. It works on the graph, where
batch normalisation is folded: folding scales every channel by itself and would leave K values for each of them. Values
are clustered exactly (`deploykit.hub.sharing.kmeans`), which halves the error of the paper's linear start at 5 bits.

What it saves is seen in files that keep codes: ONNX (a codebook and `Gather`), and what `deploykit pack` writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from deploykit.core.context import Context
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import Finding
from deploykit.core.patterns import matching
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from deploykit.hub.graph import FloatGraph
    from deploykit.hub.sharing.codebooks import Codebook, Weight


@dataclass(frozen=True)
class Share:
    """Gives every layer's weights 2^bits different values, zero among them where it occurs."""

    bits: int = 5
    layers: Mapping[str, int] = field(default_factory=dict)
    """Layer, by name or pattern -> bits of its own."""
    bytes: float | None = None
    """Budget instead of bits: what the coded weights may take, as a share of what they take in fp32. Bits are chosen by
    what each layer's sharing does to the answers."""
    start: Literal["optimal", "linear", "density", "random"] = "optimal"
    """Where k-means begins; the paper's is linear."""
    skip: tuple[str, ...] = ()
    """Layers that keep their weights, by name or pattern."""

    stage: ClassVar[Stage] = "graph"
    needs: ClassVar[tuple[Need, ...]] = ()
    pays_if: ClassVar[tuple[Profit, ...]] = ("codebook", "small_file")

    def __post_init__(self) -> None:
        """Refuses bits that codes cannot have."""
        for bits in (self.bits, *self.layers.values()):
            if not isinstance(bits, int) or not 1 <= bits <= 12:
                raise ValueError(f"bits must lie between 1 and 12, given {bits}")
        if self.bytes is not None and (not 0 < self.bytes <= 1 or self.layers):
            raise ValueError(
                "bytes is a share of what fp32 takes, above 0 and at most 1, and chooses the bits of all layers: leave "
                "out layers"
            )

    def foresee(self, context: Context) -> None:
        """Refuses a budget without samples, or without a solver."""
        if self.bytes is not None:
            from deploykit.hub.mixed.assignment import require_solver

            context.need("calibration", "share with a budget of bytes")
            require_solver()

    def __call__(self, graph: FloatGraph, context: Context) -> FloatGraph:
        """The graph with shared weights.

        Raises:
            DeploykitError: there is no weight to be shared, a layer that there is not, NaN or infinity among weights,
                or a budget that cannot be met.
            MissingExtra: a budget, and no solver.
        """
        from deploykit.core.progress import track
        from deploykit.hub.sharing.choice import choose
        from deploykit.hub.sharing.codebooks import share, weights, with_weights

        self.foresee(context)
        shared = weights(graph, self.skip)
        if not shared:
            raise DeploykitError("there is nothing to share: no weights of convolutions, products, LSTM or GRU")

        def book(own: Weight, bits: int) -> Codebook:
            return share(own.values, bits, self.start, seed=context.seed)

        if self.bytes is not None:
            bits = choose(graph, shared, book, context.need("calibration", "share"), self.bytes)
        else:
            bits = self._bits(shared)
        found = {own.name: book(own, bits[own.name]) for own in track(shared, "share: clustering")}
        context.note(_shared(repr(self), shared, found))
        return with_weights(graph, {name: codes.weight for name, codes in found.items()})

    def _bits(self, shared: Sequence[Weight]) -> dict[str, int]:
        """By initializer; of two patterns that both match the later one counts."""
        of_layer = {own.layer: self.bits for own in shared}
        for pattern, bits in self.layers.items():
            of_layer |= dict.fromkeys(matching("layer", [pattern], of_layer), bits)
        return {own.name: of_layer[own.layer] for own in shared}


def _shared(step: str, shared: Sequence[Weight], found: Mapping[str, Codebook]) -> Finding:
    """What became of every layer, for the report."""
    import numpy as np

    from deploykit.hub.sharing.codebooks import coded_bits

    rows = []
    for own in shared:
        codes = found[own.name]
        lost = float(np.square(codes.weight - own.values, dtype=np.float64).sum())
        whole = max(float(np.square(own.values, dtype=np.float64).sum()), 1e-300)
        kept = 100 * np.count_nonzero(own.values) / own.values.size
        taken = round(coded_bits(codes) / 8)
        rows.append((own.layer, own.values.size, float(kept), codes.bits, len(codes.book), taken, lost / whole))
    total = sum(own.values.size for own in shared)
    times = 4 * total / max(1, sum(row[5] for row in rows))
    columns = "layer", "weights", "not zero %", "bits", "values", "bytes, coded", "error"
    title = f"Weights that share values: {times:.1f} times smaller than fp32 once they are coded"
    return Finding(step, title, columns, tuple(rows))
