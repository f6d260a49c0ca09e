"""Codes with contexts: against a decoder that goes through docs/formats/dkz.md one number after the other."""

from __future__ import annotations

import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import graph, normal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_dkz import kernels, refronted

from deploykit.coding import contexts, fitting, rans
from deploykit.coding.contexts import Group, Layer, Model
from deploykit.coding.nibbles import packed as joined
from deploykit.coding.nibbles import unpacked as halves
from deploykit.core.errors import DeploykitError
from deploykit.dkz.container import pack, packed
from deploykit.dkz.files import pack_file
from deploykit.dkz.front import front_of
from deploykit.dkz.reading import unpack
from deploykit.dkz.weights import Extent, File, Shape

MANY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def spots(rows: int, side: int, seed: int = 0) -> NDArray[np.float64]:
    """A matrix that reads images, ``[rows, side * side]``: zero but for some places that lie together."""
    random = np.random.default_rng(seed)
    field = random.normal(size=(rows, side + 2, side + 2))
    near = sum(field[:, y : y + side, x : x + side] for y in range(3) for x in range(3))
    assert isinstance(near, np.ndarray)
    return np.where(np.abs(near) > 4.5, near, 0).reshape(rows, -1)


def shared(values: NDArray[np.float64], many: int) -> NDArray[np.float32]:
    """With so many different values, zero among them."""
    step = np.abs(values).max() * 2 / many or 1.0
    return (np.round(values / step) * step).astype(np.float32)


def file_of(*pairs: tuple[NDArray[Any], Shape | None]) -> File:
    data, extents = b"begin", []
    for own, shape in pairs:
        extents.append(Extent(len(data), own.size, 8 * own.itemsize, f"w{len(extents)}", shape=shape))
        data += own.tobytes() + b"between"
    return File("net.bin", data, extents)


def opened(data: bytes) -> bytes:
    return b"".join(piece for _, pieces in unpack(data) for piece in pieces)


# ------------------------------------------------------------------ the format


def div(a: int, b: int) -> int:
    return a // b


class ByHand:
    """A decoder of one block's words, in Python's integers, as the page about the format says it."""

    def __init__(self, words: bytes, lanes: int) -> None:
        self.x = [int.from_bytes(words[4 * i : 4 * i + 4], "little") for i in range(lanes)]
        self.words = [int.from_bytes(words[i : i + 2], "little") for i in range(4 * lanes, len(words), 2)]

    def symbol(self, lane: int, f: list[int]) -> int:
        slot, s, c = self.x[lane] % 4096, 0, 0
        while slot >= c + f[s]:
            c += f[s]
            s += 1
        self.x[lane] = f[s] * div(self.x[lane], 4096) + slot - c
        return s

    def refill(self, lanes: int) -> None:
        for lane in range(lanes):
            if self.x[lane] < 2**16:
                self.x[lane] = 2**16 * self.x[lane] + self.words.pop(0)

    def decode(self, model: Model, layers: list[Layer]) -> list[list[list[int]]]:
        edge = max([abs(d) for d in model.distances] + [0])
        f = [[int(n) for n in rans.frequencies(layer.table)] for layer in layers]
        average = [
            max(1, div(16 * sum(n * abs(int(v)) for n, v in zip(own, layer.levels, strict=True)), 4096))
            for own, layer in zip(f, layers, strict=True)
        ]
        level, magnitude, starts = [0] * edge, [average[0]] * edge, list[int]()
        for layer, a in zip(layers, average, strict=True):
            starts.append(len(level))
            level += [0] * (layer.rows * layer.columns)
            magnitude += [a] * (layer.rows * layer.columns)
        level += [0] * edge
        magnitude += [average[-1]] * edge
        group = [[min(15, div(16 * (sum(own[:s]) + div(own[s], 2)), 4096)) for s in range(len(own))] for own in f]
        row, column, counts = dict[Any, list[int]](), dict[Any, list[int]](), dict[Any, list[int]]()
        codes = [[[0] * layer.columns for _ in range(layer.rows)] for layer in layers]
        for p in range(model.passes):
            mean, spread = (own[p % len(own)].astype(int).tolist() for own in (model.mean, model.spread))
            turn = 3 if model.kernel == 1 else 0
            asked = [
                (i, r, c)
                for i, layer in enumerate(layers)
                for r in range(layer.rows)
                for c in range(layer.columns)
                if (c + turn * r) % model.passes == p
            ]
            told = []
            for i, r, c in asked:
                at, a = starts[i] + r * layers[i].columns + c, average[i]
                (s, m), (t, n) = row.get((i, r), [0, 0]), column.get((i, c // model.kernel), [0, 0])
                big_r, big_c = div(s + 4 * a, m + 4), div(t + 4 * a, n + 4)
                mu = 16 * sum(k * level[at + d] for k, d in zip(mean, model.distances, strict=True))
                sigma = sum(k * magnitude[at + d] for k, d in zip(spread, model.distances, strict=False))
                sigma += spread[-4] * big_r + spread[-3] * big_c + spread[-2] * div(big_r * big_c, a) + spread[-1] * a
                sigma = max(64, sigma)
                octaves = div(8 * sigma**2, (32 * a) ** 2)
                kind = 10 * min(7, max(0, div(8 * mu, 3 * sigma) + 4)) + sum(2**b <= octaves for b in range(9))
                of_group = [sum(x for x, g in zip(f[i], group[i], strict=True) if g == k) for k in range(16)]
                w = [256 * n + x for n, x in zip(counts.get((i, kind), [0] * 16), of_group, strict=True)]
                own = [
                    max(1, div(x * w[g] * 4096, of_group[g] * sum(w))) if x else 0
                    for x, g in zip(f[i], group[i], strict=True)
                ]
                while sum(own) != 4096:
                    most = own.index(max(own))
                    own[most] += max(4096 - sum(own), -div(own[most], 2))
                told.append((kind, own))
            lanes = len(self.x)
            for begin in range(0, len(asked), lanes):
                step = range(begin, min(begin + lanes, len(asked)))
                for lane, k in enumerate(step):
                    i, r, c = asked[k]
                    codes[i][r][c] = self.symbol(lane, told[k][1])
                self.refill(len(step))
            for (i, r, c), (kind, _) in zip(asked, told, strict=True):
                s = codes[i][r][c]
                at = starts[i] + r * layers[i].columns + c
                level[at] = int(layers[i].levels[s])
                magnitude[at] = 16 * abs(level[at])
                for sums, key in ((row, (i, r)), (column, (i, c // model.kernel))):
                    total, many = sums.get(key, [0, 0])
                    sums[key] = [total + magnitude[at], many + 1]
                counts.setdefault((i, kind), [0] * 16)[group[i][s]] += 1
        return codes


def group_of(model: Model, layers: list[NDArray[np.int64]], seed: int = 0) -> tuple[Group, list[NDArray[np.int64]]]:
    """Layers with those codes, and levels that rise."""
    random, made = np.random.default_rng(seed), []
    for codes in layers:
        levels = np.sort(random.integers(-127, 128, int(codes.max()) + 1)).astype(np.int8)
        made.append(Layer(*codes.shape, rans.table(np.bincount(codes.reshape(-1))), levels))
    return (model, made), layers


def model_of(kernel: int, passes: int, distances: tuple[int, ...], sets: int, seed: int) -> Model:
    random = np.random.default_rng(seed)
    mean = random.integers(-20, 40, (sets, len(distances))).astype(np.int8)
    return Model(kernel, passes, distances, mean, random.integers(-4, 20, (sets, len(distances) + 4)).astype(np.int8))


MODELS = [
    (1, 5, (-1, 2, -3), 1), (1, 1, (), 1), (4, 4, (-1, -2, -3), 4), (4, 4, (-2, 7), 1), (9, 9, (-1, -3), 9),
]  # fmt: skip


@MANY
@given(
    kinds=st.lists(st.sampled_from(MODELS), min_size=1, max_size=2), rows=st.integers(1, 7), columns=st.integers(1, 6),
    many=st.integers(1, 40), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_words_are_those_that_the_page_describes(
    kinds: list[tuple[Any, ...]], rows: int, columns: int, many: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    groups = []
    for kind in kinds:
        sizes = [(rows, columns * kind[0]), (2, 3 * kind[0])]
        codes = [np.minimum(random.geometric(0.2, size) - 1, many - 1) for size in sizes]
        groups.append(group_of(model_of(*kind, seed=seed % 1000), codes, seed % 999))
    words, lanes = contexts.encode([g for g, _ in groups], [c for _, c in groups])
    by_hand = ByHand(words, lanes)
    for (model, layers), codes in groups:
        assert by_hand.decode(model, list(layers)) == [own.tolist() for own in codes]
    assert by_hand.words == [] and set(by_hand.x) == {2**16}


@MANY
@given(
    kind=st.sampled_from(MODELS), rows=st.integers(1, 40), columns=st.integers(1, 50), many=st.integers(1, 512),
    steep=st.floats(0.01, 0.99), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_codes_come_back_whatever_they_are(
    kind: tuple[Any, ...], rows: int, columns: int, many: int, steep: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    codes = [np.minimum(random.geometric(steep, (n, columns * kind[0])) - 1, many - 1) for n in (rows, 1)]
    group, _ = group_of(model_of(*kind, seed=seed % 1000), codes, seed % 999)
    words, lanes = contexts.encode([group], [codes])
    (found,) = contexts.decode(words, [group], lanes)
    assert all(np.array_equal(a, b) for a, b in zip(found, codes, strict=True))


def test_several_lanes_have_the_same_content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "LANE", 8)
    codes = [np.random.default_rng(0).integers(0, 30, (20, 36))]
    group, _ = group_of(model_of(9, 9, (-1, -3), 9, 0), codes)
    words, lanes = contexts.encode([group], [codes])
    assert lanes > 40
    assert ByHand(words, lanes).decode(group[0], list(group[1])) == [codes[0].tolist()]
    assert np.array_equal(contexts.decode(words, [group], lanes)[0][0], codes[0])


def test_rows_of_frequencies_get_the_sum_that_one_gets() -> None:
    rows = np.asarray([[3000, 10, 0, 2000], [1, 1, 1, 1], [4096, 0, 0, 0], [4090, 300, 300, 300]])
    for row, found in zip(rows, rans.summing(rows), strict=True):
        own = row.tolist()
        while sum(own) != 4096:
            most = own.index(max(own))
            own[most] += max(4096 - sum(own), -(own[most] // 2))
        assert found.tolist() == own


# ------------------------------------------------------------------ what it saves


def beside(weights: NDArray[np.float32], shape: Shape) -> tuple[int, int]:
    """Bytes of a container as it chooses, and without contexts; both come back."""
    file = file_of((weights, shape))
    made = [packed([file]).data, packed([file], "rans").data]
    assert all(opened(data) == file.data for data in made)
    return len(made[0]), len(made[1])


def test_smooth_kernels_take_less_than_their_entropy() -> None:
    with_them, without = beside(kernels(48, 48), Shape(48, 48, 9))
    assert with_them < 0.9 * without


def test_zeros_that_lie_together_take_less() -> None:
    with_them, without = beside(shared(spots(100, 20), 16), Shape(100, 400))
    assert with_them < 0.9 * without


def test_neighbours_above_and_below_are_found_where_a_matrix_reads_images() -> None:
    weights = shared(spots(100, 20), 16)
    book, codes = np.unique(weights, return_inverse=True)
    laid = codes.reshape(100, 400)
    layer = Layer(100, 400, rans.table(np.bincount(codes.reshape(-1))), fitting.levels(book, codes))
    assert {-20, 20, -1, 1} <= set(fitting.neighbours(1, [layer], [laid]))


def test_noise_is_coded_without() -> None:
    weights = shared(np.random.default_rng(0).normal(size=(64, 64 * 9)), 32)
    chosen = packed([file_of((weights, Shape(64, 64, 9)))]).weights
    assert [own.coder for own in chosen] == ["rans"]


def test_coefficients_are_those_of_least_squares() -> None:
    """Every position has the value before it, give or take one: μ is its level. In the first passes there is nothing
    that was learnt."""
    random = np.random.default_rng(0)
    steps = random.integers(-1, 2, (200, 20, 8))
    steps[..., 0] = random.integers(10, 20, (200, 20))
    codes = np.cumsum(steps, 2).reshape(200, 160)
    levels = (4 * np.arange(-15, codes.max() - 14)).astype(np.int8)
    layer = Layer(200, 160, rans.table(np.bincount(codes.reshape(-1))), levels)
    model = fitting.fits(8, [layer], [codes])[1]
    first = model.distances.index(-1)
    assert abs(int(model.mean[7, first]) - fitting.SHARE) <= 3 and np.abs(np.delete(model.mean[7], first)).max() <= 2
    assert contexts.sizes((model, [layer]), [codes])[0] < 0.85 * rans.size(np.bincount(codes.reshape(-1)))


# ------------------------------------------------------------------ weights as they lie


@given(
    rows=st.integers(1, 4), outer=st.integers(1, 4), kernel=st.integers(1, 5), inner=st.integers(1, 4),
)  # fmt: skip
def test_shapes_put_kernels_together_and_apart(rows: int, outer: int, kernel: int, inner: int) -> None:
    weights = np.arange(rows * outer * kernel * inner)
    shape = Shape(rows, outer, kernel)
    laid = shape.together(weights)
    for r, o, k, i in np.ndindex(rows, outer, kernel, inner):
        assert laid[r, (o * inner + i) * kernel + k] == ((r * outer + o) * kernel + k) * inner + i
    assert np.array_equal(shape.apart(laid), weights)


def test_both_layouts_of_kernels_save_as_much() -> None:
    """ONNX has positions behind channels, TFLite between them."""
    weights = kernels(32, 40)
    one = pack([file_of((weights, Shape(32, 40, 9)))])
    two = pack([file_of((np.ascontiguousarray(weights.swapaxes(1, 2)), Shape(32, 1, 9)))])
    assert abs(len(one) - len(two)) < 5
    assert opened(two)[5:-7] == weights.swapaxes(1, 2).tobytes()


@given(st.binary(max_size=40))
def test_halves_of_bytes_come_back(data: bytes) -> None:
    own = np.frombuffer(data, np.uint8)
    assert [int(n) for n in halves(own)] == [n for byte in data for n in (byte % 16, byte // 16)]
    assert joined(halves(own)).tobytes() == data


@pytest.mark.parametrize("coder", [None, "rans", "huffman", "contexts"])
@pytest.mark.parametrize("kind", ["u1", "<u2", "<u4", "four bits", "mixed"])
def test_weights_of_every_width_come_back(kind: str, coder: str | None) -> None:
    codes = np.round(7 * kernels(16, 10)).clip(-7, 8).astype(np.int64) + 7
    shape = Shape(16, 10, 9)
    if kind == "four bits":
        data = joined(codes.reshape(-1).astype(np.uint8)).tobytes()
        file = File("net", b"x" + data, [Extent(1, codes.size, 4, "w", shape=shape)])
    elif kind == "mixed":
        book = np.random.default_rng(0).normal(size=16).astype(np.float32)
        noise = np.random.default_rng(1).normal(size=(64, 100)).astype(np.float32)
        file = file_of((book[codes], shape), (noise, Shape(64, 100)), (codes.astype(np.int8), shape), (book, None))
    else:
        file = file_of((codes.astype(kind), shape))
    data = pack([file], coder)
    assert opened(data) == file.data
    assert data == pack([file], coder)


@pytest.mark.parametrize("weights", [np.zeros((8, 90)), np.ones((8, 90)), np.eye(90), np.full((1, 1), 3.0)])
def test_layers_with_one_value_or_hardly_any_come_back(weights: NDArray[np.float64]) -> None:
    own = weights.astype(np.float32)
    file = file_of((own, Shape(len(own), own.shape[1])))
    assert opened(pack([file], "contexts")) == file.data


def test_what_is_no_number_is_coded_without_contexts() -> None:
    weights = kernels(16, 10)
    weights[3, 4, 5], weights[0, 0, 0] = np.nan, np.inf
    file = file_of((weights, Shape(16, 10, 9)))
    assert opened(pack([file], "contexts")) == file.data
    assert [own.coder for own in packed([file], "contexts").weights] != ["contexts"]


def test_a_coder_that_was_asked_for_and_codes_nothing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(graph("(float[n,64] x) => (float[n,32] y) { y = MatMul(x, w) }", w=normal(0, 64, 32)).bytes)
    pack_file(path, coder="contexts")
    assert "contexts codes none of the weights of net.onnx" in capsys.readouterr().err


# ------------------------------------------------------------------ damage


def test_words_that_are_cut_off_or_too_long_are_refused() -> None:
    codes = [np.random.default_rng(0).integers(0, 9, (9, 36))]
    group, _ = group_of(model_of(9, 9, (-1, -3), 9, 0), codes)
    words, lanes = contexts.encode([group], [codes])
    for damaged in (words[:-2], words + b"\0\0", words[:3], words[:-1]):
        with pytest.raises(DeploykitError, match="coded stream"):
            contexts.decode(damaged, [group], lanes)


def test_layers_that_take_next_to_nothing_still_have_lanes() -> None:
    """A lane is a symbol a step, in Python: a hundred thousand of them would take seconds."""
    weights = np.zeros((400, 500), np.float32)
    random = np.random.default_rng(0)
    weights[np.ix_(random.permutation(400)[:20], random.permutation(500)[:20])] = random.choice([-1, 1, 2], (20, 20))
    file = file_of((weights, Shape(400, 500)))
    data = pack([file])
    (block,) = front_of(data).blocks
    assert block.coder == "contexts" and 4 * block.lanes < block.words < 1024
    assert block.lanes == contexts.fewest(weights.size) == 13
    assert opened(data) == file.data


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told[3].append(told[3][0]),  # a model that no weight has
        lambda told: told[3].clear(),
        lambda told: told[2].append(["contexts", 0, 0, 0, 0, 0]),
        lambda told: told[2][0].__setitem__(0, "rans"),
        lambda told: told[2][0].__setitem__(5, 1),  # fewer lanes than so many values have
        lambda told: told[3][0][3].append([]),
        lambda told: told[3][0].__setitem__(2, [1 << 20] * 8),
        lambda told: told[3][0][4][0].__setitem__(0, 128),
        lambda told: told[0][0][3][0].__setitem__(7, 1 << 40),
    ],
)
def test_fronts_whose_models_lie_are_refused(change: Callable[[Any], None]) -> None:
    file = file_of((kernels(60, 40), Shape(60, 40, 9)))
    data = pack([file], "contexts")
    assert front_of(data).blocks[0].lanes > 1
    assert opened(refronted(data, lambda told: None)) == file.data
    with pytest.raises(DeploykitError, match="damaged"):
        opened(refronted(data, change))


def test_a_container_with_contexts_is_smaller_than_xz_of_the_same_file() -> None:
    file = file_of((kernels(48, 48), Shape(48, 48, 9)), (shared(spots(200, 28), 16), Shape(200, 784)))
    data = pack([file])
    assert [block.coder for block in front_of(data).blocks] == ["contexts"]
    assert len(data) < 0.8 * len(lzma.compress(file.data, preset=9 | lzma.PRESET_EXTREME))
