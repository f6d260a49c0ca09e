"""Coders and symbols: streams against entropy, Huffman's own codes and sums by hand; weights against going through one
by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deploykit.coding import huffman, rans
from deploykit.coding.lanes import LENGTH, lanes
from deploykit.coding.symbols import Symbols, pieces, sparse, symbols
from deploykit.core.errors import DeploykitError

MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
CODERS: list[Any] = [rans, huffman]


def counts_of(stream: NDArray[Any]) -> NDArray[np.int64]:
    return np.bincount(stream).astype(np.int64)


# ------------------------------------------------------------------ coders


@pytest.mark.parametrize("coder", CODERS, ids=["rans", "huffman"])
@MANY
@given(
    sizes=st.lists(st.sampled_from([0, 1, 2, 17, 300, LENGTH, 2 * LENGTH + 5]), min_size=1, max_size=4),
    many=st.integers(1, 300), steep=st.floats(0.0, 0.95), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_streams_of_a_block_come_back(coder: Any, sizes: list[int], many: int, steep: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    share = (1 - steep) ** np.arange(many) + 1e-9
    streams = [random.choice(many, n, p=share / share.sum()).astype(np.uint16) for n in sizes]
    tables = [coder.table(counts_of(stream)) for stream in streams]
    found = coder.decode(coder.encode(streams, tables), tables, sizes)
    assert all(np.array_equal(a, b) for a, b in zip(found, streams, strict=True))


@pytest.mark.parametrize(("coder", "above"), [(rans, 1.01), (huffman, 1.06)], ids=["rans", "huffman"])
def test_a_long_stream_takes_about_its_entropy(coder: Any, above: float) -> None:
    stream = np.minimum(np.random.default_rng(0).geometric(0.3, 400_000) - 1, 60)
    share = counts_of(stream) / len(stream)
    entropy = -float((share[share > 0] * np.log2(share[share > 0])).sum()) * len(stream) / 8
    table = coder.table(counts_of(stream))
    assert entropy < len(coder.encode([stream], [table])) < above * entropy
    assert coder.size(counts_of(stream)) / 8 == pytest.approx(len(coder.encode([stream], [table])), rel=0.005)


def test_frequencies_sum_to_their_scale_whatever_is_counted() -> None:
    for counts in ([1], [10**9, 1], [1] * 4096, [1, 0, 10**6, 0, 3], [5] * 255):
        found = rans.frequencies(rans.table(np.asarray(counts, np.int64)))
        assert found.sum() == rans.M and all((f > 0) == (c > 0) for f, c in zip(found, counts, strict=True))


def test_code_lengths_are_huffmans_where_none_is_too_long() -> None:
    """The weights of a textbook: 45, 13, 12, 16, 9, 5."""
    assert huffman.table(np.asarray([45, 13, 12, 16, 9, 5])).tolist() == [1, 3, 3, 3, 4, 4]
    fibonacci = [1, 1]
    while len(fibonacci) < 25:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    found = huffman.table(np.asarray(fibonacci))
    assert found.max() == huffman.LONGEST and (2.0 ** -found.astype(float)).sum() == 1.0


def test_canonical_codes_are_in_the_order_of_length_then_symbol() -> None:
    assert huffman.codes(np.asarray([2, 1, 3, 3], np.uint8)).tolist() == [0b10, 0b0, 0b110, 0b111]
    for wrong in ([1, 1, 1], [0, 0], [13, 1]):
        with pytest.raises(DeploykitError, match="no prefix code"):
            huffman.codes(np.asarray(wrong, np.uint8))


def test_huffmans_words_hold_the_codes_bit_by_bit() -> None:
    """One lane: the words are the codes one after the other, the highest bit first."""
    stream = np.asarray([0, 1, 2, 3, 0, 0, 2, 1, 0, 3, 3, 1, 0], np.uint16)
    length = np.asarray([1, 2, 3, 3], np.uint8)
    written = "".join({0: "0", 1: "10", 2: "110", 3: "111"}[int(s)] for s in stream)
    words = np.frombuffer(huffman.encode([stream], [length]), "<u2")
    read = "".join(f"{word:016b}" for word in words)
    assert read.startswith(written) and set(read[len(written) :]) <= {"0"}


def test_rans_states_follow_the_formula() -> None:
    """One lane, two symbols of the same frequency: nothing overflows in so few steps."""
    table = rans.table(np.asarray([1, 1]))
    x = rans.LOWEST
    for s in (0, 1, 1):
        x = rans.M * (x // 2048) + 2048 * s + x % 2048
    assert int.from_bytes(rans.encode([np.asarray([1, 1, 0], np.uint16)], [table]), "little") == x


def test_lanes_have_every_symbol_once_and_the_longest_come_first() -> None:
    deal = lanes([0, 5, LENGTH, 3 * LENGTH + 7, 1])
    places = np.concatenate([at.copy() for at in deal.steps()])
    assert sorted(places.tolist()) == list(range(4 * LENGTH + 13))
    assert (np.diff(deal.active) <= 0).all()


# ------------------------------------------------------------------ weights as symbols


def together(found: Symbols, count: int) -> NDArray[Any]:
    """The weights at once."""
    return np.concatenate([found.book[:0], *pieces(found, count)])


def sparse_by_hand(codes: list[int], b: int) -> list[tuple[int, int]]:
    found, gap = [], 0
    for code in codes:
        if code:
            found.append((gap, code))
            gap = 0
        elif gap == 2**b - 1:
            found.append((gap, 0))
            gap = 0
        else:
            gap += 1
    while found and found[-1][1] == 0:
        found.pop()
    return found


@MANY
@given(st.lists(st.sampled_from([0, 0, 0, 0, 0, 1, 2]), max_size=60), st.integers(1, 4))
def test_gaps_and_fillers_are_those_of_going_through_one_by_one(codes: list[int], b: int) -> None:
    book = np.asarray([0, 7, 9], np.uint8)
    found = sparse(np.asarray(codes, np.int64), book, b)
    assert list(zip(*(s.tolist() for s in found.streams), strict=True)) == sparse_by_hand(codes, b)
    assert np.array_equal(together(found, len(codes)), book[codes])


@MANY
@given(st.lists(st.sampled_from([0, 0, 0, 0, 0, 1, 2]), max_size=60), st.integers(1, 4), st.integers(1, 9))
def test_pieces_are_the_weights_whatever_their_size(codes: list[int], b: int, size: int) -> None:
    book = np.asarray([0, 7, 9], np.uint8)
    dense = Symbols(book, (np.asarray(codes, np.uint16),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deploykit.coding.symbols.PIECE", size)
        for own in (dense, sparse(np.asarray(codes, np.int64), book, b)):
            found = list(pieces(own, len(codes)))
            assert np.array_equal(np.concatenate([book[:0], *found]), book[codes])
            assert all(len(piece) == size for piece in found[:-1])


@pytest.mark.parametrize(
    "gaps, codes, count, why",
    [
        ([0, 4], [1, 1], 9, "a gap has more bits"),
        ([0, 3], [1, 1], 4, "beyond the end"),
        ([0, 3], [1, 3], 9, "no value"),
    ],
)
def test_symbols_that_stand_for_no_weights_are_refused(gaps: list[int], codes: list[int], count: int, why: str) -> None:
    book, streams = np.asarray([0, 7, 9], np.uint8), (np.asarray(gaps, np.uint16), np.asarray(codes, np.uint16))
    with pytest.raises(DeploykitError, match=why):
        together(Symbols(book, streams, 2), count)
    with pytest.raises(DeploykitError, match="code 0 is not zero"):
        together(Symbols(np.asarray([5, 7, 9], np.uint8), (streams[0] % 2, streams[1] % 2), 2), 9)


@pytest.mark.parametrize("coder", CODERS, ids=["rans", "huffman"])
@MANY
@given(
    kind=st.sampled_from(["u1", "u2", "u4"]), count=st.integers(1, 6000), share=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    many=st.sampled_from([1, 2, 30, 5000]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_weights_come_back_from_their_symbols(
    coder: Any, kind: str, count: int, share: float, many: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    book = random.integers(0, 256 ** np.dtype(kind).itemsize, many).astype(kind)
    given_ = np.where(random.random(count) < share, random.choice(book, count), 0).astype(kind)
    back = together(symbols(given_, coder), count)
    assert back.tobytes() == given_.tobytes()
