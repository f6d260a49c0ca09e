"""The container .dkz: round trips, damage of every kind, memory, stages."""

from __future__ import annotations

import itertools
import json
import lzma
import math
import tracemalloc
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_coding import sparse_by_hand

from deploykit.core.errors import DeploykitError
from deploykit.dkz import lzma2
from deploykit.dkz.container import pack, packed
from deploykit.dkz.files import unpack_file
from deploykit.dkz.front import HEAD, MOST_STREAMS, VERSION, front_of
from deploykit.dkz.lzma2 import PIECE
from deploykit.dkz.reading import peak, unpack
from deploykit.dkz.stages import REST, Stage, stages
from deploykit.dkz.weights import Extent, File, Shape

MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# ------------------------------------------------------------------ containers


def shared(count: int, share: float, many: int, seed: int = 0) -> NDArray[np.float32]:
    """Pruned weights with a codebook."""
    random = np.random.default_rng(seed)
    book = random.normal(size=many).astype(np.float32)
    return np.where(random.random(count) < share, random.choice(book, count), 0).astype(np.float32)


def kernels(rows: int, columns: int, kernel: int = 9, seed: int = 0) -> NDArray[np.float32]:
    """Whose positions are like those beside them, some rows larger than others, ``[rows, columns, kernel]``."""
    random = np.random.default_rng(seed)
    noise, sizes = random.normal(size=(rows, columns, kernel + 2)), random.uniform(0.5, 2.5, (rows, 1, 1))
    return np.round(sizes * (noise[..., 2:] + noise[..., 1:-1] + noise[..., :-2])).astype(np.float32) / 7 + 0


def file_of(*weights: NDArray[Any], name: str = "net.bin") -> File:
    """With shapes of those that are kernels."""
    data, extents = b"begin", []
    for own in weights:
        shape = Shape(*own.shape) if own.ndim == 3 else None
        extents.append(Extent(len(data), own.size, 8 * own.itemsize, f"w{len(extents)}", shape=shape))
        data += own.tobytes() + b"between"
    return File(name, data, extents)


def opened(data: bytes, **more: Any) -> dict[str, bytes]:
    return {name: b"".join(pieces) for name, pieces in unpack(data, **more)}


@pytest.mark.parametrize("coder", [None, "rans", "huffman"])
def test_files_come_back_bit_by_bit(coder: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploykit.dkz.container.MOST_VALUES", 20_000)  # several blocks
    random = np.random.default_rng(1)
    first = file_of(shared(30_000, 0.08, 32), random.normal(size=9000).astype(np.float32), np.zeros(500, np.int8))
    second = file_of(random.normal(0, 20, 12_000).astype(np.int8), name="other")
    data = pack([first, second, File("empty", b"", ())], coder)
    assert opened(data) == {"net.bin": first.data, "other": second.data, "empty": b""}
    assert data == pack([first, second, File("empty", b"", ())], coder)


def test_pruned_and_shared_weights_are_much_smaller_than_xz() -> None:
    file = file_of(shared(200_000, 0.08, 32))
    assert len(pack([file])) < 0.85 * len(lzma.compress(file.data, preset=9 | lzma.PRESET_EXTREME))


def test_random_bytes_cost_hardly_more_than_they_are() -> None:
    file = file_of(np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint8))
    assert len(pack([file])) < len(file.data) + 100


@pytest.fixture(scope="module", params=["rans", "huffman", "contexts"])
def small(request: pytest.FixtureRequest) -> bytes:
    weights = kernels(40, 20) if request.param == "contexts" else shared(1500, 0.1, 16)
    data = pack([file_of(weights, np.zeros(300, np.uint8))], request.param)
    told: list[Any] = []
    refronted(data, told.append)
    assert told[0][2][0][0] == request.param  # it has such a block
    return data


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """A bit flipped, bytes lost, or others between."""
    found, at, kind = bytearray(data), int(random.integers(len(data))), int(random.integers(3))
    if kind == 0:
        found[at] ^= 1 << int(random.integers(8))
    elif kind == 1:
        del found[at : at + int(random.integers(1, 40))]
    else:
        found[at:at] = random.bytes(int(random.integers(1, 9)))
    return bytes(found)


def sealed(body: bytes, length: int) -> bytes:
    """A container with that body, whose checksum fits."""
    return HEAD.pack(b"DKZ", VERSION, length, zlib.crc32(body)) + body


def refronted(data: bytes, change: Any) -> bytes:
    """The container with another front."""
    length = HEAD.unpack_from(data)[2]
    told = json.loads(zlib.decompress(data[HEAD.size : HEAD.size + length], -15))
    change(told)
    writer = zlib.compressobj(9, zlib.DEFLATED, -15)
    front = writer.compress(json.dumps(told).encode()) + writer.flush()
    return sealed(front + data[HEAD.size + length :], len(front))


def test_damaged_containers_are_refused(small: bytes) -> None:
    random = np.random.default_rng(0)
    for _ in range(100_000):
        damaged = mutated(small, random)
        try:
            opened(damaged)
        except DeploykitError:
            continue
        assert damaged == small


def test_forged_containers_whose_checksum_fits_never_crash(small: bytes) -> None:
    """Either an error of ours, or the same content: a checksum is on each file, too."""
    random = np.random.default_rng(0)
    whole, length = [*opened(small).values()], HEAD.unpack_from(small)[2]
    for _ in range(800):
        try:
            assert [*opened(sealed(mutated(small[HEAD.size :], random), length)).values()] == whole
        except DeploykitError:
            continue


@dataclass
class Opened:
    """A container that was taken apart: what its front tells, skeleton, sides and words."""

    told: Any
    plain: list[bytes]

    @classmethod
    def of(cls, data: bytes) -> Opened:
        """All parts, without the compression that is around them."""
        told: list[Any] = []
        refronted(data, told.append)
        _, (_, first), blocks, _ = told[0]
        sizes = [first, *(n for block in blocks for n in (block[3], block[4]))]
        ends = np.cumsum([len(data) - sum(sizes), *sizes])
        sections = [memoryview(data)[a:b] for a, b in itertools.pairwise(ends.tolist())]
        plain = [b"".join(lzma2.spread(sections[0], [told[0][1][0]]))]
        for block, side, words in zip(blocks, sections[1::2], sections[2::2], strict=True):
            plain += [b"".join(lzma2.spread(side, [block[2]])), bytes(words)]
        return cls(told[0], plain)

    def closed(self) -> bytes:
        """A container of these, whatever they say: sizes and checksum fit."""
        sections = [own if i and i % 2 == 0 else lzma2.compressed(own) for i, own in enumerate(self.plain)]
        self.told[1] = [len(self.plain[0]), len(sections[0])]
        for i, block in enumerate(self.told[2]):
            block[2:5] = len(self.plain[2 * i + 1]), len(sections[2 * i + 1]), len(sections[2 * i + 2])
        writer = zlib.compressobj(1, zlib.DEFLATED, -15)
        front = writer.compress(json.dumps(self.told).encode()) + writer.flush()
        return sealed(front + b"".join(sections), len(front))


def numbers(told: Any) -> list[tuple[Any, int]]:
    """Where those of a front are."""
    found = [(told, i) for i, n in enumerate(told) if isinstance(n, int)]
    return found + [pair for inner in told if isinstance(inner, list) for pair in numbers(inner)]


@pytest.mark.parametrize("coder", ["rans", "huffman", "contexts"])
@pytest.mark.usefixtures("quick")
def test_coders_never_crash_on_what_no_encoder_wrote(coder: str) -> None:
    """Tables, codebooks, levels, words and numbers are forged; all sizes and the checksum fit."""
    random = np.random.default_rng(0)
    kinds = [shared(1500, 0.1, 16), np.zeros(300, np.uint8), random.normal(0, 9, 300).astype(np.int8)]
    data = pack([file_of(*([kernels(40, 20), kernels(30, 20, 4)] if coder == "contexts" else kinds))], coder)
    assert Opened.of(data).closed() != b"" and opened(Opened.of(data).closed()) == opened(data)
    reached = 0
    for turn in range(600 if coder == "contexts" else 1500):
        own = Opened.of(data)
        if turn % 3 < 2:
            part = int(random.integers(len(own.plain)))
            own.plain[part] = mutated(own.plain[part] or b"0", random)
        if turn % 3 > 0:
            owner, place = numbers(own.told)[int(random.integers(len(numbers(own.told))))]
            owner[place] += int(random.choice([-1, 1, 2, 100, 4096]))
        try:
            for _, found in unpack(own.closed(), 1 << 22):
                reached += len(next(found, b""))
                list(found)
        except DeploykitError:
            continue
    assert reached  # not all were refused at the door


def test_numbers_that_lie_are_refused_before_room_is_made(small: bytes) -> None:
    """Any number of the front, replaced by others, the checksum made to fit."""

    front: list[Any] = []
    refronted(small, front.append)
    for i in range(len(numbers(front[0]))):
        for lie in (-1, 0, 1, 7, 1 << 20, 1 << 40, "x", None):

            def change(told: Any, i: int = i, lie: Any = lie) -> None:
                owner, place = numbers(told)[i]
                owner[place] = lie

            forged = refronted(small, change)
            try:
                found = opened(forged)
            except DeploykitError:
                continue
            assert found == opened(small)


def test_what_is_larger_than_the_limit_is_refused() -> None:
    bomb = pack([file_of(np.zeros(1_000_000, np.float32))])
    assert len(bomb) < 1000
    with pytest.raises(DeploykitError, match=r"unpacks to 4,000,012 bytes, more than the limit of 1,000"):
        opened(bomb, limit=1000)


def test_a_block_of_more_weights_than_a_decoder_has_tables_for_is_refused() -> None:
    """Each would take room for a table, though a container of a few bytes can have very many."""
    for many, why in ((MOST_STREAMS, "cut off"), (MOST_STREAMS + 1, "numbers of its front do not fit")):
        own = Opened.of(pack([file_of(np.random.default_rng(0).integers(0, 3, 2000).astype(np.uint8))], "rans"))
        (file,), (block,) = own.told[0], own.told[2]
        ((start, *_),) = file[3]
        file[3] = [[start + i, 1, 8, 0, 1, 1] for i in range(many)]
        block[1], file[1] = many, file[1] - 2000 + many
        with pytest.raises(DeploykitError, match=why):
            opened(own.closed())


def test_a_bomb_of_one_weight_takes_little_memory_while_it_is_small_enough_to_come_out() -> None:
    data = pack([file_of(np.zeros(20_000_000, np.float32))], "rans")
    assert len(data) < 1000 and memory(data) < 4_000_000


@pytest.mark.parametrize(
    ("data", "why"),
    [(b"", "too short"), (b"PK" + bytes(20), "does not begin with DKZ"), (HEAD.pack(b"DKZ", 9, 0, 0), "version 9")],
)
def test_what_is_no_container_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(DeploykitError, match=why):
        opened(data)


# ------------------------------------------------------------------ memory


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """LZMA2 packs less well, but soon; a decoder does not see a difference."""
    slow = lzma2._filters
    monkeypatch.setattr(lzma2, "_filters", lambda size: [slow(size)[0] | {"preset": 0}])


def memory(data: bytes) -> int:
    """Bytes that unpacking takes, of those that Python's allocators and numpy know of; LZMA's dictionary is one."""
    tracemalloc.start()
    try:
        for _, pieces in unpack(data):
            for _ in pieces:
                pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


LARGE: dict[str, list[NDArray[Any]]] = {
    "dense": [np.random.default_rng(0).integers(0, 16, 600_000).astype(np.float32)],
    "sparse": [shared(600_000, 0.02, 7)],
    "bytes": [np.random.default_rng(0).normal(size=150_000).astype(np.float32)],
    "narrow": [np.random.default_rng(0).normal(0, 9, 900_000).astype(np.int8)],
    "kernels": [kernels(200, 300), kernels(300, 100, 25, 1)],
    "small kernels": [kernels(20, 30, seed=i) for i in range(20)],
    "many small ones": [np.random.default_rng(i).integers(0, 3, 1000).astype(np.int8) for i in range(200)],
}


@pytest.mark.parametrize("coder", ["rans", "huffman", "contexts"])
@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.usefixtures("quick")
def test_decoding_takes_no_more_memory_than_is_told_and_not_much_less(coder: str, kind: str) -> None:
    data = pack([file_of(*LARGE[kind])], coder)
    assert front_of(data).blocks
    assert (coder == "contexts" and "kernels" in kind) == ("contexts" in [b.coder for b in front_of(data).blocks])
    assert memory(data) <= peak(front_of(data)) < 3 * memory(data)


@pytest.mark.usefixtures("quick")
def test_a_skeleton_is_read_in_pieces() -> None:
    file = File("text", np.random.default_rng(0).integers(0, 3, 5 * PIECE // 2).astype(np.uint8).tobytes(), ())
    data = pack([file])
    found = [len(piece) for _, pieces in unpack(data) for piece in pieces]
    assert max(found) <= PIECE and sum(found) == len(file.data)
    assert memory(data) <= peak(front_of(data)) < 2 * memory(data)


@pytest.mark.usefixtures("quick")
def test_the_largest_layer_decides_however_many_there_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("deploykit.dkz.container.MOST_VALUES", 50_000)
    layers = [np.random.default_rng(seed).integers(0, 4000, 50_000).astype(np.float32) for seed in range(15)]
    one, all_ = pack([file_of(layers[0])], "rans"), pack([file_of(*layers)], "rans")
    assert len(front_of(all_).blocks) == 15
    assert peak(front_of(all_)) < 1.2 * peak(front_of(one))
    (tmp_path / "net.dkz").write_bytes(all_)
    tracemalloc.start()
    unpack_file(tmp_path / "net.dkz", tmp_path / "out")
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    whole = (tmp_path / "out" / "net.bin").stat().st_size
    assert taken < 1.5 * memory(one) and taken < whole / 2 and taken < len(all_)  # not even the container is read whole


def test_a_block_has_a_bounded_number_of_tables() -> None:
    random = np.random.default_rng(0)
    many = [random.integers(0, 3, 1000).astype(np.uint8) for _ in range(MOST_STREAMS + 1)]
    front = front_of(pack([file_of(*many)], "rans"))
    assert [block.weights for block in front.blocks] == [MOST_STREAMS, 1]


# ------------------------------------------------------------------ stages


@MANY
@given(
    counts=st.lists(st.integers(70, 4000), min_size=1, max_size=4), share=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    many=st.sampled_from([1, 3, 30, 5000]), seed=st.integers(0, 99),
    coder=st.sampled_from([None, "rans", "huffman", "contexts"]),
)  # fmt: skip
def test_what_stages_tell_sums_to_the_container(
    counts: list[int], share: float, many: int, coder: str | None, seed: int
) -> None:
    weights = [shared(count, share, many, seed + i) for i, count in enumerate(counts)]
    weights[0] = kernels(counts[0] // 40, 10, seed=seed)
    files = [file_of(*weights), File("other", b"as it is", ())]
    made = packed(files, coder)
    rows = stages(files, made)
    assert sum(row.coded for row in rows) == len(made.data) == len(pack(files, coder))
    assert sum(row.before for row in rows) == sum(len(file.data) for file in files)
    assert [row.name for row in rows] == [*(f"w{i}" for i in range(len(counts))), REST]
    assert min(row.coded for row in rows) >= 0 and rows[-1].coded > HEAD.size
    for row, own in zip(rows, weights, strict=False):
        assert (row.count, row.kept) == (own.size, pytest.approx(100 * np.count_nonzero(own) / own.size))
        assert row.before >= row.pruned >= row.shared
        allowed = {None: ["rans", "huffman", "contexts"], "contexts": ["rans", "contexts"]}.get(coder, [coder])
        assert row.coder in ("lzma", *allowed)
        assert (row.coder == "lzma") == (row.streams == "")


def test_stages_are_those_of_going_through_one_by_one() -> None:
    """Gaps with fillers, codes of as many bits as tell the values apart, and the codebook, as the paper counts them."""
    own = shared(3000, 0.1, 12)
    files = [file_of(own)]
    (row, rest) = stages(files, packed(files, "rans"))
    book = np.unique(own)
    codes = np.where(own == 0, 0, 1 + np.searchsorted(book, own))
    bits = math.ceil(math.log2(len(book)))
    sizes = {b: len(sparse_by_hand(codes.tolist(), b)) for b in range(1, 9)}
    assert row.pruned == min(-(-n * (32 + b) // 8) for b, n in sizes.items())
    assert row.shared == min(-(-n * (bits + b) // 8) for b, n in sizes.items()) + 4 * len(book)
    assert (row.before, row.code_bits, row.coder) == (12_000, bits, "rans")
    assert sizes[row.index_bits] * (bits + row.index_bits) == min(n * (bits + b) for b, n in sizes.items())
    assert rest == Stage(REST, "", 0, 0.0, 12, 12, 0, 0, 12, rest.coded, "", "")
