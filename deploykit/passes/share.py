"""Weight sharing: the weights of a layer take only a few different values, and a file keeps a short code for each.

Han et al. 2016, "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and Huffman
Coding", section 3: k-means over the weights of a layer, zeros left out, which stay zero. It works on the graph, where
batch normalisation is folded: folding scales every channel by itself and would leave K values for each of them. Values
are clustered exactly (`deploykit.hub.sharing.kmeans`), which halves the error of the paper's linear start at 5 bits.

The values can also be chosen for what the layers compute with them on calibration data, as GPTQ chooses integers
(`deploykit.hub.sharing.outputs`).

What it saves is seen in files that keep codes: ONNX (a codebook and `Gather`), and what `deploykit pack` writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from deploykit.core.context import Context, apart, enough
from deploykit.core.errors import DeploykitError, some
from deploykit.core.journal import NOTHING_KEPT
from deploykit.core.manifest import Finding
from deploykit.core.patterns import matching
from deploykit.core.progress import say
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from deploykit.core.data import DataSet
    from deploykit.hub.graph import FloatGraph
    from deploykit.hub.sharing.codebooks import Weight

BITS = 5
LEAST_SAMPLES = 8
UNIT = "bytes of the coded weights, share of fp32"


@dataclass(frozen=True)
class Share:
    """Gives every layer's weights 2^bits different values, zero among them where it occurs."""

    bits: int | None = None
    """5 where nothing else is said."""
    layers: Mapping[str, int] = field(default_factory=dict)
    """Layer, by name or pattern -> bits of its own."""
    bytes: float | None = None
    """Budget instead of bits: what the coded weights may take, as a share of what they take in fp32. How fine values
    are is chosen by what each layer's sharing does to the answers, how many there are by what their codes take."""
    max_drop: float | None = None
    """Points that may be lost, of accuracy where samples have labels, else of agreement with the float model: the
    smallest file is sought that loses no more."""
    near: Literal["weights", "outputs"] = "weights"
    """What values and codes are chosen to keep: the weights, or the outputs of their layers on calibration data."""
    start: Literal["optimal", "linear", "density", "random"] = "optimal"
    """Where k-means begins; the paper's is linear."""
    skip: tuple[str, ...] = ()
    """Layers that keep their weights, by name or pattern."""

    stage: ClassVar[Stage] = "graph"
    needs: ClassVar[tuple[Need, ...]] = ()
    pays_if: ClassVar[tuple[Profit, ...]] = ("codebook", "small_file")

    def __post_init__(self) -> None:
        """Refuses bits that codes cannot have."""
        for bits in (BITS if self.bits is None else self.bits, *self.layers.values()):
            if not isinstance(bits, int) or not 1 <= bits <= 12:
                raise ValueError(f"bits must lie between 1 and 12, given {bits}")
        if self.bytes is not None and not 0 < self.bytes <= 1:
            raise ValueError("bytes is a share of what fp32 takes, above 0 and at most 1")
        if self.max_drop is not None and not self.max_drop >= 0:
            raise ValueError("max_drop must be 0 or more points")
        if self._chooses and (self.layers or self.bits is not None):
            raise ValueError("bytes and max_drop choose for all layers: leave out layers and bits")
        if (self._chooses or self.near == "outputs") and self.start != "optimal":
            raise ValueError('start says where k-means over weights begins, and goes with bits and near = "weights"')

    @property
    def _chooses(self) -> bool:
        """Whether it is found out how fine values are."""
        return self.bytes is not None or self.max_drop is not None

    def foresee(self, context: Context) -> None:
        """Refuses a budget without samples or without a solver, and outputs without enough samples."""
        if self._chooses:
            from deploykit.hub.mixed.assignment import require_solver

            _, judged = apart(context, "share")
            if self.max_drop is not None and judged.synthetic:
                raise DeploykitError(
                    "share: max_drop counts answers to real samples, and these are made up; give bytes"
                )
            require_solver()
        if self.near == "outputs":
            why = "chooses values by what they do to the data"
            enough(context, "share near outputs", LEAST_SAMPLES, why, 'near = "weights" needs none.')

    def __call__(self, graph: FloatGraph, context: Context) -> FloatGraph:
        """The graph with shared weights.

        Raises:
            DeploykitError: there is no weight to be shared, a layer that there is not, NaN or infinity among weights,
                or a budget or loss that cannot be met.
            MissingExtra: a budget, and no solver.
        """
        import numpy as np

        from deploykit.hub.sharing.codebooks import weights

        self.foresee(context)
        shared = weights(graph, self.skip)
        if self._chooses:
            shared = self._of_products(graph, shared)
        if not shared:
            raise DeploykitError("there is nothing to share: no weights of convolutions, products, LSTM or GRU")
        for own in shared:
            if not np.isfinite(own.values).all():
                raise DeploykitError(f"weights with NaN or infinity cannot be shared: those of '{own.layer}'")
        if self._chooses:
            fitted, judged = apart(context, "share")
            if self.max_drop is not None:  # what was judged is what is given
                context = replace(context, data={"calibration": fitted})
            bits = self._chosen(graph, shared, fitted, judged, context)
        else:
            bits = self._bits(shared)
        made = self._made(graph, shared, bits, context)
        context.note(_shared(repr(self), shared, {own.name: own for own in weights(made)}))
        return made

    def _of_products(self, graph: FloatGraph, shared: Sequence[Weight]) -> list[Weight]:
        """Those whose levels can be chosen; the others keep their weights, which is said."""
        from deploykit.hub.sharing.choice import of_products

        found = of_products(graph, shared)
        others = sorted({own.layer for own in shared} - {own.layer for own in found})
        if others and not found:
            raise DeploykitError(
                f"share: levels are chosen for products alone, and {some(others, 4)} are none; give bits"
            )
        if others:
            say(f"share: {some(others, 4)} keep their weights; levels are chosen for products alone, bits is for all")
        return found

    def _chosen(
        self, graph: FloatGraph, shared: Sequence[Weight], fitted: DataSet, judged: DataSet, context: Context
    ) -> Mapping[str, int]:
        """How fine the values of every weight are, by initializer, in quarter bits."""
        import numpy as np

        from deploykit.hub.analysis.answers import Exam
        from deploykit.hub.mixed.assignment import cheapest, within
        from deploykit.hub.mixed.frontier import Bar, frontier, least_within, on_frontier, told
        from deploykit.hub.sharing.choice import tables

        exam = Exam(graph, judged, "share", fitted) if self.max_drop is not None else None
        losses, costs = tables(
            graph, shared, fitted, judged, outputs=self.near == "outputs", seed=context.seed, journal=context.journal
        )
        if self.bytes is not None and not within(least := cheapest(costs), self.bytes):
            raise DeploykitError(
                f"share: {self.bytes:g} of the fp32 bytes cannot be met: the least possible is {least:.4g}, with "
                "the coarsest values everywhere. Fewer values that are not zero take fewer bytes."
            )
        if exam is None or self.max_drop is None:
            assert self.bytes is not None
            best, shown = on_frontier(losses, costs, self.bytes), frontier(losses, costs)
        else:
            trial = replace(context, journal=NOTHING_KEPT)

            def lost(bits: Mapping[str, int]) -> float:
                found = context.journal.once(
                    f"lost with {sorted(bits.items())}",
                    lambda: {"points": np.asarray(exam.lost(self._made(graph, shared, bits, trial).bytes))},
                )
                return float(found["points"])

            bar = Bar(self.max_drop, lost, exam.what, len(judged))
            best, shown = least_within(losses, costs, bar, self.bytes, "share", UNIT)
        context.note(told(repr(self), UNIT, best, shown))
        return best.bits

    def _made(
        self, graph: FloatGraph, shared: Sequence[Weight], bits: Mapping[str, int], context: Context
    ) -> FloatGraph:
        """The graph with weights as fine as said: in bits, or in quarter bits where it was found out."""
        from deploykit.core.progress import track
        from deploykit.hub.sharing.choice import PARTS
        from deploykit.hub.sharing.codebooks import share, share_at_level, with_weights
        from deploykit.hub.sharing.outputs import forms

        chosen = forms(graph, shared) if self.near == "outputs" else {}
        found = {}
        for own in track([own for own in shared if own.name not in chosen], "share: clustering"):
            if self._chooses:
                found[own.name] = share_at_level(own.values, bits[own.name] / PARTS).weight
            else:
                found[own.name] = share(own.values, bits[own.name], self.start, seed=context.seed).weight
        made = with_weights(graph, found)
        if not chosen:
            return made
        return self._near_outputs(graph, made, [own for own in shared if own.name in chosen], bits, context)

    def _near_outputs(
        self, graph: FloatGraph, made: FloatGraph, shared: Sequence[Weight], bits: Mapping[str, int], context: Context
    ) -> FloatGraph:
        """The graph with values and codes chosen layer by layer."""
        from deploykit.hub.sharing.choice import PARTS
        from deploykit.hub.sharing.codes import at_level, in_bits
        from deploykit.hub.sharing.outputs import by_outputs

        def pick(
            own: Weight, t: NDArray[np.float64], h: NDArray[np.float64], kept: NDArray[np.bool_]
        ) -> NDArray[np.float32]:
            def chosen() -> dict[str, NDArray[np.float64]]:
                level = bits[own.name]
                return {"weight": at_level(t, h, kept, level / PARTS) if self._chooses else in_bits(t, h, kept, level)}

            return context.journal.once(f"{own.name} with {sorted(bits.items())}", chosen)["weight"].astype("float32")

        data = context.need("calibration", "share")
        return by_outputs(graph, made, shared, data, pick, who="share: layers", seed=context.seed)

    def _bits(self, shared: Sequence[Weight]) -> dict[str, int]:
        """By initializer; of two patterns that both match the later one counts."""
        of_layer = {own.layer: BITS if self.bits is None else self.bits for own in shared}
        for pattern, bits in self.layers.items():
            of_layer |= dict.fromkeys(matching("layer", [pattern], of_layer), bits)
        return {own.name: of_layer[own.layer] for own in shared}


def _shared(step: str, shared: Sequence[Weight], found: Mapping[str, Weight]) -> Finding:
    """What became of every layer, for the report."""
    import numpy as np

    from deploykit.hub.sharing.codebooks import codebook, coded_bits

    rows = []
    for own in shared:
        codes = codebook(found[own.name].values, own.values.size)
        assert codes is not None
        lost = float(np.square(codes.weight - own.values, dtype=np.float64).sum())
        whole = max(float(np.square(own.values, dtype=np.float64).sum()), 1e-300)
        kept = 100 * np.count_nonzero(codes.weight) / own.values.size
        taken = round(coded_bits(codes) / 8)
        rows.append((own.layer, own.values.size, float(kept), codes.bits, len(codes.book), taken, lost / whole))
    total = sum(own.values.size for own in shared)
    times = 4 * total / max(1, sum(row[5] for row in rows))
    columns = "layer", "weights", "not zero %", "bits", "values", "bytes, coded", "error"
    title = f"Weights that share values: {times:.1f} times smaller than fp32 once they are coded"
    return Finding(step, title, columns, tuple(rows))
